"""What pulled: how much each image of an iteration moves the adapter (`--scores`; docs/derivation.md, "Single images").

The pull of an image is the norm of its row of the gradient matrix, from the path that the iteration has stored. It is
recorded at every so many iterations, beside thumbnails and what the losses saw. N images of one prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from fairref.bundle.loading import Bundle
from fairref.errors import UserError
from fairref.fairness.losses import confident_targets
from fairref.files.images import save_png, to_image
from fairref.files.sheets import COLOURS, enlarged, font
from fairref.files.weights import read, read_info, write
from fairref.generation.rollout import embed
from fairref.generation.views import scatter_to_images
from fairref.progress import note
from fairref.training.setup import Setup, Task
from fairref.training.step import Rollout, Watch, sampling_gradient
from fairref.training.terms import ImagePair

FOLDER, SHEET, FORMAT = "scores", "scores.png", "fairref-scores-1"
SIDE = 64  # pixels of a thumbnail, at most
SHOWN, COLUMNS = 24, 12  # images that pulled most, and least, on the sheet and in the report
# of the rows' sum from the batch's gradient: both sum the same products in another order and other batches, with
# mantissas of 10 bits (TF32), 7 and 10
MOST_APART = {torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Score:
    """The images of one recorded iteration."""

    iteration: int
    prompt: str
    explicit: bool  # the prompt names a class
    pull: np.ndarray  # (N,) norms of the rows of the gradient matrix
    pictures: Tensor  # (N, 3, h, w) uint8
    classes: dict[str, list[str]]
    shown: dict[str, np.ndarray]  # attribute -> (N,) the class that the image shows; -1: no face
    target: dict[str, np.ndarray]  # attribute -> (N,) the class that it is told; -1: none that is sure enough
    confidence: dict[str, np.ndarray]  # attribute -> (N,) c, the largest q

    @property
    def share(self) -> np.ndarray:
        """(N,) of the iteration's pull."""
        return self.pull / max(self.pull.sum(), 1e-30)


@dataclass(frozen=True)
class Recorder:
    """Records a run's scores in its folder."""

    setup: Setup
    model: Bundle  # the adapted one
    folder: Path

    def watch(self, parameters: Sequence[nn.Parameter], i: int) -> Watch | None:
        """What iteration i shows its parts to; None where its scores are not due."""
        every = self.setup.recipe.scores
        return partial(self._record, parameters, i) if every and i % every == 0 else None

    def _record(self, parameters, i, task, drawn, pair, q, g, gradient):
        setup, N = self.setup, self.setup.recipe.batch
        rows = gradient_rows(setup, self.model, parameters, i, task, drawn, g)  # (n, P)
        batch = torch.cat([part.flatten() for part in gradient]).to(rows)
        apart = float(
            torch.linalg.vector_norm(rows.sum(0) - batch) / torch.linalg.vector_norm(batch).clamp(min=1e-30)
        )
        if apart > MOST_APART.get(_dtype_of(self.model), 1e-6) and torch.isfinite(batch).all():
            note(
                f"iteration {i}: the images' gradients miss the batch's by {apart:.2g} of it: its scores are unsure."
            )
        columns = {"pull": torch.linalg.vector_norm(rows, dim=1), "pictures": thumbnails(pair.x)}
        columns |= seen_by_losses(setup, pair, q)
        whole = {name: setup.processes.gather(column, N).cpu() for name, column in columns.items()}
        if setup.processes.first:
            about = {"iteration": i, "prompt": task.prompt, "explicit": task.explicit, "apart": apart}
            path = self.folder / FOLDER / f"{i:06d}.safetensors"
            path.parent.mkdir(exist_ok=True)
            write(
                path,
                whole,
                {**about, "classes": setup.target.classes if setup.target else {}, "format": FORMAT},
            )

    def write_sheet(self) -> None:
        """Writes what has been recorded as a picture; the first process alone."""
        if self.setup.processes.first and (images := by_pull(read_scores(self.folder))):
            text = {"scores": f"{len(images)} images; the bar below one is its share of its iteration's pull"}
            save_png(score_sheet(images), self.folder / SHEET, text)


def _dtype_of(model: Bundle) -> torch.dtype:
    """Of the networks' numbers."""
    return next(model.unet.parameters()).dtype


def gradient_rows(
    setup: Setup,
    model: Bundle,
    parameters: Sequence[nn.Parameter],
    i: int,
    task: Task,
    drawn: Rollout,
    g: Tensor,
) -> Tensor:
    """(n, P): each image's part of dL/dparameters, by the run's own gradient mode, from the stored path.

    Row n is what `sampling_gradient` makes of image n alone; the rows sum to the batch's gradient.
    """
    rows = []
    for n in range(len(g)):
        path = [step._replace(z=step.z[n : n + 1]) for step in drawn.path]
        text = embed(model, task.prompt)  # its graph serves once
        of_image = sampling_gradient(setup, drawn._replace(path=path), g[n : n + 1], text, parameters, i)
        rows.append(torch.cat([part.flatten() for part in of_image]))
    return torch.stack(rows) if rows else torch.zeros(0, sum(p.numel() for p in parameters), device=g.device)


def thumbnails(x: Tensor) -> Tensor:
    """Images (n, 3, H, W) in [-1, 1] -> uint8, SIDE pixels at most."""
    scale = min(1.0, SIDE / max(x.shape[-2:]))
    small = F.interpolate(x.float(), scale_factor=scale, mode="area") if scale < 1 else x.float()
    return ((small.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def seen_by_losses(setup: Setup, pair: ImagePair, q: dict[str, Tensor]) -> dict[str, Tensor]:
    """ "shown NAME", "target NAME" and "confidence NAME" (n,) of each attribute, as `Score` has them."""
    has_face = None if pair.faces is None else pair.faces.has_face
    columns = {}
    with torch.no_grad():
        logits = setup.classify(pair.x, pair.faces) if q else {}
    for name, of_attribute in q.items():
        shown = scatter_to_images(logits[name].argmax(1) + 1, has_face) - 1
        y, confident = confident_targets(of_attribute, setup.recipe.C)
        columns[f"shown {name}"] = shown.cpu()
        columns[f"target {name}"] = torch.where(confident, y, -1).cpu()
        columns[f"confidence {name}"] = of_attribute.max(1).values.cpu()
    return columns


def read_scores(folder: Path) -> list[Score]:
    """The recorded iterations of a run, in their order. Raises UserError, which names a damaged file."""
    return [_read(path) for path in sorted((folder / FOLDER).glob("*.safetensors"))]


def _read(path):
    tensors, info = read(path), read_info(path)
    try:
        if info["format"] != FORMAT:
            raise KeyError(info["format"])
        classes = {str(name): [str(c) for c in of] for name, of in info["classes"].items()}
        columns = [
            {name: tensors[f"{kind} {name}"].numpy() for name in classes}
            for kind in ("shown", "target", "confidence")
        ]
        pull, pictures = tensors["pull"].double().numpy(), tensors["pictures"]
        score = Score(
            int(info["iteration"]),
            str(info["prompt"]),
            bool(info["explicit"]),
            pull,
            pictures,
            classes,
            *columns,
        )
        N = len(pull)
        if pictures.dtype != torch.uint8 or pictures.dim() != 4 or pictures.shape[:2] != (N, 3):
            raise ValueError(pictures.shape)
        if any(of.shape != (N,) for column in columns for of in column.values()):
            raise ValueError(N)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: is not what --scores writes; move it away.") from None
    return score


def by_pull(scores: Sequence[Score]) -> list[tuple[Score, int]]:
    """All recorded images (score, n), the one with the largest share of its iteration's pull first."""
    images = [(score, n) for score in scores for n in range(len(score.pull)) if np.isfinite(score.pull).all()]
    return sorted(images, key=lambda image: (-image[0].share[image[1]], image[0].iteration, image[1]))


def picture_of(score: Score, n: int) -> Image.Image:
    """The thumbnail of image n."""
    return to_image(score.pictures[n].float() / 127.5 - 1)


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
