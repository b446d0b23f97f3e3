"""What the experiments measure and show: methods under conditions; figures and claims made of what came out.

An experiment is two functions: one makes its conditions of a suite and the methods chosen (most share `one_table`), the
other makes figures and claims of the entries that came out, one for each method under each condition and seed. The
latter is put into EXPERIMENTS by `@experiment`, which says what else there is to know, and its docstring.
"""

import copy
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import wemoe
from data import report
from data.files import InputError
from data.methods import STATIC, TRAINING_IMAGES
from data.miniature.corruptions import CORRUPTIONS
from data.miniature.suite import COUNTERPARTS
from data.paper import published
from data.paper.parameters import compared, rounds_to
from data.suite import CURVE_IMAGES, Suite

# Methods by their names in reproduce.METHODS: by the routers' depth, by rank; the story in short; under other images.
DEPTHS = {0: "WEMoE (0-layer)", 1: "WEMoE (1-layer)", 2: "WEMoE"}
RANKS = {rank: f"WEMoE (rank {rank})" for rank in (1, 2, 4, 8, 16, 32)}
ADAMERGING, DIVERSE = "AdaMerging (layer-wise)", "WEMoE + diversity"
STORY = ["Pre-trained", "Weight Averaging", "Task Arithmetic", ADAMERGING, "WEMoE", "Individual"]
SHIFTED = ["Task Arithmetic", "TIES-Merging", "Fisher Merging", "RegMean", ADAMERGING]
SHIFTED += ["AdaMerging++ (layer-wise)", DEPTHS[0], DEPTHS[2]]


@dataclass(frozen=True)
class Condition:
    """`change` is what run_method takes: of suite.variant, or `task_free`; `settings` the same for single methods.

    The table has the tasks in the order of `columns`, and their averages.
    """

    name: str
    methods: list[str]
    change: dict = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)
    published: list[dict] = field(default_factory=list)
    settings: dict[str, dict] = field(default_factory=dict)


@dataclass
class Measured:
    suite: Suite  # of the last seed
    conditions: list[Condition]
    entries: dict[str, dict[str, list[dict]]]  # condition -> method -> an entry of results.json for every seed

    def first(self) -> dict[str, dict]:
        """Method -> the entry of the first seed, where all tasks are as they are."""
        return {name: seeds[0] for name, seeds in self.entries["main"].items()}

    def has(self, *methods: str) -> bool:
        return all(set(methods) <= entries.keys() for entries in self.entries.values())

    def average(self, condition: str, method: str, tasks: list[str] | None = None) -> float | None:
        """The average accuracy over tasks (all of them, unless given) and seeds; None if the method was not run."""
        entries = self.entries[condition].get(method)
        return entries and statistics.mean(report.averages(entries, tasks or self.suite.tasks))

    def bars(self, groups: dict[str, tuple[str, list[str]]]) -> dict[str, dict[str, list[float]]]:
        """Group -> method -> the average accuracy over the group's tasks under its condition, for every seed."""
        return {
            group: {name: report.averages(entries, tasks) for name, entries in self.entries[condition].items()}
            for group, (condition, tasks) in groups.items()
        }


@dataclass
class Shown:
    figures: dict[str, Figure] = field(default_factory=dict)  # by the names of their files
    claims: list[dict] = field(default_factory=list)
    text: str = ""  # Markdown, in the place of tables of accuracy by condition


def one_table(suite: Suite, methods: list[str], rows: Callable | None = None) -> list[Condition]:
    """All tasks as they are; `rows` are the published ones of an architecture from a source, unless the suite's own."""
    known = rows(suite.name, suite.source) if rows else list(suite.published.values())
    return [Condition("main", methods, {}, {"Average": suite.tasks}, known)]


def beside(rows: Callable) -> Callable:
    return partial(one_table, rows=rows)


@dataclass(frozen=True)
class Experiment:
    """The docstring of `show` tells what it is, in one line."""

    show: Callable[[Measured], Shown]
    paper: tuple[str, ...]  # its numbers in the paper
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


EXPERIMENTS: dict[str, Experiment] = {}


def experiment(name: str, *paper: str, **more) -> Callable:
    """Put an experiment into EXPERIMENTS, with its numbers in the paper and the decorated function as its `show`."""

    def put(show: Callable[[Measured], Shown]) -> Callable[[Measured], Shown]:
        EXPERIMENTS[name] = Experiment(show, paper, **more)
        return show

    return put


def listed() -> str:
    """The experiments, a line for each."""
    lines = []
    for name, chosen in EXPERIMENTS.items():
        numbers = f" ({', '.join(chosen.paper)})" if chosen.paper else ""
        needs = f"{len(chosen.tasks)} tasks" if chosen.tasks else "the suite" if chosen.conditions else "nothing"
        needs += " and their corrupted test images" if chosen.splits else ""
        lines.append(
            f"{name}{numbers}: {chosen.show.__doc__} Needs {needs}; in the miniature, some {chosen.minutes} min."
        )
    return "\n".join(lines)


def claim(text: str, holds: bool, detail: str) -> dict:
    return {"claim": text, "holds": bool(holds), "detail": detail}


class Expected(NamedTuple):
    methods: tuple[str, ...]
    holds: Callable[..., bool]  # of their average accuracies
    detail: str  # with places for these


def claims_about(averages: dict[str, float], expected: dict[str, Expected]) -> list[dict]:
    """What is expected of the average accuracies of methods; claims about methods that were not run are left out."""
    claims = []
    for text, (methods, holds, detail) in expected.items():
        if averages.keys() >= set(methods):
            values = [averages[name] for name in methods]
            claims.append(claim(text, holds(*values), detail.format(*values)))
    return claims


def comparable(suite: Suite, rows: list[dict], entries: dict[str, list[dict]]) -> list[dict]:
    """The published rows that ours may stand beside: with fewer steps than published, none of methods that adapted."""
    adapted = {name for name, (entry, *_) in entries.items() if "adaptation" in entry}
    return [row for row in rows if not (suite.shortened and row["method"] in adapted)]


def published_claims(measured: Measured) -> list[dict]:
    """Our averages within 0.5 points of the published ones, or 0.8 where something is learned: like with like only.

    Methods that depend on a choice of training images are left out; and, of those that adapt, the rows that were made
    with other settings than ours, the paper's or the hub's (see suite.Adaptation).
    """
    claims = []
    for condition in measured.conditions if measured.suite.claimable else ():
        for row in condition.published:
            name, source, tasks = row["method"], row["source"], list(row["accuracy"])
            entry = measured.entries[condition.name].get(name, [{"needs": [TRAINING_IMAGES]}])[0]
            adapted = "adaptation" in entry
            unlike = adapted and source != measured.suite.adaptation.settings
            if TRAINING_IMAGES in entry["needs"] or unlike or not row.get("claimed", True):
                continue
            ours, theirs = measured.average(condition.name, name, tasks), statistics.mean(row["accuracy"].values())
            margin = 0.8 if adapted else 0.5
            where = f", {condition.name}" if len(measured.conditions) > 1 else ""
            text = f"{name}{where} is within {margin} points of the published average ({source})"
            claims.append(claim(text, abs(ours - theirs) <= margin, f"{ours:.2f} against {theirs:.2f}"))
    return claims


# ---- Eight tasks: Tables 2, 3 and 7; 10; 6 ---------------------------------------------------------------------------


@experiment("main", "table2", "table3", "table7", minutes=4, usual=STORY, details=True)
def show_main(measured: Measured) -> Shown:
    """Methods on every task, and what each needs besides the experts."""
    suite, entries = measured.suite, measured.first()
    average = {name: round(measured.average("main", name), 2) for name in entries}
    figures = {"accuracy": report.draw_accuracy(suite.tasks, list(entries.values()))}
    count = sum(len(labels) for _, labels in suite.test.values())
    figures["costs"] = report.draw_costs(measured.entries["main"], count)
    if all(images.dim() == 4 for images, _ in suite.test.values()):  # and not texts
        figures["tasks"] = report.draw_tasks(suite.test)
    if curves := {name: entry["adaptation"] for name, entry in entries.items() if "adaptation" in entry}:
        figures["adaptation"] = report.draw_adaptation(curves, average, CURVE_IMAGES, suite.curve)
    if curves := {name: by_scaling(entry, suite.tasks) for name, entry in entries.items() if "curve" in entry}:
        figures["scalings"] = report.draw_lines({"λ": curves})
    if "WEMoE" in entries:
        figures["routing"] = report.draw_routing(suite.tasks, entries["WEMoE"]["routing"])
    in_miniature = suite.name.startswith("miniature")
    return Shown(figures, paper_claims(measured.entries["main"]) if in_miniature else published_claims(measured))


def by_scaling(entry: dict, tasks: list[str]) -> dict[float, float]:
    """λ -> the average accuracy over these tasks, of a method that was tried with several λ."""
    return {p["scaling"]: statistics.mean(p["accuracy"][task] for task in tasks) for p in entry["curve"]}


IN_THE_PAPER = {
    "Every expert's task is within its reach: the individual models average at least 90 %": Expected(
        ("Individual",), lambda i: i >= 90, "{:.1f}"
    ),
    "The static merges of its time lose at least 8 points against the individual models, even at the best λ": Expected(
        ("Best static", "Individual"), lambda s, i: s <= i - 8, "{:.1f} ≤ {:.1f} - 8"
    ),
    "The order is the paper's: pre-trained < averaging and task arithmetic < WEMoE ≤ individual": Expected(
        ("Pre-trained", "Weight Averaging", "Task Arithmetic", "WEMoE", "Individual"),
        lambda p, a, t, w, i: p < min(a, t) and max(a, t) < w <= i,
        "{:.1f} < {:.1f}, {:.1f} < {:.1f} ≤ {:.1f}",
    ),
    "WEMoE is at least 5 points better than every static merge of its time": Expected(
        ("WEMoE", "Best static"), lambda w, s: w >= s + 5, "{:.1f} ≥ {:.1f} + 5"
    ),
    "WEMoE is better than AdaMerging": Expected(("WEMoE", ADAMERGING), lambda w, a: w > a, "{:.1f} > {:.1f}"),
    "WEMoE recovers at least 95 % of the individual models' accuracy": Expected(
        ("WEMoE", "Individual"), lambda w, i: w >= 0.95 * i, "{:.1f} ≥ 0.95 · {:.1f}"
    ),
    "Routers that look at the input are not worse than constant ones": Expected(
        tuple(DEPTHS.values()), lambda zero, one, two: zero <= min(one, two), "0, 1, 2 layers: {:.1f}, {:.1f}, {:.1f}"
    ),
}


def paper_claims(entries: dict[str, list[dict]]) -> list[dict]:
    """What the paper claims, on our own means over seeds."""
    average = {name: round(statistics.mean(e["average"] for e in seeds), 2) for name, seeds in entries.items()}
    if "Task Arithmetic" in entries:  # or averaging or TIES, at the best λ, which no label-free method could know
        merges = [seeds for seeds in entries.values() if seeds[0]["group"] == STATIC]
        points = [point for seeds in merges for point in zip(*(entry.get("curve", [entry]) for entry in seeds))]
        average["Best static"] = round(max(statistics.mean(p["average"] for p in point) for point in points), 2)
    claims = claims_about(average, IN_THE_PAPER)
    if "WEMoE" in entries:
        curves = [entry["adaptation"] for entry in entries["WEMoE"]]
        tenth = max(1, len(curves[0]["entropy"]) // 10)
        first = statistics.mean(value for curve in curves for value in curve["entropy"][:tenth])
        last = statistics.mean(value for curve in curves for value in curve["entropy"][-tenth:])
        before, after = (statistics.mean(curve["accuracy"][i] for curve in curves) for i in (0, -1))
        text = f"As the entropy falls, accuracy rises (on {CURVE_IMAGES} test inputs of each task)"
        detail = f"entropy {first:.2f} → {last:.2f} nats, accuracy {before:.1f} → {after:.1f}"
        claims.append(claim(text, last < first and after > before, detail))
    return claims


def show_methods(measured: Measured, expected: dict[str, Expected]) -> Shown:
    """A heat map of one table; in the miniature, what is expected of it."""
    figures = {"accuracy": report.draw_accuracy(measured.suite.tasks, list(measured.first().values()))}
    if measured.suite.of_the_paper:
        return Shown(figures, published_claims(measured))
    return Shown(figures, claims_about({name: measured.average("main", name) for name in measured.first()}, expected))


@experiment(
    "depths", "table10", minutes=4, methods=[ADAMERGING, *DEPTHS.values()], conditions=beside(published.router_depths)
)
def show_depths(measured: Measured) -> Shown:
    """Routers of no, one and two layers."""
    expected = {
        "Routers of one layer are within a point of two": Expected(
            (DEPTHS[1], DEPTHS[2]), lambda one, two: abs(one - two) <= 1, "{:.1f} and {:.1f}"
        ),
        "Both are better than AdaMerging": Expected(
            (DEPTHS[1], DEPTHS[2], ADAMERGING), lambda one, two, a: min(one, two) > a, "{:.1f}, {:.1f} > {:.1f}"
        ),
    }
    return show_methods(measured, expected)


MLP_ONLY, SEPARATELY, BLOCKS = DEPTHS[1], "WEMoE (1-layer, attention and MLP)", "WEMoE (1-layer, blocks)"


@experiment(
    "modules", "table6", minutes=10, methods=[MLP_ONLY, SEPARATELY, BLOCKS], conditions=beside(published.routed_modules)
)
def show_modules(measured: Measured) -> Shown:
    """What is routed: MLPs, attention and MLPs, or entire blocks, by one-layer routers."""
    expected = {
        "Routing attention, too, is no worse than MLPs only": Expected(
            (SEPARATELY, MLP_ONLY), lambda both, mlp: both >= mlp, "{:.1f} ≥ {:.1f}"
        ),
        "Routing entire blocks is worse than MLPs only": Expected(
            (BLOCKS, MLP_ONLY), lambda blocks, mlp: blocks < mlp, "{:.1f} < {:.1f}"
        ),
    }
    return show_methods(measured, expected)


# ---- Other test images: Tables 4, 5 and 11, and what goes wrong under noise ------------------------------------------

CORRUPTED = {"tasks": published.ROBUSTNESS_TASKS, "splits": tuple(CORRUPTIONS)}


def in_suite(known: Iterable[str], tasks: list[str]) -> list[str]:
    """The suite's names of the paper's tasks: in the miniature, whose tasks are known, those of their counterparts."""
    return [task if task in known else COUNTERPARTS[task] for task in tasks]


def authors_rates(suite: Suite, rates: dict[str, float]) -> dict[str, dict]:
    """Condition.settings of methods for which the authors' program has another learning rate in this experiment."""
    theirs = suite.of_the_paper and suite.adaptation.settings == "paper"
    return {name: {"lr": lr} for name, lr in rates.items()} if theirs else {}


def generalization_conditions(suite: Suite, methods: list[str]) -> list[Condition]:
    conditions, settings = [], authors_rates(suite, dict.fromkeys(DEPTHS.values(), 2e-3))
    for seen, unseen, rows in published.generalization(suite.name, suite.source):
        seen, unseen = in_suite(suite.heads, seen), in_suite(suite.heads, unseen)
        name, columns = f"merged without {' and '.join(unseen)}", {"Seen": seen, "Unseen": unseen}
        conditions.append(Condition(name, methods, {"experts": tuple(seen)}, columns, rows, settings))
    return conditions


@experiment(
    "generalization",
    "table4",
    minutes=8,
    methods=["Pre-trained", *SHIFTED],
    conditions=generalization_conditions,
    tasks=published.PUBLISHED_TASKS,
)
def show_generalization(measured: Measured) -> Shown:
    """Six tasks merged, eight tested."""
    groups, claims = {}, []
    for condition in measured.conditions:
        for part, tasks in condition.columns.items():
            groups[f"{condition.name}:\n{part}".replace("without ", "without\n")] = condition.name, tasks
        seen = {m: measured.average(condition.name, m, condition.columns["Seen"]) for m in condition.methods}
        if len(seen) > 1 and (ours := seen.pop("WEMoE", None)) is not None:
            text = f"WEMoE is the best on the tasks that were {condition.name}"
            claims.append(claim(text, ours > max(seen.values()), f"{ours:.1f} > {max(seen.values()):.1f}"))
    return Shown({"generalization": report.draw_conditions(measured.bars(groups))}, claims + published_claims(measured))


def corrupted(suite: Suite, kind: str, methods: list[str], **change) -> Condition:
    """Four tasks merged and adapted on test images of this kind, "clean" or a corruption's name."""
    tasks = in_suite(suite.heads, published.ROBUSTNESS_TASKS)
    change |= {} if kind == "clean" else {"split": kind}
    settings = authors_rates(suite, {DEPTHS[0]: 1e-3})
    rows = published.robustness(suite.name, suite.source, kind)
    return Condition(kind.replace("_", " "), methods, change, {"Average": tasks}, rows, settings)


def corrupted_conditions(suite: Suite, methods: list[str], kinds: Iterable[str] = CORRUPTIONS) -> list[Condition]:
    return [corrupted(suite, kind, methods) for kind in ("clean", *kinds)]


def draw_corrupted(measured: Measured, name: str, groups: dict[str, tuple[str, list[str]]]) -> dict:
    suite, pictures = measured.suite, {}
    for c in measured.conditions:
        test = suite.variant(**c.change).test
        pictures[c.name] = torch.cat([test[task][0][:6] for task in suite.tasks]), None
    return {"tasks": report.draw_tasks(pictures), name: report.draw_conditions(measured.bars(groups))}


@experiment(
    "robustness",
    "table5",
    "table11",
    minutes=20,
    methods=[*SHIFTED, DIVERSE],
    conditions=corrupted_conditions,
    **CORRUPTED,
)
def show_robustness(measured: Measured) -> Shown:
    """Four tasks merged, tested under seven corruptions."""
    groups = {c.name: (c.name, measured.suite.tasks) for c in measured.conditions}
    return Shown(draw_corrupted(measured, "robustness", groups), published_claims(measured))


@experiment(
    "collapse",
    minutes=20,
    methods=["Task Arithmetic", "WEMoE", DIVERSE],
    conditions=partial(corrupted_conditions, kinds=("impulse_noise",)),
    tasks=published.ROBUSTNESS_TASKS,
    splits=("impulse_noise",),
    seeds=5,
)
def show_collapse(measured: Measured) -> Shown:
    """Where minimising the entropy goes wrong (the worst task under noise), and its cure, over five seeds."""
    tasks = measured.suite.tasks
    groups = {f"{c.name}:\n{task}": (c.name, [task]) for c in measured.conditions for task in tasks}
    figures, methods = draw_corrupted(measured, "collapse", groups), ("Task Arithmetic", "WEMoE", DIVERSE)
    if not measured.has(*methods):
        return Shown(figures)
    (clean, noise), of = (c.name for c in measured.conditions), measured.average
    worst = min(tasks, key=lambda task: of(noise, "WEMoE", [task]) - of(noise, "Task Arithmetic", [task]))
    arithmetic, plain, cured = (of(noise, method, [worst]) for method in methods)
    gain, cost = (of(c, DIVERSE) - of(c, "WEMoE") for c in (noise, clean))
    text = f"Under {noise}, WEMoE makes the worst-hit task ({worst}) worse than task arithmetic leaves it"
    better = f"{worst} {cured:.1f} > {arithmetic:.1f}, average {gain:+.1f} against WEMoE without"
    cure = "With diverse predictions it does not, and the average is better"
    claims = [
        claim(text, plain < arithmetic, f"{plain:.1f} < {arithmetic:.1f}"),
        claim(cure, cured > arithmetic and gain > 0, better),
        claim("That costs at most half a point on clean images", cost >= -0.5, f"{cost:+.1f}"),
    ]
    return Shown(figures, claims)


# ---- Settings, one at a time (Figure 4), and λ (Figures 5 and 10) ----------------------------------------------------

ABLATION = {
    "lr": lambda s: [s.lr * factor for factor in (0.25, 0.5, 1, 2)],
    "steps": lambda s: [max(1, round(s.steps * factor)) for factor in (0.125, 0.25, 0.5, 1)],
    "init_lambda": lambda s: [0.1, 0.2, 0.3, 0.4, 0.5],
    "share": lambda s: [0.02, 0.05, 0.1, 0.25, 1.0],
}


def ablation_conditions(suite: Suite, methods: list[str]) -> list[Condition]:
    columns = {"Average": suite.tasks}
    conditions = [Condition("as it is", methods, {}, columns)]
    for setting, values in ABLATION.items():
        for value in dict.fromkeys(values(suite.adaptation)):
            if value != getattr(suite.adaptation, setting):
                conditions.append(Condition(f"{setting} = {value:g}", ["WEMoE"], {setting: value}, columns))
    return conditions


@experiment("ablation", "fig4", minutes=15, methods=[*DEPTHS.values(), *RANKS.values()], conditions=ablation_conditions)
def show_ablation(measured: Measured) -> Shown:
    """Settings of WEMoE, one at a time, and accuracy during adaptation by learning rate, beside the authors'."""
    suite, of, rates = measured.suite, partial(measured.average, "as it is"), {}
    panels = {"router layers": {depth: of(name) for depth, name in DEPTHS.items()}}
    panels["rank"] = {rank: of(name) for rank, name in RANKS.items()}
    for condition in measured.conditions:
        if entries := measured.entries[condition.name].get("WEMoE"):
            settings = condition.change or {setting: getattr(suite.adaptation, setting) for setting in ABLATION}
            for setting, value in settings.items():
                panels.setdefault(setting, {})[value] = measured.average(condition.name, "WEMoE")
            if "lr" in settings:
                curve = entries[0]["adaptation"]
                rates[f"lr = {settings['lr']:g}"] = dict(zip(curve["steps"], curve["accuracy"]))
    known = {name: {x: y for x, y in sorted(points.items()) if y is not None} for name, points in panels.items()}
    lines = {name: {"WEMoE": {f"{x:g}": y for x, y in points.items()}} for name, points in known.items() if points}
    curves = published.adaptation_curves(suite.name) if suite.source else []
    theirs = {f"lr = {c['learning_rate']:g}": dict(zip(c["steps"], c["average"])) for c in curves}
    figures = {"ablation": report.draw_lines(lines, columns=3)}
    figures["rates"] = report.draw_lines({"adaptation step": rates}, {"adaptation step": theirs})
    return Shown(figures)


LAMBDAS = tuple(i / 10 for i in range(11))  # of methods that merge once


def sweep_conditions(suite: Suite, methods: list[str]) -> list[Condition]:
    """For each kind of images, one condition for what merges once, at all λ, and one for each λ where routers start."""
    kinds, starts = ("clean", "impulse_noise"), (0.1, 0.3, 0.6, 1.0)
    if suite.of_the_paper:
        kinds, starts = ("clean", *CORRUPTIONS), LAMBDAS[1:]
    adapting = [name for name in methods if name in DEPTHS.values()]
    merging = [name for name in methods if name not in adapting]
    conditions = []
    for kind in kinds:
        conditions += [corrupted(suite, kind, merging)] if merging else []
        for lam in starts if adapting else ():
            conditions.append(replace(corrupted(suite, kind, adapting, init_lambda=lam), name=f"{kind}, λ = {lam}"))
    return conditions


@experiment(
    "sweep",
    "fig5",
    "fig10",
    minutes=5,
    methods=["Task Arithmetic", "TIES-Merging", DEPTHS[0], DEPTHS[2]],
    conditions=sweep_conditions,
    steps=40,
    scalings=LAMBDAS,
    **CORRUPTED,
)
def show_sweep(measured: Measured) -> Shown:
    """Accuracy against λ, under corruptions: a panel and a table for each, with the published points."""
    suite, tasks = measured.suite, measured.conditions[0].columns["Average"]
    ours, theirs, texts = {}, {}, []
    for condition in measured.conditions:
        lines = ours.setdefault(condition.change.get("split", "clean"), {})
        for name, (entry, *_) in measured.entries[condition.name].items():
            lam = condition.change.get("init_lambda")
            points = by_scaling(entry, tasks) if lam is None else {lam: measured.average(condition.name, name)}
            lines.setdefault(name, {}).update(points)
    for kind, lines in ours.items():
        known = published.sweep(suite.name, kind) if suite.source else {}
        theirs[kind] = {
            name: {lam: statistics.mean(cells.values()) for lam, cells in known[name].items()}
            for name in lines
            if name in known and not (suite.shortened and name in DEPTHS.values())
        }
        rows = []
        for name, points in lines.items():
            for label, known in ((name, points), ("  published (paper)", theirs[kind].get(name))):
                rows += [[label, *(report.number(known.get(lam)) for lam in LAMBDAS)]] if known else []
        texts.append(f"## {kind}\n\n" + report.markdown(["Method, λ =", *map(str, LAMBDAS)], rows))
    return Shown({"sweep": report.draw_lines(ours, theirs, columns=4)}, [], "\n".join(texts))


# ---- What is routed, how many layers, and routers that are unloaded --------------------------------------------------

SHARES = {share: f"WEMoE (deepest {share:.0%})" for share in (0.25, 0.5, 0.75)}


def deepest_mlps(model: nn.Module, share: float) -> str:
    """A regular expression for the MLPs of the deepest blocks, so many of all: `modules` of wemoe.upscale."""
    names = [name for name, _ in model.named_modules() if name.endswith(".mlp")]
    return f"^({'|'.join(map(re.escape, names[-max(1, round(share * len(names))) :]))})$"


@experiment("layers", "appendixd", minutes=5, methods=["Task Arithmetic", *SHARES.values(), "WEMoE"])
def show_layers(measured: Measured) -> Shown:
    """Only the deeper MLPs routed: accuracy, parameters and time of evaluation."""
    found = [
        (e["name"], len(e.get("routing", ())), e["average"], e["total_parameters"] / 1e6, e["evaluation_seconds"])
        for e in sorted(measured.first().values(), key=lambda entry: len(entry.get("routing", ())))
    ]
    names = ["accuracy (%)", "parameters (millions)", "seconds of evaluation"]
    panels = {name: {"routed layers": {values[1]: values[i] for values in found}} for i, name in enumerate(names, 2)}
    rows = [[name, str(layers), *map(report.number, values)] for name, layers, *values in found]
    figure = report.draw_lines(panels, ylabel="")
    return Shown({"layers": figure}, [], report.markdown(["Method", "Routed layers", *panels], rows))


UNLOADED = "WEMoE (0-layer, unloaded)"


@experiment("unload", "appendixb3", minutes=2, methods=["Task Arithmetic", DEPTHS[0], UNLOADED], details=True)
def show_unload(measured: Measured) -> Shown:
    """Constant routers merged once and for all: the same accuracies from a dense model."""
    names = DEPTHS[0], UNLOADED, "Task Arithmetic"
    if not measured.has(*names):
        return Shown()
    routed, unloaded, dense = (measured.first()[name] for name in names)
    most = max(abs(routed["accuracy"][task] - unloaded["accuracy"][task]) for task in measured.suite.tasks)
    sizes = [entry["total_parameters"] for entry in (unloaded, dense)]
    same = claim("Unloaded, each task's accuracy is the same to half a point", most <= 0.5, f"at most {most:.2f} apart")
    small = claim("It has the dense model's parameters", sizes[0] == sizes[1], "{:,} and {:,}".format(*sizes))
    return Shown({}, [same, small])


# ---- What routers do (Figures 11 and 12) -----------------------------------------------------------------------------


@experiment("routing", "fig11", "fig12", minutes=3, methods=["WEMoE"])
def show_routing(measured: Measured) -> Shown:
    """Mean routing weights and first choices, by layer and task."""
    tasks, entry = measured.suite.tasks, measured.first()["WEMoE"]
    figures = {"routing": report.draw_routing(tasks, entry["routing"])}
    figures["first_choice"] = report.draw_routing(tasks, entry["first_choice"], first=True)
    own = {name: statistics.mean(row[i] for i, row in enumerate(m)) for name, m in entry["first_choice"].items()}
    rows = [[name, report.number(100 * share)] for name, share in own.items()]
    return Shown(figures, [], report.markdown(["Layer", "own expert first (% of images)"], rows))


# ---- Task vectors by layer (Figure 3), and the loss between them (Figure 7) ------------------------------------------


@experiment("vectors", "fig3", minutes=1, methods=[], conditions=lambda *_: [])
def show_vectors(measured: Measured) -> Shown:
    """Lengths |τ_t| and angles between θ_t and θ_0 by layer, attention against MLP: means over tasks."""
    suite, lengths, cosines = measured.suite, {}, {}
    states = [model.state_dict() for model in (suite.pretrained, *suite.experts.values())]
    groups: dict[tuple[str, int], list[str]] = {}
    for name in states[0]:
        if found := re.search(r"\.(\d+)\.(attn|mlp)\.", name):
            groups.setdefault((found[2], int(found[1])), []).append(name)
    for (part, layer), names in sorted(groups.items()):
        start, *ends = (torch.cat([state[name].flatten() for name in names]).double() for state in states)
        lengths.setdefault(part, {})[layer] = statistics.mean((e - start).norm().item() for e in ends)
        cosines.setdefault(part, {})[layer] = statistics.mean(F.cosine_similarity(e, start, dim=0).item() for e in ends)
    panels = {"layer: length of τ": lengths, "layer: cosine of θ_t and θ_0": cosines}
    rows = [[f"{p}, {layer}", f"{lengths[p][layer]:.4f}", f"{cosines[p][layer]:.6f}"] for p, layer in sorted(groups)]
    return Shown({"vectors": report.draw_lines(panels, ylabel="")}, [], report.markdown(["Part", *panels], rows))


LANDSCAPE = "Task Arithmetic of two tasks"


@torch.no_grad()
def landscape(suite: Suite, points: int = 11, count: int = 128) -> tuple[nn.Module, dict]:
    """The mean loss of two tasks' test images over (λ_1, λ_2) in [-1, 1]², on a grid of so many points a side."""
    model = copy.deepcopy(suite.pretrained).to(suite.device)
    vectors = [wemoe.task_vector(suite.pretrained, expert) for expert in suite.experts.values()]
    grid = [2 * i / (points - 1) - 1 for i in range(points)]
    test = {task: [part[:count] for part in suite.test[task]] for task in suite.experts}

    def loss(*scaling: float) -> float:
        model.load_state_dict(wemoe.task_arithmetic(suite.pretrained, vectors, scaling))
        losses = [
            F.cross_entropy(suite.logits(task)(model(suite.inputs(images))), labels.to(suite.device)).item()
            for task, (images, labels) in test.items()
        ]
        return round(statistics.mean(losses), 6)

    losses = [[loss(first, second) for second in grid] for first in grid]
    model.load_state_dict(wemoe.task_arithmetic(suite.pretrained, vectors, 0.3))
    return model, {"grid": grid, "loss": losses}  # losses[i][j] is at (grid[i], grid[j])


def pairs_of_tasks(suite: Suite, methods: list[str]) -> list[Condition]:
    if len(suite.tasks) % 2:
        raise InputError(f"the experiment landscape is about pairs of tasks: {len(suite.tasks)} leave one alone")
    pairs = zip(suite.tasks[::2], suite.tasks[1::2])
    return [Condition(" and ".join(pair), methods, {"experts": pair}, {"Average": list(pair)}) for pair in pairs]


@experiment("landscape", "fig7", minutes=3, methods=[LANDSCAPE], conditions=pairs_of_tasks)
def show_landscapes(measured: Measured) -> Shown:
    """The loss over (λ1, λ2) for pairs of tasks."""
    surfaces, rows = {}, []
    for condition in measured.conditions:
        ((entry, *_),) = measured.entries[condition.name].values()
        grid, loss = entry["grid"], entry["loss"]
        least, i, j = min((value, i, j) for i, row in enumerate(loss) for j, value in enumerate(row))
        surfaces[condition.name] = tuple(condition.change["experts"]), grid, loss
        rows.append([condition.name, f"({grid[i]:.1f}, {grid[j]:.1f})", f"{least:.3f}"])
    text = report.markdown(["Pair of tasks", "(λ1, λ2) of the least loss", "loss (nats)"], rows)
    return Shown({"landscape": report.draw_landscapes(surfaces)}, [], text)


# ---- Parameters, of the architecture alone (Tables 1, 8 and 9) -------------------------------------------------------


@experiment("parameters", "table8", "table1", "table9", minutes=1, methods=[], conditions=None)
def show_parameters(_: None) -> Shown:
    """Numbers of parameters, computed from the architectures: no weights, no download."""
    rows = [[what, f"{ours:,}", paper, "yes" if rounds_to(ours, paper) else "no"] for what, ours, paper in compared()]
    equal = [row[-1] == "yes" for row in rows]
    text = "Numbers of parameters are those of Tables 1, 8 and 9, to the digits printed"
    claims = [claim(text, all(equal), f"{sum(equal)} of {len(equal)}")]
    return Shown({}, claims, report.markdown(["Parameters", "ours", "the paper's", "equal"], rows))


# ---- Harder questions: nobody tells the task; more tasks -------------------------------------------------------------


def task_free(suite: Suite, methods: list[str]) -> list[Condition]:
    """All tasks as they are; the entries of methods tell, too, how often head and class are right together."""
    return [replace(condition, change={"task_free": True}) for condition in one_table(suite, methods)]


@experiment(
    "taskfree",
    minutes=6,
    conditions=task_free,
    usual=["Task Arithmetic", "TSV-M", ADAMERGING, "WEMoE", "SMILE", "MASS", "Individual"],
)
def show_task_free(measured: Measured) -> Shown:
    """Accuracy where nobody tells the task of an image: its head is chosen, too (suite.evaluate_task_free)."""
    rules = {"": "head given", "entropy": "lowest entropy", "routing": "routing weights", "logit": "logit"}
    groups: dict[str, dict[str, list[float]]] = {text: {} for text in rules.values()}
    for name, entries in measured.entries["main"].items():
        found = [{"": entry["accuracy"], **entry["task_free"]} for entry in entries]
        for rule in found[0]:
            chosen = [{"accuracy": accuracy[rule]} for accuracy in found]
            groups[rules[rule]][name] = report.averages(chosen, measured.suite.tasks)
    return Shown({"task_free": report.draw_conditions(groups)}, [], report.by_group(groups))


def numbers_of_tasks(suite: Suite, methods: list[str]) -> list[Condition]:
    counts = [*(count for count in (4, 8) if count < len(suite.tasks)), len(suite.tasks)]
    parts = {f"{count} tasks": tuple(suite.tasks[:count]) for count in counts}
    return [Condition(name, methods, {"tasks": part}, {"Average": list(part)}) for name, part in parts.items()]


@experiment(
    "tasks",
    minutes=12,
    methods=[
        *("Task Arithmetic", "TSV-M", ADAMERGING, "WEMoE (rank 16)", "WEMoE"),
        *("WEMoE (TSV-M elsewhere)", "Oracle routing", "Oracle routing (TSV-M elsewhere)", "Individual"),
    ],
    conditions=numbers_of_tasks,
    more_tasks=True,
    steps=80,
)
def show_numbers_of_tasks(measured: Measured) -> Shown:
    """Accuracy against the number of tasks that are merged, and what limits it."""
    groups = measured.bars({c.name: (c.name, c.columns["Average"]) for c in measured.conditions})
    lines: dict[str, dict[float, float]] = {}
    for condition, group in zip(measured.conditions, groups.values()):
        for name, values in group.items():
            lines.setdefault(name, {})[len(condition.columns["Average"])] = statistics.mean(values)
    return Shown({"tasks": report.draw_lines({"number of tasks": lines})}, [], report.by_group(groups))
