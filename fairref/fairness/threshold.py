"""What the threshold C of eq 6 does to whole batches (docs/method.md §3). N images of one prompt, K classes."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from fairref.fairness import losses
from fairref.fairness.transport import expected_ot

SURE = 6.0  # log-odds by which an image shows its class; images of a class differ in the rest


def asked_to_change(counts: Sequence[int], target: Tensor, C: float, leave: bool = False) -> Tensor:
    """How many images of class k, of which the batch has counts[k], are told class l (K, K); 0 for l = k.

    target (K,). leave: with the threshold on leaving (`losses.leaving_targets`).
    """
    K = len(counts)
    own = torch.repeat_interleave(torch.arange(K), torch.as_tensor(counts))  # (N,)
    unlike = np.random.default_rng(0).normal(size=(len(own), K))
    q = expected_ot(torch.from_numpy(unlike) + SURE * torch.eye(K)[own], target).q
    y, told = losses.confident_targets(losses.leaving_targets(q, own, C) if leave else q, C)
    moves = torch.zeros(K, K, dtype=torch.long)
    moves.index_put_((own[told], y[told]), torch.tensor(1), accumulate=True)
    return moves.fill_diagonal_(0)


def quiet_counts(k: int, N: int, target: Tensor, C: float, leave: bool = False) -> tuple[int, int] | None:
    """The least and the largest number of images of class k with which nobody is asked to change, the other images
    having the other classes by their shares of `target` (K,); None where somebody always is. Of two classes exactly;
    of more, how unlike the images are counts, too."""
    others = torch.cat([target[:k], target[k + 1 :]]).clamp(min=1e-12)  # alike where none has a share

    def is_quiet(m: int) -> bool:
        edges = ((N - m) * others.cumsum(0) / others.sum()).round().long()
        counts = edges.diff(prepend=edges.new_zeros(1)).tolist()
        counts.insert(k, m)
        return not asked_to_change(counts, target, C, leave).any()

    quiet = [m for m in range(N + 1) if is_quiet(m)]
    return (quiet[0], quiet[-1]) if quiet else None


def pull_left(N: int, C: float) -> float:
    """How much C leaves of the pull near the target of two equal classes: the slope over the model's share d of the
    images that are asked to become class 1, less those to become 0, relative to N (1/2 - d). About 2 (1 - C).

    The first a ranks are told class 1 and the last a class 0, so with m ~ Binomial(N, d) of class 1 the mean of
    max(a - m, 0) - max(a - (N - m), 0) counts. A C below 1/2 asks no more than 1/2 does.
    """
    a = int((binom.sf(np.arange(N), N, 0.5) >= max(C, 0.5)).sum())
    return float(2 * binom.cdf(a - 1, N - 1, 0.5))
