"""Fig 8: images of the same noise before and after, the face that counts, its class and the class's probability."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from fairref.reporting.frame import BOLD, MARGIN, head
from fairref.reporting.svg import (
    LINE,
    SERIES,
    SIZE,
    coloured,
    document,
    element,
    folded,
    label,
    text_width,
    words,
)

WIDTH = 700
NAMES = 52  # width of the column with the models' names
GAP = 6  # between images
SMALL = 9  # text below an image
BAR = 4  # height of the bar of a probability
SHARPNESS = 2  # pixels of an embedded image, at most, for each pixel of its place


@dataclass(frozen=True)
class Picture:
    """One image, and what a judge sees in it."""

    image: Image.Image
    box: Sequence[float] | None  # left, top, right, bottom of the face, as shares of the image
    seen: Mapping[
        str, tuple[str, float]
    ]  # attribute -> class, probability; one that it can't tell is left out


def gallery(
    prompts: Mapping[str, Mapping[str, Sequence[Picture]]],
    classes: Mapping[str, Sequence[str]],
    title: str,
    note: str,
) -> str:
    """Return a row of pictures for each prompt and model: prompt -> name of the model -> pictures of the same noise.

    `classes` of each attribute. A bar below a picture is as long as the probability is large.
    """
    names = [(attribute, name) for attribute, of in classes.items() for name in of]
    colours = {name: f"c{i % SERIES}" for i, name in enumerate(names)}
    above, top = head(title, WIDTH, note, [(name, colours[attribute, name]) for attribute, name in names])
    n = max((len(row) for rows in prompts.values() for row in rows.values()), default=1)
    side = (WIDTH - 2 * MARGIN - NAMES - (n - 1) * GAP) / n
    pitch = side + len(classes) * (BAR + LINE * SMALL + 2) + GAP
    body, about, y = [above], [note], top
    for prompt, rows in prompts.items():
        for line in folded(prompt, (WIDTH - 2 * MARGIN) / BOLD):
            heading = label(MARGIN, y + LINE * SIZE / 2, line, (WIDTH - 2 * MARGIN) / BOLD, font_weight="600")
            body.append(coloured("ink", heading))
            y += LINE * SIZE
        y += 3
        for name, row in rows.items():
            body.append(coloured("ink", label(MARGIN, y + side / 2, name, NAMES - 6)))
            for i, picture in enumerate(row):
                about.append(f"{prompt}, image {i + 1}, {name}: {_said(picture)}.")
                cell = _cell(picture, MARGIN + NAMES + i * (side + GAP), y, side, classes, colours)
                body.append(element("g", element("title", words(about[-1])), *cell))
            y += pitch
        y += GAP
    return document(WIDTH, y + MARGIN - GAP, title, " ".join(about), *body)


def _said(picture):
    seen = ", ".join(f"{name} {probability:.0%}" for name, probability in picture.seen.values())
    return seen or "none"


def _cell(picture, left, top, side, classes, colours):
    """A picture with its face's box and, for each attribute, a bar with class and probability below it."""
    height = side * picture.image.height / picture.image.width
    yield element(
        "image",
        x=left,
        y=top,
        width=side,
        height=height,
        href=data_uri(picture.image, round(SHARPNESS * side)),
    )
    if picture.box is not None:
        edges = inside(picture.box)
        x0, x1 = (left + side * edge for edge in edges[::2])
        y0, y1 = (top + height * edge for edge in edges[1::2])
        box = {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0, "fill": "none"}
        yield element("rect", **box, stroke="#ffffff", stroke_width=3)  # seen on dark and on pale images
        yield element("rect", **box, stroke="#1f2328", stroke_width=1.2)
    y = top + side + 3
    for attribute in classes:
        name, probability = picture.seen.get(attribute, ("none", None))
        number = "" if probability is None else f"{probability:.0%}"
        middle, room = y + BAR + LINE * SMALL / 2, side - text_width(number, SMALL) - 3
        if probability is not None:
            bar = element("rect", x=left, y=y, width=probability * side, height=BAR, fill="currentColor")
            yield coloured(colours[attribute, name], bar)
        texts = (
            label(left, middle, name, room, SMALL),
            label(left + side, middle, number, size=SMALL, text_anchor="end") if number else "",
        )
        yield coloured("ink", *texts)
        y += BAR + LINE * SMALL + 2


def data_uri(image: Image.Image, width: int, kind: str = "png", **options: object) -> str:
    """Return an image as a data URI, reduced to this width where it is wider."""
    if image.width > width:
        image = image.resize((width, round(width * image.height / image.width)), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def inside(box: Sequence[float]) -> list[float]:
    """Return a box's edges, shares of its image, without what is outside of that."""
    return [min(max(edge, 0.0), 1.0) for edge in box]
