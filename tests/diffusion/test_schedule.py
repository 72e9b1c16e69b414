"""The schedule against diffusers' tables and against its own definition, summed the slow way."""

import math

import numpy as np
import pytest
import torch

from fairref.diffusion.schedule import Schedule
from fairref.errors import UserError


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
@pytest.mark.parametrize("T", [3, 1000])
def test_tables_are_those_of_diffusers(kind, T):
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDPMScheduler(
        num_train_timesteps=T, beta_start=0.00085, beta_end=0.012, beta_schedule=kind
    )
    schedule = Schedule(T=T, kind=kind)
    np.testing.assert_allclose(schedule.beta, peer.betas, rtol=1e-6)
    np.testing.assert_allclose(schedule.alpha, peer.alphas, rtol=1e-6)
    np.testing.assert_allclose(schedule.alpha_bar, peer.alphas_cumprod, rtol=2e-5)


def test_tables_follow_their_definition():
    schedule = Schedule()
    alpha_bar = 1.0
    for t in range(1, 1001):
        root_beta = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * (t - 1) / 999
        beta = root_beta**2
        alpha_bar *= 1 - beta
        A = 1 / math.sqrt(alpha_bar) * beta / math.sqrt(1 - alpha_bar)
        for table, value in [(schedule.beta, beta), (schedule.alpha_bar, alpha_bar), (schedule.A, A)]:
            assert table.dtype == torch.float64 and table.shape == (1000,)
            assert float(table[t - 1]) == pytest.approx(value, rel=1e-12)


def test_one_forward_step_after_another_is_the_jump_from_x_0():
    # eq 1 composed: the variance of x_t given x_0 obeys v_t = alpha_t v_{t-1} + beta_t and must be 1 -
    # alpha_bar_t.
    schedule, v = Schedule(), 0.0
    for alpha, beta in zip(schedule.alpha.tolist(), schedule.beta.tolist(), strict=True):
        v = alpha * v + beta
    assert v == pytest.approx(1 - float(schedule.alpha_bar[-1]), rel=1e-12)


@pytest.mark.parametrize(
    "change, said",
    [({"T": 0}, "num_train_timesteps 0"), ({"beta_end": 1.5}, "1.5"), ({"kind": "cosine"}, "cosine")],
)
def test_a_schedule_that_is_none_is_refused(change, said):
    with pytest.raises(UserError, match=said):
        Schedule(**change)
