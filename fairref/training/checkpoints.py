"""What a run leaves in its folder, so that it can be stopped at any time and resumed.

checkpoint-000200.safetensors, of iteration 200 and so on: adapter, moving average, AdamW's two averages, each tensor
under `adapter.`, `ema.`, `exp_avg.` or `exp_avg_sq.` and its name in the adapter; metadata: State's other fields.
settings.json: the resolved settings, and what the run was made from. metrics.jsonl: one line an iteration.
"""

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fairref.errors import UserError
from fairref.files.paths import expanded, only_numbers, read_json, write_file
from fairref.files.weights import finite, read, read_info, write
from fairref.settings import Recipe

SETTINGS, METRICS = "settings.json", "metrics.jsonl"
# what a run leaves, beside its settings
REMAINS = (
    *(METRICS, "*.safetensors", "evaluation*.json", "judged.csv", "sweep-*.json", "before_after.png"),
    *("grids", "tensorboard", "balance.*"),
)
CHECKPOINT = re.compile(r"checkpoint-(\d+)\.safetensors", re.ASCII)
NUMBERS = ("iteration", "updates", "best", "streak", "unusable")  # of a State, in a checkpoint's metadata


@dataclass
class State:
    """All that changes in a run."""

    adapter: nn.Module  # its parameters are the raw adapter
    ema: dict[str, Tensor]  # name -> moving average
    optimizer: torch.optim.AdamW
    iteration: int = 0  # iterations done
    updates: int = 0  # iterations that changed the adapter
    best: dict | None = None  # iteration, bias and CLIP-I of the best validation
    streak: int = 0  # validations in a row that were fair enough
    unusable: int = 0  # iterations in a row whose gradient was not finite

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name in the file -> parameter."""
        return dict(self.adapter.named_parameters())

    def tensors(self) -> dict[str, Tensor]:
        """Name in a checkpoint -> tensor."""
        tensors = {}
        for name, parameter in self.parameters().items():
            tensors[f"adapter.{name}"], tensors[f"ema.{name}"] = parameter.detach(), self.ema[name]
            for key in ("exp_avg", "exp_avg_sq"):
                zero = torch.zeros_like(parameter)
                tensors[f"{key}.{name}"] = self.optimizer.state.get(parameter, {}).get(key, zero)
        return tensors

    def not_finite(self) -> str | None:
        """The first tensor that holds what is no number, by its name."""
        return next((name for name, tensor in self.tensors().items() if not finite(tensor)), None)


def saved(folder: Path) -> list[Path]:
    """The folder's checkpoints, the newest last; another's copies beside them are none."""
    numbers = {path: CHECKPOINT.fullmatch(path.name) for path in folder.glob("checkpoint-*.safetensors")}
    return sorted((path for path, found in numbers.items() if found), key=lambda path: int(numbers[path][1]))


def save(folder: Path, state: State, keep: int = Recipe.keep) -> None:
    """Writes a checkpoint. Removes those before the newest `keep`, and broken ones after it. Raises UserError."""
    path = folder / f"checkpoint-{state.iteration:06d}.safetensors"
    write(path, state.tensors(), {name: getattr(state, name) for name in NUMBERS})
    files = saved(folder)
    n = files.index(path) + 1  # up to the new one
    for old in files[: max(n - keep, 0)] + files[n:]:
        old.unlink()


@torch.no_grad()
def restore(folder: Path, state: State) -> str:
    """Fills `state` from the folder's newest whole checkpoint -> what is to be said of broken ones after it.

    Without any checkpoint the state stays as it is. Raises UserError where all are broken.
    """
    broken: dict[Path, str] = {}
    for path in reversed(saved(folder)):
        try:
            tensors, info = _whole(path, state)
        except UserError as error:
            broken[path] = str(error).removesuffix("; get it again.").rstrip(".") + "."  # it is nowhere else
            continue
        for name in NUMBERS:
            setattr(state, name, info[name])
        for name, parameter in state.parameters().items():
            parameter.copy_(tensors[f"adapter.{name}"])
            state.ema[name] = tensors[f"ema.{name}"].to(parameter)
            state.optimizer.state[parameter] = {
                "step": torch.tensor(float(state.updates)),
                **{key: tensors[f"{key}.{name}"].to(parameter) for key in ("exp_avg", "exp_avg_sq")},
            }
        if not broken:
            return ""
        done = int(CHECKPOINT.fullmatch(next(iter(broken)).name)[1])
        repeated = _spans(range(state.iteration + 1, done + 1))
        taken = f"{path}: is taken instead; iterations that are repeated: {repeated}"
        return "\n".join([*broken.values(), taken])
    if broken:
        raise UserError(f"{next(iter(broken.values()))} No checkpoint before it is whole: start a new run.")
    return ""


def _whole(path, state):
    """The tensors and the metadata of a checkpoint that fits the state. Raises UserError."""
    tensors, info = read(path), read_info(path)
    wanted = {
        f"{kind}.{name}": p
        for kind in ("adapter", "ema", "exp_avg", "exp_avg_sq")
        for name, p in state.parameters().items()
    }
    if broken := [name for name, tensor in tensors.items() if not finite(tensor)]:
        raise UserError(f"{path}: {broken[0]} holds what is no number.")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != {name: p.shape for name, p in wanted.items()} or not _is_state(info):
        raise UserError(f"{path}: doesn't belong to the settings beside it.")
    return tensors, info


def _is_state(info):
    """Whether a checkpoint's metadata has all that `restore` sets."""
    if not set(NUMBERS) <= set(info):
        return False
    best = info["best"]
    if best is not None and not (
        isinstance(best, dict) and type(best.get("bias", best.get("loss"))) in (int, float)
    ):
        return False
    counts = [info[name] for name in NUMBERS if name != "best"]
    return all(type(n) is int and 0 <= n <= info["iteration"] for n in counts)


def new_folder(path: str | None, default: str) -> Path:
    """Makes a run's folder: `path`, which must hold no run; None: the first free of default, default-2, ...

    Raises UserError.
    """
    folder = expanded(default if path is None else path)
    if path is not None:
        if (folder / SETTINGS).exists():
            raise UserError(
                f"{folder}: holds another run; give another --out, or continue it with --resume {folder}."
            )
        remains = [path for pattern in REMAINS for path in folder.glob(pattern)]
        if remains:
            raise UserError(f"{folder}: holds {remains[0].name} of another run; give another --out.")
    try:
        if path is None:
            return _first_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: can't be made ({error.strerror}); give another --out.") from None
    return folder


def _first_free(default):
    """Makes the first of default, default-2, ... that is not there; two runs that start at once don't get the same."""
    for n in itertools.count(1):
        folder = default.with_name(f"{default.name}-{n}") if n > 1 else default
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            pass


def read_settings(folder: str | Path) -> dict[str, object]:
    """A run's settings.json. Raises UserError."""
    folder = expanded(folder)
    if not (folder / SETTINGS).is_file():
        raise UserError(f"{folder}: no {SETTINGS} in it, so no run to resume; give the folder of a run.")
    return read_json(folder / SETTINGS)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes from working in the folder meanwhile, where the system can. Raises UserError."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: a run or an evaluation is at work in it; end it first.") from None
        except OSError:
            pass  # some network folders know no locks
        yield
    finally:
        os.close(descriptor)


def append_metrics(folder: Path, metrics: Mapping[str, object]) -> None:
    """One more line of metrics.jsonl; what is not finite is null there."""
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(only_numbers(metrics), allow_nan=False) + "\n")


def cut_metrics(folder: Path, iterations: int) -> str:
    """Keeps the metrics of the first `iterations`, which "iteration" tells -> what is to be said of missing ones."""
    path, lines = folder / METRICS, {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        # half a line, or the zeros of a power cut
        with suppress(ValueError, LookupError, TypeError, RecursionError):
            lines[json.loads(line.decode())["iteration"]] = line
    kept = [i for i in range(iterations) if i in lines]
    if path.is_file():
        write_file(path, b"".join(lines[i] + b"\n" for i in kept))
    if lines and not iterations:
        return f"{folder}: has no checkpoint, so the run begins anew; {len(lines)} iterations are repeated"
    if len(kept) == iterations:
        return ""
    lost = _spans(sorted(set(range(iterations)) - set(kept)))
    return f'{path}: the lines of "iteration" {lost} are lost; the run goes on without them'


def _spans(numbers):
    """Rising numbers as a text: 3, 5 to 7."""
    known = set(numbers)
    ends = [n for n in numbers if n + 1 not in known]
    starts = [n for n in numbers if n - 1 not in known]
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))
