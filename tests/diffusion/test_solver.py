"""The solver tables against diffusers' schedulers, against a known solution, and term by term."""

import math
import re

import numpy as np
import pytest
import torch

from fairref.diffusion.gradient import C_i, step_weights
from fairref.diffusion.schedule import Schedule
from fairref.diffusion.solver import ancestral_table, grid, solver_table, step
from fairref.errors import UserError

SCHEDULE = Schedule()
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def run(table, z, eps_of, w=None):
    """z_0 of a run with eps_of(i, z) as the network."""
    previous = None
    for i in range(table.S):
        eps = eps_of(i, z)
        z, previous = step(table, i, z, eps, previous, None if w is None else w[i]), (z, eps)
    return z


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_dpm_solver_is_that_of_diffusers(end):
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DPMSolverMultistepScheduler(**BETAS, final_sigmas_type=end, timestep_spacing="linspace")
    for S in range(1, 51):
        table = solver_table(SCHEDULE, S, end)
        peer.set_timesteps(S)
        assert table.timesteps.tolist() == peer.timesteps.tolist()
        z_T = theirs = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(S))
        for t in peer.timesteps:
            theirs = peer.step(torch.tanh(theirs + t / 1000), t, theirs).prev_sample
        ours = run(table, z_T, lambda i, z, t=table.timesteps: torch.tanh(z + t[i] / 1000))
        assert ours.dtype == torch.float32
        # The peer's tables are float32; the scale is that of the largest latent.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize(
    "S, variance", [(1, "small"), (7, "small"), (50, "small"), (1000, "small"), (1000, "large")]
)
def test_ancestral_sampling_is_that_of_diffusers(S, variance):
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDPMScheduler(
        **BETAS, variance_type=f"fixed_{variance}", clip_sample=False, timestep_spacing="trailing"
    )
    peer.set_timesteps(S)
    table = ancestral_table(SCHEDULE, S, variance)
    assert table.timesteps.tolist() == peer.timesteps.tolist()
    z_T = theirs = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(2)
    w = []
    for t in peer.timesteps:
        w.append(torch.randn(1, 4, 2, 2, generator=torch.Generator().set_state(generator.get_state())))
        theirs = peer.step(torch.tanh(theirs + t / 1000), t, theirs, generator=generator).prev_sample
    ours = run(table, z_T, lambda i, z: torch.tanh(z + table.timesteps[i] / 1000), w)
    # Up to 1,000 float32 steps on either side; the table itself is held to eq 3 below.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=4e-5 * max(1.0, float(theirs.abs().max())))


def test_ancestral_sampling_is_eq_3():
    table, generator = ancestral_table(SCHEDULE), torch.Generator().manual_seed(0)
    eps, w = torch.randn(2, 1000, 3, dtype=torch.float64, generator=generator)
    z = literal = torch.randn(3, dtype=torch.float64, generator=generator)
    for t in range(1000, 0, -1):
        alpha_bar = math.prod(SCHEDULE.alpha[:t].tolist())
        before = math.prod(SCHEDULE.alpha[: t - 1].tolist())
        beta, alpha = float(SCHEDULE.beta[t - 1]), float(SCHEDULE.alpha[t - 1])
        sigma = math.sqrt(beta * (1 - before) / (1 - alpha_bar)) if t > 1 else 0.0
        literal = (literal - beta / math.sqrt(1 - alpha_bar) * eps[1000 - t]) / math.sqrt(alpha) + sigma * w[
            1000 - t
        ]
    torch.testing.assert_close(run(table, z, lambda i, z: eps[i], w), literal, rtol=1e-10, atol=1e-10)


def test_second_order_convergence():
    # Data N(0, 1/4) in one dimension: the optimal network is linear and the flow keeps z / std(z_t) constant.
    # Many small diffusion times stand in for continuous time, so that rounding of the grid is out of the
    # picture. Measured half way: the grid's last steps span as much of lambda whatever S is, so z_0 itself
    # converges slower.
    schedule = Schedule(T=200_001, beta_start=0.00085 / 200, beta_end=0.012 / 200)
    std = (schedule.alpha_bar / 4 + 1 - schedule.alpha_bar).sqrt()

    def error(S):
        table = solver_table(schedule, S)
        scale = (1 - schedule.alpha_bar).sqrt()[table.timesteps] / std[table.timesteps] ** 2
        z, previous = std[-1], None
        for i in range(S // 2):
            z, previous = step(table, i, z, scale[i] * z, previous), (z, scale[i] * z)
        return abs(float(z - std[100_000]))

    errors = np.log2([error(S) for S in (32, 64, 128, 256)])
    assert np.diff(errors)[-1] == pytest.approx(-2, abs=0.15)


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("S", [1, 2, 3, 14, 15, 20, 50])
def test_a_and_k_are_the_response_to_one_input_at_a_time(end, S):
    table = solver_table(SCHEDULE, S, end)
    inputs = torch.eye(S + 1, dtype=torch.float64)  # column 0 is z_T, column 1 + i is eps_i
    response = run(table, inputs[0], lambda i, z: inputs[1 + i])
    torch.testing.assert_close(response[0].item(), table.a, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(response[1:], table.k, rtol=1e-11, atol=1e-12)
    assert table.m.count_nonzero() == 0


def test_m_is_the_response_to_the_noise():
    table = ancestral_table(SCHEDULE, 20)
    w = torch.eye(20, dtype=torch.float64)
    zero = torch.zeros(20, dtype=torch.float64)
    torch.testing.assert_close(run(table, zero, lambda i, z: zero, w), table.m, rtol=1e-12, atol=0)
    assert table.m[-1] == 0 and (table.m[:-1] > 0).all()


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("S", [1, 2, 14, 15, 20, 50])
def test_a_perfect_prediction_is_kept(end, S):
    # z_t = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) e with the same e at every time: rows must keep to it.
    table = solver_table(SCHEDULE, S, end)
    x, e = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = SCHEDULE.alpha_bar[table.timesteps[0]]
    final = torch.tensor(1.0, dtype=torch.float64) if end == "zero" else SCHEDULE.alpha_bar[0]
    z_0 = run(table, start.sqrt() * x + (1 - start).sqrt() * e, lambda i, z: e)
    torch.testing.assert_close(z_0, final.sqrt() * x + (1 - final).sqrt() * e, rtol=1e-10, atol=1e-10)


def test_where_the_rows_are_first_order():
    for S in (1, 2, 14, 15, 20):
        first = solver_table(SCHEDULE, S, "sigma_min").s == 0
        assert first[0] and first[1:-1].count_nonzero() == 0 and bool(first[-1]) == (S < 15)
        assert solver_table(SCHEDULE, S, "zero").s[-1] == 0


def test_the_weights_of_the_default_run():
    table = solver_table(SCHEDULE, 20, "zero")
    w = step_weights(SCHEDULE, table)
    assert float(w[0]) == pytest.approx(-0.22, abs=0.005)
    np.testing.assert_allclose(w[1:18], -0.40, atol=0.04)
    np.testing.assert_allclose(w[18:], [-0.74, -0.71], atol=0.005)
    assert float(w.abs().log().mean()) == pytest.approx(float(table.k.abs().log().mean()), rel=1e-12)

    table = solver_table(SCHEDULE, 20, "sigma_min")
    w = step_weights(SCHEDULE, table)
    assert (table.k > 0).nonzero().flatten().tolist() == [17, 18]
    assert float(w[-1]) == pytest.approx(-2.12, abs=0.005)


def test_standardisations():
    table = solver_table(SCHEDULE, 20)
    w = step_weights(SCHEDULE, table, "solver")
    assert w.unique().numel() == 1 and float(w[0]) == pytest.approx(-float(table.k.abs().log().mean().exp()))
    assert torch.equal(step_weights(SCHEDULE, table, "none"), table.k)
    assert float(C_i(SCHEDULE, table).log().sum()) == pytest.approx(0, abs=1e-12)
    with pytest.raises(UserError, match="half"):
        step_weights(SCHEDULE, table, "half")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_step_keeps_dtype_and_arguments(dtype):
    table = solver_table(SCHEDULE, 20)
    z, eps, z_previous, eps_previous = torch.ones(4, 3, dtype=dtype)
    assert step(table, 5, z, eps, (z_previous, eps_previous)).dtype == dtype
    for x in (z, eps, z_previous, eps_previous):
        assert torch.equal(x, torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("trailing", [False, True])
def test_grid_stays_inside(trailing):
    for S in (1, 3, 333, 499):
        t = grid(1000, S, trailing)
        assert (
            t.dtype == torch.int64 and t.shape == (S,) and t[-1] >= 0 and t[0] <= 999 and (t.diff() < 0).all()
        )


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"S": 0}, "steps is 0"),
        ({"S": -3}, "steps is -3"),
        ({"S": 1000}, "expected 1 to 999 of 1000"),
        ({"S": 5, "end": "one"}, "'one'"),
    ],
)
def test_what_cannot_be_done_is_said(arguments, said):
    with pytest.raises(UserError, match=said):
        solver_table(SCHEDULE, **arguments)


@pytest.mark.parametrize("trailing", [False, True])
def test_every_number_of_steps_up_to_the_one_that_is_named_can_be_placed(trailing):
    for T in (2, 3, 50, 999, 1000):
        with pytest.raises(UserError) as refused:
            grid(T, T + 1, trailing)
        largest = int(re.search(r"expected 1 to (\d+)", str(refused.value))[1])
        assert largest == T - (not trailing)
        for S in range(1, largest + 1):
            t = grid(T, S, trailing)
            assert t[-1] >= 0 and t[0] < T and (t.diff() < 0).all()


def test_ancestral_variance_is_checked():
    with pytest.raises(UserError, match="'medium'"):
        ancestral_table(SCHEDULE, 10, "medium")


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("stop", [1, 13, 20])
def test_a_stopped_run_ends_in_the_image_predicted_at_its_last_step(end, stop):
    whole, table = solver_table(SCHEDULE, 20, end), solver_table(SCHEDULE, 20, end, stop=stop)
    assert torch.equal(table.timesteps, whole.timesteps[:stop]) and stop == table.S
    eps = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z, previous = eps[0] / 2, None
    for i in range(stop - 1):
        z, previous = step(whole, i, z, eps[i], previous), (z, eps[i])
    alpha_bar = SCHEDULE.alpha_bar[whole.timesteps[stop - 1]]
    predicted = (z - (1 - alpha_bar).sqrt() * eps[stop - 1]) / alpha_bar.sqrt()
    torch.testing.assert_close(table.a * eps[0] / 2 + table.k @ eps[:stop], predicted, rtol=1e-11, atol=1e-11)
