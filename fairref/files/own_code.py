"""A user's own function, named on the command line as `path/to/file.py:name`. No file of a bundle is ever run."""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from torch import Tensor

from fairref.errors import UserError, said
from fairref.files.paths import expanded


@dataclass(frozen=True)
class OwnFunction:
    """A function of a user's file, and which file that was."""

    name: str
    path: Path  # absolute
    sha256: str  # of the file
    call: Callable[..., object]

    @property
    def place(self) -> str:
        """As a command line names it."""
        return f"{self.path}:{self.name}"

    @property
    def short(self) -> str:
        """The same without the file's folder."""
        return f"{self.path.name}:{self.name}"

    def to_dict(self) -> dict[str, str]:
        """What settings.json keeps of it."""
        return {"path": str(self.path), "name": self.name, "sha256": self.sha256}

    def __call__(self, *arguments: object) -> object:
        """Return the function's result; where it fails, the traceback is the user's own."""
        return self.call(*arguments)


def load_function(option: str, text: str) -> OwnFunction:
    """Return the function that `option` names as "file.py:name"; the file is run, once. Raises UserError.

    The file may import what lies beside it; only the file itself is hashed.
    """
    file, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier() or not file.endswith(".py"):
        raise UserError(f"{option} is {text!r}; expected path/to/file.py:name.")
    path = expanded(file).absolute()
    module, sha256 = load_file(option, path)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{option}: {path} has no function {name!r}; correct the name.")
    return OwnFunction(name, path, sha256, function)


def load_file(option: str, path: Path) -> tuple[ModuleType, str]:
    """Return the module of the file that `option` names, and the file's hash; it is run, once. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{option} names {path}, which is no file; correct the path.")
    try:
        sha256 = sha256_of(path)
        return _run(path, sha256), sha256
    except (Exception, SystemExit) as error:  # whatever a user's file does
        raise UserError(f"{option}: {path} can't be run ({said(error)}); correct the file.") from error


@cache
def _run(path: Path, sha256: str) -> ModuleType:
    """The module of a file, which is registered as others are: dataclasses, for one, look for it."""
    name = f"own_{path.stem}_{sha256[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def sha256_of(path: Path) -> str:
    """Return the hash of a file, which tells whether it is the same."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def describe(value: object) -> str:
    """Return what a user's function gave, in few words."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {describe(item)}" for name, item in value.items()) + "}"
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
