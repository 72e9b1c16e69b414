"""The gradient of the sampling process (eqs 9, 10): adjusted (Algorithm A.1) and exact.

With the U-Net's inputs detached, z_0 = a z_T + sum_i k_i eps_i. So the adjusted gradient is a weighted sum of
vector-Jacobian products, one a step, from the stored z_i and without a graph through the sampler:

    dL/dtheta = sum_i w_i (dL/dz_0)^T d eps_i/d theta,   w_i = C_i k_i"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairref.diffusion.model import Model, zeros_like
from fairref.diffusion.sampler import Step
from fairref.diffusion.schedule import Schedule
from fairref.diffusion.solver import SolverTable, solver_table
from fairref.errors import UserError


def A_t(schedule: Schedule, table: SolverTable) -> Tensor:
    """(S,) float64: A_t of eq 10 at the table's time steps."""
    return schedule.A[table.timesteps]


def C_i(schedule: Schedule, table: SolverTable) -> Tensor:
    """(S,) float64: the standardising coefficients of Algorithm A.1, 1/A_t over their geometric mean."""
    C = 1 / A_t(schedule, table)
    return C / geometric_mean(C)


def geometric_mean(x: Tensor) -> Tensor:
    """exp(mean(log x)), a scalar tensor."""
    return x.log().mean().exp()


@dataclass(frozen=True)
class GradientMode:
    """One choice of what of eq 9 is kept: steps, their weights, the coupling B, and where the run ends."""

    weights: Callable[[Schedule, SolverTable], Tensor]  # (S,) float64 w_i; 0 leaves a step out
    coupled: bool = False  # B in full, which brings its own weights; else B = I
    table: Callable[[Schedule, int, str], SolverTable] = solver_table  # (schedule, S, end) -> the run


# "solver" is A_t = 1 up to a common factor, for the solver in use; at the end "sigma_min" it turns, from S = 15 on,
# the sign of two late steps, where k_i > 0.
MODES = {
    "paper": GradientMode(lambda schedule, table: C_i(schedule, table) * table.k),
    "solver": GradientMode(lambda _, table: -geometric_mean(table.k.abs()).expand(table.S).clone()),
    "none": GradientMode(lambda _, table: table.k.clone()),
    "exact": GradientMode(lambda _, table: table.k.clone(), coupled=True),
}


def gradient_mode(name: str) -> GradientMode:
    """A row of MODES. Raises UserError."""
    if name not in MODES:
        raise UserError(f"the gradient is '{name}'; expected one of {', '.join(MODES)}.")
    return MODES[name]


def step_weights(schedule: Schedule, table: SolverTable, mode: str = "paper") -> Tensor:
    """(S,) float64: w_i, the weight of step i in the adjusted gradient of a mode. "paper": C_i k_i."""
    return gradient_mode(mode).weights(schedule, table)


def subsample(w: Tensor, M: int, u: float | Tensor) -> Tensor:
    """(S,) weights of M draws of steps, with probability proportional to |w_i| and the sign of w_i kept.

    u, uniform in [0, 1), is all of the chance; several at once, (R, 1), give (R, S). The draws are the points
    u, u + 1, ..., u + M - 1 on the line on which step i has the length M |w_i| / sum |w|. The expected result is w,
    so the gradient stays unbiased; all draws weigh the same, and steps that are not drawn get 0."""
    if M < 1:
        raise UserError(f"the number of gradient steps is {M}; expected at least 1.")
    total = w.abs().sum()
    edge = torch.cat([w.new_zeros(1), (w.abs() * M / total).cumsum(0)])
    edge[-1] = M  # but for rounding
    points = torch.ceil(edge - u).clamp(min=0).diff()  # (S,) draws of each step
    return points * w.sign() * total / M


def adjusted_gradient(
    model: Model, table: SolverTable, w: Tensor, path: Sequence[Step], g: Tensor, micro_batch: int = 0
) -> list[Tensor]:
    """sum_i w_i VJP_i(g) for each of the model's leaves, at least float32. Grad mode must be on.

    w (S,): `step_weights`; steps of weight 0 are not evaluated. path: the Steps of the run; g = dL/dz_0
    (N, 4, h, w). micro_batch: at most this many pairs of an image and a step at once; 0: all images of one
    step, which embeddings of one row an image need."""
    N = g.shape[0]
    pairs = [(i, n) for i in range(table.S) if w[i] != 0 for n in range(N)]
    total = [zeros_like(leaf) for leaf in model.leaves]
    for start in range(0, len(pairs), micro_batch or N):
        steps, images = map(list, zip(*pairs[start : start + (micro_batch or N)], strict=True))
        z = torch.stack([path[i].z[n] for i, n in zip(steps, images, strict=True)])  # (B, 4, h, w)
        v = w[steps].to(g).view(-1, *[1] * (g.dim() - 1)) * g[images]  # (B, 4, h, w)
        parts, _ = model.vjp(z, table.timesteps[steps].to(z.device), v)
        total = [a + b for a, b in zip(total, parts, strict=True)]
    return total


def exact_gradient(
    model: Model, table: SolverTable, path: Sequence[Step], g: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """([dL/d leaf], [dL/d eps_i]): eq 9 in full, as autograd through `sample` gives it, in the memory of one
    step. With v_i = dL/dz_i and e_i = dL/d eps_i (for the ancestral table with S = T: -g^T A_t B_t):

        v_S = g,   e_i = q_i v_{i+1} + s_{i+1} v_{i+2},
        v_i = p_i v_{i+1} + r_{i+1} v_{i+2} + e_i^T d eps_i/d z_i

    Arguments as in `adjusted_gradient`."""
    p, q, r, s = (x.tolist() for x in (table.p, table.q, table.r, table.s))
    total = [zeros_like(leaf) for leaf in model.leaves]
    v_next, v_after, cotangents = g, torch.zeros_like(g), []
    for i in reversed(range(table.S)):
        r_next, s_next = (r[i + 1], s[i + 1]) if i + 1 < table.S else (0.0, 0.0)
        e = q[i] * v_next + s_next * v_after
        t = table.timesteps[i].expand(len(g)).to(g.device)
        parts, through_z = model.vjp(path[i].z, t, e, wrt_z=True)
        total = [a + b for a, b in zip(total, parts, strict=True)]
        v_next, v_after = p[i] * v_next + r_next * v_after + through_z, v_next
        cotangents.insert(0, e)
    return total, cotangents
