"""What a method is, and one method measured on one suite: its entry in results.json, which is kept."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from data.dependencies import code_of
from data.files import fingerprint, read_kept, write
from data.processes import barrier, rank
from data.suite import Suite, adapt, evaluate, evaluate_task_free, mean

# What a method may need besides the experts (Table 7).
TRAINING_IMAGES, VALIDATION = "labelled task data", "labelled validation data"
ADAPTATION = "test-time adaptation"
# Groups: the methods that merge once and look at no data, and those that adapt.
STATIC, LEARNED = "static", "learned without labels"

Model = nn.Module | dict[str, nn.Module]
Result = Model | tuple[Model, dict]  # with what else there is to tell, for results.json and the figures


@dataclass(frozen=True)
class Method:
    """`seconds` is about what it takes in the miniature, on one core of two; `arxiv` the paper that defines it."""

    group: str
    make: Callable[..., Result]  # of the suite; in the group LEARNED, of `adapt`, too
    seconds: int
    arxiv: str = ""
    given: str = ""  # TRAINING_IMAGES, or VALIDATION to choose λ by

    @property
    def needs(self) -> list[str]:  # besides the experts (Table 7)
        return [need for need in (self.given, ADAPTATION if self.group == LEARNED else "") if need]


def entry_of(suite: Suite, name: str, method: Method, key: str, cache: Path, change: dict) -> dict:
    """The method's entry in results.json, read from the cache if it is there. `key` is the suite's.

    `change` is what suite.variant takes, and `task_free`: whether the accuracy without the task is measured, too.
    """
    change = dict(change)
    task_free = change.pop("task_free", False)
    scalings = suite.scalings if method.group == STATIC else ()  # others try none
    measuring = code_of(evaluate), code_of(adapt), code_of(evaluate_task_free) if task_free else ""
    key = fingerprint(key, name, change, scalings, code_of(method.make), *measuring)
    folder = cache / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ("task_free.json" if task_free else "result.json")  # with one adaptation for both
    barrier()
    about = {"name": name, "group": method.group, "needs": method.needs, "arxiv": method.arxiv}
    if file.exists():
        return read_kept(file, lambda path: json.loads(path.read_text())) | about
    start = time.perf_counter()
    torch.manual_seed(suite.seed)
    suite = replace(suite.variant(**change), scalings=scalings)

    def adapt_this(model: nn.Module, part: str = "", **options) -> dict:
        label = f"{name}, {part}" if part else name
        return adapt(suite, model, label, folder / f"{part or 'adaptation'}.pt", **options)

    result = method.make(suite, adapt_this) if method.group == LEARNED else method.make(suite)
    model, record = result if isinstance(result, tuple) else (result, {})
    before = time.perf_counter()
    accuracy = evaluate(suite, model)
    after = time.perf_counter()
    models = list(model.values()) if isinstance(model, dict) else [model]
    entry = {
        **about,
        "accuracy": {task: round(value, 2) for task, value in accuracy.items()},
        "average": round(mean(accuracy), 2),
        "seconds": round(after - start, 1),
        "evaluation_seconds": round(after - before, 4),
        "trainable_parameters": sum(map(trainable, models)),
        "total_parameters": sum(p.numel() for one in models for p in one.parameters()),
        "bytes": sum(map(model_bytes, models)),
        **record,
        **({"task_free": evaluate_task_free(suite, model)} if task_free else {}),
    }
    if rank() == 0:
        write(file, lambda path: path.write_text(json.dumps(entry)))
    barrier()
    return entry


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def model_bytes(model: nn.Module) -> int:
    """What its parameters and buffers take, in memory and on disk; a tensor with two names counts once."""
    return sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})
