"""What --recompute saves and costs at Stable Diffusion 1.5's size: one picture of 512 x 512 pixels, in bfloat16.

    python tests/benchmarks/recompute.py [--repeats 2] [--out docs/speed/recompute.json]

An iteration of one picture in one sampling step, on networks of random weights, so that the decoder and the judges take
most of the memory, as in a run. Each measurement is a process of its own, and both ways take turns. The first iteration
gives the peak of resident memory above the loaded weights, the second one the time. About two minutes of a core each.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent))
from gpu import full_size
from measure import MEGABYTE, Memory, adapted, fresh, machine, medians, setup_of, table, write

from fairref.training.loop import compiled
from fairref.training.step import iteration_gradient

WAYS = {"kept": False, "recomputed": True}


def child(work: dict) -> dict:
    """Measures in this process."""
    setup = setup_of(
        full_size("cpu", torch.bfloat16, work["tiny"]), batch=1, steps=1, recompute=work["recompute"]
    )
    model, state = adapted(setup)
    setup, model = compiled(setup, model)
    parameters, found = list(state.adapter.parameters()), {}
    memory = Memory()
    for key in ("first", "seconds"):
        began = time.perf_counter()
        with torch.enable_grad():
            iteration_gradient(setup, model, parameters, 0)
        found[key] = time.perf_counter() - began
        found.setdefault("peak_mb", memory.above() / MEGABYTE)
    return found


def shown(found: dict[str, dict[str, float]]) -> str:
    """The table."""
    first, keys = found["kept"], ("seconds", "peak_mb")
    rows = [[way, *(x for key in keys for x in (of[key], of[key] / first[key]))] for way, of in found.items()]
    return table(["blocks", "seconds", "ratio", "peak above the weights, MB", "ratio"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a trial with the small bundle's networks")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(json.loads(options.child))))
        return
    where, rows = machine(), {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way, recompute in WAYS.items():
            rows[way].append(fresh(__file__, {"recompute": recompute, "tiny": options.tiny}))
            print(f"  {way}: {rows[way][-1]}", file=sys.stderr, flush=True)
    found = {way: medians(of) for way, of in rows.items()}
    print(shown(found))
    write(options.out, {"machine": where, "ways": found})


if __name__ == "__main__":
    main()
