"""Labels of some judged images, by hand or by another judge: `--labels FILE.csv`.

The columns are prompt, image, and one for each attribute that is labelled. `prompt` is a prompt or its name in reports,
`image` the number of its noise, or in a folder of images the file's name. A blank is no label. A column `model`, as in
judged.csv, says whose image it is; without it they are the last model's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fairref.errors import UserError
from fairref.evaluation.confusion import Confusions, confusions
from fairref.evaluation.statistics import JudgedImages
from fairref.files.datasets import class_index, read_table
from fairref.files.paths import expanded

BY_HAND = "labels of these images"
Labels = dict[str, list[np.ndarray]]  # attribute -> of each of P prompts (n_P,) class indices, -1: no label


def read_labels(
    path: str | Path,
    classes: dict[str, tuple[str, ...]],
    prompts: Sequence[Sequence[str]],
    images: Sequence[Sequence[str]],
    models: Sequence[str] = ("",),
) -> dict[str, Labels]:
    """The labels of P prompts' images, by the model that drew them: of `models` the last, where the table has no column
    for it. `prompts`: what each prompt may be called; `images`: what its images are called. Raises UserError."""
    path = expanded(path)
    if not path.is_file():
        columns = ", ".join(["prompt", "image", *classes])
        raise UserError(f"{path}: no such file of labels; write one with the columns {columns}.")
    table = list(read_table(path, {"prompt", "image"}))
    names = [name for name in classes if table and name in table[0][1]]
    if not names:
        raise UserError(f"{path}: has no row, or no column {' or '.join(classes)}; label some images.")
    labels: dict[str, Labels] = {}
    prompt_of = {called: p for p, of_prompt in enumerate(prompts) for called in of_prompt}
    seen = set()
    for line, row in table:
        where = f"{path}, line {line}"
        p, image = prompt_of.get(row["prompt"] or ""), (row["image"] or "").strip()
        model = row.get("model", models[-1])
        if p is None or image not in images[p] or model not in models:
            what = f"prompt {row['prompt']!r}" if p is None else f"image {image!r} of {row['prompt']!r}"
            by = "" if model in models else f" by {model!r}"
            raise UserError(f"{where}: {what}{by} is not judged here; correct or delete the line.")
        if (model, p, image) in seen:
            raise UserError(f"{where}: the image is in the table twice; keep one line of it.")
        seen.add((model, p, image))
        if model not in labels:
            labels[model] = {name: [np.full(len(of), -1) for of in images] for name in names}
        for name in names:
            labels[model][name][p][images[p].index(image)] = class_index(
                row[name], name, classes[name], where
            )
    return labels


def on_labels(
    labels: Labels, judged: Sequence[JudgedImages], classes: Mapping[str, Sequence[str]], source: str
) -> Confusions:
    """Each judge's confusions on those of P prompts' images that have a label."""
    truth = {name: np.concatenate(of_prompts) for name, of_prompts in labels.items()}
    said = {
        judge: {name: torch.cat([s.classes[judge][name] for s in judged]) for name in known}
        for judge, known in judged[0].classes.items()
    }
    return confusions(truth, said, classes, source)
