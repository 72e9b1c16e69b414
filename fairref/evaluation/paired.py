"""A model beside the original, on the same prompts and noise (docs/method.md §8). P prompts, K classes."""

from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import pdist
from scipy.stats import permutation_test, ttest_1samp

from fairref.evaluation.gaps import LEVEL, squared_gaps

MIN_PAIRS = 10  # prompts, for an interval; with fewer it is too short
METHOD = "p: permutation test of before and after within prompts; Student's t over prompts: other prompts, other images"


def paired(before: np.ndarray, after: np.ndarray, target: np.ndarray) -> dict[str, object] | None:
    """The mean change of the prompts' squared gaps, after - before, each without bias, from counts (P, K).

    Keys p, difference, low, high and method, ready for JSON; low and high None with fewer than ten prompts. None with
    fewer than two prompts that have two images both times.
    """
    some = (before.sum(1) > 1) & (after.sum(1) > 1)
    if some.sum() < 2:
        return None
    gaps = squared_gaps(after[some], target), squared_gaps(before[some], target)
    test = permutation_test(
        gaps,
        lambda x, y, axis: (x - y).mean(axis),
        permutation_type="samples",
        vectorized=True,
        random_state=np.random.default_rng(0),
    )
    low = high = None
    change = gaps[0] - gaps[1]
    if len(change) >= MIN_PAIRS:
        low, high = map(float, ttest_1samp(change, 0).confidence_interval(LEVEL))
    found = {"p": float(test.pvalue), "difference": float(change.mean()), "low": low, "high": high}
    return {**found, "method": METHOD}


def flips(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> dict[str, float] | None:
    """Shares of images that changed class, that had to for the counts after, and that did so for nothing.

    Of each prompt the classes (n,) before and after, from the same noise; images that the judge leaves out (-1) once
    don't count. None without an image.
    """
    changed = least = images = 0
    for b, a in zip(before, after, strict=True):
        told = (b >= 0) & (a >= 0)
        b, a = b[told], a[told]
        K = max(b.max(initial=0), a.max(initial=0)) + 1
        changed += int((a != b).sum())
        least += int(np.maximum(np.bincount(a, minlength=K) - np.bincount(b, minlength=K), 0).sum())
        images += len(b)
    if not images:
        return None
    return {"changed": changed / images, "least": least / images, "needless": (changed - least) / images}


def diversity(features: Sequence[np.ndarray], classes: Sequence[np.ndarray]) -> float | None:
    """1 - cosine, mean over all pairs of images of one prompt and one class: how little they are alike.

    Of each prompt features (n, D) and classes (n,), -1: not known. None without such a pair.
    """
    distances = [
        pdist(x[of_prompt == k], "cosine")
        for x, of_prompt in zip(features, classes, strict=True)
        for k in np.unique(of_prompt[of_prompt >= 0])
    ]
    together = np.concatenate([np.zeros(0), *distances])
    return float(together.mean()) if len(together) else None
