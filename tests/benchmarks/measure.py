"""What the benchmarks share: models to measure, a fresh process for each measurement, peak memory, medians, tables."""

import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from fairref.bundle.loading import Bundle, load_bundle
from fairref.bundle.recipe import resolve
from fairref.fairness.attributes import parse_attributes, product_target
from fairref.nets.clip import ClipText, ClipTextConfig
from fairref.nets.unet import SD15, UNet
from fairref.processes import Processes
from fairref.prompts.sets import read_prompts
from fairref.settings import Range
from fairref.training.loop import new_state
from fairref.training.setup import Setup

ROOT = Path(__file__).resolve().parents[2]
MOVED = 0.1  # standard deviation of the adapter's up: at its start it has no gradient in down
MEGABYTE = 2**20
FIRST_RECIPE = {  # the small bundle's when its gradients were compared; the screens are changes of it
    "steps": Range(6, 7),
    "grad_steps": 0,
    "clip": 0.02,
    "lambda_img": 0.5,
    "C": 0.8,
    "warmup": 5,
    "lr": 0.003,
}
FIRST_OPTIONS = " ".join(
    f"--{name.replace('_', '-')} {':'.join(map(str, of[:2])) if isinstance(of, Range) else of}"
    for name, of in FIRST_RECIPE.items()
)


def bundle_of(case: str, channels: list[int] | None = None, latents: int = 16) -> Bundle:
    """ "emoji", a bundle's path, or "sd15": random weights of SD-1.5's width around the small bundle's VAE and judges.

    `channels` replaces the U-Net's, `latents` is its height and width; both of "sd15" only.
    """
    if case != "sd15":
        return load_bundle(case)
    small = load_bundle("emoji")
    torch.manual_seed(0)
    unet = UNet(replace(SD15, block_out_channels=tuple(channels or SD15.block_out_channels)))
    width = SD15.cross_attention_dim
    config = ClipTextConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=12)
    # as load_bundle prepares them
    parts = {"unet": unet.to(memory_format=torch.channels_last), "text_encoder": ClipText(config)}
    parts = {name: network.eval().requires_grad_(False) for name, network in parts.items()}
    return replace(small, **parts, resolution=8 * latents)


def setup_of(bundle: Bundle, processes: Processes | None = None, **recipe) -> Setup:
    """A gender run on occupations, without prompts that name a gender, whose targets would be of another kind."""
    target = product_target(parse_attributes("gender", bundle.attributes))
    prompts = tuple(concept.train for concept in read_prompts("occupations", None, bundle.path, ["gender"]))
    settings = resolve(("gender",), bundle.recipe, {"explicit_every": 0, **recipe})
    return Setup(bundle, settings, target, prompts, processes or Processes())


def adapted(setup: Setup):
    """The adapted bundle and its state, with an adapter that already does something."""
    model, state = new_state(setup)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in state.adapter.named_parameters():
            if name.endswith("lora_up.weight"):
                p.copy_(MOVED * torch.randn(p.shape, generator=generator))
    return model, state


class Memory:
    """The most resident memory from here on, above what is resident now."""

    def __init__(self):
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed would else take in what is measured
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        except (OSError, AttributeError):
            pass  # then it is the one since the process began, which loading may have raised
        self.before = high_water()

    def above(self) -> int:
        """Bytes."""
        return high_water() - self.before


def high_water() -> int:
    """The largest resident memory, in bytes; ru_maxrss starts with the parent's, so it is second choice."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def fresh(script: str, work: dict) -> dict:
    """What `python script --child WORK` prints on its last line, as an object."""
    command = [sys.executable, script, "--child", json.dumps(work)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def environment() -> dict:
    """This process's, with the repository on the path."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def medians(rows: list[dict]) -> dict:
    """The median of each number over repeated measurements."""
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def machine() -> dict:
    """Where it was measured; `load` tells whether the machine was quiet."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def table(header: list[str], rows: list[list]) -> str:
    """Rows of texts and numbers as a table in Markdown; None is a dash."""
    lines = [header, ["---"] * len(header), *([cell_of(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell_of(value) -> str:
    """Three digits of a number that has a fraction."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if value == 0 or abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write(path: Path | None, report) -> None:
    """A report as JSON, if a file is given."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
