"""The checks that `fairref verify` runs, and what they share.

Each check compares the code of training with an independent result. That result is written out in the plainest form
(loops over permutations, autograd through the loop, finite differences), or it is known in closed form. All is in
float64, on a network of 270 parameters. Equations and errata are those of docs/derivation.md.

sampling: eqs 1-3 and the solver. gradients: eqs 9, 10 and Algorithm A.1. published: gradients of other papers.
fairness: eqs 4-7 and the bias.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairref.diffusion import sampler, schedule, solver
from fairref.diffusion.model import Model

EXACT = 1e-10  # of float64 sums of some hundred terms
DIFFERENCE = 1e-7  # of finite differences of fourth order
N, T, D, SIDE = 3, 2, 5, 2  # images, tokens, width of an embedding, pixels a side of a latent
GUIDANCE = 7.5

Run = Callable[[], float]  # a check: () -> largest relative error
Numbers = Tensor | np.ndarray | Sequence[float] | float


@dataclass(frozen=True)
class Check:
    """One claim, and the function that checks it."""

    equation: str
    claim: str
    against: str
    tolerance: float
    run: Run


CHECKS: dict[str, list[Check]] = {}  # module -> its checks


def check(equation: str, claim: str, against: str, tolerance: float = EXACT) -> Callable[[Run], Run]:
    """Return the decorator that adds a function to CHECKS, under its module."""

    def register(run: Run) -> Run:
        CHECKS.setdefault(run.__module__, []).append(Check(equation, claim, against, tolerance, run))
        return run

    return register


class Network(nn.Module):
    """eps(z, t, c), linear in none of its inputs: it mixes channels and neighbouring pixels, and reads every token."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(draws(6, 4, 3, 3, seed=10) / 6)
        self.read = nn.Parameter(draws(6, D, seed=11) / 2)
        self.out = nn.Parameter(draws(4, 6, seed=12) / 2)

    def forward(self, z: Tensor, t: int | Tensor, c: Tensor) -> Tensor:
        """z (B, 4, h, w), t, c (B or 1, T, D) -> eps (B, 4, h, w)."""
        t = torch.as_tensor(t).to(z).reshape(-1, 1, 1, 1) / 1000
        told = torch.einsum("od,btd->bo", self.read, (c * c.roll(1, dims=1)).tanh())[:, :, None, None]
        told = told.repeat_interleave(len(z) // len(c), 0)
        hidden = torch.tanh(F.conv2d(z, self.mix, padding=1) * (1 + told) + t + told)
        return torch.einsum("oc,bchw->bohw", self.out, hidden)


def draws(*shape: int, seed: int) -> Tensor:
    """Return standard normal numbers of a shape, in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def latents(n: int = N) -> Tensor:
    """Return the first latents (n, 4, SIDE, SIDE) of all checks."""
    return draws(n, 4, SIDE, SIDE, seed=1)


def embeddings() -> tuple[Tensor, Tensor]:
    """Return the text embeddings c and c_empty (1, T, D) of all checks."""
    return draws(1, T, D, seed=2), draws(1, T, D, seed=3)


def loss_of(z_0: Tensor) -> Tensor:
    """Return a scalar that depends on each image and each pixel of z_0 in its own way."""
    return (z_0.sin() * draws(*z_0.shape, seed=9)).sum() + z_0.prod(0).sum()


def error(actual: Numbers, expected: Numbers) -> float:
    """Return the largest absolute difference over the largest expected number; inf for other shapes, inf or NaN."""
    actual, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (actual, expected))
    if actual.shape != expected.shape or not (actual.isfinite() & expected.isfinite()).all():
        return math.inf  # max() would drop a NaN
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def walk(
    guided: Model, table: solver.SolverTable, z_T: Tensor, w: Sequence[Tensor] | None = None
) -> tuple[list[sampler.Step], Tensor]:
    """Return the path of a run without a graph, and dL/dz_0 for `loss_of`."""
    with torch.no_grad():
        path = list(sampler.sample(guided, table, z_T, w))
    z_0 = path[-1].z.clone().requires_grad_(True)
    return path, torch.autograd.grad(loss_of(z_0), z_0)[0]


def finite_difference(f: Callable[[Tensor], Tensor], x: Tensor, way: Tensor, h: float = 1e-3) -> Tensor:
    """Return the derivative of f at x along `way`: a central difference of fourth order."""
    with torch.no_grad():
        far, near = (f(x + k * h * way) - f(x - k * h * way) for k in (2, 1))
    return (8 * near - far) / (12 * h)


def tables(s: schedule.Schedule, S: int) -> dict[str, solver.SolverTable]:
    """Return the table of every solver, with about S steps."""
    return {
        "ancestral": solver.ancestral_table(s, S),
        "zero": solver.solver_table(s, S, "zero"),
        "sigma_min": solver.solver_table(s, S, "sigma_min"),
    }


SHORT = schedule.Schedule(T=50, beta_start=0.002, beta_end=0.2)
FEW = schedule.Schedule(T=6, beta_start=0.05, beta_end=0.4)
LONG = schedule.Schedule()
