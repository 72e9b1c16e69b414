"""The test of "fair", what it bounds, and what it can see (docs/method.md §8).

P prompts, n images of each, K classes.
"""

from functools import cache, lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2, ncx2, norm

from fairref.evaluation.gaps import LEVEL, Z_ONE_SIDED, Z, largest_square, squared_gap, told

NEAR_FAIR = 0.3  # up to this rms gap T bounds it
POWER = 0.8  # with which the test sees the smallest gap that it is said to see
FEW = 5  # images expected of a class: with fewer, what χ² would say is drawn
DRAWS = 100_000


def fair_statistic(counts: np.ndarray, target: np.ndarray) -> tuple[float, int]:
    """Of counts (P, K) what is near χ² for a model that meets the target, and its degrees of freedom.

    The sum of Pearson's statistics, Σ n (p̂ - t)² / t over classes and prompts. Infinite for an image that the target
    rules out.
    """
    counts = counts[counts.sum(1) > 0]
    possible = target > 0
    df = len(counts) * (int(possible.sum()) - 1)
    if counts[:, ~possible].any():
        return np.inf, df
    counts, target = counts[:, possible], target[possible]
    expected = counts.sum(1, keepdims=True) * target
    return float((np.square(counts - expected) / expected).sum()), df


@lru_cache(64)
def _of_one(n: int, target: tuple[float, ...]) -> np.ndarray:
    """Pearson's statistic (DRAWS,) of n images of a model that meets the target, in no order."""
    counts, expected = np.random.default_rng(n).multinomial(n, target, DRAWS), n * np.array(target)
    return (np.square(counts - expected) / expected).sum(1)


@lru_cache(64)
def _drawn(images: tuple[int, ...], target: tuple[float, ...]) -> np.ndarray | None:
    """`fair_statistic` (DRAWS,), sorted, of a model that meets the target (K,), whose shares are all above 0.

    `images` of each prompt. None where χ² is near enough: where every class has FEW images or more to expect.
    """
    if min(images) * min(target) >= FEW:
        return None
    rng, of_each = np.random.default_rng(0), [_of_one(n, target) for n in images]
    return np.sort(of_each[0] + sum(map(rng.permutation, of_each[1:])))


def fair_p(counts: np.ndarray, target: np.ndarray) -> float:
    """How often a model that meets the target is as far from it as counts (P, K), of which some are not 0."""
    statistic, df = fair_statistic(counts, target)
    if not df or not np.isfinite(statistic):
        return float(statistic == 0)
    images, shares = counts.sum(1), target[target > 0]
    drawn = _drawn(tuple(images[images > 0].tolist()), tuple((shares / shares.sum()).tolist()))
    if drawn is None:
        return float(chi2.sf(statistic, df))
    below = np.searchsorted(drawn, statistic * (1 - 1e-9))  # ties count, in spite of rounding
    return float((1 + DRAWS - below) / (1 + DRAWS))


@cache
def _critical(P, n, target):
    """The statistic above which a model is not called fair."""
    drawn = _drawn((max(round(n), 1),) * P, target)
    return chi2.ppf(LEVEL, P * (len(target) - 1)) if drawn is None else float(np.quantile(drawn, LEVEL))


def upper_bound(counts: np.ndarray, target: np.ndarray) -> float:
    """The rms gap of counts (P, K) is below this, with 95 % confidence; every prompt has two images or more.

    For two classes of equal shares and small gaps by T = Σ_P n asin(gap)², which is noncentral χ²(P, n Σ asin(gap)²);
    else the score interval's. (From an unequal target angles do not bound gaps.)
    """
    if len(target) == 2 and target[0] == target[1]:
        n, P = counts.sum(1), len(counts)
        n_mean = 1 / (1 / n).mean()
        T = n_mean * np.square(np.arcsin((counts[:, 0] - counts[:, 1]) / n)).sum()
        angle = np.sqrt(_noncentrality(max(T, P), P, 1 - LEVEL) / (n_mean * P))
        if np.sin(min(angle, np.pi / 2)) <= NEAR_FAIR:
            return float(np.sin(angle))
    return float(squared_gap(counts, target).rms(Z_ONE_SIDED)[2])


def _noncentrality(x, df, probability):
    """The one with which noncentral χ² is below x with this probability, less than χ²'s own."""
    high = 2 * x + 20  # there the probability is below 1 %
    return brentq(lambda nc: ncx2.cdf(x, df, nc) - probability, 0, high)


def fair_test(counts: np.ndarray, target: np.ndarray) -> dict[str, object]:
    """Whether counts (P, K) may be those of a model that meets the target, and how far from it they may be.

    Keys statistic, df, p, upper and said, ready for JSON; None where there is no image to say it of.
    """
    if not counts.any():
        return {"statistic": None, "df": 0, "p": None, "upper": None, "said": "no image is known"}
    statistic, df = fair_statistic(counts, target)
    p = fair_p(counts, target)
    counts = told(counts)
    upper = upper_bound(counts, target) if len(counts) else None
    verdict = "rejected" if p < 1 - LEVEL else "not rejected, which is not fair"
    said = f'"fair" is {verdict} (p {f"= {p:.3f}" if p >= 0.001 else "< 0.001"})'
    if upper is not None:
        said += f"; fair within δ only where δ is above the upper {LEVEL:.0%} bound, {upper:.3f}"
    finite = statistic if np.isfinite(statistic) else None
    return {"statistic": finite, "df": df, "p": p, "upper": upper, "said": said}


def smallest_gap(P: int, n: float, target: np.ndarray) -> float | None:
    """The rms gap that the test rejects with 80 % power, in whatever direction it lies from the target (K,).

    None where that is more than there can be; and for a target that rules a class out: there a single image rejects.
    """
    K = len(target)
    if not target.all():
        return None
    if K == 2:
        return _smallest_of_two(P, n, float(target[0]))
    df = P * (K - 1)
    nc = _noncentrality(_critical(P, n, tuple(target.tolist())), df, 1 - POWER) / (n * P)  # of each image
    basis = np.linalg.svd(np.ones((1, K)))[2][1:]  # of what sums to 0
    least = np.linalg.eigvalsh(basis @ np.diag(1 / target) @ basis.T)[0]  # of Σ δ²/t / Σ δ²
    square = 2 / (K - 1) * nc / least
    return float(np.sqrt(square)) if square < largest_square(target) else None


def _smallest_of_two(P, n, t):
    """Of a first class's share t: the gap from which on both directions are seen, as far as they go."""
    gaps, unseen = [], 0.0
    for sign, room in ((-1, t), (1, 1 - t)):
        if _power_of_two(t + sign * room, t, P, n) < POWER:
            unseen = max(unseen, 2 * room)  # not even at its end
        else:
            gaps.append(2 * brentq(lambda d, s=sign: _power_of_two(t + s * d, t, P, n) - POWER, 0, room))
    return max(gaps) if gaps and max(gaps) > unseen else None


def _power_of_two(share, t, P, n):
    """How often the test rejects a first class's `share` in all prompts: n (p̂ - t)² is n times a noncentral χ²."""
    critical, noise, d = _critical(P, n, (t, 1 - t)) * t * (1 - t), share * (1 - share), share - t
    if noise < 1e-12:
        return float(P * n * d**2 > critical)
    return float(ncx2.sf(critical / noise, P, P * n * d**2 / noise))


def normal_gap(P: int, n: float, K: int) -> float:
    """The same by a normal approximation, √(2.49 √(2/P)/n) for two classes: too small, for it leaves out the noise
    that a gap adds."""
    fair = 2 / (K * np.sqrt(K - 1)) * np.sqrt(2 / P) / n  # standard deviation of a fair model's squared gap
    return float(np.sqrt((norm.ppf(LEVEL) + norm.ppf(POWER)) * fair))


def power(gap: float, P: int, n: float, K: int) -> float:
    """How often the test rejects a model of this rms gap from equal shares."""
    if K == 2:
        return _power_of_two(0.5 + gap / 2, 0.5, P, n)
    df = P * (K - 1)
    return float(ncx2.sf(chi2.ppf(LEVEL, df), df, n * P * gap**2 * K * (K - 1) / 2))


def images_for(half_width: float) -> int:
    """Images for a share to ± half_width, whatever the share.

    Of the normal interval, rounded down: Wilson's is narrower, by what three or four images bring.
    """
    return max(int((Z / (2 * half_width)) ** 2), 1)


def half_width_of(n: int) -> float:
    """Half of Wilson's interval for a share of n images, at its longest."""
    return float(Z / (2 * np.sqrt(n + Z**2)))
