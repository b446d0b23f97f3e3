"""What must be true of experiments and figures: tables have the numbers, claims can fall, pictures are drawn.

On made-up entries; runs from end to end are in test_run.py.
"""

import io
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from pandas import DataFrame
from torch import nn

from data import experiments, figures
from data.experiments import CLAIMS, EXPERIMENTS, Condition, Measured
from data.methods import METHODS, STATIC
from data.miniature.tasks import TASKS
from data.paper import published
from data.suite import Adaptation, Suite, Training

ARITHMETIC, ADA, ONE, CURED = "Task Arithmetic", "AdaMerging (layer-wise)", "WEMoE (1-layer)", "WEMoE + diversity"
MAIN = [method.name for method in METHODS.values() if method.main]


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(2, 2), "mlp": nn.Linear(2, 2)}) for _ in "ab")


def suite_of(name: str = "miniature", source: str | None = None, tasks=tuple(TASKS), **more) -> Suite:
    """A suite of towers that nobody runs, and images of noise."""
    test = {task: (torch.randint(0, 256, (8, 3, 12, 12), dtype=torch.uint8), torch.arange(8)) for task in tasks}
    models = Training(8, 1, 0.1), Adaptation(160, 8e-4, 120, 1e-2, 60, 1e-2), Tower(), {task: Tower() for task in tasks}
    data = dict.fromkeys(tasks, torch.eye(3)), test, lambda task, split, count: test[task], nn.Identity()
    given = {"published": tuple(published.eight_tasks(name, source)), "source": source, **more}
    return Suite(name, 0, torch.device("cpu"), "float32", *models, *data, **given)


def entry(condition: str, name: str, accuracy: dict[str, float], seed: int = 0) -> dict:
    """As if measured: what merges once is a point better at another λ, what adapts had 60 % before."""
    tasks, average, method = list(accuracy), float(np.mean(list(accuracy.values()))), METHODS[name]
    found = {"condition": condition, "name": name, "seed": seed, "accuracy": accuracy, "average": average, "bytes": 7e6}
    found |= {"group": method.group, "needs": list(method.needs), "arxiv": method.arxiv, "seconds": 12.3}
    found |= {"evaluation_seconds": 1.2, "total_parameters": 1000, "trainable_parameters": 3}
    if method.group == STATIC:
        found["curve"] = [{"scaling": lam, "average": average + (lam == 0.6)} for lam in (0.3, 0.6)]
    if "test-time adaptation" in method.needs:
        found["adaptation"] = {"steps": [0, 10], "accuracy": [60.0, average], "entropy": [2.0] * 5 + [1.0] * 15}
    if name.startswith("WEMoE"):
        rows = {f"blocks.{i}.mlp": np.eye(len(tasks)).tolist() for i in range(2)}
        found |= {"routing": rows, "first_choice": rows}
    if name == "Task Arithmetic of two tasks":
        found |= {"grid": [-1.0, 0.0, 1.0], "loss": [[3.0, 2.0, 1.5], [2.0, 1.0, 0.5], [1.0, 0.25, 2.0]]}
    return found


def measured_of(name: str, suite: Suite, methods: list[str] | None = None, seeds: int = 1) -> Measured:
    """As if an experiment had been run with all of its methods; accuracies are random."""
    chosen, rng, entries = EXPERIMENTS[name], np.random.default_rng(0), []
    conditions = chosen.conditions(suite, methods or (MAIN if chosen.methods is None else chosen.methods))
    for seed, one in itertools.product(range(seeds), conditions):
        tasks = one.change.get("tasks", suite.tasks)
        for method in one.methods:
            accuracy = dict(zip(tasks, rng.uniform(20, 99, len(tasks)).round(2).tolist()))
            entries.append(entry(one.name, method, accuracy, seed))
    return Measured(suite, conditions, entries)


def rows_of(table: DataFrame) -> list[list[str]]:
    """The cells of its Markdown, row by row, which all have as many."""
    lines = [line for line in figures.markdown({"": table}).splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in rows} == {table.shape[1] + 1}
    return [rows[0], *rows[2:]]


# ---- Every experiment ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_its_figures_and_tables_with_means_over_tasks_and_seeds(name):
    chosen = EXPERIMENTS[name]
    assert all(method in METHODS for method in [*(chosen.methods or ()), *(chosen.usual or ())])
    suite = suite_of(tasks=experiments.in_suite(TASKS, chosen.tasks or list(TASKS)))
    measured = measured_of(name, suite, seeds=3) if chosen.conditions else None
    shown = chosen.show(measured)
    assert bool(shown.figures) == (name != "parameters") and bool(shown.claims) == (name in CLAIMS)
    for figure in shown.figures.values():
        figure.savefig(picture := io.BytesIO(), format="png", dpi=10)
        assert picture.getvalue().startswith(b"\x89PNG")
    assert max(map(len, figures.console(shown.tables).splitlines())) <= 100
    assert shown.tables and all(len(rows_of(table)) > 1 for table in shown.tables.values())
    if name not in ("routing", "sweep", "vectors", "landscape", "parameters", "generalization"):  # about other numbers
        cells = {cell for table in shown.tables.values() for row in rows_of(table) for cell in row}
        for (_, method), rows in measured.frame.groupby(["condition", "method"]):
            seeds = rows.groupby("seed").accuracy.mean()
            assert f"{seeds.mean():.1f} ± {seeds.std():.1f}" in cells
            assert any(cell.startswith(method) for cell in cells)


def test_the_main_table_has_groups_times_and_needs_and_the_console_what_fits():
    shown = EXPERIMENTS["main"].show(measured_of("main", suite_of(), seeds=2))
    assert shown.figures.keys() == {"accuracy", "costs", "tasks", "adaptation", "scalings", "routing"}
    heading, *rows = rows_of(shown.tables[""])
    assert heading == ["Method", *TASKS, "Average", *figures.DETAILS]
    assert [row[0] for row in rows if row[0] in METHODS] == MAIN
    groups = [row[0].strip("*") for row in rows if row[0].startswith("*")]
    assert groups == list(dict.fromkeys(METHODS[name].group for name in MAIN))
    details = "12|1.2|1,000|3|7.0|labelled validation data|2212.04089"
    assert next(row for row in rows if row[0] == ARITHMETIC)[-7:] == details.split("|")
    last = figures.console(shown.tables).splitlines()[-1]
    assert last.startswith("Individual") and last.count(" ± ") == 1 and last.endswith(" 12")


def test_lengths_and_angles_of_task_vectors():
    """Of 3 θ_0 the vector is twice θ_0 and the angle 0; of -θ_0 it is as long, and the angle is that of -1."""
    tower, expert = Tower(), Tower()
    length = 2 * torch.cat([p.flatten() for p in tower.blocks[1].mlp.parameters()]).double().norm().item()
    for factor in (3, -1):
        expert.load_state_dict({name: factor * p for name, p in tower.state_dict().items()})
        suite = replace(suite_of(), pretrained=tower, experts={"one": expert})
        table = EXPERIMENTS["vectors"].show(Measured(suite, [], [])).tables[""]
        found, cosine = map(float, table.loc["mlp, 1"])
        assert found == pytest.approx(length, rel=1e-3) and cosine == pytest.approx(np.sign(factor))


def test_λ_and_the_least_loss_are_told_where_they_are():
    swept = EXPERIMENTS["sweep"].show(measured_of("sweep", suite_of())).tables
    assert [list(table) for table in swept.values()] == [["0.1", "0.3", "0.6", "1.0"]] * 2
    table = EXPERIMENTS["landscape"].show(measured_of("landscape", suite_of())).tables[""]
    assert dict(table.loc["Scenes and Cars"]) == {"λ1": "1", "λ2": "0", "least loss (nats)": "0.25"}


# ---- Published figures -----------------------------------------------------------------------------------------------


def test_every_row_of_the_papers_tables_stands_beside_ours_in_some_experiment():
    """Cell by cell, under the method that it is of, with the difference below."""
    printed, rows, names = Counter(), Counter(), ("main", "depths", "modules", "generalization", "robustness")
    for arch, chosen in itertools.product(("ViT-B-32", "ViT-B-16", "ViT-L-14"), map(EXPERIMENTS.get, names)):
        measured = measured_of(chosen.name, suite_of(arch, "paper", tuple(chosen.tasks or published.PUBLISHED_TASKS)))
        for heading, *cells in map(rows_of, figures.tables(measured, chosen.details).values()):
            tasks = [task for task in heading if task in published.PUBLISHED_TASKS]
            for ours, theirs, difference in zip(cells, cells[1:], cells[2:]):
                if theirs[0] == "published (paper)":
                    own, known, apart = (dict(zip(heading, row)) for row in (ours, theirs, difference))
                    printed[(arch, ours[0], *sorted((task, known[task]) for task in tasks))] += 1
                    for task in tasks:
                        assert float(apart[task]) == pytest.approx(float(own[task]) - float(known[task]), abs=0.11)
    for table in published.paper_tables().values():
        tasks = table.get("tasks") or table.get("seen", []) + table.get("unseen", []) or published.PUBLISHED_TASKS
        for row in itertools.chain(*(table.get("conditions") or {"all": table["rows"]}).values()):
            if "average" in row or "seen" in row:
                cells = (f"{value:.1f}" for value in row.get("accuracy") or row["seen"] + row["unseen"])
                rows[(table["model"], published.our_name(row["method"], "paper"), *sorted(zip(tasks, cells)))] += 1
    assert rows.total() == 13 + 11 + 3 + 6 + 3 + 2 * 8 * 5 and not rows - printed


def row_of(method: str, margin: float | None, source: str = "hub", **cells: float) -> dict:
    return {"method": method, "source": source, "accuracy": cells, "margin": margin, "why": "made otherwise."}


def test_rows_are_claimed_within_their_margins_if_at_all():
    rows = [row_of("WEMoE", 2.0, "paper", A=90.0, B=80.0), row_of(ARITHMETIC, None, A=60.0), row_of("SMILE", 1.0, A=1)]
    entries = [entry("main", name, {"A": 90.0, "B": 76.0}) for name in ("WEMoE", ARITHMETIC)]
    measured = Measured(suite_of(tasks="AB"), [Condition("main", ["WEMoE", ARITHMETIC], {}, rows)], entries)
    table = figures.tables(measured)[""]
    lines = ["Method|A|B|Average", "WEMoE|90.0|76.0|83.0", "published (paper)|90.0|80.0|85.0"]
    lines += ["difference|+0.0|-4.0|-2.0", "Task Arithmetic|90.0|76.0|83.0"]
    lines += ["published (hub)|60.0||", "difference|+30.0||"]
    assert ["|".join(row) for row in rows_of(table)] == lines
    assert figures.markdown({"": table}).endswith("\n\nNot claimed: Task Arithmetic (hub): made otherwise.\n")
    (claim,) = experiments.claims_of(measured, {}, {})
    assert claim["claim"] == "WEMoE is within 2 points of the published average (paper)" and claim["holds"]
    part = replace(measured, suite=replace(measured.suite, claimable=False))
    assert experiments.claims_of(part, {}, {}) == []
    assert experiments.comparable(suite_of(), rows, entries) == rows  # but not with fewer steps, where WEMoE adapted
    assert experiments.comparable(suite_of(shortened=True), rows, entries) == rows[1:]
    entries[0]["accuracy"]["B"] = 75.9
    assert not experiments.claims_of(replace(measured), {}, {})[0]["holds"]


@pytest.mark.parametrize("source", ["hub", "paper"])
def test_the_verdict_on_the_papers_models_comes_first_in_both_numbers(source):
    names = experiments.STORY + ["WEMoE (as the hub ran it)"] * (source == "hub")
    suite = suite_of("ViT-B-32", source, tuple(published.PUBLISHED_TASKS))
    theirs = {row["method"]: row["accuracy"] for row in published.eight_tasks("ViT-B-32", "paper")}
    entries = [entry("main", name, theirs.get(name, theirs["WEMoE"])) for name in names]
    measured = Measured(suite, EXPERIMENTS["main"].conditions(suite, names), entries)
    claims = EXPERIMENTS["main"].show(measured).claims
    assert [claim["claim"] for claim in claims[:4] if claim["holds"]] == list(CLAIMS["main"])[:4]
    assert re.fullmatch(r"ours 89.4\d > 80.95, the paper's 89.42 > 80.95", claims[2]["detail"])
    within = [claim["claim"] for claim in claims if claim["claim"].startswith("WEMoE") and "within" in claim["claim"]]
    assert len(within) == (2 if source == "hub" else 1)
    other = measured_of("collapse", replace(suite, published=()))  # of which the eight tasks' figures are none
    assert not any("paper's" in claim["detail"] for claim in EXPERIMENTS["collapse"].show(other).claims)
    for less in ({"shortened": True}, {"source": None, "published": ()}):
        few = replace(measured, suite=replace(suite, **less))
        found = [claim for name in ("main", "depths") for claim in EXPERIMENTS[name].show(few).claims]
        assert all("within" in claim["claim"] for claim in found)


# ---- Claims ----------------------------------------------------------------------------------------------------------

TABLE_2 = {"Individual": (90.3,), "Pre-trained": (48.2,), "Weight Averaging": (66.5,), ARITHMETIC: (68.0,)}
TABLE_2 |= {ADA: (80.1,), "WEMoE": (89.2,), ONE: (86,), "WEMoE (0-layer)": (86,)}
CLEAN = {ARITHMETIC: (80, 80), "WEMoE": (95, 95), CURED: (94, 95.2)}
NOISE = {ARITHMETIC: (50, 50), "WEMoE": (9, 90), CURED: (70, 80)}
HOLD = {  # experiment -> its tasks, and condition -> method -> accuracies of which all claims hold
    "main": ("A", {"main": TABLE_2}),
    "depths": ("A", {"main": {ADA: (80.9,), ONE: (88.8,), "WEMoE": (89.4,)}}),  # Table 10
    "modules": ("A", {"main": dict(zip(experiments.MODULES, [(88.8,), (89.2,), (86.4,)]))}),
    "generalization": ("ABC", {"without C": {"WEMoE": (90, 80, 10), "RegMean": (89, 79, 99)}}),
    "unload": ("A", {"main": dict(zip(experiments.UNLOADED, [(80,), (85,), (85.2,)]))}),
    "collapse": ("AB", {"clean": CLEAN, "noise": NOISE}),
}
FALL = [  # experiment, condition, accuracies that change, and which of the claims fall
    ("main", "main", {"Weight Averaging": (48.0,)}, {0}),
    ("main", "main", {"Weight Averaging": (84.5,)}, {1, 5}),
    ("main", "main", {ADA: (89.2,)}, {2}),
    ("main", "main", {"WEMoE": (85.0,), "WEMoE (0-layer)": (84.0,)}, {3}),
    ("main", "main", {"Individual": (89.5,)}, {4}),
    ("main", "main", {"WEMoE (0-layer)": (87.0,)}, {6}),
    ("main", "main", {"WEMoE": (60.0,)}, {0, 1, 2, 3, 6, 8}),
    ("depths", "main", {ONE: (88.3,)}, {0}),
    ("depths", "main", {ADA: (88.8,)}, {1}),
    ("modules", "main", {experiments.MODULES[1]: (88.7,)}, {0}),
    ("modules", "main", {experiments.MODULES[2]: (88.8,)}, {1}),
    ("generalization", "without C", {"RegMean": (95, 79, 9)}, {0}),
    ("unload", "main", {"WEMoE (0-layer)": (84.6,)}, {0}),
    ("collapse", "noise", {"WEMoE": (60, 60)}, {0}),
    ("collapse", "noise", {CURED: (40, 90)}, {1}),
    ("collapse", "clean", {CURED: (93, 95)}, {2}),
]
OTHERS = {"main": {7}, "unload": {1}}  # claims that are not about accuracies: see below


def claims_of(name: str, accuracies: dict[str, dict[str, tuple]], worse: bool = False) -> list[dict]:
    """What is claimed of these accuracies: condition -> method -> one for each task; `worse`: of entropy and size."""
    tasks = HOLD[name][0]
    columns = {"Seen": list(tasks[:2]), "Unseen": list(tasks[2:])} if name == "generalization" else {}
    conditions = [Condition(one, list(methods), {}, [], columns) for one, methods in accuracies.items()]
    entries = [entry(c.name, m, dict(zip(tasks, accuracies[c.name][m]))) for c in conditions for m in c.methods]
    for one in entries if worse else ():
        one.get("adaptation", {})["entropy"] = [1.0, 2.0]
        one["total_parameters"] += one["name"] == "WEMoE (0-layer, unloaded)"
    return EXPERIMENTS[name].show(Measured(suite_of(tasks=tasks), conditions, entries)).claims


@pytest.mark.parametrize("name", HOLD)
def test_claims_hold_or_fall_with_the_accuracies_that_they_are_about(name):
    """Each of them; those about methods that were not run are left out."""
    base = HOLD[name][1]
    claims, all_fallen = claims_of(name, base), OTHERS.get(name, set())
    assert len(claims) == len(CLAIMS[name]) and all(claim["holds"] for claim in claims)
    for _, condition, change, fallen in (row for row in FALL if row[0] == name):
        changed = claims_of(name, {**base, condition: {**base[condition], **change}})
        assert {i for i, claim in enumerate(changed) if not claim["holds"]} == fallen, change
        all_fallen = all_fallen | fallen
    assert all_fallen == set(range(len(claims)))
    assert len(claims_of(name, {one: dict(list(methods.items())[1:]) for one, methods in base.items()})) < len(claims)


def test_claims_about_entropy_and_size_fall_too():
    for name, others in OTHERS.items():
        assert {i for i, claim in enumerate(claims_of(name, HOLD[name][1], True)) if not claim["holds"]} == others


def test_numbers_of_parameters_that_differ_fall(monkeypatch):
    monkeypatch.setattr(published, "compared", lambda: iter([("one", 96, "96"), ("another", 7160928, "7.17M")]))
    (claim,) = EXPERIMENTS["parameters"].show(None).claims
    assert not claim["holds"] and claim["detail"] == "1 == 2"


def test_formulas_are_about_methods_that_there_are():
    """Or about what is known besides: a name that nobody has would leave a claim out without a word."""
    known = r"size of |best|entropy at|accuracy at|equal|all|.*, (clean|noise)$"
    formulas = [formula for sentences in CLAIMS.values() for formula in sentences.values()]
    names = {name for formula in formulas for name in re.findall("{(.+?)}", formula)}
    assert {name for name in names - METHODS.keys() if not re.match(known, name)} == set()


def test_what_methods_need_is_what_table_7_says():
    """Of each method that it names, and of its variants; but TIES' own mean comes with λ = 1, which nobody chooses."""
    for row in published.paper_tables()["7"]["rows"]:
        needs = [kind for kind, needed in row.items() if needed is True]
        variants = [name for name in METHODS if re.match(rf"{row['method']}(\+\+)?( \(| \+|$)", name)]
        assert published.our_name(row["method"], "paper") in variants
        found = {name: list(METHODS[name].needs) for name in variants if name != "TIES-Merging (mean)"}
        assert found == dict.fromkeys(found, needs)


def test_any_backend_that_the_environment_names_will_do():
    command = "from data import figures; figures.heat({'': figures.DataFrame([[1.0]])}, '').savefig('/dev/null')"
    environment = {**os.environ, "MPLBACKEND": "no_such_backend"}
    subprocess.run([sys.executable, "-c", command], env=environment, check=True, timeout=300)


def test_every_experiment_is_listed_with_its_numbers_in_the_paper():
    lines = experiments.listed().splitlines()
    assert [re.match(r"(\w+)(?: \(.*\))?: .+ min\.$", line)[1] for line in lines] == list(EXPERIMENTS)
    numbers = [number for chosen in EXPERIMENTS.values() for number in chosen.paper]
    assert len(set(numbers)) == len(numbers) and {"table2", "table11", "fig3", "fig12", "appendixb3"} <= set(numbers)
