"""Judged images -> a report of numbers (docs/method.md §8).

P prompts, n images of each, K classes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from fairref.evaluation.certainty import certainty
from fairref.fairness.metrics import BLEND, bias, joint_counts, mean_cosine, noise_floor

COLOURED = ("background", "clothes")  # parts of an image whose colours should stay


@dataclass(frozen=True)
class JudgedImages:
    """What n images of one prompt are to each judge, one row an image, on the CPU. A judge that the bundle lacks has no
    entry."""

    classes: dict[str, dict[str, Tensor]]  # judge -> attribute -> (n,) long; -1: the judge can't tell
    # judge -> attribute -> (n, K_a) float32, NaN without a face; a judge that compares images has none
    probabilities: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    # (n, 4) of the face that counts, in pixels, NaN without one; None: no detector
    boxes: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)  # "clip", "dino" -> (n, D), unit norm
    colours: dict[str, Tensor] = field(default_factory=dict)  # of COLOURED -> (n, 3), NaN: not known

    def __len__(self) -> int:
        return len(next(iter(self.classes["classifier"].values())))

    def first(self, n: int) -> "JudgedImages":
        """The first n of them."""
        return self.from_tensors({name: rows[:n] for name, rows in self.tensors().items()})

    def split(self, n: int) -> list["JudgedImages"]:
        """The first n of them, the next n, and so on."""
        parts = {name: rows.split(n) for name, rows in self.tensors().items()}
        return [
            self.from_tensors(dict(zip(parts, one, strict=True))) for one in zip(*parts.values(), strict=True)
        ]

    def followed_by(self, others: "JudgedImages") -> "JudgedImages":
        """These and others, by the same judges."""
        theirs = others.tensors()
        return self.from_tensors(
            {name: torch.cat([rows, theirs[name]]) for name, rows in self.tensors().items()}
        )

    def of(self, attributes: Iterable[str]) -> "JudgedImages":
        """The same, by these attributes alone; a judge that knows none of them is left out."""
        names = tuple(attributes)
        classes, probabilities = (
            {
                j: {a: rows[a] for a in names if a in rows}
                for j, rows in by_judge.items()
                if not set(names).isdisjoint(rows)
            }
            for by_judge in (self.classes, self.probabilities)
        )
        return replace(self, classes=classes, probabilities=probabilities)

    def known(self, judge: str) -> Tensor:
        """(n,) bool: the judge can tell every attribute's class."""
        return torch.stack(list(self.classes[judge].values())).amin(0) >= 0

    def counts(self, judge: str, classes: Mapping[str, Sequence[str]]) -> np.ndarray:
        """(K_1, ..., K_A) images of each joint class of these attributes, of those that the judge can tell."""
        rows = [self.classes[judge][name] for name in classes]
        known = torch.stack(rows).amin(0) >= 0
        return joint_counts([of_attribute[known] for of_attribute in rows], tuple(map(len, classes.values())))

    @property
    def none(self) -> int:
        """Images that the template judge leaves out: nobody, or a class that it can't tell."""
        return int((~self.known("templates")).sum()) if "templates" in self.classes else 0

    @property
    def faceless(self) -> int:
        """Images without a face, which classifiers leave out where faces count."""
        return int((~self.known("classifier")).sum())

    @property
    def blended(self) -> int:
        """Images whose largest class probability is low, in one of the attributes."""
        largest = [p.amax(1) for p in self.probabilities.get("classifier", {}).values()]
        return int((torch.stack(largest) < BLEND).any(0).sum()) if largest else 0

    def tensors(self) -> dict[str, Tensor]:
        """All of it under names that say what each is, to travel or to be kept."""
        boxes = {} if self.boxes is None else {"boxes": self.boxes}
        by_judge = {
            f"{kind}/{judge}/{name}": rows
            for kind in ("classes", "probabilities")
            for judge, of_judge in getattr(self, kind).items()
            for name, rows in of_judge.items()
        }
        plain = {
            f"{kind}/{name}": rows
            for kind in ("features", "colours")
            for name, rows in getattr(self, kind).items()
        }
        return {**by_judge, **plain, **boxes}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "JudgedImages":
        """The images of `tensors`."""
        held = {"classes": {}, "probabilities": {}, "features": {}, "colours": {}}
        for key, rows in tensors.items():
            kind, *names = key.split("/", 2 if key.startswith(("classes/", "probabilities/")) else 1)
            if len(names) == 2:
                held[kind].setdefault(names[0], {})[names[1]] = rows
            elif names:
                held[kind][names[0]] = rows
        return cls(boxes=tensors.get("boxes"), **held)


def joint_names(classes: dict[str, tuple[str, ...]]) -> list[str]:
    """The joint classes' names, in the order of a flattened table: "woman", or "woman, dark"."""
    return [", ".join(names) for names in product(*classes.values())]


def bias_report(
    judged: list[JudgedImages],
    names: list[str],
    classes: dict[str, tuple[str, ...]],
    table: np.ndarray | None = None,
) -> dict[str, object]:
    """bias(P) of the joint classes of each prompt, mean and standard deviation, by each judge, beside the noise floor;
    and how sure that is.

    Of several attributes, also of each alone, under "attributes", with the judges that don't know the others. Where the
    target's joint `table` (K_1, ..., K_A) is not one of equal shares, also "from_target", the same measures with its
    shares taken from the frequencies, and "target_floor", what a model that meets it measures then.
    """
    axes, sizes = range(len(classes)), list(map(len, judged))  # n_P of each prompt
    counts = counts_by_judge(judged, classes)
    report = {
        "prompts": len(names),
        "images": sizes[0] if len(set(sizes)) == 1 else dict(zip(names, sizes, strict=True)),
        **_biases(counts, names, joint_names(classes), sizes, table),
    }
    if len(classes) > 1:
        report["attributes"] = {}
        for axis, (attribute, class_names) in enumerate(classes.items()):
            alone = counts_by_judge(judged, {attribute: class_names})
            marginal = None if table is None else table.sum(tuple(a for a in axes if a != axis))
            report["attributes"][attribute] = _biases(alone, names, list(class_names), sizes, marginal)
    if "templates" in report["judges"]:
        report["none"] = sum(s.none for s in judged) / sum(sizes)
    faceless = sum(s.faceless for s in judged)
    report["faceless"] = faceless / sum(sizes)
    report["blended"] = sum(s.blended for s in judged) / max(sum(sizes) - faceless, 1)
    return report


def counts_by_judge(
    judged: Sequence[JudgedImages], classes: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    """Of each judge that knows all of these attributes, (P, K_1, ..., K_A) images."""
    knowing = [j for j, known in judged[0].classes.items() if set(classes) <= set(known)]
    return {j: np.stack([s.counts(j, classes) for s in judged]) for j in knowing}


def _biases(counts, names, classes, sizes, table):
    """By judge the biases of P prompts and the noise floor: counts (P, ...) of K classes in all. A floor is of as many
    images as the judge counted; that of the first judge stands before them all, too."""
    unequal = table is not None and not np.allclose(table, 1 / len(classes))
    target = table.reshape(-1) if unequal else None
    judges = {}
    for judge, of_judge in counts.items():
        rows = of_judge.reshape(len(names), -1)  # (P, K)
        some = rows.sum(1) > 0  # a prompt whose images are all "none" has no bias
        values = bias(rows[some]) if some.any() else np.array([np.nan])
        if unequal:
            far = bias(rows[some], target) if some.any() else np.array([np.nan])
        counted = rows.sum(1)[some] if some.any() else sizes
        shares = (rows.sum(0) / rows.sum()).tolist() if some.any() else [None] * len(classes)
        floors = {"floor": _floor(len(classes), counted)}
        floors |= {"target_floor": _floor(len(classes), counted, target)} if unequal else {}
        judges[judge] = {
            **_mean_and_std((values.mean(), values.std())),
            "without_bias": int((~some).sum()),
            **({"from_target": _mean_and_std((far.mean(), far.std()))} if unequal else {}),
            "share": dict(zip(classes, shares, strict=True)),
            "counts": {prompt: row.tolist() for prompt, row in zip(names, rows, strict=True)},
            "sure": certainty(rows, sizes - rows.sum(1), names, classes, target),
            **floors,
        }
    first, *_ = judges.values()
    floors = {"noise_floor": first["floor"], **({"target_floor": first["target_floor"]} if unequal else {})}
    return {**floors, "judges": judges}


def _floor(K, sizes, target=None):
    """What a fair model measures, mean and standard deviation over prompts of these numbers of images."""
    n, prompts = np.unique(sizes, return_counts=True)
    shares = None if target is None else tuple(target.tolist())
    mean, std = np.array([_floor_of(K, int(size), shares) for size in n]).T
    whole = np.average(mean, weights=prompts)
    spread = np.average(std**2 + (mean - whole) ** 2, weights=prompts)
    return _mean_and_std((whole, np.sqrt(spread)))


@cache
def _floor_of(K, n, shares):
    return noise_floor(K, n, target=None if shares is None else np.array(shares))


def _mean_and_std(both):
    return dict(zip(("mean", "std"), map(_number, both), strict=True))


def likeness(judged: list[JudgedImages], originals: list[JudgedImages]) -> dict[str, float | None]:
    """CLIP-I and DINO: mean cosine of images with the original model's from the same noise. And how much of the
    colour of background and clothes is the original's: 1 - distance to it / distance to the prompt's next image's."""
    x, o = (
        _together([s.features for s in part]) for part in (judged, originals)
    )  # (images of all prompts, D)
    found = {
        name: mean_cosine(x[feature], o[feature])
        for name, feature in (("clip_i", "clip"), ("dino", "dino"))
        if feature in x
    }
    x, o = (_together([s.colours for s in part]) for part in (judged, originals))
    nearby = _together([{name: _next(rows) for name, rows in s.colours.items()} for s in originals])
    for name in (name for name in COLOURED if name in x):
        near, far = ((x[name] - other[name]).norm(dim=1) for other in (o, nearby))
        known = near.isfinite() & far.isfinite()
        found[name] = _number(1 - float(near[known].mean() / far[known].mean()))
    return found


def _together(of_prompts):
    return {name: torch.cat([rows[name] for rows in of_prompts]) for name in of_prompts[0]}


def _next(rows):
    """The next image's colours; not known where there is no other."""
    return rows.roll(1, 0) if len(rows) > 1 else torch.full_like(rows, torch.nan)


def flips(
    judged: list[JudgedImages], originals: list[JudgedImages], classes: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """By each judge that knows all of the attributes: the share of images that changed their joint class, the least
    share that leads to the same counts of each prompt, and what is beyond it, "needless".

    Only images that the judge can tell on both sides count. A judge that can tell none is left out.
    """
    found = {}
    for judge in counts_by_judge(judged, classes):
        images = changed = least = 0
        for s, o in zip(judged, originals, strict=True):
            pair = [
                torch.stack([part.classes[judge][name] for name in classes], 1) for part in (s, o)
            ]  # (n, A)
            known = (torch.stack(pair) >= 0).all(-1).all(0)
            after, before = (rows[known] for rows in pair)
            shape = tuple(map(len, classes.values()))
            counts = [joint_counts(list(rows.T), shape) for rows in (after, before)]
            images += len(after)
            changed += int((after != before).any(1).sum())
            least += int(np.abs(counts[0] - counts[1]).sum()) // 2
        if images:
            needless = (changed - least) / images
            found[judge] = {"changed": changed / images, "least": least / images, "needless": needless}
    return found


def _number(value):
    return float(value) if np.isfinite(value) else None
