"""How often a judge errs: what it says of images whose class is known otherwise (docs/method.md §8).

Of one attribute with K classes. The class is known from labelled pictures, from labels of some judged images, or from
prompts that name it, where the template judge confirms that the image shows it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

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

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {"counts": self.counts.tolist(), "untold": self.untold.tolist(), "source": self.source}


Asked = tuple[str, str, int]  # a prompt that names a class, the attribute, the class's index
Told = Mapping[
    str, Mapping[str, tuple[np.ndarray, np.ndarray]]
]  # judge -> attribute -> (truth, judged), (n,) each
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


def on_explicit(judged: Sequence[JudgedImages], asked: Sequence[Asked]) -> Told:
    """What each classifier says of images of prompts that name a class, and the class, where the template judge sees
    this class, too; {} without it."""
    found = {}
    for s, (_, name, k) in zip(judged, asked, strict=True):
        if name not in s.classes.get(TEMPLATES, {}):
            continue
        confirmed = np.where(s.classes[TEMPLATES][name] == k, k, -1)
        for judge, rows in s.classes.items():
            if judge != TEMPLATES and name in rows:
                told = found.setdefault(judge, {}).setdefault(name, ([], []))
                told[0].append(confirmed)
                told[1].append(np.asarray(rows[name]))
    return {j: {a: tuple(map(np.concatenate, told)) for a, told in of.items()} for j, of in found.items()}


def of_explicit(told: Told, classes: Mapping[str, Sequence[str]]) -> Confusions:
    """The confusions of what `on_explicit` found."""
    return {
        judge: {name: confusion(*rows, len(classes[name]), EXPLICIT) for name, rows in of_judge.items()}
        for judge, of_judge in told.items()
    }


def difference(
    before: tuple[np.ndarray, np.ndarray],
    after: tuple[np.ndarray, np.ndarray],
    swaps: int = 4999,
    seed: int = 0,
) -> float | None:
    """p of the hypothesis that a judge errs alike before and after, on images of the same noise: (truth, judged) each,
    (n,). None without an image that has the same true class and is judged both times.

    The change of the counts M is made of, squared, against what it is after swaps of before and after in images: of one
    class, McNemar's test.
    """
    (truth, one), (same, other) = before, after
    known = (truth >= 0) & (truth == same) & (one >= 0) & (other >= 0)
    if not known.any():
        return None
    turned = known & (one != other)
    K = 1 + max(truth.max(), one.max(), other.max())
    change = np.zeros((turned.sum(), K, K))
    rows = np.arange(len(change))
    change[rows, truth[turned], one[turned]] = 1
    change[rows, truth[turned], other[turned]] = -1
    signs = np.random.default_rng(seed).choice([-1, 1], (swaps, len(change)))
    seen, swapped = (
        np.square(np.tensordot(sign, change, 1)).sum((-1, -2)) for sign in (np.ones(len(change)), signs)
    )
    return float((1 + (swapped >= seen - 1e-9).sum()) / (1 + swaps))
