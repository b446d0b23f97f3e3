"""The task-arithmetic authors' own checkpoints, as they are distributed, read without running anything in them.

They are whole modules, pickled with classes of an old open_clip and of a package `src.modeling`; today's libraries
cannot load them. Here a restricted unpickler rebuilds tensors and plain containers, puts an inert stand-in for every
other class, and imports and calls nothing that a file names.
"""

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import open_clip
import torch
from torch import Tensor, nn

from data.files import InputError, one_line, some
from data.paper.hub import TASKS, Architecture, refuse_unusable


class Inert:
    """Stands in for each class and function that a pickle names: takes any argument, item and state, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, *items: Any) -> None:
        pass

    extend = append


DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class ModuleUnpickler(pickle.Unpickler):
    """Reads what torch.save wrote of a whole module, knowing tensors and plain containers; all else becomes Inert.

    `find_class` looks names up in a table and never imports: a pickle can call nothing but what the table holds.
    `storage(key, dtype, count)` returns the numbers that a persistent id refers to, as a flat tensor.
    """

    def __init__(self, file: BinaryIO, storage: Callable[[str, torch.dtype, int], Tensor]):
        super().__init__(file)
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        known = {  # made anew at each call: a pickle may set attributes on what it is given
            ("torch._utils", "_rebuild_tensor_v2"): lambda flat, at, size, step, *_: flat.as_strided(size, step, at),
            ("torch._utils", "_rebuild_parameter"): lambda value, *_: value,
            ("collections", "OrderedDict"): OrderedDict,
            ("builtins", "set"): set,
            ("__builtin__", "set"): set,
        }
        return known.get((module, name), Inert)

    def persistent_load(self, pid: tuple) -> Any:
        if pid[0] == "module":  # the old format gives a class together with its source code
            return pid[1]
        _, dtype, key, _, count, *view = pid
        if any(part is not None for part in view):
            raise ValueError("it is older than torch 0.4")
        return self.storage(str(key), dtype, int(count))


def read_module(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a module that torch.save wrote whole, and the module's attributes, without calling its code.

    Reads the zip format and the one before it. Raises InputError when the file is missing or cannot be read that way.
    """
    try:
        with open(path, "rb") as file:
            module = read_zip(file) if zipfile.is_zipfile(file) else read_legacy(file)
        return dict(entries(module)), getattr(module, "state", {})
    except Exception as error:  # a damaged or hostile pickle may fail in any way
        raise InputError(f"{path} is not a module that torch.save wrote: {one_line(error)}") from error


def read_zip(file: BinaryIO) -> Any:
    archive, storages = zipfile.ZipFile(file), {}
    root = next(name for name in archive.namelist() if name.endswith("data.pkl")).removesuffix("data.pkl")

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        if key not in storages:
            data = bytearray(archive.read(f"{root}data/{key}"))
            storages[key] = torch.frombuffer(data, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
        return storages[key]

    with archive.open(f"{root}data.pkl") as pickled:
        return ModuleUnpickler(pickled, storage).load()


def read_legacy(file: BinaryIO) -> Any:
    """Magic number, version, machine, the object, its storages' keys: five pickles; then counts and numbers."""
    file.seek(0)
    storages: dict[str, Tensor] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        return storages.setdefault(key, torch.empty(count, dtype=dtype))

    _, _, _, module, keys = (ModuleUnpickler(file, storage).load() for _ in range(5))
    for key in keys:
        numbers = storages[key].view(torch.uint8).numpy()
        file.seek(8, os.SEEK_CUR)
        if file.readinto(numbers) != numbers.nbytes:
            raise EOFError(f"it ends within storage {key}")
    return module


def entries(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of an unpickled module by name, as its state_dict() would have given them."""
    fields = {"_parameters": module} if isinstance(module, dict) else getattr(module, "state", {})
    for kind in ("_parameters", "_buffers"):
        yield from ((prefix + name, value) for name, value in fields.get(kind, {}).items() if isinstance(value, Tensor))
    for name, child in fields.get("_modules", {}).items():
        yield from entries(child, f"{prefix}{name}.")


class AuthorsExperts(NamedTuple):
    """Pre-trained vision tower, fine-tuned vision towers (state dicts for it) and heads (D, C), by task."""

    visual: nn.Module
    experts: dict[str, dict[str, Tensor]]
    heads: dict[str, Tensor]


def load_authors_experts(arch: Architecture, directory: Path, tasks: Iterable[str] = TASKS) -> AuthorsExperts:
    """The checkpoints of Ilharco et al. (arXiv 2212.04089), with which the paper's numbers were made.

    They are whole modules pickled with classes that no longer exist, in the layout DIR/ViT-B-32/{zeroshot.pt,
    SUN397/finetuned.pt, head_SUN397.pt}. The heads' weights include the logit scale already. Raises InputError.
    """
    folder, tasks = Path(directory) / arch.name, list(tasks)
    with torch.device("meta"):  # structure only: the numbers come from the file
        visual = open_clip.CLIP(**open_clip.get_model_config(arch.model)).visual
    shapes = {name: value.shape for name, value in visual.state_dict().items()}
    visual.load_state_dict(read_tower(folder / "zeroshot.pt", shapes), assign=True)
    experts = {task: read_tower(folder / task / "finetuned.pt", shapes) for task in tasks}
    heads = {task: read_head(folder / f"head_{task}.pt", task, visual.output_dim) for task in tasks}
    return AuthorsExperts(visual.eval(), experts, heads)


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
