"""Read files of weights as named tensors, and load them into networks: names, shapes and kinds must agree."""

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fairref.errors import UserError
from fairref.files.names import ignored, some
from fairref.files.paths import once, read_json, write_file
from fairref.progress import note

Network = TypeVar("Network", bound=nn.Module)
# what torch's reader says of a pickle that is more than tensors
CODE = re.compile(r"Unsupported (global|class)|allowed global|Trying to|Can only")
PICKLES = (".pth", ".pt", ".bin")
# the one key of our files' metadata; the order of several would differ between runs. Its JSON: {"info", "sha256"}, in
# older files info alone
INFO = "fairref"
# what follows the stem of a file of weights: .VARIANT.safetensors, or an index of a split one in either spelling
VARIANT = r"(?:\.([\w-]+))?\.safetensors(?:\.index\.json)?|\.safetensors\.index\.(\w+)\.json"


def index_of(path: Path) -> Path:
    """Return the path of the index that takes the place of a split file."""
    return path.parent / f"{path.name}.index.json"


def find(folder: Path, stem: str) -> Path:
    """Return the path of STEM.safetensors in a folder, or of a variant as STEM.fp16.safetensors; it may be split.

    Full precision comes first, then float16, bfloat16, and others in the order of their names. Where there is none the
    path is that of STEM.safetensors.
    """
    variants = {}
    for place in folder.glob(f"{stem}.*"):
        if match := re.fullmatch(VARIANT, place.name.removeprefix(stem)):
            variants[next(filter(None, match.groups()), "")] = None
    order = ("", "fp16", "bf16")
    names = sorted(variants, key=lambda v: (order.index(v) if v in order else len(order), v))
    best = names[0] if names else ""
    if best not in ("", "fp16"):
        note(f"{folder}: reads the weights of the variant {best!r}, for there are no others.")
    return folder / f"{stem}{best and '.'}{best}.safetensors"


def read(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU. Raises UserError; never unpickles.

    A split file has `PATH.index.json` in its place, with the file of each tensor; of a variant, as
    STEM.fp16.safetensors, it can also be called STEM.safetensors.index.fp16.json.
    """
    path = Path(path)
    stem, _, variant = path.name.removesuffix(".safetensors").rpartition(".")
    spellings = [index_of(path), path.with_name(f"{stem}.safetensors.index.{variant}.json")]
    index = next((index for index in spellings if index.is_file()), None)
    if not path.is_file() and index:
        return _read_split(index)
    if not path.is_file():
        raise UserError(f"{path}: no such file{_beside(path.parent)}; put it there or correct the path.")
    try:
        _check_header(path)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict
            info, digest = _metadata(path, file)
    except PermissionError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); change its permissions.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged safetensors file ({error}); get it again.") from error
    if digest is not None and digest != _digest(tensors, info):
        raise UserError(
            f"{path}: damaged: its SHA-256 is not the one that was written with it; get it again."
        )
    return tensors


def _beside(folder):
    """What else a folder has, for a message."""
    names = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".ckpt", ".pt", ".safetensors"))
    if not names:
        return ""
    is_pickle = not names[0].endswith(".safetensors")
    return f" ({names[0]} is {'a pickle, which could run code and is not read' if is_pickle else 'there'})"


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return what a safetensors file says beside its tensors."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def write(path: str | Path, tensors: dict[str, Tensor], info: Mapping[str, object]) -> None:
    """Write a safetensors file with `info` in its metadata, as `write_file` does. Raises UserError.

    Equal contents make equal bytes. `read` refuses a file that has changed since.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = _canonical({"info": info, "sha256": _digest(tensors, info)})
    try:
        # not save_file, whose files no other user may read
        write_file(Path(path), save(tensors, metadata={INFO: metadata}))
    except OSError as error:
        raise UserError(
            f"{path}: can't be written ({error.strerror}); make room there or choose another folder."
        ) from None


def read_info(path: str | Path) -> dict[str, object]:
    """Return the `info` that `write` put into the file; {} for a file that it did not write. Raises UserError."""
    with safe_open(path, "pt") as file:
        return _metadata(path, file)[0]


def _metadata(path, file):
    """The `info` of a file that `write` wrote, and its digest, which older files and others' lack."""
    text = (file.metadata() or {}).get(INFO, "{}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    keys = set(content) if isinstance(content, dict) else {"info"}
    if not keys & {"info", "sha256"}:
        return content, None
    if keys != {"info", "sha256"} or not isinstance(content["info"], dict) or text != _canonical(content):
        raise UserError(f"{path}: damaged: its metadata are not what was written; get it again.")
    return content["info"], content["sha256"]


def _canonical(content):
    return json.dumps(content, sort_keys=True)


def _digest(tensors, info):
    """The SHA-256 of all that a file holds: `info`, and each tensor's name, shape, kind and bytes."""
    digest = hashlib.sha256(_canonical(info).encode())
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    return digest.hexdigest()


def _add(digest, name, tensor):
    digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_judge(folder: str | Path, name: str = "model") -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a judge's folder and the path of their file. Raises UserError.

    The file is NAME.safetensors, or else the one .pth, .pt or .bin file. Names lose the `module.` of data-parallel
    training.
    """
    folder = Path(folder)
    path = folder / f"{name}.safetensors"
    others = sorted(p for p in folder.glob("*") if p.suffix in PICKLES)
    if path.is_file() or not others:
        return _plain(read(path)), str(path)
    if len(others) > 1:
        names = ", ".join(p.name for p in others)
        raise UserError(f"{folder}: found {names}; expected {path.name} or one such file: leave one there.")
    return _plain(read_pickled(others[0])), str(others[0])


def _plain(tensors):
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def read_pickled(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file that torch.save wrote, by torch's reader that runs no code.

    Of a training checkpoint it takes "state_dict" or "model". Raises UserError for a file that needs more than that.
    """
    try:
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
            raise UserError(
                f"{path}: {damaged} in it has another checksum than it should; get the file again."
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # between torch's advice to read it unsafely and the address of its documentation
        reason = re.split(r"WeightsUnpickler error: |trusted source\.", str(error))[-1].split(
            "Check the doc"
        )[0]
        if not CODE.search(reason):
            line = next(iter(reason.strip().splitlines()), "no pickle")
            raise UserError(f"{path}: can't be read ({line}); get the file again.") from None
        raise UserError(
            f"{path}: holds more than tensors, which could run code and isn't read; where you trust it, write its"
            ' tensors anew: safetensors.torch.save_file(network.state_dict(), "model.safetensors").'
        ) from None
    except (MemoryError, UserError):
        raise
    except Exception as error:  # of a damaged file torch's reader raises almost any
        reason = (
            f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
        )
        raise UserError(f"{path}: can't be read ({reason}); get the file again.") from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(v, Tensor) for v in content.values())
    ):
        raise UserError(f"{path}: found no map of names to tensors in it; save the network's state_dict().")
    return content


def _read_split(index):
    """Return the tensors of the files in an index's "weight_map"; each must hold exactly the tensors listed for it."""
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
    """Raise a UserError that says what the file is, unless it is whole: 8 bytes (length of the JSON), JSON, data."""
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
    expected = 8 + length + _data_bytes(header, path)
    if size < expected:
        raise UserError(f"{path}: truncated: {size} bytes, expected {expected}; get the file again.")


def _data_bytes(header, path):
    """How many bytes of data the header speaks of; 0 for one that the library refuses by itself."""
    try:
        entries = json.loads(header or "{}", object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged safetensors file (its header: {error}); get it again.") from None
    try:
        ends = (e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__")
        return max((end for end in ends if type(end) is int), default=0)
    except (LookupError, TypeError, AttributeError):
        return 0


def load_strict(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy the tensors into the module's parameters and buffers; `source` names the file in errors.

    Raises UserError as `check_fits` does, and unless all values are finite. A module on the meta device, which has no
    memory yet, is placed on the CPU.
    """
    check_fits(module, tensors, source)
    wanted = module.state_dict()
    # copies, because the tensors that safetensors reads are backed by the file
    copies = {key: tensors[key].to(value.dtype, copy=True) for key, value in wanted.items()}
    if broken := [key for key, tensor in copies.items() if not finite(tensor)]:
        raise UserError(f"{source}: {some(broken)} holds what is no number; get or train the weights again.")
    module.load_state_dict(copies, strict=True, assign=any(value.is_meta for value in wanted.values()))


def check_fits(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Raise a UserError unless names, shapes and kinds (floating or not) of the module and the tensors agree."""
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in tensors]
    unknown = [key for key in tensors if key not in wanted and not ignored(key)]
    if missing or unknown:
        difference = " and ".join(
            f"{len(keys)} {what} ({some(keys)})"
            for keys, what in ((missing, "tensors missing"), (unknown, "unknown tensors"))
            if keys
        )
        raise UserError(
            f"{source}: found {difference}; use the configuration and weights that belong together."
        )
    wrong = [
        f"{key} is {_kind(tensors[key])}, expected {_kind(wanted[key])}"
        for key in wanted
        if _kind(tensors[key]) != _kind(wanted[key])
    ]
    if wrong:
        raise UserError(f"{source}: {some(wrong)}; use the configuration and weights that belong together.")


def finite(tensor: Tensor) -> bool:
    """Return whether no value of a tensor is NaN or infinite."""
    # if any value is NaN, so are the smallest and the largest
    ends = torch.stack(torch.aminmax(tensor)) if tensor.numel() else tensor
    return bool(torch.isfinite(ends).all())


def _kind(tensor):
    kind = "float" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)}"


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors under their names here, rounded to float16, as hexadecimal digits.

    All layouts of one model's file, in float32 or float16, have the same one; bfloat16 loses bits that count.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        _add(digest, name, tensor.half() if tensor.is_floating_point() else tensor)
    return digest.hexdigest()


def fingerprint_of(part: object) -> str:
    """Return the fingerprint of a part of a bundle, "" for one without tensors.

    That of a frozen network is of its tensors as they were loaded, computed once. Several networks or tensors, in a
    tuple, a dict or a dataclass, have one of their own fingerprints.
    """
    if hasattr(part, "fingerprint"):
        return part.fingerprint
    if isinstance(part, nn.Module):
        part.fingerprint = fingerprint(part.state_dict())
        return part.fingerprint
    if isinstance(part, Tensor):
        return fingerprint({"": part})
    held = part.values() if isinstance(part, Mapping) else part if isinstance(part, tuple | list) else ()
    if is_dataclass(part) and not isinstance(part, type):
        held = [getattr(part, f.name) for f in fields(part)]
    found = [made for made in map(fingerprint_of, held) if made]
    return hashlib.sha256(" ".join(found).encode()).hexdigest() if len(found) > 1 else "".join(found)


def ready(network: Network, device: torch.device | str, dtype: torch.dtype) -> Network:
    """Return the network itself, frozen: on the device, in the dtype, in eval mode and without requires_grad."""
    if dtype == torch.bfloat16:  # from which a fingerprint can't be told any more
        network.fingerprint = fingerprint(network.state_dict())
    # channels last: convolutions are 10 to 25 % faster, on CPUs too
    network = network.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    return network.eval().requires_grad_(False)
