"""What one GPU does in eight minutes, part by part; each part's numbers are a file as soon as it ends.

    python tests/benchmarks/gpu.py --out FOLDER [--only tests losses iteration emoji] [--device cuda]

tests      tests/test_cuda.py
losses     the loss of one batch on networks of SD-1.5's size, of random weights: float16 and bfloat16 against float32
iteration  one iteration at that size, N = 24, micro-batches of 3, float16: seconds and peak memory, here and as the
           released code makes it with diffusers' networks, where these are installed
emoji      300 iterations of the small bundle, and its evaluation

Each part is a process of its own with a limit of time; one that runs over it leaves the others theirs. `--device cpu
--tiny` tries the script where there is no GPU, with the small bundle's networks.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent))
from flops import CLIP_H
from measure import ROOT, adapted, environment, setup_of, write

from fairref.bundle.loading import DEFAULT, Bundle, load_bundle
from fairref.bundle.stable_diffusion import NETWORKS
from fairref.judges.dino import Dino, DinoConfig
from fairref.nets.clip import ClipImage
from fairref.processes import DTYPES, choose_device
from fairref.training.step import draw_task, iteration_gradient

LIMITS = {"tests": 120, "losses": 80, "iteration": 140, "emoji": 140}  # seconds; eight minutes in all
RESOLUTION, EPS = 512, 1e-12
WAYS = ("ours", "ours, recomputed", "released")


def full_size(device: str, dtype: torch.dtype, tiny: bool) -> Bundle:
    """The small bundle with networks of SD-1.5's size and random weights around its classifiers; it has no detector, so
    these look at whole images."""
    small = replace(load_bundle(DEFAULT, choose_device(device), dtype), detector=None, embedder=None)
    if tiny:
        return small
    torch.manual_seed(0)
    with torch.device(device):
        parts = {name: part.network(part.sd15) for name, part in NETWORKS.items()}
        parts |= {"clip": ClipImage(CLIP_H), "dino": Dino(DinoConfig())}
    ready = {
        name: network.to(dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
        for name, network in parts.items()
    }
    return replace(small, **ready, resolution=RESOLUTION)


def losses(device: str, tiny: bool) -> dict:
    """dtype -> the terms of one batch, and their relative error against float32."""
    found = {}
    for name in ("float32", "float16", "bfloat16"):
        setup = setup_of(full_size(device, DTYPES[name], tiny), batch=3, steps=4, micro_batch=1)
        model, state = adapted(setup)
        _, metrics = iteration_gradient(setup, model, list(state.adapter.parameters()), 0)
        found[name] = {key: metrics[key] for key in ("loss", "align", "image")}
        del setup, model, state
    first = found["float32"]
    for name in ("float16", "bfloat16"):
        errors = {key: abs(found[name][key] - of) / max(abs(of), EPS) for key, of in first.items()}
        found[name]["relative error"] = errors
    return found


def iteration(device: str, tiny: bool) -> dict:
    """Way -> seconds of an iteration after a first one, and the peak of allocated memory in GB."""
    dtype, found = torch.float32 if device == "cpu" else torch.float16, {}
    for way in WAYS:
        bundle = full_size(device, dtype, tiny)
        if way == "released":
            try:
                import released
            except ImportError as error:
                found[way] = {"not measured": str(error)}
                continue
            bundle = released.with_peers(bundle)
        options = {"batch": 4 if tiny else 24, "steps": 3 if tiny else 20, "micro_batch": 1 if tiny else 3}
        setup = setup_of(bundle, component="text_encoder", recompute=way == WAYS[1], **options)
        model, state = adapted(setup)
        parameters, seconds = list(state.adapter.parameters()), []
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            began = time.monotonic()
            if way == "released":
                released.iteration(setup, model, parameters, draw_task(setup, 0))
            else:
                iteration_gradient(setup, model, parameters, 0)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(round(time.monotonic() - began, 2))
        peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
        found[way] = {"first": seconds[0], "seconds": seconds[1], "peak_gb": peak}
        del setup, model, state, parameters, bundle
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def command(*words: object) -> dict:
    """What a command took, and the end of what it printed."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    said = (done.stdout + done.stderr).splitlines()[-20:]
    return {"code": done.returncode, "seconds": round(time.monotonic() - began, 1), "said": said}


def part(name: str, device: str, tiny: bool, out: Path) -> dict:
    """A part's numbers."""
    if name == "tests":
        return command("-m", "pytest", "-q", "-n", "0", "-rP", "tests/test_cuda.py")
    if name == "emoji":
        few = ["--iterations", 2, "--eval-images", 1, "--eval-images-train", 0] if tiny else []
        found = command("train.py", "--attr", "gender", "--device", device, "--out", out / "gender", *few)
        evaluation = out / "gender" / "evaluation.json"
        if evaluation.exists():
            reports = json.loads(evaluation.read_text(encoding="utf-8"))
            found["bias"] = {
                label: of["test"]["judges"]["classifier"]["mean"] for label, of in reports.items()
            }
        return found
    with torch.enable_grad():
        return {"losses": losses, "iteration": iteration}[name](device, tiny)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a trial with the small bundle's networks")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    if options.child:
        card = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
        found = part(options.child, options.device, options.tiny, out)
        write(out / f"{options.child}.json", {"card": card, "torch": torch.__version__, **found})
        return
    for name in options.only:
        words = ["--child", name, "--out", out, "--device", options.device, *["--tiny"] * options.tiny]
        try:
            subprocess.run(
                [sys.executable, __file__, *map(str, words)],
                cwd=ROOT,
                env=environment(),
                timeout=LIMITS[name],
                check=True,
            )
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            print(f"{name}: {error}", file=sys.stderr)
        if (out / f"{name}.json").exists():
            print(name, (out / f"{name}.json").read_text(encoding="utf-8"), flush=True)


if __name__ == "__main__":
    main()
