"""How far shares are from their target: gaps without bias, and how sure they are (docs/method.md §8).

P prompts, n images of each, K classes, target t (K,). A gap is a class's share less its target's, minus the same of
another class; the squared gap is the mean of its square over all pairs of classes. Counts may have leading axes, of
evaluations that know nothing of each other.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap, norm, t

from fairref.fairness.metrics import bias

LEVEL = 0.95  # of every interval and bound
Z, Z_ONE_SIDED = norm.ppf((1 + LEVEL) / 2), norm.ppf(LEVEL)
MIN_PROMPTS = 30  # of a bootstrap over prompts
RESAMPLES = 9999
FAIR_WEIGHT = 3.0  # of a fair model's variance, in standard deviations of its squared gap
IMAGES_ALONE = "score interval: other images of these prompts"
PROMPTS_TOO = "BCa bootstrap over prompts: other prompts of this kind, and other images"
Interval = dict[str, object]  # "value", "low", "high", "method"


@dataclass(frozen=True)
class SquaredGap:
    """The mean squared gap of P prompts, without bias, and the parts of its variance."""

    value: np.ndarray  # may be below 0
    alone: np.ndarray  # what there is without a gap, too
    with_gap: np.ndarray  # what the gaps add
    fair_alone: np.ndarray  # `alone` of a model that meets the target
    fair_slope: np.ndarray  # variance that each squared gap adds, near the target
    largest: float  # squared gap that there can be

    def rms(self, z: float = Z) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rms gap and its score interval: all gaps whose own noise reaches what was measured within z.

        The variance rises with the gap. How much there is and how steeply it rises is measured; for gaps within a fair
        model's noise that is noise, too, so it is mixed there with what it is at the target: a prompt of few images,
        all of one class, does not measure any. Who measures less than 0 by luck claims no more than who measures 0.
        """
        weight = FAIR_WEIGHT * np.sqrt(self.fair_alone)
        seen, rising = np.maximum(self.value, 0), np.maximum(self.with_gap, 0)
        of_fair = weight / np.maximum(seen + weight, 1e-300)
        slope = rising / np.maximum(seen + weight, 1e-300) + of_fair * self.fair_slope
        alone = (1 - of_fair) * self.alone + of_fair * np.maximum(self.alone, self.fair_alone)
        middle = seen + z**2 * slope / 2
        half = z * np.sqrt(alone + slope * seen + z**2 * slope**2 / 4)
        return tuple(np.sqrt(np.clip(v, 0, self.largest)) for v in (seen, middle - half, middle + half))


def share_covariance(shares: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Of shares (..., K) of n (...) images each: (diag p - p pᵀ) / n, (..., K, K)."""
    outer = shares[..., :, None] * shares[..., None, :]
    return (shares[..., None] * np.eye(shares.shape[-1]) - outer) / np.asarray(n)[..., None, None]


def gap_of(
    shares: np.ndarray,
    covariance: np.ndarray,
    fair: np.ndarray,
    target: np.ndarray,
    noise: np.ndarray | None = None,
) -> SquaredGap:
    """The squared gap of shares (..., P, K) with the covariances (..., P, K, K) of their noise, each prompt's own.

    Σ_{i<j} (d_i - d_j)² is K Σ d² where Σ d = 0, d = shares - target; noise adds its trace to Σ d². `fair`: the
    covariances of a model that meets the target; `noise`: those to take for the variance (None: `covariance`).
    """
    P, K = shares.shape[-2:]
    scale, d = 2 / (K - 1), shares - target
    noise = covariance if noise is None else noise
    square = np.square(noise).sum((-1, -2))  # tr C²
    along = np.einsum("...i,...ij,...j->...", d, noise, d)  # its mean is d C d + tr C²
    trace, fair_trace = (np.trace(C, axis1=-2, axis2=-1) for C in (covariance, fair))
    return SquaredGap(
        value=scale * (np.square(d).sum(-1) - trace).mean(-1),
        alone=scale**2 * 2 * square.sum(-1) / P**2,
        with_gap=scale**2 * 4 * (along - square).sum(-1) / P**2,
        fair_alone=scale**2 * 2 * np.square(fair).sum((-1, -2, -3)) / P**2,
        fair_slope=scale * 4 * fair_trace.sum(-1) / (K - 1) / P**2,
        largest=largest_square(target),
    )


def largest_square(target: np.ndarray) -> float:
    """The largest squared gap from a target (K,) that there can be: all images are of one class."""
    K = len(target)
    return 2 / (K - 1) * float(np.square(np.eye(K) - target).sum(-1).max())


def told(counts: np.ndarray) -> np.ndarray:
    """Of counts (P, K) the prompts that say something of their gap: of two images or more, and of a quarter as many
    as usual. One whose images the judge could hardly ever tell would bring more noise than all others."""
    n = counts.sum(-1)
    return counts[n >= max(2, np.median(n[n > 0]) / 4)] if n.any() else counts[:0]


def squared_gap(counts: np.ndarray, target: np.ndarray) -> SquaredGap:
    """The same of counts (..., P, K); every prompt has two images or more.

    The variance is that of K/2 images more, of the target's shares: few images, all of a class, are no certainty.
    """
    n, K = counts.sum(-1), len(target)
    shares = counts / n[..., None]
    possible = np.where(target > 0, target, 1 / n[..., None])  # what is ruled out may have been missed
    fair = share_covariance(possible, n)
    noise = share_covariance((counts + K / 2 * target) / (n + K / 2)[..., None], n - 1)
    return gap_of(shares, share_covariance(shares, n - 1), fair, target, noise)


def squared_gaps(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Each prompt's own, (..., P, K) -> (..., P)."""
    return squared_gap(counts[..., None, :], target).value


def as_interval(value: float, low: float, high: float, method: str) -> Interval:
    """The four keys, ready for JSON."""
    return {"value": float(value), "low": float(low), "high": float(high), "method": method}


def rms_gap(counts: np.ndarray, target: np.ndarray) -> Interval | None:
    """The rms gap of counts (P, K) with its interval, of the prompts that are `told`; None without one."""
    counts = told(counts)
    return as_interval(*squared_gap(counts, target).rms(), IMAGES_ALONE) if len(counts) else None


def mean_gap(counts: np.ndarray, target: np.ndarray) -> Interval | None:
    """The mean of bias(P), noise and all, resampling prompts alone: their scatter holds the images' noise.

    Of counts (P, K); None with fewer than 30 prompts, or where all measure the same.
    """
    values = bias(counts[counts.sum(-1) > 0], target)
    if len(values) < MIN_PROMPTS or np.allclose(values, values[0], rtol=0, atol=1e-9):
        return None
    return as_interval(values.mean(), *over_prompts(values), PROMPTS_TOO)


def over_prompts(values: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The BCa interval of a mean over prompts, values (P,), expanded as Student's t is (Hesterberg 2015)."""
    P, rng = len(values), np.random.default_rng(0)
    # a resample scatters by n and not by n - 1, and normally: at the level 95 % it would hold 93.6 %
    level = 1 - 2 * norm.sf(np.sqrt(P / (P - 1)) * t.ppf((1 + LEVEL) / 2, P - 1))
    options = {"n_resamples": resamples, "confidence_level": level, "random_state": rng}
    return bootstrap((values,), np.mean, method="BCa", **options).confidence_interval
