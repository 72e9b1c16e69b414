"""Claims of the method, each checked against something that is not itself: what `fairref.verify` runs.

What is checked is the code that runs in training. What it is checked against is written out here in the
plainest form (loops over permutations, autograd through the loop, finite differences) or known in closed form.
All in float64 on a network of 270 parameters; equations and errata are those of docs/derivation.md.

sampling: eqs 1-3 and the solver. gradients: eqs 9, 10 and Algorithm A.1. fairness: eqs 4-7 and the bias.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairref.diffusion import sampler, schedule, solver

EXACT = 1e-10  # of float64 sums of some hundred terms
DIFFERENCE = 1e-7  # of finite differences of fourth order
N, T, D, SIDE = 3, 2, 5, 2  # images, tokens, width of an embedding, pixels a side of a latent
GUIDANCE = 7.5


@dataclass(frozen=True)
class Check:
    """One claim and how it is checked; `run` gives the largest relative error."""

    equation: str
    claim: str
    against: str
    tolerance: float
    run: Callable[[], float]


CHECKS: list[Check] = []


def check(equation: str, claim: str, against: str, tolerance: float = EXACT):
    """Registers a function () -> largest relative error."""

    def register(run):
        CHECKS.append(Check(equation, claim, against, tolerance, run))
        return run

    return register


class Network(nn.Module):
    """eps(z, t, c): mixes channels and neighbouring pixels, reads every token, is linear in nothing."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(draws(6, 4, 3, 3, seed=10) / 6)
        self.read = nn.Parameter(draws(6, D, seed=11) / 2)
        self.out = nn.Parameter(draws(4, 6, seed=12) / 2)

    def forward(self, z, t, c):
        t = torch.as_tensor(t).to(z).reshape(-1, 1, 1, 1) / 1000
        told = torch.einsum("od,btd->bo", self.read, (c * c.roll(1, dims=1)).tanh())[:, :, None, None]
        told = told.repeat_interleave(len(z) // len(c), 0)
        hidden = torch.tanh(F.conv2d(z, self.mix, padding=1) * (1 + told) + t + told)
        return torch.einsum("oc,bchw->bohw", self.out, hidden)


def draws(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def latents(n=N):
    return draws(n, 4, SIDE, SIDE, seed=1)


def embeddings():
    return draws(1, T, D, seed=2), draws(1, T, D, seed=3)


def loss_of(z_0):
    """Any function of z_0 that tells images and pixels apart."""
    return (z_0.sin() * draws(*z_0.shape, seed=9)).sum() + z_0.prod(0).sum()


def error(found, expected) -> float:
    """Largest absolute difference over the largest expected number."""
    found, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, expected))
    if found.shape != expected.shape or not (found.isfinite() & expected.isfinite()).all():
        return math.inf  # max() would drop a NaN
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def walk(network, table, z_T, c, c_empty, guidance, w=None):
    """The path of a run without a graph, and dL/dz_0."""
    with torch.no_grad():
        path = list(sampler.sample(network, table, z_T, c, c_empty, guidance, w))
    z_0 = path[-1].z.clone().requires_grad_(True)
    return path, torch.autograd.grad(loss_of(z_0), z_0)[0]


def finite_difference(f: Callable[[Tensor], Tensor], x: Tensor, way: Tensor, h: float = 1e-3) -> Tensor:
    """The derivative of f at x along `way`, central, of fourth order."""
    with torch.no_grad():
        far, near = (f(x + k * h * way) - f(x - k * h * way) for k in (2, 1))
    return (8 * near - far) / (12 * h)


def tables(s, S):
    """Every solver of the project with about S steps."""
    return {
        "ancestral": solver.ancestral_table(s, S),
        "zero": solver.solver_table(s, S, "zero"),
        "sigma_min": solver.solver_table(s, S, "sigma_min"),
    }


SHORT = schedule.Schedule(T=50, beta_start=0.002, beta_end=0.2)
FEW = schedule.Schedule(T=6, beta_start=0.05, beta_end=0.4)
LONG = schedule.Schedule()
