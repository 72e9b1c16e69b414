"""One finetuning iteration here against the way of the method's released code: time, peak memory, and the gradient.

    python tests/benchmarks/training.py [--cases emoji sd15] [--scopes picture iteration] [--out FILE]

Scope "picture": sampling without a graph, the gradient at the pictures of a fixed linear functional, the adjusted
gradient, the LoRA of the text encoder. Scope "iteration": also what both ways do alike, which is the frozen model's
pictures, the targets and the finetuning loss. Every measurement is a process of its own: its first iteration gives the
memory above the loaded weights, the others the time. The ways take turns. "ours, recomputed" is --recompute, which
keeps less and computes more. On two quiet cores about half an hour a scope.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent))
from measure import (
    MEGABYTE,
    Memory,
    adapted,
    bundle_of,
    fresh,
    machine,
    setup_of,
    table,
    write,
)

from fairref.diffusion.model import scaled_vjp
from fairref.diffusion.sampler import noise
from fairref.generation.rollout import decode, embed
from fairref.training.loop import compiled
from fairref.training.step import draw_task, iteration_gradient, sample_path, sampling_gradient

WAYS = ("ours", "ours, graphs kept", "ours, recomputed", "released")
BARS = {"time": 0.8, "memory": 0.5, "steps": 1.05, "gradient": 1e-3}
FUNCTIONAL = 7  # seed of the fixed linear functional of the pictures


@dataclass(frozen=True)
class Work:
    """One measurement."""

    case: str
    images: int  # N
    steps: int  # S
    way: str = "ours"
    scope: str = "picture"
    micro_batch: int = 0  # images with a graph at once; 0: all
    timed: int = 1  # iterations after the first
    channels: tuple | None = None  # of the U-Net of the case sd15
    latents: int = 16  # its height and width
    gradient_file: str | None = None  # where the gradient goes


CASES = {"emoji": Work("emoji", 24, 20), "sd15": Work("sd15", 2, 8)}


def prepare(work: Work):
    """(setup, model, parameters) of one way, which holds no weights of the other."""
    bundle = bundle_of(work.case, work.channels, work.latents)
    if work.way == "released":
        import released  # diffusers is no part of our memory

        bundle = released.with_peers(bundle)
    options = {"batch": work.images, "steps": work.steps, "micro_batch": work.micro_batch}
    options |= {"keep_graphs": work.way == WAYS[1], "recompute": work.way == WAYS[2]}
    setup = setup_of(bundle, component="text_encoder", **options)
    model, state = adapted(setup)
    if work.way != "released":
        setup, model = compiled(setup, model)
    return setup, model, list(state.adapter.parameters())


def functional(work: Work, shape) -> torch.Tensor:
    """R / N, of L = sum_n <R_n, x_n> / N for pictures of this shape."""
    return noise(FUNCTIONAL, 0, range(work.images), shape) / work.images


def picture_gradient(setup, model, parameters: list, work: Work) -> list:
    """dL/dparameters of the linear functional, our way."""
    task = draw_task(setup, 0)
    text = embed(model, task.prompt)
    run = sample_path(setup, model, task, text, 0)
    z_0 = run.path[-1].z
    with torch.no_grad():
        x = decode(model, z_0)  # what a run finds faces and targets on
    R, g = functional(work, x.shape[1:]), torch.zeros_like(z_0)
    for rows in torch.arange(len(g)).split(work.micro_batch or len(g)):
        part = z_0[rows].requires_grad_(True)
        (g[rows],) = scaled_vjp(decode(model, part), [part], R[rows])
    return sampling_gradient(setup, run, g, text, parameters)


def gradient_of(setup, model, parameters: list, work: Work) -> list:
    """dL/dparameters of one iteration in the way and scope of `work`."""
    if work.way != "released":
        if work.scope == "iteration":
            return iteration_gradient(setup, model, parameters, 0)[0]
        return picture_gradient(setup, model, parameters, work)
    import released

    task = draw_task(setup, 0)
    if work.scope == "iteration":
        return released.iteration(setup, model, parameters, task)
    R = functional(work, released.look(setup, model, task).shape[1:])
    return released.gradient(setup, model, parameters, task, lambda x, rows: (R[rows] * x).sum())


def child(work: Work) -> dict:
    """Measures in this process."""
    setup, model, parameters = prepare(work)
    memory, seconds = Memory(), []
    for _ in range(1 + work.timed):
        began = time.perf_counter()
        found = gradient_of(setup, model, parameters, work)
        seconds.append(time.perf_counter() - began)
        if len(seconds) == 1:
            peak = memory.above() / MEGABYTE
    if work.gradient_file:
        torch.save([p.detach() for p in found], work.gradient_file)
    return {"seconds": statistics.median(seconds[1:] or seconds), "peak_mb": peak}


def relative(found: list, expected: list) -> float:
    """|found - expected| / |expected| over all parameters."""
    found, expected = (torch.cat([p.double().flatten() for p in parts]) for parts in (found, expected))
    return float((found - expected).norm() / expected.norm())


def compare(work: Work, repeats: int) -> dict:
    """Medians of the ways that take turns, their ratios to the released way, and the difference of gradients."""
    rows, gradients = {way: [] for way in WAYS}, {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for way in WAYS:
                file = f"{folder}/{way}.pt" if repeat == 0 else None
                rows[way].append(fresh(__file__, asdict(replace(work, way=way, gradient_file=file))))
                print(f"  {work.case}, {work.scope}, {way}: {rows[way][-1]}", file=sys.stderr, flush=True)
                if file:
                    gradients[way] = torch.load(file)
    found = {}
    for way in WAYS:
        found[way] = {key: statistics.median(row[key] for row in rows[way]) for key in ("seconds", "peak_mb")}
        found[way]["all"] = rows[way]
        found[way]["gradient_difference"] = relative(gradients[way], gradients["released"])
    for way in WAYS:
        found[way]["time_ratio"] = found[way]["seconds"] / found["released"]["seconds"]
        found[way]["memory_ratio"] = found[way]["peak_mb"] / found["released"]["peak_mb"]
    return {"work": asdict(work), "ways": found}


def over_steps(work: Work, few: int, many: int) -> dict:
    """Our peak memory at many steps against few."""
    peaks = [fresh(__file__, asdict(replace(work, steps=S, timed=0)))["peak_mb"] for S in (few, many)]
    return {"case": work.case, "S": [few, many], "peak_mb": peaks, "ratio": peaks[1] / peaks[0]}


def shown(comparisons: list[dict], steps: list[dict]) -> str:
    """The tables."""
    rows = []
    for comparison in comparisons:
        work = comparison["work"]
        name = f"{work['case']}, N = {work['images']}, S = {work['steps']}, {work['scope']}"
        for way, of_one in comparison["ways"].items():
            keys = ("seconds", "time_ratio", "peak_mb", "memory_ratio", "gradient_difference")
            rows.append([name, way, *(of_one[key] for key in keys)])
    header = [
        "case",
        "way",
        "seconds",
        "ratio",
        "peak above the weights, MB",
        "ratio",
        "gradient, rel. diff.",
    ]
    text = table(header, rows)
    if steps:
        ratios = [[s["case"], *s["S"], *s["peak_mb"], s["ratio"]] for s in steps]
        text += "\n\n" + table(["case", "S", "S'", "peak at S, MB", "at S'", "ratio"], ratios)
    bars = f"bars: time {BARS['time']}, memory {BARS['memory']}, S' to S {BARS['steps']}, gradient {BARS['gradient']}"
    return f"{text}\n\n{bars}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--scopes", nargs="*", default=["iteration"], choices=["picture", "iteration"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timed", type=int, default=1, help="timed iterations of each process")
    parser.add_argument("--micro-batch", type=int, default=0, help="images with a graph at once; 0: all")
    parser.add_argument("--memory-steps", type=int, nargs="*", default=[10, 50], help="two S, or none")
    parser.add_argument("--images", type=int, help="for a trial: N of all cases")
    parser.add_argument("--steps", type=int, help="for a trial: S of all cases")
    parser.add_argument("--channels", type=int, nargs=4, help="for a trial: of the U-Net of sd15")
    parser.add_argument("--out", type=Path, help="JSON file; what it has of other cases stays")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(Work(**json.loads(options.child)))))
        return
    given = {"images": options.images, "steps": options.steps, "channels": options.channels}
    given = {key: value for key, value in given.items() if value is not None}
    given |= {"micro_batch": options.micro_batch, "timed": options.timed}
    works = [replace(CASES[case], **given) for case in options.cases]
    where = machine()
    comparisons = [
        compare(replace(work, scope=scope), options.repeats) for work in works for scope in options.scopes
    ]
    few_many, last = options.memory_steps, options.scopes[-1]
    steps = [over_steps(replace(work, scope=last), *few_many) for work in works] if few_many else []
    print(shown(comparisons, steps))
    found = {"comparisons": comparisons, "steps": steps}
    if options.out and options.out.exists():
        found = joined(json.loads(options.out.read_text(encoding="utf-8")), found)
    write(options.out, {"machine": where, "bars": BARS, **found})


def joined(before: dict, new: dict) -> dict:
    """Both measurements' lists, without what was measured before of what is measured now."""

    def case(row):
        return row.get("work", row)["case"]

    both = {}
    for key, rows in new.items():
        cases = {case(row) for row in rows}
        both[key] = sorted([*(r for r in before[key] if case(r) not in cases), *rows], key=case)
    return both


if __name__ == "__main__":
    main()
