"""Paths as users write them; files as texts and JSON, and the one way in which a file is written."""

import errno
import json
import math
import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import SequenceMatcher
from pathlib import Path

from fairref.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# keys of diffusers' and transformers' files that are no mistyped others
ALIKE = {
    *("bos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "max_length", "add_special_tokens"),
    *("cross_attention_norm", "timestep_scaling", "threshold", "solver_p", "clip_sample_range"),
}
ALIKE_FROM = 0.81  # likeness from which on one name is taken for another, mistyped
SHORT = 6  # letters of a name that may be what is left of another


def expanded(path: str | Path) -> Path:
    """Return a path with ~ written out. Raises UserError for an empty path and for an unknown user."""
    if not str(path):
        raise UserError("An empty path was given; name a file or folder.")
    if "\0" in str(path):
        raise UserError(f"{str(path)!r}: no file has such a name; correct the path.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {error} Write the path out.") from None


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file or a pipe, without a byte order mark. Raises UserError."""
    path = Path(path)
    try:
        if stat.S_ISCHR(path.stat().st_mode) or stat.S_ISBLK(path.stat().st_mode):
            raise UserError(f"{path}: is a device; give a file.")
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: can't be read (no such file); put the file there or correct the path."
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path}: can't be read (it is a folder); give a file.") from None
    except PermissionError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); change its permissions.") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); correct the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no UTF-8 text ({error.reason}); get or write the file again.") from None
    except ValueError as error:  # of a path that no file can have
        raise UserError(f"{str(path)!r}: can't be read ({error}); correct the path.") from None


def read_json(path: str | Path, finite: bool = True) -> dict[str, object]:
    """Return the object of a JSON file, in which no key stands twice. Raises UserError.

    Its numbers must be finite, unless it is of a library that writes others, as diffusers does.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: is a device or a pipe; give a file.")
    text = read_text(path)
    try:
        kinds = {"parse_constant": _no_number, "parse_float": _float} if finite else {}
        d = json.loads(text, object_pairs_hook=once, **kinds)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}: not JSON ({reason}); get or write the file again.") from error
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


def _float(text):
    """The float64 of a JSON number. Raises ValueError where there is none."""
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _no_number(text):
    raise ValueError(f"{text[:40]} is no finite number")


def write_json(path: Path, content: Mapping[str, object] | Sequence[object]) -> None:
    """Write a JSON file as `write_file` does. Raises ValueError for a number that is not finite: JSON has none."""
    write_file(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_file(path: Path, data: bytes) -> None:
    """Write a file, all of it or nothing: under a temporary name beside it, which is then renamed.

    A link stays, and the file that it names is written. What is there and no regular file, as a pipe or /dev/stdout,
    is written to. Raises OSError with the path.
    """
    try:
        stream = _stream_of(path)
        if stream is not None:
            for printed in filter(None, (sys.stdout, sys.stderr)):
                printed.flush()
            with open(stream, "wb", closefd=False) as file:
                file.write(data)
        elif (mode := _mode(path)) and not stat.S_ISREG(mode):
            with path.open("wb") as file:
                file.write(data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error


def _replace(path, data):
    temporary = path.with_name(path.name + ".part")
    with _alone(temporary) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name with nothing in it
            if fcntl is None:
                file.close()  # Windows renames no open file
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


@contextmanager
def _alone(path):
    """The empty file, new or left by a process that was killed, which no other process has meanwhile."""
    while True:
        with path.open("ab") as file:
            if fcntl is not None:
                with suppress(OSError):  # some network folders know no locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, path):  # else who had it has renamed it
                file.truncate(0)
                yield file
                return


def _is_at(file, path):
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def _stream_of(path):
    """The descriptor, stdout's or stderr's, of which the path is another name, as /dev/stdout; None for other files.

    What is printed and what is written would else overwrite each other.
    """
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
    return None


def check_writable(path: Path) -> None:
    """Refuse a file that `write_file` can't write, before the work of which it shall hold the result.

    Raises UserError.
    """
    path = Path(path)
    if os.path.islink(path) or os.path.isdir(path.parent):
        try:
            return _try_to_write(path)
        except OSError as error:
            raise UserError(f"{path}: can't be written ({error.strerror}); give another file.") from None
    raise UserError(f"{path}: its folder doesn't exist; make it first.")


def check_new_folder(path: Path) -> None:
    """Refuse a folder that can't be made at this path, or not filled, before the work. Leaves nothing.

    Raises UserError.
    """
    try:
        place = path
        while _mode(place) == 0 and place != place.parent:
            place = place.parent
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise UserError(f"{path}: can't be made ({error.strerror}); give another folder.") from None


def _try_to_write(path):
    """Leaves everything as it is. Raises UserError or OSError."""
    mode, target = _mode(path), Path(os.path.realpath(path))
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a folder; give a file.")
    if not os.path.isdir(target.parent):
        raise UserError(f"{path}: its folder doesn't exist; make it first.")
    if mode and not stat.S_ISREG(mode):
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return
    temporary = target.with_name(target.name + ".part")
    with _alone(temporary):
        temporary.unlink()


def _mode(path):
    """What kind of file a path, or the link at it, leads to; 0 where there is none yet. Raises OSError."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return 0


def only_numbers(value: object) -> object:
    """The same JSON content with null in the place of what is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: only_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [only_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
