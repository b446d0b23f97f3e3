"""What the experiments measure and show: methods under conditions; figures and claims made of what came out.

An experiment is two functions: one makes its conditions of a suite and the methods chosen, the other makes figures and
claims of the entries that came out, one for each method under each condition and seed. `reproduce.EXPERIMENTS` names
them all. What is known of a method comes with its entry: its group, what it needs, how it was adapted.
"""

import statistics
from dataclasses import dataclass, field
from functools import partial

import torch

from data import report
from data.miniature.corruptions import CORRUPTIONS
from data.miniature.suite import COUNTERPARTS
from data.paper.published import hub_generalization, hub_robustness
from data.paper.suite import OUR_NAMES
from data.suite import CURVE_IMAGES, Suite

# What a method may need besides the experts (Table 7).
TRAINING_IMAGES, VALIDATION, ADAPTATION = "task data", "validation data", "test-time adaptation"
STATIC = "static"  # the group of the methods that merge once and look at no data
DEPTHS = {0: "WEMoE (0-layer)", 1: "WEMoE (1-layer)", 2: "WEMoE"}
RANKS = {rank: f"WEMoE (rank {rank})" for rank in (1, 2, 4, 8, 16, 32)}
FOUR_TASKS = hub_robustness()["tasks"]


@dataclass(frozen=True)
class Condition:
    """`change` is what suite.variant takes; the table has the tasks in the order of `columns`, and their averages."""

    name: str
    methods: list[str]
    change: dict = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)
    published: list[dict] = field(default_factory=list)


class Measured:
    """What was measured: condition -> method -> an entry of results.json for every seed."""

    def __init__(self, suite: Suite, conditions: list[Condition], entries: dict[str, dict[str, list[dict]]]):
        self.suite, self.conditions, self.entries = suite, conditions, entries

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


Shown = tuple[dict, list[dict]]  # figures by the names of their files, and claims


def claim(text: str, holds: bool, detail: str) -> dict:
    return {"claim": text, "holds": bool(holds), "detail": detail}


def comparable(suite: Suite, rows: list[dict], entries: dict[str, list[dict]]) -> list[dict]:
    """The published rows that ours may stand beside: with fewer steps than published, none of methods that adapted."""
    adapted = {name for name, (entry, *_) in entries.items() if "adaptation" in entry}
    return [row for row in rows if not (suite.shortened and row["method"] in adapted)]


def main_conditions(suite: Suite, methods: list[str]) -> list[Condition]:
    return [Condition("main", methods, {}, {"Average": suite.tasks}, list(suite.published.values()))]


def show_main(measured: Measured) -> Shown:
    suite, entries = measured.suite, {name: seeds[0] for name, seeds in measured.entries["main"].items()}
    average = {name: round(measured.average("main", name), 2) for name in entries}
    figures = {
        "tasks": report.draw_tasks(suite.test),
        "accuracy": report.draw_accuracy(suite.tasks, list(entries.values())),
    }
    if curves := {name: entry["adaptation"] for name, entry in entries.items() if "adaptation" in entry}:
        figures["adaptation"] = report.draw_adaptation(curves, average, CURVE_IMAGES, suite.curve)
    if curves := {name: entry["curve"] for name, entry in entries.items() if "curve" in entry}:
        figures["scalings"] = report.draw_scalings(curves)
    if "WEMoE" in entries:
        figures["routing"] = report.draw_routing(suite.tasks, entries["WEMoE"]["routing"])
    if suite.name == "miniature":
        return figures, paper_claims(entries, average)
    rows = measured.conditions[0].published if suite.claimable else []
    return figures, published_claims(suite.tasks, rows, entries, average)


def published_claims(
    tasks: list[str], rows: list[dict], entries: dict[str, dict], average: dict[str, float]
) -> list[dict]:
    """Our averages within 0.5 points of the published ones, or 0.8 where something is learned: like with like only.

    Methods that depend on a choice of training images are left out; and the hub's rows of those that adapt, which were
    adapted in another way (with routing weights averaged over the batch, at a constant learning rate).
    """
    claims = []
    for row in rows:
        name, source = row["method"], row["source"]
        if name not in entries or TRAINING_IMAGES in entries[name]["needs"]:
            continue
        adapted = "adaptation" in entries[name]
        if not (adapted and source == "hub"):
            theirs = statistics.mean(row["accuracy"][task] for task in tasks)
            margin = 0.8 if adapted else 0.5
            text = f"{name} is within {margin} points of the published average ({source})"
            holds = abs(average[name] - theirs) <= margin
            claims.append(claim(text, holds, f"{average[name]:.2f} against {theirs:.2f}"))
    return claims


def paper_claims(entries: dict[str, dict], average: dict[str, float]) -> list[dict]:
    """What the paper claims, on our own numbers; claims about methods that were not run are left out."""
    average = dict(average)
    if "Task Arithmetic" in entries:  # the strongest static merge, at its best λ, which no label-free method could know
        merges = [entry for entry in entries.values() if entry["group"] == STATIC]
        points = [point["average"] for entry in merges for point in entry.get("curve", [entry])]
        average["Best static"] = round(max(points), 2)
    order = ("Pre-trained", "Weight Averaging", "Task Arithmetic", "WEMoE", "Individual")
    claims = [
        claim(text, holds(*values), detail.format(*values))
        for text, needs, holds, detail in (
            ("Every expert's task is within its reach: the individual models average at least 90 %",
             ("Individual",), lambda i: i >= 90, "{0:.1f}"),
            ("Static merging loses at least 8 points against the individual models, even at the best λ",
             ("Best static", "Individual"), lambda s, i: s <= i - 8, "{0:.1f} ≤ {1:.1f} - 8"),
            ("The order is the paper's: pre-trained < averaging and task arithmetic < WEMoE ≤ individual",
             order, lambda p, a, t, w, i: p < min(a, t) and max(a, t) < w <= i,
             "{0:.1f} < {1:.1f}, {2:.1f} < {3:.1f} ≤ {4:.1f}"),
            ("WEMoE is at least 5 points better than every static merge",
             ("WEMoE", "Best static"), lambda w, s: w >= s + 5, "{0:.1f} ≥ {1:.1f} + 5"),
            ("WEMoE is better than AdaMerging",
             ("WEMoE", "AdaMerging (layer-wise)"), lambda w, a: w > a, "{0:.1f} > {1:.1f}"),
            ("WEMoE recovers at least 95 % of the individual models' accuracy",
             ("WEMoE", "Individual"), lambda w, i: w >= 0.95 * i, "{0:.1f} ≥ 0.95 · {1:.1f}"),
            ("Routers that look at the input are not worse than constant ones",
             tuple(DEPTHS.values()), lambda zero, one, two: zero <= min(one, two),
             "0, 1, 2 layers: {0:.1f}, {1:.1f}, {2:.1f}"),
        )
        if all(name in average for name in needs) and (values := [average[name] for name in needs])
    ]  # fmt: skip
    if "WEMoE" in entries:
        entropy, accuracy = (entries["WEMoE"]["adaptation"][what] for what in ("entropy", "accuracy"))
        tenth = max(1, len(entropy) // 10)
        first, last = (statistics.mean(part) for part in (entropy[:tenth], entropy[-tenth:]))
        text = f"As the entropy falls, accuracy rises (on {CURVE_IMAGES} test images of each task)"
        detail = f"entropy {first:.2f} → {last:.2f} nats, accuracy {accuracy[0]:.1f} → {accuracy[-1]:.1f}"
        claims.append(claim(text, last < first and accuracy[-1] > accuracy[0], detail))
    return claims


def in_suite(suite: Suite, tasks: list[str]) -> list[str]:
    """The suite's names of the paper's tasks: in the miniature, those of their counterparts."""
    return [task if task in suite.heads else COUNTERPARTS[task] for task in tasks]


def rows_of(suite: Suite, rows: list[dict], tasks: list[str]) -> list[dict]:
    """Published rows with accuracies by task; none for another suite, or another part of one, than they are of."""
    if suite.name != "ViT-B-32" or not suite.published:
        return []
    named = {OUR_NAMES.get(row["method"], row["method"]): row for row in rows}
    cells = {name: row.get("accuracy") or row["seen"] + row["unseen"] for name, row in named.items()}
    return [{"method": n, "source": "hub", "accuracy": dict(zip(tasks, cell))} for n, cell in cells.items()]


def generalization_conditions(suite: Suite, methods: list[str]) -> list[Condition]:
    conditions = []
    for split in hub_generalization():
        seen, unseen = in_suite(suite, split["seen"]), in_suite(suite, split["unseen"])
        name, columns = f"merged without {' and '.join(unseen)}", {"Seen": seen, "Unseen": unseen}
        rows = rows_of(suite, split["rows"], seen + unseen)
        conditions.append(Condition(name, methods, {"experts": tuple(seen)}, columns, rows))
    return conditions


def show_generalization(measured: Measured) -> Shown:
    groups, claims = {}, []
    for condition in measured.conditions:
        for part, tasks in condition.columns.items():
            groups[f"{condition.name}:\n{part}".replace("without ", "without\n")] = condition.name, tasks
        seen = {m: measured.average(condition.name, m, condition.columns["Seen"]) for m in condition.methods}
        if len(seen) > 1 and (ours := seen.pop("WEMoE", None)) is not None:
            text = f"WEMoE is the best on the tasks that were {condition.name}"
            claims.append(claim(text, ours > max(seen.values()), f"{ours:.1f} > {max(seen.values()):.1f}"))
    return {"generalization": report.draw_conditions(measured.bars(groups))}, claims


def corrupted_conditions(
    suite: Suite, methods: list[str], kinds: tuple[str, ...] = tuple(CORRUPTIONS)
) -> list[Condition]:
    conditions, published = [], hub_robustness()
    for kind in ("clean", *kinds):
        tasks, change = in_suite(suite, FOUR_TASKS), {} if kind == "clean" else {"split": kind}
        rows = rows_of(suite, published["conditions"][kind], tasks)
        conditions.append(Condition(kind.replace("_", " "), methods, change, {"Average": tasks}, rows))
    return conditions


def draw_corrupted(measured: Measured, name: str, groups: dict[str, tuple[str, list[str]]]) -> dict:
    suite, pictures = measured.suite, {}
    for c in measured.conditions:
        test = suite.variant(**c.change).test
        pictures[c.name] = torch.cat([test[task][0][:6] for task in suite.tasks]), None
    return {"tasks": report.draw_tasks(pictures), name: report.draw_conditions(measured.bars(groups))}


def show_robustness(measured: Measured) -> Shown:
    return draw_corrupted(
        measured, "robustness", {c.name: (c.name, measured.suite.tasks) for c in measured.conditions}
    ), []


def show_collapse(measured: Measured) -> Shown:
    """Means over seeds: the worst task under noise, and what the cure gives there and costs on clean images."""
    tasks = measured.suite.tasks
    groups = {f"{c.name}:\n{task}": (c.name, [task]) for c in measured.conditions for task in tasks}
    figures, methods = draw_corrupted(measured, "collapse", groups), ("Task Arithmetic", "WEMoE", "WEMoE + diversity")
    if not measured.has(*methods):
        return figures, []
    clean, noise = (c.name for c in measured.conditions)
    of = measured.average
    worst = min(tasks, key=lambda task: of(noise, "WEMoE", [task]) - of(noise, "Task Arithmetic", [task]))
    arithmetic, plain, cured = (of(noise, method, [worst]) for method in methods)
    gain, cost = (of(c, "WEMoE + diversity") - of(c, "WEMoE") for c in (noise, clean))
    text = f"Under {noise}, WEMoE makes the worst-hit task ({worst}) worse than task arithmetic leaves it"
    better = f"{worst} {cured:.1f} > {arithmetic:.1f}, average {gain:+.1f} against WEMoE without"
    return figures, [
        claim(text, plain < arithmetic, f"{plain:.1f} < {arithmetic:.1f}"),
        claim(
            "With diverse predictions it does not, and the average is better", cured > arithmetic and gain > 0, better
        ),
        claim("That costs at most half a point on clean images", cost >= -0.5, f"{cost:+.1f}"),
    ]


ABLATION = {
    "lr": lambda s: [s.lr * factor for factor in (0.25, 0.5, 1, 2)],
    "steps": lambda s: [max(1, round(s.steps * factor)) for factor in (0.125, 0.25, 0.5, 1)],
    "init_lambda": lambda s: [0.1, 0.2, 0.3, 0.4, 0.5],
    "share": lambda s: [0.02, 0.05, 0.1, 0.25, 1.0],
}


def ablation_conditions(suite: Suite, methods: list[str]) -> list[Condition]:
    conditions = [Condition("as it is", methods, {}, {"Average": suite.tasks})]
    for setting, values in ABLATION.items():
        for value in dict.fromkeys(values(suite.adaptation)):
            if value != getattr(suite.adaptation, setting):
                columns = {"Average": suite.tasks}
                conditions.append(Condition(f"{setting} = {value:g}", ["WEMoE"], {setting: value}, columns))
    return conditions


def show_ablation(measured: Measured) -> Shown:
    of, usual = partial(measured.average, "as it is"), measured.suite.adaptation
    panels = {"router layers": {depth: of(name) for depth, name in DEPTHS.items()}}
    panels["rank"] = {rank: of(name) for rank, name in RANKS.items()}
    for setting in ABLATION:
        panels[setting] = {getattr(usual, setting): of("WEMoE")}
        panels[setting] |= {
            c.change[setting]: measured.average(c.name, "WEMoE") for c in measured.conditions if setting in c.change
        }
    panels = {name: {x: y for x, y in sorted(points.items()) if y is not None} for name, points in panels.items()}
    return {"ablation": report.draw_ablation({name: points for name, points in panels.items() if points})}, []
