"""What a function's result depends on, as far as this project's code goes: the function, and all that it leads to."""

import inspect
import itertools
import sys
from collections.abc import Callable
from functools import partial
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
        """A function or class of ours leads on, a library's does not; of a value, what it shows of itself counts."""
        thing = getattr(thing, "__func__", thing)  # of a method
        if isinstance(thing, partial):
            visit([thing.func, *thing.args, *thing.keywords.items()])
        elif type(thing) in (list, tuple, dict):
            for part in itertools.chain(*thing.items()) if isinstance(thing, dict) else thing:
                visit(part)
        elif not callable(thing):
            text = str(sorted(map(repr, thing))) if isinstance(thing, set | frozenset) else repr(thing)
            if not isinstance(thing, ModuleType) and " at 0x" not in text:  # an address, new in every process
                parts.append(text)
        elif is_ours(thing := inspect.unwrap(thing)) and id(thing) not in seen:
            seen[id(thing)] = thing
            if inspect.isclass(thing):
                members = [getattr(member, "fget", None) or member for member in vars(thing).values()]
                members = [getattr(member, "__func__", member) for member in members]  # of class methods
                for part in filter(callable, (*thing.__bases__, *members)):
                    visit(part)
            else:
                visit_code(thing.__code__, thing.__globals__)
                visit([*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).items()])

    def visit_code(code: CodeType, names: dict) -> None:
        parts.append((code.co_code, code.co_names))
        for constant in code.co_consts[1 if has_docstring(code) else 0 :]:
            visit_code(constant, names) if isinstance(constant, CodeType) else visit(constant)
        found = [names[name] for name in code.co_names if name in names]
        modules = [value for value in found if isinstance(value, ModuleType) and is_ours(value)]
        found += [vars(module)[name] for module in modules for name in code.co_names if name in vars(module)]
        for value in found:
            visit(value)

    visit(function)
    return fingerprint(*parts)


def has_docstring(code: CodeType) -> bool:
    if sys.version_info >= (3, 13):
        return bool(code.co_flags & inspect.CO_HAS_DOCSTRING)
    return code.co_name[0] != "<" and bool(code.co_consts) and isinstance(code.co_consts[0], str)  # not a generator's


def is_ours(thing: object) -> bool:
    try:
        file = inspect.getfile(thing)
    except TypeError:  # built in, or no code at all
        return False
    return Path(file).is_relative_to(HERE) and ".venv" not in Path(file).parts
