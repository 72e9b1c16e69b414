"""Targets of the distributional alignment loss by expected optimal transport (docs/method.md §3, eqs 4 and 5).

N images of one prompt, K classes. u^(1..N) are iid one-hot draws from the target distribution D; only their
class counts n ~ Multinomial(N, D) matter. Everything here is float64 on the CPU and carries no gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import bdtr, bdtrc
from scipy.stats import multinomial

EXACT_LIMIT = 20_000  # count vectors; above it the expectation is drawn, not enumerated
TOLERANCE = 0.01  # largest standard error that drawing stops at
DRAWS_A_ROUND = 500
TIE_BREAK = 1e-12  # weight of the cross-entropy in the cost, which decides between nearly equal distances
ROUNDING = 2e-15  # a way through the classes must be shorter by more than what rounding makes of it
TARGET_SUM_TOLERANCE = 1e-6  # a target's sum may miss 1 by this, for targets that come from float32


@dataclass(frozen=True)
class OT:
    """What `expected_ot` found."""

    q: torch.Tensor  # (N, K) float64, eq 5; rows sum to 1, rows of images outside the mask are 0
    stderr: torch.Tensor  # (N, K) float64, standard error of q (`Solver.draw`); 0 where q is exact
    cost: float  # expected transport cost E_u[min_σ Σ_i ‖p_i - u_σi‖] / N, at least 0; 0 if there is no image


def expected_ot(
    logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None, **options: object
) -> OT:
    """q^(i) = E_u[u^(σ*_i)] for σ* the cheapest assignment (eqs 4, 5), of logits (N, K) and a target D (K,).

    `joint_ot` of one attribute: see there for `mask` and `options`. Logits may be log-probabilities.
    """
    return joint_ot({"": logits}, target, mask, **options)[""]


def joint_ot(
    logits: dict[str, torch.Tensor],
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    exact_limit: int = EXACT_LIMIT,
    tolerance: float = TOLERANCE,
    rng: np.random.Generator | None = None,
) -> dict[str, OT]:
    """Eqs 4, 5 for several attributes at once: logits (N, K_a) of each, a joint target D (K_1, ..., K_A).

    A class is one class of each attribute. Its distance to an image is the root of the attributes' summed
    squares; q is found for the K = K_1 ... K_A joint classes and summed to each attribute's own. `cost` is the
    joint one, the same in all.

    `mask` (N,) bool: the images that take part (default all). K = 2 has a closed form; otherwise the count
    vectors are enumerated when there are at most `exact_limit`, else drawn from `rng` until no standard error
    exceeds `tolerance`; without `rng` the draws are the same at every call. Processes that give equal generators
    find the same q.
    Equal logits get equal q, and the result does not depend on the order of the images. Raises ValueError for
    shapes that do not fit, logits that are not finite, a target that is no distribution.
    """
    arrays = [np.asarray(torch.as_tensor(part).detach().cpu().double()) for part in logits.values()]
    target = check_target(target, arrays)
    N, sizes, joint = len(arrays[0]), target.shape, target.reshape(-1)  # joint: (K,)
    keep = np.ones(N, bool) if mask is None else np.asarray(torch.as_tensor(mask).cpu())
    if keep.dtype != bool or keep.shape != (N,):
        raise ValueError(f"mask is {keep.dtype} {keep.shape}; expected bool {(N,)}.")
    if not all(np.isfinite(part[keep]).all() for part in arrays):
        raise ValueError("logits must be finite.")
    sums = class_sums(sizes)  # (K, K + K_1 + ... + K_A)
    q, stderr, cost = np.zeros((N, sums.shape[1])), np.zeros((N, sums.shape[1])), 0.0
    if keep.any():
        # Distinct rows come out sorted, so that assignments don't depend on the order of the images.
        rows, group = np.unique(np.hstack(arrays)[keep], axis=0, return_inverse=True)
        group = group.reshape(-1)  # (n,) the distinct row of each image
        size = np.bincount(group)  # (G,) images of each distinct row
        parts = np.split(rows, np.cumsum(sizes)[:-1], axis=1)
        distance = joint_sum([class_distance(part) ** 2 for part in parts]) ** 0.5  # (G, K)
        if len(joint) == 2:
            q_rows, stderr_rows = two_classes(rows, size, joint) @ sums, np.zeros((len(rows), sums.shape[1]))
        else:
            tie_break = TIE_BREAK * joint_sum([cross_entropy(part) for part in parts])
            solver = Solver(distance + tie_break, np.repeat(np.arange(len(size)), size), joint, sums)
            if solver.count_vectors() <= exact_limit:
                q_rows, stderr_rows = solver.enumerate()
            else:
                q_rows, stderr_rows = solver.draw(tolerance, rng or np.random.default_rng(0))
        q[keep], stderr[keep] = q_rows[group], stderr_rows[group]
        assigned = q[keep, : len(joint)]  # (n, K); the cost is linear in it
        cost = float((assigned * distance[group]).sum(1).mean())
    columns = [torch.from_numpy(x).split([len(joint), *sizes], 1)[1:] for x in (q, stderr)]
    return {name: OT(a.clone(), b.clone(), cost) for name, a, b in zip(logits, *columns, strict=True)}


def check_target(target: torch.Tensor, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The target (K_1, ..., K_A) as float64 with sum exactly 1. Raises ValueError."""
    target = np.asarray(torch.as_tensor(target, dtype=torch.float64).detach().cpu())
    shapes = [part.shape for part in arrays]
    fits = all(len(shape) == 2 and shape[0] == shapes[0][0] and shape[1] > 1 for shape in shapes)
    if not fits or target.shape != tuple(shape[1] for shape in shapes):
        raise ValueError(
            f"logits are {', '.join(map(str, shapes))} and the target is {target.shape}; expected (N, K), (K,),"
            " K > 1, and one dimension of the target for each attribute."
        )
    if not (target >= 0).all() or abs(target.sum() - 1) > TARGET_SUM_TOLERANCE:
        raise ValueError(f"the target {target.tolist()} is no distribution: it must be >= 0 and sum to 1.")
    return target / target.sum()


def class_sums(sizes: Sequence[int]) -> np.ndarray:
    """0/1 matrix (K, K + K_1 + ... + K_A): a joint class counts as itself and as a class of each attribute."""
    of_joint = np.indices(sizes).reshape(len(sizes), -1)  # (A, K) the attribute's class of each joint class
    classes = (np.eye(k)[c] for k, c in zip(sizes, of_joint, strict=True))
    return np.hstack([np.eye(of_joint.shape[1]), *classes])


def joint_sum(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Sum over attributes, for each joint class: parts (G, K_a) -> (G, K_1 ... K_A)."""
    total = parts[0]
    for part in parts[1:]:
        total = (total[:, :, None] + part[:, None]).reshape(len(part), -1)
    return total


def class_distance(logits: np.ndarray) -> np.ndarray:
    """‖p^(i) - e_k‖₂ (N, K) of logits (N, K). 1 - p_k is summed from the others: exact also near p_k = 1."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    others = ~np.eye(logits.shape[1], dtype=bool)  # (K, K) row k: all classes but k
    rest = p @ others  # (N, K) 1 - p_k
    return np.sqrt(rest**2 + p**2 @ others)


def cross_entropy(logits: np.ndarray) -> np.ndarray:
    """-log p^(i)_k (N, K) of logits (N, K).

    Where p saturates at 1.0 the distances tie and assignments would be arbitrary. The cheapest one by
    cross-entropy is what the ranking by log-odds picks for K = 2.
    """
    shifted = logits - logits.max(1, keepdims=True)
    return np.log(np.exp(shifted).sum(1, keepdims=True)) - shifted


def two_classes(logits: np.ndarray, size: np.ndarray, target: np.ndarray) -> np.ndarray:
    """q (G, 2) for K = 2: the image of rank r in log-odds gets class 0 iff n_0 >= r, n_0 ~ Binomial(N, d_0).

    `logits` (G, 2) distinct rows, `size` (G,) how often each occurs. Ranks are by log-odds, not by p, which
    saturates at 1.0 and would tie; images of equal log-odds share the mean of their ranks' q.
    """
    N = size.sum()
    rank = np.arange(1, N + 1)
    tails = bdtrc(rank - 1, N, target[0]), bdtr(rank - 1, N, target[0])  # P(n_0 >= rank), P(n_0 < rank)
    by_rank = np.stack(tails, 1)  # (N, 2)
    _, tied = np.unique(logits[:, 1] - logits[:, 0], return_inverse=True)  # ascending: most of class 0 first
    tied_of_rank = np.repeat(np.arange(tied.max() + 1), np.bincount(tied, size).astype(int))  # (N,)
    return mean_by(tied_of_rank, by_rank)[tied]


@dataclass(frozen=True)
class Solver:
    """Any number of classes: every method gives what an image gets by class, and its standard error, (G, J)."""

    cost: np.ndarray  # (G, K) of the distinct images
    group: np.ndarray  # (N,) the distinct row of each image
    target: np.ndarray  # (K,)
    sums: np.ndarray  # (K, J) what is counted of each class

    def count_vectors(self) -> int:
        """How many class counts have a chance."""
        possible = int((self.target > 0).sum())
        return math.comb(len(self.group) + possible - 1, possible - 1)

    def enumerate(self) -> tuple[np.ndarray, np.ndarray]:
        """The expectation over all class counts."""
        K = len(self.target)
        assigned = every_assignment(self.cost[self.group], np.flatnonzero(self.target))  # (M, N)
        counts = (assigned[:, :, None] == np.arange(K)).sum(1)  # (M, K)
        weights = multinomial.pmf(counts, len(self.group), self.target)
        weights /= weights.sum()  # it misses 1 by rounding only
        q = np.stack([weights @ (assigned == k) for k in range(K)], 1)  # (N, K)
        q = mean_by(self.group, q) @ self.sums
        return q, np.zeros_like(q)

    def draw(self, tolerance: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Monte Carlo over n ~ Multinomial(N, D), until every standard error is <= tolerance.

        A class that an image got in none of M draws, or in all, has the error 3 / M: its chance is then below 3 / M,
        or above 1 - 3 / M, with a confidence of 95 % (rule of three). Where D rules a class out, or all others, q is
        exact.
        """
        cost, total, squares, M = self.cost[self.group], 0.0, 0.0, 0
        stderr = np.inf
        ways = (self.target > 0) @ self.sums  # (J,) classes with a chance that count as class j
        exact = (ways == 0) | (ways == (self.target > 0).sum())
        while np.max(stderr) > tolerance:
            draws = rng.multinomial(len(cost), self.target, DRAWS_A_ROUND)
            counts, times = np.unique(draws, axis=0, return_counts=True)
            for n, repeats in zip(counts, times, strict=True):
                one = mean_by(self.group, self.sums[assign(cost, n)])  # (G, J)
                total, squares = total + repeats * one, squares + repeats * one**2
            M += DRAWS_A_ROUND
            q = total / M
            stderr = np.sqrt(np.maximum(squares / M - q**2, 0) / (M - 1))
            stderr = np.where(exact, 0, np.where((q == 0) | (q == 1), 3 / M, stderr))
        return q, stderr


def assign(cost: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Each image's class (N,) when n_k images go to class k at the least cost: cost (N, K), n (K,)."""
    classes = np.repeat(np.arange(len(n)), n)  # (N,)
    _, slots = linear_sum_assignment(cost[:, classes])  # a square matrix: one slot an image, in their order
    return classes[slots]


def every_assignment(cost: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The cheapest assignment of N images for every vector of counts of `classes`: cost (N, K) -> (M, N).

    Neighbouring counts share their work. All images start in one class; an image more for another class, and
    one less for the first, is the cheapest way through the classes (`move_one`), and what was cheapest for
    the old counts so becomes it for the new ones. All M = C(N+k-1, k-1) vectors are reached in N (k-1) moves.
    """
    start, *others = classes
    assigned = np.full((1, len(cost)), start)  # (M so far, N)
    change = cost[:, None, :] - cost[:, :, None]  # (N, K, K) of the cost, when image i goes from u to v
    for other in others:
        rows, reached = assigned, [assigned]
        while len(rows := rows[(rows == start).any(1)]):
            rows = move_one(rows, change, start, other)
            reached.append(rows)
        assigned = np.concatenate(reached)
    return assigned


def move_one(assigned: np.ndarray, change: np.ndarray, start: int, end: int) -> np.ndarray:
    """The cheapest assignments (G, N) with one image less in `start` and one more in `end`.

    Bellman and Ford's shortest way over the K classes, in which u -> v costs what the image of u costs that
    goes to v most cheaply; each image on the way moves on by one class.
    """
    G, K = len(assigned), change.shape[1]
    row = np.arange(G)
    each = change[np.arange(len(change)), assigned]  # (G, N, K) of the cost, when image i goes to v
    edges, image = np.full((G, K, K), np.inf), np.zeros((G, K, K), int)  # (G, from u, to v)
    for u in range(K):
        of_u = np.where((assigned == u)[:, :, None], each, np.inf)
        image[:, u] = of_u.argmin(1)
        edges[:, u] = np.take_along_axis(of_u, image[:, u][:, None], 1)[:, 0]
    edges[:, :, start] = np.inf  # no way leads back
    length = np.full((G, K), np.inf)
    length[:, start] = 0
    before = []  # K - 1 times (G, K): the class before v on the way, -1 where the way did not become shorter
    for _ in range(K - 1):
        through = length[:, :, None] + edges
        u = through.argmin(1)
        shorter = np.take_along_axis(through, u[:, None], 1)[:, 0]
        better = shorter < length - ROUNDING
        length, u = np.where(better, shorter, length), np.where(better, u, -1)
        before.append(u)
    assigned, v = assigned.copy(), np.full(G, end)
    for u in reversed(before):
        moves = row[u[row, v] >= 0]
        to = v[moves]
        v[moves] = u[moves, to]
        assigned[moves, image[moves, v[moves], to]] = to
    return assigned


def mean_by(group: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean of the rows `values` (N, K) that share a `group` (N,) 0..G-1 -> (G, K)."""
    size = np.bincount(group)
    total = np.zeros((len(size), values.shape[1]))
    np.add.at(total, group, values)
    return total / size[:, None]
