"""Targets of the distributional alignment loss by expected optimal transport (METHOD.md §3, eqs 4 and 5).

N images of one prompt, K classes. u^(1..N) are iid one-hot draws from the target distribution D; only their
class counts n ~ Multinomial(N, D) matter. Everything here is float64 on the CPU and carries no gradient.
"""

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom, multinomial

EXACT_LIMIT = 20_000  # count vectors; above it the expectation is drawn, not enumerated
TOLERANCE = 0.01  # largest standard error that drawing stops at
DRAWS_A_ROUND = 500
TIE_BREAK = 1e-12  # weight of the cross-entropy in the cost: it decides only where float64 sees no difference
TARGET_SUM_TOLERANCE = 1e-6  # a target's sum may miss 1 by this, for targets that come from float32


@dataclass(frozen=True)
class OT:
    """What `expected_ot` found."""

    q: torch.Tensor  # (N, K) float64, eq 5; rows sum to 1, rows of images outside the mask are 0
    stderr: torch.Tensor  # (N, K) float64, standard error of q; 0 where q is exact
    cost: float  # expected transport cost E_u[min_σ Σ_i ‖p_i - u_σi‖] / N, between 0 and √2; 0 if no image


def expected_ot(
    logits: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    exact_limit: int = EXACT_LIMIT,
    tolerance: float = TOLERANCE,
    rng: np.random.Generator | None = None,
) -> OT:
    """q^(i) = E_u[u^(σ*_i)] for σ* the cheapest assignment (eqs 4, 5), of logits (N, K) and a target D (K,).

    `mask` (N,) bool: the images that take part (default all). K = 2 has a closed form; otherwise the count
    vectors are enumerated when there are at most `exact_limit`, else drawn from `rng` until no standard error
    exceeds `tolerance`; without `rng` the draws are the same at every call, so all processes find the same q.
    Equal logits get equal q, and the result does not depend on the order of the images. Raises ValueError for
    shapes that do not fit, logits that are not finite, a target that is no distribution.
    """
    logits = np.asarray(torch.as_tensor(logits).detach().cpu().double())
    target = check_target(target, logits)
    keep = np.ones(len(logits), bool) if mask is None else np.asarray(torch.as_tensor(mask).cpu())
    if keep.dtype != bool or keep.shape != logits.shape[:1]:
        raise ValueError(f"mask is {keep.dtype} {keep.shape}; expected bool {logits.shape[:1]}.")
    if not np.isfinite(logits[keep]).all():
        raise ValueError("logits must be finite.")
    q, stderr, cost = np.zeros_like(logits), np.zeros_like(logits), 0.0
    if keep.any():
        # Distinct rows come out sorted, so that assignments don't depend on the order of the images.
        rows, group = np.unique(logits[keep], axis=0, return_inverse=True)
        group = group.reshape(-1)  # (N,) the distinct row of each image
        size = np.bincount(group)  # (G,) images of each distinct row
        distance = class_distance(rows)  # (G, K)
        if len(target) == 2:
            q_rows, stderr_rows = two_classes(rows, size, target), np.zeros_like(rows)
        else:
            q_rows, stderr_rows = any_classes(
                distance + TIE_BREAK * cross_entropy(rows), size, target, exact_limit, tolerance, rng
            )
        q[keep], stderr[keep] = q_rows[group], stderr_rows[group]
        cost = float((q[keep] * distance[group]).sum(1).mean())  # the cost is linear in the assignment
    return OT(torch.from_numpy(q), torch.from_numpy(stderr), cost)


def check_target(target, logits):
    """The target (K,) as float64 with sum exactly 1. Raises ValueError."""
    target = np.asarray(torch.as_tensor(target, dtype=torch.float64).detach().cpu())
    if logits.ndim != 2 or target.shape != logits.shape[1:] or len(target) < 2:
        raise ValueError(
            f"logits are {logits.shape} and the target is {target.shape}; expected (N, K), (K,), K > 1."
        )
    if not (target >= 0).all() or abs(target.sum() - 1) > TARGET_SUM_TOLERANCE:
        raise ValueError(f"the target {target.tolist()} is no distribution: it must be >= 0 and sum to 1.")
    return target / target.sum()


def class_distance(logits):
    """‖p^(i) - e_k‖₂ (N, K) of logits (N, K). 1 - p_k is summed from the others: exact also near p_k = 1."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    others = ~np.eye(logits.shape[1], dtype=bool)  # (K, K) row k: all classes but k
    rest = p @ others  # (N, K) 1 - p_k
    return np.sqrt(rest**2 + p**2 @ others)


def cross_entropy(logits):
    """-log p^(i)_k (N, K) of logits (N, K).

    Where p saturates at 1.0 the distances tie and assignments would be arbitrary. The cheapest one by
    cross-entropy is what the ranking by log-odds picks for K = 2.
    """
    shifted = logits - logits.max(1, keepdims=True)
    return np.log(np.exp(shifted).sum(1, keepdims=True)) - shifted


def two_classes(logits, size, target):
    """q (G, 2) for K = 2: the image of rank r in log-odds gets class 0 iff n_0 >= r, n_0 ~ Binomial(N, d_0).

    `logits` (G, 2) distinct rows, `size` (G,) how often each occurs. Ranks are by log-odds, not by p, which
    saturates at 1.0 and would tie; images of equal log-odds share the mean of their ranks' q.
    """
    N = size.sum()
    rank = np.arange(1, N + 1)
    by_rank = np.stack([binom.sf(rank - 1, N, target[0]), binom.cdf(rank - 1, N, target[0])], 1)  # (N, 2)
    _, tied = np.unique(logits[:, 1] - logits[:, 0], return_inverse=True)  # ascending: most of class 0 first
    tied_of_rank = np.repeat(np.arange(tied.max() + 1), np.bincount(tied, size).astype(int))  # (N,)
    return mean_by(tied_of_rank, by_rank)[tied]


def any_classes(cost, size, target, exact_limit, tolerance, rng):
    """q and its standard error (G, K) for any K, by enumerating or drawing the class counts: cost (G, K)."""
    N, K = int(size.sum()), len(target)
    group = np.repeat(np.arange(len(size)), size)  # (N,) images in the order of the rows
    cost = cost[group]  # (N, K)
    possible = int((target > 0).sum())
    if math.comb(N + possible - 1, possible - 1) <= exact_limit:
        counts = count_vectors(N, target > 0)  # (M, K)
        weights = multinomial.pmf(counts, N, target)
        q = np.zeros((N, K))
        for n, weight in zip(counts, weights):
            q[np.arange(N), assign(cost, n)] += weight
        q_rows = mean_by(group, q)
        return q_rows / weights.sum(), np.zeros_like(q_rows)  # the sum misses 1 by rounding only
    return draw(cost, group, target, tolerance, rng or np.random.default_rng(0))


def draw(cost, group, target, tolerance, rng):
    """Monte Carlo over n ~ Multinomial(N, D): q and its standard error (G, K), every error <= tolerance."""
    N, K = cost.shape
    total, squares, M = 0.0, 0.0, 0
    stderr = np.inf
    while np.max(stderr) > tolerance:
        counts, times = np.unique(rng.multinomial(N, target, DRAWS_A_ROUND), axis=0, return_counts=True)
        for n, repeats in zip(counts, times):
            one = mean_by(group, np.eye(K)[assign(cost, n)])  # (G, K)
            total, squares = total + repeats * one, squares + repeats * one**2
        M += DRAWS_A_ROUND
        q = total / M
        stderr = np.sqrt(np.maximum(squares / M - q**2, 0) / (M - 1))
    return q, stderr


def assign(cost, n):
    """Each image's class (N,) when n_k images go to class k at the least cost: cost (N, K), n (K,)."""
    classes = np.repeat(np.arange(len(n)), n)  # (N,)
    _, slots = linear_sum_assignment(cost[:, classes])  # a square matrix: one slot an image, in their order
    return classes[slots]


def count_vectors(N, allowed):
    """Every vector (M, K) of counts >= 0 with sum N, 0 where `allowed` (K,) is false. M = C(N+k-1, k-1)."""
    k = int(allowed.sum())
    bars = np.array(list(combinations(range(N + k - 1), k - 1)), int)  # stars and bars
    bars = bars.reshape(math.comb(N + k - 1, k - 1), k - 1)  # (M, k - 1), also for k = 1
    ends = np.pad(bars, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, N + k - 1)))  # (M, k + 1)
    counts = np.zeros((len(bars), len(allowed)), int)
    counts[:, allowed] = np.diff(ends, axis=1) - 1
    return counts


def mean_by(group, values):
    """The mean of the rows `values` (N, K) that share a `group` (N,) 0..G-1 -> (G, K)."""
    size = np.bincount(group)
    total = np.zeros((len(size), values.shape[1]))
    np.add.at(total, group, values)
    return total / size[:, None]
