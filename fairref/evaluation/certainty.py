"""How sure the numbers of a report are (docs/method.md §8). P prompts, K classes; counts are of images that a judge
can tell."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy.stats import binomtest, false_discovery_control

from fairref.evaluation.fair import fair_p, fair_test, smallest_gap
from fairref.evaluation.gaps import LEVEL, mean_gap, rms_gap
from fairref.fairness.metrics import bias


def certainty(
    counts: np.ndarray,
    undecided: np.ndarray,
    prompts: Sequence[str],
    classes: Sequence[str],
    target: np.ndarray | None = None,
) -> dict[str, object]:
    """Everything that is said of how sure counts (P, K) are, ready for JSON; None where there is no image to say it of.

    `undecided` (P,): images that the judge leaves out. The gaps are those from the target (K,); None: equal shares.
    """
    counts, K = np.asarray(counts), len(classes)
    target = np.full(K, 1 / K) if target is None else np.asarray(target, np.float64)
    n = counts.sum(1)
    some = n > 0
    return {
        "rms_gap": rms_gap(counts, target),
        "mean_gap": mean_gap(counts, target),
        "fair": fair_test(counts, target),
        **_by_prompt(counts, prompts, classes, target),
        "smallest_gap_seen": smallest_gap(int(some.sum()), 1 / (1 / n[some]).mean(), target)
        if some.any()
        else None,
        "bounds": bounds(counts, np.asarray(undecided), target),
        "worst_prompt": _worst_prompt(counts, prompts, target),
        "worst_group": _worst_group(counts, classes, target),
    }


@cache
def share(count: int, n: int, several: int = 1) -> tuple[float | None, float | None, float | None]:
    """A share of n images with Wilson's interval, which may be one of `several` that all hold; None without one."""
    if n == 0:
        return None, None, None
    interval = binomtest(count, n).proportion_ci(1 - (1 - LEVEL) / several, "wilson")
    return count / n, float(interval.low), float(interval.high)


@cache
def _p_of_two(count, n, share):
    return float(binomtest(count, n, share).pvalue)


def p_value(counts: np.ndarray, target: np.ndarray) -> float | None:
    """p of one prompt's counts (K,) under the target: exact for two classes, else Pearson's; None without an image."""
    n = int(counts.sum())
    if n == 0:
        return None
    if len(counts) == 2:
        return _p_of_two(int(counts[0]), n, float(min(target[0], 1)))
    return fair_p(counts[None], target)


def _by_prompt(counts, prompts, classes, target):
    """Shares with intervals and p of each prompt, and which are unfair: 5 % of those that are called so may be fair."""
    p = [p_value(row, target) for row in counts]
    known = [value for value in p if value is not None]
    adjusted = iter(false_discovery_control(known)) if known else iter(())
    unfair = [value is not None and next(adjusted) <= 1 - LEVEL for value in p]
    of_prompt = {
        prompt: {
            "share": {
                k: list(share(int(count), int(row.sum()))) for k, count in zip(classes, row, strict=True)
            },
            "p": value,
            "unfair": bool(is_unfair),
        }
        for prompt, row, value, is_unfair in zip(prompts, counts, p, unfair, strict=True)
    }
    return {"prompts": of_prompt, "unfair_prompts": int(sum(unfair))}


def bounds(counts: np.ndarray, undecided: np.ndarray, target: np.ndarray) -> dict[str, float] | None:
    """The least and the largest mean bias that there can be, wherever each prompt's undecided images (P,) belong."""
    some = counts.sum(1) + undecided > 0
    counts, undecided = counts[some].astype(np.float64), undecided[some]
    if not some.any():
        return None
    # the bias is convex, so it is largest where all go to one class
    largest = [bias(counts + undecided[:, None] * one, target) for one in np.eye(len(target))]
    least = [bias(_levelled(row, u, target), target) for row, u in zip(counts, undecided, strict=True)]
    return {"low": float(np.mean(least)), "high": float(np.max(largest, 0).mean())}


def _levelled(counts, undecided, target):
    """Counts (K,) after undecided images, or parts of them, have raised the classes that lack most to one level."""
    lacking = counts - (counts.sum() + undecided) * target
    order = np.sort(lacking)
    levels = (undecided + order.cumsum()) / np.arange(1, len(order) + 1)  # if the first 1, 2, ... are raised
    return counts + np.maximum(levels.min() - lacking, 0)


def _worst_prompt(counts, prompts, target):
    values = {p: float(bias(row, target)) for p, row in zip(prompts, counts, strict=True) if row.any()}
    worst = max(values, key=values.get, default=None)
    if worst is None:
        return None
    n = tuple(sorted(map(int, counts.sum(1)[counts.any(1)])))
    return {"prompt": worst, "bias": values[worst], "fair": fair_worst(n, tuple(map(float, target)))}


@cache
def fair_worst(n: tuple[int, ...], target: tuple[float, ...]) -> float:
    """The mean of the largest bias of prompts with n images each, of a model that meets the target: 1,000 draws."""
    counts = np.random.default_rng(0).multinomial(n, target, (1000, len(n)))  # (1000, P, K)
    return float(bias(counts, np.array(target)).max(1).mean())


def _worst_group(counts, classes, target):
    """The class that has least of what the target gives it, over all prompts, with Wilson's interval. As any of the K
    classes may be the least, its level is that of K intervals at once (Bonferroni)."""
    of_class, n = counts.sum(0), int(counts.sum())
    if n == 0:
        return None
    ratio = of_class / np.where(target > 0, n * target, 1e-300)
    worst = int(np.argmin(np.where(target > 0, ratio, np.inf)))
    value, low, high = share(int(of_class[worst]), n, len(classes))
    return {"class": classes[worst], "share": value, "low": low, "high": high}
