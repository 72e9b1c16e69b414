"""Eqs 9 and 10 and Algorithm A.1: the gradient of the sampling process."""

import itertools
import math

import numpy as np
import torch

from fairref.checks import (
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
from fairref.diffusion import derivation, gradient, sampler, solver


@check("eq 10", "z_0 unrolled: -sum A_t eps^(t) + z_T / sqrt(alpha_bar_T) + noises", "the recursion of eq 3")
def unrolled():
    s, network, (c, c_empty) = SHORT, Network(), embeddings()
    w = draws(s.T, N, 4, SIDE, SIDE, seed=5)
    table = solver.ancestral_table(s)
    path, _ = walk(network, table, latents(), c, c_empty, GUIDANCE, w)
    eps = torch.stack([point.eps for point in reversed(path[:-1])])  # index t - 1
    return error(derivation.unrolled_z0(s, latents(), eps, table.sigma.flip(0), w.flip(0)), path[-1].z)


def explicit(network, path, c):
    """J (S, n, n) and d eps_i / dc (S, n, T D) of a run of one image, by autograd, one step at a time."""
    J, deps = [], []
    for _, t, z, _ in path[:-1]:
        dz, dc = torch.autograd.functional.jacobian(lambda z, c, t=t: network(z, t, c), (z, c))
        J.append(dz.reshape(z.numel(), -1))
        deps.append(dc.reshape(z.numel(), -1))
    return torch.stack(J), torch.stack(deps)


def through_the_loop(network, table, z_T, c, w):
    """dz_0/dc (n, T D), by autograd through the whole loop."""
    c = c.clone().requires_grad_(True)
    *_, last = sampler.sample(network, table, z_T, c, None, 1.0, w)
    rows = [torch.autograd.grad(x, c, retain_graph=True)[0].flatten() for x in last.z.flatten()]
    return torch.stack(rows)


def eq_9():
    """-sum A_t B_t d eps^(t)/dc (n, T D) of a run, and z_0 (n,) of that run as a function of c, at c."""
    network, c, w = Network(), embeddings()[0], draws(FEW.T, 1, 4, SIDE, SIDE, seed=5)
    table = solver.ancestral_table(FEW)
    path, _ = walk(network, table, latents(1), c, None, 1.0, w)
    J, deps = (x.flip(0) for x in explicit(network, path, c))  # index t - 1

    def z_0(c):
        return list(sampler.sample(network, table, latents(1), c, None, 1.0, w))[-1].z.flatten()

    return -torch.einsum("t,tij,tjk->ik", FEW.A, derivation.coupling(FEW, J), deps), z_0, c


@check("eq 9", "dz_0/dtheta = -sum A_t B_t d eps^(t)/d theta, B_t explicit", "autograd through the loop")
def exact_ancestral():
    found, z_0, c = eq_9()
    return error(found, torch.autograd.functional.jacobian(z_0, c).flatten(1))


@check("eq 9", "the same", "finite differences", DIFFERENCE)
def exact_ancestral_difference():
    found, z_0, c = eq_9()
    way = draws(*c.shape, seed=6)
    return error(found @ way.flatten(), finite_difference(z_0, c, way))


@check("eq 9", "B_t is the sum of 2^(t-1) products; the all-direct one is I", "each product, written out")
def all_paths():
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
def exact_any_solver():
    network, (c, _), errors = Network(), embeddings(), []
    for table in tables(SHORT, 8).values():
        w = draws(table.S, 1, 4, SIDE, SIDE, seed=5)
        path, _ = walk(network, table, latents(1), c, None, 1.0, w)
        J, deps = explicit(network, path, c)
        found = torch.einsum("sij,sjk->ik", derivation.solver_coupling(table, J), deps)
        errors.append(error(found, through_the_loop(network, table, latents(1), c, w)))
    return max(errors)


@check("eq 9", "the same as vector-Jacobian products, in one step's memory", "autograd through the loop")
def exact_without_matrices():
    network, (c, c_empty), errors = Network(), embeddings(), []
    for table in tables(LONG, 20).values():
        w = draws(table.S, N, 4, SIDE, SIDE, seed=5)
        leaves = [x.clone().requires_grad_(True) for x in (c, c_empty)]
        *_, last = sampler.sample(network, table, latents(), *leaves, GUIDANCE, w)
        expected = torch.autograd.grad(loss_of(last.z), leaves)
        path, g = walk(network, table, latents(), c, c_empty, GUIDANCE, w)
        found = gradient.exact_gradient(network, table, path, g, c, c_empty, GUIDANCE)[:2]
        errors += [error(a, b) for a, b in zip(found, expected)]
    return max(errors)


def written_out(table) -> tuple[list[float], list[float]]:
    """A_t and C_i = 1/A_t over its geometric mean, of LONG, at the table's times."""
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
def coefficients():
    errors = []
    for end in ("zero", "sigma_min"):
        table = solver.solver_table(LONG, 20, end)
        A, C = written_out(table)
        errors += [error(gradient.A_t(LONG, table), A), error(gradient.C_i(LONG, table), C)]
        expected = [c * float(k) for c, k in zip(C, table.k)]
        errors.append(error(gradient.step_weights(LONG, table, "paper"), expected))
    return max(errors)


@check(
    "A_t = 1",
    "`solver` weighs all steps alike; for ancestral sampling so does `paper`, and k_i = -A_t",
    "constants",
)
def standardised():
    table = solver.ancestral_table(SHORT)
    mean = math.prod(float(a) ** (1 / SHORT.T) for a in SHORT.A)
    alike = [-mean] * SHORT.T
    found = {name: gradient.step_weights(SHORT, table, name) for name in ("paper", "solver", "none")}
    return max(
        error(found["paper"], alike), error(found["solver"], alike), error(found["none"], -SHORT.A.flip(0))
    )


def algorithm_A1(network, table, z_T, c, c_empty, C):
    """Algorithm A.1 as it is printed: detached inputs, a hook on each eps, autograd through the solver."""
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
def adjusted():
    network, (c, c_empty), errors = Network(), embeddings(), []
    for end in ("zero", "sigma_min"):
        table = solver.solver_table(LONG, 20, end)
        _, C = written_out(table)
        leaves = [x.clone().requires_grad_(True) for x in (c, c_empty)]
        z_0 = algorithm_A1(network, table, latents(), *leaves, C)
        expected = torch.autograd.grad(loss_of(z_0), [*leaves, *network.parameters()])
        path, g = walk(network, table, latents(), c, c_empty, GUIDANCE)
        network.zero_grad()
        w = gradient.step_weights(LONG, table, "paper")
        found = gradient.adjusted_gradient(network, table, w, path, g, c, c_empty, GUIDANCE)
        errors += [error(a, b) for a, b in zip([*found, *(p.grad for p in network.parameters())], expected)]
    return max(errors)


@check("B_t = I", "where the network ignores z, the adjusted gradient with `none` is the exact one", "eq 9")
def no_coupling():
    network, (c, c_empty), errors = Network(), embeddings(), []
    network.mix.data.zero_()
    for table in tables(LONG, 20).values():
        w = draws(table.S, N, 4, SIDE, SIDE, seed=5)
        path, g = walk(network, table, latents(), c, c_empty, GUIDANCE, w)
        weights = gradient.step_weights(LONG, table, "none")
        found = gradient.adjusted_gradient(network, table, weights, path, g, c, c_empty, GUIDANCE)
        expected = gradient.exact_gradient(network, table, path, g, c, c_empty, GUIDANCE)[:2]
        errors += [error(a, b) for a, b in zip(found, expected)]
    return max(errors)


@check(
    "subsampling",
    "M of S steps, with probability ~ |w_i|: the mean is the full gradient",
    "10,000 draws on a grid",
    1e-3,
)
def subsampled():
    errors = []
    for end in ("zero", "sigma_min"):
        w = gradient.step_weights(LONG, solver.solver_table(LONG, 20, end))
        for M in (1, 4, 13):
            u = (np.arange(10_000) + 0.5) / 10_000
            draws_of_w = torch.stack([gradient.subsample(w, M, x) for x in u.tolist()])
            errors.append(error(draws_of_w.mean(0), w))
    return max(errors)


@check("rows", "the rows of the gradient matrix are single images' gradients", "one image at a time")
def rows_of_the_matrix():
    network, (P, P_empty) = Network().requires_grad_(False), embeddings()
    phi = (draws(D, D, seed=8) / 2).requires_grad_(True)
    table = solver.solver_table(LONG, 6)
    w = gradient.step_weights(LONG, table)
    c, c_empty = torch.tanh(P @ phi), torch.tanh(P_empty @ phi)
    path, g = walk(network, table, latents(), c, c_empty, GUIDANCE)
    matrix = gradient.gradient_matrix(network, table, w, path, g, c, c_empty, GUIDANCE, [phi])
    expected = []
    for n in range(N):
        only = g * (torch.arange(N) == n).view(-1, 1, 1, 1)
        parts = gradient.adjusted_gradient(network, table, w, path, only, c, c_empty, GUIDANCE)
        expected.append(torch.autograd.grad([c, c_empty], phi, parts, retain_graph=True)[0].flatten())
    return error(matrix, torch.stack(expected))
