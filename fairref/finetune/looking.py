"""What the judges see of pictures: the face that counts, where there is a detector, or the whole.

n pictures, M of them with a face; K_a classes of an attribute.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fairref.fairness.faces import Faces, crops, find
from fairref.judges.mobilenet import Classifier


def faces_of(bundle, x: Tensor) -> Faces | None:
    """The face that counts in each picture, None without a detector."""
    return None if bundle.detector is None else find(bundle.detector, x)


def classify(
    classifier: Classifier, names: tuple[str, ...], x: Tensor, faces: Faces | None, most: int = 0
) -> dict[str, Tensor]:
    """Logits of attributes, in at least float32: of the faces (M, K_a), or of the whole pictures (n, K_a)."""
    rows = x if faces is None else crops(x, faces, classifier.network.config.input_size)
    logits = in_parts(lambda part: torch.cat([classifier(part)[name] for name in names], 1), rows, most)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    sizes = [len(classifier.attributes[name]) for name in names]
    return dict(zip(names, logits.split(sizes, 1)))


def at(rows: Tensor, found: Tensor | None) -> Tensor:
    """Those of (n, ...) rows that belong to a face -> (M, ...); all if there is no detector."""
    return rows if found is None else rows[found]


def spread(values: Tensor, found: Tensor | None) -> Tensor:
    """One value a face (M, ...) -> one an image (n, ...), zero or False where there is none."""
    if found is None:
        return values
    rows = values.new_zeros(len(found), *values.shape[1:])
    rows[found] = values
    return rows


def in_parts(function: Callable, rows: Tensor, most: int) -> Tensor:
    """function(rows), at most `most` rows at once; 0: all."""
    return (
        torch.cat([function(part) for part in rows.split(most)]) if 0 < most < len(rows) else function(rows)
    )
