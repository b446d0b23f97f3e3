"""The task-arithmetic authors' own checkpoints, as they are distributed, read without running anything in them.

They are whole modules, pickled with classes of an old open_clip and of a package `src.modeling`; today's libraries
cannot load them. torch's restricted unpickler can, if every class and function that a file names is an inert stand-in.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from data.files import InputError, some
from data.paper.hub import TASKS, Architecture, refuse_unusable, refusing


class Inert:
    """Stands in for each class and function that a pickle names: takes any argument and state, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_module(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a module that torch.save wrote whole, and the module's attributes, without calling its code.

    Raises InputError when the file is missing, damaged, in the format of torch before 1.6, or asks for the system.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}; the authors' checkpoints lie as data/paper/README.md tells")
    with refusing(f"{path} is not a module that torch.save wrote since torch 1.6"):
        with safe_globals([(Inert, name) for name in get_unsafe_globals_in_checkpoint(path)]):
            module = torch.load(path, "cpu", weights_only=True)
        return dict(entries(module)), getattr(module, "state", {})


def entries(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of an unpickled module by name, as its state_dict() would have given them."""
    fields = {"_parameters": module} if isinstance(module, dict) else getattr(module, "state", {})
    for name, value in {**fields.get("_parameters", {}), **fields.get("_buffers", {})}.items():
        if isinstance(value, Tensor):
            yield prefix + name, value.detach()
    for name, child in fields.get("_modules", {}).items():
        yield from entries(child, f"{prefix}{name}.")


def load_authors_experts(
    arch: Architecture, directory: Path, tasks: Collection[str] = TASKS
) -> tuple[nn.Module, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The checkpoints of Ilharco et al. (arXiv 2212.04089), with which the paper's numbers were made: the pre-trained
    vision tower, fine-tuned vision towers (state dicts for it) and heads (D, C), by task.

    They lie in the layout DIR/ViT-B-32/{zeroshot.pt, SUN397/finetuned.pt, head_SUN397.pt}. The heads' weights include
    the logit scale already. Raises InputError.
    """
    folder = Path(directory) / arch.name
    with torch.device("meta"):  # structure only: the numbers come from the file
        visual = open_clip.CLIP(**open_clip.get_model_config(arch.model)).visual
    shapes = {name: value.shape for name, value in visual.state_dict().items()}
    visual.load_state_dict(read_tower(folder / "zeroshot.pt", shapes), assign=True)
    experts = {task: read_tower(folder / task / "finetuned.pt", shapes) for task in tasks}
    heads = {task: read_head(folder / f"head_{task}.pt", task, visual.output_dim) for task in tasks}
    return visual.eval(), experts, heads


def read_tower(path: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """An ImageEncoder's vision tower: its entries `model.visual.*`, whose names open_clip has kept, in float32."""
    state, _ = read_module(path)
    tower = {name.partition("visual.")[2]: value.float() for name, value in state.items() if "visual." in name}
    if not tower:
        raise InputError(f"{path} should hold an image encoder with entries model.visual.*, but holds: {some(state)}")
    refuse_unusable(tower, shapes, path)
    return tower


def read_head(path: Path, task: str, width: int) -> Tensor:
    """A ClassificationHead's weight (C, D) as a head (D, C)."""
    state, attributes = read_module(path)
    classes = len(TASKS[task].classes)
    refuse_unusable(state, {"weight": (classes, width), **({"bias": (classes,)} if "bias" in state else {})}, path)
    if attributes.get("normalize", True) is not True or state.get("bias", torch.zeros(1)).any():
        raise InputError(f"{path}: the head should normalise its input and have no bias, as the authors' heads do")
    return state["weight"].float().T.contiguous()
