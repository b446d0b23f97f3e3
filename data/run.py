"""What is done with a suite: fine-tune, evaluate, adapt; one result kept for each method."""

import copy
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from joblib import Parallel, delayed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather  # with gradients
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import wemoe
from data.suite import Batch, Suite, accuracy_of, run

HERE = Path(__file__).parents[1]
CURVE_IMAGES = 40  # test inputs of each task on which accuracy during adaptation is measured
STATIC = "static"  # the group of the methods that try the suite's scalings


def say(text: str) -> None:
    if PartialState().is_main_process:
        tqdm.write(text)


def progress(items: Iterable | None, description: str, **options) -> tqdm:
    """A bar, of the first process only: ranks and workers have none."""
    worker = multiprocessing.current_process().name != "MainProcess"
    return tqdm(items, description, disable=worker or not PartialState().is_main_process, **options)


def each(function: Callable, calls: list[tuple], workers: int, what: str) -> None:
    """function(*call) for every call, by so many processes of one thread each. They leave Ctrl-C to this one."""
    own = {"inner_max_num_threads": 1, "initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    parallel = Parallel(workers, "loky", return_as="generator_unordered", batch_size=1, **own)
    for _ in progress(parallel(delayed(function)(*call) for call in calls), what, total=len(calls), unit=""):
        pass


def in_batches(suite: Suite, function: Callable[[Batch], Tensor], rows: Tensor) -> Tensor:
    """function(suite.inputs(rows)), a batch after the other; ranks share them."""
    with PartialState().split_between_processes(rows) as own:
        found = [function(suite.inputs(batch)).float().cpu() for batch in own.split(128) if len(batch)]
    return torch.cat(gather_object(found))


def fingerprint(*parts: object) -> str:
    """A short name for all of these, by their repr."""
    return hashlib.sha256(b"".join(repr(part).encode() + b"\0" for part in parts)).hexdigest()[:16]


def derive_seed(*parts: object) -> int:
    """A seed of its own for every use and task, so that none depends on what ran before it."""
    return int(fingerprint(*parts), 16) % 2**31


@cache
def sources() -> str:
    """One hash of the project's programs and data, but for its tests: after any edit, everything runs anew."""
    files = [*HERE.glob("*.py"), *(p for kind in ("py", "json", "safetensors") for p in HERE.glob(f"data/**/*.{kind}"))]
    return fingerprint(*(path.read_bytes() for path in sorted(files) if not path.name.startswith("test_")))


def write(file: Path, save: Callable[[Path], object]) -> None:
    """Write a file whole or not at all, and the folder that it is in. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save(aside := file.with_suffix(f".{os.getpid()}.part"))
    aside.replace(file)


def kept(suite: Suite, method, change: dict, cache: Path) -> Path:
    """The file of what `measure` finds, named by sources and plain arguments, and not by what models and data hold."""
    settings = suite.seed, suite.device.type, suite.precision, suite.training, suite.adaptation, suite.settings
    merged = suite.name, suite.origin, suite.tasks, list(suite.experts)
    tried = suite.scalings if method.group == STATIC else ()
    key = fingerprint(sources(), torch.__version__, settings, merged, method.name, change, tried)
    return cache / f"{re.sub(r'[^a-z0-9]+', '-', method.name.lower())}-{key}.json"


def measure(suite: Suite, method, change: dict, file: Path) -> None:
    """Make and evaluate the model of a method (a Method of data/methods.py), and write its entry in results.json.

    `change` is what suite.variant takes.
    """
    start = time.perf_counter()
    torch.manual_seed(suite.seed)
    suite = suite.variant(**change)
    result = method.make(suite)
    model, record = result if isinstance(result, tuple) else (result, {})
    before = time.perf_counter()
    accuracy = evaluate(suite, model)
    after = time.perf_counter()
    models = model.values() if isinstance(model, Mapping) else [model]
    trainable, total, size = map(sum, zip(*map(sizes_of, models)))
    entry = {
        **{"name": method.name, "group": method.group, "needs": list(method.needs), "arxiv": method.arxiv},
        "accuracy": {task: round(value, 2) for task, value in accuracy.items()},
        "average": round(fmean(accuracy.values()), 2),
        "seconds": round(after - start, 1),
        "evaluation_seconds": round(after - before, 4),
        **{"trainable_parameters": trainable, "total_parameters": total, "bytes": size},
        **record,
    }
    if PartialState().is_main_process:
        write(file, lambda path: path.write_text(json.dumps(entry), encoding="utf-8"))
    PartialState().wait_for_everyone()


def sizes_of(model: nn.Module) -> tuple[int, int, int]:
    """Trainable parameters, all parameters, and bytes in memory and on disk, buffers too; shared tensors count once."""
    parameters, tensors = list(model.parameters()), {*model.parameters(), *model.buffers()}
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return trainable, sum(p.numel() for p in parameters), sum(t.nbytes for t in tensors)


# ---- Fine-tune, evaluate, adapt --------------------------------------------------------------------------------------


def make_experts(suite: Suite, folder: Path, workers: int) -> dict[str, nn.Module]:
    """The tower fine-tuned on every task (shared among processes), or what an earlier run has fine-tuned and kept."""
    key = fingerprint(sources(), suite.name, suite.origin, suite.seed, suite.device.type, suite.training)
    files = {task: folder / f"expert-{task}-{key}.safetensors" for task in suite.tasks}

    def make(task: str) -> None:
        expert = fine_tune(suite, [task], task)
        write(files[task], lambda path: save_file(expert.cpu().state_dict(), path))

    with PartialState().split_between_processes(suite.tasks) as own:
        each(make, [(task,) for task in own if not files[task].exists()], workers, "Experts")
    PartialState().wait_for_everyone()
    experts = {task: copy.deepcopy(suite.pretrained) for task in files}
    for task, file in files.items():
        experts[task].load_state_dict(load_file(file))
    return experts


def fine_tune(suite: Suite, tasks: list[str], name: str) -> nn.Module:
    """A copy of the pre-trained tower, trained with cross-entropy through the frozen heads: an expert, for one task."""
    images = {task: suite.load(task, "train", None) for task in tasks}
    generators = {t: torch.Generator().manual_seed(derive_seed(suite.seed, "fine-tuning", t)) for t in tasks}
    training = suite.training
    expert = copy.deepcopy(suite.pretrained).to(suite.device).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(expert.parameters(), lr=training.lr, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / training.warmup) * (1 + math.cos(math.pi * k / training.steps)) / 2
    )
    for _ in progress(range(training.steps), f"{name}: fine-tuning", unit="step"):
        optimizer.zero_grad()
        for task, (pixels, labels) in images.items():
            batch = torch.randint(len(pixels), (training.batch_size,), generator=generators[task])
            logits = suite.logits(task)(run(expert, suite.inputs(pixels[batch])))
            F.cross_entropy(logits, labels[batch].to(suite.device)).backward()
        optimizer.step()
        schedule.step()
    return expert.requires_grad_(False).eval()


@torch.no_grad()
def evaluate(suite: Suite, model: nn.Module | Mapping[str, nn.Module]) -> dict[str, float]:
    """Accuracy in percent (or the task's own metric) on the test inputs of every task, with the head of their task."""
    accuracy = {}
    for task, (rows, labels) in progress(suite.test.items(), "Evaluating", unit="task", leave=False, delay=3):
        tower = (model[task] if isinstance(model, Mapping) else model).to(suite.device)
        predicted = in_batches(suite, partial(suite.predict, task, tower), rows)
        if isinstance(model, Mapping) or model is suite.pretrained:
            tower.cpu()  # one expert at a time on the device
        accuracy[task] = suite.metrics.get(task, accuracy_of)(predicted, labels)
    return accuracy


@torch.no_grad()
def routing(suite: Suite, model: nn.Module, count: int = 96) -> dict[str, dict[str, list[list[float]]]]:
    """Of every routed module, by images of each task (row) and expert (column): mean λ, how often it is the largest.

    {"routing": module -> rows, "first_choice": module -> rows}, the latter as shares of the images.
    """
    found: dict[str, dict] = {"routing": {}, "first_choice": {}}
    for task in suite.tasks:
        with wemoe.routing_weights(model) as weights:
            run(model, suite.inputs(suite.test[task][0][:count]))
        for name, lam in weights.items():
            found["routing"].setdefault(name, []).append(lam.mean(0).tolist())
            chosen = F.one_hot(lam.argmax(1), lam.shape[1]).float()
            found["first_choice"].setdefault(name, []).append(chosen.mean(0).tolist())
    return found


def adapt(suite: Suite, model: nn.Module, name: str, objective=wemoe.entropy, batches: int = 1, **options) -> dict:
    """Adapt the model in place: entropy (nats) at each step, accuracy (%) on part of the test inputs now and then.

    Each step takes so many batches of each task, as one; `options` are those of wemoe.adapt: steps, lr, anneal.
    Raises ValueError where there is nothing to adapt to.
    """
    steps, alone = options["steps"], PartialState().num_processes == 1
    adapted = [task for task in suite.experts if task not in suite.unadapted]
    if not adapted:
        raise ValueError(f"{name} adapts, but there is nothing to adapt to in {', '.join(suite.tasks)}: leave it out")
    part = {task: (rows[:CURVE_IMAGES], labels[:CURVE_IMAGES]) for task, (rows, labels) in suite.test.items()}
    part, every = replace(suite, test=part), max(suite.adaptation.every, math.ceil(steps / 10))
    curve = {"steps": [0], "accuracy": [fmean(evaluate(part, model).values())], "entropy": []}

    def on_step(step: int, entropies: dict[str, float]) -> None:
        shares = gather_object([fmean(entropies.values())])
        curve["entropy"].append(round(sum(shares) / len(shares), 6))
        if step % every == 0 or step == steps:
            curve["steps"].append(step)
            curve["accuracy"].append(fmean(evaluate(part, model).values()))
        bar.set_postfix(entropy=curve["entropy"][-1], accuracy=curve["accuracy"][-1], refresh=False)
        bar.update()

    with progress(None, f"{name}: adapting", total=steps, unit="step") as bar:
        wemoe.adapt(
            model if alone else DistributedDataParallel(model),
            loaders={task: unlabelled(suite, task, batches * suite.adaptation.batch_size) for task in adapted},
            heads={task: suite.logits(task) for task in adapted},
            objective=objective if alone else lambda logits: objective(torch.cat(all_gather(logits))),
            on_step=on_step,
            **options,
        )
    return curve


def unlabelled(suite: Suite, task: str, size: int) -> Iterator[Batch]:
    """A task's test inputs without labels and without end, in batches, in another order in every epoch.

    Each process of a distributed run gets its share of every batch; shares are equal, if need be by repeating inputs.
    """
    rows = suite.test[task][0]
    rows = rows[: max(1, round(suite.adaptation.share * len(rows)))]
    generator = torch.Generator().manual_seed(derive_seed(suite.seed, "adaptation", task))
    rank, world = PartialState().process_index, PartialState().num_processes
    while True:
        # An epoch has whole batches only, unless there is none.
        for batch in torch.randperm(len(rows), generator=generator).split(size)[: max(1, len(rows) // size)]:
            own = torch.arange(rank, world * math.ceil(len(batch) / world), world) % len(batch)
            yield suite.inputs(rows[batch[own]])
