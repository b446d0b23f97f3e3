"""Reproduce the WEMoE paper's experiment: eight fine-tuned models, merged into one in several ways, on eight test sets.

    python reproduce.py            the eight tasks in miniature: everything embedded, no download, no GPU needed
    python reproduce.py ViT-B-32   the paper's experiment (also ViT-B-16, ViT-L-14): real CLIP weights and data sets
    torchrun --nproc-per-node=4 reproduce.py ViT-L-14          the same on four GPUs

A suite is data: tasks, zero-shot heads, test images, a pre-trained vision tower and its fine-tuned experts. A method
turns the experts into one model, or into one for each task; each is one entry in METHODS. Results go to
`results/<suite>/`: results.json, table.md and figures. What is finished is kept in `cache/` there, and a run started
again goes on from it.
"""

import argparse
import copy
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import wemoe
from data import clip
from data.clip import InputError
from data.suite import (
    OUR_NAMES,
    SUITES,
    Suite,
    average_over_processes,
    barrier,
    derive_seed,
    each,
    fingerprint,
    precision,
    progress,
    rank,
    say,
    world,
    write,
)

HERE = Path(__file__).parent
CURVE_IMAGES = 40  # of each task, on which the accuracy is measured during adaptation


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


def averaged(suite: Suite, name: str, folder: Path) -> Merged:
    return Merged(merge(suite, 1 / len(suite.tasks)))


def task_arithmetic(suite: Suite, name: str, folder: Path) -> Merged:
    curve = []
    with progress(suite.scalings, f"{name}: trying λ", unit="λ") as scalings:
        for scaling in scalings:
            accuracy = evaluate(suite, merge(suite, scaling))
            curve.append({"scaling": scaling, "accuracy": accuracy, "average": mean(accuracy)})
    return Merged(merge(suite, 0.3), {"curve": curve})


def merge(suite: Suite, scaling: float) -> nn.Module:
    vectors = (wemoe.task_vector(suite.pretrained, expert) for expert in suite.experts.values())
    model = copy.deepcopy(suite.pretrained)
    model.load_state_dict(wemoe.task_arithmetic(suite.pretrained, vectors, scaling))
    return model


def mixture(depth: int) -> Callable[[Suite, str, Path], Merged]:
    """WEMoE with routers of this depth, adapted to the unlabelled test images."""

    def method(suite: Suite, name: str, folder: Path) -> Merged:
        model = wemoe.upscale(suite.pretrained, suite.experts, router_depth=depth).to(suite.device)
        curve = adapt(suite, model, name, folder)
        return Merged(model, {"adaptation": curve, "routing": mean_routing_weights(suite, model)})

    return method


METHODS: dict[str, Callable[[Suite, str, Path], Merged]] = {
    "Pre-trained": pretrained,
    "Individual": individual,
    "Weight Averaging": averaged,
    "Task Arithmetic": task_arithmetic,
    "WEMoE (0-layer)": mixture(depth=0),
    "WEMoE (1-layer)": mixture(depth=1),
    "WEMoE": mixture(depth=2),
}


def adapt(suite: Suite, model: nn.Module, name: str, folder: Path) -> dict[str, list[float]]:
    """Adapt the model in place: entropy (nats) at each step, accuracy (%) on part of the test images now and then.

    Routers, optimiser and curve are kept in `folder` ten times on the way, and an adaptation goes on from there.
    """
    settings, file = suite.adaptation, folder / "adaptation.pt"
    part = {task: (images[:CURVE_IMAGES], labels[:CURVE_IMAGES]) for task, (images, labels) in suite.test.items()}
    routers = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(routers.values())
    curve = {"steps": [0], "accuracy": [mean(evaluate(suite, model, part))], "entropy": []}
    if file.exists():
        kept = torch.load(file, suite.device, weights_only=True)
        curve = kept["curve"]
        optimizer.load_state_dict(kept["optimizer"])
        for router, p in routers.items():
            p.data.copy_(kept["routers"][router])
    done = curve["steps"][-1]
    with progress(None, f"{name}: adapting", total=settings.steps, initial=done, unit="step") as bar:

        def on_step(step: int, entropies: dict[str, float]) -> None:
            curve["entropy"].append(round(average_over_processes(mean(entropies)), 6))
            bar.update()
            if step % max(1, settings.steps // 10) == 0 or step == settings.steps:
                curve["steps"].append(step)
                curve["accuracy"].append(mean(evaluate(suite, model, part)))
                bar.set_postfix(entropy=f"{curve['entropy'][-1]:.3f}", accuracy=f"{curve['accuracy'][-1]:.1f}")
                state = {"curve": curve, "optimizer": optimizer.state_dict(), "routers": routers}
                write(file, lambda path: torch.save(state, path))

        if done < settings.steps:
            with precision(suite.device, settings.precision):
                wemoe.adapt(
                    DistributedDataParallel(model) if world() > 1 else model,
                    loaders={task: Unlabelled(suite, task, start=done) for task in suite.tasks},
                    heads={task: suite.logits(task) for task in suite.tasks},
                    steps=settings.steps,
                    lr=settings.lr,
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
        self.suite, self.images, self.start = suite, suite.test[task][0], start
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
# The experiment
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


def run_method(suite: Suite, name: str, key: str, cache: Path) -> dict:
    """The method's entry in results.json, read from the cache if it is there."""
    key = fingerprint(key, name, *((HERE / file).read_bytes() for file in CODE))
    folder = cache / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "result.json"
    barrier()
    if file.exists():
        return json.loads(file.read_text())
    start = time.perf_counter()
    torch.manual_seed(suite.seed)
    merged = METHODS[name](suite, name, folder)
    accuracy = evaluate(suite, merged.model)
    seconds = time.perf_counter() - start
    models = merged.model.values() if isinstance(merged.model, dict) else [merged.model]
    parameters = [p for model in models for p in model.parameters()]
    result = {
        "name": name,
        "accuracy": {task: round(value, 2) for task, value in accuracy.items()},
        "average": round(mean(accuracy), 2),
        "seconds": round(seconds, 1),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
        **merged.record,
    }
    write(file, lambda path: path.write_text(json.dumps(result)))
    barrier()
    return result


CODE = ("wemoe.py", "reproduce.py", "data/suite.py")


def check_claims(suite: Suite, methods: dict[str, dict]) -> list[dict]:
    return check_published(suite, methods) if suite.published else check_miniature(methods) if suite.scalings else []


def check_published(suite: Suite, methods: dict[str, dict]) -> list[dict]:
    """Our averages against the published ones: within 0.5 points, or 0.8 where something is learned."""
    claims = []
    for name, row in suite.published.items():
        if name in methods:
            ours, theirs = methods[name]["average"], mean({task: row["accuracy"][task] for task in suite.tasks})
            margin = 0.8 if "adaptation" in methods[name] else 0.5
            text = f"{name} is within {margin} points of the published average ({row['source']})"
            detail = f"{ours:.2f} against {theirs:.2f}"
            claims.append({"claim": text, "holds": abs(ours - theirs) <= margin, "detail": detail})
    return claims


def check_miniature(methods: dict[str, dict]) -> list[dict]:
    """The paper's claims, each on our own numbers; those about methods that were not run are left out."""
    average = {name: method["average"] for name, method in methods.items()}
    if "Task Arithmetic" in methods:  # the strongest static merge: its best λ, which no label-free method could know
        best = max(methods["Task Arithmetic"]["curve"], key=lambda point: point["average"])
        average["Best static"] = max([round(best["average"], 2)] + [average[n] for n in STATIC if n in average])
    claims = []

    def claim(text: str, needs: tuple[str, ...], holds: Callable[..., bool], detail: str = "") -> None:
        if all(name in average for name in needs):
            values = [average[name] for name in needs]
            claims.append({"claim": text, "holds": bool(holds(*values)), "detail": detail.format(*values)})

    claim(
        "Every expert's task is within its reach: the individual models average at least 90 %",
        ("Individual",), lambda i: i >= 90, "{0:.1f}",
    )  # fmt: skip
    claim(
        "Static merging loses at least 8 points against the individual models, even at the best λ",
        ("Best static", "Individual"), lambda s, i: s <= i - 8, "{0:.1f} ≤ {1:.1f} - 8",
    )  # fmt: skip
    claim(
        "The order is the paper's: pre-trained < averaging and task arithmetic < WEMoE ≤ individual",
        ("Pre-trained", "Weight Averaging", "Task Arithmetic", "WEMoE", "Individual"),
        lambda p, a, t, w, i: p < min(a, t) and max(a, t) < w <= i,
        "{0:.1f} < {1:.1f}, {2:.1f} < {3:.1f} ≤ {4:.1f}",
    )
    claim(
        "WEMoE is at least 5 points better than every static merge",
        ("WEMoE", "Best static"), lambda w, s: w >= s + 5, "{0:.1f} ≥ {1:.1f} + 5",
    )  # fmt: skip
    claim(
        "WEMoE recovers at least 95 % of the individual models' accuracy",
        ("WEMoE", "Individual"), lambda w, i: w >= 0.95 * i, "{0:.1f} ≥ 0.95 · {1:.1f}",
    )  # fmt: skip
    claim(
        "Routers that look at the input are not worse than constant ones",
        ("WEMoE (0-layer)", "WEMoE (1-layer)", "WEMoE"), lambda zero, one, two: zero <= min(one, two),
        "0, 1, 2 layers: {0:.1f}, {1:.1f}, {2:.1f}",
    )  # fmt: skip
    if "WEMoE" in methods:
        curve = methods["WEMoE"]["adaptation"]
        tenth = max(1, len(curve["entropy"]) // 10)
        entropy = [sum(part) / tenth for part in (curve["entropy"][:tenth], curve["entropy"][-tenth:])]
        accuracy = [curve["accuracy"][0], curve["accuracy"][-1]]
        claims.append({
            "claim": f"As the entropy falls, accuracy rises (on {CURVE_IMAGES} test images of each task)",
            "holds": entropy[1] < entropy[0] and accuracy[1] > accuracy[0],
            "detail": "entropy {:.2f} → {:.2f} nats, accuracy {:.1f} → {:.1f}".format(*entropy, *accuracy),
        })  # fmt: skip
    return claims


STATIC = ("Weight Averaging", "Task Arithmetic")


def run(arguments: argparse.Namespace) -> bool:
    """The whole experiment. Returns whether every claim holds."""
    output = arguments.folder
    if arguments.output.is_file():
        raise InputError(f"--output {arguments.output}: is a file, a folder is needed")
    (output / "cache").mkdir(parents=True, exist_ok=True)
    suite = SUITES[arguments.suite][0](arguments)
    key = suite.key
    names = arguments.methods[::-1]  # the long ones first
    calls = [(name, key, output / "cache") for name in names]
    done = dict(zip(names, each(suite, run_method, calls, arguments.workers)))
    methods = {name: done[name] for name in arguments.methods}
    results = {
        "suite": suite.name,
        "seed": suite.seed,
        "device": str(suite.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
        },
        "settings": {"precision": suite.precision, "adaptation": asdict(suite.adaptation), "limit": arguments.limit},
        "tasks": suite.tasks,
        "methods": list(methods.values()),
        "published": list(suite.published.values()),
        "claims": check_claims(suite, methods),
    }
    if rank() == 0:
        write(output / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))
        write(output / "table.md", lambda path: path.write_text(table(results)))
        draw_figures(suite, results, output)
    say("\n" + table(results))
    if arguments.limit:
        say(f"Only the first {arguments.limit} images of every test set: not comparable with published figures.")
    for claim in results["claims"]:
        say(f"{'✓' if claim['holds'] else '✗'} {claim['claim']}: {claim['detail']}")
    say(f"\nResults and figures are in {output}/.")
    return all(claim["holds"] for claim in results["claims"])


# ------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------


def table(results: dict) -> str:
    """Accuracy in percent by method and task, as Markdown that is legible on a console too."""
    tasks = results["tasks"]
    header, rows = ["Method", *tasks, "Average", "Seconds", "Parameters", "trained"], []
    published = {OUR_NAMES.get(row["method"], row["method"]): row for row in results["published"]}
    for method in results["methods"]:
        ours = [*(method["accuracy"][task] for task in tasks), method["average"]]
        cells = [f"{method['seconds']:.0f}", *(f"{method[k + '_parameters']:,}" for k in ("total", "trainable"))]
        rows.append([method["name"], *(f"{value:.1f}" for value in ours), *cells])
        if row := published.get(method["name"]):
            theirs = [row["accuracy"][task] for task in tasks]
            theirs.append(sum(theirs) / len(theirs))
            rows.append([f"  published ({row['source']})", *(f"{value:.1f}" for value in theirs), "", "", ""])
            rows.append(["  difference", *(f"{a - b:+.1f}" for a, b in zip(ours, theirs)), "", "", ""])
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in [header, *rows]
    ]
    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths))
    return "".join(line + " |\n" for line in [lines[0], rule, *lines[1:]])


def draw_figures(suite: Suite, results: dict, output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = {method["name"]: method for method in results["methods"]}
    figures = {"tasks": draw_tasks(plt, suite), "accuracy": draw_accuracy(plt, results)}
    if curves := {name: method["adaptation"] for name, method in methods.items() if "adaptation" in method}:
        figures["adaptation"] = draw_adaptation(plt, curves, methods, suite.curve)
    if "WEMoE" in methods:
        figures["routing"] = draw_routing(plt, suite.tasks, methods["WEMoE"]["routing"])
    for name, figure in figures.items():
        write(output / f"{name}.png", lambda path, figure=figure: figure.savefig(path, format="png", dpi=150))
        plt.close(figure)


def draw_tasks(plt, suite: Suite, columns: int = 24):
    """A contact sheet: test images of every task, one row each, the classes taking turns."""
    size = (12, 0.6 * len(suite.tasks))
    figure, axes = plt.subplots(len(suite.tasks), figsize=size, layout="constrained", squeeze=False)
    for task, axis in zip(suite.tasks, axes[:, 0]):
        images = suite.test[task][0][:columns]
        images = images[..., :: max(1, images.shape[-2] // 64), :: max(1, images.shape[-1] // 64)]
        axis.imshow(images.permute(2, 0, 3, 1).flatten(1, 2).numpy())  # side by side
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(task, rotation=0, ha="right", va="center")
    return figure


def draw_accuracy(plt, results: dict):
    """A heat map of the table: methods by tasks."""
    methods, tasks = results["methods"], results["tasks"]
    values = [[*(method["accuracy"][task] for task in tasks), method["average"]] for method in methods]
    figure, axis = plt.subplots(figsize=(1.05 * len(tasks) + 3, 0.45 * len(methods) + 1), layout="constrained")
    axis.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(len(tasks) + 1), [*tasks, "Average"])
    axis.set_yticks(range(len(methods)), [method["name"] for method in methods])
    axis.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            bold = "bold" if x == len(tasks) else "normal"
            axis.text(x, y, f"{value:.1f}", ha="center", va="center", color="k" if value > 60 else "w", weight=bold)
    axis.axvline(len(tasks) - 0.5, color="w", linewidth=3)
    return figure


def draw_adaptation(plt, curves: dict[str, dict], methods: dict[str, dict], authors: dict | None):
    """Entropy and accuracy during adaptation, one line for each method that adapts, and the authors' WEMoE."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, curve in curves.items():
        left.plot(range(1, len(curve["entropy"]) + 1), curve["entropy"], label=name, linewidth=1)
        right.plot(curve["steps"], curve["accuracy"], "o-", label=name, markersize=3)
    for name, style in (("Individual", "--"), ("Task Arithmetic", ":")):
        if name in methods:
            label = f"{name} (all test images)"
            right.axhline(methods[name]["average"], color="grey", linestyle=style, label=label)
    if authors:
        right.plot(
            authors["steps"], authors["average"], "k^--", label="WEMoE, the authors' (all test images)", markersize=4
        )
    left.set(xlabel="adaptation step", ylabel="mean entropy (nats)", ylim=(0, None), title="What is minimised")
    title = f"What is gained ({CURVE_IMAGES} test images of each task)"
    right.set(xlabel="adaptation step", ylabel="accuracy (%)", title=title)
    right.legend()
    return figure


def draw_routing(plt, tasks: list[str], routing: dict[str, list[list[float]]]):
    """Heat maps, one for every routed module: to which expert do images of which task go?"""
    figure, axes = plt.subplots(
        1, len(routing), figsize=(3.2 * len(routing) + 1, 5), layout="constrained", sharey=True, squeeze=False
    )
    limit = max(abs(value) for rows in routing.values() for row in rows for value in row)
    for axis, (name, rows) in zip(axes[0], routing.items()):
        image = axis.imshow(rows, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set_title(name.removeprefix("transformer."), fontsize=9)
        axis.set_xticks(range(len(tasks)), tasks, rotation=90)
        axis.set_xlabel("task vector")
    axes[0, 0].set_yticks(range(len(tasks)), tasks)
    axes[0, 0].set_ylabel("images of task")
    figure.colorbar(image, ax=axes, label="mean routing weight λ", shrink=0.8)
    return figure


# ------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="reproduce.py",
        description="Merge fine-tuned models in several ways, measure them, and check the claims of the WEMoE paper.",
        epilog="Exit status: 0 if every claim holds, 1 if one does not, 2 for a usage error or bad input.",
    )
    add = parser.add_argument
    add("suite", nargs="?", default="miniature", choices=SUITES, help="default: %(default)s")
    add("--tasks", nargs="+", metavar="TASK", help="only these tasks (default: all eight)")
    add("--methods", nargs="+", metavar="METHOD", help=f"only these of {', '.join(METHODS)}")
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
    parsed.tasks = choose("task", parsed.tasks, SUITES[parsed.suite][1])
    parsed.methods = choose("method", parsed.methods, list(METHODS))
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
    parsed.name = parsed.suite if not parsed.arch else f"{parsed.arch}-{parsed.pretrained}"
    variants = {"experts": parsed.experts, "finetune": parsed.finetune, f"first{parsed.limit}": parsed.limit}
    parsed.folder = parsed.output / "-".join([parsed.name, *(name for name, on in variants.items() if on)])
    return parsed


PRECISIONS = ("float32", "bfloat16")


def choose(kind: str, wanted: list[str] | None, known: list[str]) -> list[str]:
    """The known names that are wanted, in their own order; case does not matter."""
    if wanted is None:
        return known
    exact = {name.lower(): name for name in known}
    if unknown := [name for name in wanted if name.lower() not in exact]:
        raise InputError(f"unknown {kind} {unknown[0]!r}: choose among {', '.join(map(repr, known))}")
    return [name for name in known if name.lower() in {name.lower() for name in wanted}]


def choose_device(name: str | None) -> str:
    """The device to run on; in a distributed run, each process has a GPU of its own."""
    if name is None and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}" if world() > 1 else "cuda"
    try:
        torch.empty(0, device=name or "cpu")
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); 'cpu' always is") from None
    return name or "cpu"


def main(arguments: list[str] | None = None) -> int:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():  # started by torchrun
        dist.init_process_group()
    try:
        return 0 if run(parse_arguments(arguments)) else 1
    except (InputError, OSError, FloatingPointError) as error:
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nreproduce.py: interrupted; the same command goes on from what is finished", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
