"""Checks of the gradients of other papers: each mode against autograd of its algorithm as published.

The algorithms differ in where they detach. docs/derivation.md, step 7, says what each paper does.
"""

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fairref.diffusion import gradient, solver
from fairref.diffusion.model import GuidedModel
from fairref.diffusion.solver import SolverTable
from fairref.verification import derivation
from fairref.verification.checks import (
    FEW,
    GUIDANCE,
    LONG,
    SIDE,
    D,
    N,
    Network,
    T,
    check,
    draws,
    embeddings,
    error,
    latents,
    loss_of,
    tables,
    walk,
)
from fairref.verification.gradients import explicit

Drawn = TypeVar("Drawn")
S = 15  # the fewest that end in a step of second order


class Chosen:
    """In the place of a random generator: gives these whole numbers, one after the other, and notes their bounds."""

    def __init__(self, *numbers: int | np.ndarray) -> None:
        self.numbers, self.bounds = list(numbers), []

    def integers(self, high: int, size: int | None = None) -> int | np.ndarray:
        """Return the next number, or `size` of them."""
        number = self.numbers.pop(0)
        self.bounds.append(high)
        assert np.all((np.asarray(number) >= 0) & (np.asarray(number) < high))
        if size is None:
            assert np.ndim(number) == 0, "one number is asked for, where there are several"
            return number
        return np.broadcast_to(number, size).copy()


class Leaves:
    """The tiny network and what its gradients are asked for: c, c_empty and the network's parameters."""

    def __init__(self) -> None:
        self.network, (self.c, self.c_empty) = Network(), (x.requires_grad_(True) for x in embeddings())

    def eps(self, z: Tensor, t: int) -> Tensor:
        """Return the guided noise prediction of z, with its graph."""
        empty, prompt = (self.network(z, t, x.expand(N, -1, -1)) for x in (self.c_empty, self.c))
        return (1 - GUIDANCE) * empty + GUIDANCE * prompt

    def gradients(self, z_0: Tensor) -> list[Tensor]:
        """Return the gradients of the checks' loss by autograd, zero for a leaf that z_0 does not depend on."""
        leaves = [self.c, self.c_empty, *self.network.parameters()]
        return torch.autograd.grad(loss_of(z_0), leaves, allow_unused=True, materialize_grads=True)

    def of_mode(self, name: str, table: SolverTable, w: Tensor, rng: Chosen | None = None) -> list[Tensor]:
        """Return the gradients by one of the modes, as training finds them. w: the noises of an ancestral table."""
        guided = GuidedModel(self.network, self.c.detach(), self.c_empty.detach(), GUIDANCE)
        path, g = walk(guided, table, latents(), w)
        mode = gradient.gradient_mode(name)
        kept = mode.steps(table.S, rng)
        if mode.coupling:
            return gradient.exact_gradient(guided, table, path, g, mode.coupling * kept.double())[0]
        return gradient.adjusted_gradient(guided, table, mode.weights(LONG, table) * kept, path, g)


def all_solvers() -> Iterator[tuple[SolverTable, Tensor]]:
    """Give the table of every solver, with noises."""
    for table in tables(LONG, S).values():
        yield table, draws(table.S, N, 4, SIDE, SIDE, seed=5)


def draft(leaves: Leaves, table: SolverTable, w: Tensor, K: int) -> Tensor:
    """Return z_0 by DRaFT-K: no graph before the last K steps."""
    z, previous = latents(), None
    for i, t in enumerate(table.timesteps.tolist()):
        with torch.set_grad_enabled(i >= table.S - K):
            eps = leaves.eps(z, t)
            z, previous = solver.step(table, i, z, eps, previous, w[i]), (z, eps)
    return z


def alignprop(leaves: Leaves, table: SolverTable, w: Tensor, truncated: list[int]) -> Tensor:
    """Return z_0 by AlignProp: step i detaches its noise prediction, and not the latent, if i < truncated[i]."""
    z, previous = latents(), None
    for i, t in enumerate(table.timesteps.tolist()):
        eps = leaves.eps(z, t)
        if i < truncated[i]:
            eps = eps.detach()
        z, previous = solver.step(table, i, z, eps, previous, w[i]), (z, eps)
    return z


def drtune(leaves: Leaves, table: SolverTable, trained: set[int], last: int) -> Tensor:
    """Return z_0 by DRTune: detached inputs, a graph in the steps `trained` only, and the image predicted at `last`."""
    z, previous = latents(), None
    for i, t in enumerate(table.timesteps.tolist()):
        with torch.set_grad_enabled(i in trained):
            eps = leaves.eps(z.detach(), t)
        if i == last:
            bar = math.prod((1 - LONG.beta[: t + 1]).tolist())
            return (z - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        z, previous = solver.step(table, i, z, eps, previous), (z, eps)
    raise ValueError(f"the run of {table.S} steps has no step {last}")


def scaled(leaves: Leaves, table: SolverTable, w: Tensor, alpha: float) -> Tensor:
    """Return z_0 with LeapAlign's input at each step: the share alpha of z's graph enters the network."""
    z, previous = latents(), None
    for i, t in enumerate(table.timesteps.tolist()):
        constant = z.detach()  # alpha z + (1 - alpha) constant, in a form that rounds to z itself
        eps = leaves.eps(constant + alpha * (z - constant), t)
        z, previous = solver.step(table, i, z, eps, previous, w[i]), (z, eps)
    return z


def largest(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest error of the leaves' gradients."""
    return max(error(a, b) for a, b in zip(actual, expected, strict=True))


@check("last:K", "the recursion, stopped after the last K steps, is DRaFT-K", "no graph before them")
def last_steps() -> float:
    """Compare `last:K` with DRaFT-K; K = S is the exact gradient."""
    leaves, errors = Leaves(), []
    for table, w in all_solvers():
        for K in (1, 4):
            expected = leaves.gradients(draft(leaves, table, w, K))
            errors.append(largest(leaves.of_mode(f"last:{K}", table, w), expected))
        exact = leaves.of_mode("exact", table, w)
        errors.append(largest(leaves.of_mode(f"last:{table.S}", table, w), exact))
    return max(errors)


@check("random:K", "the last k of up to K steps are AlignProp's paper", "noise predictions detached")
def random_depth() -> float:
    """Compare `random:K` with AlignProp for each depth that it can draw."""
    leaves, K, errors = Leaves(), 3, []
    for table, w in all_solvers():
        for k in range(1, K + 1):
            expected = leaves.gradients(alignprop(leaves, table, w, [table.S - k] * table.S))
            errors.append(largest(leaves.of_mode(f"random:{K}", table, w, Chosen(k - 1)), expected))
    return max(errors)


@check("bernoulli", "kept steps alone, z attached, are AlignProp's first code", "noise predictions detached")
def drawn_steps() -> float:
    """Compare `bernoulli` with AlignProp's code, which draws the depth anew at each step."""
    leaves, errors = Leaves(), []
    for seed, (table, w) in enumerate(all_solvers()):
        truncated = np.random.default_rng(seed).integers(table.S + 1, size=table.S)
        expected = leaves.gradients(alignprop(leaves, table, w, truncated.tolist()))
        errors.append(largest(leaves.of_mode("bernoulli", table, w, Chosen(truncated)), expected))
    return max(errors)


@check("drtune:M", "M of the steps with B = I, in a run that stops early, are DRTune", "detached inputs")
def spread_steps() -> float:
    """Compare `drtune:M` with DRTune, for both ends, runs that stop and ones that do not, and several first steps."""
    leaves, M, errors = Leaves(), 3, []
    mode = gradient.gradient_mode(f"drtune:{M}")
    for end, early, first in (("zero", 0, 4), ("zero", 5, 3), ("sigma_min", 0, 0), ("sigma_min", 2, 1)):
        n = mode.stop(S, Chosen(early))
        table = solver.solver_table(LONG, S, end, stop=n)
        trained = {first + m * (n // M) for m in range(M)}
        z_0 = drtune(leaves, solver.solver_table(LONG, S, end), trained, S - early - 1)
        actual = leaves.of_mode(f"drtune:{M}", table, [None] * S, Chosen(first))
        errors.append(largest(actual, leaves.gradients(z_0)))
    return max(errors)


@check(
    "couple:ALPHA",
    "J scaled by alpha in B is LeapAlign's scaled input at all steps; 0: none, 1: exact",
    "autograd",
)
def scaled_coupling() -> float:
    """Compare `couple:ALPHA` with scaled inputs, and its ends with `none` and `exact`."""
    leaves, errors = Leaves(), []
    for table, w in all_solvers():
        expected = leaves.gradients(scaled(leaves, table, w, 0.3))
        errors.append(largest(leaves.of_mode("couple:0.3", table, w), expected))
        for name, end in (("none", "couple:0"), ("exact", "couple:1")):
            errors.append(largest(leaves.of_mode(end, table, w), leaves.of_mode(name, table, w)))
    return max(errors)


@check("kappa", "-sum_t A_t B_t d eps^(t)/d theta over kept t, B_t with kappa_s J_s", "explicit matrices")
def matrices_with_kappa() -> float:
    """Compare the recursion with kappa in (0, 1) and 0 at some times with eq 9's matrices."""
    network, c, w = Network(), embeddings()[0], draws(FEW.T, 1, 4, SIDE, SIDE, seed=5)
    guided, table = GuidedModel(network, c, None, 1.0), solver.ancestral_table(FEW)
    path, _ = walk(guided, table, latents(1), w)
    J, deps = (x.flip(0) for x in explicit(network, path, c))  # index t - 1
    kappa = torch.tensor([1.0, 0.0, 0.3, 1.0, 0.0, 0.6], dtype=torch.float64)
    B, kept = derivation.coupling(FEW, kappa[:, None, None] * J), kappa > 0
    g = draws(1, 4, SIDE, SIDE, seed=6)
    expected = -torch.einsum("i,t,tij,tjk->k", g.flatten(), FEW.A * kept, B, deps)
    actual = gradient.exact_gradient(guided, table, path, g, kappa.flip(0))[0][0]
    return error(actual, expected.view(1, T, D))


@check(
    "how often",
    "step j from the end in random:K: (K - j + 1)/K; step i in bernoulli: (i + 1)/(S + 1)",
    "enumeration",
)
def probabilities() -> float:
    """Count in how many of all draws a step is kept. In drtune:M, that is even exactly where M divides the steps."""
    K, errors = 5, []
    mode = gradient.gradient_mode(f"random:{K}")
    share = sum(mode.steps(S, Chosen(k)).double() for k in range(K)) / K
    errors.append(error(share, [0.0] * (S - K) + [(K - j + 1) / K for j in range(K, 0, -1)]))
    mode = gradient.gradient_mode("bernoulli")
    share = sum(mode.steps(S, Chosen(depth)).double() for depth in range(S + 1)) / (S + 1)
    errors.append(error(share, [(i + 1) / (S + 1) for i in range(S)]))
    for n, M in ((20, 5), (19, 1), (20, 6), (7, 3), (4, 4)):
        kept = torch.stack(
            every_draw(lambda rng, n=n, M=M: gradient.gradient_mode(f"drtune:{M}").steps(n, rng))
        )
        of_step = kept.double().mean(0)
        errors.append(abs(int(of_step.max() > of_step.min()) - int(n % M > 0)))
        errors.append(error(kept.sum(1).double(), [float(M)] * len(kept)))
    for n, M, late in (
        (15, 1, 6),
        (20, 3, 8),
        (6, 2, 2),
        (20, 15, 6),
        (6, 6, 1),
    ):  # .4 of n, but for the last two
        ends = every_draw(lambda rng, n=n, M=M: gradient.gradient_mode(f"drtune:{M}").stop(n, rng))
        errors.append(float(ends != list(range(n, n - late, -1))))
    return max(errors)


def every_draw(f: Callable[[Chosen], Drawn]) -> list[Drawn]:
    """Return what a function of one random number gives for each that it can draw."""
    first = Chosen(0)
    return [f(first), *(f(Chosen(number)) for number in range(1, first.bounds[0]))]
