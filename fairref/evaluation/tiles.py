"""Images before and after as tiles of one PNG, whose text says what the evaluation classifier sees in each.

A report shows them as figure 8, with the face that counts, its class and the class's probability. n images of a prompt.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from fairref.evaluation.statistics import JudgedImages
from fairref.files.images import save_png, to_image

FILE = "pictures.png"
SIDE = 160  # pixels of a tile; larger images are reduced to it


@dataclass(frozen=True)
class Row:
    """One model's images of a prompt."""

    x: Tensor  # (n, 3, H, W)
    judged: JudgedImages


def save_tiles(
    path: Path,
    labels: Sequence[str],
    classes: Mapping[str, Sequence[str]],
    rows: Mapping[str, Sequence[Row]],
) -> None:
    """Writes the tiles: of each prompt a row for each of the models, which `labels` name."""
    every = [row for of_prompt in rows.values() for row in of_prompt]
    side, n = min(SIDE, every[0].x.shape[-1]), max(len(row.x) for row in every)
    sheet = Image.new("RGB", (n * side, len(every) * side), "white")
    for r, row in enumerate(every):
        for i, x in enumerate(row.x):
            tile = to_image(x)
            tile = tile if tile.width == side else tile.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(tile, (i * side, r * side))
    said = [
        {"prompt": prompt, "rows": [_said(row, classes) for row in of_prompt]}
        for prompt, of_prompt in rows.items()
    ]
    facts = {"side": side, "labels": list(labels), "classes": classes, "prompts": said}
    save_png(sheet, path, {"judged": json.dumps(facts)})


def _said(row, classes):
    """Of each image the face's edges as shares of the image, and of each attribute the class and its probability."""
    size, boxes = row.x.shape[-1], row.judged.boxes
    said = []
    for i in range(len(row.x)):
        box = None if boxes is None else [edge / size for edge in boxes[i].tolist()]
        seen = {}
        for name, names in classes.items():
            p = next(of[name] for of in row.judged.probabilities.values() if name in of)[
                i
            ]  # of the first judge
            if p.isfinite().all():
                seen[name] = [names[int(p.argmax())], round(float(p.max()), 4)]
        said.append({"box": box if box and all(map(math.isfinite, box)) else None, "classes": seen})
    return said
