"""The test of "fair", what it bounds, and what it can see (docs/method.md §8).

P prompts, n images of each, K classes.
"""

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2, ncx2, norm

from fairref.evaluation.gaps import LEVEL, Z_ONE_SIDED, Z, squared_gap

NEAR_FAIR = 0.3  # up to this rms gap T bounds it
POWER = 0.8  # with which the test sees the smallest gap that it is said to see


def fair_statistic(counts: np.ndarray, target: np.ndarray) -> tuple[float, int]:
    """Of counts (P, K) what is χ² for a model that meets the target, and its degrees of freedom.

    T = Σ_P n (asin(2p̂ - 1) - asin(2t - 1))² for two classes, else the sum of Pearson's statistics. Infinite for an
    image that the target rules out.
    """
    counts = counts[counts.sum(1) > 0]
    possible = target > 0
    df = len(counts) * (int(possible.sum()) - 1)
    if counts[:, ~possible].any():
        return np.inf, df
    counts, target = counts[:, possible], target[possible]
    n = counts.sum(1)
    if len(target) == 2:
        return float((n * angles(counts, target) ** 2).sum()), df
    expected = n[:, None] * target
    return float((np.square(counts - expected) / expected).sum()), df


def angles(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """asin(2p̂ - 1) - asin(2t - 1) of counts (P, 2) -> (P,): its variance is 1/n, whatever the share.

    For equal shares, asin of the gap.
    """
    return np.arcsin(2 * counts[:, 0] / counts.sum(1) - 1) - np.arcsin(2 * target[0] - 1)


def gap_at(angle: float, target: np.ndarray) -> float:
    """The larger of the two gaps that are this angle away from the target of two classes."""
    start = np.arcsin(2 * target[0] - 1)
    ends = np.clip([start - angle, start + angle], -np.pi / 2, np.pi / 2)
    return float(np.abs(np.sin(ends) - np.sin(start)).max())


def upper_bound(counts: np.ndarray, target: np.ndarray) -> float:
    """The rms gap of counts (P, K) is below this, with 95 % confidence; every prompt has two images or more.

    By T ~ noncentral χ²(P, n Σ angle²) for two classes near the target, else the score interval's.
    """
    if len(target) == 2 and target.all():
        n = 1 / (1 / counts.sum(1)).mean()
        T, P = n * np.square(angles(counts, target)).sum(), len(counts)
        bound = gap_at(np.sqrt(_noncentrality(max(T, P), P, 1 - LEVEL) / (n * P)), target)
        if bound <= NEAR_FAIR:
            return bound
    return float(squared_gap(counts, target).rms(Z_ONE_SIDED)[2])


def _noncentrality(x, df, probability):
    """The one with which noncentral χ² is below x with this probability, less than χ²'s own."""
    high = 2 * x + 20  # there the probability is below 1 %
    return brentq(lambda nc: ncx2.cdf(x, df, nc) - probability, 0, high)


def fair_test(counts: np.ndarray, target: np.ndarray) -> dict[str, object]:
    """Whether counts (P, K) may be those of a model that meets the target, and how far from it they may be.

    Keys statistic, df, p, upper and said, ready for JSON; None without a prompt of two images.
    """
    statistic, df = fair_statistic(counts, target)
    p = float(chi2.sf(statistic, df)) if df else float(statistic == 0)
    counts = counts[counts.sum(1) > 1]
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
    df = P * (K - 1)
    critical = chi2.ppf(LEVEL, df)
    nc = _noncentrality(critical, df, 1 - POWER) / (n * P)  # of each image
    if K == 2:
        angle = np.sqrt(nc)
        return gap_at(angle, target) if angle < np.pi / 2 else None
    basis = np.linalg.svd(np.ones((1, K)))[2][1:]  # of what sums to 0
    least = np.linalg.eigvalsh(basis @ np.diag(1 / target) @ basis.T)[0]  # of Σ δ²/t / Σ δ²
    gap = float(np.sqrt(2 / (K - 1) * nc / least))
    return gap if gap < np.sqrt(2 / K) else None


def normal_gap(P: int, n: float, K: int) -> float:
    """The same by a normal approximation, √(2.49 √(2/P)/n) for two classes: too small, for it leaves out the noise
    that a gap adds."""
    fair = 2 / (K * np.sqrt(K - 1)) * np.sqrt(2 / P) / n  # standard deviation of a fair model's squared gap
    return float(np.sqrt((norm.ppf(LEVEL) + norm.ppf(POWER)) * fair))


def power(gap: float, P: int, n: float, K: int) -> float:
    """How often the test rejects a model of this rms gap from equal shares."""
    angle = np.arcsin(min(gap, 1)) if K == 2 else gap * np.sqrt(K * (K - 1) / 2)
    df = P * (K - 1)
    return float(ncx2.sf(chi2.ppf(LEVEL, df), df, n * P * angle**2))


def images_for(half_width: float) -> int:
    """Images for a share to ± half_width, whatever the share.

    Of the normal interval, rounded down: Wilson's is narrower, by what three or four images bring.
    """
    return max(int((Z / (2 * half_width)) ** 2), 1)


def half_width_of(n: int) -> float:
    """Half of Wilson's interval for a share of n images, at its longest."""
    return float(Z / (2 * np.sqrt(n + Z**2)))
