"""U-Net steps of sampling at SD-1.5's full size, here against diffusers, and against the machine's matrix products.

    python tests/benchmarks/sampling.py [--dtypes float32 bfloat16] [--steps 5] [--out FILE]

One picture with guidance, so two U-Net inputs, 64 x 64 latents, random weights. The runs of all dtypes and of both ways
start from the same noise and go on in turns, one step each, beside one large matrix product of each dtype, whose
fastest time is the machine's peak. A first step of each is not counted. On two quiet cores about six minutes, and
14 GB of memory.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent))
from flops import counter
from measure import machine, table, write
from released import peer_unet, scheduler_of, steps
from torch._subclasses.fake_tensor import FakeTensorMode

from fairref import cli
from fairref.diffusion.sampler import sample
from fairref.diffusion.schedule import Schedule
from fairref.diffusion.solver import solver_table
from fairref.nets.unet import SD15, UNet, UNetConfig

BARS = {"float32": 1.0, "bfloat16": 1.0}  # of the ratio to diffusers' time
GUIDANCE, TOKENS = 7.5, 77


def network(config: UNetConfig, dtype: torch.dtype) -> UNet:
    """A U-Net of random weights, prepared as load_bundle does."""
    torch.manual_seed(0)
    unet = UNet(config).to(dtype=dtype, memory_format=torch.channels_last)
    return unet.eval().requires_grad_(False)


def flops_of_step(config: UNetConfig, latents: int) -> int:
    """FLOPs of the two U-Net inputs of a step."""
    with FakeTensorMode(), counter() as counted:
        unet = UNet(config).requires_grad_(False)
        unet(torch.empty(2, 4, latents, latents), 500, torch.empty(2, TOKENS, config.cross_attention_dim))
    return counted.get_total_flops()


def products(size: int, dtype: torch.dtype):
    """A generator that multiplies two matrices of this size each time."""
    a, b = torch.randn(2, size, size).to(dtype)
    while True:
        yield a @ b


def runs(unet: UNet, S: int, latents: int) -> dict:
    """Two generators from the same noise, each a step at a time -> z before the step (ours) or after it."""
    schedule = Schedule()
    torch.manual_seed(1)
    z_T = torch.randn(1, 4, latents, latents)
    both = torch.randn(2, TOKENS, unet.config.cross_attention_dim)
    ours = sample(unet, solver_table(schedule, S), z_T, *both.split(1), GUIDANCE)
    theirs = steps(peer_unet(unet), scheduler_of(schedule, S, "zero"), z_T, both, GUIDANCE)
    return {"ours": (step.z for step in ours), "diffusers": theirs}


@torch.no_grad()
def measure(config: UNetConfig, options) -> list[dict]:
    """Medians of each dtype."""
    S = options.steps + 1
    dtypes = {name: cli.DTYPES[name] for name in options.dtypes}
    ways = {name: runs(network(config, dtype), S, options.latents) for name, dtype in dtypes.items()}
    for name, dtype in dtypes.items():
        ways[name]["product"] = products(options.product, dtype)
    seconds, last = {name: {way: [] for way in ways[name]} for name in ways}, {name: {} for name in ways}
    for _ in range(S):
        for name in ways:
            for way, run in ways[name].items():
                began = time.perf_counter()
                last[name][way] = next(run)
                seconds[name][way].append(time.perf_counter() - began)
    z_0 = {name: next(ways[name]["ours"]) for name in ways}  # by one more step of the solver
    flops = flops_of_step(config, options.latents)
    return [row_of(name, seconds[name], z_0[name], last[name]["diffusers"], flops, options) for name in ways]


def row_of(name: str, seconds: dict, ours: torch.Tensor, theirs: torch.Tensor, flops: int, options) -> dict:
    """What was found for one dtype."""
    found = {way: statistics.median(times[1:]) for way, times in seconds.items() if way != "product"}
    peak = 2 * options.product**3 / min(seconds["product"][1:])
    return {
        "dtype": name,
        "seconds": found,
        "all": seconds,
        "ratio": found["ours"] / found["diffusers"],
        "gigaflop": flops / 1e9,
        "peak_gflops": peak / 1e9,
        "share_of_peak": {way: flops / (median * peak) for way, median in found.items()},
        "difference": float((ours - theirs).norm() / theirs.norm()),
    }


def faster(rows: list[dict]) -> float | None:
    """How many times as fast bfloat16 is, if both were measured."""
    seconds = {row["dtype"]: row["seconds"]["ours"] for row in rows}
    return seconds["float32"] / seconds["bfloat16"] if {"float32", "bfloat16"} <= set(seconds) else None


def shown(rows: list[dict]) -> str:
    """The table, and how much faster bfloat16 is."""
    header = [
        "dtype",
        "seconds a step",
        "diffusers",
        "ratio",
        "share of the peak",
        "diffusers",
        "peak, GFLOP/s",
    ]
    cells = []
    for row in rows:
        both = [row["seconds"], row["share_of_peak"]]
        times, shares = ([of_one[way] for way in ("ours", "diffusers")] for of_one in both)
        cells.append([row["dtype"], *times, row["ratio"], *shares, row["peak_gflops"]])
    text = table(header, cells)
    times = faster(rows)
    return text + (f"\n\nbfloat16 is {times:.2f} times as fast as float32." if times else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"], choices=cli.DTYPES)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each run")
    parser.add_argument("--latents", type=int, default=64, help="for a trial: their height and width")
    parser.add_argument("--channels", type=int, nargs=4, help="for a trial: of the U-Net")
    parser.add_argument("--product", type=int, default=4096, help="size of the matrices of the peak")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    config = replace(SD15, block_out_channels=tuple(options.channels)) if options.channels else SD15
    where, rows = machine(), measure(config, options)
    print(shown(rows))
    write(options.out, {"machine": where, "bars": BARS, "rows": rows, "bfloat16_faster": faster(rows)})


if __name__ == "__main__":
    main()
