# ruff: noqa
"""Answers of students to the exercises, each wrong in its own way, written from the exercises alone."""

import numpy as np
from scipy.stats import binom

MISTAKES = []


def mistake(quantity, what):
    def register(function):
        MISTAKES.append((quantity, what, function))
        return function

    return register


# Chapter 1


@mistake("alpha_bar", "multiplies the roots √(1 - β) and forgets to square: gives √ᾱ_t")
def _(beta):
    return np.cumprod(np.sqrt(1 - beta))


@mistake("sigma_t", "the variance for the standard deviation: the square root is forgotten")
def _(beta, alpha_bar):
    before = np.append(1.0, alpha_bar[:-1])
    return beta * (1 - before) / (1 - alpha_bar)


@mistake("sigma_t", "leaves ᾱ_0 as NaN instead of 1, so the value at t = 1 is NaN; the others are right")
def _(beta, alpha_bar):
    before = np.full_like(alpha_bar, np.nan)
    before[1:] = alpha_bar[:-1]
    return np.sqrt(beta * (1 - before) / (1 - alpha_bar))


@mistake("epsilon", "starts from the prompt's prediction instead of the empty one's: s + 1 for s")
def _(eps_prompt, eps_empty, s):
    return eps_prompt + s * (eps_prompt - eps_empty)


# Chapter 2


@mistake("A_t", "the sign: the minus before the sum is taken into A_t")
def _(beta, alpha_bar):
    return -beta / np.sqrt((1 - alpha_bar) * alpha_bar)


@mistake(
    "A_t",
    "alpha for alpha-bar: divides by √α_t of the own step only, not of all steps down to 0; shows from t = 2 on",
)
def _(beta, alpha_bar):
    return beta / np.sqrt(1 - alpha_bar) / np.sqrt(1 - beta)


@mistake("A_t", "an off-by-one loop: the last entry, t = T, is never filled and stays 0")
def _(beta, alpha_bar):
    T = len(beta)
    A = np.zeros(T)
    for t in range(1, T):
        A[t - 1] = beta[t - 1] / np.sqrt(alpha_bar[t - 1] * (1 - alpha_bar[t - 1]))
    return A


@mistake("A_t", "√ᾱ_(t-1) for √ᾱ_t: forgets the factor 1/√α_t of the step itself")
def _(beta, alpha_bar):
    before = np.append(1.0, alpha_bar[:-1])
    return beta / np.sqrt((1 - alpha_bar) * before)


@mistake(
    "z_0", "two slips in the fresh noise: the variance for the standard deviation, and √ᾱ_t for √ᾱ_(t-1)"
)
def _(beta, alpha_bar, z_T, eps, w):
    A = beta / np.sqrt((1 - alpha_bar) * alpha_bar)
    z = z_T / np.sqrt(alpha_bar[-1]) - A @ eps
    for t in range(2, len(beta) + 1):
        var = beta[t - 1] * (1 - alpha_bar[t - 2]) / (1 - alpha_bar[t - 1])
        z = z + var / np.sqrt(alpha_bar[t - 1]) * w[t - 1]
    return z


@mistake(
    "z_0", "wrong thinking: predicts z_0 in one jump from z_T and ε^(T), x_0 = (z_T - √(1-ᾱ_T) ε) / √ᾱ_T"
)
def _(beta, alpha_bar, z_T, eps, w):
    return (z_T - np.sqrt(1 - alpha_bar[-1]) * eps[-1]) / np.sqrt(alpha_bar[-1])


@mistake("z_0", "the sum of the fresh noise stops one early: w_T is left out")
def _(beta, alpha_bar, z_T, eps, w):
    T = len(beta)
    z = z_T / np.sqrt(alpha_bar[-1])
    for t in range(1, T + 1):
        z = z - beta[t - 1] / np.sqrt((1 - alpha_bar[t - 1]) * alpha_bar[t - 1]) * eps[t - 1]
    for t in range(2, T):
        sigma = np.sqrt(beta[t - 1] * (1 - alpha_bar[t - 2]) / (1 - alpha_bar[t - 1]))
        z = z + sigma / np.sqrt(alpha_bar[t - 2]) * w[t - 1]
    return z


# Chapter 3


@mistake("B_t", "the order of the matrix product: the newest factor is put leftmost; shows from t = 3 on")
def _(beta, alpha_bar, J):
    n = J.shape[1]
    B = [np.eye(n)]
    for t in range(1, len(beta)):
        M = np.eye(n) - beta[t - 1] / np.sqrt(1 - alpha_bar[t - 1]) * J[t - 1]
        B.append(M @ B[-1])
    return np.stack(B)


@mistake("B_t", "the index is shifted by one: B_t takes the factors of times 2 to t instead of 1 to t - 1")
def _(beta, alpha_bar, J):
    B = np.zeros_like(J)
    B[0] = np.eye(J.shape[1])
    for t in range(1, len(J)):
        B[t] = B[t - 1] @ (B[0] - beta[t] / np.sqrt(1 - alpha_bar[t]) * J[t])
    return B


@mistake(
    "B_t",
    "wrong thinking: generalises T = 2 to I minus the sum of the Jacobians' terms, without their products; shows from t = 3 on",
)
def _(beta, alpha_bar, J):
    I = np.eye(J.shape[1])
    terms = (beta / np.sqrt(1 - alpha_bar))[:, None, None] * J
    return np.stack([I - terms[:t].sum(axis=0) for t in range(len(J))])


@mistake("gradient", "the minus sign of eq 9 is dropped")
def _(beta, alpha_bar, J, eps_theta):
    B = np.eye(J.shape[1])
    g = 0
    for b, a, Jt, e in zip(beta, alpha_bar, J, eps_theta):
        g = g + b / np.sqrt(a * (1 - a)) * B @ e
        B = B @ (np.eye(len(B)) - b / np.sqrt(1 - a) * Jt)
    return g


@mistake("gradient", "the wrong shape: returns the terms of all times, (T, n, m), without summing them")
def _(beta, alpha_bar, J, eps_theta):
    A = beta / np.sqrt(alpha_bar * (1 - alpha_bar))
    B = [np.eye(J.shape[1])]
    for t in range(len(J) - 1):
        B.append(B[t] @ (B[0] - beta[t] / np.sqrt(1 - alpha_bar[t]) * J[t]))
    return -A[:, None, None] * (np.array(B) @ eps_theta)


@mistake(
    "gradient",
    "the recursion from the wrong end: the product of the factors is gathered from T down instead of from 1 up",
)
def _(beta, alpha_bar, J, eps_theta):
    A = beta / np.sqrt(alpha_bar * (1 - alpha_bar))
    I = np.eye(J.shape[1])
    B, g = I, np.zeros(eps_theta.shape[1:])
    for t in reversed(range(len(J))):
        g -= A[t] * B @ eps_theta[t]
        B = B @ (I - beta[t] / np.sqrt(1 - alpha_bar[t]) * J[t])
    return g


@mistake(
    "gradient",
    "two slips: B_t is multiplied transposed, and its factors have 1 - ᾱ_t without the square root",
)
def _(beta, alpha_bar, J, eps_theta):
    A = beta / np.sqrt(alpha_bar * (1 - alpha_bar))
    I = np.eye(J.shape[1])
    B, g = I, 0
    for t in range(len(J)):
        g = g - A[t] * B.T @ eps_theta[t]
        B = B @ (I - beta[t] / (1 - alpha_bar[t]) * J[t])
    return g


# Chapter 4


@mistake("C_i", "the arithmetic mean for the geometric one")
def _(beta, alpha_bar, times):
    c = np.sqrt(alpha_bar * (1 - alpha_bar))[times - 1] / beta[times - 1]
    return c / c.mean()


@mistake(
    "C_i",
    "indexes with the time t instead of t - 1: raises an IndexError if t = T is among the times, else is one step off",
)
def _(beta, alpha_bar, times):
    A = beta / np.sqrt(alpha_bar * (1 - alpha_bar))
    c = np.array([1 / A[t] for t in times])
    return c / np.prod(c) ** (1 / len(c))


@mistake("C_i", "the geometric mean is taken over all T times instead of the sampler's")
def _(beta, alpha_bar, times):
    c = np.sqrt(alpha_bar * (1 - alpha_bar)) / beta
    return (c / np.exp(np.log(c).mean()))[times - 1]


@mistake("k_i", "a term dropped: ε_i also enters the step after by s_(i+1), which is left out")
def _(p, q, r, s):
    S = len(p)
    a = np.zeros(S + 2)
    a[S] = 1
    for i in range(S - 1, 0, -1):
        a[i] = p[i] * a[i + 1] + (r[i + 1] * a[i + 2] if i + 1 < S else 0)
    return q * a[1 : S + 1]


@mistake("k_i", "the index is shifted by one in the memory term: r_i for r_(i+1) on the way back")
def _(p, q, r, s):
    S = len(p)
    a = np.zeros(S + 2)
    a[S] = 1
    for i in range(S - 1, -1, -1):
        a[i] = p[i] * a[i + 1] + r[i] * a[i + 2]
    return q * a[1 : S + 1] + np.append(s[1:], 0) * a[2 : S + 2]


@mistake(
    "k_i",
    "the recursion from the wrong end: weighs ε_i by the steps before it, from z_0 = 1 up, instead of those after it",
)
def _(p, q, r, s):
    a, before = 1.0, 0.0
    k = np.zeros(len(p))
    for i in range(len(p)):
        k[i] = q[i] * a + s[i] * before
        a, before = p[i] * a + r[i] * before, a
    return k


@mistake("adjusted", "a factor dropped: weighs the products by C alone, k is forgotten")
def _(C, k, vjps):
    return C @ vjps


@mistake("adjusted", "the mean over the steps for the sum")
def _(C, k, vjps):
    return np.mean((C * k)[:, None] * vjps, axis=0)


# Chapter 5


@mistake("q", "the softmax of the logits instead of the expected transport")
def _(logits, target):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@mistake("q", "the ranks the other way round: the smallest log-odds get the places of class 1")
def _(logits, target):
    rank = np.argsort(np.argsort(logits[:, 1] - logits[:, 0]))
    q1 = binom.sf(rank, len(logits), target[1])
    return np.column_stack([1 - q1, q1])


@mistake(
    "q", "wrong thinking: gives the round(N target[1]) best images to class 1 instead of averaging over n_1"
)
def _(logits, target):
    q = np.tile([1.0, 0.0], (len(logits), 1))
    n1 = int(round(len(logits) * target[1]))
    best = np.argsort(logits[:, 0] - logits[:, 1])[:n1]
    q[best] = [0.0, 1.0]
    return q


@mistake("q", "two slips: P(n_1 >= rank) for P(n_1 > rank) with ranks from 0, and the columns are swapped")
def _(logits, target):
    N = len(logits)
    odds = logits[:, 1] - logits[:, 0]
    rank = (odds[None, :] > odds[:, None]).sum(axis=1)
    q1 = np.array([binom.pmf(np.arange(r, N + 1), N, target[1]).sum() for r in rank])
    return np.stack([q1, 1 - q1], axis=1)


@mistake("L_align", "the mean over the sure images only instead of all N")
def _(logits, q, C):
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    y = q.argmax(axis=1)
    losses = [-logp[i, y[i]] for i in range(len(y)) if q[i, y[i]] >= C]
    return np.mean(losses) if losses else 0.0


@mistake("L_align", "> for >=: an image whose q is exactly C is left out; right elsewhere")
def _(logits, q, C):
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    loss = 0.0
    for i in range(len(q)):
        y = np.argmax(q[i])
        if q[i, y] > C:
            loss -= logp[i, y]
    return loss / len(q)


@mistake(
    "L_align",
    "wrong thinking: the cross-entropy towards the soft q itself instead of the class of the larger q",
)
def _(logits, q, C):
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    sure = q.max(axis=1) >= C
    return np.mean(sure * -(q * logp).sum(axis=1))


@mistake("L_align", "in torch, returns a torch tensor; the sum over the images for the mean")
def _(logits, q, C):
    import torch

    logits, q = torch.as_tensor(logits), torch.as_tensor(q)
    value, y = q.max(dim=1)
    loss = torch.nn.functional.cross_entropy(logits, y, reduction="none")
    return (loss * (value >= C)).sum()


@mistake("L_img", "the features are not normalised: the dot product for the cosine")
def _(clip_x, clip_o, dino_x, dino_o):
    return np.mean(1 - (clip_x * clip_o).sum(axis=1)) + np.mean(1 - (dino_x * dino_o).sum(axis=1))


@mistake("L_img", "returns the right value but normalises its arguments in place")
def _(clip_x, clip_o, dino_x, dino_o):
    for f in (clip_x, clip_o, dino_x, dino_o):
        f /= np.linalg.norm(f, axis=1, keepdims=True)
    return 2 - np.mean((clip_x * clip_o).sum(axis=1)) - np.mean((dino_x * dino_o).sum(axis=1))


@mistake("bias", "the mean over the wrong set: over all K² ordered pairs, each class with itself too")
def _(shares):
    return np.abs(shares[:, None] - shares[None, :]).mean()
