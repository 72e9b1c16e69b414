"""More wrong answers, each with what is said of it; they were written after the check, to mislead it."""

import numpy as np
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import binom

from fairref.verification.quantities import QUANTITIES

UNEXPLAINED = "no change that was tried explains it"


def right(quantity, **arguments):
    """The right answer."""
    parts = QUANTITIES[quantity].parts(**arguments)
    values = (right(of.name, **of.arguments) if hasattr(of, "arguments") else of for of in parts.values())
    return QUANTITIES[quantity].formula(*values)


def A(beta, alpha_bar):
    return beta / np.sqrt(alpha_bar * (1 - alpha_bar))


def rolled(beta, alpha_bar):
    return np.sqrt(beta * (1 - np.roll(alpha_bar, 1)) / (1 - alpha_bar))


def first_is_1(beta, alpha_bar):
    return np.sqrt(beta * (1 - np.append(0, alpha_bar[:-1])) / (1 - alpha_bar))


def first_is_beta(beta, alpha_bar):
    sigma = right("sigma_t", beta=beta, alpha_bar=alpha_bar)
    sigma[0] = beta[0] ** 0.5
    return sigma


def fixed_length(beta):
    value = np.zeros(7)
    value[: len(beta)] = np.cumprod(1 - beta)
    return value


def single_precision(*arguments):
    floats = [torch.tensor(x).float().numpy() for x in arguments]
    named = dict(zip(("beta", "alpha_bar", "J", "eps_theta"), floats, strict=True))
    return right("gradient", **named).astype(np.float32)


def wrong_coupling(beta, alpha_bar, J, eps_theta):
    """The sign and the order of B_t."""
    B, total = np.eye(J.shape[-1]), 0
    for t in range(len(beta)):
        total = total - A(beta[t], alpha_bar[t]) * B @ eps_theta[t]
        B = (np.eye(len(B)) + beta[t] / np.sqrt(1 - alpha_bar[t]) * J[t]) @ B
    return total


def scaled_C(scale):
    return lambda beta, alpha_bar, times: (c := 1 / A(beta, alpha_bar)[times - 1]) / scale(c)


def reversed_if(time):
    def answer(beta, alpha_bar, times):
        c = right("C_i", beta=beta, alpha_bar=alpha_bar, times=times)
        return c[::-1] if time in times else c

    return answer


def no_memory_at_the_end(p, q, r, s):
    keep = np.arange(len(p)) < len(p) - 1
    return right("k_i", p=p, q=q, r=r * keep, s=s * keep)


def transport(rank, N=None, share=None):
    def answer(logits, target):
        ranks = rank(logits[:, 1] - logits[:, 0])
        q1 = binom.sf(ranks - 1, N or len(logits), share or target[1])
        return np.stack([1 - q1, q1], 1)

    return answer


def ranks(odds):
    return (-odds).argsort().argsort() + 1


def fixed_set(logits, target):
    told = ranks(logits[:, 1] - logits[:, 0]) <= np.floor(len(logits) * target[1])
    return np.stack([~told, told], 1)


def simulated(logits, target):
    n_1 = np.random.default_rng(0).binomial(len(logits), target[1], 100_000)
    q1 = (n_1[:, None] >= ranks(logits[:, 1] - logits[:, 0])).mean(0)
    return np.stack([1 - q1, q1], 1)


def align(loss, threshold=None, weight=lambda c: 1):
    def answer(logits, q, C):
        c = q.max(1)
        of_each = loss(logits)[np.arange(len(q)), q.argmax(1)]
        return (of_each * weight(c) * (c >= (threshold or C))).mean()

    return answer


def cross_entropy(logits):
    return -log_softmax(logits, 1)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def cos(x, o):
    return (unit(x) * unit(o)).sum(1)


def leaves(*_):
    raise SystemExit(0)


class Mute(Exception):
    def __str__(self):
        raise ValueError("no words")


def fails(*_):
    raise Mute


SLIPS = [
    # right on some examples
    (
        "alpha_bar",
        r"right on 3 of 4 examples and wrong on beta \(6,\): it has the shape \(7,\)",
        fixed_length,
    ),
    ("C_i", r"right on 2 of 4 examples and wrong on .*times \(4,\): 4 of 4 rows", reversed_if(39)),
    ("q", r"right on 3 of 4 examples and wrong on logits \(6, 2\)", transport(ranks, N=8)),
    # wrong at one place
    ("sigma_t", f"1 of 7 rows are wrong .*expected 0, and {UNEXPLAINED}", rolled),
    ("sigma_t", f"1 of 7 rows are wrong .*expected 0, and {UNEXPLAINED}", first_is_beta),
    ("sigma_t", "the first of the result is 1", first_is_1),
    # rounded
    ("A_t", "it is right to 1e-06 of its largest number: rounded", lambda b, a: A(b, a) * (1 + 1e-6)),
    ("gradient", "it is right to .*e-0[78] of its largest number: .*float32", single_precision),
    ("q", "drawn at random", simulated),
    # easy cases alone
    ("k_i", UNEXPLAINED, no_memory_at_the_end),
    (
        "adjusted",
        r"\|k_i\| stands for k_i and the result has the wrong sign",
        lambda C, k, v: -(C * abs(k)) @ v,
    ),
    ("adjusted", r"\|k_i\| stands for k_i\.", lambda C, k, vjps: (C * abs(k)) @ vjps),
    ("L_align", UNEXPLAINED, align(cross_entropy, 0.75)),
    ("L_align", UNEXPLAINED, align(cross_entropy, 0.8)),
    # what gives no numbers
    ("A_t", "it raises SystemExit: 0", leaves),
    ("A_t", "it raises Mute on", fails),
    (
        "A_t",
        r"it gives a tensor .* expected an array of numbers \(NotImplementedError",
        lambda b, a: torch.ones(5, device="meta"),
    ),
    ("A_t", r"it gives an array \(3,\) of object", lambda b, a: np.array([1, None, 2])),
    ("A_t", "drawn at random", lambda b, a: torch.tensor(A(b, a)).bfloat16()),
    ("A_t", r"it has the shape \(0,\); expected \(7,\)\.", lambda b, a: np.array([])),
    ("A_t", r"it is an array \(3,\) of float64; expected a function", np.ones(3)),
    # the simplest reason first
    ("alpha_bar", "β_t stands for α_t", lambda beta: beta.cumprod()),
    (
        "sigma_t",
        "it is √β_t .*the other variance.*, 0 at t = 1",
        lambda b, a: b**0.5 * (np.arange(len(b)) > 0),
    ),
    ("epsilon", "ε_P and ε_∅ are swapped", lambda prompt, empty, s: prompt + s * (empty - prompt)),
    (
        "A_t",
        "arguments are in the order alpha_bar, beta; expected",
        lambda alpha_bar, beta: A(beta, alpha_bar),
    ),
    ("gradient", "it is the adjusted gradient", lambda beta, alpha_bar, J, eps_theta: -eps_theta.sum(0)),
    ("gradient", "in B_t, .* leftmost and β_s has the wrong sign", wrong_coupling),
    (
        "bias",
        r"\(1,\); expected \(\) \(it has an axis too many\)",
        lambda shares: [right("bias", shares=shares)],
    ),
    # up to a factor
    ("C_i", "it is right up to a common factor.*0.1654", scaled_C(np.sum)),
    ("C_i", "it is right up to a common factor", scaled_C(lambda c: np.prod(c) ** (1 / (len(c) - 1)))),
    ("adjusted", "it is right up to a common factor", lambda C, k, v: (C * k / abs(C * k).sum()) @ v),
    # transport and losses
    ("q", "argsort once .* stands for the rank", transport(lambda odds: (-odds).argsort() + 1)),
    ("q", "1/2 stands for the target", transport(ranks, share=0.5)),
    ("q", "it is one fixed set .* rounded down", fixed_set),
    ("L_align", UNEXPLAINED, align(lambda logits: 1 - softmax(logits, 1))),
    ("L_align", "softmax twice", align(lambda logits: cross_entropy(softmax(logits, 1)))),
    ("L_align", "c, where it is C or more, stands for the mask", align(cross_entropy, weight=lambda c: c)),
    (
        "L_img",
        "it is 2 times",
        lambda a, b, c, d: (
            ((unit(a) - unit(b)) ** 2).sum(1).mean() + ((unit(c) - unit(d)) ** 2).sum(1).mean()
        ),
    ),
    ("L_img", "cos for 1 - cos", lambda a, b, c, d: (cos(a, b) + cos(c, d)).mean()),
    (
        "L_img",
        "it is right but for this: 1 .* stands for cos of CLIP",
        lambda a, b, c, d: (1 - cos(c, d)).mean(),
    ),
]
