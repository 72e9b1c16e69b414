"""`python -m fairref.verify` passes, and it fails when a sign or an index of the derivation is changed."""

import inspect
import json
import math

import pytest
import torch

from fairref import verify
from fairref.checks import Check
from fairref.diffusion import derivation, gradient, sampler, solver
from fairref.diffusion.schedule import Schedule
from fairref.fairness import losses, metrics, transport


def test_every_equation_holds(tmp_path, capsys):
    assert verify.main(["--json", str(tmp_path / "verify.json")]) == 0
    rows = json.loads((tmp_path / "verify.json").read_text())
    assert len(rows) == len(verify.CHECKS) and all(row["passed"] for row in rows)
    printed = capsys.readouterr().out
    assert printed.count("pass  ") == len(rows) and f"{len(rows)} checks, 0 failed" in printed
    named = " ".join(row["equation"] for row in rows)
    for equation in (
        "eq 1",
        "eq 2",
        "eq 3",
        "eqs 4, 5",
        "eq 6",
        "eq 7",
        "L_face",
        "eq 9",
        "eq 10",
        "Algorithm A.1",
        "bias(P)",
    ):
        assert equation in named


def test_it_leaves_the_randomness_of_others_alone():
    state = torch.get_rng_state()
    for c in verify.CHECKS[:3]:
        c.run()
    assert torch.equal(torch.get_rng_state(), state)


MUTANTS = [
    (derivation, "coupling", "B[-1] @ (B[0] - b[s] * J[s])", "(B[0] - b[s] * J[s]) @ B[-1]"),  # s = 1 rightmost
    (derivation, "coupling", "B[0] - b[s]", "B[0] + b[s]"),
    (derivation, "coupling", "b[s] * J[s]", "b[s] * J[s + 1]"),
    (derivation, "coupling", "(1 - schedule.alpha_bar).sqrt()", "(1 - schedule.alpha_bar)"),
    (derivation, "gradient_paths", "-b[s] * J[s]", "b[s] * J[s]"),
    (derivation, "solver_coupling", "s_next * V_after", "r_next * V_after"),
    (derivation, "solver_coupling", "E[0] @ J[i]", "J[i] @ E[0]"),
    (gradient, "exact_gradient", "r_next * v_after + through_z", "r_next * v_after - through_z"),
    (gradient, "C_i", "1 / A_t(schedule, table)", "A_t(schedule, table)"),
    (gradient, "C_i", "C / geometric_mean(C)", "C"),
    (gradient, "geometric_mean", "x.log().mean().exp()", "x.mean()"),
    (gradient, "A_t", "table.timesteps]", "table.timesteps - 1]"),
    (gradient, "step_weights", "C_i(schedule, table) * table.k", "-C_i(schedule, table) * table.k"),
    (derivation, "unrolled_z0", "- drift", "+ drift"),
    # the seed's slip: no sigma_t
    (derivation, "unrolled_z0", "sigma[1:].to(eps) / root[:-1]", "1 / root[:-1]"),
    (derivation, "unrolled_z0", "/ root[:-1], w[1:]", "/ root[1:], w[1:]"),
    (gradient, "vjp", "(1 - guidance) * v", "guidance * v"),
    (gradient, "subsample", "w.sign()", "1"),
    (solver, "_with_totals", "s_next * u[2:]", "s_next * u[1:-1]"),
    (solver, "_with_totals", "k = q * u[1:-1]", "k = -q * u[1:-1]"),
    (solver, "solver_table", "2 * h[:-1]", "h[:-1]"),
    (solver, "solver_table", "-gain[1:] * d[1:] * x_eps[:-1]", "gain[1:] * d[1:] * x_eps[:-1]"),
    (solver, "ancestral_table", "beta * (1 - then) / (1 - now)", "beta * (1 - now) / (1 - then)"),
    (solver, "ancestral_table", "sigma[-1] = 0", "pass"),
    (sampler, "guide", "s * (eps_prompt - eps_empty)", "s * (eps_empty - eps_prompt)"),
    (transport, "two_classes", "bdtrc(rank - 1", "bdtrc(rank"),
    (transport, "two_classes", "logits[:, 1] - logits[:, 0]", "logits[:, 0] - logits[:, 1]"),
    (
        transport,
        "every_assignment",
        "cost[:, None, :] - cost[:, :, None]",
        "cost[:, :, None] - cost[:, None, :]",
    ),
    (transport, "class_distance", "rest**2 + p**2", "rest**2 - p**2"),
    (transport, "class_sums", "np.eye(k)[c]", "np.eye(k)[::-1][c]"),
    (losses, "align_loss", "cross_entropy.where(confident, 0)", "cross_entropy"),
    (losses, "image_loss", "1 - F.cosine", "1 + F.cosine"),
    (losses, "face_loss", "1 - F.cosine", "1 + F.cosine"),
    (losses, "nearest_faces", "cosine > largest", "cosine < largest"),
    (losses, "nearest_faces", "(row + start)", "row"),
    (losses, "face_references", "sure[:, None]", "~sure[:, None]"),
    (metrics, "bias", ".mean(-1)", ".sum(-1)"),
]


@pytest.mark.parametrize(
    ("module", "name", "old", "new"), MUTANTS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_changed_sign_or_index_is_noticed(monkeypatch, module, name, old, new):
    source = inspect.getsource(getattr(module, name))
    assert source.count(old) == 1
    namespace = dict(vars(module))
    exec(source.replace(old, new), namespace)
    mutant = inspect.unwrap(namespace[name])  # without no_grad
    monkeypatch.setattr(module, name, type(mutant)(mutant.__code__, vars(module), name, mutant.__defaults__))
    if mutant.__kwdefaults__:
        getattr(module, name).__kwdefaults__ = mutant.__kwdefaults__
    assert noticed()


@pytest.mark.parametrize(
    "mutate", [torch.neg, lambda A: A.roll(1), torch.square], ids=["sign", "index", "power"]
)
def test_a_changed_A_t_is_noticed(monkeypatch, mutate):
    A = Schedule.A.func
    monkeypatch.setattr(Schedule, "A", property(lambda self: mutate(A(self))))
    assert noticed()


def noticed():
    """Whether a check fails; cheap ones first."""
    for c in sorted(verify.CHECKS, key=lambda c: c.run.__name__ in EXPENSIVE):
        try:
            if not c.run() <= c.tolerance:
                return True
        except Exception:
            return True
    return False


EXPENSIVE = {"expected_transport", "joint_attributes", "monte_carlo", "forward_process", "subsampled"}


def test_a_check_that_raises_or_is_not_a_number_has_failed(monkeypatch, capsys, tmp_path):
    def breaks():
        raise ValueError("shapes")

    checks = [Check("eq 0", "it breaks", "nothing", 1.0, breaks)]
    checks.append(Check("eq 0", "it is no number", "nothing", 1.0, lambda: math.nan))
    monkeypatch.setattr(verify, "CHECKS", checks)
    assert verify.main(["--json", str(tmp_path / "verify.json")]) == 1
    assert capsys.readouterr().out.count("FAIL") == 2
    assert [row["error"] for row in json.loads((tmp_path / "verify.json").read_text())] == [None, None]
