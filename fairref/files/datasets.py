"""Read CelebA and FairFace, the face photographs that classifiers are trained on, as they are distributed.

CelebA: list_attr_celeba.txt, list_eval_partition.txt, and the images in img_align_celeba/.
FairFace: fairface_label_train.csv, fairface_label_val.csv, whose first column names the images.

Rows that can't be used are left out and listed, or they are an error (`strict`).
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fairref.errors import UserError
from fairref.files.paths import expanded

CLASSES = {
    "gender": ("woman", "man"),
    "race": ("WMELH", "Asian", "Black", "Indian"),
    "age": ("young", "old"),  # up to 39, over 39
}
# docs/method.md §6: White, Middle Eastern and Latino Hispanic are one class, East and Southeast Asian another.
FAIRFACE = {
    "gender": {"Female": "woman", "Male": "man"},
    "race": {
        "White": "WMELH",
        "Middle Eastern": "WMELH",
        "Latino_Hispanic": "WMELH",
        "East Asian": "Asian",
        "Southeast Asian": "Asian",
        "Black": "Black",
        "Indian": "Indian",
    },
    "age": {
        **dict.fromkeys(("0-2", "3-9", "10-19", "20-29", "30-39"), "young"),
        **dict.fromkeys(("40-49", "50-59", "60-69", "more than 70"), "old"),
    },
}
CELEBA = {"gender": ("Male", "man", "woman"), "age": ("Young", "young", "old")}  # column, class of 1, of -1
PARTITION = {"0": "train", "1": "validation", "2": "test"}
CELEBA_FILES = ("list_attr_celeba.txt", "list_eval_partition.txt")
FAIRFACE_FILES = {"train": "fairface_label_train.csv", "validation": "fairface_label_val.csv"}
SHOWN = 3  # bad rows that a message names


@dataclass(frozen=True)
class Row:
    """One photograph: its file, and the index of its class in each attribute that was asked for."""

    file: Path
    labels: tuple[int, ...]


@dataclass
class Photographs:
    """A data set: its usable rows by part, and the reasons why the others can't be used."""

    attributes: dict[str, tuple[str, ...]]
    parts: dict[str, list[Row]] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)  # "file, line: the reason"

    def add(self, part: str, file: Path, labels: dict[str, str | None], where: str) -> None:
        """Add a row to a part, or add to `bad` why it can't be used. `where`: file and line."""
        unknown = [name for name in self.attributes if labels.get(name) is None]
        if unknown:
            self.bad.append(f"{where}: no {unknown[0]} that is known")
        elif not file.is_file():
            self.bad.append(f"{where}: {file.name} is missing")
        else:
            indices = (self.attributes[name].index(labels[name]) for name in self.attributes)
            self.parts.setdefault(part, []).append(Row(file, tuple(indices)))


def read_photographs(data: str, root: str | Path, attributes: list[str], strict: bool = False) -> Photographs:
    """Return the rows of `data` ("celeba" or "fairface") in the folder `root`. Raises UserError.

    `attributes` are names of CLASSES that the set labels. With `strict` a single bad row is an error.
    """
    root, readers = expanded(root), {"celeba": _read_celeba, "fairface": _read_fairface}
    if data not in readers:
        raise UserError(f"--data is {data!r}; expected {' or '.join(readers)}.")
    labelled = CELEBA if data == "celeba" else FAIRFACE
    for name in attributes:
        if name not in labelled:
            raise UserError(f"{data} has no labels of {name!r}; it has {', '.join(labelled)}.")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the one that {data} was unpacked to.")
    photographs = Photographs({name: CLASSES[name] for name in attributes})
    readers[data](root, photographs)
    if photographs.bad and strict:
        raise UserError(f"{root}: {describe_bad(photographs.bad)}; mend them or leave --strict out.")
    if not photographs.parts.get("train"):
        bad = f" ({describe_bad(photographs.bad)})" if photographs.bad else ""
        raise UserError(f"{root}: no usable training image{bad}; check the folder.")
    return photographs


def describe_bad(bad: list[str]) -> str:
    """Return how many rows are bad, and the first few."""
    rest = f", and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return f"{len(bad)} bad row{'s' * (len(bad) > 1)}: {'; '.join(bad[:SHOWN])}{rest}"


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; put it there as the data set distributes it.")
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text; get it again.") from None


def _read_celeba(root: Path, photographs: Photographs) -> None:
    labels_path, parts_path = (root / name for name in CELEBA_FILES)
    part_of = {}
    for n, line in enumerate(_lines(parts_path), 1):
        name, *part = line.split() or [""]
        if len(part) == 1 and part[0] in PARTITION:
            part_of[name] = PARTITION[part[0]]
        elif line.strip():
            photographs.bad.append(f"{parts_path.name}, line {n}: no part that is known")
    lines = _lines(labels_path)
    columns = lines[1].split() if len(lines) > 1 else []
    wanted = {name: CELEBA[name] for name in photographs.attributes}
    for column, *_ in wanted.values():
        if column not in columns:
            raise UserError(f"{labels_path}: line 2 names no column {column}; get the file again.")
    for n, line in enumerate(lines[2:], 3):
        name, *values = line.split() or [""]
        where = f"{labels_path.name}, line {n}"
        if not name:
            continue
        if len(values) != len(columns):
            photographs.bad.append(f"{where}: {len(values)} values for {len(columns)} columns")
        elif name not in part_of:
            photographs.bad.append(f"{where}: {name} is in no part")
        else:
            row = dict(zip(columns, values, strict=True))
            labels = {key: {"1": yes, "-1": no}.get(row[column]) for key, (column, yes, no) in wanted.items()}
            photographs.add(part_of[name], root / "img_align_celeba" / name, labels, where)


def _rows(path: Path, columns: set[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield number and values of each line of a table that has these columns. Raises UserError."""
    reader = csv.DictReader(_lines(path))
    try:
        missing = columns - set(reader.fieldnames or ())
        if missing:
            raise UserError(f"{path}: has no column {min(missing)!r}; get the file again.")
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; get the file again.") from None


def _read_fairface(root: Path, photographs: Photographs) -> None:
    for part, name in FAIRFACE_FILES.items():
        for line, row in _rows(root / name, {"file", *photographs.attributes}):
            where = f"{name}, line {line}"
            labels = {key: FAIRFACE[key].get(row[key]) for key in photographs.attributes}
            photographs.add(part, root / (row["file"] or "?"), labels, where)
