"""Half precision is for the frozen networks only: what is trained, and what gradients are summed in, is float32."""

import json
from dataclasses import replace

import pytest
import torch
from test_trainer import make_setup, moved
from tiny_bundle import spread, write_tiny_bundle
from torch import nn

from fairref.bundle import load_bundle
from fairref.diffusion.gradient import loss_gradient, pull
from fairref.errors import UserError
from fairref.evaluate import How, clip_t, look_at
from fairref.fairness.attributes import parse_targets
from fairref.finetune import iteration, trainer
from fairref.finetune.iteration import iteration_gradient
from fairref.finetune.rollout import decode, fixed_pictures, latent_shape


def smooth(module):
    """Activations (not the gates) without kinks, beside which any rounding shows in a gradient."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU | nn.Hardswish):
            setattr(module, name, nn.SiLU())
        smooth(child)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = write_tiny_bundle(tmp_path_factory.mktemp("bundle"))
    found = {
        dtype: load_bundle(folder, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    # untrained classifiers whose logits were brought to one have weights that float16 has no numbers for
    full = found[torch.float32]
    judges = full.classifiers
    x = fixed_pictures(full, 0, "a photo of the face of a pilot, a person", range(16), 2, 3.0, "zero")
    for classifier in judges.values():
        smooth(classifier)
        spread(classifier, x)
    return {dtype: replace(bundle, classifiers=judges) for dtype, bundle in found.items()}


@pytest.mark.parametrize("component", ["prefix", "text_encoder", "unet", "both"])
@pytest.mark.parametrize("dtype, error, kink", [(torch.float16, 0.015, 0.05), (torch.bfloat16, 0.12, 0.2)])
def test_the_gradient_of_half_networks(bundles, monkeypatch, component, dtype, error, kink):
    """With one dL/dz_0 for both. The seed is one whose pictures all are clearly of one class or the other."""
    seen, pulled = {}, []
    real = iteration.sampling_gradient

    def spy(recipe, model, parameters, table, path, g, both, *rest):
        seen[both.dtype] = (path[0].z.dtype, path[-1].z.dtype, g.dtype, {p.dtype for p in parameters})
        pulled.append(g)
        return real(recipe, model, parameters, table, path, pulled[0], both, *rest)

    monkeypatch.setattr(iteration, "sampling_gradient", spy)
    setups = [
        make_setup(bundles[kind], component=component, batch=4, steps=2, lambda_img=1.0, seed=12)
        for kind in (torch.float32, dtype)
    ]
    for i in range(3):
        found = []
        pulled.clear()
        for setup in setups:
            model, state = moved(setup)
            gradient, metrics = iteration_gradient(setup, model, list(state.adapter.parameters()), i)
            assert {g.dtype for g in gradient} == {torch.float32}
            found.append((torch.cat([g.flatten() for g in gradient]), metrics))
        (exact, metrics), (half, metrics_of_half) = found
        assert metrics["counts"] == metrics_of_half["counts"]
        assert float((pulled[1] - pulled[0]).norm() / pulled[0].norm()) < kink
        assert float((half - exact).norm() / exact.norm()) < error
    assert seen[dtype] == (torch.float32, torch.float32, torch.float32, {torch.float32})


def _loss(x, factor):
    """factor times the sum of squares of x (n,), through a float16 network."""
    return (x.half() * 1).float().square().sum() * factor


def test_a_gradient_below_float16s_numbers_survives(bundles):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    for factor in (1e-9, 100.0):  # 2^16 times the second is infinite in float16, and 2^8 times, too
        g = loss_gradient(_loss(x, factor), x, torch.float16)
        torch.testing.assert_close(g, torch.tensor([2.0, 4.0]) * factor, rtol=2e-3, atol=0)
    assert not torch.autograd.grad(_loss(x, 1e-9), x)[0].any()
    assert not torch.isfinite(torch.autograd.grad(_loss(x, 1e2) * 2**16, x)[0]).all()
    y = x.half() * 2
    (pulled,) = pull(y, [x], torch.tensor([1e-9, 3e-9]))
    torch.testing.assert_close(pulled, torch.tensor([2e-9, 6e-9]), rtol=2e-3, atol=0)


def test_the_gradient_of_a_large_picture_reaches_the_latent(bundles):
    """Of many pixels each weighs less than float16's smallest number; that must not be rounded away."""
    generator = torch.Generator().manual_seed(3)
    z_0 = torch.randn(2, *latent_shape(bundles[torch.float32]), generator=generator)
    found = []
    for dtype in (torch.float32, torch.float16):
        leaf = z_0.clone().requires_grad_(True)
        x = decode(bundles[dtype], leaf)
        dx = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)) * 1e-8
        found += pull(x, [leaf], dx, dtype)
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.02


def test_what_evaluation_compares_is_float32(bundles):
    bundle = bundles[torch.float16]
    how = How(bundle, parse_targets(["gender"], bundle.attributes), steps=2, guidance=2.0)
    seen = look_at(how, bundle, ["a pilot", "a cook"], 2, "")
    assert {f.dtype for s in seen for f in s.features.values()} == {torch.float32}
    assert all(-1 <= value <= 1 for value in clip_t(how, seen, ["a pilot", "a cook"]).values())


def test_an_infinite_gradient_is_skipped_counted_and_shown(bundles, tmp_path, monkeypatch, capsys):
    setup = make_setup(bundles[torch.float32], iterations=3)
    real = trainer.iteration_gradient

    def spoiled(setup, model, parameters, i):
        gradient, metrics = real(setup, model, parameters, i)
        return ([g * float("inf") for g in gradient] if i == 1 else gradient), metrics

    monkeypatch.setattr(trainer, "iteration_gradient", spoiled)
    trainer.train(setup, tmp_path, {})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 1] and lines[1]["norm"] is None
    said = capsys.readouterr()
    assert "skipped 1" in said.err
    assert "iterations 1 to 3 took 0.0 min\n1 were skipped, for their gradients were not finite\n" in said.out


def test_a_run_without_a_finite_gradient_ends(bundles, tmp_path, monkeypatch):
    setup = make_setup(bundles[torch.float32], iterations=30)
    nan = lambda setup, model, parameters, i: ([torch.full_like(p, torch.nan) for p in parameters], {})
    monkeypatch.setattr(trainer, "iteration_gradient", nan)
    with pytest.raises(UserError, match="20 gradients in a row were not finite"):
        trainer.train(setup, tmp_path, {})
