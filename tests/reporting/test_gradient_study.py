"""Figures 6a and 6b as numbers, on the tiny bundle: each curve against a computation of its own."""

import csv

import numpy as np
import pytest
import torch
from tiny_bundle import write_tiny_bundle

from fairref.bundle.loading import load_bundle
from fairref.commands import cli
from fairref.commands import verify as command
from fairref.diffusion.gradient import C_i
from fairref.diffusion.sampler import noise
from fairref.diffusion.solver import ancestral_table, solver_table, step
from fairref.generation.lora import adapt
from fairref.generation.rollout import embed
from fairref.reporting import gradient_study as study
from fairref.verification import sampling, verify
from fairref.verification.checks import CHECKS

S, R = 4, 3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return load_bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundle")), dtype=torch.float64)


def by_autograd(bundle, prompt, image):
    """|R A_t B_t dε/dc|, |R A_t dε/dc|, |R dε/dc| of one image in run order, by autograd with a leaf a step."""
    table = ancestral_table(bundle.schedule, S)
    c, c_empty = embed(bundle, prompt).detach().split(1)
    leaves = [(c.clone().requires_grad_(), c_empty.clone().requires_grad_()) for _ in range(S)]
    z = noise(0, study.NOISE, [image], (4, 8, 8)).double()
    cotangent = 1e-2 * noise(0, study.NOISE - 1, [image], (4, 8, 8)).double()
    eps_of = []
    for i, t in enumerate(table.timesteps.tolist()):
        both = [bundle.unet(z, t, x) for x in leaves[i]]
        eps = both[1] + study.GUIDANCE * (both[0] - both[1])
        eps_of.append((z.detach(), t, eps))
        w = noise(0, study.NOISE + 1 + i, [image], (4, 8, 8)).double()
        z = table.p[i] * z + table.q[i] * eps + table.sigma[i] * w
    exact = [
        torch.stack(torch.autograd.grad(z, pair, cotangent, retain_graph=True)).norm() for pair in leaves
    ]
    alone = []
    for z_i, t, _ in eps_of:
        pair = [c.clone().requires_grad_(), c_empty.clone().requires_grad_()]
        both = [bundle.unet(z_i, t, x) for x in pair]
        eps = both[1] + study.GUIDANCE * (both[0] - both[1])
        alone.append(torch.stack(torch.autograd.grad(eps, pair, cotangent)).norm())
    exact, alone = torch.stack(exact), torch.stack(alone)
    return exact.numpy(), (table.k.abs() * alone).numpy(), alone.numpy()


def test_the_scales_are_those_of_autograd(bundle):
    curves = study.by_curve(study.scales(bundle, "a photo of a cook", S, R))
    expected = np.stack([by_autograd(bundle, "a photo of a cook", n) for n in range(R)])  # (R, 3, S)
    assert len(curves) == 3
    for j, rows in enumerate(curves.values()):
        times = [row["t"] for row in rows]
        assert times == sorted(times) and times[-1] == bundle.schedule.T
        for row, values in zip(reversed(rows), expected[:, j].T, strict=True):
            assert row["mean"] == pytest.approx(values.mean(), rel=1e-9)
            assert row["low"] == pytest.approx(np.quantile(values, 0.05), rel=1e-9)
            assert row["high"] == pytest.approx(np.quantile(values, 0.95), rel=1e-9)


def test_the_descent_starts_the_same_in_all_modes_and_then_differs(bundle, tmp_path):
    rows = study.descent(bundle, "a photo of a cook", "a photo of a nurse", iterations=3, seeds=2, N=2, S=3)
    curves = study.by_curve(rows)
    assert tuple(curves) == study.MODES
    first = [rows[0]["mean"] for rows in curves.values()]
    assert first == pytest.approx([first[0]] * 4, rel=1e-12)
    assert len({round(rows[-1]["mean"], 9) for rows in curves.values()}) == 4
    for row in rows:
        assert 0 <= row["low"] <= row["mean"] <= row["high"] <= 2
    study.write_csv(tmp_path / "a.csv", rows)
    read = list(csv.DictReader((tmp_path / "a.csv").open(encoding="utf-8")))
    assert len(read) == 12 and float(read[5]["mean"]) == rows[5]["mean"]


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


def test_verify_draws_the_figures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    weights = str(write_tiny_bundle(tmp_path / "bundle"))
    scales, descent = study.scales, study.descent
    monkeypatch.setattr(study, "scales", lambda bundle: scales(bundle, S=2, R=2))
    monkeypatch.setattr(study, "descent", lambda bundle: descent(bundle, iterations=2, seeds=1, N=1, S=2))
    for module in verify.MODULES:
        monkeypatch.setitem(CHECKS, module.__name__, CHECKS[module.__name__][: module is sampling])
    assert cli.run(command.main, ["--weights", weights, "--figures", str(tmp_path / "a" / "b")]) == 0
    names = {path.name for path in (tmp_path / "a" / "b").iterdir()}
    assert names == {"fig6a.csv", "fig6a.png", "fig6b.csv", "fig6b.png", "fig7.png"}

    (tmp_path / "file").write_text("")
    for wrong, said in (
        (["--figures", str(tmp_path / "file")], "can't be made"),
        (["--figures", str(tmp_path / "c"), "--weights", "nowhere"], "no such weights"),
        (["--json", str(tmp_path / "none" / "x.json")], "its folder doesn't exist"),
    ):
        capsys.readouterr()
        assert cli.run(command.main, ["--weights", weights, *wrong]) == 2
        captured = capsys.readouterr()
        assert said in captured.err and "pass" not in captured.out


def test_pictures_of_curves_and_paths(tmp_path):
    figures = pytest.importorskip("fairref.reporting.figures")
    pytest.importorskip("matplotlib")
    rows = {name: [{"t": t, "mean": t, "low": t / 2, "high": 2 * t} for t in (1, 10, 100)] for name in "ab"}
    figures.curves(tmp_path / "c.png", rows, "t", ("time", "size"), "A title", log=True)
    figures.gradient_paths(tmp_path / "p.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("c.png", "p.png"))
