"""torchrun's processes. Without torchrun everything here is the identity and no process group is made."""

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fairref import settings
from fairref.errors import UserError, said

DTYPES = {name: getattr(torch, name) for name in settings.DTYPES}
QUIET = 3.0  # seconds of waiting for others before it is said
# with a process that is alive and silent; one that is dead is noticed at once
PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    """This process among all. Every method but `part` must be called by all processes at the same point."""

    rank: int = 0  # 0 .. world - 1; 0 prints and writes
    world: int = 1  # number of processes
    device: torch.device = torch.device("cpu")  # where tensors must be to travel

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def part(self, N: int, rank: int | None = None) -> range:
        """Which of N images are this process's: consecutive ones, so that gathering keeps the order."""
        rank = self.rank if rank is None else rank
        return range(N * rank // self.world, N * (rank + 1) // self.world)

    def gather(self, rows: Tensor, N: int) -> Tensor:
        """This process's rows (n, ...) of `part(N)` -> all rows (N, ...)."""
        if self.world == 1:
            return rows
        whole = torch.zeros(N, *rows.shape[1:], dtype=rows.dtype, device=self.device)
        part = self.part(N)
        whole[part.start : part.stop] = rows.to(self.device)
        _together(dist.all_reduce, whole)  # x + 0 is x exactly
        return whole.to(rows.device)

    def total(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sums over processes, in one message."""
        if self.world == 1:
            return tensors
        flat = torch.cat([tensor.reshape(-1).to(self.device) for tensor in tensors])
        _together(dist.all_reduce, flat)
        pieces = flat.split([tensor.numel() for tensor in tensors])
        return [piece.view(tensor.shape).to(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says so."""
        return bool(self.total([torch.tensor(float(flag))])[0]) if self.world > 1 else flag

    def share(self, text: str) -> str:
        """The first process's text, for all."""
        if self.world == 1:
            return text
        data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        length = torch.tensor(len(data), device=self.device)
        _together(dist.broadcast, length, 0)
        data = data if self.first else torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        _together(dist.broadcast, data, 0)
        return bytes(data.tolist()).decode()

    def first_does(self, work: Callable[[], object]) -> str:
        """What `work` returns, as text, which the first process alone does. Its UserError is raised in all."""
        answer = ""
        if self.first:
            try:
                answer = f"ok {work()}"
            except UserError as error:
                answer = str(error)
        answer = self.share(answer)
        if not answer.startswith("ok "):
            raise UserError(answer)
        return answer.removeprefix("ok ")

    def least(self, numbers: list[int]) -> list[int]:
        """The smallest of all processes' numbers, each by itself."""
        if self.world == 1:
            return numbers
        return self.gather(torch.tensor([numbers]), self.world).amin(0).tolist()

    def wait(self) -> None:
        """Until all processes are here: what the first one wrote before can be read after."""
        if self.world > 1:
            _together(dist.barrier)

    def stop(self) -> None:
        """Ends the process group."""
        if self.world > 1:
            dist.destroy_process_group()


def _together(collective, *arguments):
    """A collective call. Raises UserError where another process is gone, which would else be a library's complaint."""
    try:
        collective(*arguments)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"another process of this run has ended, see its message ({reason}); start all of them again, train.py"
            " with --resume."
        ) from error


def start(device: torch.device) -> tuple[Processes, torch.device]:
    """Joins torchrun's processes, if it started this one -> (processes, this process's device).

    On GPUs each process of a machine takes one, by its local rank.
    """
    world = _number_of("WORLD_SIZE", 1) if "WORLD_SIZE" in os.environ else 1
    if world == 1:
        return Processes(), device
    rank, port = _number_of("RANK", 0, world - 1), _number_of("MASTER_PORT", 1, 65_535)
    address = _set("MASTER_ADDR", "an address")
    # torch.distributed.nn's functions have the group as a default argument; imported later, as torch.optim does, they
    # would keep the group and its threads beyond `stop`, into the interpreter's end, where such a thread aborts
    import torch.distributed.nn

    if device.type == "cuda":
        device, there = torch.device("cuda", _number_of("LOCAL_RANK", 0)), torch.cuda.device_count()
        if device.index >= there:
            raise UserError(
                f"process {device.index} of this machine finds {there} GPUs; start no more than that."
            )
        torch.cuda.set_device(device)
    try:
        with _saying(
            f"waiting for {world} processes (WORLD_SIZE) at {address}:{port} (MASTER_ADDR, MASTER_PORT)"
        ):
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"WORLD_SIZE is {world}, but the processes don't meet at MASTER_ADDR {address}, MASTER_PORT {port}"
            f" ({said(error)}); start all of them with torchrun, or unset WORLD_SIZE."
        ) from error
    if rank:
        logging.getLogger("fairref").setLevel(logging.ERROR)  # notes are said once a run
    return Processes(rank, world, device), device


def _set(name, expected):
    """The value of one of torchrun's environment variables. Raises UserError."""
    value = os.environ.get(name, "").strip()
    if not value:
        state = "empty" if name in os.environ else "not set"
        raise UserError(
            f"The environment variable {name} is {state}; expected {expected}: start the processes with torchrun, or"
            " unset WORLD_SIZE, without which there is one."
        )
    return value


def _number_of(name, low, high=settings.MAX_COUNT):
    """The same of a whole number. Raises UserError."""
    value, expected = _set(name, "a number"), f"a whole number from {low} to {high}"
    if not (value.isascii() and value.isdigit() and low <= int(value[:20]) <= high):
        raise UserError(
            f"The environment variable {name} is {value!r}; expected {expected}: start the processes with torchrun, or"
            " unset WORLD_SIZE, without which there is one."
        )
    return int(value)


@contextmanager
def _saying(text: str) -> Iterator[None]:
    """Says on stderr what is waited for, once it takes long."""
    timer = threading.Timer(QUIET, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def choose_device(name: str | None) -> torch.device:
    """The torch device of an option's value, on which float32 is float32. Raises UserError."""
    # torch's default for convolutions, of 10 bits; matrix products have none
    torch.backends.cudnn.allow_tf32 = False
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device is {name!r}; expected cpu, cuda or cuda:NUMBER.") from None
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {name!r}; expected cpu, cuda or cuda:NUMBER.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device is {name!r} but torch finds {torch.cuda.device_count()} GPUs; use cpu.")
    return found
