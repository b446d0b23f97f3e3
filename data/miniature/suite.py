"""The miniature as a suite: eight rendered tasks; their experts are fine-tuned here."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from data.files import fingerprint
from data.miniature.corruptions import corrupt
from data.miniature.tasks import load_pretrained, normalise, render, zero_shot_head
from data.suite import Adaptation, Suite, Training, make_experts

COUNTERPARTS = {  # of the paper's tasks
    "SUN397": "Scenes",
    "Cars": "Cars",
    "RESISC45": "Aerial",
    "EuroSAT": "LandUse",
    "SVHN": "HouseNumbers",
    "GTSRB": "Signs",
    "MNIST": "Digits",
    "DTD": "Textures",
}
TEST_IMAGES = 400  # of each task
SEVERITY = 3  # of corruptions: at 5, task arithmetic has 30 % left of 94 %
TRAINING = Training(images=1500, steps=100, lr=5e-4)
ADAPTATION = Adaptation(
    steps=160, lr=8e-4, lambda_lr=1.6e-2, lambda_steps=120, mask_lr=3e-2, mask_steps=60, batch_size=8, evaluations=5
)


def miniature_suite(arguments: argparse.Namespace) -> Suite:
    model, device = load_pretrained(), torch.device(arguments.device)
    suite = Suite(
        name="miniature",
        seed=arguments.seed,
        device=device,
        precision=arguments.precision or "float32",
        adaptation=ADAPTATION.changed(arguments.steps, arguments.adapt_precision, arguments.settings),
        pretrained=model.visual.requires_grad_(False),
        heads={task: zero_shot_head(model, task).to(device) for task in arguments.tasks},
        test={task: images(task, "test") for task in arguments.tasks},
        load=images,
        normalise=normalise,
        training=TRAINING,
        scalings=(0.1, 0.2, 0.3, 0.4, 0.6, 1.0),
    )
    program = b"".join(Path(__file__).with_name(file).read_bytes() for file in ("tasks.py", "drawing.py"))
    make_experts(suite, arguments.cached, arguments.workers, depends_on=fingerprint(program))
    return suite


def images(task: str, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Rendered images and labels: "train", "test", or a corruption's name for the test images that it has spoiled."""
    if split == "train":
        return render(task, "train", count or TRAINING.images, seed=0)
    pictures, labels = render(task, "test", TEST_IMAGES, seed=1)
    return (pictures if split == "test" else corrupt(pictures, split, SEVERITY)), labels
