"""The pre-training of the miniature's CLIP, which makes checkpoint.safetensors in some nine minutes on two CPU cores:

    python -m data.miniature.pretraining

It is CLIP's: match pictures with their captions. It has two stages. First both towers, with captions that describe what
is seen in several wordings ("station wagon", "long roof wagon for the dog"). Then, on the locked vision tower, a new
text tower for a short while, with captions as they are on the web: one in twenty says the name that a benchmark gives
the class ("estate car"), and is at times mistaken: a share of the pictures of each class, drawn from MIXED, goes by the
name of another class of the same task. So the vision tower has strong features, while the zero-shot heads, which
are built from the class names, fit them only in part. That is where fine-tuning begins, as with CLIP.
"""

import argparse
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from data.miniature.tasks import CAPTIONS, CHECKPOINT, TASKS, build_model, normalise, render, tokenize

NAMED = 0.05  # share of the new text tower's captions that use a class name
MIXED = (0.15, 0.5)  # how often that name is a neighbour's, drawn per class


def write_captions(named: float, mixed: tuple[float, float], seed: int) -> Iterator[Tensor]:
    """Batches of captions without end, each with the tokens of one for a picture of every class.

    People write mostly other wordings, seldom (`named`) a class name, and at times (`mixed`) the wrong one.
    """
    rng, habits = random.Random(seed), {}
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
    bar = tqdm(range(steps), desc="training")
    for _ in bar:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        rates.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        bar.set_postfix(loss=f"{value.item():.3f}", scale=f"{model.logit_scale.exp().item():.1f}")


def pretrain(pool: Tensor, captions: Iterator[Tensor], steps: int, seed: int) -> open_clip.CLIP:
    """Contrastive image-caption training; a batch has one picture of every class, so that captions seldom agree."""
    torch.manual_seed(seed)
    model = build_model().train()
    weights = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]

    def loss() -> Tensor:
        features, texts, scale = model(normalise(choose(pool)), next(captions))
        return contrastive(scale, features, texts)

    optimizer = torch.optim.AdamW(groups, lr=1.5e-3, betas=(0.9, 0.98))
    minimise(loss, model, optimizer, steps, clip=1.0, cycle_momentum=False)
    return model.eval()


def tune_text(model: open_clip.CLIP, pool: Tensor, captions: Iterator[Tensor], steps: int, seed: int) -> open_clip.CLIP:
    """Lock the vision tower and train a new text tower on it for a short while (LiT, arXiv 2111.07991).

    It fits the vision tower and the logit scale as they are shipped, rounded to half precision.
    """
    vision = model.visual.half().float().eval()
    torch.manual_seed(seed)
    tuned = build_model().train()
    tuned.visual, tuned.logit_scale = vision.requires_grad_(False), model.logit_scale
    with torch.no_grad():
        features = torch.stack([F.normalize(vision(normalise(images)), dim=-1) for images in pool])
    scale = tuned.logit_scale.detach().half().float().exp()
    parameters = [p for name, p in tuned.named_parameters() if not name.startswith("visual.") and name != "logit_scale"]

    def loss() -> Tensor:
        return contrastive(scale, choose(features), tuned.encode_text(next(captions), normalize=True))

    minimise(loss, tuned, torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.1), steps, clip=math.inf)
    return tuned.eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.miniature.pretraining",
        description="Pre-train the small CLIP on captioned pictures and write its checkpoint.",
    )
    add = parser.add_argument
    add("--steps", type=int, default=2000, help="training steps of both towers (default %(default)s)")
    add("--text-steps", type=int, default=500, help="then, of a new text tower (default %(default)s)")
    add("--per-class", type=int, default=1000, help="pictures drawn of every class (default %(default)s)")
    add("--seed", type=int, default=0, help="default %(default)s")
    add("--output", type=Path, default=CHECKPOINT, help="default %(default)s")
    args = parser.parse_args(arguments)
    described, named = write_captions(0, (0, 0), args.seed), write_captions(NAMED, MIXED, args.seed)
    model = pretrain(draw_pool(args.per_class, args.seed), described, args.steps, args.seed)
    model = tune_text(model, draw_pool(min(60, args.per_class), args.seed + 1), named, args.text_steps, args.seed)
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    settings = {name: str(value) for name, value in vars(args).items() if name != "output"}
    save_file(state, args.output, {"command": "python -m data.miniature.pretraining", **settings})


if __name__ == "__main__":
    main()
