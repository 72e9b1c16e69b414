"""Paths; files of weights -> named tensors -> networks, strictly; and JSON."""

import json
import os
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fairref.errors import UserError
from fairref.weights_names import ignored, some

PICKLES = (".pth", ".pt", ".bin")
INFO = "fairref"  # the one key of our files' metadata: several would come in an order of their own at each run


def expanded(path: str | Path) -> Path:
    """A path with ~ written out. Raises UserError for one that is empty or names no user."""
    if not str(path):
        raise UserError("An empty path was given; name a file or folder.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {error} Write the path out.") from None


def read_json(path: str | Path) -> dict:
    """The object of a JSON file. Raises UserError."""
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


def index_of(path: Path) -> Path:
    """Where the index of a split file is, which then stands in the file's place."""
    return path.parent / f"{path.name}.index.json"


def exists(path: Path) -> bool:
    """Whether `read` finds the file, whole or split."""
    return path.is_file() or index_of(path).is_file()


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises UserError; never unpickles.

    Where the file is split, `PATH.index.json` stands in its place and names the files that hold each tensor.
    """
    path = Path(path)
    if not path.is_file() and index_of(path).is_file():
        return _read_split(index_of(path))
    if not path.is_file():
        pickles = sorted(p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".ckpt", ".pt"))
        beside = f" ({pickles[0]} is a pickle, which could run code and isn't read)" if pickles else ""
        raise UserError(f"{path}: no such file{beside}; put the safetensors file there or correct the path.")
    try:
        _check_header(path)
        return load_file(path, device="cpu")
    except PermissionError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); change its permissions.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged safetensors file ({error}); get it again.") from error


def write(path: str | Path, tensors: dict[str, Tensor], info: dict) -> None:
    """A safetensors file with `info` as its metadata, by way of a temporary name. Raises UserError.

    Equal contents make equal bytes.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with temporary.open("wb") as file:  # not save_file, whose files no other user may read
            file.write(save(tensors, metadata={INFO: json.dumps(info, sort_keys=True)}))
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name with nothing in it
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: can't be written ({error}); make room there or choose another folder."
        ) from None


def read_info(path: str | Path) -> dict:
    """What `write` was given as `info`; {} for another's file."""
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(INFO, "{}")
    try:
        info = json.loads(text)
    except ValueError:
        return {}
    return info if isinstance(info, dict) else {}


def write_json(path: Path, content: dict | list) -> None:
    """A JSON file, in a folder that is made if need be, by way of a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_judge(folder: str | Path, name: str = "model") -> tuple[dict[str, Tensor], str]:
    """The tensors of NAME.safetensors in a judge's folder, else of the one .pth, .pt or .bin file there, and its path.

    Names lose the `module.` that data-parallel training puts before them. Raises UserError.
    """
    folder = Path(folder)
    path = folder / f"{name}.safetensors"
    others = sorted(p for p in folder.glob("*") if p.suffix in PICKLES)
    if path.is_file() or not others:
        return _plain(read(path)), str(path)
    if len(others) > 1:
        found = ", ".join(p.name for p in others)
        raise UserError(f"{folder}: found {found}; expected {path.name} or one such file: leave one there.")
    return _plain(read_pickled(others[0])), str(others[0])


def _plain(tensors):
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def read_pickled(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote, by torch's reader that builds tensors and runs no code.

    A training checkpoint's "state_dict" or "model" counts. Raises UserError for a file that needs more than that.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: holds more than tensors, which could run code and isn't read; where you trust it, write its"
            ' tensors anew: safetensors.torch.save_file(network.state_dict(), "model.safetensors").'
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: can't be read ({reason}); get the file again.") from None
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"{path}: found no map of names to tensors in it; save the network's state_dict().")
    return found


def _read_split(index):
    """The tensors that an index's "weight_map" finds in its neighbours: exactly those, from exactly there."""
    place = read_json(index).get("weight_map")
    files = place.values() if isinstance(place, dict) else [None]
    if not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise UserError(f'{index}: "weight_map" is not a map of tensors to files beside it; get it again.')
    tensors = {}
    for name in sorted(set(place.values())):
        part, expected = read(index.with_name(name)), {key for key, file in place.items() if file == name}
        if set(part) != expected:
            raise UserError(
                f"{index.with_name(name)}: its tensors are not those that {index.name} lists, for one"
                f" {min(set(part) ^ expected)}; get all files of one download."
            )
        tensors |= part
    return tensors


def _check_header(path):
    """Says what a file is that isn't whole safetensors: 8 bytes with the length of JSON, JSON, data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        file.seek(8)
        header = file.read(length) if start[8:9] == b"{" and 8 + length <= size else b""
    if start[8:9] != b"{":  # first, for a length may begin with the same bytes as a pickle
        if start.startswith((b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))):
            raise UserError(f"{path}: a pickle, which could run code and isn't read; make it safetensors.")
        if start.startswith(b"version https://git-lfs"):
            raise UserError(f"{path}: a Git LFS pointer instead of the weights; run `git lfs pull` there.")
        raise UserError(f"{path}: not a safetensors file ({size} bytes); get or convert the file again.")
    expected = 8 + length + _data_bytes(header)
    if size < expected:
        raise UserError(f"{path}: truncated: {size} bytes, expected {expected}; get the file again.")


def _data_bytes(header):
    try:
        entries = json.loads(header or "{}")
        return max((e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        return 0  # damaged in another way, which the library reports


def load_strict(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copies the tensors into the module's parameters and buffers; `source` names the file in errors.

    Keys must be the same both ways, and so must each shape and each kind (floating or not), and all values finite;
    else UserError.
    A module on the meta device, which has no memory yet, gets its own on the CPU.
    """
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in tensors]
    unknown = [key for key in tensors if key not in wanted and not ignored(key)]
    if missing or unknown:
        found = " and ".join(
            f"{len(keys)} {what} ({some(keys)})"
            for keys, what in ((missing, "tensors missing"), (unknown, "unknown tensors"))
            if keys
        )
        raise UserError(f"{source}: found {found}; use the configuration and weights that belong together.")
    wrong = [
        f"{key} is {_kind(tensors[key])}, expected {_kind(wanted[key])}"
        for key in wanted
        if _kind(tensors[key]) != _kind(wanted[key])
    ]
    if wrong:
        raise UserError(f"{source}: {some(wrong)}; use the configuration and weights that belong together.")
    # copies, for what safetensors reads is backed by the file
    copies = {key: tensors[key].to(value.dtype, copy=True) for key, value in wanted.items()}
    if broken := [key for key, tensor in copies.items() if not finite(tensor)]:
        raise UserError(f"{source}: {some(broken)} holds what is no number; get or train the weights again.")
    module.load_state_dict(copies, strict=True, assign=any(value.is_meta for value in wanted.values()))


def finite(tensor: Tensor) -> bool:
    """Whether all of a tensor's values are numbers, and none infinite."""
    ends = torch.stack(torch.aminmax(tensor)) if tensor.numel() else tensor  # NaN, too, is an end where there is one
    return bool(torch.isfinite(ends).all())


def _kind(tensor):
    kind = "float" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)}"
