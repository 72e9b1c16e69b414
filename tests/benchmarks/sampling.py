"""U-Net steps of sampling at SD-1.5's full size, here against diffusers, and against the machine's matrix products.

    python tests/benchmarks/sampling.py [--dtypes float32 bfloat16] [--steps 5] [--choices] [--out FILE]

One picture with guidance, so two U-Net inputs, 64 x 64 latents, random weights. The runs of all dtypes and of both ways
start from the same noise and go on in turns, one step each, beside one large matrix product of each dtype, whose
fastest time is the machine's peak. A first step of each is not counted. On two quiet cores five minutes with bfloat16,
three without it, many more where the processor has none; 10 GB of memory. With --choices, float32 only and no
diffusers: what our choices of memory format, attention kernel and linear layers save, each against the same network
with the other choice.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.append(str(Path(__file__).resolve().parent))
from flops import counter
from measure import machine, table, write
from released import peer_unet, scheduler_of, steps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from fairref import nets
from fairref.diffusion.model import GuidedModel
from fairref.diffusion.sampler import sample
from fairref.diffusion.schedule import Schedule
from fairref.diffusion.solver import solver_table
from fairref.nets import Linear
from fairref.nets.unet import SD15, UNet, UNetConfig
from fairref.processes import DTYPES

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
    """A generator that multiplies two matrices of this size each time, by torch's product and as our linear layer."""
    layer = Linear(size, size, bias=False, dtype=dtype)
    x = torch.randn(size, size).to(dtype)
    while True:
        yield x @ layer.weight
        yield layer(x)


def start(unet: UNet, latents: int) -> tuple:
    """(z_T, both): the same noise and texts for all runs."""
    torch.manual_seed(1)
    return torch.randn(1, 4, latents, latents), torch.randn(2, TOKENS, unet.config.cross_attention_dim)


def our_run(unet: UNet, S: int, latents: int) -> Iterator[torch.Tensor]:
    """z before each step."""
    z_T, both = start(unet, latents)
    model = GuidedModel(unet, *both.split(1), GUIDANCE)
    return (step.z for step in sample(model, solver_table(Schedule(), S), z_T))


def their_run(unet: UNet, S: int, latents: int) -> Iterator[torch.Tensor]:
    """z after each step."""
    z_T, both = start(unet, latents)
    return steps(peer_unet(unet), scheduler_of(Schedule(), S, "zero"), z_T, both, GUIDANCE)


def choices(unet: UNet, S: int, latents: int) -> dict:
    """Runs of our U-Net as it is, in torch's usual memory format, with attention as two matrix products, and with
    torch's own linear layers."""
    usual = UNet(unet.config).to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    usual.load_state_dict(unet.state_dict())
    plain, torchs = (our_run(unet, S, latents) for _ in range(2))
    return {
        "ours": our_run(unet, S, latents),
        "usual memory format": our_run(usual, S, latents),
        "plain attention": under(lambda: sdpa_kernel(SDPBackend.MATH), plain),
        "torch's linear layers": under(lambda: patch.object(nets, "LEAST_ROWS", math.inf), torchs),
    }


def under(context, run):
    """A run whose steps are each taken under context()."""
    while True:
        with context():
            z = next(run)
        yield z


@torch.no_grad()
def timed(runs: dict, steps: int) -> tuple[dict, dict]:
    """Name -> the seconds of each step, of runs that take turns, and the last z."""
    seconds, last = {name: [] for name in runs}, {}
    for _ in range(steps):
        for name, run in runs.items():
            began = time.perf_counter()
            last[name] = next(run)
            seconds[name].append(time.perf_counter() - began)
    return seconds, last


def measure(config: UNetConfig, options) -> list[dict]:
    """Medians of each dtype."""
    S, runs = options.steps + 1, {}
    for name in options.dtypes:
        unet = network(config, DTYPES[name])
        runs[name, "ours"] = our_run(unet, S, options.latents)
        runs[name, "diffusers"] = their_run(unet, S, options.latents)
        runs[name, "product"] = products(options.product, DTYPES[name])
    seconds, last = timed(runs, S)
    with torch.no_grad():
        z_0 = {name: next(runs[name, "ours"]) for name in options.dtypes}  # by one more step of the solver
    flops = flops_of_step(config, options.latents)
    of_one = {name: {way: t for (n, way), t in seconds.items() if n == name} for name in options.dtypes}
    return [row_of(n, of_one[n], z_0[n], last[n, "diffusers"], flops, options) for n in options.dtypes]


def measure_choices(config: UNetConfig, options) -> list[dict]:
    """Medians of each choice."""
    S = options.steps + 1
    seconds, last = timed(choices(network(config, torch.float32), S, options.latents), S)
    found = {name: statistics.median(of_one[1:]) for name, of_one in seconds.items()}
    apart = {name: float((z - last["ours"]).norm() / last["ours"].norm()) for name, z in last.items()}
    return [
        {"choice": n, "seconds": t, "ratio": t / found["ours"], "all": seconds[n], "difference": apart[n]}
        for n, t in found.items()
    ]


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


def shown_choices(rows: list[dict]) -> str:
    """The table."""
    keys = ["choice", "seconds", "ratio", "difference"]
    return table(keys, [[row[key] for key in keys] for row in rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--choices", action="store_true", help="our choices against others")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each run")
    parser.add_argument("--latents", type=int, default=64, help="for a trial: their height and width")
    parser.add_argument("--channels", type=int, nargs=4, help="for a trial: of the U-Net")
    parser.add_argument("--product", type=int, default=4096, help="size of the matrices of the peak")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    config = replace(SD15, block_out_channels=tuple(options.channels)) if options.channels else SD15
    where = machine()
    if options.choices:
        rows = measure_choices(config, options)
        print(shown_choices(rows))
        write(options.out, {"machine": where, "choices": rows})
        return
    rows = measure(config, options)
    print(shown(rows))
    write(options.out, {"machine": where, "bars": BARS, "rows": rows, "bfloat16_faster": faster(rows)})


if __name__ == "__main__":
    main()
