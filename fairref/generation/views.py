"""What judges see of images: the face that counts, where there is a detector, or the whole image.

n images, M of them with a face; K_a classes of an attribute.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.bundle.own_judges import OwnClassifier
from fairref.errors import UserError
from fairref.fairness.attributes import JointTarget
from fairref.fairness.faces import Faces, crops, find
from fairref.judges import ImageClassifier


def faces_of(bundle: Bundle, x: Tensor) -> Faces | None:
    """The face that counts in each image, None without a detector."""
    return None if bundle.detector is None else find(bundle.detector, x)


def classify(
    classifiers: Sequence[ImageClassifier],
    names: Sequence[str],
    x: Tensor,
    faces: Faces | None,
    micro_batch: int = 0,
) -> dict[str, Tensor]:
    """Logits of attributes, in at least float32: of the faces (M, K_a), or of the whole images (n, K_a).

    The first classifier that knows an attribute judges it.
    """
    logits: dict[str, Tensor] = {}
    has_face = None if faces is None else faces.has_face
    for classifier in classifiers:
        mine = [name for name in names if name in classifier.classes and name not in logits]
        if not mine:
            continue
        size = classifier.input_size
        whole = faces is None or size is None
        rows = select_faces(x, has_face) if whole else crops(x, faces, size)
        joined = map_batches(lambda part, c=classifier, m=mine: _joined(c(part), m), rows, micro_batch)
        joined = joined.to(torch.promote_types(joined.dtype, torch.float32))
        logits |= dict(
            zip(mine, joined.split([len(classifier.classes[name]) for name in mine], 1), strict=True)
        )
    return {name: logits[name] for name in names}


def _joined(logits, names):
    return torch.cat([logits[name] for name in names], 1)


def select_faces(rows: Tensor, has_face: Tensor | None) -> Tensor:
    """Those of (n, ...) rows that belong to a face -> (M, ...); all if there is no detector."""
    return rows if has_face is None else rows[has_face]


def scatter_to_images(values: Tensor, has_face: Tensor | None, fill: float = 0) -> Tensor:
    """One value a face (M, ...) -> one an image (n, ...), `fill` or False where there is none."""
    if has_face is None:
        return values
    rows = values.new_full((len(has_face), *values.shape[1:]), fill)
    rows[has_face] = values
    return rows


def map_batches(function: Callable[[Tensor], Tensor], rows: Tensor, micro_batch: int) -> Tensor:
    """function(rows), at most `micro_batch` rows at once; 0: all."""
    if 0 < micro_batch < len(rows):
        return torch.cat([function(part) for part in rows.split(micro_batch)])
    return function(rows)


def require_attributes(bundle: Bundle, role: str, target: JointTarget) -> None:
    """Refuses a target with an attribute that no classifier of this role knows, and a user's own classifier that knows
    none of the target's. Raises UserError."""
    known = {name: None for classifier in bundle.classifiers[role] for name in classifier.classes}
    unknown = [name for name in target.classes if name not in known]
    if unknown:
        raise UserError(
            f"{bundle.path}: the classifier {role!r} doesn't know {unknown[0]}, only {', '.join(known)}; use one"
            " that does."
        )
    for classifier in bundle.classifiers[role]:
        if isinstance(classifier, OwnClassifier) and not set(classifier.classes) & set(target.classes):
            raise UserError(
                f"--judge {role}={classifier.source.short} judges {', '.join(classifier.classes)} and not"
                f" {', '.join(target.classes)}; leave it out."
            )
