"""What a reader computes in the course (docs/course): each quantity taken apart into what its formula is made of.

`fairref verify --mine` changes the parts, one or two at a time, to say how an answer is wrong. `others` are the
method's other named quantities, and a few whole formulas that readers come to instead.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, softmax

from fairref.verification.formulas import (
    before,
    cosines,
    distances,
    first_order,
    fixed_set,
    known,
    last_factor,
    lengths,
    one_hot,
    pairs,
    product,
    rank,
    recursion,
    share_of_rank,
    standardised,
)


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


QUANTITIES = {
    "alpha_bar": Quantity(
        lambda beta: {"α_t": 1 - beta},
        np.cumprod,
        lambda beta: {"β_t": beta, "α_t": 1 - beta, "the sum of the α_s": (1 - beta).cumsum()},
    ),
    "sigma_t": Quantity(
        lambda beta, alpha_bar: {
            "β_t": beta,
            "1 - ᾱ_{t-1}": 1 - before(alpha_bar),
            "1 - ᾱ_t": 1 - alpha_bar,
            "the root": 0.5,
        },
        lambda beta, before, now, root: (beta * before / now) ** root,
        lambda beta, alpha_bar: {
            **known(beta, alpha_bar),
            "√β_t (the other variance), 0 at t = 1": beta**0.5 * (np.arange(len(beta)) > 0),
        },
    ),
    "epsilon": Quantity(
        lambda eps_prompt, eps_empty, s: {
            "the start (ε_∅)": eps_empty,
            "ε_P - ε_∅": eps_prompt - eps_empty,
            "s": s,
        },
        lambda start, way, s: start + s * way,
        lambda eps_prompt, eps_empty, s: {"ε_P": eps_prompt, "ε_∅": eps_empty},
    ),
    "A_t": Quantity(
        lambda beta, alpha_bar: {"β_t": beta, "√ᾱ_t": alpha_bar**0.5, "√(1 - ᾱ_t)": (1 - alpha_bar) ** 0.5},
        lambda beta, root, sd: beta / root / sd,
        known,
    ),
    "z_0": Quantity(
        lambda beta, alpha_bar, z_T, eps, w: {
            "A_t": Of("A_t", {"beta": beta, "alpha_bar": alpha_bar}),
            "ε^(t)": eps,
            "z_T": z_T,
            "√ᾱ_T": alpha_bar[-1] ** 0.5,
            "σ_t": Of("sigma_t", {"beta": beta, "alpha_bar": alpha_bar}),
            "√ᾱ_{t-1}": before(alpha_bar) ** 0.5,
            "w_t": w,
            "the minus before the sum": -1.0,
            "the sum over w_t begins at t = 2": True,
        },
        lambda A, eps, z_T, root_T, sigma, before, w, sign, is_from_2: (
            sign * (A @ eps) + z_T / root_T + (sigma / before)[int(is_from_2) :] @ w[int(is_from_2) :]
        ),
        lambda beta, alpha_bar, **_: {**known(beta, alpha_bar), "√ᾱ_{T-1}": alpha_bar[-2] ** 0.5},
    ),
    "B_t": Quantity(
        lambda beta, alpha_bar, J: {
            "β_s": beta,
            "√(1 - ᾱ_s)": (1 - alpha_bar) ** 0.5,
            "J_s": J,
            "the I of each factor": np.eye(J.shape[-1]),
            "the minus before β_s": -1.0,
            "the time of the first factor": 1.0,
            "the number of factors": np.arange(len(beta)) * 1.0,
            "the factor of s = 1 is leftmost": True,
            "the product is that of matrices (@)": True,
        },
        product,
        lambda beta, alpha_bar, J: {
            "I less the sum of all β_s/√(1 - ᾱ_s) J_s, without their products": first_order(
                beta, alpha_bar, J
            ),
            "the factor of s = t - 1 alone": last_factor(beta, alpha_bar, J),
            **known(beta, alpha_bar),
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
            **known(beta, alpha_bar),
        },
    ),
    "C_i": Quantity(
        lambda beta, alpha_bar, times: {
            "A_t": Of("A_t", {"beta": beta, "alpha_bar": alpha_bar}),
            "the time t_i": times * 1.0,
            "the mean is geometric": True,
            "the mean is over the sampler's times": True,
            "the C_i are divided by a mean": True,
        },
        standardised,
        lambda beta, alpha_bar, times: {
            f"{name} at t_i": value[times - 1] for name, value in known(beta, alpha_bar).items()
        },
    ),
    "k_i": Quantity(
        lambda p, q, r, s: {"p_i": p, "q_i": q, "r_i": r, "s_i": s},
        recursion,
        lambda p, q, r, s: {"q_i": q, "s_i": s, "q_i + s_i": q + s},
    ),
    "adjusted": Quantity(
        lambda C, k, vjps: {"C_i": C, "k_i": k, "gᵀ ∂ε_i/∂θ": vjps},
        lambda C, k, vjps: (C * k) @ vjps,
        lambda C, k, vjps: {
            "|k_i|": np.abs(k),
            "the sum with w_i = -1 (A_t = 1)": -vjps.sum(0),
            "the gradient of the mode solver": -np.exp(np.log(np.abs(k)).mean()) * vjps.sum(0),
        },
    ),
    "q": Quantity(
        lambda logits, target: {
            "N": float(len(logits)),
            "the rank r": rank(logits[:, 1] - logits[:, 0]),
            "the target": target[1],
            "P(n_1 = n) is summed over all n ≥ r": True,
        },
        share_of_rank,
        lambda logits, target: {
            "the softmax of the logits": softmax(logits, 1),
            "the class that each image shows": one_hot(logits),
            "the target for every image": np.tile(target, (len(logits), 1)),
            "one fixed set of N times the target, rounded": fixed_set(
                logits, np.round(len(logits) * target[1])
            ),
            "one fixed set of N times the target, rounded down": fixed_set(
                logits, np.floor(len(logits) * target[1])
            ),
            "argsort once (the order of the images)": 1.0 + (logits[:, 0] - logits[:, 1]).argsort(),
            "the rank from the other end": 1 + len(logits) - rank(logits[:, 1] - logits[:, 0]),
            "the rank of the logit of class 1 alone": rank(logits[:, 1]),
            "the target of class 0": target[0],
            "1/2": 0.5,
        },
    ),
    "L_align": Quantity(
        lambda logits, q, C: {
            "log softmax of the logits": log_softmax(logits, 1),
            "y, the class of the largest q": one_hot(q),
            "the mask c ≥ C": (q.max(1) >= C) * 1.0,
            "N": float(len(q)),
            "the minus of the cross-entropy": -1.0,
        },
        lambda log_p, y, sure, N, sign: sign * (log_p * y).sum(1) @ sure / N,
        lambda logits, q, C: {
            "the softmax of the logits": softmax(logits, 1),
            "log softmax of their softmax (softmax twice)": log_softmax(softmax(logits, 1), 1),
            "the logit itself": logits,
            "q": q,
            "the class that each image shows": one_hot(logits),
            "class 1 if q_1 > 1/2, else class 0 (right for K = 2 alone),": np.eye(q.shape[1])[
                (q[:, 1] > 0.5).astype(int)
            ],
            "the mask c > C": (q.max(1) > C) * 1.0,
            "the mask c < C": (q.max(1) < C) * 1.0,
            "the mask c ≤ C": (q.max(1) <= C) * 1.0,
            "the mask q_1 ≥ C of class 1 alone": (q[:, 1] >= C) * 1.0,
            "c itself": q.max(1),
            "c, where it is C or more,": q.max(1) * (q.max(1) >= C),
            "the mask p ≥ C of the classifier's own p": (softmax(logits, 1).max(1) >= C) * 1.0,
            "the number of images that are sure": float((q.max(1) >= C).sum()),
        },
    ),
    "L_img": Quantity(
        lambda clip_x, clip_o, dino_x, dino_o: {
            "the dot product in CLIP": (clip_x * clip_o).sum(1),
            "the length of x and o in CLIP": lengths(clip_x, clip_o),
            "the dot product in DINO": (dino_x * dino_o).sum(1),
            "the length of x and o in DINO": lengths(dino_x, dino_o),
            "CLIP has a term": True,
            "DINO has a term": True,
            "the 1 of 1 - cos": np.ones(2),
            "the minus of 1 - cos": -np.ones(2),
            "N": float(len(clip_x)),
        },
        distances,
        lambda clip_x, clip_o, dino_x, dino_o: {
            "the sum of the cosines (cos for 1 - cos)": cosines(clip_x, clip_o).mean()
            + cosines(dino_x, dino_o).mean()
        },
    ),
    "bias": Quantity(
        lambda shares: {
            "the distance |p_i - p_j|": np.abs(pairs(shares)),
            "the number of pairs": float(len(pairs(shares))),
        },
        lambda distances, number: distances.sum() / number,
        lambda shares: {
            "p_i - p_j without | |": pairs(shares),
            "K": float(len(shares)),
            "K²/2 (each class with itself, too)": len(shares) ** 2 / 2,
            "the largest share less the smallest": np.ptp(shares),
            "the mean distance of neighbours alone": np.abs(np.diff(shares)).mean(),
            "the mean distance from 1/K": np.abs(shares - 1 / len(shares)).mean(),
        },
    ),
}
