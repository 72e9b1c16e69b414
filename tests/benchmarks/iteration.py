"""Where an iteration's time goes on the small bundle, and what each way of the gradient takes off it.

    python tests/benchmarks/iteration.py [--iterations 6] [--out docs/speed/iteration.json]

Each way is a process of its own, and the ways take turns, iteration by iteration: what else the machine does weighs on
all alike. Their iterations are those of one run: prompts, S and noise are the same for all. The first iteration is not
counted. Seconds are medians over iterations. On two quiet cores about five minutes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.append(str(Path(__file__).resolve().parent))
from measure import ROOT, adapted, bundle_of, environment, machine, setup_of, table, write

from fairref.training import step, terms

WAYS: dict[str, dict[str, object]] = {
    "all terms": {},
    "graphs kept": {"keep_graphs": True},
    **{f"{M} drawn": {"grad_steps": M} for M in (3, 2, 1)},
    "recomputed": {"recompute": True},
}
PARTS = ("adapted path", "frozen path", "decoder", "judges", "targets", "VJPs")
# what a function spends, but for what is spent in another of these
WATCHED = (
    (step, "sample_path", "adapted path"),
    (step, "draw_pair", "judges"),  # of which the next three take their own
    (step, "rollout", "frozen path"),
    (step, "decode", "decoder"),
    (step, "judged_pair", "judges"),
    (step, "transport_targets", "targets"),
    (step, "all_logits", "judges"),
    (step, "image_gradient", "judges"),
    (terms, "decode", "decoder"),
    (terms, "scaled_vjp", "decoder"),
    (step, "sampling_gradient", "VJPs"),
)


class Clock:
    """Seconds of each part, of which an inner one takes from the outer one."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.now, self.seconds, self.open, self.last = now, dict.fromkeys(PARTS, 0.0), [], 0.0

    def turn(self, part: str | None) -> None:
        """From now on the time is this part's; None: that of what was there before."""
        now = self.now()
        if self.open:
            self.seconds[self.open[-1]] += now - self.last
        self.last = now
        if part is None:
            self.open.pop()
        else:
            self.open.append(part)

    def watch(self, function: Callable, part: str) -> Callable:
        """The function, whose time counts as the part's; inside the adapted path all is that."""

        @wraps(function)
        def watched(*args, **kwargs):
            self.turn("adapted path" if "adapted path" in self.open else part)
            try:
                return function(*args, **kwargs)
            finally:
                self.turn(None)

        return watched


def child(way: str) -> None:
    """Measures an iteration, whose number it reads, for each line of stdin."""
    options = WAYS[way]
    setup = setup_of(bundle_of("emoji"), **options)
    model, state = adapted(setup)
    if options.get("recompute"):
        from fairref.training.loop import compiled

        setup, model = compiled(setup, model)
    parameters = list(state.adapter.parameters())
    for line in sys.stdin:
        clock = Clock()
        with ExitStack() as held:
            for module, name, part in WATCHED:
                held.enter_context(patch.object(module, name, clock.watch(getattr(module, name), part)))
            began = time.perf_counter()
            with torch.enable_grad():
                step.iteration_gradient(setup, model, parameters, int(line))
            whole = time.perf_counter() - began
        print(json.dumps({**clock.seconds, "whole": whole}), flush=True)


def measured(iterations: int) -> dict[str, dict[str, float]]:
    """Way -> median seconds of each part and of the whole."""
    command = [sys.executable, __file__, "--child"]
    open_pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = {
        way: subprocess.Popen([*command, way], cwd=ROOT, env=environment(), **open_pipes) for way in WAYS
    }
    rows = {way: [] for way in WAYS}
    for i in range(1 + iterations):
        for way, process in processes.items():
            process.stdin.write(f"{i}\n")
            process.stdin.flush()
            rows[way].append(json.loads(process.stdout.readline()))
            print(f"  {way}: {rows[way][-1]['whole']:.2f} s", file=sys.stderr, flush=True)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return {
        way: {key: statistics.median(row[key] for row in of[1:]) for key in (*PARTS, "whole")}
        for way, of in rows.items()
    }


def shown(found: dict[str, dict[str, float]]) -> str:
    """The table; the targets take a millisecond or so, and have no column."""
    first, parts = found["all terms"]["whole"], [part for part in PARTS if part != "targets"]
    rows = [[way, *(of[p] for p in parts), of["whole"], of["whole"] / first] for way, of in found.items()]
    return table(["seconds", *parts, "iteration", "ratio"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    where, found = machine(), measured(options.iterations)
    print(shown(found))
    write(options.out, {"machine": where, "ways": found})


if __name__ == "__main__":
    main()
