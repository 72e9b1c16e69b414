"""Sample grids of a run: the same noise before and after, face boxes, and each image's classes as bars.

N images of a prompt, A attributes, K_a classes of each.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.fairness.faces import Faces
from fairref.files.images import save_png, to_image
from fairref.files.sheets import COLOURS, Pair, enlarged, sheet
from fairref.generation.drawing import fixed_images
from fairref.generation.views import classify, faces_of, scatter_to_images
from fairref.training.setup import Setup
from fairref.training.validation import SEED, drawing_of

PROMPTS, IMAGES = 4, 6  # prompts of a grid, images of each
BAR = 7  # pixels: height of an attribute's bar below an image of SIDE, more below a larger one


def draw_grid(setup: Setup, model: Bundle, path: Path, iteration: int) -> None:
    """Writes the grid: of each prompt a row of the frozen model's images, and below it a row of the adapted one's."""
    prompts, how = setup.validation[:PROMPTS], drawing_of(setup.recipe)
    pairs = [
        Pair(
            prompt,
            tuple(
                marked(setup, fixed_images(drawer, SEED, prompt, range(IMAGES), how))
                for drawer in (setup.bundle, model)
            ),
        )
        for prompt in prompts
    ]
    classes = setup.target.classes if setup.target else {}
    notes = [f"Before finetuning, and after iteration {iteration}, from the same noise."]
    if classes:
        bars = "Bars" if len(classes) == 1 else f"Bars ({', '.join(classes)})"
        notes.append(
            f"{bars} below an image: the class that the evaluation classifier sees, its length the probability."
        )
    image, _ = sheet(pairs, notes, classes)
    path.parent.mkdir(exist_ok=True)
    text = {"prompts": "\n".join(prompts), "rows": "before and after of each prompt, same noise"}
    save_png(image, path, {**text, "iteration": str(iteration)})


@torch.no_grad()
def marked(setup: Setup, x: Tensor) -> list[Image.Image]:
    """Images x (N, 3, H, W) with the box of the face that counts and, below, a bar for each attribute.

    The bar's colour is the class that the evaluation classifier sees, its length the probability; without a face
    there is none. Without a target images stay as they are.
    """
    if setup.target is None:
        return [enlarged(to_image(image)) for image in x]
    faces = faces_of(setup.bundle, x)
    logits = classify(setup.bundle.classifiers["evaluate"], tuple(setup.target.classes), x, faces)
    has_face = None if faces is None else faces.has_face
    # (probabilities, classes) for each attribute
    bars = [
        [scatter_to_images(part, has_face).tolist() for part in of_attribute.softmax(1).max(1)]
        for of_attribute in logits.values()
    ]
    boxes = _boxes(faces, len(x))
    return [
        _marked(image, boxes[n], [(p[n], k[n]) for p, k in bars]) for n, image in enumerate(map(to_image, x))
    ]


def _boxes(faces: Faces | None, N: int) -> list[list[float] | None]:
    """Each image's box, None where there is none."""
    if faces is None:
        return [None] * N
    boxes = iter(faces.boxes.tolist())
    return [next(boxes) if has_face else None for has_face in faces.has_face.tolist()]


def _marked(
    image: Image.Image, box: Sequence[float] | None, bars: Sequence[tuple[float, int]]
) -> Image.Image:
    large = enlarged(image)
    scale, (width, height) = large.height // image.height, large.size
    thick = max(BAR, height // 14)
    canvas = Image.new("RGB", (width, height + thick * len(bars)), "white")
    canvas.paste(large)
    pen = ImageDraw.Draw(canvas)
    if box is not None:
        pen.rectangle([edge * scale for edge in box], outline="white", width=max(2, height // 64))
    for a, (probability, k) in enumerate(bars):
        if probability > 0:
            top = height + a * thick
            pen.rectangle(
                [0, top + 1, probability * (width - 1), top + thick - 2], fill=COLOURS[k % len(COLOURS)]
            )
    return canvas
