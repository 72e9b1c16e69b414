"""Checks of eqs 9 and 10 and of Algorithm A.1: the gradient of the sampling process."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fairref.diffusion import gradient, sampler, solver
from fairref.diffusion.model import GuidedModel
from fairref.diffusion.sampler import Step
from fairref.diffusion.solver import SolverTable
from fairref.verification import derivation
from fairref.verification.checks import (
    DIFFERENCE,
    FEW,
    GUIDANCE,
    LONG,
    SHORT,
    SIDE,
    D,
    N,
    Network,
    check,
    draws,
    embeddings,
    error,
    finite_difference,
    latents,
    loss_of,
    tables,
    walk,
)


@check("eq 10", "z_0 unrolled: -sum A_t eps^(t) + z_T / sqrt(alpha_bar_T) + noises", "the recursion of eq 3")
def unrolled() -> float:
    """Compare the one sum of eq 10 with the last latent of a run."""
    s, network, (c, c_empty) = SHORT, Network(), embeddings()
    w = draws(s.T, N, 4, SIDE, SIDE, seed=5)
    table = solver.ancestral_table(s)
    path, _ = walk(GuidedModel(network, c, c_empty, GUIDANCE), table, latents(), w)
    eps = torch.stack([point.eps for point in reversed(path[:-1])])  # index t - 1
    return error(derivation.unrolled_z0(s, latents(), eps, table.sigma.flip(0), w.flip(0)), path[-1].z)


def explicit(network: nn.Module, path: Sequence[Step], c: Tensor) -> tuple[Tensor, Tensor]:
    """Return J (S, n, n) and d eps_i / dc (S, n, T D) of a run of one image, by autograd, one step at a time."""
    J, deps = [], []
    for _, t, z, _ in path[:-1]:
        dz, dc = torch.autograd.functional.jacobian(lambda z, c, t=t: network(z, t, c), (z, c))
        J.append(dz.reshape(z.numel(), -1))
        deps.append(dc.reshape(z.numel(), -1))
    return torch.stack(J), torch.stack(deps)


def through_the_loop(
    network: nn.Module, table: SolverTable, z_T: Tensor, c: Tensor, w: Sequence[Tensor]
) -> Tensor:
    """Return dz_0/dc (n, T D), by autograd through the whole loop."""
    c = c.clone().requires_grad_(True)
    *_, last = sampler.sample(GuidedModel(network, c, None, 1.0), table, z_T, w)
    rows = [torch.autograd.grad(x, c, retain_graph=True)[0].flatten() for x in last.z.flatten()]
    return torch.stack(rows)


def eq_9() -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor]:
    """Return -sum A_t B_t d eps^(t)/dc (n, T D) of a run, the run's z_0 (n,) as a function of c, and c."""
    network, c, w = Network(), embeddings()[0], draws(FEW.T, 1, 4, SIDE, SIDE, seed=5)
    table = solver.ancestral_table(FEW)
    path, _ = walk(GuidedModel(network, c, None, 1.0), table, latents(1), w)
    J, deps = (x.flip(0) for x in explicit(network, path, c))  # index t - 1

    def z_0(c: Tensor) -> Tensor:
        return list(sampler.sample(GuidedModel(network, c, None, 1.0), table, latents(1), w))[-1].z.flatten()

    return -torch.einsum("t,tij,tjk->ik", FEW.A, derivation.coupling(FEW, J), deps), z_0, c


@check("eq 9", "dz_0/dtheta = -sum A_t B_t d eps^(t)/d theta, B_t explicit", "autograd through the loop")
def exact_ancestral() -> float:
    """Compare eq 9 with the Jacobian of the whole run."""
    actual, z_0, c = eq_9()
    return error(actual, torch.autograd.functional.jacobian(z_0, c).flatten(1))


@check("eq 9", "the same Jacobian, along one direction", "finite differences", DIFFERENCE)
def exact_ancestral_difference() -> float:
    """Compare eq 9 with the derivative along one direction."""
    actual, z_0, c = eq_9()
    way = draws(*c.shape, seed=6)
    return error(actual @ way.flatten(), finite_difference(z_0, c, way))


@check("eq 9", "B_t is the sum of 2^(t-1) products; the all-direct one is I", "each product, written out")
def all_paths() -> float:
    """Compare each product, their sum and their number with eq 9."""
    n, errors = 3, []
    J = draws(FEW.T, n, n, seed=7)
    B = derivation.coupling(FEW, J)
    for t in range(1, FEW.T + 1):
        paths = derivation.gradient_paths(FEW, J, t)
        total = torch.zeros(n, n, dtype=torch.float64)
        for indirect in itertools.product((0, 1), repeat=t - 1):  # of s = 1, ..., t - 1
            product = torch.eye(n, dtype=torch.float64)
            for s, chosen in enumerate(indirect):
                bar = torch.prod(1 - FEW.beta[: s + 1])
                product = product @ (-FEW.beta[s] / (1 - bar).sqrt() * J[s]) if chosen else product
            total += product
            errors.append(error(paths[tuple(s + 1 for s, chosen in enumerate(indirect) if chosen)], product))
        errors += [error(B[t - 1], total), error(paths[()], torch.eye(n)), abs(len(paths) - 2 ** (t - 1))]
    return max(errors)


@check("eq 9", "the recurrence that takes B_t's place for any solver", "autograd through the loop")
def exact_any_solver() -> float:
    """Compare the recurrence with the Jacobian of the whole run, for every solver."""
    network, (c, _), errors = Network(), embeddings(), []
    for table in tables(SHORT, 8).values():
        w = draws(table.S, 1, 4, SIDE, SIDE, seed=5)
        path, _ = walk(GuidedModel(network, c, None, 1.0), table, latents(1), w)
        J, deps = explicit(network, path, c)
        actual = torch.einsum("sij,sjk->ik", derivation.solver_coupling(table, J), deps)
        errors.append(error(actual, through_the_loop(network, table, latents(1), c, w)))
    return max(errors)


@check("eq 9", "the exact gradient by vector-Jacobian products alone", "autograd through the loop")
def exact_without_matrices() -> float:
    """Compare `exact_gradient` with autograd, for every solver and both text embeddings."""
    network, (c, c_empty), errors = Network(), embeddings(), []
    for table in tables(LONG, 20).values():
        w = draws(table.S, N, 4, SIDE, SIDE, seed=5)
        leaves = [x.clone().requires_grad_(True) for x in (c, c_empty)]
        *_, last = sampler.sample(GuidedModel(network, *leaves, GUIDANCE), table, latents(), w)
        expected = torch.autograd.grad(loss_of(last.z), leaves)
        guided = GuidedModel(network.requires_grad_(False), c, c_empty, GUIDANCE)
        path, g = walk(guided, table, latents(), w)
        actual, _ = gradient.exact_gradient(guided, table, path, g)
        network.requires_grad_(True)
        errors += [error(a, b) for a, b in zip(actual, expected, strict=True)]
    return max(errors)


def written_out(table: SolverTable) -> tuple[list[float], list[float]]:
    """Return A_t, and C_i = 1/A_t over its geometric mean, of the schedule LONG at the table's times."""
    A = []
    for t in table.timesteps.tolist():
        bar = math.prod((1 - LONG.beta[: t + 1]).tolist())
        A.append(float(LONG.beta[t]) / math.sqrt(bar * (1 - bar)))
    mean = math.prod(1 / a for a in A) ** (1 / table.S)
    return A, [1 / a / mean for a in A]


@check(
    "A_t, C_i",
    "A_t = beta_t / sqrt(alpha_bar_t (1 - alpha_bar_t)); C_i = 1/A_t over the geometric mean",
    "products",
)
def coefficients() -> float:
    """Compare A_t, C_i and the weights of the paper with products of beta_t, for both ends."""
    errors = []
    for end in ("zero", "sigma_min"):
        table = solver.solver_table(LONG, 20, end)
        A, C = written_out(table)
        errors += [error(gradient.A_t(LONG, table), A), error(gradient.C_i(LONG, table), C)]
        expected = [c * float(k) for c, k in zip(C, table.k, strict=True)]
        errors.append(error(gradient.step_weights(LONG, table, "paper"), expected))
    return max(errors)


@check(
    "A_t = 1",
    "`solver` gives all steps one weight; for ancestral sampling `paper` does too, and k_i = -A_t",
    "constants",
)
def standardised() -> float:
    """Compare the weights of an ancestral table with -A_t and its geometric mean."""
    table = solver.ancestral_table(SHORT)
    mean = math.prod(float(a) ** (1 / SHORT.T) for a in SHORT.A)
    alike = [-mean] * SHORT.T
    actual = {name: gradient.step_weights(SHORT, table, name) for name in ("paper", "solver", "none")}
    return max(
        error(actual["paper"], alike), error(actual["solver"], alike), error(actual["none"], -SHORT.A.flip(0))
    )


def algorithm_A1(
    network: nn.Module, table: SolverTable, z_T: Tensor, c: Tensor, c_empty: Tensor, C: Sequence[float]
) -> Tensor:
    """Return z_0 by Algorithm A.1 as printed: detached inputs, a hook on each eps, autograd through the solver."""
    z, previous = z_T, None
    for i, t in enumerate(table.timesteps.tolist()):
        constant = z.detach()
        empty, prompt = (network(constant, t, x.expand(N, -1, -1)) for x in (c_empty, c))
        eps = (1 - GUIDANCE) * empty + GUIDANCE * prompt
        eps.register_hook(lambda g, weight=C[i]: weight * g)
        z, previous = solver.step(table, i, z, eps, previous), (z, eps)
    return z


@check(
    "Algorithm A.1",
    "the adjusted gradient is sum_i w_i VJP_i, w_i = C_i k_i, by both leaves",
    "hooks and autograd",
)
def adjusted() -> float:
    """Compare `adjusted_gradient` with Algorithm A.1, for text embeddings and the U-Net's parameters."""
    network, (c, c_empty), errors = Network(), embeddings(), []
    for end in ("zero", "sigma_min"):
        table = solver.solver_table(LONG, 20, end)
        _, C = written_out(table)
        leaves = [x.clone().requires_grad_(True) for x in (c, c_empty)]
        z_0 = algorithm_A1(network, table, latents(), *leaves, C)
        expected = torch.autograd.grad(loss_of(z_0), [*leaves, *network.parameters()])
        guided = GuidedModel(network, c, c_empty, GUIDANCE)
        path, g = walk(guided, table, latents())
        w = gradient.step_weights(LONG, table, "paper")
        actual = gradient.adjusted_gradient(guided, table, w, path, g)
        errors += [error(a, b) for a, b in zip(actual, expected, strict=True)]
    return max(errors)


@check("B_t = I", "where the network ignores z, the adjusted gradient with `none` is the exact one", "eq 9")
def no_coupling() -> float:
    """Compare the adjusted gradient of a network without z with the exact gradient."""
    network, (c, c_empty), errors = Network(), embeddings(), []
    network.mix.data.zero_()
    for table in tables(LONG, 20).values():
        w = draws(table.S, N, 4, SIDE, SIDE, seed=5)
        guided = GuidedModel(network, c, c_empty, GUIDANCE)
        path, g = walk(guided, table, latents(), w)
        weights = gradient.step_weights(LONG, table, "none")
        actual = gradient.adjusted_gradient(guided, table, weights, path, g)
        expected, _ = gradient.exact_gradient(guided, table, path, g)
        errors += [error(a, b) for a, b in zip(actual, expected, strict=True)]
    return max(errors)


@check(
    "subsampling",
    "M pairs of a step and an image, with probability ~ |w_i| ‖g_n‖: the mean is the full gradient",
    "40,000 draws on a grid",
    1e-3,
)
def subsampled() -> float:
    """Compare the mean of what drawn pairs add to the gradient with what all pairs add."""
    errors, size = [], torch.tensor([1, 0.01, 3, 0]).double().repeat_interleave(20)
    u = (torch.arange(40_000, dtype=torch.float64)[:, None] + 0.5) / 40_000
    for end in ("zero", "sigma_min"):
        w = gradient.step_weights(LONG, solver.solver_table(LONG, 20, end)).repeat(4)
        for M in (1, 4, 13):
            drawn = gradient.subsample(w, M, u, size)
            errors.append(error(drawn.mean(0) * size, w * size))
            times = drawn.abs() * size * M / (w.abs() * size).sum()  # all draws weigh the same
            errors.append(error(times, times.round()))
    return max(errors)


@check("rows", "the rows of the gradient matrix are single images' gradients", "one image at a time")
def rows_of_the_matrix() -> float:
    """Compare each row with the gradient of a run whose other images have no loss."""
    network, (P, P_empty) = Network().requires_grad_(False), embeddings()
    phi = (draws(D, D, seed=8) / 2).requires_grad_(True)
    table = solver.solver_table(LONG, 6)
    w = gradient.step_weights(LONG, table)
    c, c_empty = torch.tanh(P @ phi), torch.tanh(P_empty @ phi)
    guided = GuidedModel(network, c.detach(), c_empty.detach(), GUIDANCE)
    path, g = walk(guided, table, latents())
    matrix = derivation.gradient_matrix(guided, table, w, path, g, [c, c_empty], [phi])
    expected = []
    for n in range(N):
        only = g * (torch.arange(N) == n).view(-1, 1, 1, 1)
        parts = gradient.adjusted_gradient(guided, table, w, path, only)
        expected.append(torch.autograd.grad([c, c_empty], phi, parts, retain_graph=True)[0].flatten())
    return error(matrix, torch.stack(expected))
