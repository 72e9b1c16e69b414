"""Sample grids of a run: the same noise before and after, face boxes, and each picture's classes as bars.

N images of a prompt, A attributes, K_a classes of each.
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fairref.bundle import Bundle
from fairref.fairness.faces import Faces
from fairref.finetune.looking import classify, faces_of, spread
from fairref.finetune.rollout import fixed_pictures
from fairref.finetune.setup import Setup
from fairref.finetune.validation import SEED
from fairref.images import save_png, to_image

PROMPTS, IMAGES = 4, 6  # prompts of a grid, images of each
SIDE = 96  # pixels that a small picture is enlarged to, at least
BAR, GAP, HEAD = 7, 3, 16  # pixels: height of an attribute's bar, distance of pictures, height of the legend
COLOURS = ("#ee6677", "#4477aa", "#228833", "#ccbb44", "#aa3377", "#66ccee")


def draw_grid(setup: Setup, model: Bundle, path: Path, iteration: int) -> None:
    """Writes the grid: of each prompt a row of the frozen model's pictures, and below it a row of the adapted one's."""
    recipe, prompts = setup.recipe, setup.validation[:PROMPTS]
    rows = []
    for prompt in prompts:
        for drawer in (setup.bundle, model):
            how = (recipe.eval_steps, recipe.eval_guidance, recipe.end)
            rows.append(marked(setup, fixed_pictures(drawer, SEED, prompt, range(IMAGES), *how)))
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (IMAGES * (width + GAP), HEAD + len(rows) * (height + GAP)), "white")
    _legend(sheet, setup.target.classes)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet.paste(picture, (c * (width + GAP), HEAD + r * (height + GAP)))
    path.parent.mkdir(exist_ok=True)
    text = {"prompts": "\n".join(prompts), "rows": "before and after of each prompt, same noise"}
    save_png(sheet, path, {**text, "iteration": str(iteration)})


@torch.no_grad()
def marked(setup: Setup, x: Tensor) -> list[Image.Image]:
    """Pictures x (N, 3, H, W) with the box of the face that counts and, below, a bar for each attribute.

    The bar's colour is the class that the evaluation classifier sees, its length the probability; without a face
    there is none.
    """
    faces = faces_of(setup.bundle, x)
    logits = classify(setup.bundle.classifiers["evaluate"], tuple(setup.target.classes), x, faces)
    found = None if faces is None else faces.found
    # (probabilities, classes) for each attribute
    bars = [[spread(part, found).tolist() for part in of_one.softmax(1).max(1)] for of_one in logits.values()]
    boxes = _boxes(faces, len(x))
    return [
        _marked(picture, boxes[n], [(p[n], k[n]) for p, k in bars])
        for n, picture in enumerate(map(to_image, x))
    ]


def _boxes(faces: Faces | None, N: int) -> list[list | None]:
    """Each image's box, None where there is none."""
    if faces is None:
        return [None] * N
    boxes = iter(faces.boxes.tolist())
    return [next(boxes) if found else None for found in faces.found.tolist()]


def _marked(picture, box, bars):
    scale = max(1, -(-SIDE // picture.height))
    width, height = picture.width * scale, picture.height * scale
    sheet = Image.new("RGB", (width, height + BAR * len(bars)), "white")
    sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST))
    pen = ImageDraw.Draw(sheet)
    if box is not None:
        pen.rectangle([edge * scale for edge in box], outline="white", width=2)
    for a, (probability, k) in enumerate(bars):
        if probability > 0:
            top = height + a * BAR
            pen.rectangle(
                [0, top + 1, probability * (width - 1), top + BAR - 2], fill=COLOURS[k % len(COLOURS)]
            )
    return sheet


def _legend(sheet, classes):
    pen, left = ImageDraw.Draw(sheet), 2
    for attribute, names in classes.items():
        pen.text((left, 3), attribute, fill="black")
        left += 6 + int(pen.textlength(attribute))
        for k, name in enumerate(names):
            pen.rectangle([left, 4, left + 8, 12], fill=COLOURS[k % len(COLOURS)])
            pen.text((left + 12, 3), name, fill="black")
            left += 20 + int(pen.textlength(name))
        left += 16
