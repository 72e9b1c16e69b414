"""Paths as users write them, and JSON files."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path

from fairref.errors import UserError

# keys of diffusers' and transformers' files that are no mistyped others
ALIKE = {
    *("bos_token_id", "pad_token_id", "max_length"),
    *("cross_attention_norm", "timestep_scaling", "threshold", "solver_p", "clip_sample_range"),
}
ALIKE_FROM = 0.81  # likeness from which on one name is taken for another, mistyped
SHORT = 6  # letters of a name that may be what is left of another


def expanded(path: str | Path) -> Path:
    """Return a path with ~ written out. Raises UserError for an empty path and for an unknown user."""
    if not str(path):
        raise UserError("An empty path was given; name a file or folder.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {error} Write the path out.") from None


def read_text(path: str | Path) -> str:
    """Return a text in UTF-8, without the mark that some editors put first. Raises UserError."""
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); put the file there.") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); change its permissions.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); get or write the file again.") from error


def read_json(path: str | Path) -> dict[str, object]:
    """Return the object of a JSON file, in which no key stands twice. Raises UserError."""
    path = Path(path)
    text = read_text(path)
    try:
        d = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); get or write the file again.") from error
    if not isinstance(d, dict):
        raise UserError(f"{path}: found a {type(d).__name__}, expected a JSON object; correct the file.")
    return d


def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return the object of a JSON text; an `object_pairs_hook`. Raises ValueError for a key that stands in it twice."""
    d = dict(pairs)
    if len(d) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands in it twice")
    return d


def refuse_mistyped(names: Iterable[str], d: Mapping[str, object], source: str) -> None:
    """Raise a UserError for a key that is almost one of `names`, where that one is absent; `source` names the file."""
    names = list(names)
    others = [key for key in d if key not in ALIKE and key not in names]
    for name in names:
        mistyped = "" if name in d else next((key for key in others if _is_almost(key, name)), "")
        if mistyped:
            raise UserError(f"{source}: found key {mistyped!r}, expected {name!r}; correct its spelling.")


def _is_almost(key, name):
    """Whether two names are alike, or one is the other with a piece put into it."""
    short, long = sorted((key.lower(), name.lower()), key=len)
    pieces = (long.startswith(short[:i]) and long.endswith(short[i:]) for i in range(1, len(short)))
    return SequenceMatcher(None, short, long).ratio() >= ALIKE_FROM or (len(short) >= SHORT and any(pieces))


def write_json(path: Path, content: Mapping[str, object] | Sequence[object]) -> None:
    """Write a JSON file under a temporary name, then rename it. Makes the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def only_numbers(value: object) -> object:
    """The same JSON content with null in the place of what is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: only_numbers(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
