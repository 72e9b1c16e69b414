"""Settings from a JSON file -> values of the types that a dataclass or a table asks for. Whatever else is refused."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import UnionType
from typing import TypeVar, get_args, get_origin

from fairref.errors import UserError
from fairref.files.paths import refuse_mistyped

MAX_NUMBER = 100_000  # no size of a network is larger; below it no product of sizes overflows
MAX_ITEMS = 64  # of a list
SHOWN = 80  # characters of a value in a message

Config = TypeVar("Config")  # a settings dataclass


def read_values(kinds: Mapping[str, object], d: Mapping[str, object], source: str) -> dict[str, object]:
    """Return those of the JSON object `d` that `kinds` names, as values of their types; lists become tuples.

    Types are bool, int, float, str, tuples of these, and unions. `source` names the file. Raises UserError.
    """
    values = {}
    for key, kind in kinds.items():
        if key in d:
            value = tuple(d[key]) if isinstance(d[key], list) else d[key]
            if not _fits(value, kind):
                raise UserError(
                    f"{source}: found {key} = {shown(d[key])}, expected {_words(kind)}; correct it."
                )
            values[key] = value
    return values


def read_dataclass(cls: type[Config], d: Mapping[str, object], source: str) -> Config:
    """Return the dataclass with the values of `d`, by its fields' types; other keys are ignored. Raises UserError."""
    refuse_mistyped([field.name for field in fields(cls)], d, source)
    values = read_values({field.name: field.type for field in fields(cls)}, d, source)
    lacking = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
    if lacking:
        raise UserError(f"{source}: found no key {lacking[0]!r}, expected it to be set; correct it.")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def shown(value: object) -> str:
    """Return a value as a message shows it."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested deep; an int of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _fits(value, kind):
    if isinstance(kind, UnionType):
        return any(_fits(value, k) for k in get_args(kind))
    if get_origin(kind) is tuple:
        first, *rest = get_args(kind)
        kinds = (first,) * len(value) if rest == [...] and isinstance(value, tuple) else (first, *rest)
        sized = isinstance(value, tuple) and len(value) == len(kinds) <= MAX_ITEMS
        return sized and all(map(_fits, value, kinds))
    if kind is float:
        return type(value) in (int, float) and -MAX_NUMBER <= value <= MAX_NUMBER and math.isfinite(value)
    return type(value) is kind and (kind is not int or -MAX_NUMBER <= value <= MAX_NUMBER)


def _words(kind):
    if isinstance(kind, UnionType):
        return " or ".join(map(_words, get_args(kind)))
    if get_origin(kind) is tuple:
        first, *rest = get_args(kind)
        return f"a list of {'' if rest == [...] else f'{len(rest) + 1} values, each '}{_words(first)}"
    limit = f"{MAX_NUMBER:,}"
    return {
        int: f"a whole number up to {limit}",
        float: f"a number up to {limit}",
        bool: "true or false",
        str: "a text",
    }[kind]
