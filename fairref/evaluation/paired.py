"""A model beside the original, on the same prompts and noise (docs/method.md §8). P prompts, K classes."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.spatial.distance import pdist
from scipy.stats import linregress, permutation_test, ttest_1samp
from scipy.stats import t as student

from fairref.evaluation.confusion import joint_classes
from fairref.evaluation.gaps import LEVEL, squared_gaps
from fairref.evaluation.statistics import JudgedImages, counts_by_judge
from fairref.fairness.attributes import JointTarget

MIN_PAIRS = 30  # prompts, for an interval; with fewer it is too short
SWAPS = "p: permutation test, before and after swapped within prompts"
METHOD = f"{SWAPS}; interval: Student's t over prompts: other prompts of this kind, other images"
TOO_SHORT = f"no interval with fewer than {MIN_PAIRS} prompts, where it is too short"
FEW = f"{SWAPS}, with 5 prompts or fewer never below .05; {TOO_SHORT}"


def paired(before: np.ndarray, after: np.ndarray, target: np.ndarray) -> dict[str, object] | None:
    """The mean change of the prompts' squared gaps, after - before, each without bias, from counts (P, K).

    Keys p, difference, low, high and method, ready for JSON; low and high None with fewer than 30 prompts. None with
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
    return {**found, "method": FEW if low is None else METHOD}


def leans(before: np.ndarray, after: np.ndarray) -> dict[str, object] | None:
    """The line log-odds after = slope * log-odds before + intercept, over prompts with counts (P, 2) of two classes.

    A slope of 1 keeps every prompt's lean and 0 none; the intercept moves all prompts alike, towards the first class
    above 0. Each as (value, low, high), ready for JSON. None with fewer than three prompts, or where all lean alike.
    Log-odds of k of n images: log((k + 1/2) / (n - k + 1/2)). Their noise before makes the slope a little smaller.
    """
    some = (before.sum(1) > 0) & (after.sum(1) > 0)
    x, y = (np.log(part[some, 0] + 0.5) - np.log(part[some, 1] + 0.5) for part in (before, after))
    if len(x) < 3 or np.ptp(x) == 0:
        return None
    fit = linregress(x, y)
    t = student.ppf((1 + LEVEL) / 2, len(x) - 2)
    found = {"slope": (fit.slope, fit.stderr), "intercept": (fit.intercept, fit.intercept_stderr)}
    found = {key: np.nan_to_num(of) for key, of in found.items()}  # no error, where all are alike after
    return {key: [float(v), float(v - t * error), float(v + t * error)] for key, (v, error) in found.items()}


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


def paired_by_judge(
    judged: Sequence[JudgedImages], originals: Sequence[JudgedImages], target: JointTarget
) -> dict[str, dict[str, object] | None]:
    """The paired test of the joint classes, by each judge that knows all attributes."""
    after, before = (counts_by_judge(part, target.classes) for part in (judged, originals))
    P = len(judged)
    return {
        judge: paired(before[judge].reshape(P, -1), counts.reshape(P, -1), target.table.reshape(-1))
        for judge, counts in after.items()
    }


def leans_by_judge(
    judged: Sequence[JudgedImages], originals: Sequence[JudgedImages], target: JointTarget
) -> dict[str, dict[str, object]]:
    """`leans` by each judge that sees one; none unless there are two classes."""
    if target.table.size != 2:
        return {}
    after, before = (counts_by_judge(part, target.classes) for part in (judged, originals))
    found = {judge: leans(before[judge].reshape(-1, 2), n.reshape(-1, 2)) for judge, n in after.items()}
    return {judge: line for judge, line in found.items() if line}


def diversities(
    judged: Sequence[JudgedImages], classes: Mapping[str, Sequence[str]]
) -> dict[str, float | None]:
    """The diversity of CLIP's and DINO's features within a joint class, as the first judge sees it."""
    judge = next(iter(counts_by_judge(judged, classes)))
    shape = tuple(map(len, classes.values()))
    joint = [joint_classes([np.asarray(s.classes[judge][a]) for a in classes], shape) for s in judged]
    return {
        name: diversity([np.asarray(s.features[name]) for s in judged], joint) for name in judged[0].features
    }
