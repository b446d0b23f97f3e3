"""What a function's result depends on, as far as this project's code goes: the function, and all that it leads to."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import CodeType, ModuleType

from data.files import fingerprint

HERE = Path(__file__).parents[1]


def code_of(function: Callable) -> str:
    """A short name for the instructions of a function and of the project's functions and classes that it names.

    Help texts, docstrings and comments do not count, nor does the code of libraries.
    """
    seen: dict[int, object] = {}
    parts: list[object] = []

    def visit(thing: object) -> None:
        if isinstance(thing, functools.partial):
            visit(thing.func)
            for value in (*thing.args, *thing.keywords.values()):
                visit(value) if callable(value) else keep(value)
            parts.append(sorted(thing.keywords))
            return
        thing = inspect.unwrap(getattr(thing, "__func__", thing)) if callable(thing) else thing
        if id(thing) in seen or not _is_ours(thing):
            return
        seen[id(thing)] = thing
        if inspect.isclass(thing):
            for base in (*thing.__bases__, *vars(thing).values()):
                visit(getattr(base, "fget", None) or base)
        else:
            visit_code(thing.__code__, thing.__globals__)
            for value in thing.__defaults__ or ():
                visit(value) if callable(value) else keep(value)

    def visit_code(code: CodeType, names: dict) -> None:
        doc = code.co_consts[:1] if code.co_consts and isinstance(code.co_consts[0], str) else ()
        parts.append((code.co_code, code.co_names))
        for constant in code.co_consts[len(doc) :]:
            visit_code(constant, names) if isinstance(constant, CodeType) else keep(constant)
        found = [names[name] for name in code.co_names if name in names]
        modules = [value for value in found if isinstance(value, ModuleType) and _is_ours(value)]
        for value in found + [
            getattr(module, name) for module in modules for name in code.co_names if hasattr(module, name)
        ]:
            if callable(value):
                visit(value)
            elif not isinstance(value, ModuleType):
                keep(value)

    def keep(value: object) -> None:
        text = str(sorted(map(repr, value))) if isinstance(value, set | frozenset) else repr(value)
        if " at 0x" not in text:  # an address, new in every process
            parts.append(text)

    visit(function)
    return fingerprint(*parts)


def _is_ours(thing: object) -> bool:
    try:
        file = inspect.getfile(thing)
    except TypeError:  # built in, or no code at all
        return False
    return Path(file).is_relative_to(HERE) and ".venv" not in Path(file).parts
