"""Pictures of the small world with their labels, as `fairref evaluate --labelled` reads them."""

import csv
import io
from pathlib import Path

from fairref.emoji.pictures import draw
from fairref.emoji.stages import ATTRIBUTES, balanced_scene, generator_for, labels
from fairref.files.datasets import OWN
from fairref.files.images import save_png, to_image
from fairref.files.paths import write_file


def write_labelled(folder: Path, count: int, seed: int = 0) -> None:
    """Writes `count` portraits of people, balanced over all classes and drawn by no model, and labels.csv."""
    scene = balanced_scene(count, generator_for(seed, "labelled", 0), portraits=True)
    truth, text = labels(scene), io.StringIO()
    table = csv.writer(text)
    table.writerow(["file", *ATTRIBUTES])
    folder.mkdir(parents=True, exist_ok=True)
    for i, x in enumerate(draw(scene)):
        name = f"{i:05}.png"
        save_png(to_image(x), folder / name, {})
        classes = {a: names[truth[a][i]] if truth[a][i] >= 0 else "" for a, names in ATTRIBUTES.items()}
        table.writerow([name, *classes.values()])
    write_file(folder / OWN, text.getvalue().encode())
