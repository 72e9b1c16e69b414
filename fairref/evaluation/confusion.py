"""How often a judge errs: what it says of images whose class is known otherwise (docs/method.md §8).

Of one attribute with K classes. The class is known from labelled pictures, from labels of some judged images, or from
prompts that name it, where the template judge confirms that the image shows it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from scipy.stats import random_table

from fairref.evaluation.statistics import JudgedImages

TEMPLATES = "templates"
MOST_JOINT = 8  # joint classes that are counted; of more there are too few labelled images
EXPLICIT = "the model's own images of prompts that name a class, where the template judge confirms it"


@dataclass(frozen=True)
class Confusion:
    """What a judge says of images of each class."""

    counts: np.ndarray  # (K, K) int64: images of class k that it calls j
    untold: np.ndarray  # (K,) int64: images of class k that it leaves out, as without a face
    source: str  # where the images' classes are known from

    def __add__(self, other: "Confusion") -> "Confusion":
        return replace(self, counts=self.counts + other.counts, untold=self.untold + other.untold)

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {"counts": self.counts.tolist(), "untold": self.untold.tolist(), "source": self.source}


Confusions = Mapping[str, Mapping[str, Confusion]]  # judge -> attribute -> its confusion


def confusion(truth: np.ndarray, judged: np.ndarray, K: int, source: str) -> Confusion:
    """Counts of n images of classes truth (n,) that a judge calls judged (n,); -1: not known, or it can't tell."""
    counts = np.zeros((K, K + 1), np.int64)
    np.add.at(counts, (truth[truth >= 0], judged[truth >= 0]), 1)  # -1 is the last column
    return Confusion(counts[:, :K], counts[:, K], source)


def confusions(
    truth: Mapping[str, np.ndarray],
    judged: Mapping[str, Mapping[str, np.ndarray]],
    classes: Mapping[str, Sequence[str]],
    source: str,
) -> Confusions:
    """The same of every judge and attribute: truth attribute -> (n,), judged judge -> attribute -> (n,). Where both
    know all of several attributes, that of up to 8 joint classes, too, under the attributes' names with commas."""
    sizes = {name: len(of) for name, of in classes.items()}
    whole, K = ",".join(classes), prod(sizes.values())
    found = {}
    for judge, of_judge in judged.items():
        rows = {name: np.asarray(of) for name, of in of_judge.items() if name in truth}
        found[judge] = {name: confusion(truth[name], of, sizes[name], source) for name, of in rows.items()}
        if 1 < len(sizes) == len(rows) and K <= MOST_JOINT:
            known, said = (
                joint_classes([of[name] for name in classes], tuple(sizes.values())) for of in (truth, rows)
            )
            found[judge][whole] = confusion(known, said, K, source)
    return found


def joint_classes(rows: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Class indices (n,) of each attribute -> those of the joint classes; -1 where one is not known."""
    return np.where(np.min(rows, 0) >= 0, np.ravel_multi_index(np.maximum(rows, 0), shape), -1)


def of_explicit(
    judged: Sequence[JudgedImages],
    asked: Sequence[tuple[str, str, int]],
    classes: Mapping[str, Sequence[str]],
) -> Confusions:
    """Each classifier on images of prompts that name a class, asked (prompt, attribute, class index), where the
    template judge sees this class, too; {} without it."""
    found: dict[str, dict[str, Confusion]] = {}
    for s, (_, name, k) in zip(judged, asked, strict=True):
        if name not in s.classes.get(TEMPLATES, {}):
            continue
        confirmed = np.where(s.classes[TEMPLATES][name] == k, k, -1)
        classifiers = {
            j: {name: rows[name]} for j, rows in s.classes.items() if j != TEMPLATES and name in rows
        }
        for judge, of_judge in confusions({name: confirmed}, classifiers, classes, EXPLICIT).items():
            before = found.setdefault(judge, {}).get(name)
            found[judge][name] = of_judge[name] if before is None else before + of_judge[name]
    return found


def difference(one: Confusion, other: Confusion, tables: int = 2000, seed: int = 0) -> float | None:
    """p of the hypothesis that a judge errs alike on both kinds of images; None where no class has some of both.

    The sum over true classes of Pearson's statistic of kind x judged class, against tables with the same margins.
    """
    rng = np.random.default_rng(seed)
    seen, drawn = None, np.zeros(tables)
    for pair in np.stack([one.counts, other.counts], 1):  # (2, K) of each true class
        pair = pair[:, pair.any(0)]
        if not pair.any(1).all():  # of one kind alone nothing is known
            continue
        expected = pair.sum(1)[:, None] * pair.sum(0) / pair.sum()
        seen = (seen or 0.0) + ((pair - expected) ** 2 / expected).sum()
        by_chance = random_table(pair.sum(1), pair.sum(0)).rvs(tables, random_state=rng)
        drawn += ((by_chance - expected) ** 2 / expected).sum((1, 2))
    return None if seen is None else float((1 + (drawn >= seen - 1e-9).sum()) / (1 + tables))
