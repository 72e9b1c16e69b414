"""How long tests wait for processes: as long as this machine needs. A test that was cut off says so."""

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]
START = 2.2  # seconds in which two quiet cores start an interpreter and import what a run needs


@functools.cache
def slowness() -> float:
    """How many times as long as START a start takes here, at least 1. Measured once, from files that a first start
    has brought into memory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        began = time.monotonic()
        code = "import torch, fairref.training.loop"
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        took = time.monotonic() - began
    return max(1.0, took / START)


def patience(seconds: float) -> float:
    """The seconds in which a process ends here that ends within `seconds` on two quiet cores."""
    return seconds * slowness()


def outputs(processes: Sequence[subprocess.Popen], timeout: float) -> list[tuple[str | None, str | None]]:
    """(stdout, stderr) of each, once all have ended within patience(timeout); else the test fails."""
    allowed = patience(timeout)
    end = time.monotonic() + allowed
    try:
        return [process.communicate(timeout=max(0.0, end - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        running = [n for n, process in enumerate(processes) if process.poll() is None]
        return cut_off(processes, f"the timeout ended processes {running} after {allowed:.0f} s")


def ends(processes: Sequence[subprocess.Popen], timeout: float = 300) -> tuple[list[int], list[str]]:
    """Exit codes and what was said on stderr, as `outputs`."""
    said = [stderr for _, stderr in outputs(processes, timeout)]
    return [process.returncode for process in processes], said


def wait_for(
    condition: Callable[[], bool], processes: Sequence[subprocess.Popen] = (), seconds: float = 60
) -> None:
    """Waits until condition(), at most patience(seconds). The test fails at once where one of `processes`, which are
    to bring it about, has ended before."""
    allowed = patience(seconds)
    end = time.monotonic() + allowed
    while not condition():
        over = [process.returncode for process in processes if process.poll() is not None]
        if over and not condition():
            cut_off(processes, f"a process ended (code {over[0]}) before what was waited for came")
        if time.monotonic() >= end:
            cut_off(processes, f"the timeout ended the wait after {allowed:.0f} s")
        time.sleep(0.01)


def cut_off(processes: Sequence[subprocess.Popen], why: str) -> NoReturn:
    """Kills the processes and fails with what they had printed."""
    for process in processes:
        process.kill()
    printed = [process.communicate() for process in processes]
    text = [
        f"process {n}, {stream}:\n{said}"
        for n, both in enumerate(printed)
        for stream, said in zip(("stdout", "stderr"), both, strict=True)
        if said
    ]
    pytest.fail(
        f"cut off, not wrong: {why} (a start takes {slowness():.1f} times the seconds of two quiet cores); "
        + ("they had printed\n" + "\n".join(text) if text else "they had printed nothing"),
        pytrace=False,
    )


def done(command: Sequence[str], timeout: float = 120, **options) -> subprocess.CompletedProcess:
    """subprocess.run of a command, as text, within patience(timeout); else the test fails."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    ((stdout, stderr),) = outputs([process], timeout)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
