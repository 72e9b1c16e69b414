"""A GPU does what the CPU does. Where there is none, nothing here runs: python -m pytest -rP tests/test_cuda.py"""

import json

import pytest
import torch
from PIL import Image
from tiny_run import make_setup, moved

from fairref.bundle.loading import DEFAULT, load_bundle
from fairref.commands import sample, train
from fairref.diffusion.sampler import noise
from fairref.generation.rollout import latent_shape
from fairref.processes import choose_device
from fairref.training.loop import compiled
from fairref.training.step import iteration_gradient

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def gradient(device, dtype, **recipe):
    """One iteration's gradient (P,) on the embedded bundle, in float64 on the CPU, and its metrics."""
    setup = make_setup(load_bundle(DEFAULT, choose_device(device), dtype), batch=8, **recipe)
    setup, model = compiled(setup, (pair := moved(setup))[0])
    with torch.enable_grad():
        found, metrics = iteration_gradient(setup, model, list(pair[1].adapter.parameters()), 0)
    assert {g.device.type for g in found} == {device}
    return torch.cat([g.flatten() for g in found]).double().cpu(), metrics


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("component", ["prefix", "text_encoder", "unet", "both"])
def test_an_iteration_is_the_cpus(component):
    found, expected = (gradient(device, torch.float64, component=component) for device in ("cuda", "cpu"))
    print(component, error(found[0], expected[0]))
    assert error(found[0], expected[0]) < 1e-6  # the detector computes in float32
    assert found[1]["counts"] == expected[1]["counts"]


@pytest.mark.parametrize(
    "how", ["float32", "exact", "recompute", "micro_batch", "compile", "float16", "bfloat16"]
)
def test_every_way_of_an_iteration(how):
    options = {"gradient": "exact"} if how == "exact" else {"micro_batch": 5} if how == "micro_batch" else {}
    if how in ("recompute", "compile"):
        options = {how: True}
    dtype, limit = {"float16": (torch.float16, 0.1), "bfloat16": (torch.bfloat16, 0.4)}.get(
        how, (torch.float32, 1e-3)
    )
    expected, _ = gradient("cpu", torch.float32, **{**options, "compile": False})
    found, _ = gradient("cuda", dtype, **options)
    print(how, error(found, expected))
    assert error(found, expected) < limit


def test_float32_is_float32():
    """cuDNN's convolutions would else be tf32, of 10 bits."""
    bundle, on_cpu = (load_bundle(DEFAULT, choose_device(device)) for device in ("cuda", "cpu"))
    z = noise(0, 0, range(4), latent_shape(bundle))
    with torch.no_grad():
        found, expected = bundle.vae.decode(z.cuda()).cpu(), on_cpu.vae.decode(z)
    print(error(found, expected))
    assert error(found, expected) < 1e-5


def test_images_are_the_cpus(tmp_path):
    devices = ("cuda", "cpu")
    for device in devices:
        options = ["-n", "4", "--device", device, "--out", str(tmp_path / device)]
        sample.main(["a photo of the face of a pilot, a person", *options])
    files = [sorted((tmp_path / device).glob("*.png")) for device in devices]
    assert len(files[0]) == 5  # the four and their grid
    for found, expected in zip(*files, strict=True):
        a, b = (torch.tensor(list(Image.open(f).convert("RGB").tobytes())) for f in (found, expected))
        assert int((a - b).abs().max()) <= 2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_run_that_is_stopped_goes_on(dtype, tmp_path):
    small = (
        "--iterations 4 --batch 8 --checkpoint-every 2 --validate-every 2 --validate-prompts 2 --grid-every 4"
    )
    small += " --validate-images 4 --eval-images 2 --keep 9 --evaluate ema"
    train.main(
        [
            "--attr",
            "gender",
            *small.split(),
            "--dtype",
            dtype,
            "--device",
            "cuda",
            "--out",
            str(tmp_path / "a"),
        ]
    )
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and lines[-1]["skipped"] == 0
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["device"] == "cuda"
    whole = (tmp_path / "a" / "adapter.safetensors").read_bytes()
    (tmp_path / "a" / "checkpoint-000004.safetensors").unlink()
    train.main(["--resume", str(tmp_path / "a")])
    print(dtype, "resumed to the same bytes:", (tmp_path / "a" / "adapter.safetensors").read_bytes() == whole)
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 4
