"""Figure 8 of a report: pictures of the same noise before and after, with the face that counts and what a judge says.

pictures.png holds them as tiles: a row of each model for each prompt, with a JSON text that says what they show.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from fairref.errors import UserError
from fairref.files.images import UNREADABLE, read_image
from fairref.files.paths import once
from fairref.reporting.gallery import data_uri, inside
from fairref.reporting.run_files import N, Run, check
from fairref.reporting.tables import attribute_words, number, short

TEXT = "judged"  # the key of the JSON text
SHAPE = {
    "side": int,  # pixels of a tile
    "labels": [str],  # of the models: a row each
    "classes": {str: [str]},
    "prompts": [
        {
            "prompt": str,
            # of each model's images: the face's edges as shares of the side; attribute -> class, probability
            "rows": [[{"box": ([N, N, N, N], None), "classes": {str: [(str, int), N]}}]],
        }
    ],
}
SIDES = (160, 128, 96, 64, 32)  # pixels that a picture is reduced to, the first that keeps the page small
SHEET = (1600, 1200, 800)  # width of an older run's sheet
BYTES = 3_000_000  # of all pictures of a page
QUALITY = 82


@dataclass(frozen=True)
class Picture:
    """One picture, ready for a page."""

    data: str  # a data URI
    box: tuple[float, float, float, float] | None  # left, top, width, height in hundredths of the side
    seen: list[tuple[int, str, str]]  # of each attribute: class's number, name, probability
    words: str  # for those who can't see it


@dataclass(frozen=True)
class Pair:
    """The same noise before and after."""

    pictures: list[Picture]
    changed: bool  # the judge sees another class


@dataclass(frozen=True)
class Row:
    """The pairs of one prompt."""

    prompt: str
    pairs: list[Pair]


def prompts_of(run: Run, budget: int = BYTES) -> list[Row]:
    """The pictures of each prompt. [] where the run has no pictures.png. Raises UserError."""
    path = run.file("pictures")
    if not path.exists():
        return []
    image, facts = read_image(path), _facts(path)
    side, R = facts["side"], len(facts["labels"])
    n = max((len(row) for of in facts["prompts"] for row in of["rows"]), default=0)
    if side < 1 or image.size != (n * side, len(facts["prompts"]) * R * side):
        raise UserError(f"{path}: its size does not fit what its text says; evaluate again or move it.")
    tiles = {
        (p, r, i): image.crop((i * side, (p * R + r) * side, (i + 1) * side, (p * R + r + 1) * side))
        for p, of in enumerate(facts["prompts"])
        for r in range(R)
        for i in range(len(of["rows"][r]))
    }
    data = encoded(tiles, SIDES, budget)
    return [
        Row(short(of["prompt"]), [_pair(facts, of, p, i, data) for i in range(len(of["rows"][0]))])
        for p, of in enumerate(facts["prompts"])
    ]


def _facts(path):
    """What the JSON text in pictures.png says. Raises UserError."""
    try:
        with Image.open(path, formats=("PNG",)) as file:
            file.load()
            facts = json.loads(file.text[TEXT], object_pairs_hook=once)
    except (*UNREADABLE, RecursionError):
        raise UserError(f"{path}: its text {TEXT!r} is no JSON; evaluate again or move it.") from None
    check(facts, SHAPE, path)
    R = len(facts["labels"])
    for of in facts["prompts"]:
        if not R or len(of["rows"]) != R or len({len(row) for row in of["rows"]}) > 1:
            raise UserError(
                f"{path}: {short(of['prompt'])!r} has no row of each model; evaluate again or move it."
            )
    return facts


def encoded(tiles: Mapping[object, Image.Image], sides: Sequence[int], budget: int) -> dict[object, str]:
    """Data URIs of images, as large as the budget allows."""
    for side in sides:
        data = {key: data_uri(tile, side, "webp", quality=QUALITY) for key, tile in tiles.items()}
        if sum(map(len, data.values())) <= budget:
            return data
    return {}


def _pair(facts, of, p, i, data):
    pictures = []
    for r, label in enumerate(facts["labels"]):
        judged = of["rows"][r][i]
        seen = [
            (_number_of(facts["classes"].get(attribute, []), name), short(str(name)), number(of_class))
            for attribute, (name, of_class) in judged["classes"].items()
        ]
        words = (
            ", ".join(f"{name} with probability {of_class}" for _, name, of_class in seen) or "no face found"
        )
        box = judged["box"]
        if box is not None and None not in box:
            x0, y0, x1, y1 = (100 * edge for edge in inside(box))
            box = (round(x0, 1), round(y0, 1), round(max(x1 - x0, 0), 1), round(max(y1 - y0, 0), 1))
        else:
            box = None
        pictures.append(Picture(data.get((p, r, i), ""), box, seen, f"{short(label)}: {words}"))
    shown = [[name for _, name, _ in picture.seen] for picture in pictures]
    return Pair(pictures, any(names != shown[0] for names in shown))


def _number_of(classes, name):
    return classes.index(name) if name in classes else -1


def sheet_of(run: Run, budget: int = BYTES) -> str:
    """before_after.png as a data URI, for a run without pictures.png; empty where there is none. Raises UserError."""
    path = run.file("sheet")
    if not path.exists():
        return ""
    return encoded({path: read_image(path)}, SHEET, budget).get(path, "")


def keys_of(run: Run) -> list[str]:
    """The attributes whose classes stand below the pictures."""
    target = run.settings["target"]
    return [attribute_words(name) for name in (target or {"classes": {}})["classes"]]
