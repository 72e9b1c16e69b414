"""What the formulas of quantities.py are made of, in numpy. One image, time or step a row."""

import numpy as np
from scipy.stats import binom

Array = np.ndarray


def before(x: Array) -> Array:
    """Index t - 1 holds time t - 1; the one of time 0 is 1."""
    return np.concatenate([[1.0], x[:-1]])


def known(beta: Array, alpha_bar: Array, **_: Array) -> dict[str, Array]:
    """The values of a schedule that have names, and the roots of those."""
    values = {"β_t": beta, "α_t": 1 - beta, "ᾱ_t": alpha_bar, "1 - ᾱ_t": 1 - alpha_bar}
    values["ᾱ_{t-1}"] = before(alpha_bar)
    roots = {f"√({name})" if " " in name else f"√{name}": value**0.5 for name, value in values.items()}
    return {**values, **roots, "A_t": beta / (alpha_bar * (1 - alpha_bar)) ** 0.5}


def product(
    beta: Array,
    root: Array,
    J: Array,
    eye: Array,
    sign: Array,
    first: Array,
    counts: Array,
    is_leftmost: bool,
    is_of_matrices: bool,
) -> Array:
    """The coupling of each time: the product of as many factors as `counts` says, from the time `first` on."""
    first = int(first) - 1
    factors = eye + sign * (beta / root)[:, None, None] * J
    products = []
    for count in counts.astype(int):
        of_time = np.eye(J.shape[-1])
        for factor in factors[max(first, 0) : max(first + count, 0)]:
            pair = (of_time, factor) if is_leftmost else (factor, of_time)
            of_time = np.matmul(*pair) if is_of_matrices else of_time * factor
        products.append(of_time)
    return np.stack(products)


def first_order(beta: Array, alpha_bar: Array, J: Array) -> Array:
    """B_t without the products of two answers and more."""
    terms = (beta / (1 - alpha_bar) ** 0.5)[:, None, None] * J
    return np.eye(J.shape[-1]) - np.concatenate([np.zeros_like(J[:1]), terms.cumsum(0)[:-1]])


def last_factor(beta: Array, alpha_bar: Array, J: Array) -> Array:
    """B_t with the answer of time t - 1 alone."""
    terms = (beta / (1 - alpha_bar) ** 0.5)[:, None, None] * J
    return np.eye(J.shape[-1]) - np.concatenate([np.zeros_like(J[:1]), terms[:-1]])


def recursion(p: Array, q: Array, r: Array, s: Array) -> Array:
    """k_i, from the end to the start."""
    S = len(p)
    u, k = np.zeros(S + 2), np.zeros(S)
    u[S] = 1
    for i in reversed(range(S)):
        r_next, s_next = (r[i + 1], s[i + 1]) if i + 1 < S else (0, 0)
        u[i] = p[i] * u[i + 1] + r_next * u[i + 2]
        k[i] = q[i] * u[i + 1] + s_next * u[i + 2]
    return k


def standardised(A: Array, times: Array, is_geometric: bool, is_of_sampler: bool, has_mean: bool) -> Array:
    """C_i."""
    C = 1 / A[np.clip(times.astype(int), 1, len(A)) - 1]
    of = C if is_of_sampler else 1 / A
    mean = np.exp(np.log(of).mean()) if is_geometric else of.mean()
    return C / mean if has_mean else C


def rank(odds: Array) -> Array:
    """1: the largest."""
    return 1.0 + (-odds).argsort().argsort()


def share_of_rank(N: Array, rank: Array, share: Array, is_summed: bool) -> Array:
    """q of two classes."""
    of_class_1 = (
        binom.sf(rank - 1, int(N), np.clip(share, 0, 1))
        if is_summed
        else binom.pmf(rank, int(N), np.clip(share, 0, 1))
    )
    return np.stack([1 - of_class_1, of_class_1], 1)


def fixed_set(logits: Array, n_1: Array) -> Array:
    """The n_1 images of the largest log-odds are told class 1."""
    return np.eye(2)[(rank(logits[:, 1] - logits[:, 0]) <= n_1).astype(int)]


def one_hot(rows: Array) -> Array:
    """The class of each row's largest number."""
    return np.eye(rows.shape[1])[rows.argmax(1)]


def lengths(x: Array, o: Array) -> Array:
    """(2, N): |x| and |o|."""
    return np.linalg.norm(np.stack([x, o]), axis=2)


def cosines(x: Array, o: Array) -> Array:
    """(N,)."""
    return (x * o).sum(1) / lengths(x, o).prod(0)


def distances(
    clip: Array,
    of_clip: Array,
    dino: Array,
    of_dino: Array,
    has_clip: bool,
    has_dino: bool,
    one: Array,
    sign: Array,
    N: Array,
) -> Array:
    """L_img of the dot products and lengths of each tower."""
    terms = [
        one[i] + sign[i] * dot / of.prod(0)
        for i, (dot, of, has) in enumerate([(clip, of_clip, has_clip), (dino, of_dino, has_dino)])
        if has
    ]
    return sum(terms, np.zeros(1)).sum() / N


def pairs(shares: Array) -> Array:
    """The differences of all pairs."""
    i, j = np.triu_indices(len(shares), 1)
    return shares[i] - shares[j]
