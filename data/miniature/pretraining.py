"""The pre-training of the miniature's CLIP, which makes checkpoint.safetensors in some nine minutes on two CPU cores:

    python -m data.miniature.pretraining

First both towers, with captions that describe what is seen in several wordings ("long roof wagon for a dog"). Then, on
the locked vision tower, a new text tower for a short while, with captions of which one in twenty says the name that a
benchmark gives the class ("estate car"), or at times that of another class. So the vision tower has strong features,
while the zero-shot heads fit them only in part. That is where fine-tuning begins, as with CLIP.
"""

import math
import random
from collections.abc import Callable, Iterator

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from data.miniature.tasks import CAPTIONS, CHECKPOINT, TASKS, build_model, normalise, render, tokenize

NAMED = 0.05  # share of the new text tower's captions that use a class name
MIXED = (0.15, 0.5)  # how often that name is a neighbour's, drawn per class
STEPS, TEXT_STEPS = 2000, 500  # of both towers; then, of a new text tower
PER_CLASS = 1000  # pictures drawn of every class; for the new text tower, 60


def write_captions(named: float, mixed: tuple[float, float]) -> Iterator[Tensor]:
    """Batches of captions without end, each with the tokens of one for a picture of every class.

    People write mostly other wordings, seldom (`named`) a class name, and at times (`mixed`) the wrong one.
    """
    rng, habits = random.Random(0), {}
    for task in TASKS:  # the class of the same task that people take a class for, and how often they do
        ring = rng.sample(TASKS[task].classes, len(TASKS[task].classes))
        for name, neighbour in zip(ring, ring[1:] + ring[:1]):
            habits[task, name] = neighbour, rng.uniform(*mixed)

    def caption(task: str, name: str) -> str:
        neighbour, confusion = habits[task, name]
        text = rng.choice(TASKS[task].wordings[name])
        if rng.random() < named:
            text = neighbour if rng.random() < confusion else name
        return rng.choice(CAPTIONS).format(text)

    while True:
        yield tokenize([caption(task, name) for task in TASKS for name in TASKS[task].classes])


def draw_pool(per_class: int, seed: int) -> Tensor:
    """Pictures of every class of every task: uint8 (per_class, classes, 3, 32, 32)."""
    counts = {task: per_class * len(TASKS[task].classes) for task in TASKS}
    pool = [render(task, "web", counts[task], seed)[0] for task in tqdm(TASKS, desc="rendering")]
    return torch.cat([images.unflatten(0, (per_class, -1)) for images in pool], dim=1)


def choose(pool: Tensor) -> Tensor:
    """One of the pictures of every class, or of their features: (per_class, classes, ...) to (classes, ...)."""
    return pool[torch.randint(len(pool), (pool.shape[1],)), torch.arange(pool.shape[1])]


def contrastive(scale: Tensor, features: Tensor, captions: Tensor) -> Tensor:
    """CLIP's loss: each picture finds its caption, and each caption its picture, among those of the batch."""
    logits, target = scale * features @ captions.T, torch.arange(len(features))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def minimise(
    loss: Callable[[], Tensor], model: open_clip.CLIP, optimizer: torch.optim.Optimizer, steps: int, clip: float, **rest
) -> None:
    """Train the model on a loss that draws its own batches, at a learning rate that rises and falls once."""
    lr = optimizer.defaults["lr"]
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1, **rest)
    for _ in tqdm(range(steps), desc="training"):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        rates.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))


def pretrain(pool: Tensor, captions: Iterator[Tensor]) -> open_clip.CLIP:
    """Contrastive image-caption training; a batch has one picture of every class, so that captions seldom agree."""
    torch.manual_seed(0)
    model = build_model().train()
    weights = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]

    def loss() -> Tensor:
        features, texts, scale = model(normalise(choose(pool)), next(captions))
        return contrastive(scale, features, texts)

    optimizer = torch.optim.AdamW(groups, lr=1.5e-3, betas=(0.9, 0.98))
    minimise(loss, model, optimizer, STEPS, clip=1.0, cycle_momentum=False)
    return model.eval()


def tune_text(model: open_clip.CLIP, pool: Tensor, captions: Iterator[Tensor]) -> open_clip.CLIP:
    """Lock the vision tower and train a new text tower on it for a short while (LiT, arXiv 2111.07991).

    It fits the vision tower and the logit scale as they are shipped, rounded to half precision.
    """
    vision = model.visual.half().float().eval()
    torch.manual_seed(0)
    tuned = build_model().train()
    tuned.visual, tuned.logit_scale = vision.requires_grad_(False), model.logit_scale
    with torch.no_grad():
        features = torch.stack([F.normalize(vision(normalise(images)), dim=-1) for images in pool])
    scale = tuned.logit_scale.detach().half().float().exp()
    parameters = [p for name, p in tuned.named_parameters() if not name.startswith("visual.") and name != "logit_scale"]

    def loss() -> Tensor:
        return contrastive(scale, choose(features), tuned.encode_text(next(captions), normalize=True))

    minimise(loss, tuned, torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.1), TEXT_STEPS, clip=math.inf)
    return tuned.eval()


def main() -> dict[str, Tensor]:
    """The shipped checkpoint, made anew."""
    model = pretrain(draw_pool(PER_CLASS, seed=0), write_captions(0, (0, 0)))
    model = tune_text(model, draw_pool(min(60, PER_CLASS), seed=1), write_captions(NAMED, MIXED))
    return {name: value.half().contiguous() for name, value in model.state_dict().items()}


if __name__ == "__main__":
    save_file(main(), CHECKPOINT)
