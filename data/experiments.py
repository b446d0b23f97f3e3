"""What the experiments measure and show: methods under conditions; tables, figures and claims made of what came out.

An experiment is a function that shows the entries, one for each method, condition and seed; `@Experiment` says what
else there is to know, claims.json what is claimed: experiment -> sentence -> formula. `show_table` serves most.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import mean

import pandas as pd
import torch
from matplotlib.figure import Figure
from pandas import DataFrame

from data import figures
from data.miniature.corruptions import CORRUPTIONS
from data.miniature.tasks import TASKS
from data.paper import published
from data.run import STATIC
from data.suite import Suite

EXPERIMENTS: dict[str, "Experiment"] = {}
CLAIMS = json.loads(Path(__file__).with_name("claims.json").read_text(encoding="utf-8"))
ADAMERGING, DIVERSE = "AdaMerging (layer-wise)", "WEMoE + diversity"
STORY = ["Pre-trained", "Weight Averaging", "Task Arithmetic", ADAMERGING, "WEMoE", "Individual"]
DEPTHS = ["WEMoE (0-layer)", "WEMoE (1-layer)", "WEMoE"]
RANKS = [f"WEMoE (rank {rank})" for rank in (1, 2, 4, 8, 16, 32)]
MODULES = ["WEMoE (1-layer)", "WEMoE (1-layer, attention and MLP)", "WEMoE (1-layer, blocks)"]
UNLOADED = ["Task Arithmetic", "WEMoE (0-layer)", "WEMoE (0-layer, unloaded)"]
MORE = ["Task Arithmetic", "TSV-M", "Iso-C", "WUDI", ADAMERGING, "WEMoE (rank 16)", "WEMoE"]
MORE += [*(f"WEMoE ({base} elsewhere)" for base in ("TSV-M", "Iso-C", "WUDI"))]
MORE += ["Oracle routing", "Oracle routing (TSV-M elsewhere)", "Individual"]
SHIFTED = ["Task Arithmetic", "TIES-Merging", "Fisher Merging", "RegMean", ADAMERGING, "AdaMerging++ (layer-wise)"]
SHIFTED += ["WEMoE (0-layer)", "WEMoE", "WEMoE (as the hub ran it)"]
SWEPT = ["Task Arithmetic", "TIES-Merging", "WEMoE (0-layer)", "WEMoE"]
LAMBDAS = tuple(i / 10 for i in range(11))  # of methods that merge once
CORRUPTED = {"tasks": published.ROBUSTNESS_TASKS, "splits": tuple(CORRUPTIONS)}


@dataclass(frozen=True)
class Condition:
    """Methods on a suite that is changed, and what was published of that."""

    name: str
    methods: list[str]
    change: dict = field(default_factory=dict)  # what data.run.measure takes
    published: list[dict] = field(default_factory=list)  # rows of data/paper/published.py
    columns: dict[str, list[str]] = field(default_factory=dict)  # average -> its tasks; none: one, of all
    settings: dict[str, dict] = field(default_factory=dict)  # method -> what is changed for it alone


@dataclass(frozen=True)
class Measured:
    suite: Suite  # of the last seed
    conditions: list[Condition]
    entries: list[dict]  # of results.json, each with its "condition" and "seed"

    @cached_property
    def frame(self) -> DataFrame:
        """A row for each accuracy: condition, method, seed, task, accuracy."""
        cells = [(e["condition"], e["name"], e["seed"], *cell) for e in self.entries for cell in e["accuracy"].items()]
        return DataFrame(cells, columns=["condition", "method", "seed", "task", "accuracy"])

    def averages(self, condition: Condition, tasks: Iterable[str]) -> dict[str, float]:
        """Method -> its average accuracy over these tasks and all seeds."""
        rows = self.frame[(self.frame.condition == condition.name) & self.frame.task.isin(tasks)]
        return rows.groupby("method", sort=False).accuracy.mean().to_dict()

    def first(self, condition: Condition) -> dict[str, dict]:
        """Method -> its entry of the first seed."""
        whose = condition.name, self.entries[0]["seed"]
        return {entry["name"]: entry for entry in self.entries if (entry["condition"], entry["seed"]) == whose}


@dataclass
class Shown:
    figures: dict[str, Figure] = field(default_factory=dict)  # by the names of their files
    tables: dict[str, DataFrame] = field(default_factory=dict)  # of texts, by title; none: those of figures.tables
    numbers: dict[str, dict] = field(default_factory=dict)  # that claims are about, by where; none: numbers_of
    claims: list[dict] = field(default_factory=list)


def one_table(suite: Suite, methods: list[str], rows: Callable | None = None) -> list[Condition]:
    """A single condition; `rows` are the published ones of an architecture from a source, unless the suite's own."""
    return [Condition("main", methods, {}, list(rows(suite.name, suite.source) if rows else suite.published))]


@dataclass
class Experiment:
    """Decorates the function that shows it."""

    name: str
    paper: list[str]  # its numbers in the paper
    minutes: int  # some, that it takes in the miniature on 2 cores: an estimate, by its methods' seconds
    methods: list[str] | None = None  # that it may run; None: all of the main table
    conditions: Callable[[Suite, list[str]], list[Condition]] | None = one_table  # None: it needs no suite
    usual: list[str] | None = None  # that it runs unless told otherwise; None: all of them
    tasks: list[str] | None = None  # if it has its own, of the paper's suites; in the miniature, their counterparts
    more_tasks: bool = False  # whether it takes all that the miniature can draw, and not the first eight only
    splits: tuple[str, ...] = ()  # of the data sets, besides the test split
    seeds: int = 1
    steps: int | None = None  # of adaptation, in the miniature; None: as many as usual
    scalings: tuple[float, ...] = ()  # λ that methods which merge once try, besides their own
    details: bool = False  # whether its tables tell time and size, too
    about: str = ""  # in a line; "": the docstring of what is decorated

    def __call__(self, function: Callable[[Measured | None], Shown]) -> Callable[[Measured | None], Shown]:
        self.function, self.about, EXPERIMENTS[self.name] = function, self.about or function.__doc__, self
        return function

    def show(self, measured: Measured | None) -> Shown:
        """Figures, tables and claims."""
        shown, formulas = self.function(measured), CLAIMS.get(self.name, {})
        shown.tables = shown.tables or figures.tables(measured, self.details)
        shown.claims = claims_of(measured, formulas, shown.numbers) if measured else check(formulas, shown.numbers)
        return shown


def listed() -> str:
    """The experiments, a line for each."""
    lines = ((e, f" ({', '.join(e.paper)})" if e.paper else "") for e in EXPERIMENTS.values())
    return "\n".join(f"{e.name}{paper}: {e.about} In the miniature, some {e.minutes} min." for e, paper in lines)


def claims_of(measured: Measured, formulas: dict[str, str], numbers: dict[str, dict]) -> list[dict]:
    """Whether formulas hold, and averages are near the published ones, if all of the published test inputs are there.

    No formula after fewer steps than published, or of models of which nothing was.
    """
    suite, claims = measured.suite, []
    theirs = {row["method"]: mean(row["accuracy"].values()) for row in published.eight_tasks(suite.name, "paper")}
    if static := [theirs[e["name"]] for e in measured.entries if e["group"] == STATIC and e["name"] in theirs]:
        theirs["best static merge"] = max(static)
    known = suite.name.startswith("miniature") or published.eight_tasks(suite.name, suite.source)
    if formulas and known and not suite.shortened:
        claims = check(formulas, numbers or {"": numbers_of(measured)}, {} if numbers else theirs)
    for part in measured.conditions if suite.claimable else ():
        where = f", {part.name}" if len(measured.conditions) > 1 else ""
        for row in (row for row in part.published if row["margin"] is not None):
            text = f"{row['method']} is within {row['margin']:g} points of the published average ({row['source']})"
            formula = f"abs({{{row['method']}}} - {mean(row['accuracy'].values()):.4g}) <= {row['margin']:g}"
            claims += check({text: formula}, {where: measured.averages(part, row["accuracy"])})
    return claims


def check(formulas: dict[str, str], numbers: dict[str, dict], theirs: dict | None = None) -> list[dict]:
    """Whether formulas hold of our numbers, where -> name -> number, beside theirs; without what was not measured."""
    claims = []
    for (where, ours), (text, formula) in itertools.product(numbers.items(), formulas.items()):
        names = set(re.findall("{(.+?)}", formula))
        if names <= ours.keys():
            known = [ours, theirs] if theirs and names <= theirs.keys() else [ours]
            texts = [{n: f"{x:,}" if isinstance(x, int) else f"{x:.4g}" for n, x in part.items()} for part in known]
            told = [formula.format_map(part).replace("<=", "≤").replace(">=", "≥") for part in texts]
            detail = "ours {}, the paper's {}".format(*told) if len(told) > 1 else told[0]
            claims.append({"claim": text + where, "holds": bool(pd.eval(formula.format_map(ours))), "detail": detail})
    return claims


def numbers_of(measured: Measured) -> dict[str, float]:
    """The numbers that claims are about, by name, of a single condition: means over seeds."""
    numbers = {f"size of {entry['name']}": entry["total_parameters"] for entry in measured.entries}
    numbers |= measured.averages(measured.conditions[0], measured.suite.tasks)
    merges = [entry for entry in measured.entries if entry["group"] == STATIC and "Task Arithmetic" in numbers]
    if tried := [(e["name"], p.get("scaling"), p["average"]) for e in merges for p in (e, *e.get("curve", ()))]:
        numbers["best static merge"] = DataFrame(tried).groupby([0, 1], dropna=False)[2].mean().max()
    if curves := [entry["adaptation"] for entry in measured.entries if entry["name"] == "WEMoE"]:
        entropy, accuracy = (DataFrame([curve[what] for curve in curves]).mean() for what in ("entropy", "accuracy"))
        tenth = 1 + len(entropy) // 10
        numbers |= {"entropy at the start": entropy[:tenth].mean(), "entropy at the end": entropy[-tenth:].mean()}
        numbers |= {"accuracy at the start": accuracy.iloc[0], "accuracy at the end": accuracy.iloc[-1]}
    return numbers


def comparable(suite: Suite, rows: Iterable[dict], entries: list[dict]) -> list[dict]:
    """The published rows that ours may stand beside: with fewer steps than published, none of methods that adapted."""
    adapted = {entry["name"] for entry in entries if "adaptation" in entry}
    return [row for row in rows if not (suite.shortened and row["method"] in adapted)]


# ---- Experiments -----------------------------------------------------------------------------------------------------


def show_table(measured: Measured) -> Shown:
    """Of one condition a heat map and what methods cost; of several bars and, of more than two, a table of averages."""
    frame, conditions = measured.frame, measured.conditions
    if len(conditions) == 1:
        count = sum(len(labels) for _, labels in measured.suite.test.values())
        return Shown({"accuracy": figures.accuracy(frame), "costs": figures.costs(measured.entries, count)})
    wide = figures.by(frame, "condition")
    many = len(conditions) > 2 and not any(condition.published for condition in conditions)
    shown = Shown({"accuracy": figures.bars(wide)}, {"": figures.spread(wide)} if many else {})
    if all("split" in condition.change for condition in conditions):
        tests = {condition.name: measured.suite.variant(**condition.change).test for condition in conditions}
        images = {name: torch.cat([rows[:6] for rows, _ in test.values()]) for name, test in tests.items()}
        shown.figures["tasks"] = figures.contact_sheet(images)
    return shown


@Experiment("main", ["table2", "table3", "table7"], 4, usual=STORY, details=True)
def show_main(measured: Measured) -> Shown:
    """Methods on every task, and what each needs besides the experts."""
    suite, first, shown = measured.suite, measured.first(measured.conditions[0]), show_table(measured)
    if all(images.dim() == 4 for images, _ in suite.test.values()):  # and not texts
        shown.figures["tasks"] = figures.contact_sheet({task: images for task, (images, _) in suite.test.items()})
    if curves := [points_of(name, entry["adaptation"]) for name, entry in first.items() if "adaptation" in entry]:
        curves += [points_of("WEMoE", suite.curve, True)] if suite.curve else []
        shown.figures["adaptation"] = figures.lines(sum(curves, []), "adaptation step", "")
    tried = [("", n, p["scaling"], p["average"], False) for n, e in first.items() for p in e.get("curve", ())]
    if tried:
        shown.figures["scalings"] = figures.lines(tried, "λ")
    if "WEMoE" in first:
        shown.figures["routing"] = figures.routing(suite.tasks, first["WEMoE"]["routing"])
    return shown


def points_of(name: str, curve: dict, published: bool = False) -> list[tuple]:
    """Of figures.lines: what adaptation minimises, where that is known, and what it gains."""
    smooth = pd.Series(curve.get("entropy", []), dtype=float).rolling(20, min_periods=1).mean()
    points = [("mean entropy (nats) of 20 steps", name, i, y, published) for i, y in enumerate(smooth, 1)]
    gained = zip(curve["steps"], curve.get("accuracy") or curve["average"])
    return points + [("accuracy (%), on a few test inputs", name, *point, published) for point in gained]


BY_DEPTH, BY_MODULE = (partial(one_table, rows=rows) for rows in (published.router_depths, published.routed_modules))
Experiment("depths", ["table10"], 4, [ADAMERGING, *DEPTHS], BY_DEPTH, about="Routers of 0 to 2 layers.")(show_table)
Experiment("modules", ["table6"], 10, MODULES, BY_MODULE, about="Routed: MLPs, attention too, or blocks.")(show_table)
Experiment("unload", ["appendixb3"], 2, UNLOADED, details=True, about="Constant routers, merged for good.")(show_table)


@Experiment("routing", ["fig11", "fig12"], 3, ["WEMoE"])
def show_routing(measured: Measured) -> Shown:
    """Mean routing weights and first choices, by layer and task."""
    tasks, entry = measured.suite.tasks, measured.first(measured.conditions[0])["WEMoE"]
    maps = {what: figures.routing(tasks, entry[what]) for what in ("routing", "first_choice")}
    own = {layer: 100 * DataFrame(rows).to_numpy().diagonal().mean() for layer, rows in entry["first_choice"].items()}
    return Shown(maps, {"": DataFrame({"own expert first, %": own}).map("{:.1f}".format).rename_axis("Layer")})


def first_tasks(suite: Suite, methods: list[str]) -> list[Condition]:
    parts = dict.fromkeys(tuple(suite.tasks[:count]) for count in (4, 8, 16))  # without twins
    return [Condition(f"{len(part)} tasks", methods, {"tasks": part}) for part in parts]


Experiment("tasks", [], 20, MORE, first_tasks, more_tasks=True, steps=80, about="More tasks merged.")(show_table)


def in_suite(known: Iterable[str], tasks: list[str]) -> list[str]:
    """The suite's names of the paper's tasks: in the miniature, whose tasks are known, those of their counterparts."""
    return [task if task in known else dict(zip(published.PUBLISHED_TASKS, TASKS))[task] for task in tasks]


def six_of_eight(suite: Suite, methods: list[str]) -> list[Condition]:
    """With the learning rates of the authors' program, where figures are theirs."""
    found, settings = [], dict.fromkeys(DEPTHS, {"lr": 2e-3}) if suite.source == "paper" else {}
    for seen, unseen, rows in published.generalization(suite.name, suite.source):
        columns = {"Seen": in_suite(suite.heads, seen), "Unseen": in_suite(suite.heads, unseen)}
        name, change = f"merged without {' and '.join(columns['Unseen'])}", {"experts": tuple(columns["Seen"])}
        found.append(Condition(name, methods, change, rows, columns, settings))
    return found


@Experiment("generalization", ["table4"], 8, ["Pre-trained", *SHIFTED], six_of_eight, tasks=published.PUBLISHED_TASKS)
def show_generalization(measured: Measured) -> Shown:
    """Six tasks merged, eight tested."""
    shown, frame, bars = show_table(measured), measured.frame, []
    for one in measured.conditions:
        for what, tasks in one.columns.items():
            rows = frame[(frame.condition == one.name) & frame.task.isin(tasks)]
            bars.append(rows.assign(condition=f"{one.name}: {what}"))
        seen = measured.averages(one, one.columns["Seen"])
        others = [average for name, average in seen.items() if not name.startswith("WEMoE")]
        shown.numbers[f", {one.name}"] = {"best of the others": max(others), **seen} if others else {}
    shown.figures["accuracy"] = figures.bars(figures.by(pd.concat(bars), "condition"))
    return shown


def corrupted(suite: Suite, methods: list[str], kinds: Iterable[str] = CORRUPTIONS, **change) -> list[Condition]:
    """Four tasks merged and adapted, clean and under each kind of corruption; learning rates as in six_of_eight."""
    found, settings = [], {"WEMoE (0-layer)": {"lr": 1e-3}} if suite.source == "paper" else {}
    for kind in ("clean", *kinds):
        change |= {"split": "test" if kind == "clean" else kind}
        rows = published.robustness(suite.name, suite.source, kind)
        found.append(Condition(kind.replace("_", " "), methods, dict(change), rows, settings=settings))
    return found


NOISY, NOISE = partial(corrupted, kinds=["impulse_noise"]), CORRUPTED | {"splits": ("impulse_noise",)}
SEVEN = CORRUPTED | {"about": "Four tasks merged, tested under seven corruptions."}
Experiment("robustness", ["table5", "table11"], 20, [*SHIFTED, DIVERSE], corrupted, **SEVEN)(show_table)


@Experiment("collapse", [], 20, ["Task Arithmetic", "WEMoE", DIVERSE], NOISY, seeds=5, **NOISE)
def show_collapse(measured: Measured) -> Shown:
    """Where minimising the entropy goes wrong (the worst task under noise), and its cure, over five seeds."""
    means = measured.frame.groupby(["condition", "task", "method"]).accuracy.mean().unstack()
    shown, (clean, noise) = show_table(measured), (means.loc[one.name] for one in measured.conditions)
    if {"Task Arithmetic", "WEMoE"} <= set(means):
        worst = (noise["WEMoE"] - noise["Task Arithmetic"]).idxmin()
        averages = clean.mean().add_suffix(", clean"), noise.mean().add_suffix(", noise")
        shown.numbers[f" ({worst})"] = pd.concat([noise.loc[worst], *averages]).to_dict()
    return shown


ABLATION = {"lr": (0.25, 0.5, 2), "steps": (0.125, 0.25, 0.5), "init_lambda": (1 / 3, 2 / 3, 4 / 3, 5 / 3)}
ABLATION |= {"share": (0.02, 0.05, 0.1, 0.25)}  # setting -> times what is usual


def one_at_a_time(suite: Suite, methods: list[str]) -> list[Condition]:
    found = [Condition("as it is", methods)]
    for setting, factors in ABLATION.items():
        usual = getattr(suite.adaptation, setting)
        values = [type(usual)(round(factor * usual, 9)) or 1 for factor in factors]
        found += [Condition(f"{setting} = {value:g}", ["WEMoE"], {setting: value}) for value in values]
    return found


@Experiment("ablation", ["fig4"], 15, [*DEPTHS, *RANKS], one_at_a_time)
def show_ablation(measured: Measured) -> Shown:
    """Settings of WEMoE, one at a time, and accuracy during adaptation by learning rate, beside the authors'."""
    suite, frame, curves = measured.suite, measured.frame, []
    for part in measured.conditions:
        if "WEMoE" in (first := measured.first(part)) and part.change.keys() <= {"lr"}:
            lr = part.change.get("lr", suite.adaptation.lr)
            curves += points_of(f"lr = {lr:g}", first["WEMoE"]["adaptation"])
    for curve in published.adaptation_curves(suite.name) if suite.source else []:
        curves += points_of(f"lr = {curve['learning_rate']:g}", curve, True)
    wide = figures.by(frame.assign(method=frame.method + ", " + frame.condition), "task")
    pictures = {"rates": figures.lines(curves, "adaptation step", "")} if curves else {}
    return Shown(pictures, {"": figures.spread(figures.averaged(wide))})


def at_each_lambda(suite: Suite, methods: list[str]) -> list[Condition]:
    """For each kind of images, one condition for what merges once, at all λ, and one for each λ where routers start."""
    small = suite.name.startswith("miniature")
    kinds, starts = (["impulse_noise"], (0.1, 0.3, 0.6, 1.0)) if small else (CORRUPTIONS, LAMBDAS[1:])
    once, routed = ([name for name in methods if (name in DEPTHS) == wanted] for wanted in (False, True))
    found = corrupted(suite, once, kinds) if once else []
    for lam in starts if routed else ():
        started = corrupted(suite, routed, kinds, init_lambda=lam)
        found += [replace(one, name=f"{one.name}, λ = {lam}") for one in started]
    return found


@Experiment("sweep", ["fig5", "fig10"], 5, SWEPT, at_each_lambda, steps=40, scalings=LAMBDAS, **CORRUPTED)
def show_sweep(measured: Measured) -> Shown:
    """Accuracy against λ, under corruptions: a panel and a table for each, with the published points."""
    suite, points, tables = measured.suite, [], {}
    for one in measured.conditions:
        kind, lam = one.change["split"].replace("test", "clean"), one.change.get("init_lambda")
        for name, entry in measured.first(one).items():
            found = [(lam, entry["average"])] if lam else [(p["scaling"], p["average"]) for p in entry["curve"]]
            points += [(kind, name, *point, False) for point in found]
    for kind, name in dict.fromkeys(point[:2] for point in points) if suite.source else ():
        known = {} if suite.shortened and name in DEPTHS else published.sweep(suite.name, kind)
        points += [(kind, name, lam, mean(cells.values()), True) for lam, cells in known.get(name, {}).items()]
    for kind, rows in DataFrame(points).groupby(0, sort=False):
        rows = rows.assign(method=rows[1] + rows[4].map({True: ", published", False: ""}), seed=0, accuracy=rows[3])
        tables[kind] = figures.spread(figures.by(rows, 2).sort_index(axis=1).rename(columns=str))
    return Shown({"sweep": figures.lines(points, "λ")}, tables)


@Experiment("vectors", ["fig3"], 1, [], lambda *_: [])
def show_vectors(measured: Measured) -> Shown:
    """Lengths |τ_t| and cosines of θ_t and θ_0 by layer, attention against MLP: means over tasks."""
    start, rows = measured.suite.pretrained.state_dict(), []
    for task, expert in measured.suite.experts.items():
        for name, end in expert.state_dict().items():
            if part := re.search(r"\.(\d+)\.(attn|mlp)\.", name):
                a, b = (value.double().flatten() for value in (start[name], end))
                rows.append([task, part[2], int(part[1]), *map(float, ((b - a) @ (b - a), a @ b, a @ a, b @ b))])
    sums = DataFrame(rows).groupby([0, 1, 2]).sum()
    means = DataFrame({"length of τ": sums[3] ** 0.5, "cosine to θ_0": sums[4] / (sums[5] * sums[6]) ** 0.5})
    means = means.groupby(level=[1, 2]).mean()
    points = [(what, part, layer, y, False) for what in means for (part, layer), y in means[what].items()]
    named = means.set_axis([f"{part}, {layer}" for part, layer in means.index]).map("{:.6f}".format)
    return Shown({"vectors": figures.lines(points, "layer", "")}, {"": named.rename_axis("Part")})


def pairs_of_tasks(suite: Suite, methods: list[str]) -> list[Condition]:
    """Of an odd number of tasks the last one is paired with the first."""
    pairs = itertools.zip_longest(suite.tasks[::2], suite.tasks[1::2], fillvalue=suite.tasks[0])
    return [Condition(" and ".join(pair), methods, {"experts": pair}) for pair in pairs]


@Experiment("landscape", ["fig7"], 3, ["Task Arithmetic of two tasks"], pairs_of_tasks)
def show_landscape(measured: Measured) -> Shown:
    """The loss over (λ1, λ2) for pairs of tasks."""
    losses = {e["condition"]: DataFrame(e["loss"], e["grid"], e["grid"]) for e in measured.entries}  # λ1 by λ2
    least = {name: [*loss.stack().idxmin(), loss.min(axis=None)] for name, loss in losses.items()}
    table = DataFrame(least, ["λ1", "λ2", "least loss (nats)"]).T.map("{:.3g}".format).rename_axis("Pair of tasks")
    upright = {name: loss.T[::-1] for name, loss in losses.items()}
    return Shown({"landscape": figures.heat(upright, "loss (nats)", ("λ1", "λ2"))}, {"": table})


@Experiment("parameters", ["table8", "table1", "table9"], 1, [], None)
def show_parameters(_: None) -> Shown:
    """Numbers of parameters, computed from the architectures: no weights, no download."""
    rows = [[what, f"{n:,}", paper, published.rounds_to(n, paper)] for what, n, paper in published.compared()]
    table = DataFrame(rows, columns=["Parameters", "ours", "the paper's", "equal"]).set_index("Parameters")
    return Shown({}, {"": table.astype(str)}, {"": {"equal": int(table.equal.sum()), "all": len(table)}})
