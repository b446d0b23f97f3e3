"""Reproduce the WEMoE paper's experiment: eight fine-tuned models, merged into one in several ways, on eight test sets.

    python reproduce.py            the eight tasks in miniature: everything embedded, no download, no GPU needed

A suite is data: tasks, zero-shot heads, test images, a pre-trained vision tower and its fine-tuned experts. A method
turns the experts into one model, or into one for each task; each is one entry in METHODS. Results go to
`results/<suite>/`: results.json, table.md and figures. What is finished is kept in `cache/` there, and a run started
again goes on from it.
"""

import argparse
import copy
import hashlib
import inspect
import json
import math
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import wemoe
from data import miniature

HERE = Path(__file__).parent
MINIATURE = ("miniature.py", "miniature.safetensors")
TEST_IMAGES = 480  # of each task of the miniature


class InputError(Exception):
    """Something is wrong with what the user gave: one sentence, no traceback, exit status 2."""


# ------------------------------------------------------------------------------------------
# The suite: what is merged, and on what it is measured
# ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How an expert is made: all weights of the vision tower are trained, the zero-shot head is frozen."""

    images: int = 2000  # of each task
    steps: int = 120
    batch_size: int = 64
    lr: float = 2e-4
    weight_decay: float = 0.1
    warmup: int = 10


@dataclass(frozen=True)
class Adaptation:
    """How routers are trained: unlabelled test images, entropy, Adam, cosine annealing to zero."""

    steps: int = 150
    batch_size: int = 16  # of each task
    lr: float = 1e-3


@dataclass
class Suite:
    name: str
    seed: int
    device: torch.device
    adaptation: Adaptation
    pretrained: nn.Module  # vision tower: images (B, 3, H, W), normalised -> features (B, D)
    heads: dict[str, Tensor]  # task -> (D, C): logits = normalised features @ head
    test: dict[str, tuple[Tensor, Tensor]]  # task -> uint8 images (N, 3, H, W), labels (N,)
    normalise: Callable[[Tensor], Tensor]  # uint8 images -> what the vision tower takes
    experts: dict[str, nn.Module] = field(default_factory=dict)
    key: str = ""  # tells everything that the experts depend on

    @property
    def tasks(self) -> list[str]:
        return list(self.heads)

    def logits(self, task: str) -> Callable[[Tensor], Tensor]:
        return lambda features: F.normalize(features, dim=-1) @ self.heads[task]

    def images(self, images: Tensor) -> Tensor:
        return self.normalise(images.to(self.device))


def miniature_suite(tasks: list[str], seed: int, device: torch.device, adaptation: Adaptation, cache: Path) -> Suite:
    """The eight rendered tasks; their experts are fine-tuned here, or read from `cache`."""
    clip = miniature.load_pretrained()
    heads = {task: miniature.zero_shot_head(clip, task).to(device) for task in tasks}
    test = {task: miniature.render(task, "test", TEST_IMAGES, seed=0) for task in tasks}
    tower = clip.visual.to(device).requires_grad_(False)
    suite = Suite("miniature", seed, device, adaptation, tower, heads, test, miniature.normalise)
    training = Training()
    sources = [inspect.getsource(fine_tune), *((HERE / "data" / name).read_bytes() for name in MINIATURE)]
    suite.key = fingerprint(*sources, training, seed, tasks, str(device), torch.__version__)
    files = {task: cache / f"expert-{task}-{fingerprint(suite.key, task)}.safetensors" for task in tasks}
    missing = [task for task in tasks if not files[task].exists()]
    with tqdm(total=len(missing) * training.steps, desc="Fine-tuning", unit="step", disable=not missing) as bar:
        for task in missing:
            images, labels = miniature.render(task, "train", training.images, seed=0)
            expert = fine_tune(suite, task, images, labels, training, bar)
            write(files[task], lambda path, expert=expert: save_file(expert.state_dict(), path))
    for task in tasks:
        suite.experts[task] = copy.deepcopy(tower)
        suite.experts[task].load_state_dict(load_file(files[task], str(device)))
    return suite


def fine_tune(suite: Suite, task: str, images: Tensor, labels: Tensor, training: Training, bar: tqdm) -> nn.Module:
    """An expert: a copy of the pre-trained tower, trained with cross-entropy through the task's frozen head."""
    bar.set_postfix_str(task)
    generator = torch.Generator().manual_seed(derive_seed(suite.seed, "fine-tuning", task))
    expert = copy.deepcopy(suite.pretrained).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(expert.parameters(), lr=training.lr, weight_decay=training.weight_decay)

    def factor(step: int) -> float:  # of the learning rate: a short linear warm-up, then half a cosine
        return min(1, (step + 1) / training.warmup) * (1 + math.cos(math.pi * step / training.steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(training.steps):
        batch = torch.randint(len(images), (training.batch_size,), generator=generator)
        logits = suite.logits(task)(expert(suite.images(images[batch])))
        loss = F.cross_entropy(logits, labels[batch].to(suite.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.update()
    return expert.requires_grad_(False).eval()


SUITES = {"miniature": (miniature_suite, list(miniature.TASKS))}


# ------------------------------------------------------------------------------------------
# The methods: experts -> one model for all tasks, or a dict with one for each
# ------------------------------------------------------------------------------------------


@dataclass
class Merged:
    model: nn.Module | dict[str, nn.Module]
    record: dict = field(default_factory=dict)  # what else the method has to tell, for results.json and the figures


def pretrained(suite: Suite, method: str) -> Merged:
    return Merged(suite.pretrained)


def individual(suite: Suite, method: str) -> Merged:
    return Merged(suite.experts)


def averaged(suite: Suite, method: str) -> Merged:
    return Merged(merge(suite, 1 / len(suite.tasks)))


def task_arithmetic(suite: Suite, method: str) -> Merged:
    curve = []
    for tenth in tqdm(range(11), desc=f"{method}, λ = 0 … 1", unit="λ"):
        accuracy = evaluate(suite, merge(suite, tenth / 10))
        curve.append({"scaling": tenth / 10, "accuracy": accuracy, "average": mean(accuracy)})
    return Merged(merge(suite, 0.3), {"curve": curve})


def merge(suite: Suite, scaling: float) -> nn.Module:
    vectors = (wemoe.task_vector(suite.pretrained, expert) for expert in suite.experts.values())
    model = copy.deepcopy(suite.pretrained)
    model.load_state_dict(wemoe.task_arithmetic(suite.pretrained, vectors, scaling))
    return model


def mixture(depth: int) -> Callable[[Suite, str], Merged]:
    """WEMoE with routers of this depth, adapted to the unlabelled test images."""

    def method(suite: Suite, method: str) -> Merged:
        model = wemoe.upscale(suite.pretrained, suite.experts, router_depth=depth)
        curve = adapt(suite, model, method)
        return Merged(model, {"adaptation": curve, "routing": mean_routing_weights(suite, model)})

    return method


METHODS: dict[str, Callable[[Suite, str], Merged]] = {
    "Pre-trained": pretrained,
    "Individual": individual,
    "Weight Averaging": averaged,
    "Task Arithmetic": task_arithmetic,
    "WEMoE (0-layer)": mixture(depth=0),
    "WEMoE (1-layer)": mixture(depth=1),
    "WEMoE": mixture(depth=2),
}


def adapt(suite: Suite, model: nn.Module, method: str) -> dict[str, list[float]]:
    """Adapt the model in place: entropy (nats) at each step, accuracy (%) on part of the test images now and then."""
    settings = suite.adaptation
    part = {task: (images[:60], labels[:60]) for task, (images, labels) in suite.test.items()}
    every = max(1, settings.steps // 10)
    curve = {"steps": [0], "accuracy": [mean(evaluate(suite, model, part))]}
    with tqdm(total=settings.steps, desc=f"{method}: adapting", unit="step") as bar:

        def on_step(step: int, entropies: dict[str, float]) -> None:
            bar.update()
            if step % every == 0 or step == settings.steps:
                curve["steps"].append(step)
                curve["accuracy"].append(mean(evaluate(suite, model, part)))
                bar.set_postfix(entropy=f"{mean(entropies):.3f}", accuracy=f"{curve['accuracy'][-1]:.1f}")

        loaders = {task: Unlabelled(suite, task) for task in suite.tasks}
        heads = {task: suite.logits(task) for task in suite.tasks}
        entropies = wemoe.adapt(model, loaders, heads, steps=settings.steps, lr=settings.lr, on_step=on_step)
    return {**curve, "entropy": [round(value, 6) for value in entropies]}


class Unlabelled:
    """Batches of a task's test images, without labels, in an order that is new in every epoch."""

    def __init__(self, suite: Suite, task: str):
        self.suite, self.images = suite, suite.test[task][0]
        self.generator = torch.Generator().manual_seed(derive_seed(suite.seed, "adaptation", task))

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.images), generator=self.generator)
        for batch in order.split(self.suite.adaptation.batch_size):
            yield self.suite.images(self.images[batch])


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
    """Accuracy in percent on the test images of every task."""
    accuracy = {}
    for task, (images, labels) in (test or suite.test).items():
        tower = model[task] if isinstance(model, dict) else model
        predicted = [suite.logits(task)(tower(suite.images(batch))).argmax(-1).cpu() for batch in images.split(240)]
        accuracy[task] = 100 * (torch.cat(predicted) == labels).float().mean().item()
    return accuracy


def run_method(suite: Suite, name: str, cache: Path) -> dict:
    """The method's entry in results.json, read from the cache if it is there."""
    key = fingerprint(suite.key, suite.adaptation, name, *((HERE / file).read_bytes() for file in CODE))
    file = cache / f"method-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{key}.json"
    if file.exists():
        return json.loads(file.read_text())
    start = time.perf_counter()
    torch.manual_seed(suite.seed)
    merged = METHODS[name](suite, name)
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
    return result


CODE = ("wemoe.py", "reproduce.py")


def check_claims(methods: dict[str, dict]) -> list[dict]:
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
        "Merging helps: task arithmetic is better than the pre-trained model",
        ("Task Arithmetic", "Pre-trained"), lambda t, p: t > p, "{0:.1f} > {1:.1f}",
    )  # fmt: skip
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
            "claim": "As the entropy falls, accuracy rises",
            "holds": entropy[1] < entropy[0] and accuracy[1] > accuracy[0],
            "detail": "entropy {:.2f} → {:.2f} nats, accuracy {:.1f} → {:.1f}".format(*entropy, *accuracy),
        })  # fmt: skip
    return claims


STATIC = ("Weight Averaging", "Task Arithmetic")


def run(arguments: argparse.Namespace) -> bool:
    """The whole experiment. Returns whether every claim holds."""
    make_suite, _ = SUITES[arguments.suite]
    output = arguments.output / arguments.suite
    cache = output / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    adaptation = Adaptation() if arguments.steps is None else Adaptation(steps=arguments.steps)
    suite = make_suite(arguments.tasks, arguments.seed, torch.device(arguments.device), adaptation, cache)
    methods = {name: run_method(suite, name, cache) for name in arguments.methods}
    results = {
        "suite": suite.name,
        "seed": suite.seed,
        "device": str(suite.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
        },
        "settings": {"training": asdict(Training()), "adaptation": asdict(adaptation)},
        "tasks": suite.tasks,
        "methods": list(methods.values()),
        "claims": check_claims(methods),
    }
    write(output / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))
    write(output / "table.md", lambda path: path.write_text(table(results)))
    print("\n" + table(results))
    draw_figures(suite, results, output)
    for claim in results["claims"]:
        print(f"{'✓' if claim['holds'] else '✗'} {claim['claim']}: {claim['detail']}")
    print(f"\nResults and figures are in {output}/.")
    return all(claim["holds"] for claim in results["claims"])


# ------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------


def table(results: dict) -> str:
    """Accuracy in percent by method and task, as Markdown that is legible on a console too."""
    header = ["Method", *results["tasks"], "Average", "Seconds", "Trainable"]
    rows = [
        [method["name"], *(f"{method['accuracy'][task]:.1f}" for task in results["tasks"]), f"{method['average']:.1f}"]
        + [f"{method['seconds']:.0f}", f"{method['trainable_parameters']:,}"]
        for method in results["methods"]
    ]
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
        figures["adaptation"] = draw_adaptation(plt, curves, methods)
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


def draw_adaptation(plt, curves: dict[str, dict], methods: dict[str, dict]):
    """Entropy and accuracy during adaptation, one line for each method that adapts."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, curve in curves.items():
        left.plot(range(1, len(curve["entropy"]) + 1), curve["entropy"], label=name, linewidth=1)
        right.plot(curve["steps"], curve["accuracy"], "o-", label=name, markersize=3)
    for name, style in (("Individual", "--"), ("Task Arithmetic", ":")):
        if name in methods:
            right.axhline(methods[name]["average"], color="grey", linestyle=style, label=name)
    left.set(xlabel="adaptation step", ylabel="mean entropy (nats)", ylim=(0, None), title="What is minimised")
    right.set(xlabel="adaptation step", ylabel="accuracy (%)", title="What is gained (60 test images of each task)")
    right.legend()
    return figure


def draw_routing(plt, tasks: list[str], routing: dict[str, list[list[float]]]):
    """Heat maps, one for every routed module: to which expert do images of which task go?"""
    figure, axes = plt.subplots(
        1, len(routing), figsize=(3.2 * len(routing) + 1, 4), layout="constrained", sharey=True, squeeze=False
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
# Small things
# ------------------------------------------------------------------------------------------


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def fingerprint(*parts: object) -> str:
    """A short name for everything that a cached file depends on."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def derive_seed(*parts: object) -> int:
    """A seed of its own for every use and task, so that none depends on what ran before it."""
    return int(fingerprint(*parts), 16) % 2**31


def write(file: Path, save: Callable[[Path], object]) -> None:
    """Write a file whole or not at all."""
    aside = file.with_name(file.name + ".part")
    save(aside)
    aside.replace(file)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="reproduce.py",
        description="Merge fine-tuned models in several ways, measure them, and check the claims of the WEMoE paper.",
        epilog="Exit status: 0 if every claim holds, 1 if one does not, 2 for a usage error or bad input.",
    )
    parser.add_argument("suite", nargs="?", default="miniature", choices=SUITES, help="default: %(default)s")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks (default: all eight)")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=f"only these of {', '.join(METHODS)}")
    parser.add_argument("--steps", type=int, help=f"adaptation steps (default: {Adaptation.steps})")
    parser.add_argument("--seed", type=int, default=0, help="of fine-tuning and adaptation (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="a folder (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    parsed.tasks = choose("task", parsed.tasks, SUITES[parsed.suite][1])
    parsed.methods = choose("method", parsed.methods, list(METHODS))
    if parsed.steps is not None and parsed.steps < 1:
        raise InputError(f"--steps {parsed.steps}: at least one adaptation step is needed")
    if not 0 <= parsed.seed < 2**31:
        raise InputError(f"--seed {parsed.seed}: a seed lies between 0 and {2**31 - 1}")
    parsed.device = choose_device(parsed.device)
    return parsed


def choose(kind: str, wanted: list[str] | None, known: list[str]) -> list[str]:
    """The known names that are wanted, in their own order; case does not matter."""
    if wanted is None:
        return known
    exact = {name.lower(): name for name in known}
    if unknown := [name for name in wanted if name.lower() not in exact]:
        raise InputError(f"unknown {kind} {unknown[0]!r}: choose among {', '.join(map(repr, known))}")
    return [name for name in known if name.lower() in {name.lower() for name in wanted}]


def choose_device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); 'cpu' always is") from None
    return name


def main(arguments: list[str] | None = None) -> int:
    try:
        return 0 if run(parse_arguments(arguments)) else 1
    except (InputError, OSError, FloatingPointError) as error:
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nreproduce.py: interrupted; the same command goes on from what is finished", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
