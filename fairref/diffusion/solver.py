"""Solvers as tables of numbers and one short step: DPM-Solver++ (2M, midpoint) and ancestral sampling (eq 3).

Both are linear in what they are given, so each evaluation i = 0..S-1 is one row of coefficients

    z_{i+1} = p_i z_i + q_i eps_i + r_i z_{i-1} + s_i eps_{i-1} + sigma_i w_i

and the whole run is z_0 = a z_T + sum_i k_i eps_i + sum_i m_i w_i with scalars of the time grid only."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairref.diffusion.schedule import Schedule
from fairref.errors import UserError

# Below this many evaluations the last step is first order whatever the end: diffusers' lower_order_final.
SECOND_ORDER_END_FROM = 15
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SolverTable:
    """One sampling run of S evaluations. Coefficients are (S,) float64 on the CPU, in run order."""

    timesteps: Tensor  # (S,) int64, the U-Net's time steps (indices 0..T-1), descending
    p: Tensor  # of z_i
    q: Tensor  # of eps_i
    r: Tensor  # of z_{i-1}
    s: Tensor  # of eps_{i-1}
    sigma: Tensor  # of the noise w_i; all zero for a deterministic solver
    a: float  # of z_T in z_0
    k: Tensor  # of eps_i in z_0
    m: Tensor  # of w_i in z_0

    @property
    def S(self) -> int:
        """The number of U-Net evaluations."""
        return len(self.timesteps)


def solver_table(schedule: Schedule, S: int, end: str = "zero", stop: int | None = None) -> SolverTable:
    """DPM-Solver++ (2M, midpoint) with S evaluations.

    end "zero": the last step goes to noise level 0 and is first order; "sigma_min": it goes to the level of
    t = 1 and is second order from S = 15 on. An unknown end is a UserError. stop: after so many of the S
    evaluations the run goes to noise level 0 at once, so z_0 is the image predicted there.

    With x_i = (z_i - sd_i eps_i) / root_i the predicted image, root = sqrt(alpha_bar),
    sd = sqrt(1 - alpha_bar), lambda = log(root / sd) and h_i = lambda_{i+1} - lambda_i:

        z_{i+1} = sd_{i+1}/sd_i z_i + root_{i+1} (1 - e^-h_i) ((1 + d) x_i - d x_{i-1})

    with d = h_i / (2 h_{i-1}), and d = 0 where the step is first order."""
    if end not in ("zero", "sigma_min"):
        raise UserError(f"the solver's end is '{end}'; expected 'zero' or 'sigma_min'.")
    timesteps = grid(schedule.T, S)[:stop]
    to_zero = end == "zero" or stop is not None
    last = torch.ones(1, dtype=torch.float64) if to_zero else schedule.alpha_bar[:1]
    alpha_bar = torch.cat([schedule.alpha_bar[timesteps], last])  # (S + 1,), from here on S counts what runs
    root, sd = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    h = (root / sd).log().diff()  # (S,), the last one infinite at the end "zero"

    d = torch.zeros_like(h)
    d[1:] = h[1:] / (2 * h[:-1])
    if to_zero or S < SECOND_ORDER_END_FROM:
        d[-1] = 0

    gain = root[1:] - sd[1:] * root[:-1] / sd[:-1]  # root_{i+1} (1 - e^-h), finite also where h is not
    x_z, x_eps = 1 / root[:-1], -sd[:-1] / root[:-1]  # x_i = x_z z_i + x_eps eps_i
    zero = torch.zeros(1, dtype=torch.float64)
    return _with_totals(
        timesteps,
        p=sd[1:] / sd[:-1] + gain * (1 + d) * x_z,
        q=gain * (1 + d) * x_eps,
        r=torch.cat([zero, -gain[1:] * d[1:] * x_z[:-1]]),
        s=torch.cat([zero, -gain[1:] * d[1:] * x_eps[:-1]]),
        sigma=torch.zeros_like(h),
    )


def ancestral_table(schedule: Schedule, S: int | None = None, variance: str = "small") -> SolverTable:
    """Ancestral sampling, eq 3: S = T (the default) walks through every t = T..1. A smaller S strides over
    T/S times at once, with alpha_t replaced by the product of the alphas strided over.

    variance of sigma_t w_t: "small" is that of q(z_{t-1} | z_t, z_0), "large" is beta_t; w_1 = 0."""
    if variance not in ("small", "large"):
        raise UserError(f"the ancestral variance is '{variance}'; expected 'small' or 'large'.")
    S = schedule.T if S is None else S
    timesteps = grid(schedule.T, S, trailing=True)
    alpha_bar = torch.cat([schedule.alpha_bar[timesteps], torch.ones(1, dtype=torch.float64)])  # (S + 1,)
    now, then = alpha_bar[:-1], alpha_bar[1:]
    alpha = now / then
    beta = 1 - alpha
    sigma = (beta * (1 - then) / (1 - now) if variance == "small" else beta).sqrt()
    sigma[-1] = 0
    zeros = torch.zeros(S, dtype=torch.float64)
    return _with_totals(
        timesteps, p=alpha.rsqrt(), q=-beta / ((1 - now) * alpha).sqrt(), r=zeros, s=zeros, sigma=sigma
    )


def step(
    table: SolverTable, i: int, z: Tensor, eps: Tensor, previous: Pair | None = None, w: Tensor | None = None
) -> Tensor:
    """Row i of the table: z_{i+1} from z_i, eps_i, previous = (z_{i-1}, eps_{i-1}) and the noise w_i, all of
    one shape. previous is read by a second-order row only, w where sigma_i > 0 only."""
    # Python floats leave the latents' dtype alone.
    z_next = float(table.p[i]) * z + float(table.q[i]) * eps
    if table.r[i] != 0 or table.s[i] != 0:
        z_previous, eps_previous = previous
        z_next = z_next + float(table.r[i]) * z_previous + float(table.s[i]) * eps_previous
    if table.sigma[i] != 0:
        z_next = z_next + float(table.sigma[i]) * w
    return z_next


def grid(T: int, S: int, trailing: bool = False) -> Tensor:
    """(S,) int64 time steps, descending, each in 0..T-1, by diffusers' rule "linspace" or "trailing". More steps than
    the rule can place are a UserError."""
    largest = T if trailing else T - 1
    if not 1 <= S <= largest:
        raise UserError(f"the number of sampling steps is {S}; expected 1 to {largest} of {T}.")
    if trailing:
        return torch.from_numpy(np.arange(T, 0, -T / S)[:S].round().astype(np.int64) - 1)
    return torch.from_numpy(np.linspace(0, T - 1, S + 1).round()[:0:-1].astype(np.int64))


def _with_totals(timesteps: Tensor, p: Tensor, q: Tensor, r: Tensor, s: Tensor, sigma: Tensor) -> SolverTable:
    """Adds a, k, m by the backward recurrence of u_i = dz_0/dz_i (the eps held fixed):
    u_S = 1, u_i = p_i u_{i+1} + r_{i+1} u_{i+2};
    k_i = q_i u_{i+1} + s_{i+1} u_{i+2},  m_i = sigma_i u_{i+1}."""
    S = len(timesteps)
    pad = torch.zeros(1, dtype=torch.float64)
    r_next, s_next = torch.cat([r[1:], pad]), torch.cat([s[1:], pad])
    u = torch.zeros(S + 2, dtype=torch.float64)
    u[S] = 1
    for i in reversed(range(S)):
        u[i] = p[i] * u[i + 1] + r_next[i] * u[i + 2]
    k = q * u[1:-1] + s_next * u[2:]
    return SolverTable(timesteps, p, q, r, s, sigma, a=float(u[0]), k=k, m=sigma * u[1:-1])
