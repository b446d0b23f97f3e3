"""The eight data sets' images as open_clip prepares them: decoded once with `datasets`, then memory-mapped.

(`datasets` takes seconds to import, and whoever only wants the miniature never needs it.)
"""

import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor
from torchvision.transforms import Compose
from torchvision.transforms.functional import normalize

from data.files import InputError, make_folder, one_line, read_kept, some, write
from data.paper.hub import TASKS, Task, cache_path, refusing, repository, shards


def image_set(
    task: str,
    prep: PreprocessCfg,
    cache: Path,
    hub: Path | None = None,
    split: str = "test",
    limit: int | None = None,
    spaced: bool = False,
) -> tuple[Tensor, Tensor]:
    """A data set's images as open_clip prepares them, up to normalisation: uint8 (N, 3, H, W), and labels, int64 (N,).

    The images are decoded once and then memory-mapped from `cache`, where another version of the source files, another
    size, split or limit has another file. `limit` takes the first images only or, `spaced`, as many from the whole
    split, which may be sorted by class. Raises InputError for a missing split or column, class names or labels that are
    not the task's, and an image that cannot be decoded. Whether N is the published number is for `notice` to say.
    """
    spec = TASKS[task]
    if limit is not None and limit < 1:
        raise InputError(f"the limit on the images of a test set should be at least 1, not {limit}")
    repo = repository(spec.repo, "dataset", hub)
    files = shards(repo, spec.config, split, spec.split)
    paths = [repo.fetch(file) for file in files]
    where = f"{task}, split {split} of {spec.repo}"
    labels = read_labels(spec, where, paths)
    count = min(limit or len(labels), len(labels))
    chosen = np.linspace(0, (len(labels) if spaced else count) - 1, count).round().astype(int)
    file = cache_path(spec, prep, cache, repo, files, f"{split}-spaced" if spaced else split, limit)
    make_folder(file.parent)
    with FileLock(f"{file}.lock"):
        for left in file.parent.glob(f"{file.name}.*.*"):  # by a run that was killed as it decoded
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if not file.exists():
            write(file, partial(decode, where, spec.image_column, prep, paths, repo.folder, chosen))
    # Copy on write: torch wants writable memory, the file stays as it is.
    return torch.from_numpy(read_kept(file, partial(np.load, mmap_mode="c"))), torch.from_numpy(labels[chosen])


def normalise(images: Tensor, prep: PreprocessCfg = PreprocessCfg()) -> Tensor:  # noqa: B008 (never modified)
    """uint8 pixels (..., 3, H, W) to the float32 input of the model, by default with OpenAI's mean and deviation."""
    return normalize(images.float() / 255, prep.mean, prep.std)


def notice(task: str, count: int) -> str | None:
    """What must be said when a whole test split has not the number of images that published figures are about."""
    published = TASKS[task].images
    if count == published:
        return None
    return f"{task} has {count:,} test images, not the published {published:,}: not comparable with published figures"


# ----------------------------------------------------------------------------------------------------------- the labels


def read_labels(task: Task, where: str, paths: list[Path]) -> np.ndarray:
    """All labels, int64 (N,), as numbers of the task's classes. Raises InputError for those that are none.

    The class names are read from the file's own note: `datasets` refuses a file in which it does not know the type of
    any column, be it one that nobody asks for.
    """
    labels = []
    for path in paths:
        with refusing(f"{where}: {path} is not a readable parquet file"):
            file = pq.ParquetFile(path)
            columns, notes = file.schema_arrow.names, file.schema_arrow.metadata or {}
            features = json.loads(notes.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
            names = [str(name) for name in features.get(task.label_column, {}).get("names") or task.classes]
            found = file.read([task.label_column]).to_pydict().get(task.label_column)
        if missing := {task.image_column, task.label_column} - set(columns):
            raise InputError(f"{where} has no column {some(missing)}; it has: {some(columns)}")
        order = class_order(names, task.classes, where)
        for index, label in enumerate(found, len(labels)):
            if not isinstance(label, int) or not 0 <= label < len(order):
                raise InputError(f"{where}: image {index} has the label {label!r}; 0 to {len(order) - 1} are known")
            labels.append(order[label])
    if not labels:
        raise InputError(f"{where} has no images")
    return np.array(labels, np.int64)


def class_order(names: list[str], classes: list[str], where: str) -> list[int]:
    """For each label of a data set, the number of the task's class: by name if the names are the same, or by number.

    Names that are worded differently throughout say nothing, and the order is taken to be the task's. Raises InputError
    when the numbers of classes differ, or when a class is known by its name and is in another place than the task's.
    """
    if len(names) != len(classes):
        raise InputError(f"{where} has {len(names)} classes ({some(names)}), but tasks.json {len(classes)}")
    theirs, ours = ([re.sub(r"[\W_]+", "", name).casefold() for name in those] for those in (names, classes))
    if set(theirs) == set(ours) and len(set(ours)) == len(ours):
        return [ours.index(name) for name in theirs]
    for k, name in enumerate(theirs):
        if theirs.count(name) == ours.count(name) == 1 and ours.index(name) != k:
            moved = f"has {names[k]!r} as its class {k}, which is the task's class {ours.index(name)}"
            raise InputError(f"{where} {moved}, and names other classes differently: in what order they are is unknown")
    if all(name.isdecimal() for name in theirs):  # folders sorted as text: 0, 1, 10, 11, 2; or from 1 on
        numbers = [int(name) for name in theirs]
        if sorted(numbers) in ([*range(len(ours))], [*range(1, len(ours) + 1)]):
            return [number - min(numbers) for number in numbers]
    return list(range(len(ours)))


# ----------------------------------------------------------------------------------------------------------- the pixels


def decode(
    where: str, column: str, prep: PreprocessCfg, paths: list[Path], folder: Path, chosen: np.ndarray, file: Path
) -> None:
    """Write the images of these numbers as open_clip would hand them to ToTensor, in the format of numpy.save.

    `datasets` keeps a copy of the encoded images while it decodes them, here in a folder that goes away afterwards. Its
    own cache would go by a file's name and time alone, and has no form that is one tensor when memory-mapped.
    """
    from datasets import Features, Image, load_dataset

    transform = Compose(image_transform_v2(prep, is_train=False).transforms[:-2])  # without ToTensor and Normalize
    start = np.lib.format.open_memmap(file, "w+", np.uint8, (len(chosen), *prep.input_size)).offset

    def write_pixels(entry: dict[str, Any], index: int) -> None:  # in one of several processes
        with refusing(f"{where}: image {chosen[index]} cannot be decoded"):
            data = pixels(transform, entry, folder)
        with open(file, "r+b") as out:  # (on a full disk, writing to mapped memory would kill the process)
            out.seek(start + index * len(data))
            out.write(data)

    # "train" is its name for all the files that it is given; a process takes as long to start as some dozens of images.
    options = {"split": "train", "columns": [column], "features": Features({column: Image(decode=False)})}
    processes = min(os.cpu_count() or 1, len(chosen) // 100) or None
    try:
        with TemporaryDirectory(prefix=f"{file.name}.", dir=file.parent) as aside:
            names = [glob.escape(str(path.absolute())) for path in paths]
            encoded = load_dataset("parquet", data_files=names, cache_dir=aside, **options).select(chosen)
            encoded.map(write_pixels, with_indices=True, input_columns=column, num_proc=processes, desc=where)
    except InputError:
        raise
    except Exception as error:  # of datasets, pyarrow, or a process that was killed
        if isinstance(error.__context__, KeyboardInterrupt):  # in which datasets waits for its processes
            raise error.__context__ from None
        cause = error.__cause__ or error
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # which is not the data set's fault
            raise cause from None
        raise InputError(f"{where} cannot be read: {one_line(cause)}") from error


def pixels(transform: Callable, entry: dict[str, Any], folder: Path) -> bytes:
    """One image decoded as `datasets` does (turned as its EXIF tag says) and prepared: the bytes of uint8 (3, H, W)."""
    from datasets import Image

    path = folder / (entry["path"] or "")
    if entry["bytes"] is None and not path.is_file():
        raise InputError(f"there is no file {path}; images given as paths are read from a mirror on disk, --hub DIR")
    image = Image().decode_example({"bytes": entry["bytes"], "path": str(path)})
    return np.asarray(transform(image), np.uint8).transpose(2, 0, 1).tobytes()
