"""How often a judge errs: what it says of images whose class is known otherwise (docs/method.md §8).

Of one attribute with K classes. The class is known from labelled pictures, or from prompts that name it, where the
template judge confirms that the image shows it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import random_table

from fairref.evaluation.judging import EvaluationSettings, judge
from fairref.evaluation.statistics import JudgedImages
from fairref.files.datasets import Photographs
from fairref.files.images import read_square
from fairref.generation.drawing import group_size
from fairref.progress import Progress

TEMPLATES = "templates"


@dataclass(frozen=True)
class Confusion:
    """What a judge says of images of each class."""

    counts: np.ndarray  # (K, K) int64: images of class k that it calls j
    untold: np.ndarray  # (K,) int64: images of class k that it leaves out, as without a face
    source: str  # where the images' classes are known from

    def __add__(self, other: "Confusion") -> "Confusion":
        return replace(self, counts=self.counts + other.counts, untold=self.untold + other.untold)


Confusions = dict[str, dict[str, Confusion]]  # judge -> attribute -> its confusion


def confusion(truth: np.ndarray, judged: np.ndarray, K: int, source: str) -> Confusion:
    """Counts of n images of classes truth (n,) that a judge calls judged (n,); -1: not known, or it can't tell."""
    counts = np.zeros((K, K + 1), np.int64)
    np.add.at(counts, (truth[truth >= 0], judged[truth >= 0]), 1)  # -1 is the last column
    return Confusion(counts[:, :K], counts[:, K], source)


def of_explicit(
    judged: Sequence[JudgedImages],
    asked: Sequence[tuple[str, str, int]],
    classes: dict[str, tuple[str, ...]],
    what: str,
) -> Confusions:
    """Each classifier on images of prompts that name a class, asked (prompt, attribute, class), where the template
    judge sees this class, too; {} without it. `what` was drawn, in words."""
    found: Confusions = {}
    source = f"{what} whose prompts name a class and whose class the template judge confirms"
    for s, (_, attribute, k) in zip(judged, asked, strict=True):
        for name in s.classes if TEMPLATES in s.classes else ():
            if name == TEMPLATES or attribute not in s.classes[name]:
                continue
            confirmed = (s.classes[TEMPLATES][attribute] == k).numpy()
            of_prompt = confusion(
                np.where(confirmed, k, -1),
                s.classes[name][attribute].numpy(),
                len(classes[attribute]),
                source,
            )
            of_judge = found.setdefault(name, {})
            of_judge[attribute] = of_judge[attribute] + of_prompt if attribute in of_judge else of_prompt
    return found


def of_photographs(settings: EvaluationSettings, photographs: Photographs, source: str) -> Confusions:
    """Each judge on labelled pictures, which it sees as it sees drawn images. Raises UserError."""
    bundle = settings.bundle
    # features are of no use here
    settings = replace(settings, bundle=replace(bundle, clip=None, dino=None))
    rows, size = photographs.parts["test"], group_size(bundle)
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    seen = []
    with Progress(len(groups), "labelled pictures", settings.processes.first) as progress:
        for group in groups:
            x = torch.stack([read_square(row.file, bundle.resolution) for row in group]).to(bundle.device)
            seen.append(judge(settings, x).classes)
            progress.step()
    truth = np.array([row.labels for row in rows])  # (n, A)
    return {
        name: {
            attribute: confusion(
                truth[:, a],
                torch.cat([classes[name][attribute] for classes in seen]).numpy(),
                len(photographs.attributes[attribute]),
                source,
            )
            for a, attribute in enumerate(photographs.attributes)
            if attribute in seen[0][name]
        }
        for name in seen[0]
    }


def difference(one: Confusion, other: Confusion, tables: int = 2000, seed: int = 0) -> float:
    """p of the hypothesis that a judge errs alike on both kinds of images.

    The sum over true classes of Pearson's statistic of kind x judged class, against tables with the same margins.
    """
    rng = np.random.default_rng(seed)
    seen, drawn = 0.0, np.zeros(tables)
    for pair in np.stack([one.counts, other.counts], 1):  # (2, K) of each true class
        pair = pair[:, pair.any(0)]
        if not pair.any(1).all():  # of one kind alone nothing is known
            continue
        expected = pair.sum(1)[:, None] * pair.sum(0) / pair.sum()
        seen += ((pair - expected) ** 2 / expected).sum()
        by_chance = random_table(pair.sum(1), pair.sum(0)).rvs(tables, random_state=rng)
        drawn += ((by_chance - expected) ** 2 / expected).sum((1, 2))
    return float((1 + (drawn >= seen - 1e-9).sum()) / (1 + tables))
