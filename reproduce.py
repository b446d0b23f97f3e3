"""Reproduce the WEMoE paper's experiment: eight fine-tuned models, merged into one in several ways, on eight test sets.

    python reproduce.py            the eight tasks in miniature: everything embedded, no download, no GPU needed
    python reproduce.py ViT-B-32   the paper's experiment (also ViT-B-16, ViT-L-14): real CLIP weights and data sets
    python reproduce.py --methods all               every method of the family, not only the six that tell the story
    python reproduce.py --experiment list           the paper's other tables and figures, by name or by number
    python reproduce.py bench      speed and memory, ours beside the literal per-sample loop and the dense model
    torchrun --nproc-per-node=4 reproduce.py ViT-L-14          the same on four GPUs

A suite is data: tasks, zero-shot heads, test images, a pre-trained vision tower and its fine-tuned experts. A method
turns the experts into one model, or into one for each task. An experiment runs methods under several conditions and
says what it shows. In every table, the head of an image is that of its own task; the merged tower does not know the
task. Results go to `results/<suite>/`: results.json, table.md and figures. What is finished is kept in `cache/` there,
and a run started again goes on from it.
"""

import os
import signal
import sys

if __name__ == "__main__":  # loading the libraries takes seconds
    for each_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each_signal, lambda *_: (print("\nreproduce.py: interrupted", file=sys.stderr), os._exit(130)))

import argparse
import copy
import inspect
import io
import json
import platform
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
from torch import Tensor, nn

import wemoe
from data import baselines, report
from data.bench import bench
from data.dependencies import code_of
from data.files import InputError, Parser, alone, check_numbers, check_output, fingerprint, one_line, read_kept, write
from data.miniature.corruptions import CORRUPTIONS
from data.miniature.suite import COUNTERPARTS, miniature_suite
from data.paper.hub import ARCHITECTURES
from data.paper.hub import TASKS as PAPER_TASKS
from data.paper.published import hub_generalization, hub_robustness
from data.paper.suite import OUR_NAMES, paper_suite
from data.processes import barrier, choose_device, each, progress, rank, say, world
from data.suite import CURVE_IMAGES, Suite, adapt, evaluate, fine_tune, mean, mean_routing_weights

SAMPLES = 32  # of each task's training images, for the methods that look at some
SUITES = {"miniature": (miniature_suite, list(COUNTERPARTS.values()))}
SUITES.update({name: (paper_suite, list(PAPER_TASKS)) for name in ARCHITECTURES})

# ---- The methods: experts -> one model for all tasks, or a dict with one for each ------------------------------------

Model = nn.Module | dict[str, nn.Module]
Result = Model | tuple[Model, dict]  # with what else there is to tell, for results.json and the figures


def with_weights(suite: Suite, state: dict[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(suite.pretrained)
    model.load_state_dict({**model.state_dict(), **state})
    return model


def merge(suite: Suite, vectors: Iterable[dict[str, Tensor]], scaling: float = 0.3) -> nn.Module:
    return with_weights(suite, wemoe.task_arithmetic(suite.pretrained, vectors, scaling))


def task_vectors(suite: Suite) -> Iterable[dict[str, Tensor]]:
    return (wemoe.task_vector(suite.pretrained, expert) for expert in suite.experts.values())


def with_curve(suite: Suite, vectors: Callable[[], Iterable[dict[str, Tensor]]], usual: float = 0.3) -> Result:
    """The merge at the usual λ, with the accuracy at other λ where the suite asks for it."""
    curve = []
    with progress(suite.scalings, "Trying λ", unit="λ") as scalings:
        for scaling in scalings:
            accuracy = evaluate(suite, merge(suite, vectors(), scaling))
            curve.append({"scaling": scaling, "accuracy": accuracy, "average": mean(accuracy)})
    return merge(suite, vectors(), usual), {"curve": curve} if curve else {}


def samples(suite: Suite) -> dict[str, Tensor]:
    return {task: suite.images(suite.load(task, "train", SAMPLES)[0]) for task in suite.experts}


def weight_averaging(suite: Suite) -> Result:
    return merge(suite, task_vectors(suite), 1 / len(suite.experts))


def task_arithmetic(suite: Suite) -> Result:
    return with_curve(suite, partial(task_vectors, suite))


def ties(suite: Suite, merge: str = "sum", usual: float = 0.3) -> Result:
    tau = baselines.ties(list(task_vectors(suite)), keep=0.2, merge=merge)
    return with_curve(suite, lambda: [tau], usual)


def ada_merging(suite: Suite, adapt: Callable, layer_wise: bool = True, elect: bool = False) -> Result:
    vectors = list(task_vectors(suite))
    return learn_lambda(suite, adapt, baselines.trim_and_elect(vectors) if elect else vectors, layer_wise)


def learn_lambda(suite: Suite, adapt: Callable, vectors: list[dict[str, Tensor]], layer_wise: bool = True) -> Result:
    settings = suite.adaptation
    model = baselines.AdaMerging(suite.pretrained, vectors, layer_wise, settings.init_lambda).to(suite.device)
    curve = adapt(model, steps=settings.lambda_steps, lr=settings.lambda_lr)
    weights = {entry: p.detach() for entry, p in model.merged().items()}
    return with_weights(suite, weights), {"adaptation": curve, "learned": model.lam.numel()}


def concrete(suite: Suite, adapt: Callable, then_lambda: bool = False) -> Result:
    """Learn a mask; then, if so wanted, λ for the masked task vectors.

    The paper of the method learns the mask for λ after one step of descent; the step is left out here.
    """
    settings = suite.adaptation
    model = baselines.ConcreteMask(suite.pretrained, list(task_vectors(suite))).to(suite.device)
    curve = adapt(model, steps=settings.mask_steps, lr=settings.mask_lr, part="mask" if then_lambda else "")
    with torch.no_grad():
        merged, masks = model.merged(), {entry: mask.cpu() for entry, mask in model.masks().items()}
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not then_lambda:
        return with_weights(suite, merged), {"adaptation": curve, "learned": learned}
    vectors = [{entry: masks[entry] * value for entry, value in tau.items()} for tau in task_vectors(suite)]
    model, record = learn_lambda(suite, adapt, vectors)
    return model, record | {"learned": record["learned"] + learned}


def mixture(
    suite: Suite,
    adapt: Callable,
    depth: int = 2,
    objective: Callable[[Tensor], Tensor] = wemoe.mean_entropy,
    layer: Callable | None = None,
    shared: bool = False,
) -> Result:
    """WEMoE with routers of this depth, adapted to the unlabelled test images."""
    settings = suite.adaptation
    options = {"router_depth": depth, "init_lambda": settings.init_lambda, "layer": layer}
    model = wemoe.upscale(suite.pretrained, suite.experts, **options)
    model = (baselines.share_router(model) if shared else model).to(suite.device)
    curve = adapt(model, steps=settings.steps, lr=settings.lr, objective=objective)
    return model, {"adaptation": curve, "routing": mean_routing_weights(suite, model)}


def twin_merging(suite: Suite) -> Result:
    model = baselines.twin_merging(suite.pretrained, suite.experts, samples(suite)).to(suite.device)
    return model, {"routing": mean_routing_weights(suite, model)}


def fisher_merging(suite: Suite) -> Result:
    heads = {task: suite.logits(task) for task in suite.experts}
    return with_weights(suite, baselines.fisher_merging(suite.experts, samples(suite), heads))


def regmean(suite: Suite, merge: Callable = baselines.regmean) -> Result:
    return with_weights(suite, merge(suite.experts, samples(suite)))


def one_vector(suite: Suite, rule: Callable, scaling: float = 1.0) -> Result:
    """θ_0 plus α times what the rule makes of all task vectors."""
    return merge(suite, [rule(list(task_vectors(suite)))], scaling)


def wudi(suite: Suite) -> Result:
    """With Adam's steps as long as they were in fine-tuning, and so as in the paper, which takes 1e-5 for both."""
    return one_vector(suite, partial(baselines.wudi, lr=suite.training.lr))


def ada_rank(suite: Suite, adapt: Callable) -> Result:
    settings, vectors = suite.adaptation, list(task_vectors(suite))
    model = baselines.AdaRank(suite.pretrained, vectors, init_lambda=settings.init_lambda).to(suite.device)
    curve = adapt(model, steps=settings.mask_steps, lr=settings.lambda_lr)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        return with_weights(suite, model.merged()), {"adaptation": curve, "learned": learned}


def mass(suite: Suite) -> Result:
    """Routed at the MLP of the block before the last but one, as in the authors' program: the 10th of 12, from 0."""
    layer = f"transformer.resblocks.{len(suite.pretrained.transformer.resblocks) - 2}.mlp.c_fc"
    return baselines.Mass(suite.pretrained, suite.experts, layer).to(suite.device)


def masked(suite: Suite, unify: Callable) -> Result:
    """For each task the entries of one vector that its mask leaves, times a number where the method has one."""
    unified, masks, *rescalers = unify(list(task_vectors(suite)))
    models, bits = {}, sum(mask.numel() for mask in masks[0].values())
    for task, mask, rescaler in zip(suite.experts, masks, *rescalers or [[1.0] * len(masks)]):
        models[task] = merge(suite, [{entry: mask[entry] * tau for entry, tau in unified.items()}], rescaler)
    # What has to be kept: the pre-trained model, one vector, and for every task one bit a parameter and one number.
    size = 2 * model_bytes(suite.pretrained) + len(models) * (bits // 8 + 4)
    return models, {"bytes": size, "total_parameters": 2 * bits + len(models)}


def multi_task_learning(suite: Suite) -> Result:
    """One model, fine-tuned on all tasks: as many steps as an expert, with half its batch size of every task."""
    half = replace(suite, training=replace(suite.training, batch_size=max(1, suite.training.batch_size // 2)))
    return fine_tune(half, list(suite.experts), "Traditional MTL")


@dataclass(frozen=True)
class Method:
    """`seconds` is about what it takes in the miniature, on one core of two."""

    group: str
    make: Callable[..., Result]  # from the suite and, where it adapts, `adapt`
    seconds: int
    needs_training_images: bool = False


STATIC, GIVEN = "static", "given training images, or the task of every image"
SINCE, ROUTED = "static, newer than WEMoE", "routed without training"
LEARNED, REFERENCE = "learned without labels", "for reference"


def low_rank(rank: int) -> Method:
    return Method(LEARNED, partial(mixture, layer=partial(baselines.LowRankLinear, rank=rank)), 70)


E_WEMOE = partial(mixture, layer=partial(baselines.SparseLinear, keep=0.1), shared=True)
DIVERSE = partial(mixture, objective=wemoe.negative_information)
METHODS = {
    "Weight Averaging": Method(STATIC, weight_averaging, 3),
    "Task Arithmetic": Method(STATIC, task_arithmetic, 25),
    "TIES-Merging": Method(STATIC, ties, 25),
    "Consensus Merging": Method(SINCE, partial(one_vector, rule=baselines.consensus, scaling=0.3), 4),
    "TSV-M": Method(SINCE, partial(one_vector, rule=baselines.tsv_merge), 6),
    "Iso-C": Method(SINCE, partial(one_vector, rule=baselines.iso_c), 4),
    "Iso-CTS": Method(SINCE, partial(one_vector, rule=baselines.iso_cts), 6),
    "WUDI": Method(SINCE, wudi, 21),
    "Fisher Merging": Method(GIVEN, fisher_merging, 20, needs_training_images=True),
    "RegMean": Method(GIVEN, regmean, 5, needs_training_images=True),
    "Twin-Merging": Method(GIVEN, twin_merging, 30, needs_training_images=True),
    "RegMean++": Method(GIVEN, partial(regmean, merge=baselines.regmean_plus_plus), 8, needs_training_images=True),
    "EMR-Merging": Method(GIVEN, partial(masked, unify=baselines.emr), 5),
    "TALL Masks": Method(GIVEN, partial(masked, unify=baselines.tall_masks), 5),
    "AdaMerging (task-wise)": Method(LEARNED, partial(ada_merging, layer_wise=False), 45),
    "AdaMerging (layer-wise)": Method(LEARNED, ada_merging, 45),
    "AdaMerging++ (task-wise)": Method(LEARNED, partial(ada_merging, layer_wise=False, elect=True), 45),
    "AdaMerging++ (layer-wise)": Method(LEARNED, partial(ada_merging, elect=True), 45),
    "Concrete Task Arithmetic": Method(LEARNED, concrete, 40),
    "Concrete AdaMerging": Method(LEARNED, partial(concrete, then_lambda=True), 85),
    "AdaRank": Method(LEARNED, ada_rank, 110),
    "WEMoE (0-layer)": Method(LEARNED, partial(mixture, depth=0), 50),
    "WEMoE (1-layer)": Method(LEARNED, partial(mixture, depth=1), 110),
    "WEMoE": Method(LEARNED, mixture, 110),
    "WEMoE (rank 16)": low_rank(16),
    "E-WEMoE": Method(LEARNED, E_WEMOE, 140),
    "SMILE": Method(ROUTED, lambda suite: baselines.Smile(suite.pretrained, suite.experts).to(suite.device), 11),
    "MASS": Method(ROUTED, mass, 30),
    "Pre-trained": Method(REFERENCE, lambda suite: suite.pretrained, 3),
    "Simple Ensemble": Method(REFERENCE, lambda suite: baselines.Ensemble(suite.experts.values()), 25),
    "Traditional MTL": Method(REFERENCE, multi_task_learning, 50, needs_training_images=True),
    "Individual": Method(REFERENCE, lambda suite: suite.experts, 4),
}
MAIN = list(METHODS)
STORY = ["Pre-trained", "Weight Averaging", "Task Arithmetic", "AdaMerging (layer-wise)", "WEMoE", "Individual"]
DEPTHS = {0: "WEMoE (0-layer)", 1: "WEMoE (1-layer)", 2: "WEMoE"}
RANKS = {rank: f"WEMoE (rank {rank})" for rank in (1, 2, 4, 8, 16, 32)}
# For other experiments than the main one.
METHODS.update({name: low_rank(rank) for rank, name in RANKS.items() if name not in METHODS})
METHODS["WEMoE + diversity"] = Method(LEARNED, DIVERSE, 110)
METHODS["TIES-Merging (mean)"] = Method(STATIC, partial(ties, merge="mean", usual=1.0), 25)


def run_method(suite: Suite, name: str, key: str, cache: Path, change: dict) -> dict:
    """The method's entry in results.json, read from the cache if it is there; `change` is what suite.variant takes."""
    method = METHODS[name]
    key = fingerprint(key, name, change, code_of(method.make), code_of(evaluate), code_of(adapt))
    folder = cache / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "result.json"
    barrier()
    if file.exists():
        return read_kept(file, lambda path: json.loads(path.read_text()))
    start = time.perf_counter()
    torch.manual_seed(suite.seed)
    suite = suite.variant(**change)

    def adapt_this(model: nn.Module, part: str = "", **options) -> dict:
        about = f"{name}, {part}" if part else name
        return adapt(suite, model, about, folder / f"{part or 'adaptation'}.pt", **options)

    offered = {"suite": suite, "adapt": adapt_this}
    needed = inspect.signature(method.make).parameters
    result = method.make(**{name: value for name, value in offered.items() if name in needed})
    model, record = result if isinstance(result, tuple) else (result, {})
    accuracy = evaluate(suite, model)
    models = list(model.values()) if isinstance(model, dict) else [model]
    parameters = [p for model in models for p in model.parameters()]
    entry = {
        "name": name,
        "group": method.group,
        "accuracy": {task: round(value, 2) for task, value in accuracy.items()},
        "average": round(mean(accuracy), 2),
        "seconds": round(time.perf_counter() - start, 1),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
        "bytes": sum(map(model_bytes, models)),
        **record,
    }
    if rank() == 0:
        write(file, lambda path: path.write_text(json.dumps(entry)))
    barrier()
    return entry


def model_bytes(model: nn.Module) -> int:
    """What its parameters and buffers take, in memory and on disk; a tensor with two names counts once."""
    return sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})


# ---- The experiments: methods under conditions, and what they show ---------------------------------------------------


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


def published(suite: Suite) -> dict[str, dict]:
    """The published rows that ours may stand beside: with fewer steps than published, none of methods that adapt."""
    shortened = [
        name for name in suite.published if name in METHODS and METHODS[name].group == LEARNED and suite.shortened
    ]
    return {name: row for name, row in suite.published.items() if name not in shortened}


def main_conditions(suite: Suite, methods: list[str]) -> list[Condition]:
    return [Condition("main", methods, {}, {"Average": suite.tasks}, list(published(suite).values()))]


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
    if suite.name != "miniature":
        return figures, published_claims(suite, entries, average)
    return figures, paper_claims(entries, average)


def published_claims(suite: Suite, entries: dict[str, dict], average: dict[str, float]) -> list[dict]:
    """Our averages within 0.5 points of the published ones, or 0.8 where something is learned: like with like only.

    Methods that depend on a choice of training images are left out; and the hub's rows of those that adapt, which were
    adapted in another way (with routing weights averaged over the batch, at a constant learning rate).
    """
    claims = []
    for name, row in published(suite).items() if suite.claimable else ():
        like = not METHODS[name].needs_training_images if name in METHODS else False
        if name in entries and like and not (row["source"] == "hub" and "adaptation" in entries[name]):
            theirs = statistics.mean(row["accuracy"][task] for task in suite.tasks)
            margin = 0.8 if "adaptation" in entries[name] else 0.5
            text = f"{name} is within {margin} points of the published average ({row['source']})"
            claims.append(
                claim(text, abs(average[name] - theirs) <= margin, f"{average[name]:.2f} against {theirs:.2f}")
            )
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
    rows = {n: {"method": n, "source": "hub", "accuracy": dict(zip(tasks, cell))} for n, cell in cells.items()}
    return list(published(replace(suite, published=rows)).values())


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


@dataclass(frozen=True)
class Experiment:
    about: str
    conditions: Callable[[Suite, list[str]], list[Condition]]
    show: Callable[[Measured], Shown]
    methods: list[str]  # that it may run
    usual: list[str] | None = None  # that it runs unless told otherwise; None: all of them
    tasks: list[str] | None = None  # of the paper's suites; in the miniature, their counterparts
    splits: tuple[str, ...] = ()  # of the data sets, besides the test split
    seeds: int = 1
    paper: tuple[str, ...] = ()  # its numbers in the paper


FOUR_TASKS = hub_robustness()["tasks"]
SHIFTED = ["Task Arithmetic", "TIES-Merging", "Fisher Merging", "RegMean", "AdaMerging (layer-wise)", "WEMoE"]
EXPERIMENTS = {
    "main": Experiment(
        "methods on every task", main_conditions, show_main, MAIN, STORY, paper=("table2", "table3", "table10")
    ),
    "generalization": Experiment(
        "six tasks merged, eight tested",
        generalization_conditions,
        show_generalization,
        ["Pre-trained", *SHIFTED, "WEMoE (0-layer)"],
        paper=("table4",),
    ),
    "robustness": Experiment(
        "four tasks merged, tested under seven corruptions",
        corrupted_conditions,
        show_robustness,
        [*SHIFTED, "WEMoE (0-layer)", "WEMoE + diversity"],
        tasks=FOUR_TASKS,
        splits=tuple(CORRUPTIONS),
        paper=("table5", "table11"),
    ),
    "ablation": Experiment(
        "settings of WEMoE, one at a time",
        ablation_conditions,
        show_ablation,
        [*DEPTHS.values(), *RANKS.values()],
        paper=("fig4",),
    ),
    "collapse": Experiment(
        "where minimising the entropy goes wrong, and its cure, over five seeds",
        partial(corrupted_conditions, kinds=("impulse_noise",)),
        show_collapse,
        ["Task Arithmetic", "WEMoE", "WEMoE + diversity"],
        tasks=FOUR_TASKS,
        splits=("impulse_noise",),
        seeds=5,
    ),
}


def run(arguments: argparse.Namespace) -> bool:
    """The whole experiment. Returns whether every claim holds."""
    output, experiment = arguments.folder, EXPERIMENTS[arguments.experiment]
    for folder in (arguments.cached, output):
        folder.mkdir(parents=True, exist_ok=True)
    if arguments.on_cores:
        torch.set_num_threads(1)  # always, so that the number of workers does not change results
        seconds = [METHODS[name].seconds for name in arguments.methods]
        once = 60 + max(max(seconds), sum(seconds) / arguments.workers)  # experts first, then the methods side by side
        say(
            f"{len(seconds)} methods on {len(arguments.tasks)} tasks, {arguments.seeds} seed(s): from nothing some "
            f"{once * arguments.seeds / 60:.0f} minutes for each condition on this kind of machine (2 cores)."
        )
    entries: dict[str, dict[str, list[dict]]] = {}
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        suite = SUITES[arguments.suite][0](argparse.Namespace(**{**vars(arguments), "seed": seed}))
        if arguments.experiment != "main":
            suite.scalings = ()  # only there the accuracy at other λ is asked for
        conditions, key = experiment.conditions(suite, arguments.methods), suite.key
        pairs = [(condition, name) for condition in conditions for name in condition.methods]
        pairs.sort(key=lambda pair: -METHODS[pair[1]].seconds)  # the long ones first
        calls = [(name, key, arguments.cached, condition.change) for condition, name in pairs]
        for (condition, name), entry in zip(pairs, each(suite, run_method, calls, arguments.workers)):
            entries.setdefault(condition.name, {}).setdefault(name, []).append(entry)
    entries = {c.name: {name: entries[c.name][name] for name in c.methods} for c in conditions}
    measured = Measured(suite, conditions, entries)
    figures, claims = experiment.show(measured) if rank() == 0 else ({}, [])
    results = {
        "suite": suite.name,
        "experiment": arguments.experiment,
        "seed": arguments.seed,
        "seeds": arguments.seeds,
        "device": str(suite.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
        },
        "settings": {"precision": suite.precision, "adaptation": asdict(suite.adaptation), "limit": arguments.limit},
        "tasks": suite.tasks,
        "claims": claims,
    }
    if arguments.experiment == "main":
        results["methods"] = [seeds[0] for seeds in entries["main"].values()]
        results["published"] = conditions[0].published
    if arguments.experiment != "main" or arguments.seeds > 1:
        results["conditions"] = [dict(asdict(c), methods=entries[c.name]) for c in conditions]
    text = report.tables(conditions, entries, details=arguments.experiment == "main")
    if rank() == 0:
        write(output / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))
        write(output / "table.md", lambda path: path.write_text(text))
        for name, figure in figures.items():
            write(output / f"{name}.png", partial(report.save, figure))
    say("\n" + text)
    if not suite.published and suite.name != "miniature":
        say("Fewer tasks or images than published, or another model: no comparison with published figures.")
    for entry in claims:
        say(f"{'✓' if entry['holds'] else '✗'} {entry['claim']}: {entry['detail']}")
    say(f"\nResults and figures are in {output}/.")
    return all(entry["holds"] for entry in claims)


# ---- The command line ------------------------------------------------------------------------------------------------

PRECISIONS = ("float32", "bfloat16")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="reproduce.py",
        description="Merge fine-tuned models in several ways, measure them, and check the claims of the WEMoE paper.",
        epilog="Exit status: 0 if every claim holds, 1 if one does not, 2 for a usage error or bad input.",
    )
    add = parser.add_argument
    add("suite", nargs="?", default="miniature", choices=SUITES, help="default: %(default)s")
    add(
        "--experiment", default="main", metavar="NAME", help=f"{', '.join(EXPERIMENTS)} (default: %(default)s), or list"
    )
    add("--tasks", nargs="+", metavar="TASK", help="in main and ablation, only these tasks (default: all eight)")
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"all, or some of {', '.join(MAIN)} (default: {', '.join(STORY)})",
    )
    add("--steps", type=int, help="adaptation steps of routers (default: 160 in the miniature, 1000 in the paper)")
    add("--seed", type=int, default=0, help="of fine-tuning and adaptation (default: %(default)s)")
    add("--seeds", type=int, help="how many, from --seed on: mean ± deviation (default: 1; 5 in collapse)")
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    add("--precision", choices=PRECISIONS, help="of evaluation (default: bfloat16 for CLIP on a GPU, else float32)")
    add("--adapt-precision", choices=PRECISIONS, help="of adaptation (default: float32)")
    add("--workers", type=int, help="processes with one thread each (default: 2 in the miniature on a CPU, else 1)")
    add("--output", type=Path, default=Path("results"), help="a folder (default: %(default)s)")
    paper = parser.add_argument_group("for the paper's suites")
    add = paper.add_argument
    add("--hub", type=Path, metavar="DIR", help="read a mirror of the model hub instead of downloading")
    add("--experts", type=Path, metavar="DIR", help="the task-arithmetic authors' checkpoints instead of the hub's")
    add("--finetune", action="store_true", help="make the experts from the train splits instead of downloading them")
    add("--arch", help="with --finetune: another architecture of open_clip's")
    add("--pretrained", default="openai", help="with --finetune: which of its weights (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="only the first N images of every test set, for a quick look")
    add("--cache", type=Path, default=Path.home() / ".cache" / "wemoe", help="decoded images (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    paper = parsed.suite != "miniature"
    numbers = {number: name for name, experiment in EXPERIMENTS.items() for number in experiment.paper}
    parsed.experiment = numbers.get(parsed.experiment.lower(), parsed.experiment)
    (parsed.experiment,) = choose("experiment", [parsed.experiment], list(EXPERIMENTS))
    experiment = EXPERIMENTS[parsed.experiment]
    if parsed.tasks and parsed.experiment not in ("main", "ablation"):
        raise InputError(f"--tasks is for the experiments main and ablation; {parsed.experiment} has its own")
    if experiment.tasks:
        parsed.tasks = [task if paper else COUNTERPARTS[task] for task in experiment.tasks]
    parsed.tasks = choose("task", parsed.tasks, SUITES[parsed.suite][1])
    usual = experiment.usual if experiment.usual and not paper else experiment.methods
    usual = [name for name in experiment.methods if name in usual]
    usual = [name for name in usual if not (paper and METHODS[name].needs_training_images)]
    kind = "method" if parsed.experiment == "main" else f"method of the experiment {parsed.experiment}"
    if [name.lower() for name in parsed.methods or ()] == ["all"]:
        parsed.methods = experiment.methods
    parsed.methods = choose(kind, parsed.methods, experiment.methods) if parsed.methods else usual
    trains = any(METHODS[name].needs_training_images for name in parsed.methods)
    parsed.splits = experiment.splits + (("train",) if trains else ())
    parsed.seeds = parsed.seeds or experiment.seeds
    check_numbers(parsed, {"steps": 1, "seed": 0, "seeds": 1, "limit": 1, "workers": 1})
    for option in () if paper else ("hub", "experts", "finetune", "arch", "limit"):
        if getattr(parsed, option):
            raise InputError(f"--{option} is for the paper's suites: {', '.join(ARCHITECTURES)}")
    if (parsed.arch or parsed.pretrained != "openai") and not parsed.finetune:
        raise InputError("--arch and --pretrained need --finetune: no experts are published for them")
    if parsed.finetune and parsed.experts:
        raise InputError("--finetune makes the experts, --experts reads them: choose one")
    parsed.device = choose_device(parsed.device)
    parsed.on_cores = not paper and parsed.device == "cpu" and world() == 1
    if (parsed.workers or 1) > 1 and not parsed.on_cores:
        raise InputError("--workers is for the miniature on a CPU; on several GPUs use torchrun")
    parsed.workers = parsed.workers or (min(2, os.cpu_count() or 1) if parsed.on_cores else 1)
    check_output(parsed.output)
    parsed.name = parsed.suite if not parsed.arch else f"{parsed.arch}-{parsed.pretrained}"
    variants = {"experts": parsed.experts, "finetune": parsed.finetune, f"first{parsed.limit}": parsed.limit}
    parsed.folder = parsed.output / "-".join([parsed.name, *(name for name, on in variants.items() if on)])
    parsed.cached = parsed.folder / "cache"
    parsed.folder /= "" if parsed.experiment == "main" else parsed.experiment
    return parsed


def choose(kind: str, wanted: list[str] | None, known: list[str]) -> list[str]:
    """The known names that are wanted, in their own order; case does not matter."""
    if wanted is None:
        return known
    exact = {name.lower(): name for name in known}
    if unknown := [name for name in wanted if name.lower() not in exact]:
        raise InputError(f"unknown {kind} {unknown[0]!r}: choose among {', '.join(map(repr, known))}")
    return [name for name in known if name.lower() in {name.lower() for name in wanted}]


def list_experiments() -> None:
    for name, experiment in EXPERIMENTS.items():
        minutes = sum(METHODS[m].seconds for m in experiment.usual or experiment.methods) * experiment.seeds / 120
        numbers = f" (the paper's {', '.join(experiment.paper)})" if experiment.paper else ""
        say(f"{name}{numbers}: {experiment.about}; in the miniature, one condition takes some {minutes:.0f} minutes")


OUT_OF_MEMORY = """out of memory; what is finished is kept. Adaptation takes most: --adapt-precision bfloat16
halves its activations, --methods leaves methods out, --device cpu has more room"""


def interrupt(*_) -> None:
    for each_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each_signal, signal.SIG_IGN)  # once is enough
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {each_signal: signal.signal(each_signal, interrupt) for each_signal in (signal.SIGINT, signal.SIGTERM)}
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # on a terminal that has no ✓
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():  # started by torchrun
        dist.init_process_group()
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        if arguments[:1] == ["bench"]:
            return 0 if bench(arguments[1:]) else 1
        if "list" in arguments and "--experiment" in arguments:
            return list_experiments() or 0
        parsed = parse_arguments(arguments)
        if rank() > 0:  # the first process of a distributed run has the folder for all
            return 0 if run(parsed) else 1
        with alone(parsed.cached.parent):
            return 0 if run(parsed) else 1
    except (InputError, OSError, FloatingPointError) as error:
        return fail(error)
    except torch.linalg.LinAlgError as error:
        return fail(f"a decomposition failed ({one_line(error)}); --methods leaves out what is of low rank")
    except BrokenProcessPool:
        return fail("a worker was killed, perhaps for want of memory; the same command goes on, --workers 1 takes less")
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)  # on a CPU
        if not known:
            raise
        return fail(f"{OUT_OF_MEMORY} ({one_line(error)})")
    except KeyboardInterrupt:
        hint = "" if arguments[:1] == ["bench"] else "; the same command goes on from what is finished"
        print(f"\nreproduce.py: interrupted{hint}", file=sys.stderr)
        return 130
    finally:
        for each_signal, handler in before.items():
            signal.signal(each_signal, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def fail(error: object) -> int:
    print("reproduce.py: error: " + " ".join(str(error).split()), file=sys.stderr)
    if world() > 1:
        os._exit(2)  # the other processes wait for this one: torchrun ends them
    return 2


if __name__ == "__main__":
    sys.exit(main())
