"""What a reader computes in the course (docs/course): each quantity taken apart into what its formula is made of.

`fairref verify --mine` changes the parts, one or two at a time, to say how an answer is wrong. `others` are the
method's other named quantities, and a few whole formulas that readers come to instead.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, softmax
from scipy.stats import binom


@dataclass(frozen=True)
class Of:
    """A part that is a quantity of its own."""

    name: str  # a key of QUANTITIES
    arguments: Mapping[str, np.ndarray]


Part = np.ndarray | float | bool | Of  # bool: a statement that holds; Of: with parts of its own
Parts = dict[str, Part]
Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Quantity:
    """One function of the course."""

    parts: Callable[
        ..., Parts
    ]  # arguments -> the formula's parts, under the names that a reader knows them by
    formula: Callable[..., np.ndarray]  # the parts, in their order -> the value
    others: Callable[..., Values] = lambda **_: {}  # arguments -> what may be taken for it, or for a part


def _before(x):
    """Index t - 1 holds time t - 1; the one of time 0 is 1."""
    return np.concatenate([[1.0], x[:-1]])


def _known(beta, alpha_bar, **_):
    """The values of a schedule that have names, and the roots of those."""
    before = _before(alpha_bar)
    values = {"β_t": beta, "α_t": 1 - beta, "ᾱ_t": alpha_bar, "1 - ᾱ_t": 1 - alpha_bar, "ᾱ_{t-1}": before}
    roots = {f"√({name})" if " " in name else f"√{name}": value**0.5 for name, value in values.items()}
    return {**values, **roots, "A_t": beta / (alpha_bar * (1 - alpha_bar)) ** 0.5}


def _product(beta, root, J, sign, first, counts, leftmost):
    """The coupling of each time: the product of as many factors as `counts` says, from the time `first` on."""
    eye, first = np.eye(J.shape[-1]), int(first) - 1
    factors = eye + sign * (beta / root)[:, None, None] * J
    products = []
    for count in counts.astype(int):
        product = eye
        for factor in factors[max(first, 0) : max(first + count, 0)]:
            product = product @ factor if leftmost else factor @ product
        products.append(product)
    return np.stack(products)


def _first_order(beta, alpha_bar, J):
    terms = (beta / (1 - alpha_bar) ** 0.5)[:, None, None] * J
    return np.eye(J.shape[-1]) - np.concatenate([np.zeros_like(J[:1]), terms.cumsum(0)[:-1]])


def _recursion(p, q, r, s):
    """k_i, from the end to the start."""
    S = len(p)
    u, k = np.zeros(S + 2), np.zeros(S)
    u[S] = 1
    for i in reversed(range(S)):
        r_next, s_next = (r[i + 1], s[i + 1]) if i + 1 < S else (0, 0)
        u[i] = p[i] * u[i + 1] + r_next * u[i + 2]
        k[i] = q[i] * u[i + 1] + s_next * u[i + 2]
    return k


def _standardised(A, times, is_geometric, is_of_sampler, has_mean):
    C = 1 / A[np.clip(times.astype(int), 1, len(A)) - 1]
    of = C if is_of_sampler else 1 / A
    mean = np.exp(np.log(of).mean()) if is_geometric else of.mean()
    return C / mean if has_mean else C


def _rank(odds):
    """1: the largest."""
    return 1.0 + (-odds).argsort().argsort()


def _share_of_rank(N, rank, share):
    of_class_1 = binom.sf(rank - 1, int(N), np.clip(share, 0, 1))
    return np.stack([1 - of_class_1, of_class_1], 1)


def _fixed_set(logits, n_1):
    """The n_1 images of the largest log-odds are told class 1."""
    return np.eye(2)[(_rank(logits[:, 1] - logits[:, 0]) <= n_1).astype(int)]


def _one_hot(rows):
    return np.eye(rows.shape[1])[rows.argmax(1)]


def _cosine(x, o, normed=True):
    dot = (x * o).sum(1)
    return dot / np.linalg.norm(x, axis=1) / np.linalg.norm(o, axis=1) if normed else dot


def _pairs(shares):
    i, j = np.triu_indices(len(shares), 1)
    return shares[i] - shares[j]


QUANTITIES = {
    "alpha_bar": Quantity(
        lambda beta: {"α_t": 1 - beta},
        np.cumprod,
        lambda beta: {"β_t": beta, "α_t": 1 - beta, "the sum of the α_s": (1 - beta).cumsum()},
    ),
    "sigma_t": Quantity(
        lambda beta, alpha_bar: {
            "β_t": beta,
            "1 - ᾱ_{t-1}": 1 - _before(alpha_bar),
            "1 - ᾱ_t": 1 - alpha_bar,
            "the root": 0.5,
        },
        lambda beta, before, now, root: (beta * before / now) ** root,
        lambda beta, alpha_bar: {
            **_known(beta, alpha_bar),
            "√β_t (the other variance), 0 at t = 1": beta**0.5 * (np.arange(len(beta)) > 0),
        },
    ),
    "epsilon": Quantity(
        lambda eps_prompt, eps_empty, s: {"ε_P": eps_prompt, "ε_∅": eps_empty, "s": s},
        lambda eps, empty, s: empty + s * (eps - empty),
        lambda eps_prompt, eps_empty, s: {
            "ε_P": eps_prompt,
            "ε_∅": eps_empty,
            "ε_P - ε_∅": eps_prompt - eps_empty,
        },
    ),
    "A_t": Quantity(
        lambda beta, alpha_bar: {"β_t": beta, "√ᾱ_t": alpha_bar**0.5, "√(1 - ᾱ_t)": (1 - alpha_bar) ** 0.5},
        lambda beta, root, sd: beta / root / sd,
        _known,
    ),
    "z_0": Quantity(
        lambda beta, alpha_bar, z_T, eps, w: {
            "A_t": Of("A_t", {"beta": beta, "alpha_bar": alpha_bar}),
            "ε^(t)": eps,
            "z_T": z_T,
            "√ᾱ_T": alpha_bar[-1] ** 0.5,
            "σ_t": Of("sigma_t", {"beta": beta, "alpha_bar": alpha_bar}),
            "√ᾱ_{t-1}": _before(alpha_bar) ** 0.5,
            "w_t": w,
            "the minus before the sum": -1.0,
        },
        lambda A, eps, z_T, root_T, sigma, before, w, sign: (
            sign * (A @ eps) + z_T / root_T + (sigma / before)[1:] @ w[1:]
        ),
        _known,
    ),
    "B_t": Quantity(
        lambda beta, alpha_bar, J: {
            "β_s": beta,
            "√(1 - ᾱ_s)": (1 - alpha_bar) ** 0.5,
            "J_s": J,
            "the minus before β_s": -1.0,
            "the time of the first factor": 1.0,
            "the number of factors": np.arange(len(beta)) * 1.0,
            "the factor of s = 1 is leftmost": True,
        },
        _product,
        lambda beta, alpha_bar, J: {
            "I less the sum of all β_s/√(1 - ᾱ_s) J_s, without their products": _first_order(
                beta, alpha_bar, J
            ),
            **_known(beta, alpha_bar),
        },
    ),
    "gradient": Quantity(
        lambda beta, alpha_bar, J, eps_theta: {
            "A_t": Of("A_t", {"beta": beta, "alpha_bar": alpha_bar}),
            "B_t": Of("B_t", {"beta": beta, "alpha_bar": alpha_bar, "J": J}),
            "∂ε^(t)/∂θ": eps_theta,
            "the minus before the sum": -1.0,
        },
        lambda A, B, eps_theta, sign: sign * np.einsum("t,tij,tjm->im", A, B, eps_theta),
        lambda beta, alpha_bar, J, eps_theta: {
            "the adjusted gradient (A_t = 1, B_t = I)": -eps_theta.sum(0),
            **_known(beta, alpha_bar),
        },
    ),
    "C_i": Quantity(
        lambda beta, alpha_bar, times: {
            "A_t": Of("A_t", {"beta": beta, "alpha_bar": alpha_bar}),
            "the time t_i": times * 1.0,
            "the mean is geometric": True,
            "the mean is over the sampler's times": True,
            "they are divided by a mean": True,
        },
        _standardised,
        lambda beta, alpha_bar, times: {
            f"{name} at t_i": value[times - 1] for name, value in _known(beta, alpha_bar).items()
        },
    ),
    "k_i": Quantity(
        lambda p, q, r, s: {"p_i": p, "q_i": q, "r_i": r, "s_i": s},
        _recursion,
        lambda p, q, r, s: {"q_i": q, "s_i": s, "q_i + s_i": q + s},
    ),
    "adjusted": Quantity(
        lambda C, k, vjps: {"C_i": C, "k_i": k, "gᵀ ∂ε_i/∂θ": vjps},
        lambda C, k, vjps: (C * k) @ vjps,
        lambda C, k, vjps: {"|k_i|": np.abs(k)},
    ),
    "q": Quantity(
        lambda logits, target: {
            "N": float(len(logits)),
            "the rank r": _rank(logits[:, 1] - logits[:, 0]),
            "the target": target[1],
        },
        _share_of_rank,
        lambda logits, target: {
            "the softmax of the logits": softmax(logits, 1),
            "the class that each image shows": _one_hot(logits),
            "the target for every image": np.tile(target, (len(logits), 1)),
            "one fixed set of N times the target, rounded": _fixed_set(
                logits, np.round(len(logits) * target[1])
            ),
            "one fixed set of N times the target, rounded down": _fixed_set(
                logits, np.floor(len(logits) * target[1])
            ),
            "argsort once (the order of the images)": 1.0 + (logits[:, 0] - logits[:, 1]).argsort(),
            "the rank from the other end": 1 + len(logits) - _rank(logits[:, 1] - logits[:, 0]),
            "the rank of the logit of class 1 alone": _rank(logits[:, 1]),
            "the target of class 0": target[0],
            "1/2": 0.5,
        },
    ),
    "L_align": Quantity(
        lambda logits, q, C: {
            "log softmax of the logits": log_softmax(logits, 1),
            "y, the class of the larger q": _one_hot(q),
            "the mask c ≥ C": (q.max(1) >= C) * 1.0,
            "N": float(len(q)),
            "the minus of the cross-entropy": -1.0,
        },
        lambda log_p, y, sure, N, sign: sign * (log_p * y).sum(1) @ sure / N,
        lambda logits, q, C: {
            "the softmax of the logits": softmax(logits, 1),
            "log softmax of their softmax (softmax twice)": log_softmax(softmax(logits, 1), 1),
            "the logits": logits,
            "q": q,
            "the class that each image shows": _one_hot(logits),
            "the mask c > C": (q.max(1) > C) * 1.0,
            "the mask c < C": (q.max(1) < C) * 1.0,
            "c itself": q.max(1),
            "c, where it is C or more,": q.max(1) * (q.max(1) >= C),
            "the mask p ≥ C of the classifier's own p": (softmax(logits, 1).max(1) >= C) * 1.0,
            "the number of images that are sure": float((q.max(1) >= C).sum()),
        },
    ),
    "L_img": Quantity(
        lambda clip_x, clip_o, dino_x, dino_o: {
            "cos of CLIP": _cosine(clip_x, clip_o),
            "cos of DINO": _cosine(dino_x, dino_o),
            "the 1 of 1 - cos": np.ones(2),
            "the minus of 1 - cos": -np.ones(2),
            "N": float(len(clip_x)),
        },
        lambda clip, dino, one, sign, N: (
            (one.sum() * len(clip) + sign[0] * clip.sum() + sign[1] * dino.sum()) / N
        ),
        lambda clip_x, clip_o, dino_x, dino_o: {
            "the sum of the cosines (cos for 1 - cos)": _cosine(clip_x, clip_o).mean()
            + _cosine(dino_x, dino_o).mean(),
            "1 (or no term at all)": np.ones(len(clip_x)),
            "the dot product in CLIP (not normalised)": _cosine(clip_x, clip_o, False),
            "the dot product in DINO (not normalised)": _cosine(dino_x, dino_o, False),
        },
    ),
    "bias": Quantity(
        lambda shares: {
            "the distances |p_i - p_j|": np.abs(_pairs(shares)),
            "the number of pairs": float(len(_pairs(shares))),
        },
        lambda distances, pairs: distances.sum() / pairs,
        lambda shares: {
            "the differences without | |": _pairs(shares),
            "K": float(len(shares)),
            "the largest share less the smallest": np.ptp(shares),
        },
    ),
}
