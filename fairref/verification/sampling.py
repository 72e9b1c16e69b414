"""Checks of eqs 1 to 3: the forward process, ancestral sampling, guidance and DPM-Solver++."""

import math

import torch

from fairref.diffusion import solver
from fairref.diffusion.model import GuidedModel
from fairref.verification.checks import (
    GUIDANCE,
    LONG,
    SHORT,
    SIDE,
    N,
    Network,
    check,
    draws,
    embeddings,
    error,
    latents,
    tables,
    walk,
)


@check(
    "eq 1", "x_t is sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise", "mean and variance, step by step"
)
def forward_process() -> float:
    """Compare alpha_bar_t with the mean and variance that single steps add up to."""
    mean, variance, errors = 1.0, 0.0, []
    for t in range(LONG.T):
        beta = float(LONG.beta[t])
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        errors += [
            error(LONG.alpha_bar[t].sqrt(), mean),
            error(1 - LONG.alpha_bar[t], variance),
            error(LONG.alpha[t], 1 - beta),
        ]
    return max(errors)


@check("eq 2", "mu_theta and sigma_t^2 I are the mean and variance of q(x_{t-1} | x_t, x_0)", "Bayes' rule")
def reverse_step() -> float:
    """Compare mu_theta and sigma_t^2 with the product of two Gaussians."""
    s, table, errors = SHORT, solver.ancestral_table(SHORT), []
    x_t, eps = 0.7, -1.3
    for t in range(2, s.T + 1):
        i, beta, bar, before = (
            s.T - t,
            float(s.beta[t - 1]),
            float(s.alpha_bar[t - 1]),
            float(s.alpha_bar[t - 2]),
        )
        x_0 = (x_t - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        # q(x_t | x_{t-1}) and q(x_{t-1} | x_0) as two Gaussians in x_{t-1}: precisions add up
        precision = (1 - beta) / beta + 1 / (1 - before)
        mean = (math.sqrt(1 - beta) / beta * x_t + math.sqrt(before) / (1 - before) * x_0) / precision
        errors += [
            error(table.p[i] * x_t + table.q[i] * eps, mean),
            error(table.sigma[i] ** 2, 1 / precision),
        ]
    return max(errors)


@check("eq 3", "the sampler's loop is ancestral sampling, w_1 = 0", "the recursion, written out")
def ancestral_sampling() -> float:
    """Compare the last latent with that of eq 3 in a loop, for both variances."""
    s, network, (c, _), errors = SHORT, Network(), embeddings(), []
    w = draws(s.T, N, 4, SIDE, SIDE, seed=5)
    for kind in ("small", "large"):
        path, _ = walk(
            GuidedModel(network, c, None, 1.0), solver.ancestral_table(s, variance=kind), latents(), w
        )
        z = latents()
        with torch.no_grad():
            for t in range(s.T, 0, -1):
                beta, alpha, bar = s.beta[t - 1], 1 - s.beta[t - 1], torch.prod(1 - s.beta[:t])
                eps = network(z, t - 1, c.expand(N, -1, -1))
                variance = beta * (1 - bar / alpha) / (1 - bar) if kind == "small" else beta
                z = (z - beta / (1 - bar).sqrt() * eps) / alpha.sqrt() + variance.sqrt() * (t > 1) * w[
                    s.T - t
                ]
        errors.append(error(path[-1].z, z))
    return max(errors)


@check("guidance", "eps = eps_empty + s (eps_prompt - eps_empty), for all s", "two separate evaluations")
def guidance() -> float:
    """Compare the guided noise with two evaluations, for three scales."""
    network, (c, c_empty) = Network(), embeddings()
    errors = []
    with torch.no_grad():
        for s in (0.0, 1.0, GUIDANCE):
            actual = GuidedModel(network, c, c_empty, s).eps(latents(), 500)
            empty, prompt = (network(latents(), 500, x.expand(N, -1, -1)) for x in (c_empty, c))
            errors.append(error(actual, (1 - s) * empty + s * prompt))
    return max(errors)


@check(
    "DPM-Solver++",
    "2M, midpoint, both ends; exact where the predicted image stays",
    "its update in lambda; a single datum",
)
def solver_steps() -> float:
    """Compare each step with the solver's update in lambda, and a run on one datum with the datum."""
    errors = []
    for S, end in ((5, "zero"), (20, "zero"), (5, "sigma_min"), (20, "sigma_min")):
        table = solver.solver_table(LONG, S, end)
        bars = [float(LONG.alpha_bar[t]) for t in table.timesteps] + [
            1.0 if end == "zero" else float(LONG.alpha_bar[0])
        ]
        log_snr = [math.log(bar / (1 - bar)) / 2 if bar < 1 else math.inf for bar in bars]
        z, image, previous = draws(4, seed=1), None, None
        for i in range(S):
            eps = draws(4, seed=i + 2)
            actual = solver.step(table, i, z, eps, previous)
            before, image = image, (z - math.sqrt(1 - bars[i]) * eps) / math.sqrt(bars[i])
            h, guess = log_snr[i + 1] - log_snr[i], image
            last_is_first_order = i == S - 1 and (end == "zero" or S < 15)
            if i > 0 and not last_is_first_order:
                guess = image + h / (log_snr[i] - log_snr[i - 1]) / 2 * (image - before)
            ratio = math.sqrt((1 - bars[i + 1]) / (1 - bars[i]))
            expected = ratio * z - math.sqrt(bars[i + 1]) * math.expm1(-h) * guess
            errors.append(error(actual, expected))
            z, previous = actual, (z, eps)

        datum, noise = draws(4, seed=50), draws(4, seed=51)  # eps is then the noise itself, at all times
        z, previous = math.sqrt(bars[0]) * datum + math.sqrt(1 - bars[0]) * noise, None
        for i in range(S):
            z, previous = solver.step(table, i, z, noise, previous), (z, noise)
            errors.append(error(z, math.sqrt(bars[i + 1]) * datum + math.sqrt(1 - bars[i + 1]) * noise))
    return max(errors)


@check("z_0", "z_0 = a z_T + sum_i k_i eps_i + sum_i m_i w_i, for every solver", "the loop, with free eps")
def totals() -> float:
    """Compare z_0 of a run with free noise predictions with its one sum, for every solver."""
    errors = []
    for table in tables(SHORT, 20).values():
        z_T, eps, w = draws(4, seed=1), draws(table.S, 4, seed=2), draws(table.S, 4, seed=3)
        z, previous = z_T, None
        for i in range(table.S):
            z, previous = solver.step(table, i, z, eps[i], previous, w[i]), (z, eps[i])
        errors.append(error(table.a * z_T + table.k @ eps + table.m @ w, z))
    return max(errors)
