"""Every equation of the method, checked against something that is not itself.

    python -m fairref.verify                  one line an equation; exit status 1 if one fails
    python -m fairref.verify --json FILE      the same as JSON
    python -m fairref.verify --figures DIR    also draws figures 6a, 6b and 7 (extra `figures`)

What is checked is the code that runs in training. What it is checked against is written out here in the
plainest form (loops over permutations, autograd through the loop, finite differences) or known in closed form.
All in float64 on a network of 270 parameters; equations and errata are those of docs/derivation.md.
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairref import cli
from fairref.diffusion import gradient, sampler, schedule, solver
from fairref.errors import UserError
from fairref.fairness import losses, metrics, transport
from fairref.progress import Progress

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


@dataclass(frozen=True)
class Result:
    equation: str
    claim: str
    against: str
    tolerance: float
    error: float
    passed: bool

    def __str__(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        return (
            f"{verdict}  {self.equation:<14} {self.claim}\n"
            f"      {'':<14} against {self.against}: {self.error:.1e} (at most {self.tolerance:.2g})"
        )


CHECKS: list[Check] = []


def check(equation: str, claim: str, against: str, tolerance: float = EXACT):
    """Registers a function () -> largest relative error."""

    def register(run):
        CHECKS.append(Check(equation, claim, against, tolerance, run))
        return run

    return register


# --- the small setting in which everything is checked ---


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


# --- 1. diffusion ---


@check(
    "eq 1", "x_t is sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise", "mean and variance, step by step"
)
def forward_process():
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
def reverse_step():
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
def ancestral_sampling():
    s, network, (c, _), errors = SHORT, Network(), embeddings(), []
    w = draws(s.T, N, 4, SIDE, SIDE, seed=5)
    for kind in ("small", "large"):
        path, _ = walk(network, solver.ancestral_table(s, variance=kind), latents(), c, None, 1.0, w)
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
def guidance():
    network, (c, c_empty) = Network(), embeddings()
    errors = []
    with torch.no_grad():
        for s in (0.0, 1.0, GUIDANCE):
            found = sampler.predict(network, latents(), 500, c, c_empty, s)
            empty, prompt = (network(latents(), 500, x.expand(N, -1, -1)) for x in (c_empty, c))
            errors.append(error(found, (1 - s) * empty + s * prompt))
    return max(errors)


@check(
    "DPM-Solver++",
    "2M, midpoint, both ends; exact where the predicted image stays",
    "its update in lambda; a single datum",
)
def solver_steps():
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
            found = solver.step(table, i, z, eps, previous)
            before, image = image, (z - math.sqrt(1 - bars[i]) * eps) / math.sqrt(bars[i])
            h, guess = log_snr[i + 1] - log_snr[i], image
            last_is_first_order = i == S - 1 and (end == "zero" or S < 15)
            if i > 0 and not last_is_first_order:
                guess = image + h / (log_snr[i] - log_snr[i - 1]) / 2 * (image - before)
            ratio = math.sqrt((1 - bars[i + 1]) / (1 - bars[i]))
            expected = ratio * z - math.sqrt(bars[i + 1]) * math.expm1(-h) * guess
            errors.append(error(found, expected))
            z, previous = found, (z, eps)

        datum, noise = draws(4, seed=50), draws(4, seed=51)  # eps is then the noise itself, at all times
        z, previous = math.sqrt(bars[0]) * datum + math.sqrt(1 - bars[0]) * noise, None
        for i in range(S):
            z, previous = solver.step(table, i, z, noise, previous), (z, noise)
            errors.append(error(z, math.sqrt(bars[i + 1]) * datum + math.sqrt(1 - bars[i + 1]) * noise))
    return max(errors)


@check("z_0", "z_0 = a z_T + sum_i k_i eps_i + sum_i m_i w_i, for every solver", "the loop, with free eps")
def totals():
    errors = []
    for table in tables(SHORT, 20).values():
        z_T, eps, w = draws(4, seed=1), draws(table.S, 4, seed=2), draws(table.S, 4, seed=3)
        z, previous = z_T, None
        for i in range(table.S):
            z, previous = solver.step(table, i, z, eps[i], previous, w[i]), (z, eps[i])
        errors.append(error(table.a * z_T + table.k @ eps + table.m @ w, z))
    return max(errors)


# --- 2. the gradient of the sampling process ---


@check("eq 10", "z_0 unrolled: -sum A_t eps^(t) + z_T / sqrt(alpha_bar_T) + noises", "the recursion of eq 3")
def unrolled():
    s, network, (c, c_empty) = SHORT, Network(), embeddings()
    w = draws(s.T, N, 4, SIDE, SIDE, seed=5)
    table = solver.ancestral_table(s)
    path, _ = walk(network, table, latents(), c, c_empty, GUIDANCE, w)
    eps = torch.stack([point.eps for point in reversed(path[:-1])])  # index t - 1
    return error(gradient.unrolled_z0(s, latents(), eps, table.sigma.flip(0), w.flip(0)), path[-1].z)


def explicit(network, table, path, c):
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


def ancestral_case():
    network, c, w = Network(), embeddings()[0], draws(FEW.T, 1, 4, SIDE, SIDE, seed=5)
    table = solver.ancestral_table(FEW)
    path, _ = walk(network, table, latents(1), c, None, 1.0, w)
    return network, table, path, c, w


@check("eq 9", "dz_0/dtheta = -sum A_t B_t d eps^(t)/d theta, B_t explicit", "autograd through the loop")
def exact_ancestral():
    network, table, path, c, w = ancestral_case()
    J, deps = (x.flip(0) for x in explicit(network, table, path, c))  # index t - 1
    found = -torch.einsum("t,tij,tjk->ik", FEW.A, gradient.coupling(FEW, J), deps)
    return error(found, through_the_loop(network, table, latents(1), c, w))


@check("eq 9", "the same", "finite differences", DIFFERENCE)
def exact_ancestral_difference():
    network, table, path, c, w = ancestral_case()
    J, deps = (x.flip(0) for x in explicit(network, table, path, c))
    found = -torch.einsum("t,tij,tjk->ik", FEW.A, gradient.coupling(FEW, J), deps)
    way = draws(*c.shape, seed=6)

    def z_0(c):
        return list(sampler.sample(network, table, latents(1), c, None, 1.0, w))[-1].z.flatten()

    return error(found @ way.flatten(), finite_difference(z_0, c, way))


@check("eq 9", "B_t is the sum of 2^(t-1) products; the all-direct one is I", "each product, written out")
def all_paths():
    n, errors = 3, []
    J = draws(FEW.T, n, n, seed=7)
    B = gradient.coupling(FEW, J)
    for t in range(1, FEW.T + 1):
        paths = gradient.gradient_paths(FEW, J, t)
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
        J, deps = explicit(network, table, path, c)
        found = torch.einsum("sij,sjk->ik", gradient.solver_coupling(table, J), deps)
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


@check(
    "A_t, C_i",
    "A_t = beta_t / sqrt(alpha_bar_t (1 - alpha_bar_t)); C_i = 1/A_t over the geometric mean",
    "products",
)
def coefficients():
    errors = []
    for end in ("zero", "sigma_min"):
        table = solver.solver_table(LONG, 20, end)
        A = []
        for t in table.timesteps.tolist():
            bar = math.prod((1 - LONG.beta[: t + 1]).tolist())
            A.append(float(LONG.beta[t]) / math.sqrt(bar * (1 - bar)))
        mean = math.prod(1 / a for a in A) ** (1 / table.S)
        C = [1 / a / mean for a in A]
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
        A = [
            float(LONG.beta[t] / (LONG.alpha_bar[t] * (1 - LONG.alpha_bar[t])).sqrt())
            for t in table.timesteps
        ]
        mean = math.prod(1 / a for a in A) ** (1 / table.S)
        leaves = [x.clone().requires_grad_(True) for x in (c, c_empty)]
        z_0 = algorithm_A1(network, table, latents(), *leaves, [1 / a / mean for a in A])
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


# --- 3. the distributional alignment loss ---


def by_definition(p: np.ndarray, target) -> tuple[np.ndarray, float]:
    """q and expected cost of eqs 4 and 5: all K^N label vectors u, and all N! permutations of each."""
    n, K = p.shape
    q, cost = np.zeros((n, K)), 0.0
    for labels in itertools.product(range(K), repeat=n):
        probability = math.prod(target[k] for k in labels)
        u = np.eye(K)[list(labels)]
        totals = {
            s: sum(np.linalg.norm(p[i] - u[s[i]]) for i in range(n)) for s in itertools.permutations(range(n))
        }
        best = min(totals, key=totals.get)
        q += probability * u[list(best)]
        cost += probability * totals[best] / n
    return q, cost


@check(
    "eqs 4, 5", "q^(i) = E[u^(sigma*_i)] and the transport cost, K = 2, 3, 4", "all labels x all permutations"
)
def expected_transport():
    errors = []
    for target in ((0.3, 0.7), (0.5, 0.2, 0.3), (0.4, 0.0, 0.35, 0.25)):
        logits = 2 * draws(5 if len(target) < 4 else 4, len(target), seed=len(target))
        found = transport.expected_ot(logits, target)
        q, cost = by_definition(logits.softmax(1).numpy(), target)
        errors += [error(found.q, q), error(found.cost, cost)]
    return max(errors)


@check("eqs 4, 5", "K = 2 in closed form, q = P(Binomial(N, d) >= rank), N = 24", "enumeration of all counts")
def closed_form():
    errors = []
    for d in (0.5, 0.2):
        logits = 3 * draws(24, 2, seed=4)
        three = torch.cat(
            [logits, torch.full((24, 1), -60.0, dtype=torch.float64)], 1
        )  # a class never asked for
        errors.append(
            error(
                transport.expected_ot(logits, [d, 1 - d]).q,
                transport.expected_ot(three, [d, 1 - d, 0]).q[:, :2],
            )
        )
    return max(errors)


@check(
    "eqs 4, 5",
    "Monte Carlo for many classes: within 4.5 of its own standard errors",
    "enumeration (in standard errors)",
    4.5,
)
def monte_carlo():
    logits, target = 2 * draws(12, 4, seed=5), [0.4, 0.3, 0.2, 0.1]
    exact = transport.expected_ot(logits, target)
    drawn = transport.expected_ot(logits, target, exact_limit=0, rng=np.random.default_rng(1))
    return float(((drawn.q - exact.q).abs() / drawn.stderr.clamp(min=1e-3)).max())


@check(
    "eqs 4, 5",
    "several attributes: joint cost, targets of each attribute by summing",
    "all labels x all permutations",
)
def joint_attributes():
    table, n = np.array([[0.4, 0.1], [0.2, 0.3]]), 4
    logits = {"a": 2 * draws(n, 2, seed=6), "b": 2 * draws(n, 2, seed=7)}
    found = transport.joint_ot(logits, table)
    p = [x.softmax(1).numpy() for x in logits.values()]
    q = np.zeros((2, n, 2))
    for labels in itertools.product(itertools.product(range(2), repeat=2), repeat=n):

        def total(s, labels=labels):
            joint = [
                [np.sum((p[a][i] - np.eye(2)[labels[s[i]][a]]) ** 2) for a in range(2)] for i in range(n)
            ]
            return sum(math.sqrt(sum(x)) for x in joint)

        best = min(itertools.permutations(range(n)), key=total)
        probability = math.prod(table[k] for k in labels)
        for i, a in itertools.product(range(n), range(2)):
            q[a, i, labels[best[i]][a]] += probability
    return max(error(found["a"].q, q[0]), error(found["b"].q, q[1]))


@check(
    "eq 6",
    "L_align: cross-entropy of the images whose target is certain",
    "image by image, and finite differences",
    DIFFERENCE,
)
def align():
    logits, C = 2 * draws(8, 3, seed=8), 0.7
    q = transport.expected_ot(logits, [0.5, 0.3, 0.2]).q
    if not 2 <= int((q.amax(1) >= C).sum()) <= 6:
        return math.inf  # the claim is about both kinds

    def by_image(logits):
        total = logits.new_zeros(())
        for i in range(8):
            y = max(range(3), key=lambda k: float(q[i, k]))
            if float(q[i, y]) >= C:
                total = total - (logits[i, y] - logits[i].exp().sum().log()) / 8
        return total

    leaf = logits.clone().requires_grad_(True)
    value = losses.align_loss(leaf, q, C, 8)[0].sum()
    (slope,) = torch.autograd.grad(value, leaf)
    way = draws(8, 3, seed=9)
    return max(
        error(value, by_image(logits)), error((slope * way).sum(), finite_difference(by_image, logits, way))
    )


@check(
    "eq 7",
    "L_img: one minus the cosine of features, summed over CLIP and DINO",
    "image by image, and finite differences",
    DIFFERENCE,
)
def semantics():
    x, o = draws(4, 3, SIDE, SIDE, seed=1), draws(4, 3, SIDE, SIDE, seed=2)
    maps = [draws(12, 5, seed=3), draws(12, 7, seed=4)]
    features = [lambda x, m=m: (x.flatten(1) @ m).tanh() for m in maps]

    def by_image(x):
        total = x.new_zeros(())
        for f in features:
            for a, b in zip(f(x), f(o)):
                total = total + (1 - (a @ b) / (a.square().sum().sqrt() * b.square().sum().sqrt())) / 4
        return total

    leaf = x.clone().requires_grad_(True)
    value = losses.image_loss(leaf, o, features, 4).sum()
    (slope,) = torch.autograd.grad(value, leaf)
    way = draws(*x.shape, seed=5)
    return max(error(value, by_image(x)), error((slope * way).sum(), finite_difference(by_image, x, way)))


# --- 4. evaluation ---


@check(
    "bias(P)",
    "the mean absolute difference of all pairs of frequencies; 0 fair, 2/K for one class",
    "a double loop",
)
def bias_metric():
    errors = []
    for counts in ((24, 36), (60, 0), (15, 15, 15, 15), (7, 1, 30, 2), (0, 0, 160, 0, 0, 0, 0, 0)):
        K, total = len(counts), sum(counts)
        freq = [n / total for n in counts]
        expected = sum(abs(freq[i] - freq[j]) for i in range(K) for j in range(i)) / (K * (K - 1) / 2)
        errors.append(error(metrics.bias(np.array(counts)), expected))
    return max(errors)


@check(
    "noise floor",
    "what a fair model measures at K = 2 and 60 images, .10 +- .08",
    "sums of binomial coefficients",
)
def noise_floor():
    n = 60
    weights = [math.comb(n, k) / 2**n for k in range(n + 1)]
    mean = sum(w * abs(2 * k - n) / n for k, w in enumerate(weights))
    std = math.sqrt(sum(w * (abs(2 * k - n) / n - mean) ** 2 for k, w in enumerate(weights)))
    return max(error(metrics.noise_floor(2, n), (mean, std)), 0.0 if abs(mean - 0.10) < 0.005 else 1.0)


def verify(shown: bool = False) -> list[Result]:
    """Runs every check; an error in one is its failure."""
    results = []
    with Progress(len(CHECKS), "verifying", shown) as progress:
        for c in CHECKS:
            try:
                found = c.run()
            except Exception:  # whatever it is, the claim is not shown
                found = math.inf
            passed = found <= c.tolerance
            results.append(Result(c.equation, c.claim, c.against, c.tolerance, float(found), passed))
            progress.step(c.equation)
    return results


def main(argv=None) -> int:
    """The command line."""
    parser = cli.Parser(prog="python -m fairref.verify", description="Check every equation of the method.")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--figures", type=Path, help="folder for figures 6a, 6b and 7 and their numbers")
    parser.add_argument("--weights", default=cli.WEIGHTS, help="bundle that the figures are about")
    options = parser.parse_args(argv)
    bundle = _ready_for_figures(options) if options.figures else None
    if options.json and not options.json.parent.is_dir():
        raise UserError(
            f"--json is {options.json}, but there is no folder {options.json.parent}; make it first."
        )
    began = time.monotonic()
    results = verify(shown=True)
    print("\n".join(map(str, results)))
    failed = sum(not r.passed for r in results)
    print(f"{len(results)} checks, {failed} failed, {time.monotonic() - began:.0f} s")
    if options.json:
        rows = [{**asdict(r), "error": r.error if math.isfinite(r.error) else None} for r in results]
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if bundle:
        draw_figures(bundle, options.figures)
    return 1 if failed else 0


def _ready_for_figures(options):
    """The bundle; what is missing is better said before the work."""
    from fairref import figures
    from fairref.bundle import load_bundle

    figures.pyplot()
    bundle = load_bundle(options.weights)
    if bundle.clip is None:
        raise UserError(f"{bundle.path}: has no CLIP, which figure 6a needs; use a bundle that names one.")
    try:
        options.figures.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise UserError(
            f"--figures is {options.figures}, which can't be made ({failure.strerror})."
        ) from None
    return bundle


def draw_figures(bundle, folder: Path) -> None:
    """Figures 6a, 6b and 7 as PNG, the numbers of 6a and 6b as CSV."""
    from fairref import figures, study

    figures.gradient_paths(folder / "fig7.png")
    rows = study.scales(bundle)
    study.write_csv(folder / "fig6b.csv", rows)
    labels = ("diffusion time t", "norm, mean and 90 % band of 20 runs")
    title = "Scale of the gradient by time"
    figures.curves(folder / "fig6b.png", study.by_curve(rows), "t", labels, title, log=True)
    rows = study.descent(bundle)
    study.write_csv(folder / "fig6a.csv", rows)
    labels = ("iteration", "1 - cos of CLIP features, mean and range of 3 seeds")
    title = "Loss to one fixed image, by gradient"
    figures.curves(folder / "fig6a.png", study.by_curve(rows), "iteration", labels, title)
    print(f"figures and their numbers are in {folder}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
