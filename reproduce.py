"""Reproduce the WEMoE paper's experiment: eight fine-tuned models, merged into one in several ways, on eight test sets.

    python reproduce.py            the eight tasks in miniature: everything embedded, no download, no GPU needed
    python reproduce.py ViT-B-32   the paper's experiment (also ViT-B-16, ViT-L-14): real CLIP weights and data sets
    python reproduce.py --experiment robustness     on corrupted images; also generalization, ablation, collapse
    python reproduce.py bench      speed and memory, ours beside the literal per-sample loop and the dense model
    torchrun --nproc-per-node=4 reproduce.py ViT-L-14          the same on four GPUs

A suite is data: tasks, zero-shot heads, test images, a pre-trained vision tower and its fine-tuned experts. A method
turns the experts into one model, or into one for each task; each is one entry in METHODS. An experiment runs methods
under several conditions. Results go to `results/<suite>/`: results.json, table.md and figures. What is finished is kept
in `cache/` there, and a run started again goes on from it.
"""

import os
import signal
import sys

if __name__ == "__main__":  # loading the libraries takes seconds
    for each_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each_signal, lambda *_: (print("\nreproduce.py: interrupted", file=sys.stderr), os._exit(130)))

import argparse
import copy
import io
import itertools
import json
import logging
import platform
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import wemoe
from data import clip, miniature, report
from data.bench import medians, peak_bytes
from data.claims import STATIC, check_collapse, check_generalization, check_miniature, check_published
from data.clip import InputError, write
from data.corruptions import CORRUPTIONS
from data.moments import average_by, fisher_information, gram_matrices, least_squares, weigh_entries
from data.suite import (
    CURVE_IMAGES,
    SUITES,
    Suite,
    alone,
    average_over_processes,
    barrier,
    derive_seed,
    each,
    fine_tune,
    fingerprint,
    precision,
    progress,
    rank,
    say,
    world,
)

HERE = Path(__file__).parent
SAMPLES = 32  # of each task's training images, for the methods that look at some


# ------------------------------------------------------------------------------------------
# The methods: experts -> one model for all tasks, or a dict with one for each
# ------------------------------------------------------------------------------------------


@dataclass
class Merged:
    model: nn.Module | dict[str, nn.Module]
    record: dict = field(default_factory=dict)  # what else the method has to tell, for results.json and the figures


def pretrained(suite: Suite, name: str, folder: Path) -> Merged:
    return Merged(suite.pretrained)


def individual(suite: Suite, name: str, folder: Path) -> Merged:
    return Merged(suite.experts)


def multi_task_learning(suite: Suite, name: str, folder: Path) -> Merged:
    """One model, fine-tuned on all tasks: as many steps as an expert, with half its batch size of every task."""
    half = replace(suite, training=replace(suite.training, batch_size=max(1, suite.training.batch_size // 2)))
    return Merged(fine_tune(half, list(suite.experts), name))


def ensemble(suite: Suite, name: str, folder: Path) -> Merged:
    return Merged(Ensemble(suite.experts.values()))


class Ensemble(nn.Module):
    """The mean of the models' normalised features, that is, the mean of their logits."""

    def __init__(self, models: Iterable[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        return sum(F.normalize(model(x), dim=-1) for model in self.models)


def averaged(suite: Suite, name: str, folder: Path) -> Merged:
    return Merged(merge(suite, task_vectors(suite), 1 / len(suite.experts)))


def task_arithmetic(suite: Suite, name: str, folder: Path) -> Merged:
    return with_curve(suite, name, partial(task_vectors, suite))


def ties(suite: Suite, name: str, folder: Path) -> Merged:
    tau = wemoe.ties(task_vectors(suite), keep=0.2)
    return with_curve(suite, name, lambda: [tau], up_to=3)  # a mean over the tasks: λ may be larger than for a sum


def task_vectors(suite: Suite) -> Iterator[dict[str, Tensor]]:
    return (wemoe.task_vector(suite.pretrained, expert) for expert in suite.experts.values())


def merge(suite: Suite, vectors: Iterable[dict[str, Tensor]], scaling: float | Sequence[float] = 0.3) -> nn.Module:
    return with_weights(suite, wemoe.task_arithmetic(suite.pretrained, vectors, scaling))


def with_weights(suite: Suite, state: dict[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(suite.pretrained)
    model.load_state_dict({**model.state_dict(), **state})
    return model


def with_curve(suite: Suite, name: str, vectors: Callable[[], Iterable[dict[str, Tensor]]], up_to: int = 1) -> Merged:
    """The merge at λ = 0.3, with the accuracy at other λ, up to `up_to`, where the suite asks for it."""
    curve = []
    with progress(suite.scalings, f"{name}: trying λ", unit="λ") as scalings:
        for scaling in (round(up_to * scaling, 6) for scaling in scalings):
            accuracy = evaluate(suite, merge(suite, vectors(), scaling))
            curve.append({"scaling": scaling, "accuracy": accuracy, "average": mean(accuracy)})
    return Merged(merge(suite, vectors()), {"curve": curve} if curve else {})


def ada_merging(suite: Suite, name: str, folder: Path, layer_wise: bool = True, keep: float | None = None) -> Merged:
    vectors = [tau if keep is None else wemoe.trim(tau, keep) for tau in task_vectors(suite)]
    return learn_lambda(suite, name, folder, vectors, layer_wise)


def learn_lambda(
    suite: Suite, name: str, folder: Path, vectors: list[dict[str, Tensor]], layer_wise: bool = True
) -> Merged:
    settings = suite.adaptation
    model = wemoe.AdaMerging(suite.pretrained, vectors, layer_wise=layer_wise, init_lambda=settings.init_lambda)
    curve = adapt(suite, model.to(suite.device), name, folder, settings.lambda_steps, settings.lambda_lr)
    weights = {entry: p.detach() for entry, p in model.merged().items()}
    return Merged(with_weights(suite, weights), {"adaptation": curve, "learned": model.lam.numel()})


def concrete(suite: Suite, name: str, folder: Path, then_lambda: bool = False) -> Merged:
    """Learn a mask; then, if so wanted, λ for the masked task vectors.

    The paper of the method learns the mask for λ after one step of descent; the step is left out here.
    """
    settings = suite.adaptation
    model = ConcreteMask(suite.pretrained, list(task_vectors(suite))).to(suite.device)
    what, file = (f"{name}, mask", "mask.pt") if then_lambda else (name, "adaptation.pt")
    curve = adapt(suite, model, what, folder, settings.mask_steps, settings.mask_lr, file)
    with torch.no_grad():
        merged, masks = model.merged(), {entry: mask.cpu() for entry, mask in model.masks().items()}
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not then_lambda:
        return Merged(with_weights(suite, merged), {"adaptation": curve, "learned": learned})
    vectors = [{entry: masks[entry] * value for entry, value in tau.items()} for tau in task_vectors(suite)]
    result = learn_lambda(suite, name, folder, vectors)
    result.record["learned"] += learned
    return result


class ConcreteMask(wemoe.AdaMerging):
    """θ_0 + m / mean(m) ∘ Σ_t λ τ_t: one mask m over the parameters, the mean taken in each tensor, λ constant.

    m = σ((x + ln u/(1-u)) / 0.5) with trainable logits x, 0 at first, and u uniform, drawn anew at every forward
    pass, is the Concrete relaxation of a binary mask (Tang et al., arXiv 2312.06173); u = 1/2 without gradients.
    """

    def __init__(self, pretrained: nn.Module, task_vectors: Sequence[dict[str, Tensor]]):
        super().__init__(pretrained, task_vectors, layer_wise=False)
        self.lam.requires_grad_(False)
        self.x = nn.ParameterList(nn.Parameter(torch.zeros_like(tau[0])) for tau in self.tau)

    def masks(self) -> dict[str, Tensor]:
        masks = {}
        for name, x in zip(self.names, self.x):
            u = torch.rand_like(x).clamp(1e-6, 1 - 1e-6) if torch.is_grad_enabled() else torch.full_like(x, 0.5)
            mask = torch.sigmoid((x + u.logit()) / 0.5)
            masks[name] = mask / mask.mean()
        return masks

    def merged(self) -> dict[str, Tensor]:
        masks, theta_0 = self.masks(), self.pretrained.state_dict()
        return {name: theta_0[name] + masks[name] * (theta - theta_0[name]) for name, theta in super().merged().items()}


def mixture(suite: Suite, name: str, folder: Path, depth: int = 2, diversity: float = 0.0, **options) -> Merged:
    """WEMoE with routers of this depth, adapted to the unlabelled test images; further options are those of upscale."""
    settings = suite.adaptation
    model = wemoe.upscale(
        suite.pretrained, suite.experts, router_depth=depth, init_lambda=settings.init_lambda, **options
    ).to(suite.device)
    curve = adapt(suite, model, name, folder, settings.steps, settings.lr, diversity=diversity)
    return Merged(model, {"adaptation": curve, "routing": mean_routing_weights(suite, model)})


def twin(suite: Suite, name: str, folder: Path, rank: int = 16) -> Merged:
    """Twin-Merging (Lu et al., arXiv 2406.15479): what all share, by task arithmetic, plus what is each task's own.

    θ(x) = θ_s + Σ_t λ_t(x) τ_t with τ_t = θ_t - θ_s, its matrices of rank r. λ(x) comes from a classifier of tasks that
    sees the shared model's features and was trained on some training images, the task being their label.
    """
    shared = merge(suite, task_vectors(suite))
    router = TaskRouter(shared, len(suite.experts))
    model = wemoe.WEMoE(shared, list(suite.experts.values()), router, rank=rank).to(suite.device)
    router.tower = model.pretrained  # the same weights, once in memory
    with torch.no_grad():
        features = [router.features(suite.images(samples(suite, task)[0])) for task in suite.experts]
    labels = torch.cat([torch.full((len(f),), task, device=suite.device) for task, f in enumerate(features)])
    optimizer = torch.optim.Adam(router.classifier.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(router.classifier(torch.cat(features)), labels).backward()
        optimizer.step()
    return Merged(model, {"routing": mean_routing_weights(suite, model)})


class TaskRouter(nn.Module):
    """λ(x) = softmax(W f(x) + b), f being a tower's normalised features; the classifier alone is trained."""

    def __init__(self, tower: nn.Module, num_tasks: int):
        super().__init__()
        self.tower, self.classifier = tower, nn.LazyLinear(num_tasks)

    def features(self, x: Tensor) -> Tensor:
        features = F.normalize(self.tower(x).float(), dim=-1)
        return features * features.shape[-1] ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).softmax(-1)


def fisher_merging(suite: Suite, name: str, folder: Path) -> Merged:
    fishers = []
    with progress(suite.experts, f"{name}: Fisher information", unit="expert") as tasks:
        for task in tasks:
            expert = suite.experts[task].to(suite.device)
            fishers.append(fisher_information(expert, suite.images(samples(suite, task)[0]), suite.logits(task)))
    return Merged(with_weights(suite, average_by(fishers, states(suite), weigh_entries)))


def regmean(suite: Suite, name: str, folder: Path) -> Merged:
    grams = []
    for task, expert in suite.experts.items():
        grams.append(gram_matrices(expert.to(suite.device), suite.images(samples(suite, task)[0])))
    return Merged(with_weights(suite, average_by(grams, states(suite), least_squares)))


def emr_merging(suite: Suite, name: str, folder: Path) -> Merged:
    unified, masks, rescalers = emr(list(task_vectors(suite)))
    models, bits = {}, sum(mask.numel() for mask in masks[0].values())
    for task, mask, rescaler in zip(suite.experts, masks, rescalers):
        models[task] = merge(suite, [{entry: mask[entry] * tau for entry, tau in unified.items()}], rescaler)
    # What has to be kept: the pre-trained model, one vector, and for every task one bit a parameter and one number.
    size = 2 * model_bytes(suite.pretrained) + len(models) * (bits // 8 + 4)
    return Merged(models, {"bytes": size, "total_parameters": 2 * bits + len(models)})


def samples(suite: Suite, task: str) -> tuple[Tensor, Tensor]:
    return suite.load(task, "train", SAMPLES)


def states(suite: Suite) -> list[dict[str, Tensor]]:
    return [expert.cpu().state_dict() for expert in suite.experts.values()]


@dataclass(frozen=True)
class Method:
    group: str
    make: Callable[[Suite, str, Path], Merged]
    needs_training_images: bool = False


GIVEN = "given training images, or the task of every image"
LEARNED = "learned without labels"
REFERENCE = "for reference"
METHODS = {
    "Weight Averaging": Method(STATIC, averaged),
    "Task Arithmetic": Method(STATIC, task_arithmetic),
    "TIES-Merging": Method(STATIC, ties),
    "Fisher Merging": Method(GIVEN, fisher_merging, needs_training_images=True),
    "RegMean": Method(GIVEN, regmean, needs_training_images=True),
    "Twin-Merging": Method(GIVEN, twin, needs_training_images=True),
    "EMR-Merging": Method(GIVEN, emr_merging),
    "AdaMerging (task-wise)": Method(LEARNED, partial(ada_merging, layer_wise=False)),
    "AdaMerging (layer-wise)": Method(LEARNED, ada_merging),
    "AdaMerging++ (layer-wise)": Method(LEARNED, partial(ada_merging, keep=0.2)),
    "Concrete Task Arithmetic": Method(LEARNED, concrete),
    "Concrete AdaMerging": Method(LEARNED, partial(concrete, then_lambda=True)),
    "WEMoE (0-layer)": Method(LEARNED, partial(mixture, depth=0)),
    "WEMoE (1-layer)": Method(LEARNED, partial(mixture, depth=1)),
    "WEMoE": Method(LEARNED, mixture),
    "WEMoE (rank 16)": Method(LEARNED, partial(mixture, rank=16)),
    "E-WEMoE": Method(LEARNED, partial(mixture, keep=0.1, shared_router=True)),
    "Pre-trained": Method(REFERENCE, pretrained),
    "Simple Ensemble": Method(REFERENCE, ensemble),
    "Traditional MTL": Method(REFERENCE, multi_task_learning, needs_training_images=True),
    "Individual": Method(REFERENCE, individual),
}
MAIN = list(METHODS)
# For other experiments than the main one.
METHODS.update({f"WEMoE (rank {r})": Method(LEARNED, partial(mixture, rank=r)) for r in (1, 2, 4, 8, 32)})
METHODS["WEMoE + diversity"] = Method(LEARNED, partial(mixture, diversity=1.0))


# ------------------------------------------------------------------------------------------
# Adaptation
# ------------------------------------------------------------------------------------------


def adapt(
    suite: Suite,
    model: nn.Module,
    name: str,
    folder: Path,
    steps: int,
    lr: float,
    file: str = "adaptation.pt",
    diversity: float = 0.0,
) -> dict[str, list[float]]:
    """Adapt the model in place: entropy (nats) at each step, accuracy (%) on part of the test images now and then.

    What is trained, its optimiser, the state of the random generator and the curve are kept in `folder` some times on
    the way, and an adaptation goes on from there.
    """
    settings, file = suite.adaptation, folder / file
    part = {task: (images[:CURVE_IMAGES], labels[:CURVE_IMAGES]) for task, (images, labels) in suite.test.items()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(trained.values())
    random = torch.cuda if suite.device.type == "cuda" else torch
    if file.exists():
        kept = clip.read_kept(file, partial(torch.load, map_location=suite.device, weights_only=True))
        curve = kept["curve"]
        optimizer.load_state_dict(kept["optimizer"])
        for entry, p in trained.items():
            p.data.copy_(kept["trained"][entry])
        random.set_rng_state(kept["random"].cpu())
    else:
        curve = {"steps": [0], "accuracy": [mean(evaluate(suite, model, part))], "entropy": []}
    done = curve["steps"][-1]
    with progress(None, f"{name}: adapting", total=steps, initial=done, unit="step") as bar:

        def on_step(step: int, entropies: dict[str, float]) -> None:
            curve["entropy"].append(round(average_over_processes(mean(entropies)), 6))
            bar.update()
            if step % max(1, steps // settings.evaluations) == 0 or step == steps:
                curve["steps"].append(step)
                curve["accuracy"].append(mean(evaluate(suite, model, part)))
                bar.set_postfix(entropy=f"{curve['entropy'][-1]:.3f}", accuracy=f"{curve['accuracy'][-1]:.1f}")
                state = {"curve": curve, "optimizer": optimizer.state_dict(), "trained": trained}
                state["random"] = random.get_rng_state()
                write(file, lambda path: torch.save(state, path))

        if done < steps:
            with precision(suite.device, settings.precision):
                wemoe.adapt(
                    DistributedDataParallel(model) if world() > 1 else model,
                    loaders={task: Unlabelled(suite, task, start=done) for task in suite.experts},
                    heads={task: suite.logits(task) for task in suite.experts},
                    steps=steps,
                    lr=lr,
                    diversity=diversity,
                    optimizer=optimizer,
                    start=done,
                    on_step=on_step,
                )
    return curve


class Unlabelled:
    """A task's test images without labels, in an order that is new in every epoch; `start`: the first batch to give.

    Each process of a distributed run gets its share of every batch.
    """

    def __init__(self, suite: Suite, task: str, start: int = 0):
        images = suite.test[task][0]
        self.suite, self.start = suite, start
        self.images = images[: max(1, round(suite.adaptation.share * len(images)))]
        self.generator = torch.Generator().manual_seed(derive_seed(suite.seed, "adaptation", task))

    def epoch(self) -> list[Tensor]:
        batches = torch.randperm(len(self.images), generator=self.generator).split(self.suite.adaptation.batch_size)
        return batches[:-1] if len(batches) > 1 and len(batches[-1]) < len(batches[0]) else batches

    def __iter__(self) -> Iterator[Tensor]:
        batches = self.epoch()
        while self.start >= len(batches):
            self.start -= len(batches)
            batches = self.epoch()
        batches, self.start = batches[self.start :], 0
        for batch in batches:
            yield self.suite.images(self.images[batch[rank() :: world()]])


@torch.no_grad()
def mean_routing_weights(suite: Suite, model: nn.Module, count: int = 96) -> dict[str, list[list[float]]]:
    """Of every routed module: the mean routing weights of images of each task (row) for each expert (column)."""
    rows = {}
    for task in suite.tasks:
        with wemoe.routing_weights(model) as weights:
            model(suite.images(suite.test[task][0][:count]))
        for name, lam in weights.items():
            rows.setdefault(name, []).append([round(x, 6) for x in lam.mean(0).tolist()])
    return rows


# ------------------------------------------------------------------------------------------
# The mathematics of the methods that are not θ_0 + Σ_t λ_t τ_t
# ------------------------------------------------------------------------------------------


@torch.no_grad()
def emr(task_vectors: Sequence[dict[str, Tensor]]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], list[float]]:
    """EMR-Merging's unified vector τ, masks M_t and rescalers λ_t (Huang et al., arXiv 2405.17461):

        γ = sgn(Σ_t τ_t),  τ = γ max_t |τ_t| over the t with sgn(τ_t) = γ,  M_t = (τ_t τ > 0),  λ_t = Σ|τ_t| / Σ|M_t τ|

    entry by entry, but the sums in λ_t are over all entries. The model of task t is θ_0 + λ_t M_t τ.
    """
    unified, masks = {}, [{} for _ in task_vectors]
    for name, entry in task_vectors[0].items():
        taus = torch.stack([tau[name] for tau in task_vectors]).double()  # (T, ...)
        sign = taus.sum(0).sign()
        agree = taus * sign > 0  # that is, τ_t τ > 0
        unified[name] = (sign * (taus.abs() * agree).amax(0)).to(entry.dtype)
        for mask, of_task in zip(masks, agree):
            mask[name] = of_task
    rescalers = []
    for tau, mask in zip(task_vectors, masks):
        kept = sum((mask[name] * entry).abs().sum(dtype=torch.float64) for name, entry in unified.items())
        rescalers.append(float(sum(v.abs().sum(dtype=torch.float64) for v in tau.values()) / kept) if kept else 0.0)
    return unified, masks, rescalers


# ------------------------------------------------------------------------------------------
# Running a method
# ------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(suite: Suite, model: nn.Module | dict[str, nn.Module], test: dict | None = None) -> dict[str, float]:
    """Accuracy in percent on the test images of every task; the processes of a distributed run share the images."""
    test, accuracy = test or suite.test, {}
    total = sum(len(labels[rank() :: world()]) for _, labels in test.values())
    with progress(None, "Evaluating", total=total, unit="img", leave=False, delay=3) as bar:
        for task, (images, labels) in test.items():
            tower = (model[task] if isinstance(model, dict) else model).to(suite.device)
            right = torch.zeros((), dtype=torch.long, device=suite.device)
            for batch in torch.arange(rank(), len(labels), world()).split(64):
                with precision(suite.device, suite.precision):
                    features = tower(suite.images(images[batch]))
                right += (suite.logits(task)(features).argmax(-1) == labels[batch].to(suite.device)).sum()
                bar.update(len(batch))
            if isinstance(model, dict):
                tower.cpu()  # one expert at a time on the device
            if world() > 1:
                dist.all_reduce(right)
            accuracy[task] = 100 * right.item() / len(labels)
    if not isinstance(model, dict) and model is suite.pretrained:
        model.cpu()
    return accuracy


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def run_method(suite: Suite, name: str, key: str, cache: Path, change: dict) -> dict:
    """The method's entry in results.json, read from the cache if it is there; `change` is what suite.variant takes."""
    key = fingerprint(key, name, change, *((HERE / file).read_bytes() for file in CODE))
    folder = cache / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "result.json"
    barrier()
    if file.exists():
        return clip.read_kept(file, lambda path: json.loads(path.read_text()))
    start = time.perf_counter()
    torch.manual_seed(suite.seed)
    suite = suite.variant(**change)
    merged = METHODS[name].make(suite, name, folder)
    accuracy = evaluate(suite, merged.model)
    seconds = time.perf_counter() - start
    models = list(merged.model.values()) if isinstance(merged.model, dict) else [merged.model]
    parameters = [p for model in models for p in model.parameters()]
    result = {
        "name": name,
        "group": METHODS[name].group,
        "accuracy": {task: round(value, 2) for task, value in accuracy.items()},
        "average": round(mean(accuracy), 2),
        "seconds": round(seconds, 1),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
        "bytes": sum(map(model_bytes, models)),
        **merged.record,
    }
    write(file, lambda path: path.write_text(json.dumps(result)))
    barrier()
    return result


CODE = ("wemoe.py", "reproduce.py", "data/suite.py", "data/corruptions.py")


def model_bytes(model: nn.Module) -> int:
    """What its parameters and buffers take, in memory and on disk; a tensor with two names counts once."""
    return sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})


# ------------------------------------------------------------------------------------------
# The experiments: methods under conditions
# ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """`change` is what suite.variant takes; the table has the tasks in the order of `columns`, and their averages."""

    name: str
    methods: list[str]
    change: dict = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)
    published: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class Experiment:
    about: str
    conditions: Callable[[Suite, list[str]], list[Condition]]  # suite, methods -> conditions
    methods: list[str]
    tasks: list[str] | None = None  # of the paper's suites; in the miniature, their counterparts
    splits: tuple[str, ...] = ()  # of the data sets, besides the test split
    seeds: int = 1
    check: Callable[[dict, dict], list[dict]] = lambda columns, measured: []


PUBLISHED = json.loads((HERE / "data" / "published.json").read_text(encoding="utf-8"))
SHIFTED = ["Task Arithmetic", "TIES-Merging", "Fisher Merging", "RegMean", "AdaMerging (layer-wise)", "WEMoE"]
FOUR_TASKS = PUBLISHED["robustness"]["tasks"]


def in_suite(suite: Suite, tasks: list[str]) -> list[str]:
    """The suite's names of the paper's tasks: in the miniature, those of their counterparts."""
    names = dict(zip(clip.TASKS, miniature.TASKS))
    return [task if task in suite.heads else names[task] for task in tasks]


def rows_of(suite: Suite, rows: list[dict], tasks: list[str]) -> list[dict]:
    """Published rows with accuracies by task; none for another suite, or another part of one, than they are of."""
    if suite.name != "ViT-B-32" or not suite.published:
        return []
    cells = [row.get("accuracy") or row["seen"] + row["unseen"] for row in rows]
    return [dict(row, source="paper", accuracy=dict(zip(tasks, cell))) for row, cell in zip(rows, cells)]


def generalization(suite: Suite, methods: list[str]) -> list[Condition]:
    conditions = []
    for split in PUBLISHED["generalization"]:
        seen, unseen = in_suite(suite, split["seen"]), in_suite(suite, split["unseen"])
        name, columns = f"merged without {' and '.join(unseen)}", {"Seen": seen, "Unseen": unseen}
        rows = rows_of(suite, split["rows"], seen + unseen)
        conditions.append(Condition(name, methods, {"experts": tuple(seen)}, columns, rows))
    return conditions


def robustness(suite: Suite, methods: list[str]) -> list[Condition]:
    return [corrupted(suite, name, methods) for name in ("clean", *CORRUPTIONS)]


def collapse(suite: Suite, methods: list[str]) -> list[Condition]:
    return [corrupted(suite, name, methods) for name in ("clean", "impulse_noise")]


def corrupted(suite: Suite, name: str, methods: list[str]) -> Condition:
    tasks, rows = in_suite(suite, FOUR_TASKS), PUBLISHED["robustness"]["conditions"][name]
    change = {} if name == "clean" else {"split": name}
    return Condition(name.replace("_", " "), methods, change, {"Average": tasks}, rows_of(suite, rows, tasks))


def ablation(suite: Suite, methods: list[str]) -> list[Condition]:
    values = {
        "lr": [suite.adaptation.lr * factor for factor in (0.25, 0.5, 1, 2)],
        "steps": [max(1, round(suite.adaptation.steps * factor)) for factor in (0.125, 0.25, 0.5, 1)],
        "init_lambda": [0.1, 0.2, 0.3, 0.4, 0.5],
        "share": [0.02, 0.05, 0.1, 0.25, 1.0],
    }
    conditions = [Condition("as it is", methods, {}, {"Average": suite.tasks})]
    for setting, alternatives in values.items():
        for value in dict.fromkeys(alternatives):
            if value != getattr(suite.adaptation, setting):
                name = f"{setting} = {value:g}"
                conditions.append(Condition(name, ["WEMoE"], {setting: value}, {"Average": suite.tasks}))
    return conditions


def main_experiment(suite: Suite, methods: list[str]) -> list[Condition]:
    return [Condition("main", methods, {}, {"Average": suite.tasks}, list(suite.published.values()))]


DEPTHS = ["WEMoE (0-layer)", "WEMoE (1-layer)", "WEMoE"]
RANKS = [f"WEMoE (rank {r})" for r in (1, 2, 4, 8, 16, 32)]
EXPERIMENTS = {
    "main": Experiment("every method on every task", main_experiment, MAIN),
    "generalization": Experiment(
        "six tasks merged, eight tested", generalization, ["Pre-trained", *SHIFTED], check=check_generalization
    ),
    "robustness": Experiment(
        "four tasks merged, tested under seven corruptions",
        robustness,
        [*SHIFTED, "WEMoE + diversity"],
        FOUR_TASKS,
        tuple(CORRUPTIONS),
    ),
    "ablation": Experiment("settings of WEMoE, one at a time", ablation, DEPTHS + RANKS),
    "collapse": Experiment(
        "where minimising the entropy goes wrong, and its cure, over five seeds",
        collapse,
        ["Task Arithmetic", "WEMoE", "WEMoE + diversity"],
        FOUR_TASKS,
        ("impulse_noise",),
        seeds=5,
        check=check_collapse,
    ),
}


def run(arguments: argparse.Namespace) -> bool:
    """The whole experiment. Returns whether every claim holds."""
    output, experiment = arguments.folder, EXPERIMENTS[arguments.experiment]
    for folder in (arguments.cached, output):
        folder.mkdir(parents=True, exist_ok=True)
    measured: dict[str, dict[str, list[dict]]] = {}  # condition -> method -> an entry for every seed
    for seed in range(arguments.seed, arguments.seed + experiment.seeds):
        suite = SUITES[arguments.suite][0](argparse.Namespace(**{**vars(arguments), "seed": seed}))
        if arguments.experiment != "main":
            suite.scalings = ()  # only there the accuracy at other λ is asked for
        conditions, key = experiment.conditions(suite, arguments.methods), suite.key
        pairs = [(condition, name) for condition in conditions for name in condition.methods]
        pairs.sort(key=lambda pair: -list(METHODS).index(pair[1]))  # the long ones first
        calls = [(name, key, arguments.cached, condition.change) for condition, name in pairs]
        for (condition, name), entry in zip(pairs, each(suite, run_method, calls, arguments.workers)):
            measured.setdefault(condition.name, {}).setdefault(name, []).append(entry)
    measured = {c.name: {name: measured[c.name][name] for name in c.methods} for c in conditions}
    results = {
        "suite": suite.name,
        "experiment": arguments.experiment,
        "seed": arguments.seed,
        "device": str(suite.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
        },
        "settings": {"precision": suite.precision, "adaptation": asdict(suite.adaptation), "limit": arguments.limit},
        "tasks": suite.tasks,
    }
    if arguments.experiment == "main":
        methods = {name: entries[0] for name, entries in measured["main"].items()}
        results |= {"methods": list(methods.values()), "published": conditions[0].published}
        published = suite.published and check_published(suite.published, suite.tasks, methods)
        results["claims"] = published or (check_miniature(methods) if suite.scalings else [])
        text = report.table(conditions[0].columns, measured["main"], conditions[0].published, details=True)
    else:
        results["conditions"] = [dict(asdict(c), methods=measured[c.name]) for c in conditions]
        results["claims"] = experiment.check({c.name: c.columns for c in conditions}, measured)
        text = report_of(conditions, measured)
    if rank() == 0:
        write(output / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))
        write(output / "table.md", lambda path: path.write_text(text))
        for name, figure in draw(arguments.experiment, suite, conditions, measured).items():
            write(output / f"{name}.png", partial(report.save, figure))
    say("\n" + text)
    if arguments.limit:
        say(f"Only the first {arguments.limit} images of every test set: not comparable with published figures.")
    for claim in results["claims"]:
        say(f"{'✓' if claim['holds'] else '✗'} {claim['claim']}: {claim['detail']}")
    say(f"\nResults and figures are in {output}/.")
    return all(claim["holds"] for claim in results["claims"])


# ------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------


def report_of(conditions: list[Condition], measured: dict[str, dict[str, list[dict]]]) -> str:
    """A table for every condition; conditions that have one method only share a table with what comes before them."""
    tables: list[tuple[Condition, dict[str, list[dict]]]] = []
    for condition in conditions:
        rows = measured[condition.name]
        if len(rows) == 1 and tables:
            tables[-1][1].update({f"{name}, {condition.name}": entries for name, entries in rows.items()})
        else:
            tables.append((condition, dict(rows)))
    return "\n".join(f"## {c.name}\n\n{report.table(c.columns, rows, c.published)}" for c, rows in tables)


def draw(experiment: str, suite: Suite, conditions: list[Condition], measured: dict) -> dict[str, Figure]:
    average = {
        c.name: {name: statistics.mean(report.averages(e, suite.tasks)) for name, e in measured[c.name].items()}
        for c in conditions
    }
    if experiment == "main":
        methods = {name: entries[0] for name, entries in measured["main"].items()}
        shown = {
            "tasks": report.draw_tasks(suite.test),
            "accuracy": report.draw_accuracy(suite.tasks, list(methods.values())),
        }
        if curves := {name: m["adaptation"] for name, m in methods.items() if "adaptation" in m}:
            shown["adaptation"] = report.draw_adaptation(curves, average["main"], CURVE_IMAGES, suite.curve)
        if curves := {name: m["curve"] for name, m in methods.items() if "curve" in m}:
            shown["scalings"] = report.draw_scalings(curves)
        if "WEMoE" in methods:
            shown["routing"] = report.draw_routing(suite.tasks, methods["WEMoE"]["routing"])
        return shown
    if experiment == "generalization":
        labels = {c.name: c.name.replace("without ", "without\n") for c in conditions}
        groups = {
            f"{labels[c.name]}:\n{part}": (c.name, tasks) for c in conditions for part, tasks in c.columns.items()
        }
        return {"generalization": report.draw_conditions(bars(measured, groups))}
    if experiment == "ablation":
        panels = {"router layers": dict(zip((0, 1, 2), map(average["as it is"].get, DEPTHS)))}
        panels["rank"] = {int(re.search(r"\d+", name)[0]): average["as it is"].get(name) for name in RANKS}
        for condition in conditions[1:]:
            (setting, value), *_ = condition.change.items()
            own = {getattr(suite.adaptation, setting): average["as it is"].get("WEMoE")}
            panels[setting] = dict(
                sorted({**panels.get(setting, own), value: average[condition.name]["WEMoE"]}.items())
            )
        panels = {name: {x: y for x, y in points.items() if y is not None} for name, points in panels.items()}
        return {"ablation": report.draw_ablation({name: points for name, points in panels.items() if points})}
    groups = {c.name: (c.name, suite.tasks) for c in conditions}
    if experiment == "collapse":  # task by task
        groups = {f"{c.name}:\n{task}": (c.name, [task]) for c in conditions for task in c.columns["Average"]}
    samples = {c.name: torch.cat([suite.variant(**c.change).test[t][0][:6] for t in suite.tasks]) for c in conditions}
    return {
        "tasks": report.draw_tasks({name: (images, None) for name, images in samples.items()}),
        experiment: report.draw_conditions(bars(measured, groups)),
    }


def bars(measured: dict, groups: dict[str, tuple[str, list[str]]]) -> dict[str, dict[str, list[float]]]:
    """Group -> method -> the average accuracy over the group's tasks under its condition, for every seed."""
    return {
        group: {name: report.averages(entries, tasks) for name, entries in measured[condition].items()}
        for group, (condition, tasks) in groups.items()
    }


# ------------------------------------------------------------------------------------------
# The benchmark: dense model, WEMoE, and WEMoE written as a loop over samples
# ------------------------------------------------------------------------------------------


class PerSampleLoop(nn.Module):
    """What a WEMoE module computes, word by word, and as the authors' library does: one sample after another, each
    through weights merged for it alone, one task vector after another."""

    def __init__(self, module: wemoe.WEMoE):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        theta_0, tau = dict(self.module.pretrained.named_parameters()), self.module.task_vectors
        outputs = []
        for sample, lam in zip(x, self.module.router(x)):
            theta = theta_0
            for t, lam_t in enumerate(lam):
                theta = {name: p + lam_t * tau[name][t] for name, p in theta.items()}
            outputs.append(torch.func.functional_call(self.module.pretrained, theta, (sample[None],)))
        return torch.cat(outputs)


def as_loop(model: nn.Module) -> nn.Module:
    """A copy that shares all weights with the model."""
    loop = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    for name, module in list(loop.named_modules()):
        if isinstance(module, wemoe.WEMoE):
            parent, _, child = name.rpartition(".")
            setattr(loop.get_submodule(parent), child, PerSampleLoop(module))
    return loop


@torch.no_grad()
def random_towers(arch: str, tasks: int, device: str, **options) -> tuple[nn.Module, nn.Module]:
    """A vision tower with random weights, and one upscaled from it and `tasks` others near it."""
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # that the weights are random
    dense = open_clip.create_model(clip.ARCHITECTURES[arch].model).visual.eval().requires_grad_(False)
    logging.disable(logging.NOTSET)
    finetuned = [copy.deepcopy(dense) for _ in range(tasks)]
    for p in itertools.chain.from_iterable(model.parameters() for model in finetuned):
        p.add_(torch.randn_like(p), alpha=1e-3)
    ours = wemoe.upscale(dense, finetuned, **options)
    for name, p in dense.named_parameters():  # what a step is compared with: one weight's gradient in each MLP
        p.requires_grad_(name.endswith("mlp.c_fc.weight"))
    return dense.to(device), ours.to(device)


def random_images(arch: str, batch: int, device: str) -> Tensor:
    return torch.randn(batch, 3, *clip.preprocessing(clip.ARCHITECTURES[arch]).size, device=device)


def forward_of(model: nn.Module, x: Tensor, kind: str) -> Callable[[], Tensor]:
    return torch.no_grad()(precision(x.device, kind)(partial(model, x)))


def step_of(model: nn.Module, x: Tensor, kind: str) -> Callable[[], None]:
    """One task's part of a step of adaptation: forward, entropy, backward."""

    def step() -> None:
        with precision(x.device, kind):
            features = model(x)
        head = torch.linspace(-1, 1, 100 * features.shape[1], device=x.device).view(features.shape[1], 100)
        wemoe.entropy(features.float() @ head).mean().backward()
        model.zero_grad()

    return step


def step_alone(which: int, arch: str, tasks: int, batch: int, device: str, kind: str) -> tuple[Callable, torch.device]:
    """For a process of its own: a step of the dense model (0) or of ours (1), after a small one that warms up."""
    model, x = random_towers(arch, tasks, device)[which], random_images(arch, batch, device)
    step_of(model, x[:1], kind)()
    return step_of(model, x, kind), x.device


def bench(arguments: argparse.Namespace) -> bool:
    """Time and memory of WEMoE beside the dense model and the loop. Returns whether every bound is kept."""
    arch, tasks, device, kind = arguments.arch, arguments.tasks, arguments.device, arguments.precision
    output, gpu = arguments.output / "bench", device != "cpu"
    output.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    machine = torch.cuda.get_device_name(device) if gpu else f"{cpu_name()}, {torch.get_num_threads()} threads"
    say(f"{arch}, {tasks} tasks, {kind}; {machine}")
    times = {"batch": {}, "step": {}, "tasks": {}}  # seconds of forward passes and steps by B, of forward passes by T
    results = {"arch": arch, "num_tasks": tasks, "machine": machine, "precision": kind, "rows": [], **times}

    def row(what: str, value: float, bound: float, most: bool = True) -> None:
        holds = value <= bound if most else value >= bound
        results["rows"].append({"what": what, "measured": round(value, 2), "bound": bound, "holds": holds})
        write(output / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))
        say(f"{'✓' if holds else '✗'} {what}: {value:.2f} ({'at most' if most else 'at least'} {bound})")

    def forwards(x: Tensor, **models: nn.Module) -> dict[str, float]:
        return medians({name: forward_of(model, x, kind) for name, model in models.items()}, x.device)

    dense, ours = random_towers(arch, tasks, device)
    loop, x = as_loop(ours), random_images(arch, 3, device)
    expected, found = (forward_of(model, x, "float32")() for model in (loop, ours))
    if (error := (expected - found).abs().max() / expected.abs().max()) > (1e-2 if kind == "tf32" else 1e-4):
        raise FloatingPointError(f"what is timed differs from the loop by {error:.1e} of the largest output")
    least = arguments.batch[0]
    for batch in arguments.batch:
        x = random_images(arch, batch, device)
        seconds = times["batch"][batch] = forwards(x, dense=dense, ours=ours, loop=loop)
        row(f"forward, B = {batch}: ours / dense", seconds["ours"] / seconds["dense"], 2.0 if gpu else 1.4)
        if gpu or batch == least:
            row(f"forward, B = {batch}: loop / ours", seconds["loop"] / seconds["ours"], 20 if gpu else 3.5, most=False)
            models = {"dense": dense, "ours": ours}
            seconds = times["step"][batch] = medians({k: step_of(m, x, kind) for k, m in models.items()}, x.device)
            row(f"adaptation step, B = {batch}: ours / dense", seconds["ours"] / seconds["dense"], 2.0)
    x = random_images(arch, least, device)
    times["tasks"][tasks] = times["batch"][least]
    for count in (2, 20):
        more = random_towers(arch, count, device)[1]
        seconds = forwards(x, dense=dense, ours=more, loop=as_loop(more), usual=ours)
        growth = seconds["ours"] / seconds.pop("usual")
        times["tasks"][count] = seconds
    row(f"forward, B = {len(x)}: 20 tasks / {tasks} tasks", growth, 1.25)
    del more, loop
    low = random_towers(arch, tasks, device, rank=16)[1]
    seconds = results["rank 16"] = forwards(x, dense=dense, low=low)
    row(f"forward, B = {len(x)}: rank 16 / dense", seconds["low"] / seconds["dense"], 1.25)
    del low, ours, dense
    peaks = [peak_bytes(step_alone, which, arch, tasks, len(x), device, kind) for which in (0, 1)]
    results["peak_bytes"] = dict(zip(("dense", "ours"), peaks))
    row(f"memory of a step, B = {len(x)}, beyond the model: ours / dense", peaks[1] / peaks[0], 1.5)
    figure = report.draw_times(times["batch"], dict(sorted(times["tasks"].items())))
    write(output / "time.png", partial(report.save, figure))
    say(f"Results and a plot are in {output}/.")
    return all(row["holds"] for row in results["rows"])


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.machine()


# ------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def parse_bench_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="reproduce.py bench",
        description="Time and memory of WEMoE beside the dense model and a loop over samples, with random weights.",
        epilog="Exit status: 0 if every bound is kept, 1 if one is not, 2 for a usage error or bad input.",
    )
    add = parser.add_argument
    add("--arch", default="ViT-B-32", choices=clip.ARCHITECTURES, help="default: %(default)s")
    add("--tasks", type=int, default=8, metavar="T", help="default: %(default)s")
    add("--batch", type=int, nargs="+", metavar="B", help="default: 16 64, on a GPU 16 128")
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    add("--precision", choices=(*PRECISIONS, "tf32"), default="float32", help="default: %(default)s")
    add("--output", type=Path, default=Path("results"), help="a folder (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    check_output(parsed.output)
    parsed.device = choose_device(parsed.device)
    parsed.batch = sorted({*(parsed.batch or (16, 64 if parsed.device == "cpu" else 128))})
    if not all(1 <= number < 2**31 for number in (parsed.tasks, *parsed.batch)):
        raise InputError(f"--tasks and --batch take numbers from 1 to {2**31 - 1}")
    return parsed


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="reproduce.py",
        description="Merge fine-tuned models in several ways, measure them, and check the claims of the WEMoE paper.",
        epilog="Exit status: 0 if every claim holds, 1 if one does not, 2 for a usage error or bad input.",
    )
    add = parser.add_argument
    add("suite", nargs="?", default="miniature", choices=SUITES, help="default: %(default)s")
    experiments = "; ".join(f"{name}: {experiment.about}" for name, experiment in EXPERIMENTS.items())
    add("--experiment", default="main", metavar="NAME", help=f"{experiments} (default: %(default)s)")
    add("--tasks", nargs="+", metavar="TASK", help="in main and ablation, only these tasks (default: all eight)")
    add("--methods", nargs="+", metavar="METHOD", help=METHODS_HELP)
    add("--steps", type=int, help="adaptation steps (default: 160 in the miniature, 1000 in the paper)")
    add("--seed", type=int, default=0, help="of fine-tuning and adaptation (default: %(default)s)")
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
    (parsed.experiment,) = choose("experiment", [parsed.experiment], list(EXPERIMENTS))
    experiment, paper = EXPERIMENTS[parsed.experiment], parsed.suite != "miniature"
    if parsed.tasks and parsed.experiment not in ("main", "ablation"):
        raise InputError(f"--tasks is for the experiments main and ablation; {parsed.experiment} has its own")
    if experiment.tasks:
        names = dict(zip(clip.TASKS, miniature.TASKS))
        parsed.tasks = [task if paper else names[task] for task in experiment.tasks]
    parsed.tasks = choose("task", parsed.tasks, SUITES[parsed.suite][1])
    usual = [name for name in experiment.methods if not (paper and METHODS[name].needs_training_images)]
    kind = "method" if parsed.experiment == "main" else f"method of the experiment {parsed.experiment}"
    parsed.methods = choose(kind, parsed.methods, experiment.methods) if parsed.methods else usual
    trains = any(METHODS[name].needs_training_images for name in parsed.methods)
    parsed.splits = experiment.splits + (("train",) if trains else ())
    for option, least in (("steps", 1), ("seed", 0), ("limit", 1), ("workers", 1)):
        value = getattr(parsed, option)
        if value is not None and not least <= value < 2**31:
            raise InputError(f"--{option} {value}: a number from {least} to {2**31 - 1} is needed")
    if parsed.suite == "miniature":
        for option in ("hub", "experts", "finetune", "arch", "limit"):
            if getattr(parsed, option):
                raise InputError(f"--{option} is for the paper's suites: {', '.join(clip.ARCHITECTURES)}")
    if (parsed.arch or parsed.pretrained != "openai") and not parsed.finetune:
        raise InputError("--arch and --pretrained need --finetune: no experts are published for them")
    if parsed.finetune and parsed.experts:
        raise InputError("--finetune makes the experts, --experts reads them: choose one")
    parsed.device = choose_device(parsed.device)
    on_cores = parsed.suite == "miniature" and parsed.device == "cpu" and world() == 1
    if (parsed.workers or 1) > 1 and not on_cores:
        raise InputError("--workers is for the miniature on a CPU; on several GPUs use torchrun")
    if on_cores:
        torch.set_num_threads(1)  # always, so that the number of workers does not change results
    parsed.workers = parsed.workers or (min(2, os.cpu_count() or 1) if on_cores else 1)
    check_output(parsed.output)
    parsed.name = parsed.suite if not parsed.arch else f"{parsed.arch}-{parsed.pretrained}"
    variants = {"experts": parsed.experts, "finetune": parsed.finetune, f"first{parsed.limit}": parsed.limit}
    parsed.folder = parsed.output / "-".join([parsed.name, *(name for name, on in variants.items() if on)])
    parsed.cached = parsed.folder / "cache"
    parsed.folder /= "" if parsed.experiment == "main" else parsed.experiment
    return parsed


METHODS_HELP = f"""only these of {", ".join(METHODS)} (default: all; in the paper's suites all but those that need
images of the train splits: {", ".join(name for name, method in METHODS.items() if method.needs_training_images)})"""


PRECISIONS = ("float32", "bfloat16")


def choose(kind: str, wanted: list[str] | None, known: list[str]) -> list[str]:
    """The known names that are wanted, in their own order; case does not matter."""
    if wanted is None:
        return known
    exact = {name.lower(): name for name in known}
    if unknown := [name for name in wanted if name.lower() not in exact]:
        raise InputError(f"unknown {kind} {unknown[0]!r}: choose among {', '.join(map(repr, known))}")
    return [name for name in known if name.lower() in {name.lower() for name in wanted}]


def check_output(output: Path) -> None:
    if output.is_file():
        raise InputError(f"--output {output}: is a file, a folder is needed")


def choose_device(name: str | None) -> str:
    """The device to run on; in a distributed run, each process has a GPU of its own."""
    if name is None and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}" if world() > 1 else "cuda"
    name = "cpu" if name is None else name
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); 'cpu' always is") from None
    return name


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
            return 0 if bench(parse_bench_arguments(arguments[1:])) else 1
        parsed = parse_arguments(arguments)
        with alone(parsed.cached.parent):
            return 0 if run(parsed) else 1
    except (InputError, OSError, FloatingPointError) as error:
        return fail(error)
    except torch.linalg.LinAlgError as error:
        return fail(f"a decomposition failed ({clip.one_line(error)}); --methods leaves out what is of low rank")
    except BrokenProcessPool:
        return fail("a worker was killed, perhaps for want of memory; the same command goes on, --workers 1 takes less")
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)  # on a CPU
        if not known:
            raise
        return fail(f"{OUT_OF_MEMORY} ({clip.one_line(error)})")
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
    return 2


if __name__ == "__main__":
    sys.exit(main())
