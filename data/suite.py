"""What an experiment runs on: a suite is tasks, zero-shot heads, test images, a pre-trained tower and its experts.

`miniature_suite` and `paper_suite` gather one each; from there on, reproduce.py treats them alike. Experts are read, or
fine-tuned here and kept.
"""

import argparse
import copy
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations, repeat
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from data import authors, clip, miniature
from data.clip import InputError, write
from data.corruptions import corrupt

HERE = Path(__file__).parent
TEST_IMAGES = 400  # of each task of the miniature
CURVE_IMAGES = 40  # of each task, on which the accuracy is measured during adaptation
SEVERITY = 3  # of its corruptions: at 5, task arithmetic has 30 % left of 94 %


@dataclass(frozen=True)
class Training:
    """How an expert is made: all weights of the vision tower are trained (AdamW), the zero-shot head is frozen."""

    images: int = 1500  # of each task
    steps: int = 100
    batch_size: int = 32
    lr: float = 5e-4
    weight_decay: float = 0.1
    warmup: int = 10


@dataclass(frozen=True)
class Adaptation:
    """How routers, λ and masks are trained: unlabelled test images, entropy, Adam, cosine annealing to zero."""

    steps: int
    lr: float  # of routers
    lambda_lr: float  # of the λ of AdaMerging
    lambda_steps: int
    mask_lr: float  # of Concrete masks
    mask_steps: int
    batch_size: int = 16  # of each task
    precision: str = "float32"
    init_lambda: float = 0.3
    share: float = 1.0  # of the test images that adaptation sees
    evaluations: int = 10  # of the accuracy on the way, where the state is kept, too


MINIATURE_TRAINING = Training()
MINIATURE_ADAPTATION = Adaptation(
    steps=160, lr=8e-4, lambda_lr=1.6e-2, lambda_steps=120, mask_lr=3e-2, mask_steps=60, batch_size=8, evaluations=5
)
PAPER_ADAPTATION = Adaptation(steps=1000, lr=1e-4, lambda_lr=1e-3, lambda_steps=1000, mask_lr=1e-3, mask_steps=2000)
PAPER_TRAINING = Training(images=0, steps=4000, batch_size=32, lr=1e-5, weight_decay=0, warmup=1)  # images: all


@dataclass
class Suite:
    name: str
    seed: int
    device: torch.device
    precision: str  # of evaluation
    training: Training
    adaptation: Adaptation
    pretrained: nn.Module  # vision tower: normalised images (B, 3, H, W) -> features (B, D)
    heads: dict[str, Tensor]  # task -> (D, C): logits = normalised features @ head
    test: dict[str, tuple[Tensor, Tensor]]  # task -> uint8 images (N, 3, H, W), labels (N,)
    load: Callable[[str, str, int | None], tuple[Tensor, Tensor]]  # task, split, how many at most -> as in `test`
    normalise: Callable[[Tensor], Tensor]  # uint8 images -> what the vision tower takes
    experts: dict[str, nn.Module] = field(default_factory=dict)
    scalings: tuple[float, ...] = ()  # λ of task arithmetic to try, besides 0.3
    published: dict[str, dict] = field(default_factory=dict)  # method -> the row of published figures
    curve: dict | None = None  # the authors' accuracies during adaptation

    @property
    def tasks(self) -> list[str]:
        return list(self.heads)

    @property
    def key(self) -> str:
        """Names everything that a method's result depends on, but for the method itself."""
        models = [value.numpy() for m in (self.pretrained, *self.experts.values()) for value in m.state_dict().values()]
        heads = [head.cpu().numpy() for head in self.heads.values()]
        some = [[part[:: 1 + len(part) // 20] for part in pair] for pair in self.test.values()]
        tests = [p.contiguous().numpy() for images, labels in some for p in (self.normalise(images), labels)]
        sizes = [len(labels) for _, labels in self.test.values()]
        settings = (
            self.name,
            self.seed,
            self.device.type,
            self.precision,
            self.adaptation,
            self.scalings,
            self.tasks,
            sizes,
        )
        return fingerprint(*settings, torch.__version__, *models, *heads, *tests)

    def variant(self, experts: tuple[str, ...] = (), split: str = "test", **adaptation) -> "Suite":
        """The same with fewer experts, other test images (a corruption's name) or other settings of adaptation."""
        return replace(
            self,
            experts={task: expert for task, expert in self.experts.items() if not experts or task in experts},
            test=self.test if split == "test" else {task: self.load(task, split, None) for task in self.tasks},
            adaptation=replace(self.adaptation, **adaptation),
        )

    def logits(self, task: str) -> Callable[[Tensor], Tensor]:
        return lambda features: F.normalize(features.float(), dim=-1) @ self.heads[task]

    def images(self, images: Tensor) -> Tensor:
        return self.normalise(images.to(self.device))


def miniature_suite(arguments: argparse.Namespace) -> Suite:
    """The eight rendered tasks; their experts are fine-tuned here."""
    model, device = miniature.load_pretrained(), torch.device(arguments.device)
    suite = Suite(
        name="miniature",
        seed=arguments.seed,
        device=device,
        precision=arguments.precision or "float32",
        adaptation=settings_of_adaptation(arguments, MINIATURE_ADAPTATION),
        pretrained=model.visual.requires_grad_(False),
        heads={task: miniature.zero_shot_head(model, task).to(device) for task in arguments.tasks},
        test={task: miniature_images(task, "test") for task in arguments.tasks},
        load=miniature_images,
        normalise=miniature.normalise,
        training=MINIATURE_TRAINING,
        scalings=(0.1, 0.2, 0.3, 0.4, 0.6, 1.0),
    )
    program = b"".join((HERE / file).read_bytes() for file in ("miniature.py", "drawing.py"))
    make_experts(suite, arguments, depends_on=program)
    return suite


def miniature_images(task: str, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Rendered images and labels: "train", "test", or a corruption's name for the test images that it has spoiled."""
    if split == "train":
        return miniature.render(task, "train", count or MINIATURE_TRAINING.images, seed=0)
    images, labels = miniature.render(task, "test", TEST_IMAGES, seed=1)
    return (images if split == "test" else corrupt(images, split, SEVERITY)), labels


def paper_suite(arguments: argparse.Namespace) -> Suite:
    """CLIP and the eight data sets; experts from the hub, from their authors' files, or fine-tuned here."""
    arch = clip.architecture(arguments.arch or arguments.suite, arguments.pretrained)
    hub, cache, limit, device = arguments.hub, arguments.cache, arguments.limit, torch.device(arguments.device)
    from_hub = arguments.experts is None and not arguments.finetune
    splits = ("test", "train") if arguments.finetune else ("test", *arguments.splits)
    weights = arguments.experts is None
    items = clip.plan(
        arch, cache, hub, tasks=arguments.tasks, weights=weights, experts=from_hub, splits=splits, limit=limit
    )
    say(f"{arch.name}: {clip.summary(items)}")
    clip.check_space(items)
    experts, prep = {}, clip.preprocessing(arch)
    if arguments.experts is not None:
        tower, experts, heads = authors.load_authors_experts(arch, arguments.experts, arguments.tasks)
    else:
        model = clip.load_pretrained(arch, hub).to(device)
        heads = clip.zero_shot_heads(model, arch, cache, arguments.tasks)
        tower = model.visual.cpu()
        if from_hub:
            with progress(arguments.tasks, "Experts") as tasks:
                experts = {task: clip.load_expert(arch, task, tower, hub) for task in tasks}
    published = json.loads((HERE / "published.json").read_text(encoding="utf-8"))
    source = "paper" if arguments.experts is not None else "hub"
    rows = published["main"].get(arch.name, []) if arguments.pretrained == "openai" and not limit else []
    curves = published["adaptation_curves"]["models"].get(arch.name, [])
    adaptation = settings_of_adaptation(arguments, PAPER_ADAPTATION)
    suite = Suite(
        name=arguments.name,
        seed=arguments.seed,
        device=device,
        precision=arguments.precision or ("bfloat16" if device.type == "cuda" else "float32"),
        adaptation=adaptation,
        pretrained=tower.requires_grad_(False),
        heads={task: head.to(device) for task, head in heads.items()},
        test={task: clip.image_set(task, prep, cache, hub, limit=limit) for task in arguments.tasks},
        load=lambda task, split, count: clip.image_set(
            task, prep, cache, hub, split, count or (None if split == "train" else limit), spaced=count is not None
        ),
        training=PAPER_TRAINING,
        normalise=partial(clip.normalise, prep=prep),
        published={
            OUR_NAMES.get(row["method"], row["method"]): dict(row, accuracy=dict(zip(clip.TASKS, row["accuracy"])))
            for row in rows
            if row["source"] == source
        },
        curve=next((c for c in curves if c["learning_rate"] == adaptation.lr), None),
    )
    if arguments.finetune:
        make_experts(suite, arguments)
    refuse_twins(tower.state_dict(), experts)
    for task, state in experts.items():
        suite.experts[task] = copy.deepcopy(tower)
        suite.experts[task].load_state_dict(state, assign=True)
        suite.experts[task].requires_grad_(False)
    return suite


def refuse_twins(pretrained: dict[str, Tensor], experts: dict[str, dict[str, Tensor]]) -> None:
    """Raise InputError if an expert is the pre-trained model, or another expert: a file in the wrong place."""
    models = {"pretrained": pretrained, **experts}
    for (one, state), (other, again) in combinations(models.items(), 2):
        if all(torch.equal(entry, again[name]) for name, entry in state.items()):
            what = "the pre-trained model itself" if one == "pretrained" else f"that of {one} once more"
            raise InputError(f"the expert of {other} is {what}: a file was put in the wrong place")


OUR_NAMES = {
    "WEMoE (1-layer router)": "WEMoE (1-layer)",
    "Weight-Ensembling MoE": "WEMoE",
    "E-WEMoE (90%)": "E-WEMoE",
    "Ties-Merging": "TIES-Merging",
    "Layer-wise AdaMerging": "AdaMerging (layer-wise)",
    "Concrete AdaMerging (layer-wise)": "Concrete AdaMerging",
}


def settings_of_adaptation(arguments: argparse.Namespace, default: Adaptation) -> Adaptation:
    steps, precision = arguments.steps or default.steps, arguments.adapt_precision or default.precision
    others = {k: max(1, round(getattr(default, k) * steps / default.steps)) for k in ("lambda_steps", "mask_steps")}
    return replace(default, steps=steps, precision=precision, **others)


def make_experts(suite: Suite, arguments: argparse.Namespace, depends_on: bytes = b"") -> None:
    """Fine-tune the tower on every task (shared among the processes), or read what an earlier run has fine-tuned."""
    weights = [value.numpy() for value in suite.pretrained.state_dict().values()]
    code = inspect.getsource(make_expert), inspect.getsource(fine_tune)
    key = fingerprint(depends_on, *code, suite.training, suite.seed, suite.device.type, *weights)
    files = {
        task: arguments.cached / f"expert-{task}-{fingerprint(key, suite.heads[task].cpu().numpy())}.safetensors"
        for task in suite.tasks
    }
    missing = [task for task in suite.tasks if not files[task].exists()][rank() :: world()]
    each(suite, make_expert, [(task, files[task]) for task in missing], arguments.workers)
    barrier()
    for task, file in files.items():
        suite.experts[task] = copy.deepcopy(suite.pretrained)
        suite.experts[task].load_state_dict(clip.read_kept(file, load_file))


def make_expert(suite: Suite, task: str, file: Path) -> None:
    expert = fine_tune(suite, [task], task)
    write(file, lambda path: save_file(expert.cpu().state_dict(), path))


def fine_tune(suite: Suite, tasks: list[str], name: str) -> nn.Module:
    """A copy of the pre-trained tower, trained with cross-entropy through the frozen heads: an expert, for one task."""
    images = {task: suite.load(task, "train", None) for task in tasks}
    generators = {t: torch.Generator().manual_seed(derive_seed(suite.seed, "fine-tuning", t)) for t in tasks}
    training = suite.training
    expert = copy.deepcopy(suite.pretrained).to(suite.device).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(expert.parameters(), lr=training.lr, weight_decay=training.weight_decay)

    def factor(step: int) -> float:  # of the learning rate: a short linear warm-up, then half a cosine
        return min(1, (step + 1) / training.warmup) * (1 + math.cos(math.pi * step / training.steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in progress(range(training.steps), f"{name}: fine-tuning", unit="step"):
        optimizer.zero_grad()
        for task, (pixels, labels) in images.items():
            batch = torch.randint(len(pixels), (training.batch_size,), generator=generators[task])
            logits = suite.logits(task)(expert(suite.images(pixels[batch])))
            F.cross_entropy(logits, labels[batch].to(suite.device)).backward()
        optimizer.step()
        schedule.step()
    return expert.requires_grad_(False).eval()


SUITES = {"miniature": (miniature_suite, list(miniature.TASKS))}
SUITES.update({name: (paper_suite, list(clip.TASKS)) for name in clip.ARCHITECTURES})


# ------------------------------------------------------------------------------------------
# Small things: files, seeds, processes, progress
# ------------------------------------------------------------------------------------------


def fingerprint(*parts: object) -> str:
    """A short name for everything that a cached file depends on: bytes, arrays, and whatever has a telling repr."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode() if not hasattr(part, "__array__") and not isinstance(part, bytes) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def derive_seed(*parts: object) -> int:
    """A seed of its own for every use and task, so that none depends on what ran before it."""
    return int(fingerprint(*parts), 16) % 2**31


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While this lasts, no other run may write into the folder. Raises InputError if one does already."""
    if rank() > 0:  # the first process of a distributed run has it for all
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        message = f"another run is writing into {folder}: wait for it, stop it, or choose another --output"
        raise InputError(message) from None
    try:
        for left in folder.rglob("*.part"):  # by a run that was killed as it wrote
            left.unlink()
        yield
    finally:
        lock.release()


def precision(device: torch.device, name: str):
    return torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def average_over_processes(value: float) -> float:
    if world() == 1:
        return value
    total = torch.tensor(value, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return total.item() / world()


def each(suite: Suite, function: Callable, calls: Iterable[tuple], workers: int) -> list:
    """The result of function(suite, *call) for each of the calls, on so many processes with one thread each.

    Small models waste most of a second thread. With one worker, the calls are made here, one by one.
    """
    calls = list(calls)
    if workers == 1 or len(calls) < 2:
        return [function(suite, *call) for call in calls]
    # Forked workers share the memory of all that is there already; one thread each keeps them clear of OpenMP's, which
    # do not survive a fork.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    start = suite, context.RLock(), context.Value("i", 0)
    with ProcessPoolExecutor(min(workers, len(calls)), context, start_worker, start) as pool:
        try:
            return list(pool.map(call_in_worker, repeat(function), calls))
        except BaseException:  # an interruption, too, ends the workers at once
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


WORKER = {"line": 0}  # in a worker: its suite, and the line of its progress bars


def start_worker(suite: Suite, lock, count) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent takes it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()  # not alone
    torch.set_num_threads(1)
    tqdm.set_lock(lock)
    with count.get_lock():
        WORKER.update(suite=suite, line=count.value)
        count.value += 1


def call_in_worker(function: Callable, call: tuple):
    return function(WORKER["suite"], *call)


def say(text: str) -> None:
    if rank() == 0:
        tqdm.write(text)


def progress(items, description: str, **options) -> tqdm:
    options = {"leave": "suite" not in WORKER, **options}  # the bars of workers share lines
    return tqdm(items, description, position=WORKER["line"], disable=rank() > 0, **options)
