"""What an experiment runs on, and its four verbs: fine-tune, evaluate, adapt, and vary the conditions.

A suite is data: tasks, heads, test images or texts, a pre-trained tower and its experts. `data.miniature`, `data.paper`
and `data.text` make them; from there on, all are treated alike. Texts are rows of token numbers, padded to one length:
what the tower takes of them, token ids and a mask by name, is up to the suite's `normalise`.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

import wemoe
from data.baselines import Batch, run
from data.dependencies import code_of
from data.files import InputError, derive_seed, fingerprint, read_kept, write
from data.processes import barrier, each, gathered, progress, rank, total, world

CURVE_IMAGES = 40  # of each task, on which the accuracy is measured during adaptation


@dataclass(frozen=True)
class Training:
    """How an expert is made: all weights of the vision tower are trained (AdamW), the zero-shot head is frozen."""

    images: int | None  # of each task; None: all
    steps: int
    lr: float
    batch_size: int = 32
    weight_decay: float = 0.1
    warmup: int = 10


@dataclass(frozen=True)
class Adaptation:
    """How routers, λ and masks are trained: unlabelled test images, entropy, Adam.

    In the paper's settings the learning rate is annealed to zero by a cosine, each sample has its own routing weights,
    and λ of AdaMerging is clamped. In the hub's, those of FusionBench (github.com/tanganke/fusion_bench at 54c9e8c),
    which made the hub's rows:
    - the learning rate is constant (fusion_bench/method/we_moe/we_moe.py makes an Adam and no schedule, and so do
      adamerging/layer_wise_adamerging.py and concrete_subspace/clip_concrete_task_arithmetic.py beside it);
    - a batch has one λ, the mean of its samples' (batch_reduce: true, in config/method/wemoe/weight_ensembling_moe.yaml
      and sparse_weight_ensembling_moe.yaml): in evaluation, too, as `moe_model.batch_reduce = False` at the end of
      we_moe.py is said to the model, not to the modules that would heed it;
    - evaluation takes batches of 128 in the data's order (config/taskpool/CLIPVisionModelTaskPool/_template.yaml);
    - λ of AdaMerging has 1000 steps, as many as routers, and is not clamped (max_steps, clamp_weights: false in
      config/method/adamerging/clip.yaml).
    Learning rates, the batch size of 16, Adam, and λ = 0.3 are the same in these files as in the papers' programs.
    """

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
    settings: str = "paper"  # or "hub"

    def changed(self, steps: int | None, precision: str | None, settings: str = "paper") -> "Adaptation":
        """With so many steps for routers, and in proportion for λ and masks; None leaves a setting as it is."""
        factor = steps / self.steps if steps else 1
        lambda_steps = self.steps if settings == "hub" else self.lambda_steps
        scaled = (max(1, round(factor * count)) for count in (self.steps, lambda_steps, self.mask_steps))
        steps_of = dict(zip(("steps", "lambda_steps", "mask_steps"), scaled))
        return replace(self, **steps_of, precision=precision or self.precision, settings=settings)


@dataclass
class Suite:
    name: str
    seed: int
    device: torch.device
    precision: str  # of evaluation
    training: Training
    adaptation: Adaptation
    pretrained: nn.Module  # tower: normalised images (B, 3, H, W), or texts -> features (B, D)
    heads: dict[str, Tensor | nn.Module]  # task -> (D, C): logits = normalised features @ head; or features -> logits
    test: dict[str, tuple[Tensor, Tensor]]  # task -> uint8 images (N, 3, H, W) or tokens (N, L), labels (N,)
    load: Callable[[str, str, int | None], tuple[Tensor, Tensor]]  # task, split, how many at most -> as in `test`
    normalise: Callable[[Tensor], Batch]  # uint8 images, or tokens -> what the tower takes
    experts: dict[str, nn.Module] = field(default_factory=dict)
    scalings: tuple[float, ...] = ()  # λ of task arithmetic to try, besides 0.3
    of_the_paper: bool = False  # its models and data, whether or not ours are to be compared with published figures
    source: str | None = None  # whose published figures ours may stand beside: "paper", "hub"
    published: dict[str, dict] = field(default_factory=dict)  # method -> the row of published figures
    claimable: bool = True  # whether the test images are those of the published figures
    shortened: bool = False  # whether adaptation has another number of steps than the published one
    curve: dict | None = None  # the authors' accuracies during adaptation
    metrics: dict[str, Callable] = field(default_factory=dict)  # task -> (predictions, labels) -> %; else the accuracy
    answer: Callable[[str, nn.Module, Batch], Tensor] | None = None  # task, tower, batch -> predictions (B,)
    unadapted: tuple[str, ...] = ()  # tasks that are merged, but not adapted to
    features: Callable[[nn.Module, Batch], Tensor] | None = None  # (B, D), what Twin-Merging sees; else the output
    note: str = ""  # what a reader of its table has to know

    @property
    def tasks(self) -> list[str]:
        return list(self.heads)

    @property
    def key(self) -> str:
        """Names everything that a method's result depends on, but for the method itself and the λ that it tries."""
        models = [value.numpy() for m in (self.pretrained, *self.experts.values()) for value in m.state_dict().values()]
        heads = [h.state_dict() if isinstance(h, nn.Module) else h for h in self.heads.values()]
        heads = [value.cpu().numpy() for value in tree_leaves(heads)]
        some = [[part[:: 1 + len(part) // 20] for part in pair] for pair in self.test.values()]
        tests = [p.contiguous().numpy() for x, y in some for p in tree_leaves((self.normalise(x), y))]
        sizes = [len(labels) for _, labels in self.test.values()]
        used = Suite, self.load, *self.metrics.values(), self.answer, self.features
        code = [code_of(function) for function in used if function]
        settings = self.name, self.seed, self.device.type, self.precision, self.training, self.adaptation
        return fingerprint(*settings, self.tasks, sizes, torch.__version__, *models, *heads, *tests, *code)

    def variant(
        self, experts: tuple[str, ...] = (), split: str = "test", tasks: tuple[str, ...] = (), **adaptation
    ) -> "Suite":
        """The same with fewer experts or tasks, other test images (a corruption's name) or settings of adaptation."""
        tasks = tasks or tuple(self.tasks)
        return replace(
            self,
            heads={task: self.heads[task] for task in tasks},
            experts={task: self.experts[task] for task in self.experts if task in (experts or tasks)},
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
        with precision(self.device, self.precision):
            if self.answer:
                return self.answer(task, tower, batch)
            features = run(tower, batch)
        logits = self.logits(task)(features)
        return logits.argmax(-1) if logits.shape[-1] > 1 else logits[:, 0]


def padded(rows: Tensor, padding: int = 0) -> Batch:
    """Of texts (B, L), padded at their ends, what the longest needs (B, N), and a mask of what is no padding (B, N)."""
    mask = rows != padding
    longest = int(mask.any(0).nonzero().max()) + 1
    return {"input_ids": rows[:, :longest], "attention_mask": mask[:, :longest].long()}


def accuracy_of(predicted: Tensor, labels: Tensor) -> float:
    """In percent: how many of the predictions (N,) are the labels (N,)."""
    return 100 * (predicted == labels).sum().item() / len(labels)


def precision(device: torch.device, name: str):
    return torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16")


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


# ---- Fine-tune -------------------------------------------------------------------------------------------------------


def make_experts(suite: Suite, folder: Path, workers: int, depends_on: str) -> None:
    """Fine-tune the tower on every task (shared among the processes), or read what an earlier run has fine-tuned."""
    weights = [value.numpy() for value in suite.pretrained.state_dict().values()]
    key = fingerprint(depends_on, code_of(make_expert), suite.training, suite.seed, suite.device.type, *weights)
    files = {
        task: folder / f"expert-{task}-{fingerprint(key, suite.heads[task].cpu().numpy())}.safetensors"
        for task in suite.tasks
    }
    missing = [task for task in suite.tasks if not files[task].exists()][rank() :: world()]
    each(suite, make_expert, [(task, files[task]) for task in missing], workers)
    barrier()
    for task, file in files.items():
        suite.experts[task] = copy.deepcopy(suite.pretrained)
        suite.experts[task].load_state_dict(read_kept(file, load_file))


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
            logits = suite.logits(task)(run(expert, suite.inputs(pixels[batch])))
            F.cross_entropy(logits, labels[batch].to(suite.device)).backward()
        optimizer.step()
        schedule.step()
    return expert.requires_grad_(False).eval()


# ---- Evaluate --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(suite: Suite, model: nn.Module | dict[str, nn.Module], test: dict | None = None) -> dict[str, float]:
    """Accuracy in percent (or the task's own metric) on the test inputs of every task, by the head of their own task.

    The processes of a distributed run share the inputs.
    """
    test, accuracy = test or suite.test, {}
    count = sum(len(labels[rank() :: world()]) for _, labels in test.values())
    with progress(None, "Evaluating", total=count, unit="img", leave=False, delay=3) as bar:
        for task, (images, labels) in test.items():
            tower = (model[task] if isinstance(model, dict) else model).to(suite.device)
            predicted = torch.zeros(len(labels), device=suite.device)
            for batch in batches(suite, len(labels)):
                predicted[batch] = suite.predict(task, tower, suite.inputs(images[batch])).to(predicted)
                bar.update(len(batch))
            if isinstance(model, dict):
                tower.cpu()  # one expert at a time on the device
            accuracy[task] = suite.metrics.get(task, accuracy_of)(total(predicted).cpu(), labels)
    if model is suite.pretrained:
        model.cpu()
    return accuracy


def batches(suite: Suite, count: int) -> tuple[Tensor, ...]:
    """This process's places among so many test inputs, in batches; their size matters where a batch has one λ."""
    own = torch.arange(count)[rank() :: world()]
    return own.split(128 if suite.adaptation.settings == "hub" else 64) if len(own) else ()


@torch.no_grad()
def evaluate_task_free(suite: Suite, model: nn.Module | dict[str, nn.Module]) -> dict[str, dict[str, float]]:
    """Accuracy in percent where nobody tells the task of an image: rule -> task -> images given head and class rightly.

    The rule chooses the head, among those of the experts' tasks: "entropy", the one whose prediction is most certain,
    "logit", that of the largest logit; and where the model routes, "routing", that of the largest routing weight, and
    heads of weight zero are not asked for their logits (so MASS). With a model for each task, each head sees its own's.
    """
    tasks, accuracy = list(suite.experts), {}
    for own, task in enumerate(tasks):
        images, labels = suite.test[task]
        right = {}
        for batch in batches(suite, len(labels)):
            x = suite.inputs(images[batch])
            with precision(suite.device, suite.precision):
                if isinstance(model, dict):
                    logits, lam = [suite.logits(t)(model[t].to(suite.device)(x)) for t in tasks], None
                else:
                    features, lam = routed(model.to(suite.device), x)
                    logits = [suite.logits(t)(features) for t in tasks]
            heads = {"entropy": torch.stack([wemoe.entropy(of_head) for of_head in logits], 1).argmin(1)}  # (B,)
            highest = torch.stack([of_head.amax(1) for of_head in logits], 1)
            if lam is not None:
                heads["routing"], highest = lam.argmax(1), highest.masked_fill(lam <= 0, -math.inf)
            heads["logit"] = highest.argmax(1)
            correct = logits[own].argmax(1) == labels[batch].to(suite.device)
            for rule, head in heads.items():
                right[rule] = right.get(rule, 0) + ((head == own) & correct).sum()
        for rule, count in right.items():
            accuracy.setdefault(rule, {})[task] = 100 * total(count).item() / len(labels)
    return accuracy


def routed(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The model's features and, if it routes, its weights of tasks (B, T): its own, or λ in the mean over modules."""
    with wemoe.routing_weights(model) as weights:
        features = model(x)
    if hasattr(model, "task_weights"):
        return features, model.task_weights(x)
    return features, torch.stack([*weights.values()]).mean(0) if weights else None


# ---- Adapt -----------------------------------------------------------------------------------------------------------


def adapt(
    suite: Suite,
    model: nn.Module,
    name: str,
    file: Path,
    *,
    steps: int,
    lr: float,
    objective: Callable[[Tensor], Tensor] = wemoe.mean_entropy,
) -> dict[str, list[float]]:
    """Adapt the model in place: entropy (nats) at each step, accuracy (%) on part of the test images now and then.

    What is trained, its optimiser, the state of the random generator and the curve are kept in `file` some times on
    the way, and an adaptation goes on from there.
    """
    part = {task: (images[:CURVE_IMAGES], labels[:CURVE_IMAGES]) for task, (images, labels) in suite.test.items()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr)
    if suite.adaptation.settings == "hub":
        optimizer.register_step_pre_hook(keep_rate)
    adapted = [task for task in suite.experts if task not in suite.unadapted]
    if not adapted:
        raise InputError(f"{name} adapts, but there is nothing to adapt to in {', '.join(suite.tasks)}: leave it out")
    on_gpu = suite.device.type == "cuda"
    if file.exists():
        kept = read_kept(file, partial(torch.load, map_location=suite.device, weights_only=True))
        curve = kept["curve"]
        optimizer.load_state_dict(kept["optimizer"])
        model.load_state_dict(kept["trained"], strict=False)
        random = kept["random"].cpu()
        torch.cuda.set_rng_state(random, suite.device) if on_gpu else torch.set_rng_state(random)
    else:
        curve = {"steps": [0], "accuracy": [mean(evaluate(suite, model, part))], "entropy": []}
    done = curve["steps"][-1]
    with progress(None, f"{name}: adapting", total=steps, initial=done, unit="step") as bar:

        def on_step(step: int, entropies: dict[str, float]) -> None:
            entropy = total(torch.tensor(mean(entropies), device=suite.device)).item() / world()
            curve["entropy"].append(round(entropy, 6))
            bar.update()
            if step % max(1, steps // suite.adaptation.evaluations) == 0 or step == steps:
                curve["steps"].append(step)
                curve["accuracy"].append(mean(evaluate(suite, model, part)))
                bar.set_postfix(entropy=f"{entropy:.3f}", accuracy=f"{curve['accuracy'][-1]:.1f}")
                state = {"curve": curve, "optimizer": optimizer.state_dict(), "trained": trained}
                state["random"] = torch.cuda.get_rng_state(suite.device) if on_gpu else torch.get_rng_state()
                if rank() == 0:
                    write(file, lambda path: torch.save(state, path))
                barrier()

        if done < steps:
            with precision(suite.device, suite.adaptation.precision):
                wemoe.adapt(
                    DistributedDataParallel(model) if world() > 1 else model,
                    loaders={task: unlabelled(suite, task, start=done) for task in adapted},
                    heads={task: suite.logits(task) for task in adapted},
                    steps=steps,
                    objective=lambda logits: objective(gathered(logits)),
                    optimizer=optimizer,
                    start=done,
                    on_step=on_step,
                )
    return curve


def keep_rate(optimizer: torch.optim.Optimizer, *_) -> None:
    """Before a step: take the learning rate that wemoe.adapt began with, not the one that it has annealed."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]


def unlabelled(suite: Suite, task: str, start: int) -> Iterator[Batch]:
    """A task's test images without labels and without end, from batch `start` on, in another order in every epoch.

    Each process of a distributed run gets its share of every batch; shares are equal, if need be by repeating images.
    """
    images, size = suite.test[task][0], suite.adaptation.batch_size
    images = images[: max(1, round(suite.adaptation.share * len(images)))]
    generator = torch.Generator().manual_seed(derive_seed(suite.seed, "adaptation", task))
    while True:
        # An epoch has whole batches only, unless there is none.
        batches = torch.randperm(len(images), generator=generator).split(size)[: max(1, len(images) // size)]
        for batch in batches[start:]:
            own = torch.arange(rank(), world() * math.ceil(len(batch) / world()), world()) % len(batch)
            yield suite.inputs(images[batch[own]])
        start = max(0, start - len(batches))


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
            chosen = F.one_hot(lam.argmax(-1), lam.shape[-1]).float()
            for what, values in (("routing", lam), ("first_choice", chosen)):
                found[what].setdefault(name, []).append([round(x, 6) for x in values.mean(0).tolist()])
    return found
