"""Targets of the distributional alignment loss by expected optimal transport (docs/method.md §3, eqs 4 and 5).

N images of one prompt, K classes. u^(1..N) are iid one-hot draws from the target distribution D; only their
class counts n ~ Multinomial(N, D) matter. Everything here is float64 on the CPU and carries no gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import bdtr, bdtrc, log_softmax
from scipy.stats import multinomial

EXACT_LIMIT = 20_000  # count vectors; above it the expectation is drawn, not enumerated
TOLERANCE = 0.01  # largest standard error that drawing stops at
DRAWS = 500  # at most, in one round
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
            possible = int((joint > 0).sum())
            if math.comb(len(solver.group) + possible - 1, possible - 1) <= exact_limit:
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
    return -log_softmax(logits, axis=1)


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

    def enumerate(self) -> tuple[np.ndarray, np.ndarray]:
        """The expectation over all class counts."""
        assigned = every_assignment(self.cost[self.group], np.flatnonzero(self.target))  # (N, M)
        got = [assigned == k for k in range(len(self.target))]
        weights = multinomial.pmf(np.stack([of_k.sum(0) for of_k in got], 1), len(assigned), self.target)
        q = np.stack([of_k @ weights for of_k in got], 1) / weights.sum()  # it misses 1 by rounding only
        q = mean_by(self.group, q) @ self.sums
        return q, np.zeros_like(q)

    def draw(self, tolerance: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Monte Carlo over n ~ Multinomial(N, D), until every standard error is <= tolerance.

        The counts are a control variate, for E[n] = N D is known: what an image gets is fitted by a constant and
        n - N D, and q is the constant.
        A class that an image got in none of M draws, or in all, has the error 3 / M: its chance is then below 3 / M,
        or above 1 - 3 / M, with a confidence of 95 % (rule of three); so has one that no draw has off the fit. Where D
        rules a class out, or all others, q is exact.
        """
        cost, M, stderr = self.cost[self.group], 0, np.inf
        xx = xy = yy = 0.0  # sums over draws
        ways = (self.target > 0) @ self.sums  # (J,) classes with a chance that count as class j
        exact = np.tile((ways == 0) | (ways == (self.target > 0).sum()), len(self.cost))  # (G J,)
        while np.max(stderr) > tolerance:
            more = DRAWS if M == 0 else M * ((np.max(stderr) / tolerance) ** 2 - 1) + len(self.target)
            n = rng.multinomial(len(cost), self.target, min(math.ceil(more), DRAWS))
            x = np.insert(n - len(cost) * self.target, 0, 1, axis=1)  # (M, 1 + K)
            y = mean_by(self.group, self.sums[assign_each(cost, n).T]).reshape(len(n), -1)  # (M, G J)
            xx, xy, yy, M = xx + x.T @ x, xy + x.T @ y, yy + (y**2).sum(0), M + len(n)
            inverse = np.linalg.pinv(xx, rcond=1e-9, hermitian=True)  # not 1 / xx: the counts add up to N
            fit = inverse @ xy  # (1 + K, G J)
            left = np.maximum(yy - (fit * xy).sum(0), 0)  # squares
            stderr = np.sqrt(inverse[0, 0] * left / (M - len(self.target)))
            stderr = np.where(exact, 0, np.where(left < 1e-9 * M, 3 / M, stderr))
        q = np.where((xy[0] == 0) | (xy[0] == M), xy[0] / M, fit[0])
        return q.reshape(len(self.cost), -1), stderr.reshape(len(self.cost), -1)


def assign(cost: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Each image's class (N,) when n_k images go to class k at the least cost: cost (N, K), n (K,)."""
    classes = np.repeat(np.arange(len(n), dtype=np.min_scalar_type(len(n))), n)  # (N,)
    _, slots = linear_sum_assignment(cost[:, classes])  # a square matrix: one slot an image, in their order
    return classes[slots]


def assign_each(cost: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`assign` for each row of counts (M, K) -> (N, M): from that of the row in the middle, move by move."""
    middle = counts[((counts - counts.mean(0)) ** 2).sum(1).argmin()]
    assigned = np.repeat(assign(cost, middle)[:, None], len(counts), 1)
    surplus, changes = middle - counts, Changes.of(cost)
    while len(rows := np.flatnonzero(surplus.any(1))):
        start, end = surplus[rows].argmax(1), surplus[rows].argmin(1)
        assigned[:, rows] = changes.move_one(assigned[:, rows], start, end)
        surplus[rows, start] -= 1
        surplus[rows, end] += 1
    return assigned


def every_assignment(cost: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The cheapest assignment of N images for every vector of counts of `classes`: cost (N, K) -> (N, M).

    Neighbouring counts share their work: what is cheapest for one vector becomes, by one move (`Changes.move_one`),
    what is cheapest for the next. All images start in one class; to another alone they go in their order. From there,
    round r reaches the vectors with r images in the other classes, each from one with r - 1 in them: no class is
    filled after a later one. All M = C(N+k-1, k-1) vectors are reached in N rounds of moves.
    """
    changes, classes = Changes.of(cost), classes.astype(np.min_scalar_type(cost.shape[1]))
    start, second, others = classes[0], classes[-1], classes[1:-1]
    n = np.arange(len(cost) + 1 if second != start else 1)
    reached = [np.where(changes.rank[start, second][:, None] < n, second, start)]  # (N, G) of each round
    order, filled = np.arange(len(others)), np.zeros(len(n), int)  # (G,) which of the others was filled last
    while (ways := (reached[-1] == start).any(0)[:, None] & (filled[:, None] <= order)).any():
        rows, filled = np.nonzero(ways)
        reached.append(changes.move_one(reached[-1][:, rows], start, others[filled]))
    return np.hstack(reached)


class Changes(NamedTuple):
    """What it costs to move images from a class to another, the cheapest first: (K, K, N) from u, to v."""

    image: np.ndarray  # by rank
    rank: np.ndarray  # of each image
    cost: np.ndarray  # by rank, and a last one, infinite: (K, K, N + 1)

    @staticmethod
    def of(cost: np.ndarray) -> "Changes":
        """Those of cost (N, K)."""
        change = cost.T[None] - cost.T[:, None]  # (K, K, N)
        image = change.argsort(-1)
        by_rank = np.take_along_axis(change, image, -1)
        nobody = np.full((*change.shape[:2], 1), np.inf)
        rank = image.argsort(-1).astype(np.min_scalar_type(len(cost)))
        return Changes(image, rank, np.concatenate([by_rank, nobody], -1))

    def move_one(self, assigned: np.ndarray, start: np.ndarray | int, end: np.ndarray | int) -> np.ndarray:
        """The cheapest assignments (N, G), of cheapest ones, with an image less in `start` and one more in `end`.

        Bellman and Ford's shortest way over the K classes, in which u -> v costs what the image of u costs that
        goes to v most cheaply; each image on the way moves on by one class.
        """
        (N, G), K, assigned = assigned.shape, len(self.rank), assigned.copy()  # in rows, the fast way round
        row, start = np.arange(G), np.broadcast_to(start, G)
        others = assigned != np.arange(K, dtype=assigned.dtype)[:, None, None]  # (K, N, G) images not of u
        # (K, K, G) the rank of the image of u that goes to v most cheaply; N if u has none
        first = np.maximum(self.rank[:, :, :, None], (others * self.rank.dtype.type(N))[:, None]).min(2)
        edges = self.cost.take(first + (N + 1) * np.arange(K * K).reshape(K, K, 1))
        edges[:, start, row] = np.inf  # no way leads back
        length = edges[start, :, row].T  # (K, G) of the shortest way found, from start to each class
        later = []  # of the ways that became shorter: which, and the lengths before, (K, G) each
        for _ in range(K - 2):
            shorter = (length[:, None] + edges).min(0)
            better = shorter < length - ROUNDING
            if not better.any():
                break
            later.append((better, length))
            length = np.where(better, shorter, length)
        v = np.broadcast_to(end, G).copy()
        for better, length in reversed(later):
            moves = row[better[v, row]]
            to = v[moves]
            v[moves] = (length[:, moves] + edges[:, to, moves]).argmin(0)
            assigned[self.image[v[moves], to, first[v[moves], to, moves]], moves] = to
        assigned[self.image[start, v, first[start, v, row]], row] = v
        return assigned


def mean_by(group: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean of the rows `values` (..., N, K) that share a `group` (N,), ascending from 0 to G-1 -> (..., G, K)."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return np.add.reduceat(values, starts, axis=-2) / np.bincount(group)[:, None]
