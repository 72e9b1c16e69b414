"""Read labelled pictures: CelebA and FairFace, which classifiers are trained on, as distributed; or one's own.

CelebA: list_attr_celeba and list_eval_partition, each .txt (the distributor's) or .csv (Kaggle's), and the images in
img_align_celeba/ or img_align_celeba/img_align_celeba/. They stand in the folder itself or in Anno/, Eval/ and Img/, or
so in its folder celeba/ (torchvision's). Labels are -1 and 1, or 0 and 1.
FairFace: fairface_label_train.csv, fairface_label_val.csv, whose first column names the images.
One's own, to measure judges on: labels.csv with the column `file` and one for each attribute; a blank is not known.

Rows that can't be used are left out and listed, or they are an error (`strict`).
"""

import csv
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
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
# column, class of 1, class of -1 or 0
CELEBA = {"gender": ("Male", "man", "woman"), "age": ("Young", "young", "old")}
PARTITION = {"0": "train", "1": "validation", "2": "test"}
LABELS, PARTS, IMAGES = "list_attr_celeba", "list_eval_partition", "img_align_celeba"
CELEBA_FOLDERS = [Path(home, room) for home in ("", "celeba") for room in ("", "Anno", "Eval", "Img")]
FAIRFACE_FILES = {"train": "fairface_label_train.csv", "validation": "fairface_label_val.csv"}
OWN = "labels.csv"
SHOWN = 3  # bad rows that a message names


@dataclass(frozen=True)
class Row:
    """One photograph: its file, and the index of its class in each attribute that was asked for."""

    file: Path
    labels: tuple[int, ...]  # -1: not known, in one's own table alone


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
        elif not os.path.isfile(file):  # False also for a name that is none
            self.bad.append(f"{where}: {file.parent.name}/{file.name} is missing")
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
    bad = f" ({describe_bad(photographs.bad)})" if photographs.bad else ""
    if not photographs.parts.get("train"):
        raise UserError(f"{root}: no usable training image{bad}; check the folder.")
    for part, rows in photographs.parts.items():
        for a, (name, classes) in enumerate(photographs.attributes.items()):
            without = [c for k, c in enumerate(classes) if all(row.labels[a] != k for row in rows)]
            if without:
                raise UserError(
                    f"{root}: the {part} part has no usable image of {name} {without[0]!r}{bad}; check the labels."
                )
    return photographs


def read_labelled(root: str | Path, classes: dict[str, tuple[str, ...]]) -> Photographs:
    """Return a folder's labelled pictures of any of these layouts, to measure judges on, all in the part "test".

    Of a data set these are its test part, else its validation part. `classes`: attribute -> class names in the order
    that labels shall have; the attributes that are not labelled are absent. Raises UserError.
    """
    root = expanded(root)
    if (root / OWN).is_file():
        return _read_own(root, classes)
    tables = [root / folder / f"{LABELS}{end}" for folder in CELEBA_FOLDERS for end in (".txt", ".csv")]
    is_celeba = any(table.is_file() for table in tables)
    if not is_celeba and not (root / FAIRFACE_FILES["validation"]).is_file():
        raise UserError(
            f"{root}: holds neither {OWN} nor CelebA nor FairFace; write {OWN} with the columns file and"
            f" {', '.join(classes)}."
        )
    data, labelled = ("celeba", CELEBA) if is_celeba else ("fairface", FAIRFACE)
    names = [name for name in classes if name in labelled and set(classes[name]) == set(CLASSES[name])]
    if not names:
        raise UserError(
            f"{root}: {data} labels {', '.join(labelled)}, none of them with the classes of {', '.join(classes)}; give"
            f" pictures with {OWN}."
        )
    found = read_photographs(data, root, names)
    places = [[classes[name].index(c) for c in CLASSES[name]] for name in names]  # theirs -> ours
    rows = [
        Row(row.file, tuple(place[k] for place, k in zip(places, row.labels, strict=True)))
        for row in found.parts.get("test") or found.parts.get("validation") or found.parts["train"]
    ]
    return Photographs({name: classes[name] for name in names}, {"test": rows}, found.bad)


def _read_own(root: Path, classes: dict[str, tuple[str, ...]]) -> Photographs:
    """Return the pictures of one's own table as its part "test". Raises UserError, also for a single wrong row."""
    table = list(read_table(root / OWN, {"file"}))
    names = [name for name in classes if table and name in table[0][1]]
    if not names:
        raise UserError(
            f"{root / OWN}: has no row, or no column {' or '.join(classes)}; label some pictures."
        )
    photographs = Photographs({name: classes[name] for name in names}, {"test": []})
    for line, row in table:
        where = f"{root / OWN}, line {line}"
        labels = tuple(class_index(row[name], name, classes[name], where) for name in names)
        file = root / (row["file"] or "?")
        if not os.path.isfile(file):
            raise UserError(f"{where}: {file} is no file; correct the table.")
        photographs.parts["test"].append(Row(file, labels))
    return photographs


def class_index(label: str | None, name: str, classes: tuple[str, ...], where: str) -> int:
    """Return the index of an attribute's class in a cell of one's own table, -1 of a blank one. Raises UserError."""
    label = (label or "").strip()
    if label and label not in classes:
        raise UserError(f"{where}: {name} is {label!r}; expected {', '.join(classes)}, or nothing.")
    return classes.index(label) if label else -1


def describe_bad(bad: list[str]) -> str:
    """Return how many rows are bad, and the first few."""
    rest = f", and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return f"{len(bad)} bad row{'s' * (len(bad) > 1)}: {'; '.join(bad[:SHOWN])}{rest}"


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; put it there as the data set distributes it.")
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text; get it again.") from None


def _find_celeba(root: Path, names: list[str], is_there: Callable[[Path], bool]) -> Path:
    """Return the one file or folder of CelebA that has one of the names. Raises UserError for none and for two."""
    found = [p for folder in CELEBA_FOLDERS for name in names if is_there(p := root / folder / name)]
    if not found:
        raise UserError(
            f"{root}: there is no {' or '.join(names)} in it, in its Anno, Eval or Img, or in its celeba;"
            " give the folder that CelebA was unpacked to."
        )
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1]} are both there; keep one, or give a --root that has one.")
    return found[0]


def _celeba_rows(path: Path, columns: set[str]) -> Iterator[tuple[int, dict[str | None, str | None]]]:
    """Yield number and values of each line, as csv.DictReader does, of either kind of table. Raises UserError."""
    if path.suffix == ".csv":
        yield from read_table(path, {"image_id", *columns})
        return
    lines, names, first = _lines(path), ["partition"], 0
    if path.stem == LABELS:  # the first line is a number, the second names the columns
        names, first = (lines[1].split() if len(lines) > 1 else []), 2
    if missing := columns - set(names):
        raise UserError(f"{path}: has no column {min(missing)!r}; get the file again.")
    for n, line in enumerate(lines[first:], first + 1):
        if line.strip():
            yield n, dict(zip_longest(["image_id", *names], line.split()))


def _read_celeba(root: Path, photographs: Photographs) -> None:
    labels_path, parts_path = (
        _find_celeba(root, [f"{name}.txt", f"{name}.csv"], Path.is_file) for name in (LABELS, PARTS)
    )
    images = _find_celeba(root, [IMAGES], Path.is_dir)
    images = images / IMAGES if (images / IMAGES).is_dir() else images  # as Kaggle's archive is unpacked
    part_of = {}
    for n, row in _celeba_rows(parts_path, {"partition"}):
        if None not in row and row["partition"] in PARTITION:
            part_of[row["image_id"]] = PARTITION[row["partition"]]
        else:
            photographs.bad.append(f"{parts_path.name}, line {n}: no part that is known")
    wanted, rows = {name: CELEBA[name] for name in photographs.attributes}, []
    for n, row in _celeba_rows(labels_path, {column for column, *_ in wanted.values()}):
        where, image = f"{labels_path.name}, line {n}", row["image_id"]
        if None in row or None in row.values():
            photographs.bad.append(f"{where}: another number of values than columns")
        elif image not in part_of:
            photographs.bad.append(f"{where}: {image} is in no part")
        else:
            rows.append((where, image, {key: row[column].strip() for key, (column, *_) in wanted.items()}))
    for key, (column, *_) in wanted.items():
        if {"-1", "0"} <= {values[key] for *_, values in rows}:  # 0 might be "no" or "unknown"
            raise UserError(
                f"{labels_path}: column {column} has 0 as well as -1; expected -1 and 1, or 0 and 1; take one pair."
            )
    for where, image, values in rows:
        labels = {k: {"1": yes, "-1": no, "0": no}.get(values[k]) for k, (_, yes, no) in wanted.items()}
        photographs.add(part_of[image], images / image, labels, where)


def read_table(path: Path, columns: set[str]) -> Iterator[tuple[int, dict[str, str]]]:
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
        for line, row in read_table(root / name, {"file", *photographs.attributes}):
            where = f"{name}, line {line}"
            labels = {key: FAIRFACE[key].get(row[key]) for key in photographs.attributes}
            photographs.add(part, root / (row["file"] or "?"), labels, where)
