"""judged.csv: what each judge said of each image, one row an image."""

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path

from fairref.evaluation.judging import EvaluationSettings
from fairref.evaluation.parts import Evaluated, PromptPart
from fairref.files.paths import write_file

NAME = "judged.csv"
BOX = ("left", "top", "right", "bottom")  # of the face that counts, in pixels
Row = dict[str, object]


def rows_of(
    settings: EvaluationSettings, label: str, part: PromptPart, evaluated: Evaluated
) -> Iterator[Row]:
    """One row an image; `asked` is the class that its prompt names, where it names one."""
    classes = settings.target.classes
    asked = [(prompt, "") for prompt in part.prompts]
    asked += [(prompt, f"{name}={classes[name][k]}") for prompt, name, k in evaluated.asked]
    for (prompt, named), judged in zip(asked, [*evaluated.judged, *evaluated.explicit], strict=True):
        about = {
            "model": label,
            "concept": part.concept.name,
            "part": part.part,
            "prompt": prompt,
            "asked": named,
        }
        for image in range(len(judged)):
            yield {**about, "image": image, "seed": settings.seed, **_said(judged, classes, image)}


def _said(judged, classes, image):
    """Each judge's class, empty where it can't tell, and its probabilities, where it has some; the face's box."""
    row = {}
    for judge, of_judge in judged.classes.items():
        for name, rows in of_judge.items():
            row[f"{judge} {name}"] = classes[name][rows[image]] if rows[image] >= 0 else ""
        for name, rows in judged.probabilities.get(judge, {}).items():
            for what, p in zip(classes[name], rows[image].tolist(), strict=True):
                row[f"{judge} {name} {what}"] = _number(p, 4)
    for side, pixel in zip(BOX, () if judged.boxes is None else judged.boxes[image].tolist(), strict=False):
        row[side] = _number(pixel, 1)
    return row


def _number(value, digits):
    return "" if math.isnan(value) else round(value, digits)


def write_rows(path: Path, rows: list[Row]) -> None:
    """Writes the table, whole or not at all."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_file(path, text.getvalue().encode())
