"""Files, names and arguments: kept files appear whole or not at all; bad input has one error; chance has its seeds."""

import argparse
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError


class InputError(ValueError):
    """Files, data or a network that cannot be used: one sentence with what was found, where, and what would do."""


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def some(names: Iterable[str], limit: int = 6) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "") or "nothing"


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot make the folder {folder} ({one_line(error)}): choose another --output or --cache"
        raise InputError(message) from error


def write(file: Path, save: Callable[[Path], object]) -> None:
    """Write a file whole or not at all, and the folder that it is in; several processes may write the same one.

    Raises InputError if it cannot be written.
    """
    make_folder(file.parent)
    aside = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        save(aside)
        with open(aside, "rb+") as written:
            os.fsync(written.fileno())
        aside.replace(file)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and save_file raise the latter
        advice = "free some space or choose another --output or --cache, and the same command goes on"
        raise InputError(f"cannot write {file} ({one_line(error)}): {advice}") from error
    finally:
        aside.unlink(missing_ok=True)


def read_kept(path: Path, load: Callable[[Path], Any]) -> Any:
    """What an earlier run has kept. Raises InputError if the file has been damaged since: it was written whole."""
    try:
        return load(path)
    except Exception as error:  # a damaged file fails in many ways
        message = f"{path} is damaged ({one_line(error)}): delete it, and the same command makes it again"
        raise InputError(message) from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While this lasts, no other run may write into the folder. Raises InputError if one does already."""
    make_folder(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        message = f"another run is writing into {folder}: wait for it, stop it, or choose another --output"
        raise InputError(message) from None
    try:
        for left in filter(Path.is_file, folder.rglob("*.[0-9]*.part")):  # by a run that was killed as it wrote
            left.unlink()
        yield
    finally:
        lock.release()


def fingerprint(*parts: object) -> str:
    """A short name for everything that a kept file depends on: bytes, arrays, and whatever has a telling repr."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode() if not hasattr(part, "__array__") and not isinstance(part, bytes) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def derive_seed(*parts: object) -> int:
    """A seed of its own for every use and task, so that none depends on what ran before it."""
    return int(fingerprint(*parts), 16) % 2**31


class Parser(argparse.ArgumentParser):
    """Its errors are InputErrors, too."""

    def error(self, message: str):
        raise InputError(message)


def check_output(output: Path) -> None:
    if output.is_file():
        raise InputError(f"--output {output}: is a file, a folder is needed")


def check_numbers(parsed: argparse.Namespace, least: dict[str, int]) -> None:
    """Raise InputError for an option that is given and is less than it may be, or no number that a seed may be."""
    for option, lowest in least.items():
        value = getattr(parsed, option)
        values = value if isinstance(value, list) else [value]
        if any(v is not None and not lowest <= v < 2**31 for v in values):
            raise InputError(f"--{option} {value}: a number from {lowest} to {2**31 - 1} is needed")
