"""Checks of eqs 4 to 7, of the bias and of its noise floor."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fairref.fairness import losses, metrics, threshold, transport
from fairref.verification.checks import (
    DIFFERENCE,
    SIDE,
    check,
    draws,
    error,
    finite_difference,
)


def by_definition(p: np.ndarray, target: Sequence[float]) -> tuple[np.ndarray, float]:
    """Return q (N, K) and the expected cost of eqs 4 and 5, from all K^N label vectors u and all N! permutations.

    p (N, K): the classifier's probabilities. target: the share of each class.
    """
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
def expected_transport() -> float:
    """Compare q and the cost of three targets with the sums over all labels and permutations."""
    errors = []
    for target in ((0.3, 0.7), (0.5, 0.2, 0.3), (0.4, 0.0, 0.35, 0.25)):
        logits = 2 * draws(5 if len(target) < 4 else 4, len(target), seed=len(target))
        actual = transport.expected_ot(logits, target)
        q, cost = by_definition(logits.softmax(1).numpy(), target)
        errors += [error(actual.q, q), error(actual.cost, cost)]
    return max(errors)


@check("eqs 4, 5", "K = 2 in closed form, q = P(Binomial(N, d) >= rank), N = 24", "enumeration of all counts")
def closed_form() -> float:
    """Compare the closed form of two classes with the enumeration for a third class of share 0."""
    errors = []
    for d in (0.5, 0.2):
        logits = 3 * draws(24, 2, seed=4)
        # a class never asked for
        three = torch.cat([logits, torch.full((24, 1), -60.0, dtype=torch.float64)], 1)
        errors.append(
            error(
                transport.expected_ot(logits, [d, 1 - d]).q,
                transport.expected_ot(three, [d, 1 - d, 0]).q[:, :2],
            )
        )
    return max(errors)


@check("eq 6, C", "pull near the target: .405, .678, 1 of it left at C = .8, .7, .58", "all counts of N = 24")
def pull_left() -> float:
    """Compare the slope of the images asked to change with the closed form, and it with 2 (1 - C) for N = 10^6."""
    m, half = np.arange(25), torch.full((2,), 0.5, dtype=torch.float64)
    pmf = np.array([math.comb(24, int(k)) for k in m]) / 2**24
    errors = []
    for C, left in ((0.8, 0.405), (0.7, 0.678), (0.58, 1.0)):
        moves = [threshold.asked_to_change((k, 24 - k), half, C) for k in m.tolist()]
        net = np.array([float(x[1, 0] - x[0, 1]) for x in moves])
        slope = -(pmf * 2 * (2 * m - 24) * net).sum() / 24
        errors.append(error(threshold.pull_left(24, C), slope))
        errors.append(0.0 if abs(slope - left) < 6e-4 else math.inf)
        limit = min(1, 2 * (1 - C))
        errors.append(0.0 if abs(threshold.pull_left(10**6, C) - limit) < 2e-3 else math.inf)
    return max(errors)


@check(
    "eq 6, C", "K = 4, N = 5: who is asked to change, by either threshold", "all labels x all permutations"
)
def asked_of_four() -> float:
    """Compare the counts of images that are told another class with those by the definition of q."""
    counts, target = (3, 1, 1, 0), torch.tensor([0.1, 0.2, 0.2, 0.5], dtype=torch.float64)
    own = np.repeat(range(4), counts)
    logits = np.random.default_rng(0).normal(size=(5, 4)) + threshold.SURE * np.eye(4)[own]
    q, _ = by_definition(torch.from_numpy(logits).softmax(1).numpy(), target.tolist())
    errors = []
    for leave, C in ((False, 0.6), (True, 0.6), (True, 0.9)):
        expected = np.zeros((4, 4))
        for of_image, k in zip(q, own, strict=True):
            others = np.where(np.arange(4) == k, 0, of_image)
            told = others.argmax() if leave else of_image.argmax()
            if (others.sum() if leave else of_image.max()) >= C and told != k:
                expected[k, told] += 1
        errors.append(error(threshold.asked_to_change(counts, target, C, leave), expected))
        errors.append(0.0 if expected.any() else math.inf)
    return max(errors)


@check(
    "eqs 4, 5",
    "Monte Carlo for many classes: within 4.5 of its own standard errors",
    "enumeration (in standard errors)",
    4.5,
)
def monte_carlo() -> float:
    """Return the largest error of the drawn targets in units of their standard error."""
    logits, target = 2 * draws(12, 4, seed=5), [0.4, 0.3, 0.2, 0.1]
    exact = transport.expected_ot(logits, target)
    drawn = transport.expected_ot(logits, target, exact_limit=0, rng=np.random.default_rng(1))
    return float(((drawn.q - exact.q).abs() / drawn.stderr.clamp(min=1e-3)).max())


@check(
    "eqs 4, 5",
    "several attributes: joint cost, targets of each attribute by summing",
    "all labels x all permutations",
)
def joint_attributes() -> float:
    """Compare the targets of two attributes with the sums over all labels and permutations."""
    table, n = np.array([[0.4, 0.1], [0.2, 0.3]]), 4
    logits = {"a": 2 * draws(n, 2, seed=6), "b": 2 * draws(n, 2, seed=7)}
    actual = transport.joint_ot(logits, table)
    p = [x.softmax(1).numpy() for x in logits.values()]
    q = np.zeros((2, n, 2))
    for labels in itertools.product(itertools.product(range(2), repeat=2), repeat=n):

        def total(s: tuple[int, ...], labels: tuple[tuple[int, int], ...] = labels) -> float:
            joint = [
                [np.sum((p[a][i] - np.eye(2)[labels[s[i]][a]]) ** 2) for a in range(2)] for i in range(n)
            ]
            return sum(math.sqrt(sum(x)) for x in joint)

        best = min(itertools.permutations(range(n)), key=total)
        probability = math.prod(table[k] for k in labels)
        for i, a in itertools.product(range(n), range(2)):
            q[a, i, labels[best[i]][a]] += probability
    return max(error(actual["a"].q, q[0]), error(actual["b"].q, q[1]))


@check(
    "eq 6",
    "L_align: cross-entropy of the images whose target is certain",
    "image by image, and finite differences",
    DIFFERENCE,
)
def align() -> float:
    """Compare L_align and its slope along one direction with a loop over images."""
    logits, C = 2 * draws(8, 3, seed=8), 0.7
    q = transport.expected_ot(logits, [0.5, 0.3, 0.2]).q
    if not 2 <= int((q.amax(1) >= C).sum()) <= 6:
        return math.inf  # the claim is about both kinds

    def by_image(logits: Tensor) -> Tensor:
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
def semantics() -> float:
    """Compare L_img and its slope along one direction with a loop over images."""
    x, o = draws(4, 3, SIDE, SIDE, seed=1), draws(4, 3, SIDE, SIDE, seed=2)
    maps = [draws(12, 5, seed=3), draws(12, 7, seed=4)]
    features = [lambda x, m=m: (x.flatten(1) @ m).tanh() for m in maps]

    def by_image(x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for f in features:
            for a, b in zip(f(x), f(o), strict=True):
                total = total + (1 - (a @ b) / (a.square().sum().sqrt() * b.square().sum().sqrt())) / 4
        return total

    leaf = x.clone().requires_grad_(True)
    value = losses.image_loss(leaf, o, features, 4).sum()
    (slope,) = torch.autograd.grad(value, leaf)
    way = draws(*x.shape, seed=5)
    return max(error(value, by_image(x)), error((slope * way).sum(), finite_difference(by_image, x, way)))


@check(
    "L_face",
    "one minus the cosine with the original's face where its class is confident, else with the nearest of D_F",
    "image by image, and finite differences",
    DIFFERENCE,
)
def face() -> float:
    """Compare L_face and its slope along one direction with a loop over images."""
    unit = torch.nn.functional.normalize
    e, own = draws(5, 8, seed=1), unit(draws(5, 8, seed=2), dim=1)
    external = unit(draws(20, 8, seed=3), dim=1)
    original_confident = torch.tensor([True, False, False, True, False])

    def by_image(e: Tensor) -> Tensor:
        total = e.new_zeros(())
        for i in range(5):
            length = e[i].square().sum().sqrt()
            largest = max(float(e[i].detach() @ f / length) for f in external)
            nearest = next(f for f in external if float(e[i].detach() @ f / length) == largest)
            # of N = 8, five are judged
            total = total + (1 - e[i] @ (own[i] if original_confident[i] else nearest) / length) / 8
        return total

    def face_loss(e: Tensor) -> Tensor:
        references = losses.face_references(e, own, original_confident, external, chunk=7)
        return losses.face_loss(e, references, 8).sum()

    leaf = e.clone().requires_grad_(True)
    value = face_loss(leaf)
    (slope,) = torch.autograd.grad(value, leaf)
    way = draws(*e.shape, seed=4)
    return max(error(value, by_image(e)), error((slope * way).sum(), finite_difference(by_image, e, way)))


@check(
    "bias(P)",
    "the mean absolute difference of all pairs of frequencies; 0 fair, 2/K for one class",
    "a double loop",
)
def bias_metric() -> float:
    """Compare the bias of five sets of counts with a double loop over classes."""
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
def noise_floor() -> float:
    """Compare mean and standard deviation with their sums over the binomial distribution."""
    n = 60
    weights = [math.comb(n, k) / 2**n for k in range(n + 1)]
    mean = sum(w * abs(2 * k - n) / n for k, w in enumerate(weights))
    std = math.sqrt(sum(w * (abs(2 * k - n) / n - mean) ** 2 for k, w in enumerate(weights)))
    return max(error(metrics.noise_floor(2, n), (mean, std)), 0.0 if abs(mean - 0.10) < 0.005 else 1.0)
