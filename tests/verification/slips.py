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


def factors(product=np.matmul, eye=1.0, scale=lambda beta, alpha_bar: 1.0):
    def answer(beta, alpha_bar, J):
        B, b = [np.eye(J.shape[-1])], beta / np.sqrt(1 - alpha_bar) * scale(beta, alpha_bar)
        for t in range(len(beta) - 1):
            B.append(product(B[-1], eye * B[0] - b[t] * J[t]))
        return np.stack(B)

    return answer


def own_memory(p, q, r, s):
    """r_i and s_i for r_{i+1} and s_{i+1}."""
    S = len(p)
    u, k = np.zeros(S + 2), np.zeros(S)
    u[S] = 1
    for i in reversed(range(S)):
        u[i], k[i] = p[i] * u[i + 1] + r[i] * u[i + 2], q[i] * u[i + 1] + s[i] * u[i + 2]
    return k


def of_two_classes(logits, q, C):
    told = (q[:, 1] > 0.5).astype(int)
    return (cross_entropy(logits)[np.arange(len(q)), told] * (q.max(1) >= C)).mean()


def masked(mask):
    def answer(logits, q, C):
        return (cross_entropy(logits)[np.arange(len(q)), q.argmax(1)] * mask(q, C)).mean()

    return answer


def sum_of_cos(cosine):
    return lambda a, b, c, d: (2 - cosine(a, b) - cosine(c, d)).mean()


def z_0(root=lambda a: a[-1], sigma=lambda beta, alpha_bar: right("sigma_t", beta=beta, alpha_bar=alpha_bar)):
    def answer(beta, alpha_bar, z_T, eps, w):
        before = np.append(1, alpha_bar[:-1])
        fresh = (sigma(beta, alpha_bar) / np.sqrt(before)) @ w
        return z_T / np.sqrt(root(alpha_bar)) - A(beta, alpha_bar) @ eps + fresh

    return answer


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
    ("k_i", "the last of r_i is left out .* and the last of s_i is left out", no_memory_at_the_end),
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
    (
        "epsilon",
        "eps_prompt and eps_empty are swapped",
        lambda prompt, empty, s: prompt + s * (empty - prompt),
    ),
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
        "it does not hold that CLIP has a term",
        lambda a, b, c, d: (1 - cos(c, d)).mean(),
    ),
    # the names say what a reader did
    ("alpha_bar", "the steps are taken from the other end", lambda beta: (1 - beta)[::-1].cumprod()[::-1]),
    ("alpha_bar", "it has an entry too many, the first", lambda beta: np.append(1, (1 - beta).cumprod())),
    ("epsilon", r"ε_P stands for ε_P - ε_∅\.", lambda prompt, empty, s: s * prompt + empty),
    (
        "epsilon",
        r"ε_P stands for ε_P - ε_∅ and the start \(ε_∅\) has the wrong sign\.",
        lambda prompt, empty, s: s * prompt - empty,
    ),
    (
        "A_t",
        r"this: √ᾱ_t is squared .* and √\(1 - ᾱ_t\) is squared \(a root is missing\)\.",
        lambda beta, alpha_bar: beta / (alpha_bar * (1 - alpha_bar)),
    ),
    (
        "gradient",
        r"this: in A_t, √ᾱ_t is squared .* and √\(1 - ᾱ_t\) is squared \(a root is missing\)\.",
        lambda b, a, J, e: -np.einsum("t,tij,tjm->im", b / (a * (1 - a)), factors()(b, a, J), e),
    ),
    (
        "gradient",
        r"the adjusted gradient .*, with the wrong sign",
        lambda b, a, J, eps_theta: eps_theta.sum(0),
    ),
    ("z_0", r"√ᾱ_{T-1} stands for √ᾱ_T\.", z_0(root=lambda a: a[-2])),
    (
        "z_0",
        "√β_t stands for σ_t and it does not hold that the sum over w_t begins",
        z_0(sigma=lambda b, a: b**0.5),
    ),
    ("B_t", "it does not hold that the product is that of matrices", factors(np.multiply)),
    ("B_t", "the I of each factor is 0", factors(eye=0.0)),
    ("B_t", "β_s has a factor too many, 1/√α_t", factors(scale=lambda beta, _: (1 - beta) ** -0.5)),
    ("B_t", "it is the factor of s = t - 1 alone", factors(lambda _, factor: factor)),
    ("k_i", "r_i is that of the index before .* and s_i is that of the index before", own_memory),
    ("adjusted", "it is the sum with w_i = -1", lambda C, k, vjps: -vjps.sum(0)),
    (
        "q",
        "it does not hold that P.* is summed over all n ≥ r",
        lambda logits, target: (
            (q1 := binom.pmf(ranks(logits[:, 1] - logits[:, 0]), len(logits), target[1])),
            np.stack([1 - q1, q1], 1),
        )[1],
    ),
    ("L_align", "this: class 1 if q_1 > 1/2, else class 0 .right for K = 2 alone", of_two_classes),
    ("L_align", "the mask c ≤ C stands for the mask c ≥ C", masked(lambda q, C: q.max(1) <= C)),
    ("L_align", "the mask q_1 ≥ C of class 1 alone", masked(lambda q, C: q[:, 1] >= C)),
    (
        "L_img",
        "CLIP is that of all rows together .* DINO is that of all rows together",
        sum_of_cos(lambda a, b: (a * b).sum(1) / np.linalg.norm(a) / np.linalg.norm(b)),
    ),
    (
        "L_img",
        "it does not hold that DINO has a term and the length of x and o in CLIP is left out",
        lambda a, b, c, d: (1 - (a * b).sum(1)).mean(),
    ),
    ("bias", "it is the mean distance of neighbours alone", lambda shares: np.abs(np.diff(shares)).mean()),
    ("bias", r"it is 2 n\^-1 times .*axis\.", lambda shares: right("bias", shares=shares) * 2 / len(shares)),
    (
        "bias",
        "axis: a sum for a mean, or a mean for a sum",
        lambda shares: right("bias", shares=shares) * len(shares),
    ),
]
