"""Paths as users write them, and JSON files."""

import errno
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from fairref.errors import UserError


def expanded(path: str | Path) -> Path:
    """Return a path with ~ written out. Raises UserError for an empty path and for an unknown user."""
    if not str(path):
        raise UserError("An empty path was given; name a file or folder.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {error} Write the path out.") from None


def read_json(path: str | Path) -> dict[str, object]:
    """Return the object of a JSON file. Raises UserError."""
    path = Path(path)
    try:
        d = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); put the file there.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); get or write the file again.") from error
    if not isinstance(d, dict):
        raise UserError(f"{path}: found a {type(d).__name__}, expected a JSON object; correct the file.")
    return d


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


def check_writable(path: str | Path) -> None:
    """Raise UserError unless a file or folder can be written at this path, also in folders that are yet to be made.

    Nothing is left behind, and what is there stays as it is.
    """
    place = Path(path)
    try:
        while True:
            try:
                place.stat()
                break
            except FileNotFoundError:
                place = place.parent
        if place.is_dir():
            tempfile.TemporaryFile(dir=place).close()
        elif not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"{path}: can't be written ({error.strerror}); change the permissions or choose another place."
        ) from None
