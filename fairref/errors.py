"""The one exception for a user's mistake, and the sentence for every other error that ends a command.

A user's mistake may also be an argument of the wrong type, which `typed` refuses.
"""

import errno
import functools
import inspect
import os
import sysconfig
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from typing import ParamSpec, TypeVar

DEBUG = "FAIRREF_DEBUG"  # the environment variable with which an error keeps its traceback
LONGEST = 2000  # characters of a sentence
REMEDY = "correct the config.json or use another checkpoint"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PACKAGE = Path(__file__).parent
STANDARD, LIBRARIES = Path(sysconfig.get_path("stdlib")), {"site-packages", "dist-packages"}
P, R = ParamSpec("P"), TypeVar("R")


class UserError(ValueError):
    """One sentence: which file or option, what was found, what was expected, what to do."""


def is_debugging() -> bool:
    """Whether errors keep their traceback."""
    return os.environ.get(DEBUG, "0") not in ("", "0")


def explain(error: Exception) -> tuple[int, str]:
    """The exit code and the sentence of an error: 2 for what a user can mend, 1 for a defect."""
    if isinstance(error, UserError):
        return 2, one_line(str(error))
    if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("fairref."):
        folder = error.name.replace(".", "/")
        return 2, f"This needs {folder}, which this copy of fairref lacks; get it again."
    if isinstance(error, OSError) and error.errno and (error.filename or error.errno in FULL):
        return 2, of_files(error)
    if is_of_memory(error):
        return (
            2,
            f"not enough memory ({said(error)}); take fewer images at once, in train.py by --micro-batch.",
        )
    place, is_own = place_of(error)
    if is_own:
        return (
            2,
            f"{place}: your own code ends with {said(error)}; correct it ({DEBUG}=1 shows the traceback).",
        )
    return (
        1,
        f"{said(error)} at {place}: a defect of fairref; {DEBUG}=1 shows the traceback, for a report of it.",
    )


def of_files(error: OSError) -> str:
    """The sentence for a full disk, or for a file that may not be read or written."""
    name = error.filename or "a file"
    if error.errno in FULL:
        return f"{name}: can't be written ({error.strerror}); make room."
    if isinstance(error, FileNotFoundError):
        return f"{name}: is not there, or no longer ({error.strerror}); put it back or choose another place."
    why = f"can't be read or written ({error.strerror})"
    return f"{name}: {why}; change its permissions or choose another place."


def is_of_memory(error: Exception) -> bool:
    """Whether there was not enough of it, on the device (torch.OutOfMemoryError, by its name) or here."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def said(error: BaseException) -> str:
    """An exception's kind and the first line of what it says."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # a user's own kind of error, which has a fault itself
        lines = []
    return one_line(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


def place_of(error: BaseException) -> tuple[str, bool]:
    """Where an error comes from, "file:line", and whether that is a user's own code, called by fairref.

    Libraries are no place: it is who called them.
    """
    place, is_own, entered = "an unknown place", False, False
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if PACKAGE in path.parents:
            entered = True
            if not is_own:
                place = f"{PACKAGE.name}/{path.relative_to(PACKAGE)}:{frame.lineno}"
        elif entered and path.is_file() and STANDARD not in path.parents and not LIBRARIES & {*path.parts}:
            place, is_own = f"{path}:{frame.lineno}", True
    return place, is_own


def one_line(text: str) -> str:
    """A text in one line; the middle of one that is very long is left out."""
    text = " ".join(text.splitlines())
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def require(condition: bool, found: str, expected: str, remedy: str = REMEDY) -> None:
    """Raise a UserError unless `condition` holds."""
    if not condition:
        raise UserError(f"found {found}, expected {expected}; {remedy}.")


def is_count(value: object) -> bool:
    """Whether `value` is a positive int (bool is not a count)."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_positive(value: object) -> bool:
    """Whether `value` is a positive number."""
    return is_count(value) or (isinstance(value, float) and value > 0)


def are_counts(values: object) -> bool:
    """Whether `values` is a non-empty tuple of positive ints."""
    return isinstance(values, tuple) and len(values) > 0 and all(is_count(value) for value in values)


NUMBERS = {  # type of a field -> the test that its value must pass, and that test in words
    int: (is_count, "a positive whole number"),
    float: (is_positive, "a positive number"),
    tuple[int, ...]: (are_counts, "a list of positive whole numbers"),
    int | tuple[int, ...]: (lambda value: is_count(value) or are_counts(value), "positive whole numbers"),
}


def require_numbers(config: object) -> None:
    """Raise a UserError unless each field of the dataclass `config` passes the test of its type in NUMBERS."""
    for field in fields(config):
        if field.type in NUMBERS:
            value = getattr(config, field.name)
            holds, expected = NUMBERS[field.type]
            require(holds(value), f"{field.name} = {value!r}", expected)


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with a UserError for an argument that is not of the type that its signature says."""
    signature, hints = inspect.signature(function), typing.get_type_hints(function)

    @functools.wraps(function)
    def checked(*args: P.args, **options: P.kwargs) -> R:
        for name, value in signature.bind(*args, **options).arguments.items():
            parameter = signature.parameters[name]
            if parameter.kind != parameter.VAR_KEYWORD and not _is(value, hints[name]):
                expected = parameter.annotation
                expected = getattr(expected, "__name__", expected)
                raise UserError(f"{function.__name__}: {name} is {value!r:.200}; expected {expected}.")
        return function(*args, **options)

    return checked


def _is(value, kind):
    """Whether a value is of an annotated type; a whole number is a number, too, and a bool is neither."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_is(value, one) for one in inside)
    if origin is Sequence:
        return isinstance(value, list | tuple) and all(_is(one, inside[0]) for one in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            _is(k, inside[0]) and _is(v, inside[1]) for k, v in value.items()
        )
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, kind)
