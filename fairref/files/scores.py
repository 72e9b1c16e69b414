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
from fairref.files.sheets import shown as printable

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
    """The images (score, n) of neutral prompts, the one with the largest pull first.

    Explicit prompts have another loss, so that their pictures are left out.
    """
    used = [score for score in scores if not score.explicit and np.isfinite(score.pull).all()]
    images = [(score, n) for score in used for n in range(len(score.pull))]
    return sorted(images, key=lambda image: (-image[0].pull[image[1]], image[0].iteration, image[1]))


def most_and_least(images: Sequence[tuple[Score, int]]) -> dict[str, list[tuple[Score, int]]]:
    """The first and the last of `by_pull`, none twice; each begins with its extreme."""
    most = list(images[: min(SHOWN, -(-len(images) // 2))])
    return {"Pulled most": most, "Pulled least": list(images[len(most) :][-SHOWN:][::-1])}


def picture_of(score: Score, n: int) -> Image.Image:
    """The thumbnail of image n."""
    return Image.fromarray(score.pictures[n])


def line_of(score: Score, n: int) -> str:
    """Image n in a few words: its pull, what it shows, what it is told and how surely, as in 0.16: woman > man .86."""
    words = []
    for name, classes in score.classes.items():
        shown, told = score.shown[name][n], score.target[name][n]
        words.append(classes[shown] if shown >= 0 else "no face")
        if told >= 0:
            words[-1] += f" > {classes[told]} {score.confidence[name][n]:.2f}".replace(" 0.", " .")
    return f"{score.pull[n]:.2g}: {', '.join(words)}"


def score_sheet(images: Sequence[tuple[Score, int]]) -> Image.Image:
    """The images that pulled most and least, each above a bar as long as its pull is large and `line_of` it."""
    blocks = most_and_least(images).items()
    first, n = images[0]
    largest, tile = first.pull[n], enlarged(picture_of(first, n))
    bar, size = max(4, tile.height // 16), max(12, tile.height // 6)
    lines = [[printable(line_of(*image)) for image in of] for _, of in blocks]
    small = _fitting([text for of in lines for text in of], max(10, tile.width // 10), tile.width + 4)
    pitch, line = (tile.width + 8, tile.height + bar + small + 10), 2 * size
    rows = [-(-len(of) // COLUMNS) for _, of in blocks]
    sheet = Image.new("RGB", (COLUMNS * pitch[0] + 4, sum(rows) * pitch[1] + 2 * line), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for (title, of), texts, count in zip(blocks, lines, rows, strict=True):
        pen.text((4, top + size // 2), f"{title}; a full bar: {largest:.2g}", fill="black", font=font(size))
        top += line
        for k, ((score, n), text) in enumerate(zip(of, texts, strict=True)):
            left, y = 4 + k % COLUMNS * pitch[0], top + k // COLUMNS * pitch[1]
            sheet.paste(enlarged(picture_of(score, n)), (left, y))
            width = score.pull[n] / max(largest, 1e-30) * tile.width
            pen.rectangle([left, y + tile.height + 1, left + width, y + tile.height + bar], fill=COLOURS[1])
            while font(small).getlength(text) > tile.width + 4:
                text = text[:-1]
            pen.text((left, y + tile.height + bar + 2), text, fill="black", font=font(small))
        top += count * pitch[1]
    return sheet


def _fitting(texts, size, width):
    """The size of font in which all texts fit; 7 at least."""
    while size > 7 and any(font(size).getlength(text) > width for text in texts):
        size -= 1
    return size
