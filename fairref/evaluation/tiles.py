"""Images before and after as tiles of one PNG, whose text says what the evaluation classifier sees in each.

A report shows them as figure 8: the face that counts, its class and the class's probability; the text says how they
were made, too. n images of a prompt.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.evaluation.judging import EvaluationSettings, draw_images, logits_of
from fairref.evaluation.parts import PromptPart, Report
from fairref.files.images import save_png, to_image
from fairref.generation.views import faces_of, scatter_to_images
from fairref.prompts.sets import evenly

TILES = "pictures.png"
GRID = (6, 12)  # prompts, images of each
SIDE = 160  # pixels of a tile; larger images are reduced to it
JUDGE = "classifier"


def draw_tiles(
    settings: EvaluationSettings,
    models: Mapping[str, Bundle],
    parts: Sequence[PromptPart],
    made: Report,
    path: Path,
) -> None:
    """Draws some prompts by two models, by label, from the same noise, and writes them as `save_tiles`; what
    the file shows already it does not draw again."""
    short = {prompt: part.concept.short(prompt) for part in parts for prompt in part.prompts}
    drawn = evenly(tuple(short), GRID[0])
    names = [short[prompt] for prompt in drawn]
    if _said(path) == (made, list(settings.target.classes), names):
        return
    images = [
        [draw_images(settings, model, prompt, GRID[1]) for model in models.values()] for prompt in drawn
    ]
    save_tiles(settings, tuple(models), dict(zip(names, images, strict=True)), made, path)


def _said(path):
    """How the images of a file were made, of which attributes and prompts; None where it does not say."""
    try:
        with Image.open(path, formats=("PNG",)) as file:
            facts = json.loads(file.text["judged"])
        return facts["made"], list(facts["classes"]), [of["prompt"] for of in facts["prompts"]]
    except (OSError, LookupError, TypeError, ValueError):
        return None


def save_tiles(
    settings: EvaluationSettings,
    labels: Sequence[str],
    drawn: Mapping[str, Sequence[Tensor]],
    made: Report | None,
    path: Path,
) -> None:
    """Writes images (n, 3, H, W) of each prompt by each model, which `labels` name: a row of tiles each. `made` is what
    a report on the last model says of it."""
    rows = [x for of_prompt in drawn.values() for x in of_prompt]
    side = min(SIDE, rows[0].shape[-1])
    sheet = Image.new("RGB", (max(map(len, rows)) * side, len(rows) * side), "white")
    for r, x in enumerate(rows):
        for i, tile in enumerate(map(to_image, x)):
            tile = tile if tile.width == side else tile.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(tile, (i * side, r * side))
    said = [{"prompt": prompt, "rows": [seen_in(settings, x) for x in of]} for prompt, of in drawn.items()]
    facts = {"side": side, "labels": list(labels), "classes": settings.target.classes, "made": made}
    save_png(sheet, path, {"judged": json.dumps({**facts, "prompts": said})})


@torch.no_grad()
def seen_in(settings: EvaluationSettings, x: Tensor) -> list[dict[str, object]]:
    """Of each image "box", the face's edges as shares of the image, and "classes": attribute -> class, probability.

    The box is None without a face or a detector; an attribute that the classifier can't tell is left out.
    """
    bundle, size = settings.bundle, x.shape[-1]
    faces = faces_of(bundle, x)
    has_face = None if faces is None else faces.has_face
    boxes = None if faces is None else scatter_to_images(faces.boxes.float(), has_face, torch.nan) / size
    logits = logits_of(bundle, JUDGE, x, faces)
    p = {
        name: scatter_to_images(logits[name].softmax(1).float(), has_face, torch.nan)
        for name in settings.target.classes
    }
    said = []
    for i in range(len(x)):
        box = [] if boxes is None else [round(edge, 4) for edge in boxes[i].tolist() if math.isfinite(edge)]
        seen = {
            name: [settings.target.classes[name][int(rows[i].argmax())], round(float(rows[i].max()), 4)]
            for name, rows in p.items()
            if rows[i].isfinite().all()
        }
        said.append({"box": box or None, "classes": seen})
    return said
