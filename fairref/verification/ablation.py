"""The ablation of docs/method.md §3: one fixed set of labels u in place of u ~ D. Finetuning does not use it."""

import numpy as np
import torch
from torch import Tensor

from fairref.fairness.transport import TIE_BREAK, assign, class_distance, cross_entropy


def nearest_counts(N: int, target: np.ndarray) -> np.ndarray:
    """Return the class counts (K,) nearest to N D, D = target (K,): the largest remainders are rounded up."""
    counts = np.floor(N * target + 1e-9).astype(int)
    rest = np.argsort(counts - N * target, kind="stable")[: N - counts.sum()]
    counts[rest] += 1
    return counts


def fixed_ot(logits: Tensor, target: Tensor) -> Tensor:
    """Return targets (N, K), 0 or 1, by the cheapest assignment (eq 4) of the labels u with the `nearest_counts`.

    logits (N, K), target D (K,).
    """
    rows, D = (x.detach().cpu().double().numpy() for x in (logits, target))
    classes = assign(class_distance(rows) + TIE_BREAK * cross_entropy(rows), nearest_counts(len(rows), D))
    return torch.nn.functional.one_hot(torch.from_numpy(classes), len(D)).double()
