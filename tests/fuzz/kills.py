"""Runs that are killed (kill -9) again and again end as one that nobody disturbed: equal bytes.

    python -m tests.fuzz.kills --kills 100 --seed 0

Half of the kills come at a random time, half of them at a random write: before or after a file is synchronised,
renamed, removed or appended to. Each run is resumed until it ends, then its files are compared. Processes are forked
from this one, which has imported everything before.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from tiny_bundle import write_tiny_bundle  # noqa: E402

from fairref.commands import cli, train  # noqa: E402
from fairref.training import checkpoints  # noqa: E402

OPTIONS = (
    "--attr gender --device cpu --iterations 8 --batch 3 --steps 2 --checkpoint-every 2 --validate-every 3"
)
OPTIONS += " --validate-images 2 --grid-every 4 --evaluate ema --eval-images 2 --eval-images-train 0"
EQUAL = ("adapter.safetensors", "adapter_raw.safetensors", "adapter_best.safetensors", "evaluation.json")
EQUAL += (
    "before_after.png",
    "grids/000004.png",
    "grids/000008.png",
    "checkpoint-000008.safetensors",
    "settings.json",
)
LONGEST = 300  # seconds that a process may take at most


class Kill(NamedTuple):
    """When a process is killed: after some seconds, or at its n-th write."""

    seconds: float | None = None
    write: int | None = None
    before: bool = False  # whether the write is not done any more


def kill_at_a_write(kill: Kill) -> None:
    """Makes this process kill itself at its n-th write."""
    calls = []

    def deadly(function: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args, **options):
            calls.append(1)
            if len(calls) == kill.write and kill.before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **options)
            if len(calls) == kill.write:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    os.fsync, os.replace, Path.unlink = deadly(os.fsync), deadly(os.replace), deadly(Path.unlink)
    checkpoints.append_metrics = deadly(checkpoints.append_metrics)
    Path.mkdir = deadly(Path.mkdir)


def start(folder: Path, out: Path, log: Path, kill: Kill) -> int:
    """Begins or resumes the run `out` with the bundle of the folder, in a process -> its wait status."""
    has_begun = (out / checkpoints.SETTINGS).exists()
    argv = (
        ["--resume", str(out)]
        if has_begun
        else [*OPTIONS.split(), "--weights", str(folder), "--out", str(out)]
    )
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            torch.set_num_threads(1)
            if kill.write is not None:
                kill_at_a_write(kill)
            code = cli.run(train.main, argv)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + (LONGEST if kill.seconds is None else kill.seconds)
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def content(out: Path) -> dict[str, object]:
    """What must be equal of a run: its files, and the lines of its metrics without their times."""
    lines = [json.loads(line) for line in (out / checkpoints.METRICS).read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    files = {name: (out / name).read_bytes() for name in EQUAL}
    for name in ("settings.json", "evaluation.json"):  # both tell the run's own name, which differs
        told = files[name].replace(bytes(out), b"RUN").replace(f'"{out.name}/'.encode(), b'"RUN/')
        files[name] = json.loads(told)
    left = sorted(path.name for path in out.rglob("*") if ".part" in path.name or "so-far" in path.name)
    return {**files, "metrics": metrics, "left": left, "names": sorted(path.name for path in out.iterdir())}


def run(kills: int, seed: int) -> tuple[int, int, list[str]]:
    """Kills so many processes -> the kills, the runs that they were of, and what was wrong."""
    draw, killed, runs, faults = random.Random(seed), 0, 0, []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder, log = write_tiny_bundle(work / "bundle"), work / "log"
        began = time.monotonic()
        assert start(folder, work / "whole", log, Kill()) == 0, log.read_text()
        duration, whole = time.monotonic() - began, content(work / "whole")
        while killed < kills:
            out, of_run, runs = work / f"run-{runs}", [], runs + 1
            while True:
                is_over = killed == kills
                kill = Kill() if is_over else draw_kill(draw, duration)
                status = start(folder, out, log, kill)
                if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL or is_over:
                    break
                killed += 1
                of_run.append(kill)
            if status != 0:
                faults.append(f"run {runs}, killed {of_run}: ends with {status}\n{log.read_text()[-2000:]}")
                continue
            found = content(out)
            wrong = [key for key in whole if found[key] != whole[key]]
            if wrong:
                faults.append(f"run {runs}, killed {of_run}: {', '.join(wrong)} differ")
    return killed, runs, faults


def draw_kill(draw: random.Random, duration: float) -> Kill:
    """A random moment of a run that takes `duration` seconds."""
    if draw.random() < 0.5:
        return Kill(seconds=draw.uniform(0, 0.8 * duration))
    return Kill(write=draw.randrange(1, 40), before=draw.random() < 0.5)


def main() -> int:
    """Prints a summary and the faults; exit code 1 where there are some."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    killed, runs, faults = run(options.kills, options.seed)
    print(
        f"{killed} kills of {runs} runs: {runs - len(faults)} runs equal, {len(faults)} faults",
        *faults,
        sep="\n",
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
