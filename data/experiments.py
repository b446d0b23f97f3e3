"""What the experiments measure and show: methods under conditions; figures and claims made of what came out.

An experiment is two functions: one makes its conditions of a suite and the methods chosen, the other makes figures and
claims of the entries that came out, one for each method under each condition and seed. The latter is put into
EXPERIMENTS by `@experiment`, which says what else there is to know of it; most share the conditions of `one_table`.
What is known of a method comes with its entry: its group, what it needs, how it was adapted.
"""

import copy
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import open_clip
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import wemoe
from data import report
from data.miniature.corruptions import CORRUPTIONS
from data.miniature.suite import COUNTERPARTS
from data.paper import published
from data.paper.hub import ARCHITECTURES
from data.suite import CURVE_IMAGES, Suite

# What a method may need besides the experts (Table 7).
TRAINING_IMAGES, VALIDATION = "labelled task data", "labelled validation data"
ADAPTATION = "test-time adaptation"
STATIC = "static"  # the group of the methods that merge once and look at no data
# Methods by their names in reproduce.METHODS: by the routers' depth, by rank; the story in short; under other images.
DEPTHS = {0: "WEMoE (0-layer)", 1: "WEMoE (1-layer)", 2: "WEMoE"}
RANKS = {rank: f"WEMoE (rank {rank})" for rank in (1, 2, 4, 8, 16, 32)}
STORY = ["Pre-trained", "Weight Averaging", "Task Arithmetic", "AdaMerging (layer-wise)", "WEMoE", "Individual"]
SHIFTED = ["Task Arithmetic", "TIES-Merging", "Fisher Merging", "RegMean", "AdaMerging (layer-wise)"]
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


@dataclass(frozen=True)
class Experiment:
    about: str
    minutes: int  # some, that it takes in the miniature on 2 cores: an estimate, by its methods' seconds
    show: Callable[[Measured], Shown]
    methods: list[str] | None = None  # that it may run; None: all of the main table
    conditions: Callable[[Suite, list[str]], list[Condition]] | None = one_table  # None: it needs no suite
    paper: tuple[str, ...] = ()  # its numbers in the paper
    usual: list[str] | None = None  # that it runs unless told otherwise; None: all of them
    tasks: list[str] | None = None  # if it has its own, of the paper's suites; in the miniature, their counterparts
    more_tasks: bool = False  # whether it takes all that the miniature can draw, and not the first eight only
    splits: tuple[str, ...] = ()  # of the data sets, besides the test split
    seeds: int = 1
    steps: int | None = None  # of adaptation, in the miniature; None: as many as usual
    scalings: tuple[float, ...] = ()  # λ that methods which merge once try, besides their own
    details: bool = False  # whether its tables tell time and size, too


EXPERIMENTS: dict[str, Experiment] = {}


def experiment(name: str, *about, **more) -> Callable:
    """Put an experiment into EXPERIMENTS, under this name, with the decorated function for what it shows."""

    def put(show: Callable[[Measured], Shown]) -> Callable[[Measured], Shown]:
        EXPERIMENTS[name] = Experiment(*about, show=show, **more)
        return show

    return put


def claim(text: str, holds: bool, detail: str) -> dict:
    return {"claim": text, "holds": bool(holds), "detail": detail}


Expected = tuple[str, tuple[str, ...], Callable[..., bool], str]  # text, methods, whether it holds, detail


def claims_about(averages: dict[str, float], expected: tuple[Expected, ...]) -> list[dict]:
    """What is expected of the average accuracies of methods; claims about methods that were not run are left out."""
    claims = []
    for text, names, holds, detail in expected:
        if all(name in averages for name in names):
            values = [averages[name] for name in names]
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


@experiment(
    "main",
    "methods on every task, and what each needs besides the experts",
    minutes=4,
    paper=("table2", "table3", "table7"),
    usual=STORY,
    details=True,
)
def show_main(measured: Measured) -> Shown:
    suite, entries = measured.suite, measured.first()
    average = {name: round(measured.average("main", name), 2) for name in entries}
    count = sum(len(labels) for _, labels in suite.test.values())
    figures = {"accuracy": report.draw_accuracy(suite.tasks, list(entries.values()))}
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


IN_THE_PAPER: tuple[Expected, ...] = (
    (
        "Every expert's task is within its reach: the individual models average at least 90 %",
        ("Individual",),
        lambda i: i >= 90,
        "{:.1f}",
    ),
    (
        "The static merges of its time lose at least 8 points against the individual models, even at the best λ",
        ("Best static", "Individual"),
        lambda s, i: s <= i - 8,
        "{:.1f} ≤ {:.1f} - 8",
    ),
    (
        "The order is the paper's: pre-trained < averaging and task arithmetic < WEMoE ≤ individual",
        ("Pre-trained", "Weight Averaging", "Task Arithmetic", "WEMoE", "Individual"),
        lambda p, a, t, w, i: p < min(a, t) and max(a, t) < w <= i,
        "{:.1f} < {:.1f}, {:.1f} < {:.1f} ≤ {:.1f}",
    ),
    (
        "WEMoE is at least 5 points better than every static merge of its time",
        ("WEMoE", "Best static"),
        lambda w, s: w >= s + 5,
        "{:.1f} ≥ {:.1f} + 5",
    ),
    ("WEMoE is better than AdaMerging", ("WEMoE", "AdaMerging (layer-wise)"), lambda w, a: w > a, "{:.1f} > {:.1f}"),
    (
        "WEMoE recovers at least 95 % of the individual models' accuracy",
        ("WEMoE", "Individual"),
        lambda w, i: w >= 0.95 * i,
        "{:.1f} ≥ 0.95 · {:.1f}",
    ),
    (
        "Routers that look at the input are not worse than constant ones",
        tuple(DEPTHS.values()),
        lambda zero, one, two: zero <= min(one, two),
        "0, 1, 2 layers: {:.1f}, {:.1f}, {:.1f}",
    ),
)


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
        entropy, accuracy = (
            [statistics.mean(values) for values in zip(*(curve[what] for curve in curves))]
            for what in ("entropy", "accuracy")
        )
        tenth = max(1, len(entropy) // 10)
        first, last = (statistics.mean(part) for part in (entropy[:tenth], entropy[-tenth:]))
        text = f"As the entropy falls, accuracy rises (on {CURVE_IMAGES} test images of each task)"
        detail = f"entropy {first:.2f} → {last:.2f} nats, accuracy {accuracy[0]:.1f} → {accuracy[-1]:.1f}"
        claims.append(claim(text, last < first and accuracy[-1] > accuracy[0], detail))
    return claims


def show_methods(measured: Measured, expected: tuple[Expected, ...]) -> Shown:
    """A heat map of one table; in the miniature, what is expected of it."""
    figures = {"accuracy": report.draw_accuracy(measured.suite.tasks, list(measured.first().values()))}
    if measured.suite.of_the_paper:
        return Shown(figures, published_claims(measured))
    return Shown(figures, claims_about({name: measured.average("main", name) for name in measured.first()}, expected))


@experiment(
    "depths",
    "routers of no, one and two layers",
    minutes=4,
    methods=["AdaMerging (layer-wise)", *DEPTHS.values()],
    conditions=partial(one_table, rows=published.router_depths),
    paper=("table10",),
)
def show_depths(measured: Measured) -> Shown:
    return show_methods(
        measured,
        (
            (
                "Routers of one layer are within a point of two",
                (DEPTHS[1], DEPTHS[2]),
                lambda one, two: abs(one - two) <= 1,
                "{:.1f} and {:.1f}",
            ),
            (
                "Both are better than AdaMerging",
                (DEPTHS[1], DEPTHS[2], "AdaMerging (layer-wise)"),
                lambda one, two, fixed: min(one, two) > fixed,
                "{:.1f}, {:.1f} > {:.1f}",
            ),
        ),
    )


MLP_ONLY, SEPARATELY, BLOCKS = DEPTHS[1], "WEMoE (1-layer, attention and MLP)", "WEMoE (1-layer, blocks)"


@experiment(
    "modules",
    "what is routed: MLPs, attention and MLPs, or entire blocks, by one-layer routers",
    minutes=10,
    methods=[MLP_ONLY, SEPARATELY, BLOCKS],
    conditions=partial(one_table, rows=published.routed_modules),
    paper=("table6",),
)
def show_modules(measured: Measured) -> Shown:
    return show_methods(
        measured,
        (
            (
                "Routing attention, too, is no worse than MLPs only",
                (SEPARATELY, MLP_ONLY),
                lambda both, mlp: both >= mlp,
                "{:.1f} ≥ {:.1f}",
            ),
            (
                "Routing entire blocks is worse than MLPs only",
                (BLOCKS, MLP_ONLY),
                lambda blocks, mlp: blocks < mlp,
                "{:.1f} < {:.1f}",
            ),
        ),
    )


# ---- Other test images: Tables 4, 5 and 11, and what goes wrong under noise ------------------------------------------

CORRUPTED = {"tasks": published.ROBUSTNESS_TASKS, "splits": tuple(CORRUPTIONS)}


def in_suite(suite: Suite, tasks: list[str]) -> list[str]:
    """The suite's names of the paper's tasks: in the miniature, those of their counterparts."""
    return [task if task in suite.heads else COUNTERPARTS[task] for task in tasks]


def authors_rates(suite: Suite, rates: dict[str, float]) -> dict[str, dict]:
    """Condition.settings of methods for which the authors' program has another learning rate in this experiment."""
    theirs = suite.of_the_paper and suite.adaptation.settings == "paper"
    return {name: {"lr": lr} for name, lr in rates.items()} if theirs else {}


def generalization_conditions(suite: Suite, methods: list[str]) -> list[Condition]:
    conditions = []
    settings = authors_rates(suite, dict.fromkeys(DEPTHS.values(), 2e-3))
    for seen, unseen, rows in published.generalization(suite.name, suite.source):
        seen, unseen = in_suite(suite, seen), in_suite(suite, unseen)
        name, columns = f"merged without {' and '.join(unseen)}", {"Seen": seen, "Unseen": unseen}
        conditions.append(Condition(name, methods, {"experts": tuple(seen)}, columns, rows, settings))
    return conditions


@experiment(
    "generalization",
    "six tasks merged, eight tested",
    minutes=8,
    methods=["Pre-trained", *SHIFTED],
    conditions=generalization_conditions,
    paper=("table4",),
    tasks=published.PUBLISHED_TASKS,
)
def show_generalization(measured: Measured) -> Shown:
    groups, claims = {}, []
    for condition in measured.conditions:
        for part, tasks in condition.columns.items():
            groups[f"{condition.name}:\n{part}".replace("without ", "without\n")] = condition.name, tasks
        seen = {m: measured.average(condition.name, m, condition.columns["Seen"]) for m in condition.methods}
        if len(seen) > 1 and (ours := seen.pop("WEMoE", None)) is not None:
            text = f"WEMoE is the best on the tasks that were {condition.name}"
            claims.append(claim(text, ours > max(seen.values()), f"{ours:.1f} > {max(seen.values()):.1f}"))
    figures = {"generalization": report.draw_conditions(measured.bars(groups))}
    return Shown(figures, claims + published_claims(measured))


def corrupted(suite: Suite, kind: str, methods: list[str], **change) -> Condition:
    """Four tasks merged and adapted on test images of this kind, "clean" or a corruption's name."""
    tasks, change = in_suite(suite, published.ROBUSTNESS_TASKS), dict(change)
    if kind != "clean":
        change["split"] = kind
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
    "four tasks merged, tested under seven corruptions",
    minutes=20,
    methods=[*SHIFTED, "WEMoE + diversity"],
    conditions=corrupted_conditions,
    paper=("table5", "table11"),
    **CORRUPTED,
)
def show_robustness(measured: Measured) -> Shown:
    groups = {c.name: (c.name, measured.suite.tasks) for c in measured.conditions}
    return Shown(draw_corrupted(measured, "robustness", groups), published_claims(measured))


@experiment(
    "collapse",
    "where minimising the entropy goes wrong, and its cure, over five seeds",
    minutes=20,
    methods=["Task Arithmetic", "WEMoE", "WEMoE + diversity"],
    conditions=partial(corrupted_conditions, kinds=("impulse_noise",)),
    tasks=published.ROBUSTNESS_TASKS,
    splits=("impulse_noise",),
    seeds=5,
)
def show_collapse(measured: Measured) -> Shown:
    """Means over seeds: the worst task under noise, and what the cure gives there and costs on clean images."""
    tasks = measured.suite.tasks
    groups = {f"{c.name}:\n{task}": (c.name, [task]) for c in measured.conditions for task in tasks}
    figures, methods = draw_corrupted(measured, "collapse", groups), ("Task Arithmetic", "WEMoE", "WEMoE + diversity")
    if not measured.has(*methods):
        return Shown(figures)
    clean, noise = (c.name for c in measured.conditions)
    of = measured.average
    worst = min(tasks, key=lambda task: of(noise, "WEMoE", [task]) - of(noise, "Task Arithmetic", [task]))
    arithmetic, plain, cured = (of(noise, method, [worst]) for method in methods)
    gain, cost = (of(c, "WEMoE + diversity") - of(c, "WEMoE") for c in (noise, clean))
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


@experiment(
    "ablation",
    "settings of WEMoE, one at a time, and accuracy during adaptation by learning rate",
    minutes=15,
    methods=[*DEPTHS.values(), *RANKS.values()],
    conditions=ablation_conditions,
    paper=("fig4",),
)
def show_ablation(measured: Measured) -> Shown:
    """Accuracy against each setting; and during adaptation, by learning rate, beside the authors' (Figure 4)."""
    suite, of, rates = measured.suite, partial(measured.average, "as it is"), {}
    panels = {"router layers": {depth: of(name) for depth, name in DEPTHS.items()}}
    panels["rank"] = {rank: of(name) for rank, name in RANKS.items()}
    panels |= {setting: {getattr(suite.adaptation, setting): of("WEMoE")} for setting in ABLATION}
    for condition in measured.conditions[1:]:
        ((setting, value),) = condition.change.items()
        panels[setting][value] = measured.average(condition.name, "WEMoE")
    for condition in measured.conditions:
        if "WEMoE" in condition.methods and condition.change.keys() <= {"lr"}:
            curve = measured.entries[condition.name]["WEMoE"][0]["adaptation"]
            lr = condition.change.get("lr", suite.adaptation.lr)
            rates[f"lr = {lr:g}"] = dict(zip(curve["steps"], curve["accuracy"]))
    known = {name: {x: y for x, y in sorted(points.items()) if y is not None} for name, points in panels.items()}
    lines = {name: {"WEMoE": {f"{x:g}": y for x, y in points.items()}} for name, points in known.items() if points}
    curves = published.adaptation_curves(suite.name) if suite.source else []
    theirs = {f"lr = {c['learning_rate']:g}": dict(zip(c["steps"], c["average"])) for c in curves}
    figures = {
        "ablation": report.draw_lines(lines, columns=3),
        "rates": report.draw_lines({"adaptation step": rates}, {"adaptation step": theirs}),
    }
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
    "accuracy against λ, under corruptions",
    minutes=5,
    methods=["Task Arithmetic", "TIES-Merging", DEPTHS[0], DEPTHS[2]],
    conditions=sweep_conditions,
    paper=("fig5", "fig10"),
    **CORRUPTED,
    steps=40,
    scalings=LAMBDAS,
)
def show_sweep(measured: Measured) -> Shown:
    """Accuracy against λ, a panel for each kind of images, and a table for each, with the published points."""
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
            rows.append([name, *(number(points.get(lam)) for lam in LAMBDAS)])
            if name in theirs[kind]:
                rows.append(["  published (paper)", *(number(theirs[kind][name].get(lam)) for lam in LAMBDAS)])
        texts.append(f"## {kind}\n\n" + report.markdown(["Method, λ =", *map(str, LAMBDAS)], rows))
    return Shown({"sweep": report.draw_lines(ours, theirs, columns=4)}, [], "\n".join(texts))


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


# ---- What is routed, how many layers, and routers that are unloaded --------------------------------------------------

SHARES = {share: f"WEMoE (deepest {share:.0%})" for share in (0.25, 0.5, 0.75)}


def deepest_mlps(model: nn.Module, share: float) -> str:
    """A regular expression for the MLPs of the deepest blocks, so many of all: `modules` of wemoe.upscale."""
    names = [name for name, _ in model.named_modules() if name.endswith(".mlp")]
    return f"^({'|'.join(map(re.escape, names[-max(1, round(share * len(names))) :]))})$"


@experiment(
    "layers",
    "only the deeper MLPs routed: accuracy, parameters and time",
    minutes=5,
    methods=["Task Arithmetic", *SHARES.values(), "WEMoE"],
    paper=("appendixd",),
)
def show_layers(measured: Measured) -> Shown:
    """Accuracy, parameters and time of evaluation against how many layers are routed (Appendix D)."""
    found = [
        (e["name"], len(e.get("routing", ())), e["average"], e["total_parameters"] / 1e6, e["evaluation_seconds"])
        for e in measured.first().values()
    ]
    found.sort(key=lambda values: values[1])
    names = ["accuracy (%)", "parameters (millions)", "seconds of evaluation"]
    panels = {name: {"routed layers": {values[1]: values[i] for values in found}} for i, name in enumerate(names, 2)}
    rows = [[name, str(layers), *map(number, values)] for name, layers, *values in found]
    figure = report.draw_lines(panels, ylabel="")
    return Shown({"layers": figure}, [], report.markdown(["Method", "Routed layers", *panels], rows))


UNLOADED = "WEMoE (0-layer, unloaded)"


@experiment(
    "unload",
    "constant routers merged once and for all: the same accuracies from a dense model",
    minutes=2,
    methods=["Task Arithmetic", DEPTHS[0], UNLOADED],
    paper=("appendixb3",),
    details=True,
)
def show_unload(measured: Measured) -> Shown:
    """Appendix B.3: what constant routers have learned, merged for good: the same accuracies from a dense model."""
    names = DEPTHS[0], UNLOADED, "Task Arithmetic"
    if not measured.has(*names):
        return Shown()
    routed, unloaded, dense = (measured.first()[name] for name in names)
    most = max(abs(routed["accuracy"][task] - unloaded["accuracy"][task]) for task in measured.suite.tasks)
    sizes = [entry["total_parameters"] for entry in (unloaded, dense)]
    return Shown(
        {},
        [
            claim(
                "Unloaded, each task's accuracy is the same to half a point", most <= 0.5, f"at most {most:.2f} apart"
            ),
            claim("It has the dense model's parameters", sizes[0] == sizes[1], "{:,} and {:,}".format(*sizes)),
        ],
    )


# ---- What routers do (Figures 11 and 12) -----------------------------------------------------------------------------


@experiment(
    "routing",
    "mean routing weights and first choices, by layer and task",
    minutes=3,
    methods=["WEMoE"],
    paper=("fig11", "fig12"),
)
def show_routing(measured: Measured) -> Shown:
    tasks, figures = measured.suite.tasks, {}
    entry = measured.first()["WEMoE"]
    figures["routing"] = report.draw_routing(tasks, entry["routing"])
    figures["first_choice"] = report.draw_routing(tasks, entry["first_choice"], first=True)
    rows = [
        [name, number(100 * statistics.mean(shares[i] for i, shares in enumerate(matrix)))]
        for name, matrix in entry["first_choice"].items()
    ]
    return Shown(figures, [], report.markdown(["Layer", "own expert first (% of images)"], rows))


# ---- Task vectors by layer (Figure 3), and the loss between them (Figure 7) ------------------------------------------


@experiment(
    "vectors",
    "lengths and angles of task vectors by layer, attention against MLP",
    minutes=1,
    methods=[],
    conditions=lambda *_: [],
    paper=("fig3",),
)
def show_vectors(measured: Measured) -> Shown:
    """Of each layer's attention and MLP, means over tasks: |τ_t|, and the cosine of the angle between θ_t and θ_0."""
    suite, lengths, cosines = measured.suite, {}, {}
    theta_0 = suite.pretrained.state_dict()
    for part in ("attn", "mlp"):
        names: dict[int, list[str]] = {}
        for name in theta_0:
            if found := re.search(rf"\.(\d+)\.{part}\.", name):
                names.setdefault(int(found[1]), []).append(name)
        for layer, entries in names.items():
            start = torch.cat([theta_0[name].flatten() for name in entries]).double()
            taus, angles = [], []
            for expert in suite.experts.values():
                state = expert.state_dict()
                theta = torch.cat([state[name].flatten() for name in entries]).double()
                taus.append((theta - start).norm().item())
                angles.append(F.cosine_similarity(theta, start, dim=0).item())
            lengths.setdefault(part, {})[layer] = statistics.mean(taus)
            cosines.setdefault(part, {})[layer] = statistics.mean(angles)
    panels = {"layer: length of τ": lengths, "layer: cosine of θ_t and θ_0": cosines}
    rows = [
        [f"{part}, {layer}", f"{length:.4f}", f"{cosines[part][layer]:.6f}"]
        for part, by_layer in lengths.items()
        for layer, length in by_layer.items()
    ]
    return Shown({"vectors": report.draw_lines(panels, ylabel="")}, [], report.markdown(["Part", *panels], rows))


LANDSCAPE = "Task Arithmetic of two tasks"


@torch.no_grad()
def landscape(suite: Suite, points: int = 11, count: int = 128) -> tuple[nn.Module, dict]:
    """The mean loss of two tasks' test images over (λ_1, λ_2) in [-1, 1]², on a grid of so many points a side."""
    (one, two), model = suite.experts.items(), copy.deepcopy(suite.pretrained).to(suite.device)
    vectors = [wemoe.task_vector(suite.pretrained, expert) for _, expert in (one, two)]
    grid = [2 * i / (points - 1) - 1 for i in range(points)]
    test = {task: [part[:count] for part in suite.test[task]] for task, _ in (one, two)}
    rows = []
    for first in grid:
        rows.append([])
        for second in grid:
            model.load_state_dict(wemoe.task_arithmetic(suite.pretrained, vectors, [first, second]))
            losses = [
                F.cross_entropy(suite.logits(task)(model(suite.inputs(images))), labels.to(suite.device)).item()
                for task, (images, labels) in test.items()
            ]
            rows[-1].append(round(statistics.mean(losses), 6))
    model.load_state_dict(wemoe.task_arithmetic(suite.pretrained, vectors, 0.3))
    return model, {"grid": grid, "loss": rows}  # loss[i][j] is at (grid[i], grid[j])


def pairs_of_tasks(suite: Suite, methods: list[str]) -> list[Condition]:
    pairs = zip(suite.tasks[::2], suite.tasks[1::2])
    return [Condition(" and ".join(pair), methods, {"experts": pair}, {"Average": list(pair)}) for pair in pairs]


@experiment(
    "landscape",
    "the loss over (λ1, λ2) for pairs of tasks",
    minutes=3,
    methods=[LANDSCAPE],
    conditions=pairs_of_tasks,
    paper=("fig7",),
)
def show_landscapes(measured: Measured) -> Shown:
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


def parameters(arch: str, depth: int | None, num_tasks: int) -> dict[str, int]:
    """Numbers of the architecture alone, without weights, on torch's meta device; depth None: nothing is upscaled.

    As in the paper, what the authors' image encoder has of CLIP counts: all but the Transformer of the text tower.
    """
    config = open_clip.get_model_config(ARCHITECTURES[arch].model)
    with torch.device("meta"):
        clip = open_clip.CLIP(**{key: value for key, value in config.items() if key != "custom_text"})
        clip.transformer = nn.Identity()
        mlps = [module for name, module in clip.visual.named_modules() if name.endswith(".mlp") and depth is not None]
        routers = [wemoe.Router(mlp[0].in_features, num_tasks, depth) for mlp in mlps]
    trainable, routed, single = (count(group) for group in (routers, mlps, [clip]))
    total, tensors = single + num_tasks * routed + trainable, len(list(clip.parameters()))
    return {"trainable": trainable, "all": total, "tensors": tensors}


def count(modules: list[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@experiment(
    "parameters",
    "numbers of parameters, computed from the architectures: no weights, no download",
    minutes=1,
    methods=[],
    conditions=None,
    paper=("table8", "table1", "table9"),
)
def show_parameters(_: object = None) -> Shown:
    """Tables 1, 8 and 9 row by row: ours, computed, beside the paper's, to as many digits as it prints."""
    tables, compared = published.paper_tables(), []
    for row in tables["1"]["rows"]:
        ours, millions = parameters(row["model"], row["depth"], 8), row["total_millions"]
        theirs = str(row["trainable"]) if "trainable" in row else f"{row['trainable_millions']}M"
        name = f"Table 1: {row['model']}, {row['depth']}-layer routers"
        compared.append((f"{name}, trainable", ours["trainable"], theirs))
        compared.append((f"{name}, all", ours["all"], f"{millions}M" if millions < 1000 else f"{millions / 1000:.2f}B"))
    for row in tables["8"]["rows"]:
        ours = parameters("ViT-B-32", 2, row["tasks"])
        compared.append((f"Table 8: {row['tasks']} tasks, trainable", ours["trainable"], f"{row['trainable']}M"))
        compared.append((f"Table 8: {row['tasks']} tasks, all", ours["all"], f"{row['total']}M"))
    single = parameters("ViT-B-32", None, 8)
    compared.append(("Table 8: the pre-trained model", single["all"], f"{tables['8']['single_pretrained']}M"))
    learned = {DEPTHS[depth]: parameters("ViT-B-32", depth, 8)["trainable"] for depth in (1, 2)}
    learned["AdaMerging (layer-wise)"] = 8 * single["tensors"]
    for name, row in ((published.our_name(row), row) for row in tables["9"]["rows"]):
        compared.append((f"Table 9: {name}, trainable", learned[name], row["trainable"]))
    rows = [[name, f"{ours:,}", theirs, "yes" if rounds_to(ours, theirs) else "no"] for name, ours, theirs in compared]
    equal = [row[-1] == "yes" for row in rows]
    text = "Numbers of parameters are those of Tables 1, 8 and 9, to the digits printed"
    claims = [claim(text, all(equal), f"{sum(equal)} of {len(equal)}")]
    return Shown({}, claims, report.markdown(["Parameters", "ours", "the paper's", "equal"], rows))


def rounds_to(value: int, printed: str) -> bool:
    """Whether 7,159,392 is what "7.16M" stands for."""
    digits = printed.rstrip("KMB")
    unit = {"K": 1e3, "M": 1e6, "B": 1e9}.get(printed[-1], 1)
    return f"{value / unit:.{len(digits.partition('.')[2])}f}" == digits


# ---- Harder questions: nobody tells the task; more tasks -------------------------------------------------------------


def task_free(suite: Suite, methods: list[str]) -> list[Condition]:
    """All tasks as they are; the entries of methods tell, too, how often head and class are right together."""
    return [replace(condition, change={"task_free": True}) for condition in one_table(suite, methods)]


@experiment(
    "taskfree",
    "accuracy where nobody tells the task of an image: the head is chosen, too",
    minutes=6,
    conditions=task_free,
    usual=["Task Arithmetic", "TSV-M", "AdaMerging (layer-wise)", "WEMoE", "SMILE", "MASS", "Individual"],
)
def show_task_free(measured: Measured) -> Shown:
    """Accuracy with the head given, and with a head that is chosen by each of the rules of suite.evaluate_task_free."""
    tasks, rules = measured.suite.tasks, {"entropy": "lowest entropy", "routing": "routing weights", "logit": "logit"}
    groups: dict[str, dict[str, list[float]]] = {"head given": {}} | {text: {} for text in rules.values()}
    for name, entries in measured.entries["main"].items():
        groups["head given"][name] = report.averages(entries, tasks)
        for rule, text in rules.items():
            if rule in entries[0]["task_free"]:
                chosen = [{"accuracy": entry["task_free"][rule]} for entry in entries]
                groups[text][name] = report.averages(chosen, tasks)
    rows = [[name, *(report.spread(group.get(name)) for group in groups.values())] for name in groups["head given"]]
    return Shown({"task_free": report.draw_conditions(groups)}, [], report.markdown(["Method", *groups], rows))


def numbers_of_tasks(suite: Suite, methods: list[str]) -> list[Condition]:
    counts = [*(count for count in (4, 8) if count < len(suite.tasks)), len(suite.tasks)]
    parts = {f"{count} tasks": tuple(suite.tasks[:count]) for count in counts}
    return [Condition(name, methods, {"tasks": part}, {"Average": list(part)}) for name, part in parts.items()]


@experiment(
    "tasks",
    "accuracy against the number of tasks, and what limits it",
    minutes=12,
    methods=[
        *("Task Arithmetic", "TSV-M", "AdaMerging (layer-wise)", "WEMoE (rank 16)", "WEMoE"),
        *("WEMoE (TSV-M elsewhere)", "Oracle routing", "Oracle routing (TSV-M elsewhere)", "Individual"),
    ],
    conditions=numbers_of_tasks,
    more_tasks=True,
    steps=80,
)
def show_numbers_of_tasks(measured: Measured) -> Shown:
    """Accuracy against the number of tasks that are merged."""
    lines: dict[str, dict[float, float]] = {}
    cells: dict[str, list[str]] = {}
    for condition in measured.conditions:
        tasks = condition.columns["Average"]
        for name, entries in measured.entries[condition.name].items():
            values = report.averages(entries, tasks)
            lines.setdefault(name, {})[len(tasks)] = statistics.mean(values)
            cells.setdefault(name, []).append(report.spread(values))
    text = report.markdown(["Method", *(c.name for c in measured.conditions)], [[n, *row] for n, row in cells.items()])
    return Shown({"tasks": report.draw_lines({"number of tasks": lines})}, [], text)
