"""Measures of generated images (docs/method.md §8). K classes, n images of a prompt, P prompts."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import binom
from torch import Tensor

FLOOR_DRAWS = 100_000
BLEND = 0.8  # an image whose largest class probability is below blends classes


def joint_counts(classes: Sequence[Tensor], shape: tuple[int, ...]) -> np.ndarray:
    """How often each joint class occurs: classes (n,) long of each of A attributes -> array (K_1, ..., K_A)."""
    index = np.ravel_multi_index([np.asarray(of_attribute.cpu()) for of_attribute in classes], shape)
    return np.bincount(index, minlength=int(np.prod(shape))).reshape(shape)


def bias(counts: np.ndarray, target: np.ndarray | None = None) -> np.ndarray:
    """bias(P) = 1/(K(K-1)/2) Σ_{i<j} |freq(i) - freq(j)| of counts or frequencies (..., K) -> (...).

    0 for equal shares, 2/K for a single class. With a target (K,), its shares are taken from the frequencies: 0 where
    it is met, and for equal shares the same. Raises ValueError where there is no image.
    """
    counts = np.asarray(counts, np.float64)
    total = counts.sum(-1, keepdims=True)
    if counts.shape[-1] < 2 or not (total > 0).all():
        raise ValueError(f"counts are {counts.tolist()}; a bias needs at least two classes and one image.")
    freq = counts / total - (0 if target is None else np.asarray(target))
    i, j = np.triu_indices(counts.shape[-1], 1)  # all pairs i < j
    return np.abs(freq[..., i] - freq[..., j]).mean(-1)


def noise_floor(
    K: int, n: int, rng: np.random.Generator | None = None, target: np.ndarray | None = None
) -> tuple[float, float]:
    """Mean and standard deviation of bias(P) for a perfectly fair model with n images: one of equal shares, or of a
    target's (K,), from which the bias is then taken.

    K = 2 exactly, else from 100,000 draws of `rng`; without it the same draws at every call. The mean over P
    prompts scatters by std / √P.
    """
    shares = np.full(K, 1 / K) if target is None else np.asarray(target, np.float64)
    if K == 2:
        heads = np.arange(n + 1)
        value, weight = bias(np.stack([heads, n - heads], 1), shares), binom.pmf(heads, n, shares[0])
    else:
        rng = rng or np.random.default_rng(0)
        value = bias(rng.multinomial(n, shares / shares.sum(), FLOOR_DRAWS), shares)
        weight = np.full(FLOOR_DRAWS, 1 / FLOOR_DRAWS)
    mean = (weight * value).sum()
    return float(mean), float(np.sqrt((weight * (value - mean) ** 2).sum()))


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """The mean over images of cos(a_i, b_i): features (n, D), and (n, D) or, one for all, (1, D) -> float.

    CLIP-T with b a prompt's text features, CLIP-I and DINO with b the original images' features.
    """
    return F.cosine_similarity(a, b, dim=1).mean().item()


def blends(logits: list[Tensor]) -> int:
    """How many images have, in one of the attributes (n, K_a), no class of probability 0.8 or more."""
    return int(
        torch.stack([attribute_logits.softmax(1).amax(1) < BLEND for attribute_logits in logits]).any(0).sum()
    )
