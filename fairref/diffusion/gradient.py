"""The gradient of the sampling process (eqs 9, 10): adjusted (Algorithm A.1) and exact.

With the U-Net's inputs detached, z_0 = a z_T + sum_i k_i eps_i. So the adjusted gradient is a weighted sum of
vector-Jacobian products, one a step, from the stored z_i and without a graph through the sampler:

    dL/dtheta = sum_i w_i (dL/dz_0)^T d eps_i/d theta,   w_i = C_i k_i"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairref.diffusion.model import Model, zeros_like
from fairref.diffusion.sampler import Step
from fairref.diffusion.schedule import Schedule
from fairref.diffusion.solver import SolverTable
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


Random = np.random.Generator  # of one iteration, the same in all processes
LATE = 0.4  # DRTune's run stops at one of so large a share of its steps, the last ones


def late_steps(S: int, M: int) -> int:
    """How many steps there are, the last ones, at which DRTune's run of S may stop, if M must have run."""
    return max(1, min(round(LATE * S), S - M + 1))


def spread_steps(S: int, M: int, rng: Random) -> Tensor:
    """(S,) bool: M steps, S // M apart, from a drawn one on. Not equally likely unless M divides S."""
    apart = S // M
    after = torch.arange(S) - int(rng.integers(S - (M - 1) * apart))
    return (after >= 0) & (after % apart == 0) & (after < M * apart)


@dataclass(frozen=True)
class GradientMode:
    """One choice of what of eq 9 is kept: steps, their weights, the coupling B, and where the run ends."""

    weights: Callable[[Schedule, SolverTable], Tensor] = lambda _, table: table.k.clone()  # (S,) float64 w_i
    coupling: float = (
        0.0  # factor of each d eps/dz in B, from 0, B = I, to 1; above 0 B brings its own weights, k_i
    )
    steps: Callable[[int, Random], Tensor] = lambda S, _: torch.ones(S, dtype=torch.bool)  # (S,) those kept
    stop: Callable[[int, Random], int | None] = lambda S, _: None  # evaluations that run, of S; None: all
    takes: int = 1  # steps that a run must have

    def __post_init__(self):
        if self.takes < 1 or not 0 <= self.coupling <= 1:
            raise ValueError(self)


# docs/derivation.md, step 7, names the papers. "solver" is A_t = 1 up to a common factor, for the solver in use;
# at the end "sigma_min" it turns, from S = 15 on, the sign of two late steps, where k_i > 0.
MODES: dict[str, Callable[..., GradientMode]] = {
    "paper": lambda: GradientMode(lambda schedule, table: C_i(schedule, table) * table.k),
    "solver": lambda: GradientMode(lambda _, table: -geometric_mean(table.k.abs()).expand(table.S).clone()),
    "none": lambda: GradientMode(),
    "exact": lambda: GradientMode(coupling=1),
    "couple:ALPHA": lambda alpha: GradientMode(coupling=alpha),
    "last:K": lambda K: GradientMode(coupling=1, steps=lambda S, _: torch.arange(S) >= S - K, takes=K),
    "random:K": lambda K: GradientMode(
        coupling=1, steps=lambda S, rng: torch.arange(S) >= S - 1 - int(rng.integers(K)), takes=K
    ),
    "bernoulli": lambda: GradientMode(
        coupling=1, steps=lambda S, rng: torch.arange(S) >= torch.from_numpy(rng.integers(S + 1, size=S))
    ),
    "drtune:M": lambda M: GradientMode(
        steps=lambda S, rng: spread_steps(S, M, rng),
        stop=lambda S, rng: S - int(rng.integers(late_steps(S, M))),
        takes=M,
    ),
}


def gradient_mode(name: str) -> GradientMode:
    """A row of MODES; a number stands for K, M or ALPHA, as in "last:5". Raises UserError."""
    kind, *number = name.split(":")
    row = {form.split(":")[0]: row for form, row in MODES.items()}.get(kind)
    try:
        return row(*map(float if kind == "couple" else int, number))
    except (TypeError, ValueError):  # no such row, no number or too many, not a number, or out of range
        expected = f"{', '.join(MODES)}, with K and M from 1 up and ALPHA from 0 to 1"
        raise UserError(f"the gradient is '{name}'; expected one of {expected}.") from None


def step_weights(schedule: Schedule, table: SolverTable, mode: str = "paper") -> Tensor:
    """(S,) float64: w_i, the weight of step i in the adjusted gradient of a mode. "paper": C_i k_i."""
    return gradient_mode(mode).weights(schedule, table)


def subsample(w: Tensor, M: int, u: float | Tensor, size: Tensor | float = 1.0) -> Tensor:
    """(P,) weights of M draws from P terms of weight w, with probability proportional to |w| size, w's sign kept.

    u, uniform in [0, 1), is all of the chance; several at once, (R, 1), give (R, P). The draws are the points
    u, u + 1, ..., u + M - 1 on the line on which term p has the length M |w_p| size_p / sum |w| size. The expected
    result is w, so the gradient stays unbiased; terms that are not drawn get 0."""
    if M < 1:
        raise UserError(f"the number of gradient steps is {M}; expected at least 1.")
    length = w.abs() * size
    length = length * M / length.sum().clamp(min=torch.finfo(w.dtype).tiny)
    edge = torch.cat([w.new_zeros(1), length.cumsum(0)])
    edge[-1] = M  # but for rounding
    points = torch.ceil(edge - u).clamp(min=0).diff()  # (P,) draws of each term
    return points * (w / length).where(length > 0, 0)


def adjusted_gradient(
    model: Model, table: SolverTable, w: Tensor, path: Sequence[Step], g: Tensor, micro_batch: int = 0
) -> list[Tensor]:
    """sum_i w_i VJP_i(g) for each of the model's leaves, at least float32. Grad mode must be on.

    w (S,): `step_weights`, or (S, N), each image's own; what has weight 0 is not evaluated. path: the Steps of the
    run; g = dL/dz_0 (N, 4, h, w). micro_batch: at most this many pairs of an image and a step at once; 0: all images
    of one step, which embeddings of one row an image need."""
    N, w = len(g), w.view(table.S, -1).expand(-1, len(g))
    pairs = [(i, n) for i in range(table.S) for n in range(N) if w[i, n] != 0]
    total = [zeros_like(leaf) for leaf in model.leaves]
    for start in range(0, len(pairs), micro_batch or N):
        steps, images = map(list, zip(*pairs[start : start + (micro_batch or N)], strict=True))
        z = torch.stack([path[i].z[n] for i, n in zip(steps, images, strict=True)])  # (B, 4, h, w)
        v = w[steps, images].to(g).view(-1, *[1] * (g.dim() - 1)) * g[images]  # (B, 4, h, w)
        parts, _ = model.vjp(z, table.timesteps[steps].to(z.device), v)
        total = [a + b for a, b in zip(total, parts, strict=True)]
    return total


def exact_gradient(
    model: Model, table: SolverTable, path: Sequence[Step], g: Tensor, kappa: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """([dL/d leaf], [dL/d eps_i]): eq 9 in full, as autograd through `sample` gives it, in the memory of one
    step. With v_i = dL/dz_i and e_i = dL/d eps_i (for the ancestral table with S = T: -g^T A_t B_t):

        v_S = g,   e_i = q_i v_{i+1} + s_{i+1} v_{i+2},
        v_i = p_i v_{i+1} + r_{i+1} v_{i+2} + kappa_i e_i^T d eps_i/d z_i

    kappa (S,): 1 (None) is eq 9; less keeps less of the coupling; at 0 eps_i counts as a constant and is not evaluated.
    Other arguments as in `adjusted_gradient`."""
    p, q, r, s = (x.tolist() for x in (table.p, table.q, table.r, table.s))
    kappa = [1.0] * table.S if kappa is None else kappa.tolist()
    total = [zeros_like(leaf) for leaf in model.leaves]
    v_next, v_after, cotangents = g, torch.zeros_like(g), []
    for i in reversed(range(table.S)):
        r_next, s_next = (r[i + 1], s[i + 1]) if i + 1 < table.S else (0.0, 0.0)
        e, v = q[i] * v_next + s_next * v_after, p[i] * v_next + r_next * v_after
        if kappa[i]:
            t = table.timesteps[i].expand(len(g)).to(g.device)
            parts, through_z = model.vjp(path[i].z, t, e, wrt_z=True)
            total = [a + b for a, b in zip(total, parts, strict=True)]
            v = v + kappa[i] * through_z
        v_next, v_after = v, v_next
        cotangents.insert(0, e)
    return total, cotangents
