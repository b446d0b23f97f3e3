"""Weights from files, and the task-arithmetic authors' own checkpoints, read without running anything in them.

The latter are whole modules, pickled with classes of an old open_clip and of a package `src.modeling`, which today's
libraries cannot load. torch's restricted unpickler can, if every class and function that a file names is a stand-in.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import open_clip
import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from data.suite import Loaded


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Whatever a library raises meanwhile becomes a ValueError of one sentence: what was read, and what is wrong."""
    try:
        yield
    except Exception as error:  # libraries raise what they like; torch.load with advice to run what is in the file
        cause = error.__context__ if isinstance(error, UnpicklingError) and error.__context__ else error
        why = " ".join(str(cause).split())[:400]
        raise ValueError(f"{what} cannot be used: {why or type(cause).__name__}") from error


def filled(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A module of this make with these weights, in float32. Raises RuntimeError for names and shapes that differ."""
    other = copy.deepcopy(module)
    other.load_state_dict({name: value.detach().float() for name, value in state.items()}, assign=True)
    return other


class Inert(nn.Module):
    """Stands in for each class and function that a pickle names: takes any argument, and holds its state."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__()


def load_authors(arch: str, folder: Path, classes: Mapping[str, int]) -> tuple[nn.Module, Loaded, dict[str, Tensor]]:
    """The checkpoints of Ilharco et al. (arXiv 2212.04089), with which the paper's numbers were made: the pre-trained
    vision tower, those fine-tuned on each of the tasks, and heads (D, C) for so many classes, by task.

    They lie in the layout FOLDER/ViT-B-32/{zeroshot.pt, SUN397/finetuned.pt, head_SUN397.pt}. The heads' weights (C, D)
    include the logit scale already, and their biases are 0. Raises ValueError.
    """
    with torch.device("meta"):  # structure only: the numbers come from the files
        visual = open_clip.CLIP(**open_clip.get_model_config(f"{arch}-quickgelu")).visual.requires_grad_(False).eval()
        linear = {task: nn.Linear(visual.output_dim, count) for task, count in classes.items()}

    def read(make: nn.Module, name: str, prefix: str = "") -> nn.Module:
        path = Path(folder) / arch / name
        with reading(path), safe_globals([(Inert, name) for name in get_unsafe_globals_in_checkpoint(path)]):
            state = torch.load(path, "cpu", weights_only=True).state_dict().items()
            return filled(make, {n.removeprefix(prefix): p for n, p in state if n.startswith(prefix)})

    tower = partial(read, visual, prefix="model.visual.")  # of an ImageEncoder; its other entries are not used
    heads = {task: read(make, f"head_{task}.pt").weight.detach().T.contiguous() for task, make in linear.items()}
    return tower("zeroshot.pt"), Loaded({task: partial(tower, f"{task}/finetuned.pt") for task in classes}), heads
