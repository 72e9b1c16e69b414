"""Figures 6a and 6b as numbers, on the tiny bundle: each curve against a computation of its own."""

import numpy as np
import pytest
import torch
from tiny_bundle import write_tiny_bundle

from fairref.bundle.loading import load_bundle
from fairref.diffusion.gradient import C_i
from fairref.diffusion.sampler import noise
from fairref.diffusion.solver import ancestral_table, solver_table, step
from fairref.generation.lora import adapt
from fairref.generation.rollout import embed
from fairref.reporting import gradient_study as study
from fairref.reporting.figures import by_curve

S, R = 2, 2


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return load_bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundle")), dtype=torch.float64)


def leaves_of(bundle, over, prompt):
    """theta of one step, of its own: the function that embeds the prompt, the U-Net and the leaves."""
    if over == "c":
        pair = [x.clone().requires_grad_() for x in embed(bundle, prompt).detach().split(1)]
        return (lambda: pair), bundle.unet, pair
    adapted, adapter = adapt(bundle, over, generator=torch.Generator().manual_seed(study.ADAPTER))
    return (lambda: embed(adapted, prompt).split(1)), adapted.unet, list(adapter.parameters())


def by_autograd(bundle, over, prompt, image, guidance):
    """|R A_t B_t dε/dθ|, |R A_t dε/dθ|, |R dε/dθ| of one image in run order, by autograd with leaves of each step."""
    table = ancestral_table(bundle.schedule, S)

    def predict(of, z, t):
        text, unet, _ = of
        of_prompt, of_empty = (unet(z, t, x) for x in text())
        return of_empty + guidance * (of_prompt - of_empty)

    def norm(y, of, cotangent):
        gradients = torch.autograd.grad(y, of[2], cotangent, retain_graph=True)
        return sum(float(g.square().sum()) for g in gradients) ** 0.5

    steps = [leaves_of(bundle, over, prompt) for _ in range(S)]
    z = noise(0, study.NOISE, [image], (4, 8, 8)).double()
    cotangent = 1e-2 * noise(0, study.NOISE - 1, [image], (4, 8, 8)).double()
    alone = []
    for i, (t, of) in enumerate(zip(table.timesteps.tolist(), steps, strict=True)):
        alone.append(norm(predict(of, z.detach(), t), of, cotangent))
        w = noise(0, study.NOISE + 1 + i, [image], (4, 8, 8)).double()
        z = table.p[i] * z + table.q[i] * predict(of, z, t) + table.sigma[i] * w
    return [norm(z, of, cotangent) for of in steps], (table.k.abs().numpy() * alone), alone


@pytest.mark.parametrize("over, guidance", [("c", 3.0), ("text_encoder", 7.5), ("unet", 3.0)])
def test_the_scales_are_those_of_autograd(bundle, over, guidance):
    curves = by_curve(study.scales(bundle, "a photo of a cook", S, R, over=over, guidance=guidance), "t")
    expected = np.stack(  # (R, 3, S)
        [by_autograd(bundle, over, "a photo of a cook", n, guidance) for n in range(R)]
    )
    assert len(curves) == 3
    for j, rows in enumerate(curves.values()):
        times = [row["t"] for row in rows]
        assert times == sorted(times) and times[-1] == bundle.schedule.T
        for row, values in zip(reversed(rows), expected[:, j].T, strict=True):
            assert row["mean"] == pytest.approx(values.mean(), rel=1e-9)
            assert row["low"] == pytest.approx(np.quantile(values, 0.05), rel=1e-9)
            assert row["high"] == pytest.approx(np.quantile(values, 0.95), rel=1e-9)


def test_the_descent_starts_the_same_in_all_modes_and_then_differs(bundle):
    rows = study.descent(bundle, "a photo of a cook", "a photo of a nurse", iterations=2, seeds=1, N=1, S=3)
    curves = by_curve(rows, "iteration")
    assert tuple(curves) == study.MODES
    first = [rows[0]["mean"] for rows in curves.values()]
    assert first == pytest.approx([first[0]] * 4, rel=1e-12)
    assert len({round(rows[-1]["mean"], 9) for rows in curves.values()}) == 4
    for row in rows:
        assert 0 <= row["low"] <= row["mean"] <= row["high"] <= 2


@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_the_descent_follows_the_gradient_it_is_named_for(bundle, monkeypatch, mode):
    """The first step's gradient is that of autograd through the loop, or of Algorithm A.1 with its hooks."""
    steps, N, taken = 3, 2, []

    class Recorder:
        def __init__(self, parameters, lr):
            self.parameters = parameters

        def step(self):
            taken.append([p.grad.clone() for p in self.parameters])

    prompt, target, guidance = "a photo of a cook", "a photo of a nurse", study.GUIDANCE
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    rows = study.descent(bundle, prompt, target, (mode,), iterations=1, seeds=1, N=N, S=steps)

    model, adapter = adapt(bundle, "text_encoder", generator=torch.Generator().manual_seed(study.ADAPTER))
    table = solver_table(bundle.schedule, steps)
    weights = C_i(bundle.schedule, table).tolist() if mode == "paper" else [1.0] * steps

    def run(encoder, text, z, detached):
        c, c_empty = (encoder(bundle.tokenizer([x])).expand(len(z), -1, -1) for x in (text, ""))
        previous = None
        for i, t in enumerate(table.timesteps.tolist()):
            at = z.detach() if detached else z
            of_empty, of_prompt = bundle.unet(at, t, c_empty), bundle.unet(at, t, c)
            eps = of_empty + guidance * (of_prompt - of_empty)
            if detached and eps.requires_grad:
                eps.register_hook(lambda g, i=i: weights[i] * g)
            z, previous = step(table, i, z, eps, previous), (z, eps)
        return bundle.clip.encode_image(bundle.vae.decode(z).clamp(-1, 1))

    z_T = noise(study.NOISE, 0, range(N), (4, 8, 8)).double()
    x = run(model.text_encoder, prompt, z_T, detached=mode == "paper")
    o = run(bundle.text_encoder, target, noise(study.TARGET, 0, [0], (4, 8, 8)).double(), detached=True)
    loss = (1 - x @ o.detach()[0]).mean()
    assert rows[0]["mean"] == pytest.approx(loss.item(), rel=1e-9)
    expected = torch.autograd.grad(loss, list(adapter.parameters()))
    for found, wanted in zip(taken[0], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9 * float(wanted.abs().max()) + 1e-14)
    assert any(float(wanted.abs().max()) > 1e-6 for wanted in expected)
