"""The share of a finetuning iteration that two processes spend on talking to each other.

    python tests/benchmarks/collectives.py [--iterations 5] [--out FILE]

Starts torchrun, two gloo processes on one core each, on the small bundle with its recipe. Before each collective of
`Processes` stands a barrier, whose time, the wait for the slower process, is counted apart. About two minutes on two
quiet cores.
"""

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).resolve().parent))
from measure import ROOT, adapted, environment, machine, setup_of, table, write

from fairref.bundle.loading import load_bundle
from fairref.processes import Processes, start
from fairref.training.loop import iterate

BAR = 0.05  # of an iteration


@dataclass
class Clock:
    """Seconds of an iteration."""

    collectives: float = 0.0
    waiting: float = 0.0


@dataclass(frozen=True)
class Timed(Processes):
    """Processes that count the time of what they say, `any` by way of `total`."""

    clock: Clock = field(default_factory=Clock)

    def gather(self, rows, N):
        return self.timed(super().gather, rows, N)

    def total(self, tensors):
        return self.timed(super().total, tensors)

    def share(self, text):
        return self.timed(super().share, text)

    def timed(self, collective, *arguments):
        """collective(*arguments), once all are here."""
        began = time.perf_counter()
        if self.world > 1:
            dist.barrier()
        ready = time.perf_counter()
        found = collective(*arguments)
        self.clock.waiting += ready - began
        self.clock.collectives += time.perf_counter() - ready
        return found


def measured(processes: Timed, bundle, iterations: int, **recipe) -> list[dict]:
    """Seconds of each iteration in this process, after a first one that is not counted."""
    setup = setup_of(bundle, processes, **recipe)
    model, state = adapted(setup)
    rows = []
    for _ in range(1 + iterations):
        processes.wait()
        processes.clock.collectives = processes.clock.waiting = 0.0
        began = time.perf_counter()
        iterate(setup, model, state)
        processes.any(False)  # whether to stop, which the loop asks after each
        rows.append({"seconds": time.perf_counter() - began, **vars(processes.clock)})
    return rows[1:]


def worker(options) -> None:
    """One of the processes. The first one reports the larger share of all."""
    plain, device = start(torch.device("cpu"))
    processes = Timed(plain.rank, plain.world, plain.device)
    torch.set_num_threads(1)
    where = machine()
    given = {"batch": options.batch} if options.batch else {}
    given |= {"steps": options.steps} if options.steps else {}
    rows = measured(processes, load_bundle(options.weights, device), options.iterations, **given)
    keys = ("seconds", "collectives", "waiting")
    mine = torch.tensor([[statistics.median(row[key] for row in rows) for key in keys]], dtype=torch.float64)
    everyone = plain.gather(mine, plain.world).tolist()  # (world, 3)
    if plain.first:
        found = [
            {"rank": rank, **dict(zip(keys, row, strict=True)), "share": row[1] / row[0]}
            for rank, row in enumerate(everyone)
        ]
        print(shown(found))
        write(options.out, {"machine": where, "processes": plain.world, "bar": BAR, "ranks": found})
    plain.stop()


def shown(found: list[dict]) -> str:
    """The table of all processes."""
    rows = [[r["rank"], r["seconds"], r["collectives"], r["waiting"], f"{r['share']:.2%}"] for r in found]
    header = ["process", "seconds an iteration", "in collectives", "waiting", f"share (bar {BAR:.0%})"]
    return table(header, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=5, help="that are counted")
    parser.add_argument("--weights", default="emoji", help="a bundle")
    parser.add_argument("--batch", type=int, help="for a trial: N")
    parser.add_argument("--steps", help="for a trial: S")
    parser.add_argument("--out", type=lambda path: Path(path).resolve(), help="JSON file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes)]
    command = [sys.executable, *torchrun, __file__, *sys.argv[1:], "--worker"]
    subprocess.run(command, cwd=ROOT, env={**environment(), "OMP_NUM_THREADS": "1"}, check=True)


if __name__ == "__main__":
    main()
