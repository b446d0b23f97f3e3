"""What experiments run on: a suite as a record, which nothing changes later.

`data.miniature`, `data.paper` and `data.text` make suites; from there on, all are treated alike. Texts are rows of
token numbers, padded to one length: what the tower takes of them is up to the suite's `normalise`.
"""

from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = Tensor | Mapping[str, Tensor]  # a model's input, or its inputs by name


@dataclass(frozen=True)
class Training:
    """How an expert is made: all weights of the tower are trained (AdamW), the head is frozen."""

    images: int | None  # of each task; None: all
    steps: int
    lr: float
    batch_size: int = 32
    weight_decay: float = 0.1
    warmup: int = 10


@dataclass(frozen=True)
class Adaptation:
    """How routers, the λ of AdaMerging and Concrete masks are trained on unlabelled test inputs, by Adam."""

    steps: int  # of routers
    lr: float
    lambda_steps: int
    lambda_lr: float
    mask_steps: int
    mask_lr: float
    batch_size: int = 16  # of each task
    init_lambda: float = 0.3
    share: float = 1.0  # of the test inputs that adaptation sees
    every: int = 100  # steps between two measurements of accuracy on the way, which are at most ten

    def with_steps(self, steps: int | None) -> "Adaptation":
        """With so many steps for routers, and in proportion for λ and masks; None: as it is."""
        share, counts = (steps or self.steps) / self.steps, ("steps", "lambda_steps", "mask_steps")
        return replace(self, **{name: max(1, round(share * getattr(self, name))) for name in counts})


class Loaded(UserDict):
    """Task -> what loads its model; at each access the model, loaded anew."""

    def __getitem__(self, task: str) -> nn.Module:
        return self.data[task]()


@dataclass(frozen=True, eq=False)
class Suite:
    """Tasks, heads, test inputs, a pre-trained tower and its experts, and how they are to be treated."""

    name: str
    seed: int
    device: torch.device
    precision: str  # of evaluation
    training: Training
    adaptation: Adaptation
    pretrained: nn.Module  # tower: normalised images (B, 3, H, W), or texts -> features (B, D)
    experts: Mapping[str, nn.Module]  # task -> tower; may be Loaded: iterate, do not keep
    heads: dict[str, Tensor | nn.Module]  # task -> (D, C): logits = normalised features @ head; or features -> logits
    test: dict[str, tuple[Tensor, Tensor]]  # task -> uint8 images (N, 3, H, W) or tokens (N, L), labels (N,)
    load: Callable[[str, str, int | None], tuple[Tensor, Tensor]]  # task, split, how many at most -> as in `test`
    normalise: Callable[[Tensor], Batch]  # uint8 images, or tokens -> what the tower takes
    origin: str = ""  # where models and data come from, as far as the arguments of the suite's maker say
    scalings: tuple[float, ...] = ()  # λ that static merges try besides their own
    settings: str = "paper"  # or "hub", where experts are the hub's, and rows made as the hub made its own
    source: str | None = None  # whose published figures may stand beside ours; None: nobody's
    published: tuple[dict, ...] = ()  # rows of the main table, see data/paper/published.py
    claimable: bool = True  # whether the test inputs are those of the published figures
    shortened: bool = False  # whether adaptation has another number of steps than the published one
    metrics: dict[str, Callable] = field(default_factory=dict)  # task -> (predictions, labels) -> %; else the accuracy
    answer: Callable[[str, nn.Module, Batch], Tensor] | None = None  # task, tower, batch -> predictions (B,)
    unadapted: tuple[str, ...] = ()  # tasks that are merged, but not adapted to
    statistics: Callable[[nn.Module, Batch], object] | None = None  # a pass whose layers RegMean watches; else forward
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model  # what is done to a model once it is upscaled
    note: str = ""  # what a reader of its table has to know
    curve: dict | None = None  # the authors' accuracies during adaptation

    @property
    def tasks(self) -> list[str]:
        return list(self.heads)

    def variant(self, experts: Iterable = (), split: str = "test", tasks: Iterable = (), **adaptation) -> "Suite":
        """The same with fewer experts or tasks, other test inputs (a corruption's name) or settings of adaptation."""
        tasks = tuple(tasks) or self.tasks
        return replace(
            self,
            heads={task: self.heads[task] for task in tasks},
            experts=Loaded({t: partial(self.experts.get, t) for t in self.experts if t in (experts or tasks)}),
            test={task: self.test[task] if split == "test" else self.load(task, split, None) for task in tasks},
            adaptation=replace(self.adaptation, **adaptation),
        )

    def logits(self, task: str) -> Callable[[Tensor], Tensor]:
        head = self.heads[task]
        return head if isinstance(head, nn.Module) else lambda x: F.normalize(x.float(), dim=-1) @ head

    def inputs(self, rows: Tensor) -> Batch:
        return self.normalise(rows.to(self.device))

    def predict(self, task: str, tower: nn.Module, batch: Batch) -> Tensor:
        """(B,): the most probable class; of a head of one output, for a regression, that output."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            if self.answer:
                return self.answer(task, tower, batch)
            features = run(tower, batch)
        logits = self.logits(task)(features)
        return logits.argmax(-1) if logits.shape[-1] > 1 else logits[:, 0]


def run(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch) if isinstance(batch, Tensor) else model(**batch)


def padded(rows: Tensor, padding: int = 0) -> Batch:
    """Of texts (B, L), padded at their ends, what the longest needs (B, N), and a mask of what is no padding (B, N)."""
    mask = rows != padding
    longest = int(mask.any(0).nonzero().max()) + 1
    return {"input_ids": rows[:, :longest], "attention_mask": mask[:, :longest].long()}


def accuracy_of(predicted: Tensor, labels: Tensor) -> float:
    """In percent: how many of the predictions (N,) are the labels (N,)."""
    return 100 * (predicted == labels).sum().item() / len(labels)
