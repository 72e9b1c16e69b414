"""Half precision is for the frozen networks only: what is trained, and what gradients are summed in, is float32."""

import json
import re
from dataclasses import replace

import pytest
import torch
from tiny_bundle import spread, write_tiny_bundle
from tiny_run import make_setup, moved
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fairref.bundle.loading import load_bundle
from fairref.diffusion.model import scaled_vjp
from fairref.errors import UserError
from fairref.evaluation.judging import EvaluationSettings, drawn_by, judge_prompts
from fairref.evaluation.parts import clip_t
from fairref.fairness.attributes import parse_targets
from fairref.generation.drawing import Drawing, fixed_images
from fairref.generation.rollout import decode, latent_shape
from fairref.training import loop as trainer
from fairref.training import step as iteration
from fairref.training.step import iteration_gradient
from fairref.training.terms import loss_gradient


def smooth(module):
    """Replaces what has a kink, beside which a rounding of any size changes the gradient by a fixed amount."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU | nn.Hardswish):
            setattr(module, name, nn.SiLU())
        if isinstance(child, nn.Hardsigmoid):
            setattr(module, name, nn.Sigmoid())
        smooth(child)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = write_tiny_bundle(tmp_path_factory.mktemp("bundle"))
    found = {
        dtype: load_bundle(folder, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    for bundle in found.values():  # pictures of less contrast stay away from the clamp's kinks at -1 and 1
        for parameter in bundle.vae.decoder.conv_out.parameters():
            parameter.data *= 0.25  # a power of two: exact in every format
    # untrained classifiers whose logits were brought to one have weights that float16 has no numbers for
    full = found[torch.float32]
    judges = full.classifiers
    how = Drawing(steps=2, guidance=3.0)
    x = fixed_images(full, 0, "a photo of the face of a pilot, a person", range(16), how)
    for classifier in (*judges["finetune"], *judges["evaluate"]):
        smooth(classifier)
        spread(classifier, x)
    return {dtype: replace(bundle, classifiers=judges) for dtype, bundle in found.items()}


class Roundings(TorchDispatchMode):
    """Counts the operations whose result is rounded to `dtype`."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.count = dtype, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.count += not operation.is_view and any(x.dtype == self.dtype for x in tensors)
        return result


@pytest.mark.parametrize("component", ["prefix", "text_encoder", "unet", "both"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradient_of_half_networks(bundles, monkeypatch, component, dtype):
    """A format with a mantissa of m bits rounds each result by at most u = 2^-m / 2 of it. Where R such roundings have
    independent signs and nothing amplifies them, they add up to about sqrt(R) u in the root of the mean square. R is
    counted. It is an estimate from the format and the networks, not from how a processor adds; that nothing amplifies
    is seen here, not proven.

    Nothing that could jump is left: the networks have no kinks, and the classes and targets, which are decided by
    an order, are the float32 run's in both. The gradient is held with one dL/dz_0 for both. Over the draws squares
    are added, for a draw whose images almost cancel has a small gradient with the roundings of large ones.
    sqrt(R) is 36 to 41. At this seed, on the oldest instruction set as on AVX2 and AVX-512, the images have 3, dL/dz_0
    3 to 8; over seven seeds (AVX-512) the gradient has 3 to 22, the same in both formats.
    """
    seen, pictures, targets, pulled, counts = {}, [], [], [], []
    real_gradient, real_pair, real_ot = iteration.sampling_gradient, iteration.draw_pair, iteration.joint_ot
    roundings = Roundings(dtype)

    def draw_pair(*args):
        counts.append(roundings.count)
        pictures.append(real_pair(*args))
        first = pictures[0]
        return replace(pictures[-1], o_class=first.o_class, original_confident=first.original_confident)

    def joint_ot(*args, **options):
        targets.append(real_ot(*args, **options))
        return targets[0]

    def sampling_gradient(setup, drawn, g, text, parameters):
        path = drawn.path
        seen[text.dtype] = (path[0].z.dtype, path[-1].z.dtype, g.dtype, {p.dtype for p in parameters})
        counts.append(roundings.count)
        pulled.append(g)
        return real_gradient(setup, drawn, pulled[0], text, parameters)

    for spy in (draw_pair, joint_ot, sampling_gradient):
        monkeypatch.setattr(iteration, spy.__name__, spy)
    setups = [
        make_setup(bundles[kind], component=component, batch=4, steps=2, lambda_img=1.0, seed=12)
        for kind in (torch.float32, dtype)
    ]
    pairs = {"picture": [], "dL/dz_0": [], "gradient": []}  # of the float32 networks, of the half networks
    for i in range(3):
        found = []
        for spied in (pictures, targets, pulled):
            spied.clear()
        for setup in setups:
            model, state = moved(setup)
            roundings.count = 0
            counts.clear()
            with roundings:
                gradient, _ = iteration_gradient(setup, model, list(state.adapter.parameters()), i)
            assert {g.dtype for g in gradient} == {torch.float32}
            found.append(torch.cat([g.flatten() for g in gradient]))
        assert max(float(p.x.abs().max()) for p in pictures) < 1, "a picture at the clamp's kinks"
        pairs["picture"].append([p.x.detach() for p in pictures])
        pairs["dL/dz_0"].append(pulled[:])
        pairs["gradient"].append(found)
    assert seen[dtype] == (torch.float32, torch.float32, torch.float32, {torch.float32})
    path, before = counts  # behind the path of the pictures, behind dL/dz_0
    R = {"picture": before, "dL/dz_0": before, "gradient": path + roundings.count - before}
    u = torch.finfo(dtype).eps / 2
    for name, draws in pairs.items():
        wrong = sum(float((half - exact).square().sum()) for exact, half in draws)
        size = sum(float(exact.square().sum()) for exact, _ in draws)
        # less than one rounding: the half networks were not used
        assert u / 2 < (wrong / size) ** 0.5 < R[name] ** 0.5 * u, (name, (wrong / size) ** 0.5 / u, R[name])


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
    (pulled,) = scaled_vjp(y, [x], torch.tensor([1e-9, 3e-9]))
    torch.testing.assert_close(pulled, torch.tensor([2e-9, 6e-9]), rtol=2e-3, atol=0)


def test_the_gradient_of_a_large_picture_reaches_the_latent(bundles):
    """Of many pixels each weighs less than float16's smallest number; that must not be rounded away. What may be is
    sqrt(R) u of R roundings, as above."""
    generator = torch.Generator().manual_seed(3)
    z_0 = torch.randn(2, *latent_shape(bundles[torch.float32]), generator=generator)
    found, roundings = [], Roundings(torch.float16)
    for dtype in (torch.float32, torch.float16):
        leaf = z_0.clone().requires_grad_(True)
        with roundings:
            x = decode(bundles[dtype], leaf)
            dx = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)) * 1e-8
            found += scaled_vjp(x, [leaf], dx, dtype)
        assert float(x.detach().abs().max()) < 1, "a picture at the clamp's kinks"
    u = torch.finfo(torch.float16).eps / 2
    assert float((found[1] - found[0]).norm() / found[0].norm()) < roundings.count**0.5 * u


def test_what_evaluation_compares_is_float32(bundles):
    bundle = bundles[torch.float16]
    target = parse_targets(["gender"], bundle.attributes)
    settings = EvaluationSettings(bundle, target, Drawing(steps=2, guidance=2.0))
    judged = judge_prompts(settings, drawn_by(settings, bundle, ""), ["a pilot", "a cook"], 2)
    assert {f.dtype for s in judged for f in s.features.values()} == {torch.float32}
    assert all(-1 <= value <= 1 for value in clip_t(settings, judged, ["a pilot", "a cook"]).values())


def test_an_infinite_gradient_is_skipped_counted_and_shown(bundles, tmp_path, monkeypatch, capsys):
    setup = make_setup(bundles[torch.float32], iterations=3)
    real = trainer.iteration_gradient

    def spoiled(setup, model, parameters, i, watch):
        gradient, metrics = real(setup, model, parameters, i)
        return ([g * float("inf") for g in gradient] if i == 1 else gradient), metrics

    monkeypatch.setattr(trainer, "iteration_gradient", spoiled)
    trainer.finetune(setup, tmp_path, {})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 1] and lines[1]["norm"] is None
    said = capsys.readouterr()
    assert "skipped 1" in said.err
    # however long they took
    assert re.search(
        r"^iterations 1 to 3 took \d+\.\d min\n1 were skipped, because their gradients were not finite$",
        said.out,
        re.M,
    )


def test_a_run_without_a_finite_gradient_ends(bundles, tmp_path, monkeypatch):
    setup = make_setup(bundles[torch.float32], iterations=30)

    def nan(setup, model, parameters, i, watch):
        return ([torch.full_like(p, torch.nan) for p in parameters], {})

    monkeypatch.setattr(trainer, "iteration_gradient", nan)
    with pytest.raises(UserError, match="20 gradients in a row were not finite"):
        trainer.finetune(setup, tmp_path, {})
