"""Shares and gaps after a judge's errors are taken out (docs/method.md §8).

P prompts, K classes. Labelled images give M (K, K), M_jk = P(judged j | true k): `labelled` (K, K) counts the images of
class k, row k, that the judge calls j. M's error is the same in all prompts, so it does not average out. Counts may
have leading axes, of evaluations that know nothing of each other.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.stats import chi2

from fairref.evaluation.gaps import (
    LEVEL,
    MIN_PROMPTS,
    Z_ONE_SIDED,
    Interval,
    SquaredGap,
    Z,
    as_interval,
    gap_of,
    share_covariance,
    told,
)
from fairref.fairness.metrics import bias

MIN_LABELLED = 50  # images of each class, from which on the intervals hold
MIN_POWERED = 200  # of all classes, for prediction-powered ones
WORST_CONDITION = 1e6  # of M; beyond, it says nothing of some classes
ADDED_TO_M, ADDED_TO_NOISE = 0.5, 1.0  # images in each cell: a count of 0 is no certainty
STEPS, TOLERANCE = 10_000, 1e-8  # of EM
COMMON = "M's error is common to all prompts"
SHARES = f"maximum likelihood (EM); delta method on counts to which images are added, {COMMON}"
RMS = f"score interval: other images of these prompts, other labelled images; {COMMON}"
POWERED = (
    "prediction-powered inference (PPI++), each class on its own: other images of these prompts, other labels"
)
FEW_POWERED = (
    f"prediction-powered (PPI++), each class on its own; no interval with fewer than {MIN_POWERED} labels"
)
MEAN = f"delta method: other prompts of this kind, other images, other labelled images; {COMMON}"
FEW = f"no interval with fewer than {MIN_LABELLED} labelled images of a class"
MISFIT = "no interval: no shares explain what the judge says, so it errs otherwise here than on the labelled images"
SWAPPED = "not corrected: a class is said less often of its own images than of another's; are labels swapped?"


def confusion_matrix(labelled: np.ndarray, added: float = 0.0) -> np.ndarray:
    """M (..., K, K): column k has the shares of what the judge says of class k."""
    counts = np.swapaxes(labelled, -1, -2) + added
    return counts / counts.sum(-2, keepdims=True)


def confusion_noise(labelled: np.ndarray) -> np.ndarray:
    """Covariance (..., K, K, K) of each of M's columns, k first; one image is added to each count."""
    counts = labelled + ADDED_TO_NOISE
    n = counts.sum(-1)
    return share_covariance(counts / n[..., None], n)


def is_told(M: np.ndarray) -> bool:
    """Whether M tells all classes apart."""
    return bool(np.isfinite(M).all() and np.linalg.cond(M) < WORST_CONDITION)


def is_swapped(M: np.ndarray) -> bool:
    """Whether the judge says a class less often of its own images than of another's."""
    return bool((M.diagonal() < M.max(1)).any())


def true_shares(judged: np.ndarray, M: np.ndarray) -> np.ndarray:
    """Maximum likelihood on the simplex: judged shares (..., K) -> the classes' (..., K).

    M⁻¹ p̂ where that is inside, else EM: p <- p ∘ Mᵀ(p̂ / M p). Of two classes the nearer edge: Rogan and Gladen's.
    What M rules out is left out; NaN where it rules out all.
    """
    told = is_told(M)
    shares = np.linalg.solve(M, judged[..., None])[..., 0] if told else np.full(judged.shape, -1.0)
    if told and len(M) == 2:
        return np.clip(shares, 0, 1)
    outside = (shares < 0).any(-1)
    p, q = np.full_like(judged[outside], 1 / len(M)), judged[outside]
    for _ in range(STEPS if outside.any() else 0):
        before, expected = p, p @ M.T
        p = p * (np.divide(q, expected, out=np.zeros_like(q), where=expected > 0) @ M)
        total = p.sum(-1, keepdims=True)
        p = np.divide(p, total, out=np.full_like(p, np.nan), where=total > 0)
        if np.nanmax(np.abs(p - before), initial=0) < TOLERANCE:
            break
    shares[outside] = p
    return shares


def is_explained(counts: np.ndarray, labelled: np.ndarray, shares: np.ndarray) -> bool:
    """Whether counts (K,) may be what the judge says of these shares (K,), the likeliest, at the level 95 %."""
    n = counts.sum()
    expected = confusion_matrix(labelled, ADDED_TO_M) @ shares
    noise = share_covariance(expected, n) + np.einsum("k,kij->ij", shares**2, confusion_noise(labelled))
    far = (counts / n - expected)[:-1]  # the last class has what is left
    return far @ np.linalg.solve(noise[:-1, :-1], far) <= chi2.ppf(LEVEL, len(far))


def share_intervals(counts: np.ndarray, labelled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper ends (..., K) of the classes' shares, of what a judge counts in all images (..., K).

    Covariance of the shares: M⁻¹ [Σ_p̂ + Σ_k p_k² Σ_{M_k}] M⁻ᵀ. Z² images are added to the counts, as Agresti and Coull
    do for one share, and some to M's. [0, 1] where M tells nothing. Around an edge, where M⁻¹ p̂ is beyond it.
    """
    K = counts.shape[-1]
    M = confusion_matrix(labelled, ADDED_TO_M)
    n = counts.sum(-1) + Z**2
    judged = (counts + Z**2 / K) / n[..., None]
    inverse = np.linalg.pinv(M)
    shares = (inverse @ judged[..., None])[..., 0]
    weight = np.clip(shares, 0, None) / np.clip(shares, 0, None).sum(-1, keepdims=True)
    noise = share_covariance(judged, n) + np.einsum(
        "...k,...kij->...ij", weight**2, confusion_noise(labelled)
    )
    half = Z * np.sqrt(np.einsum("...ki,...ij,...kj->...k", inverse, noise, inverse))
    half = np.where(np.linalg.cond(M)[..., None] < WORST_CONDITION, half, 1)
    shares = np.clip(shares, 0, 1)
    return np.clip(shares - half, 0, 1), np.clip(shares + half, 0, 1)


def corrected_gap(counts: np.ndarray, labelled: np.ndarray, target: np.ndarray) -> SquaredGap:
    """The squared gap of what a judge counts, (..., P, K), without its errors; two images of each prompt or more.

    Every prompt's shares are M⁻¹ p̂, whose noise is M⁻¹ Σ_p̂ M⁻ᵀ. M's error moves them all, by -M⁻¹ dM p.
    """
    P, K = counts.shape[-2:]
    scale, n = 2 / (K - 1), counts.sum(-1)
    M = confusion_matrix(labelled)
    inverse = np.linalg.inv(M)
    of_prompts = inverse[..., None, :, :]  # the same for all prompts

    def through(covariance):
        return of_prompts @ covariance @ np.swapaxes(of_prompts, -1, -2)

    judged = counts / n[..., None]
    shares = (of_prompts @ judged[..., None])[..., 0]
    noise = through(share_covariance(judged, n - 1))
    fair = np.broadcast_to((M @ target)[..., None, :], judged.shape)
    added = (counts + K / 2 * fair) / (n + K / 2)[..., None]  # as in squared_gap
    of_images = through(share_covariance(added, n - 1))
    gap = gap_of(shares, noise, through(share_covariance(fair, n)), target, of_images)

    column = through(confusion_noise(labelled))  # (..., k, K, K): of M⁻¹ dM_k
    overlap = np.einsum("...kij,...lij->...kl", column, column)
    trace = np.trace(column, axis1=-2, axis2=-1)
    mean_noise = noise.mean(-3)
    second = np.einsum("...pi,...pk->...ik", shares, shares) / P - mean_noise  # mean of p pᵀ
    slope = np.einsum("...pi,...pk->...ik", shares - target, shares) / P - mean_noise  # mean of (p - t) pᵀ
    alone = scale**2 * 2 * (second**2 * overlap).sum((-1, -2))
    along = scale**2 * 4 * np.einsum("...ik,...kij,...jk->...", slope, column, slope)
    # the images' noise times M's is in gap.with_gap and in `along`
    both = scale**2 * 4 * np.einsum("...pk,...pij,...kij->...", shares**2, noise, column) / P**2
    at_target = np.outer(target, target)
    return replace(
        gap,
        value=gap.value - scale * np.einsum("...kk,...k->...", second, trace),
        alone=gap.alone + alone,
        with_gap=gap.with_gap + along - 2 * alone - both,
        fair_alone=gap.fair_alone + scale**2 * 2 * (at_target**2 * overlap).sum((-1, -2)),
        fair_slope=gap.fair_slope + scale * 4 * (target**2 * trace).sum(-1) / (K - 1),
    )


def corrected_rms(gap: SquaredGap, z: float = Z) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rms gap and its score interval, around the largest gap that there can be where more was measured."""
    return replace(gap, value=np.minimum(gap.value, gap.largest)).rms(z)


def is_possible(gap: SquaredGap) -> bool:
    """Whether the measured gap may be that of some shares: the largest is not below its interval."""
    return bool(replace(gap, largest=np.inf).rms()[1] ** 2 <= gap.largest)


def corrected_mean_gap(counts: np.ndarray, labelled: np.ndarray, target: np.ndarray) -> Interval:
    """The mean over prompts of bias(P) of the corrected shares, noise and all, from counts (P, K).

    Its noise is that of M⁻¹ p̂: where that is beyond an edge, the shares are the same whatever the noise.
    """
    P, K = counts.shape
    judged, M = counts / counts.sum(1, keepdims=True), confusion_matrix(labelled)
    inverse = np.linalg.inv(M)
    shares = judged @ inverse.T
    d = shares - target
    rising = np.sign(d[:, :, None] - d[:, None]).sum(2) * 2 / (K * (K - 1))  # of bias(P), with each share
    slope = -inverse.T @ rising.T @ shares / P  # with M_jk, by dp = -M⁻¹ dM p
    variance = bias(shares, target).var(ddof=1) / P
    variance += np.einsum("jk,kji,ik->", slope, confusion_noise(labelled), slope)
    half, value = Z * np.sqrt(variance), bias(true_shares(judged, M), target).mean()
    return as_interval(value, max(value - half, 0), min(value + half, bias(np.eye(K), target).max()), MEAN)


def corrected(
    counts: np.ndarray, labelled: np.ndarray, source: str, classes: Sequence[str], target: np.ndarray
) -> dict[str, object] | None:
    """What a judge's counts (P, K) are without its errors, ready for JSON; `source` says where M is known from, `upper`
    is the upper 95 % bound of the rms gap.

    None without an image, or without a labelled one of each class. No interval from too few labelled ones, or where M
    does not explain the counts; nothing from a judge that says the contrary.
    """
    n_k = labelled.sum(1)
    if not counts.any() or not n_k.all():
        return None
    M, of_class = confusion_matrix(labelled), counts.sum(0)
    two, some = told(counts), counts[counts.any(1)]
    value = true_shares(of_class / of_class.sum(), M)
    gap = corrected_gap(two, labelled, target) if len(two) and is_told(M) else None
    mean = rms = upper = None
    low = high = np.full(len(M), None)
    if is_swapped(M):
        value, method = low, SWAPPED
    elif np.isnan(value).any():
        value, method = low, MISFIT
    elif n_k.min() < MIN_LABELLED:
        method = FEW
    elif not is_explained(of_class, labelled, value) or (gap and not is_possible(gap)):
        method = MISFIT
    else:
        method, (low, high) = SHARES, share_intervals(of_class, labelled)
        low, high = np.minimum(low, value), np.maximum(high, value)
        if gap:
            rms, upper = as_interval(*corrected_rms(gap), RMS), float(corrected_rms(gap, Z_ONE_SIDED)[2])
        if len(some) >= MIN_PROMPTS and is_told(M):
            mean = corrected_mean_gap(some, labelled, target)
    return {
        "confusion": M.tolist(),
        "labelled": n_k.tolist(),
        "source": source,
        "mean_gap": mean,
        "rms_gap": rms,
        "upper": upper,
        "share": dict(zip(classes, np.stack([value, low, high], 1).tolist(), strict=True)),
        "method": method,
    }


def prediction_powered(counts: np.ndarray, labelled: np.ndarray, classes: Sequence[str]) -> dict[str, object]:
    """Shares of generated images of which some, a random sample, are labelled: no M from elsewhere is believed.

    The labelled ones in `labelled` (K, K), the others as judged in counts (K,); intervals with Z² images added, from
    200 labels on. Every class has its own weight of judge and labels, so the shares may not add up to 1.
    """
    value, _, _ = powered_shares(counts, labelled)
    _, low, high = powered_shares(counts, labelled + Z**2 / labelled.size)
    ends = np.clip([value, np.minimum(low, value), np.maximum(high, value)], 0, 1).T.tolist()
    few = labelled.sum() < MIN_POWERED
    return {
        "labelled": labelled.sum(1).tolist(),
        "share": {k: [v[0], None, None] if few else v for k, v in zip(classes, ends, strict=True)},
        "method": FEW_POWERED if few else POWERED,
    }


def powered_shares(counts: np.ndarray, labelled: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """PPI++: of class k the judge's share of all others, times what it is worth, and by how much labels are above that;
    with its interval, (K,) each."""
    n, N = labelled.sum(), max(counts.sum(), 1)
    true, judged, of_others = labelled.sum(1) / n, labelled.sum(0) / n, counts / N
    covariance = labelled.diagonal() / n - true * judged
    of_all = (counts + labelled.sum(0)) / (n + N)
    spread = of_all * (1 - of_all) * (n + N) / (n + N - 1)
    worth = np.clip(covariance / np.maximum((1 + n / N) * spread, 1e-300), 0, 1) * counts.any()
    value = worth * of_others + true - worth * judged
    left = true * (1 - true) + worth**2 * judged * (1 - judged) - 2 * worth * covariance
    half = Z * np.sqrt(worth**2 * of_others * (1 - of_others) / N + left / n)
    return value, value - half, value + half
