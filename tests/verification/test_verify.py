"""`fairref verify` passes, and each check fails when a sign or an index of what it is about is changed."""

import inspect
import json
import math
import textwrap
from dataclasses import replace

import pytest
import torch

from fairref.commands import verify as command
from fairref.diffusion import gradient, model, solver
from fairref.diffusion.schedule import Schedule
from fairref.fairness import losses, metrics, threshold, transport
from fairref.verification import derivation, fairness, gradients, published, sampling, verify
from fairref.verification.checks import CHECKS, Check

ALL = [check for module in verify.MODULES for check in CHECKS[module.__name__]]


def test_every_equation_holds(tmp_path, capsys):
    assert command.main(["--json", str(tmp_path / "verify.json")]) == 0
    rows = json.loads((tmp_path / "verify.json").read_text())
    assert len(rows) == len(ALL) and all(row["passed"] for row in rows)
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
        "last:K",
        "random:K",
        "bernoulli",
        "drtune:M",
        "couple:ALPHA",
        "bias(P)",
    ):
        assert equation in named


def test_it_leaves_the_randomness_of_others_alone():
    state = torch.get_rng_state()
    for c in ALL[:3]:
        c.run()
    assert torch.equal(torch.get_rng_state(), state)


MUTANTS = [  # owner, function, old, new, the check that must notice it
    # s = 1 rightmost
    (
        derivation,
        "coupling",
        "B[-1] @ (B[0] - b[s] * J[s])",
        "(B[0] - b[s] * J[s]) @ B[-1]",
        gradients.all_paths,
    ),
    (derivation, "coupling", "B[0] - b[s]", "B[0] + b[s]", gradients.exact_ancestral),
    (derivation, "coupling", "b[s] * J[s]", "b[s] * J[s + 1]", gradients.exact_ancestral_difference),
    (
        derivation,
        "coupling",
        "(1 - schedule.alpha_bar).sqrt()",
        "(1 - schedule.alpha_bar)",
        gradients.exact_ancestral,
    ),
    (derivation, "gradient_paths", "-b[s] * J[s]", "b[s] * J[s]", gradients.all_paths),
    (derivation, "solver_coupling", "s_next * V_after", "r_next * V_after", gradients.exact_any_solver),
    (derivation, "solver_coupling", "E[0] @ J[i]", "J[i] @ E[0]", gradients.exact_any_solver),
    (derivation, "gradient_matrix", "[:2]", "[:2][::-1]", gradients.rows_of_the_matrix),
    (derivation, "unrolled_z0", "- drift", "+ drift", gradients.unrolled),
    # no sigma_t
    (derivation, "unrolled_z0", "sigma[1:].to(eps) / root[:-1]", "1 / root[:-1]", gradients.unrolled),
    (derivation, "unrolled_z0", "/ root[:-1], w[1:]", "/ root[1:], w[1:]", gradients.unrolled),
    (
        gradient,
        "exact_gradient",
        "v + kappa[i] * through_z",
        "v - kappa[i] * through_z",
        gradients.exact_without_matrices,
    ),
    (gradient, "exact_gradient", "s_next * v_after", "r_next * v_after", gradients.exact_without_matrices),
    (gradient, "exact_gradient", "if kappa[i]:", "if True:", published.last_steps),
    (gradient, "exact_gradient", "if kappa[i]:", "if kappa[i - 1]:", published.drawn_steps),
    (gradient, "exact_gradient", "kappa[i] * through_z", "through_z", published.scaled_coupling),
    (
        gradient,
        "exact_gradient",
        "kappa[i] * through_z",
        "kappa[i] ** 2 * through_z",
        published.matrices_with_kappa,
    ),
    (gradient, "spread_steps", "after % apart == 0", "after % apart == 1", published.spread_steps),
    (gradient, "spread_steps", "(M - 1) * apart", "(M - 1) * (apart - 1)", published.probabilities),
    (gradient, "spread_steps", "(M - 1) * apart", "0", published.probabilities),
    (gradient, "late_steps", "S - M + 1", "S", published.probabilities),
    (gradient, "late_steps", "LATE * S", "S", published.probabilities),
    (solver, "solver_table", "or stop is not None", "", published.spread_steps),
    (gradient, "C_i", "1 / A_t(schedule, table)", "A_t(schedule, table)", gradients.coefficients),
    (gradient, "C_i", "C / geometric_mean(C)", "C", gradients.coefficients),
    (gradient, "geometric_mean", "x.log().mean().exp()", "x.mean()", gradients.coefficients),
    (gradient, "A_t", "table.timesteps]", "table.timesteps - 1]", gradients.coefficients),
    (gradient, "adjusted_gradient", "table.timesteps[steps]", "table.timesteps[images]", gradients.adjusted),
    (gradient, "adjusted_gradient", "g[images]", "g[images[::-1]]", gradients.adjusted),
    (gradient, "subsample", "(w / length)", "(w.abs() / length)", gradients.subsampled),
    (gradient, "subsample", "w.abs() * size", "w.abs()", gradients.subsampled),
    (model, "guide", "s * (eps_prompt - eps_empty)", "s * (eps_empty - eps_prompt)", sampling.guidance),
    (model.GuidedModel, "_eps", "texts[::-1]", "texts", sampling.guidance),
    (
        model.GuidedModel,
        "kept",
        "[*texts, *self.parameters",
        "[*texts[::-1], *self.parameters",
        gradients.adjusted,
    ),
    (model.GuidedModel, "kept", ".pop()", ".pop().neg()", gradients.exact_without_matrices),
    (solver, "_with_totals", "s_next * u[2:]", "s_next * u[1:-1]", sampling.totals),
    (solver, "_with_totals", "k = q * u[1:-1]", "k = -q * u[1:-1]", gradients.adjusted),
    (solver, "solver_table", "2 * h[:-1]", "h[:-1]", sampling.solver_steps),
    (
        solver,
        "solver_table",
        "-gain[1:] * d[1:] * x_eps[:-1]",
        "gain[1:] * d[1:] * x_eps[:-1]",
        sampling.solver_steps,
    ),
    (
        solver,
        "ancestral_table",
        "beta * (1 - then) / (1 - now)",
        "beta * (1 - now) / (1 - then)",
        sampling.reverse_step,
    ),
    (solver, "ancestral_table", "sigma[-1] = 0", "pass", sampling.ancestral_sampling),
    (transport, "two_classes", "bdtrc(rank - 1", "bdtrc(rank", fairness.closed_form),
    (
        transport,
        "two_classes",
        "logits[:, 1] - logits[:, 0]",
        "logits[:, 0] - logits[:, 1]",
        fairness.closed_form,
    ),
    (transport, "every_assignment", "< n, second, start", "< n, start, second", fairness.monte_carlo),
    (transport.Changes, "move_one", "range(K - 2)", "range(0)", fairness.expected_transport),
    (transport.Solver, "draw", "M, fit[0])", "M, fit[0] + fit[1])", fairness.monte_carlo),
    (transport, "class_distance", "rest**2 + p**2", "rest**2 - p**2", fairness.expected_transport),
    (transport, "class_sums", "np.eye(k)[c]", "np.eye(k)[::-1][c]", fairness.expected_transport),
    (losses, "align_loss", "cross_entropy.where(confident, 0)", "cross_entropy", fairness.align),
    (losses, "leaving_targets", "leaves >= C", "1 - leaves >= C", fairness.asked_of_four),
    (threshold, "pull_left", "a - 1, N - 1", "a, N - 1", fairness.pull_left),
    (threshold, "asked_to_change", "own[told], y[told]", "y[told], own[told]", fairness.pull_left),
    (losses, "image_loss", "1 - F.cosine", "1 + F.cosine", fairness.semantics),
    (losses, "face_loss", "1 - F.cosine", "1 + F.cosine", fairness.face),
    (losses, "nearest_faces", "cosine > largest", "cosine < largest", fairness.face),
    (losses, "nearest_faces", "(row + start)", "row", fairness.face),
    (losses, "face_references", "use_own[:, None]", "~use_own[:, None]", fairness.face),
    (metrics, "bias", ".mean(-1)", ".sum(-1)", fairness.bias_metric),
]


@pytest.mark.parametrize(
    ("owner", "name", "old", "new", "check"), MUTANTS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_changed_sign_or_index_is_noticed(monkeypatch, owner, name, old, new, check):
    function = vars(owner)[name]
    source = inspect.getsource(function)
    assert source.count(old) == 1
    made = {}
    namespace = vars(owner) if inspect.ismodule(owner) else inspect.unwrap(function).__globals__
    exec(textwrap.dedent(source.replace(old, new)), namespace, made)
    monkeypatch.setattr(owner, name, made[name])
    assert noticed(check)


MODE_MUTANTS = [  # kind of mode, a field of its row, what is done to it, the check that must notice it
    ("paper", "weights", torch.neg, gradients.adjusted),
    # at the end "sigma_min" two weights are positive
    ("paper", "weights", torch.abs, gradients.coefficients),
    ("solver", "weights", torch.neg, gradients.standardised),
    ("none", "weights", torch.neg, gradients.no_coupling),
    ("none", "weights", lambda w: w.flip(0), gradients.no_coupling),
    ("last", "steps", lambda kept: kept.roll(1), published.last_steps),
    ("last", "coupling", lambda _: 0.0, published.last_steps),
    ("random", "steps", lambda kept: kept.roll(-1), published.random_depth),
    ("random", "steps", lambda kept: kept.flip(0), published.probabilities),
    ("bernoulli", "steps", lambda kept: ~kept, published.drawn_steps),
    ("bernoulli", "steps", lambda kept: kept.flip(0), published.probabilities),
    ("drtune", "steps", lambda kept: kept.flip(0), published.spread_steps),
    ("drtune", "coupling", lambda _: 1.0, published.spread_steps),
    ("drtune", "stop", lambda n: n - 1, published.probabilities),
    ("couple", "coupling", lambda alpha: alpha**2, published.scaled_coupling),
]


@pytest.mark.parametrize(("kind", "field", "mutate", "check"), MODE_MUTANTS)
def test_a_changed_gradient_mode_is_noticed(monkeypatch, kind, field, mutate, check):
    real = gradient.gradient_mode

    def mutant(name):
        row = real(name)
        value = getattr(row, field)
        changed = (lambda *args: mutate(value(*args))) if callable(value) else mutate(value)
        return replace(row, **{field: changed}) if name.split(":")[0] == kind else row

    monkeypatch.setattr(gradient, "gradient_mode", mutant)
    assert noticed(check)


@pytest.mark.parametrize(
    "mutate", [torch.neg, lambda A: A.roll(1), torch.square], ids=["sign", "index", "power"]
)
@pytest.mark.parametrize("check", [gradients.unrolled, gradients.exact_ancestral, gradients.coefficients])
def test_a_changed_A_t_is_noticed(monkeypatch, mutate, check):
    A = Schedule.A.func
    monkeypatch.setattr(Schedule, "A", property(lambda self: mutate(A(self))))
    assert noticed(check)


def noticed(function):
    """Whether this check fails; an exception would say something of the change, not of the check."""
    (check,) = [c for c in ALL if c.run is function]
    return not check.run() <= check.tolerance


def test_a_check_that_raises_or_is_not_a_number_has_failed(monkeypatch, capsys, tmp_path):
    def breaks():
        raise ValueError("shapes")

    checks = [Check("eq 0", "it breaks", "nothing", 1.0, breaks)]
    checks.append(Check("eq 0", "it is no number", "nothing", 1.0, lambda: math.nan))
    for module in verify.MODULES:
        monkeypatch.setitem(CHECKS, module.__name__, checks if module is sampling else [])
    assert command.main(["--json", str(tmp_path / "verify.json")]) == 1
    assert capsys.readouterr().out.count("FAIL") == 2
    assert [row["error"] for row in json.loads((tmp_path / "verify.json").read_text())] == [None, None]
