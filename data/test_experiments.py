"""What must be true of reproduce.py: it runs from end to end, goes on after an interruption, and names what is wrong.

On two tasks of the miniature with hardly any training; and on the paper's suite, on a mirror in the real layout with a
tiny CLIP in the place of ViT-B/32.
"""

import copy
import itertools
import json
import math
import os
import re
import shutil
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import reproduce
import wemoe
from data import baselines, experiments, methods, report
from data import suite as suites
from data.dependencies import code_of
from data.files import InputError, write
from data.methods import ADAPTATION, TRAINING_IMAGES, VALIDATION
from data.miniature import render
from data.miniature import suite as miniature
from data.paper import hub, published
from data.paper import suite as paper_suites
from data.paper.parameters import rounds_to
from data.paper.test_paper import (
    TINY,
    OldClasses,
    make,
    picture,
    tiny,  # noqa: F401 (a fixture)
    tower_like,
    write_mirror,
    write_parquet,
    write_set,
)
from data.processes import choose_device, each
from data.suite import Suite, Training

HERE = Path(__file__).parents[1]
GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def model():
    return tower_like(0).eval()


# ---- reproduce.py from end to end, on two tasks, with hardly any training --------------------------------------------

TRAINING = Training(images=24, steps=10, lr=3e-3, batch_size=8, warmup=1)
WIDTH, BLOCKS = 32, 2  # of the vision tower that stands in for the shipped one
SHIPPED = miniature.load_pretrained


def small_clip() -> open_clip.CLIP:
    """The shipped text tower beside a vision tower that is smaller, and untrained."""
    clip = SHIPPED()
    torch.manual_seed(0)
    clip.visual = open_clip.transformer.VisionTransformer(32, 8, WIDTH, BLOCKS, 2, 4, output_dim=128)
    return clip.eval()


@pytest.fixture(scope="module", autouse=True)
def small_miniature():
    """Small models, few images, and little training, but enough for the accuracies of experts to differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature, "load_pretrained", small_clip)
        patch.setattr(miniature, "TRAINING", TRAINING)
        patch.setattr(miniature, "TEST_IMAGES", 24)
        yield


def run_small(folder: Path, *arguments: str) -> tuple[int, dict]:
    """Exit status and results of reproduce.py with these arguments, small."""
    tasks = [] if "--tasks" in arguments else ["--tasks", "signs", "Digits"]
    status = reproduce.main([*tasks, "--steps", "2", "--workers", "1", "--output", str(folder), *arguments])
    file = folder / "miniature" / "results.json"
    return status, json.loads(file.read_text()) if file.exists() else {}


@pytest.fixture
def small(tmp_path):
    return lambda *arguments, output="results": run_small(tmp_path / output, *arguments)


ADAPTING = ["--steps", "4", "--methods", "individual", "WEMoE", "E-WEMoE", "WEMoE (rank 16)"]
ADAPTING += ["AdaMerging (layer-wise)", "Concrete Task Arithmetic"]


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> dict:
    """What a run of these methods finds, undisturbed."""
    return without_timings(run_small(tmp_path_factory.mktemp("usual"), *ADAPTING)[1])


def without_timings(results: dict) -> dict:
    return {**results, "methods": [{**m, "seconds": 0, "evaluation_seconds": 0} for m in results["methods"]]}


def test_results_are_those_of_the_contract(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "save", partial(Figure.savefig, dpi=20, format="png"))
    status, results = small("--methods", "all", "--steps", "1")
    assert status == (0 if all(claim["holds"] for claim in results["claims"]) else 1)
    assert {"suite": "miniature", "seed": 0, "tasks": ["Signs", "Digits"]}.items() <= results.items()
    assert results["device"] in ("cpu", "cuda") and results["versions"]["torch"] == torch.__version__
    assert [method["name"] for method in results["methods"]] == reproduce.MAIN
    for method in results["methods"]:
        assert set(method["needs"]) <= {TRAINING_IMAGES, VALIDATION, ADAPTATION}
        assert (ADAPTATION in method["needs"]) == ("adaptation" in method)
        assert set(method["accuracy"]) == {"Signs", "Digits"}
        assert method["average"] == pytest.approx(sum(method["accuracy"].values()) / 2, abs=0.011)
    methods = {method["name"]: method for method in results["methods"]}
    assert methods["WEMoE"]["trainable_parameters"] == BLOCKS * (WIDTH * WIDTH + WIDTH + WIDTH * 2 + 2)
    assert methods["Individual"]["total_parameters"] == 2 * methods["Pre-trained"]["total_parameters"]
    assert [point["scaling"] for point in methods["Task Arithmetic"]["curve"]] == [0.1, 0.2, 0.3, 0.4, 0.6, 1]
    usual = methods["Task Arithmetic"]["curve"][2]["average"]
    assert usual == pytest.approx(methods["Task Arithmetic"]["average"], abs=0.01)
    assert {"claim", "holds", "detail"} == set(results["claims"][0])
    folder = tmp_path / "results" / "miniature"
    assert {f"{name}.png" for name in ("accuracy", "adaptation", "costs", "routing", "scalings", "tasks")} == {
        f.name for f in folder.glob("*.png")
    }
    printed = capsys.readouterr().out
    assert (folder / "table.md").read_text() in printed
    assert all(claim["claim"] in printed for claim in results["claims"])


def test_what_the_miniature_merges_is_the_shipped_tower(small, monkeypatch):
    """Which the other tests replace: it knows most of the answers before any training."""
    monkeypatch.setattr(miniature, "load_pretrained", SHIPPED)
    (method,) = small("--methods", "pre-trained")[1]["methods"]
    assert method["average"] > 50 and method["total_parameters"] > 10**6


def test_interrupted_again_and_again_it_ends_with_the_same_results(usual, small, monkeypatch):
    """What is finished is not done again, nor are an adaptation's steps; masks are drawn as if there were no break."""
    entropy, entropies, rendered = wemoe.entropy, [], Mock(wraps=miniature.render)

    def interrupted(logits):
        entropies.append(1)
        if len(entropies) % 10 == 0:  # in every third step: an entropy is taken twice for each of two tasks
            raise KeyboardInterrupt
        return entropy(logits)

    monkeypatch.setattr(wemoe, "entropy", interrupted)
    monkeypatch.setattr(miniature, "render", rendered)
    interruptions = 0
    while (found := small(*ADAPTING)) == (130, {}) and interruptions < 20:
        interruptions += 1
    results = found[1]
    assert without_timings(results) == usual
    steps = sum(len(method["adaptation"]["entropy"]) for method in usual["methods"] if "adaptation" in method)
    assert len(entropies) == 4 * steps + 2 * interruptions and interruptions == 8
    assert small(*ADAPTING)[1] == results and len(entropies) == 4 * steps + 2 * interruptions
    assert [call.args[1] for call in rendered.mock_calls].count("train") == 2  # for two experts


def test_two_workers_and_deterministic_algorithms_change_nothing_but_another_seed_does(usual, small):
    torch.use_deterministic_algorithms(True)
    try:
        _, results = small(*ADAPTING, "--workers", "2")
    finally:
        torch.use_deterministic_algorithms(False)
    assert without_timings(results) == usual
    _, other = small("--seed", "1", "--methods", "WEMoE", "--steps", "4", output="other")
    curves = [next(m["adaptation"] for m in run["methods"] if m["name"] == "WEMoE") for run in (usual, other)]
    assert curves[0] != curves[1]


def test_with_the_hubs_settings_the_learning_rate_stays_and_results_stand_apart(small, tmp_path, capsys):
    methods, rates = ["--methods", "WEMoE", "AdaMerging (layer-wise)", "--steps", "3"], []
    _, usual = small(*methods)

    def see(optimizer, *_) -> None:
        rates.extend([optimizer.param_groups[0]["lr"]] if type(optimizer) is torch.optim.Adam else [])

    hook = register_optimizer_step_post_hook(see)
    try:
        small(*methods, "--settings", "hub")
    finally:
        hook.remove()
    assert Counter(rates) == {miniature.ADAPTATION.lr: 3, miniature.ADAPTATION.lambda_lr: 3}  # as many steps for λ
    results = json.loads((tmp_path / "results/miniature-hub-settings/results.json").read_text())
    settings = [run["settings"]["adaptation"]["settings"] for run in (usual, results)]
    assert settings == ["paper", "hub"] and small(*methods)[1] == usual
    assert "adapt did so with the settings of the hub" in capsys.readouterr().out
    curves = [[method["adaptation"]["entropy"] for method in run["methods"]] for run in (usual, results)]
    assert all(one[1:] != other[1:] for one, other in zip(*curves))
    (wemoe_,) = (method for method in results["methods"] if method["name"] == "WEMoE")
    choices = [share for layer in wemoe_["first_choice"].values() for row in layer for share in row]
    assert set(choices) == {0, 1}  # one λ for all of a batch


SHORT = {  # experiment -> methods, number of conditions, figures
    "depths": (["AdaMerging (layer-wise)", "WEMoE (1-layer)", "WEMoE"], 1, {"accuracy"}),
    "modules": (None, 1, {"accuracy"}),
    "generalization": (["Pre-trained", "RegMean", "Task Arithmetic"], 2, {"generalization"}),
    "robustness": (["Task Arithmetic", "AdaMerging (layer-wise)"], 2, {"robustness", "tasks"}),
    "sweep": (["Task Arithmetic", "WEMoE (0-layer)"], 2 * 5, {"sweep"}),
    "ablation": (["WEMoE (0-layer)", "WEMoE"], 1 + 3, {"ablation", "rates"}),
    "layers": (["Task Arithmetic", "WEMoE (deepest 50%)", "WEMoE"], 1, {"layers"}),
    "unload": (None, 1, set()),
    "routing": (None, 1, {"routing", "first_choice"}),
    "vectors": (None, 0, {"vectors"}),
    "landscape": (None, 1, {"landscape"}),
    "collapse": (["Task Arithmetic", "WEMoE + diversity"], 2, {"collapse", "tasks"}),
    "taskfree": (["Task Arithmetic", "WEMoE", "Individual"], 1, {"task_free"}),
    "tasks": (["Task Arithmetic", "WEMoE (TSV-M elsewhere)", "Oracle routing (TSV-M elsewhere)"], 1, {"tasks"}),
}
TABLES = {"depths", "modules", "generalization", "robustness", "unload", "collapse"}  # of accuracies by task


def test_every_experiment_is_run_below():
    assert SHORT.keys() == reproduce.EXPERIMENTS.keys() - {"main", "parameters"}  # which have tests of their own


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")  # experts are fine-tuned once for all experiments


@pytest.mark.parametrize("name", SHORT)
def test_experiments_from_end_to_end(name, shared, monkeypatch, capsys):
    """Every condition with every method: tables with the right tasks and averages, and figures."""
    methods, count, figures = SHORT[name]
    chosen = reproduce.EXPERIMENTS[name]
    seeds, lambdas = min(2, chosen.seeds), (0.0, 0.3)
    few = replace(chosen, seeds=seeds, scalings=lambdas if chosen.scalings else ())
    if name == "robustness":
        few = replace(few, conditions=partial(experiments.corrupted_conditions, kinds=("contrast",)))
    grid = partial(experiments.landscape, points=3, count=4)
    landscape = replace(reproduce.METHODS[experiments.LANDSCAPE], make=grid)
    monkeypatch.setitem(reproduce.EXPERIMENTS, name, few)
    monkeypatch.setitem(reproduce.METHODS, experiments.LANDSCAPE, landscape)
    monkeypatch.setattr(experiments, "ABLATION", {"lr": experiments.ABLATION["lr"]})
    monkeypatch.setattr(experiments, "LAMBDAS", lambdas)
    several = not chosen.tasks
    options = ["--steps", "1", *(["--methods", *methods] if methods else [])]
    options += ["--tasks", "signs", "digits"] if several else []
    command = ["--workers", "1", "--output", str(shared), "--experiment", name]
    assert reproduce.main([*command, *options]) in (0, 1)
    folder = shared / "miniature" / name
    results, table = json.loads((folder / "results.json").read_text()), (folder / "table.md").read_text()
    assert results["experiment"] == name and len(results["conditions"]) == count
    assert table in capsys.readouterr().out and {file.stem for file in folder.glob("*.png")} == figures
    outcomes = []
    for condition in results["conditions"]:
        for method, entries in condition["methods"].items():
            assert len(entries) == seeds and (method in table or name not in TABLES)
            outcomes.append(dict(entries[0], name="", seconds=0, evaluation_seconds=0))
            for average, tasks in condition["columns"].items() if name in TABLES else ():
                values = [np.mean([entry["accuracy"][task] for task in tasks]) for entry in entries]
                assert f"{np.mean(values):.1f}" in table and average in table, (method, tasks)
    assert len(outcomes) < 2 or any(outcome != outcomes[0] for outcome in outcomes)  # conditions make a difference
    if name == "generalization":
        assert results["conditions"][0]["columns"]["Unseen"] == ["Digits", "LandUse"]
    if name == "collapse":
        assert " ± " in table
    found = {len(outcome["routing"]) for outcome in outcomes if "routing" in outcome}
    if several and outcomes:
        assert found == {"layers": {1, 2}, "modules": {2, 4}, "landscape": set()}.get(name, {BLOCKS})  # routed modules
    if name == "unload":
        assert all(claim["holds"] for claim in results["claims"]) and len(results["claims"]) == 2
    if name == "routing":
        rows = [row for matrix in outcomes[0]["first_choice"].values() for row in matrix]
        assert np.allclose(np.sum(rows, 1), 1) and np.min(rows) >= 0
    if name == "sweep":
        points = outcomes[0]["curve"]
        assert [point["scaling"] for point in points] == [0.0, 0.3]
        assert points[1]["average"] == pytest.approx(outcomes[0]["average"], abs=0.01)


def test_variants_of_a_suite():
    """Fewer experts, corrupted images of the same tasks, other settings; the suite itself stays as it is."""
    images = {task: render(task, "test", 4, seed=1) for task in ("Signs", "Digits")}
    whole = Suite(
        *("name", 0, torch.device("cpu"), "float32", TRAINING, miniature.ADAPTATION, nn.Identity()),
        heads=dict.fromkeys(images), test=images, load=miniature.images, normalise=nn.Identity(),
        experts=dict.fromkeys(images, nn.Identity()),
    )  # fmt: skip
    part = whole.variant(experts=("Digits",), split="contrast", lr=0.5)
    assert list(part.experts) == ["Digits"] and part.tasks == ["Signs", "Digits"] and part.adaptation.lr == 0.5
    assert not torch.equal(part.test["Signs"][0][:4], images["Signs"][0])
    assert torch.equal(part.test["Signs"][1][:4], images["Signs"][1])
    assert list(whole.experts) == ["Signs", "Digits"] and whole.adaptation == miniature.ADAPTATION


def suite_like(name: str, tasks: list[str], source: str | None = "paper") -> SimpleNamespace:
    given = {"tasks": tasks, "heads": dict.fromkeys(tasks), "adaptation": miniature.ADAPTATION, "shortened": False}
    rows = {row["method"]: row for row in published.eight_tasks(name, source)}
    ours = name in hub.ARCHITECTURES
    return SimpleNamespace(name=name, of_the_paper=ours, source=source, published=rows, claimable=True, **given)


def entry(name: str, accuracy: dict[str, float]) -> dict:
    """As if measured: task arithmetic is a point better at another λ; WEMoE had 60 % before its adaptation."""
    average, more = float(np.mean(list(accuracy.values()))), {"needs": [], "arxiv": ""}
    if name == "Task Arithmetic":
        more["curve"] = [{"average": average + 1}]
    if name == "WEMoE":
        more["adaptation"] = {"entropy": [2.0] * 5 + [1.0] * 15, "accuracy": [60.0, average]}
    more |= dict.fromkeys(("seconds", "evaluation_seconds", "trainable_parameters", "total_parameters", "bytes"), 0)
    return {"name": name, "group": reproduce.METHODS[name].group, "accuracy": accuracy, "average": average, **more}


def test_every_row_of_the_papers_tables_is_printed_beside_ours_in_some_experiment():
    """Each row of accuracies, cell by cell, in the tables of the experiments, under the method that it is of."""
    printed, names = Counter(), ("main", "depths", "modules", "generalization", "robustness")
    for arch, name in itertools.product(hub.ARCHITECTURES, names):
        experiment = reproduce.EXPERIMENTS[name]
        suite = suite_like(arch, experiment.tasks or published.PUBLISHED_TASKS)
        for condition in experiment.conditions(suite, experiment.methods or reproduce.MAIN):
            tasks = sum(condition.columns.values(), [])
            measured = {method: [entry(method, dict.fromkeys(tasks, 50.0))] for method in condition.methods}
            text = report.table(condition.columns, measured, condition.published, experiment.details)
            heading, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
            for ours, theirs in itertools.pairwise(lines):
                if theirs[0].startswith("published (paper"):
                    cells = dict(zip(heading, theirs))
                    printed[(arch, ours[0], *sorted((task, cells[task]) for task in tasks))] += 1
    rows = Counter()
    for table in published.paper_tables().values():
        groups = table.get("conditions") or {"all": table["rows"]}
        tasks = table.get("tasks") or table.get("seen", []) + table.get("unseen", []) or published.PUBLISHED_TASKS
        for row in itertools.chain(*groups.values()):
            if "average" in row or "seen" in row:
                cells = (f"{value:.1f}" for value in row.get("accuracy") or row["seen"] + row["unseen"])
                rows[(table["model"], published.our_name(row), *sorted(zip(tasks, cells)))] += 1
    assert rows.total() == 13 + 11 + 3 + 6 + 3 + 2 * 8 * 5
    assert not rows - printed


def test_one_method_alone_shares_a_table_that_has_its_columns():
    a, b, all_methods = {"Average": ["A"]}, {"Average": ["B"]}, ("Task Arithmetic", "WEMoE")

    def headings(*conditions: tuple[str, dict, tuple[str, ...]]) -> list[str]:
        made = [experiments.Condition(name, list(methods), {}, columns) for name, columns, methods in conditions]
        entries = {c.name: {m: [entry(m, {"A": 1.0, "B": 2.0})] for m in c.methods} for c in made}
        lines = report.tables(made, entries, False).splitlines()
        return [line.split("|")[1].strip() if "|" in line else line for line in lines if line and "---" not in line]

    assert headings(("as it is", a, all_methods), ("lr", a, ("WEMoE",))) == ["Method", *all_methods, "WEMoE, lr"]
    assert headings(("clean", a, ("WEMoE",)), ("noise", a, ("WEMoE",))) == ["Method", "WEMoE, clean", "WEMoE, noise"]
    two = ["## one", "Method", "WEMoE, one", "## other", "Method", "WEMoE, other"]
    assert headings(("one", a, ("WEMoE",)), ("other", b, ("WEMoE",))) == two


def test_what_methods_need_is_what_table_7_says():
    """Of each method that it names, and of its variants; but TIES' own mean comes with λ = 1, which nobody chooses."""
    rows = published.paper_tables()["7"]["rows"]
    assert {published.our_name(row) for row in rows} < reproduce.METHODS.keys() and len(rows) == 6
    for row in rows:
        needs = [kind for kind, needed in row.items() if needed is True]
        variants = [name for name in reproduce.METHODS if re.match(rf"{row['method']}(\+\+)?( \(| \+|$)", name)]
        assert published.our_name(row) in variants
        found = {name: reproduce.METHODS[name].needs for name in variants if name != "TIES-Merging (mean)"}
        assert found == dict.fromkeys(found, needs)


def test_parameters_are_the_papers_without_any_weights(tmp_path, capsys):
    assert reproduce.main(["--experiment", "table8", "--output", str(tmp_path)]) == 0
    tables, printed = published.paper_tables(), capsys.readouterr().out
    assert printed.count(" yes |") == 2 * len(tables["1"]["rows"]) + 2 * len(tables["8"]["rows"]) + 1 + 3


@given(st.integers(1, 10**10), st.sampled_from([("", 1), ("K", 1e3), ("M", 1e6), ("B", 1e9)]), st.integers(0, 3))
def test_a_number_rounds_to_what_is_printed(value, unit, digits):
    printed = f"{value / unit[1]:.{digits}f}"
    assert rounds_to(value, printed + unit[0])
    assert not rounds_to(value, f"{float(printed) + 10**-digits:.{digits}f}" + unit[0])


def test_lengths_and_angles_of_task_vectors(model):
    """Of 3 θ_0 the vector is twice θ_0 and the angle 0; of -θ_0 it is as long, and the angle is that of -1."""
    tower = model.visual
    theta = {name: p for name, p in tower.state_dict().items() if ".1.mlp." in name}
    length = 2 * torch.cat([p.flatten() for p in theta.values()]).double().norm().item()
    for factor in (3, -1):
        expert = copy.deepcopy(tower)
        expert.load_state_dict({name: factor * p for name, p in tower.state_dict().items()})
        suite = SimpleNamespace(pretrained=tower, experts={"one": expert})
        text = experiments.show_vectors(experiments.Measured(suite, [], {})).text
        (row,) = [line for line in text.splitlines() if line.startswith("| mlp, 1")]
        _, found, cosine = (cell.strip() for cell in row.split("|")[1:-1])
        assert float(found) == pytest.approx(length, rel=1e-3) and float(cosine) == pytest.approx(np.sign(factor))


def test_the_loss_over_two_coefficients_is_that_of_the_merged_model():
    """At (0, 0) it is θ_0's, at (1, 0) the first expert's, at (0, 1) the second's: the first counts the rows."""
    torch.manual_seed(0)
    pretrained, *experts = (nn.Linear(4, 3).requires_grad_(False) for _ in range(3))
    test = {task: (torch.randn(5, 4), torch.randint(3, (5,))) for task in "ab"}
    suite = SimpleNamespace(
        pretrained=pretrained, experts=dict(zip("ab", experts)), test=test, device=torch.device("cpu"),
        inputs=lambda images: images, logits=lambda task: lambda features: features,
    )  # fmt: skip
    _, found = experiments.landscape(suite, points=3, count=5)
    assert found["grid"] == [-1, 0, 1]
    for model, loss in zip((pretrained, *experts), (found["loss"][1][1], found["loss"][2][1], found["loss"][1][2])):
        assert loss == pytest.approx(np.mean([F.cross_entropy(model(x), y) for x, y in test.values()]), abs=1e-5)


def paper_claims(measured: experiments.Measured) -> experiments.Shown:
    return experiments.Shown(claims=experiments.paper_claims(measured.entries["main"]))


def claims_of(show, tasks: str, accuracies: dict[str, dict[str, tuple[float, ...]]]) -> list[dict]:
    """What is claimed of these accuracies: condition -> method -> one for each task."""
    measured = {
        name: {method: [entry(method, dict(zip(tasks, values)))] for method, values in methods.items()}
        for name, methods in accuracies.items()
    }
    columns = {"Seen": list(tasks[:2]), "Unseen": list(tasks[2:])}
    conditions = [experiments.Condition(name, list(methods), {}, columns) for name, methods in measured.items()]
    return show(experiments.Measured(suite_like("miniature", list(tasks), None), conditions, measured)).claims


ARITHMETIC, ADA, ONE, CURED = "Task Arithmetic", "AdaMerging (layer-wise)", "WEMoE (1-layer)", "WEMoE + diversity"
TABLE_2 = {"Individual": (90.3,), "Pre-trained": (48.2,), "Weight Averaging": (66.5,), ARITHMETIC: (68.0,)}
TABLE_2 |= {ADA: (80.1,), "WEMoE": (89.2,), ONE: (86,), "WEMoE (0-layer)": (86,)}
TABLE_6 = dict(zip(reproduce.EXPERIMENTS["modules"].methods, [(88.8,), (89.2,), (86.4,)]))
CLEAN = {ARITHMETIC: (80, 80), "WEMoE": (95, 95), CURED: (94, 95.2)}
NOISE = {ARITHMETIC: (50, 50), "WEMoE": (9, 90), CURED: (70, 80)}
CLAIMS = {  # experiment -> its claims, tasks, and accuracies of which all hold
    "main": (paper_claims, "A", {"main": TABLE_2}),
    "depths": (experiments.show_depths, "A", {"main": {ADA: (80.9,), ONE: (88.8,), "WEMoE": (89.4,)}}),  # Table 10
    "modules": (experiments.show_modules, "A", {"main": TABLE_6}),
    "generalization": (
        experiments.show_generalization,
        "ABC",
        {"without C": {"WEMoE": (90, 80, 10), "RegMean": (89, 79, 99)}},
    ),
    "collapse": (experiments.show_collapse, "AB", {"clean": CLEAN, "noise": NOISE}),
}
FALL = [  # experiment, condition, accuracies that change, and which of the claims fall
    ("main", "main", {"Individual": (89.5,)}, {0}),
    ("main", "main", {"Weight Averaging": (83.0,)}, {1}),
    ("main", "main", {"Pre-trained": (67.0,)}, {2}),
    ("main", "main", {"Individual": (91.0,), "WEMoE": (91.5,)}, {2}),
    ("main", "main", {"Weight Averaging": (84.5,)}, {1, 3}),
    ("main", "main", {ADA: (89.2,)}, {4}),
    ("main", "main", {"WEMoE": (85.0,), "WEMoE (0-layer)": (84.0,)}, {5}),
    ("main", "main", {"WEMoE (0-layer)": (87.0,)}, {6}),
    ("main", "main", {"WEMoE": (60.0,)}, {2, 3, 4, 5, 6, 7}),
    ("depths", "main", {ONE: (88.3,)}, {0}),
    ("depths", "main", {ADA: (88.8,)}, {1}),
    ("modules", "main", {experiments.SEPARATELY: (88.7,)}, {0}),
    ("modules", "main", {experiments.BLOCKS: (88.8,)}, {1}),
    ("generalization", "without C", {"RegMean": (95, 79, 9)}, {0}),
    ("collapse", "noise", {"WEMoE": (60, 60)}, {0}),
    ("collapse", "noise", {CURED: (40, 90)}, {1}),
    ("collapse", "clean", {CURED: (93, 95)}, {2}),
]


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_hold_or_fall_with_the_accuracies_that_they_are_about(name, monkeypatch):
    """Each of them; those about methods that were not run are left out."""
    monkeypatch.setattr(experiments, "draw_corrupted", lambda *_: {})
    show, tasks, base = CLAIMS[name]
    claims, all_fallen = claims_of(show, tasks, base), set()
    assert all(claim["holds"] for claim in claims)
    for _, condition, change, fallen in (row for row in FALL if row[0] == name):
        changed = claims_of(show, tasks, {**base, condition: {**base[condition], **change}})
        assert {i for i, claim in enumerate(changed) if not claim["holds"]} == fallen, change
        all_fallen |= fallen
    assert all_fallen == set(range(len(claims)))
    fewer = {condition: dict(list(methods.items())[1:]) for condition, methods in base.items()}
    assert len(claims_of(show, tasks, fewer)) < len(claims)


def test_claims_are_about_means_over_seeds():
    seeds = TABLE_2, {**TABLE_2, "Weight Averaging": (83.0,)}
    entries = {name: [entry(name, {"A": seed[name][0]}) for seed in seeds] for name in TABLE_2}
    assert all(claim["holds"] for claim in experiments.paper_claims(entries))


@pytest.mark.parametrize(
    "number, name", {"Figure 3": "vectors", "fig11": "routing", "Table 2": "main", "Appendix B.3": "unload"}.items()
)
def test_experiments_go_by_the_papers_numbers_as_it_prints_them(number, name, tmp_path):
    assert reproduce.parse_arguments(["--experiment", number, "--output", str(tmp_path)]).experiment == name


def test_a_data_set_that_is_added_leaves_the_published_ones_as_they_are(tmp_path, monkeypatch):
    known = [*published.PUBLISHED_TASKS, "Flowers"]
    monkeypatch.setitem(reproduce.SUITES, "ViT-B-32", (None, known))
    arguments = ["ViT-B-32", "--output", str(tmp_path)]
    parsed = reproduce.parse_arguments(arguments)
    assert parsed.tasks == published.PUBLISHED_TASKS and parsed.whole
    assert reproduce.parse_arguments([*arguments, "--tasks", *known]).tasks == known


LEAST = {"steps": 1, "seed": 0, "seeds": 1, "workers": 1, "limit": 1}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "Weather"], "unknown task 'Weather': choose among 'Scenes', 'Cars'"),
        (["--methods", "TIE"], "unknown method 'TIE': choose among 'Weight Averaging', 'Task Arithmetic'"),
        (["--experiment", "none"], "unknown experiment 'none': choose among 'main', 'depths'"),
        (["--experiment", "robustness", "--tasks", "Signs"], "--tasks is not for the experiment robustness"),
        (
            ["--experiment", "fig3", "--methods", "WEMoE"],
            "method of the experiment vectors 'WEMoE': choose among nothing",
        ),
        *((["ViT-B-32", f"--{o}", f"{n - 1}"], f"--{o} {n - 1}: a number from {n} to") for o, n in LEAST.items()),
        (["--steps", "nan"], "argument --steps: invalid int value: 'nan'"),
        (["--steps", "1" + "0" * 30], "a number from 1 to 2147483647"),
        (["--limit", "5"], "--limit is for ViT-B-32, ViT-B-16, ViT-L-14, roberta-glue"),
        (["ViT-B-32", "--workers", "2"], "--workers is for the miniature on a CPU; on several GPUs use torchrun"),
        (["ViT-B-32", "--arch", "RN50"], "--arch and --pretrained need --finetune"),
        (["ViT-B-32", "--finetune", "--experts", "x"], "choose one"),
        (["ViT-B-32", "--finetune", "--arch", "RN5000", "--cache", "{tmp}"], "RN5000"),
        (["ViT-B-32", "--hub", "/nowhere", "--cache", "{tmp}"], "the mirror has no files in /nowhere"),
        (["ViT-B-32", "--precision", "int4"], "invalid choice: 'int4'"),
        (["miniature-text", "--settings", "hub"], "--settings hub is for images"),
        (["flan-t5-glue", "--experiment", "robustness"], "is about images"),
        (["miniature-text", "--hub", "x"], "--hub is for"),
        (["flan-t5-glue", "--methods", "Simple Ensemble"], "unknown method 'Simple Ensemble'"),
        (["roberta-glue", "--tasks", "wnli"], "unknown task 'wnli'"),
        (["roberta-glue", "--finetune"], "--finetune is for ViT-B-32, ViT-B-16, ViT-L-14"),
        (["roberta-glue", "--hub", "/nowhere"], "/nowhere/roberta-base"),
        (["--settings", "mine"], "invalid choice: 'mine'"),
        (["--device", "tpu9"], "--device tpu9: not usable here"),
        (["--device", "hpu"], "--device hpu: not usable here"),
        (["--device", "meta"], "--device meta: not usable here"),
        pytest.param(["--device", "cuda"], "'cpu' always is", marks=pytest.mark.skipif(GPU, reason="there is one")),
        (["ViT-Z"], "invalid choice: 'ViT-Z'"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--output", __file__], "is a file, a folder is needed"),
        (["--output", __file__ + "/x"], "Not a directory"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, message, capsys, tmp_path):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    arguments += [] if "--output" in arguments else ["--output", str(tmp_path)]
    assert reproduce.main(arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_any_cpu_is_the_cpu():
    assert choose_device("cpu:0") == choose_device("cpu") == "cpu"


def test_help_tells_the_choices(capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(word in text for word in ("miniature", "--tasks", "WEMoE (0-layer)", "Exit status"))
    assert reproduce.main(["--experiment=list"]) == 0
    assert re.findall(r"^(\w+)(?: \(.*\))?: .+ min\.$", capsys.readouterr().out, re.M) == list(reproduce.EXPERIMENTS)


# ---- reproduce.py on the paper's suite: a mirror in the real layout with a tiny CLIP in the place of ViT-B/32 --------


@pytest.fixture(scope="module")
def mirror(tmp_path_factory, model) -> Path:
    """A mirror of all eight tasks, which tests may add to, but not change."""
    folder = tmp_path_factory.mktemp("mirror") / "hub"
    write_mirror(folder, model, hub.TASKS, count=18)
    for seed, task in enumerate(hub.TASKS):
        write_set(folder, task, count=20, seed=50 + seed, split="train")
    return folder


@pytest.fixture
def paper(monkeypatch, tmp_path, mirror):
    """A function that runs `reproduce.py ViT-B-32 --hub MIRROR` and returns exit status and results.

    The runs share the decoded images in `run.cache`.
    """
    monkeypatch.setitem(hub.ARCHITECTURES, "ViT-B-32", TINY._replace(name="ViT-B-32"))
    for task in hub.TASKS:
        monkeypatch.setitem(hub.TASKS, task, hub.TASKS[task]._replace(images=18))

    def run(*more: str, output: str = "results", tasks=("EuroSAT", "SVHN"), folder: str = "ViT-B-32") -> tuple:
        given = ["--hub", str(mirror), "--cache", str(run.cache), "--output", str(tmp_path / output), "--steps", "4"]
        status = reproduce.main(["ViT-B-32", *given, *(["--tasks", *tasks] if tasks else []), *more])
        file = tmp_path / output / folder / "results.json"
        return status, json.loads(file.read_text()) if file.exists() else {}

    run.cache = mirror.with_name("cache")
    return run


def test_the_papers_suite_from_end_to_end(paper, tmp_path, capsys):
    status, results = paper("--methods", "pre-trained", "individual", "wemoe", tasks=None)
    assert status == 1  # random weights do not reach the published figures
    assert results["tasks"] == published.PUBLISHED_TASKS and len(results["methods"]) == 3
    claimed = [claim["claim"].split(" is within ")[0] for claim in results["claims"]]
    assert claimed == ["Pre-trained", "Individual"]  # WEMoE was adapted in fewer steps, in another way than the hub's
    assert "0.5 points of the published average (hub)" in results["claims"][1]["claim"]
    printed = capsys.readouterr().out
    assert "GB to download and" in printed
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    ours, theirs, difference = next(rows[i : i + 3] for i, row in enumerate(rows) if row[0].strip() == "Individual")
    row = "75.0 78.3 95.2 99.0 97.3 98.9 99.6 79.7 90.4"  # published.json, and the mean of the cells
    assert " ".join(cell.strip() for cell in theirs[:10]) == f"published (hub) {row}"
    for a, b, d in zip(ours[1:10], theirs[1:10], difference[1:10]):
        assert float(a) - float(b) == pytest.approx(float(d), abs=0.11)
    assert (tmp_path / "results/ViT-B-32/adaptation.png").exists()


def test_other_experiments_on_the_papers_suite(paper, mirror, tmp_path, monkeypatch, capsys):
    """Corrupted images are splits of the data sets, images that methods look at come from the train split.

    Of fewer images than published nothing is claimed, and results stand apart.
    """
    names = ["Task Arithmetic", "RegMean", "WEMoE"]
    folder = "ViT-B-32/generalization"
    options = ["--experiment", "generalization", "--methods", *names, "--steps", "1"]
    status, results = paper(*options, tasks=None, folder=folder)
    assert status == 1 and len(results["claims"]) == 2 + 2  # ours, and Task Arithmetic beside the published figures
    for condition, split in zip(results["conditions"], published.read("hub_results.json")["generalization"]):
        assert condition["columns"] == {"Seen": split["seen"], "Unseen": split["unseen"]}
        names = [row["method"] for row in condition["published"]]
        assert {"Task Arithmetic", "RegMean"} <= set(names) and "WEMoE" not in names  # it adapted in one step, not 1000
    assert "  published (hub)" in (tmp_path / "results" / folder / "table.md").read_text()

    tasks, kinds = published.ROBUSTNESS_TASKS, ("contrast", "spatter")  # of the seven
    for seed, (task, corruption) in enumerate(itertools.product(tasks, kinds)):
        write_set(mirror, task, count=6, seed=seed, split=corruption)
    corrupted = partial(experiments.corrupted_conditions, kinds=kinds)
    two_kinds = replace(reproduce.EXPERIMENTS["robustness"], conditions=corrupted, splits=kinds)
    monkeypatch.setitem(reproduce.EXPERIMENTS, "robustness", two_kinds)
    options = ["--experiment", "robustness", "--methods", "Task Arithmetic", "--limit", "4"]
    status, results = paper(*options, tasks=None, folder="ViT-B-32-first4/robustness")
    assert status == 0 and results["tasks"] == [task for task in hub.TASKS if task in tasks]
    assert len(results["conditions"]) == 3
    decoded = {tuple(file.name.split("-")[:3]) for file in paper.cache.glob("*-first4-*.npy")}
    assert decoded == set(itertools.product(tasks, ["test", *kinds], ["first4"]))
    assert results["settings"]["limit"] == 4 and not results["claims"]
    assert not any(condition["published"] for condition in results["conditions"])
    assert "Other tasks, fewer images or another model than published" in capsys.readouterr().out


@pytest.fixture
def authors(tmp_path) -> Path:
    """The task-arithmetic authors' checkpoints, as they lie in their folder."""
    folder = tmp_path / "authors" / "ViT-B-32"
    with OldClasses() as old:
        for seed, name in enumerate(["zeroshot.pt", *(f"{task}/finetuned.pt" for task in hub.TASKS)]):
            torch.save(old.encoder(tower_like(seed)), make(folder / name))
        for task, spec in hub.TASKS.items():
            torch.save(old.head(torch.randn(len(spec.classes), 48)), folder / f"head_{task}.pt")
    return folder.parent


def test_closeness_is_claimed_like_with_like(paper, authors, tmp_path, monkeypatch):
    """Rows of methods that adapt are shown always, and claimed where they were made with the settings of the run."""
    one_step = replace(paper_suites.ADAPTATION, steps=1, lambda_steps=1, mask_steps=1)  # as if this were published
    monkeypatch.setattr(paper_suites, "ADAPTATION", one_step)
    adapting = ["AdaMerging (layer-wise)", "WEMoE"]
    for settings, source in itertools.product(["paper", "hub"], ["hub", "paper"]):
        methods = ["Individual", *adapting, *(["Concrete AdaMerging"] if source == "hub" else [])]
        folder = "ViT-B-32" + "-experts" * (source == "paper") + "-hub-settings" * (settings == "hub")
        options = ["--steps", "1", "--settings", settings, "--methods", *methods]
        options += ["--experts", str(authors)] if source == "paper" else []
        _, results = paper(*options, tasks=None, folder=folder)
        claims = {claim["claim"].split(" is within ")[0]: claim["claim"] for claim in results["claims"]}
        claimed = adapting if source == settings else []
        assert {row["source"] for row in results["published"]} == {source}
        assert claims.keys() == {"Individual", *claimed}  # but never the hub's Concrete AdaMerging, which is not ours
        assert all(f"0.8 points of the published average ({source})" in claims[name] for name in claimed)
        table = (tmp_path / "results" / folder / "table.md").read_text()
        assert table.count(f"published ({source}, {source} settings)") == len(methods) - 1
        assert table.count(f"published ({source})") == 1 and f"with the settings of the {settings}" in table


def test_experts_fine_tuned_here(paper, monkeypatch):
    monkeypatch.setattr(paper_suites, "TRAINING", TRAINING)
    status, results = paper("--finetune", "--methods", "individual", folder="ViT-B-32-finetune")
    assert status in (0, 1) and results["methods"][0]["name"] == "Individual"


# ---- It does not break: bad input, hostile files, kills, numbers at their limits, and anything random ----------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model):
    """A folder with a mirror of two tasks and the results of one method."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hub.ARCHITECTURES, "ViT-B-32", TINY._replace(name="ViT-B-32"))
        write_mirror(root / "hub", model, ("EuroSAT", "SVHN"), count=9)
        assert reproduce.main([*run_in(root), "--methods", "pre-trained"]) in (0, 1)
    return root


@pytest.fixture
def here(finished, tmp_path, monkeypatch) -> Path:
    """A copy of it, to do harm to."""
    monkeypatch.setitem(hub.ARCHITECTURES, "ViT-B-32", TINY._replace(name="ViT-B-32"))
    return shutil.copytree(finished, tmp_path / "here")


def run_in(root: Path) -> list[str]:
    folders = ["--hub", str(root / "hub"), "--cache", str(root / "images"), "--output", str(root / "results")]
    return ["ViT-B-32", *folders, "--tasks", "EuroSAT", "SVHN", "--steps", "2"]


def weights_of(root: Path, task: str = "EuroSAT") -> Path:
    return root / "hub" / hub.expert_repo(TINY, task) / "model.safetensors"


DAMAGED = {  # of a finished folder: what is overwritten, and what is said (data/paper/test_paper.py has other damage)
    "hub/.*clip-tiny_eurosat/model.safetensors": "model.safetensors is not a readable weight file",
    "hub/timm/.*safetensors": "cannot load the weights of tiny-quickgelu from",
    "hub/.*svhn.*parquet": "a parquet file cannot be read",
    "images/.*EuroSAT.*safetensors": "is damaged .*: delete it, and the same command makes it again",
    "images/SVHN-test-.*npy$": "is damaged .*: delete it, and the same command makes it again",
    "cache/pre-trained-.*/result.json": "result.json is damaged .*: delete it, and the same command makes it again",
}
OUT_OF_MEMORY = "out of memory; what is finished is kept"
FAULTS = {  # what is said where the machine, or a number, is at its limits: what fails there, and how
    "Permission denied: 'results'": (Path, "mkdir", PermissionError(13, "Permission denied", "results")),
    "cannot write .*No space left .*the same command goes on": (os, "fsync", OSError(28, "No space left on device")),
    "cannot write .*failed writing file.*free some space": (torch, "save", RuntimeError("failed writing file data/0")),
    f"{OUT_OF_MEMORY}.*--adapt-precision bfloat16.*Tried": (methods, "evaluate", torch.OutOfMemoryError("Tried")),
    OUT_OF_MEMORY: (methods, "evaluate", MemoryError()),
    f"{OUT_OF_MEMORY}.*you tried": (methods, "evaluate", RuntimeError("CPU: can't allocate memory: you tried 1 TB")),
    "a decomposition .*svd.*--methods leaves out": (torch.linalg, "svd", torch.linalg.LinAlgError("svd: diverged")),
    "a worker was killed, perhaps .*; the same command goes on": (methods, "evaluate", BrokenProcessPool("abruptly")),
    "The entropy of task 'EuroSAT' is nan at step 1 of 2": (wemoe, "entropy", lambda logits: logits.sum(-1) * math.nan),
}


@pytest.mark.parametrize("name", [*DAMAGED, *FAULTS])
def test_bad_input_is_one_sentence_and_nothing_finished_is_lost(name, here, monkeypatch, capfd):
    if name in DAMAGED:
        sentence, files = DAMAGED[name], [file for file in here.rglob("*") if re.search(name, str(file))]
        assert files
        for file in files:
            file.write_bytes(b"{")
    else:
        (owner, function, effect), sentence = FAULTS[name], name
        monkeypatch.setattr(owner, function, Mock(side_effect=effect))
    kept = {path: path.read_bytes() for path in (here / "results").rglob("*") if path.suffix in (".json", ".md")}
    assert len(kept) == 3
    capfd.readouterr()
    assert reproduce.main([*run_in(here), "--methods", "pre-trained", "individual", "WEMoE (rank 16)"]) == 2
    printed = capfd.readouterr().err
    (line,) = [line for line in printed.splitlines() if "error" in line.lower()]
    assert re.match(f"reproduce.py: error: .*{sentence}", line), line
    assert "Traceback" not in printed and printed.splitlines()[-1] == line
    assert {path: path.read_bytes() for path in kept} == kept and not list(here.rglob("*.part"))


def test_an_expert_in_the_place_of_another_model_is_refused(here, capsys):
    shutil.copy(weights_of(here, "SVHN"), weights_of(here))
    assert reproduce.main([*run_in(here), "--methods", "individual"]) == 2
    assert "error: the expert of SVHN is that of EuroSAT once more" in capsys.readouterr().err
    zero, one = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    with pytest.raises(InputError, match="the expert of B is the pre-trained model itself"):
        paper_suites.refuse_twins(zero, {"A": one, "B": copy.deepcopy(zero)})


def test_unusual_input_that_is_right_is_accepted(here):
    """Half-precision weights, images of one pixel, and fewer of them than a batch has."""
    save_file({name: p.half() for name, p in load_file(weights_of(here)).items()}, weights_of(here))
    spec, pictures = hub.TASKS["SVHN"], [picture("RGB", 1, 1), picture("L", 1, 300), picture("RGB", 40, 30)]
    write_parquet(next((here / "hub" / spec.repo).rglob("*.parquet")), pictures, [0] * 3, spec.classes)
    assert reproduce.main([*run_in(here), "--methods", "individual", "WEMoE", "WEMoE (rank 16)"]) == 0
    results = json.loads((here / "results/ViT-B-32/results.json").read_text())
    assert all(math.isfinite(value) for method in results["methods"] for value in method["accuracy"].values())


# ---- README, and what kept results depend on -------------------------------------------------------------------------


def test_the_examples_in_readme_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the examples may write
    examples = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def test_a_result_is_kept_until_the_code_of_its_own_method_changes(monkeypatch):
    names = ("Fisher Merging", "RegMean", "WEMoE", "E-WEMoE", "Task Arithmetic")

    def keys() -> dict[str, str]:
        return {name: code_of(reproduce.METHODS[name].make) for name in names}

    def changed(change) -> set[str]:
        with monkeypatch.context() as patch:
            change(patch)
            return {name for name, key in keys().items() if key != before[name]}

    before = keys()
    assert keys() == before and len(set(before.values())) == len(names)
    assert changed(lambda p: p.setattr(baselines, "weigh_entries", lambda a, b: a)) == {"Fisher Merging"}
    assert changed(lambda p: p.setattr(baselines, "least_squares", lambda a, b, alpha=1: a[0])) == {"RegMean"}
    assert changed(lambda p: p.setattr(wemoe.Router, "forward", lambda self, h: h)) >= {"WEMoE", "E-WEMoE"}
    assert changed(lambda p: p.setattr(reproduce.mixture, "__doc__", "Another help text.")) == set()
    assert changed(lambda p: p.setitem(wemoe.upscale.__kwdefaults__, "router_depth", 1)) >= {"WEMoE", "E-WEMoE"}
    assert each(None, key_of_evaluate, [()] * 2, workers=2) == [code_of(suites.evaluate)] * 2  # in a worker, too
    one, other = (lambda names: [f"a{n}" for n in names]), (lambda names: [f"b{n}" for n in names])
    assert code_of(one) != code_of(other)  # the first text of a comprehension is no docstring


def key_of_evaluate(_: object) -> str:
    return code_of(suites.evaluate)


def test_a_suites_key_depends_on_what_is_read_and_done():
    images = {task: render(task, "test", 4, seed=1) for task in ("Signs", "Digits")}
    suite = Suite(
        *("name", 0, torch.device("cpu"), "float32", TRAINING, miniature.ADAPTATION, nn.Identity()),
        heads=dict.fromkeys(images, torch.zeros(2)), test=images, load=miniature.images, normalise=nn.Identity(),
    )  # fmt: skip
    before = suite.key
    assert suite.key == before
    for owner, name, new in ((suite, "training", replace(TRAINING, lr=1.0)), (miniature, "SEVERITY", 5)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, new)
            assert suite.key != before


def test_a_file_that_safetensors_cannot_write_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot write .*x.safetensors .*No space left .*the same command goes on"):
        write(tmp_path / "x.safetensors", Mock(side_effect=SafetensorError("No space left on device")))


def test_pairs_of_tasks_leave_none_alone(small, capsys):
    assert small("--experiment", "landscape", "--tasks", "signs")[0] == 2
    assert "landscape is about pairs of tasks: 1 leave one alone" in capsys.readouterr().err


def test_ranks_without_a_test_image_have_no_batch(monkeypatch):
    monkeypatch.setattr(suites, "world", lambda: 3)
    suite = SimpleNamespace(adaptation=miniature.ADAPTATION)
    for rank, own in enumerate(([[0]], [[1]], [])):
        monkeypatch.setattr(suites, "rank", lambda: rank)  # noqa: B023
        assert [batch.tolist() for batch in suites.batches(suite, 2)] == own
