"""The files of `train.py --scores`: what each image of a recorded iteration pulled, and what it was. No torch needed.

N images of one prompt.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open

from fairref.errors import UserError
from fairref.files.sheets import COLOURS, enlarged, font

FOLDER, SHEET, FORMAT = (
    "scores",
    "scores.png",
    "fairref-scores-1",
)  # of a run; the number grows with the format
SHOWN, COLUMNS = 24, 12  # images that pulled most, and least, on the sheet and in the report


@dataclass(frozen=True)
class Score:
    """The images of one recorded iteration."""

    iteration: int
    prompt: str
    explicit: bool  # the prompt names a class
    pull: np.ndarray  # (N,) norms of the rows of the gradient matrix
    pictures: np.ndarray  # (N, h, w, 3) uint8
    classes: dict[str, list[str]]
    shown: dict[str, np.ndarray]  # attribute -> (N,) the class that the image shows; -1: no face
    target: dict[str, np.ndarray]  # attribute -> (N,) the class that it is told; -1: none that is sure enough
    confidence: dict[str, np.ndarray]  # attribute -> (N,) c, the largest q

    @property
    def share(self) -> np.ndarray:
        """(N,) of the iteration's pull."""
        return self.pull / max(self.pull.sum(), 1e-30)


def read_scores(folder: Path) -> list[Score]:
    """The recorded iterations of a run, in their order. Raises UserError, which names a damaged file."""
    return [_read(path) for path in sorted((folder / FOLDER).glob("*.safetensors"))]


def _read(path):
    try:
        with safe_open(path, "np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            info = json.loads(file.metadata()["fairref"])["info"]
        if info["format"] != FORMAT:
            raise ValueError(info["format"])
        classes = {str(name): [str(c) for c in of] for name, of in info["classes"].items()}
        pull, pictures = tensors["pull"].astype(float), tensors["pictures"]
        N = len(pull)
        columns = [
            {name: tensors[f"{kind} {name}"] for name in classes}
            for kind in ("shown", "target", "confidence")
        ]
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or (len(pictures), pictures.shape[3]) != (N, 3):
            raise ValueError(pictures.shape)
        for name, of in classes.items():
            for column in columns:
                if column[name].shape != (N,):
                    raise ValueError(name)
            if any(column[name].max(initial=-1) >= len(of) for column in columns[:2]):
                raise ValueError(name)
        return Score(
            int(info["iteration"]),
            str(info["prompt"]),
            bool(info["explicit"]),
            pull,
            pictures,
            classes,
            *columns,
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise UserError(f"{path}: is not what --scores writes; move it away.") from None


def by_pull(scores: Sequence[Score]) -> list[tuple[Score, int]]:
    """All recorded images (score, n), the one with the largest share of its iteration's pull first."""
    images = [(score, n) for score in scores for n in range(len(score.pull)) if np.isfinite(score.pull).all()]
    return sorted(images, key=lambda image: (-image[0].share[image[1]], image[0].iteration, image[1]))


def picture_of(score: Score, n: int) -> Image.Image:
    """The thumbnail of image n."""
    return Image.fromarray(score.pictures[n])


def score_sheet(images: Sequence[tuple[Score, int]]) -> Image.Image:
    """The images that pulled most and least; a bar below each is as long as its share of the pull is large."""
    most = images[: min(SHOWN, -(-len(images) // 2))]
    blocks = [("pulled most", most), ("pulled least", images[len(most) :][-SHOWN:])]
    largest, tile = most[0][0].share[most[0][1]], enlarged(picture_of(*most[0]))
    bar, size = max(4, tile.height // 16), max(12, tile.height // 6)
    pitch, line = (tile.width + 4, tile.height + bar + 6), 2 * size
    rows = [-(-len(of) // COLUMNS) for _, of in blocks]
    sheet = Image.new("RGB", (COLUMNS * pitch[0] + 4, sum(rows) * pitch[1] + 2 * line), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for (title, of), count in zip(blocks, rows, strict=True):
        pen.text((4, top + size // 2), title, fill="black", font=font(size))
        top += line
        for k, (score, n) in enumerate(of):
            left, y = 4 + k % COLUMNS * pitch[0], top + k // COLUMNS * pitch[1]
            sheet.paste(enlarged(picture_of(score, n)), (left, y))
            width = score.share[n] / max(largest, 1e-30) * tile.width
            pen.rectangle([left, y + tile.height + 1, left + width, y + tile.height + bar], fill=COLOURS[1])
        top += count * pitch[1]
    return sheet
