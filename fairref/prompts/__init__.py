"""The prompts of finetuning and evaluation (docs/method.md §7): a bundle's own, and four lists for any model.

The lists are the CSV files in this folder, written for this project. Each has disjoint parts.
"""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Formatter

from fairref.errors import UserError
from fairref.files.paths import read_json

FILE = "prompts.json"
PARTS = ("train", "validation", "test")
TEMPLATE = "a photo of the face of a {occupation}, a person"
EXPLICIT_TEMPLATE = "a photo of the face of a {name} {occupation}, a person"

CONCEPTS = ("occupations", "sports", "style_context", "descriptors")
NAMES = {  # concept -> template of the lists that hold names; the other lists hold whole prompts
    "occupations": TEMPLATE.replace("{occupation}", "{name}"),
    "sports": "a person playing {name}",
}


@dataclass(frozen=True)
class Concept:
    """Whole prompts, in disjoint parts; only occupations have a part for validation."""

    name: str  # one of CONCEPTS
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


@cache
def concept(name: str) -> Concept:
    """Return the prompts of one of CONCEPTS. Raises UserError."""
    if name not in CONCEPTS:
        raise UserError(f"There is no concept {name!r}; give one of {', '.join(CONCEPTS)}.")
    with Path(__file__).with_name(f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    prompts = [NAMES[name].format(name=row["name"]) if name in NAMES else row["prompt"] for row in rows]
    splits = [row["split"] for row in rows]
    parts = {
        part: tuple(prompt for prompt, split in zip(prompts, splits, strict=True) if split == part)
        for part in PARTS
    }
    return Concept(name, **parts)


@dataclass(frozen=True)
class Occupations:
    """A bundle's prompts.json:

    {"occupations": {"train": [...], "validation": [...], "test": [...]},
     "explicit": {"gender": {"woman": "a photo of the face of a female {occupation}, a person", ...}},   optional
     "concepts": {"sports": {"train": [...], "test": [...]}},   optional: whole prompts
     "hiding": {"age": [...]}}   optional: occupations and whole prompts whose pictures do not show the attribute
    """

    train: tuple[str, ...]  # finetuning sees these only
    validation: tuple[str, ...]  # to choose settings by
    test: tuple[str, ...]  # unseen in finetuning
    explicit: Mapping[str, Mapping[str, str]] = field(
        default_factory=dict
    )  # attribute -> class -> template that names it
    concepts: Mapping[str, Mapping[str, Sequence[str]]] = field(
        default_factory=dict
    )  # name -> part -> prompts
    hiding: Mapping[str, Sequence[str]] = field(default_factory=dict)  # attribute -> occupations and prompts

    def explicit_prompt(self, attribute: str, name: str, occupation: str) -> str:
        """Return the prompt that asks for the class `name` of an attribute."""
        return (
            self.explicit.get(attribute, {})
            .get(name, EXPLICIT_TEMPLATE)
            .format(occupation=occupation, name=name)
        )


def occupation_prompt(occupation: str) -> str:
    """Return the neutral prompt of an occupation."""
    return TEMPLATE.format(occupation=occupation)


def read_own(bundle_path: str | Path) -> Occupations | None:
    """Return the prompts.json of the bundle in a folder or file; None if it has none. Raises UserError."""
    return read_occupations(bundle_path) if _place(bundle_path).exists() else None


def read_occupations(bundle_path: str | Path) -> Occupations:
    """Return the prompts.json of the bundle in a folder or file. Raises UserError."""
    path = _place(bundle_path)
    d = read_json(path)
    parts = d.get("occupations")
    unknown = sorted(set(d) - {"occupations", *EXTRAS})
    if unknown or not isinstance(parts, dict) or sorted(parts) != sorted(PARTS):
        raise UserError(
            f'{path}: expected {{"occupations": {{"train", "validation", "test"}}}}; write it like that.'
        )
    for part, names in parts.items():
        if not _are_texts(names) or not names:
            raise UserError(f"{path}: {part} is not a list of names; give at least one occupation.")
    for key, (is_right, expected) in EXTRAS.items():
        if not isinstance(d.get(key, {}), dict) or not all(map(is_right, d.get(key, {}).values())):
            raise UserError(f'{path}: "{key}" is not names, each with {expected}; write it like that.')
    everyone = [name for part in PARTS for name in parts[part]]
    if len(set(everyone)) < len(everyone):
        ((twice, _),) = Counter(everyone).most_common(1)
        raise UserError(f"{path}: {twice!r} is in it twice; every occupation belongs into one part, once.")
    extras = {key: d[key] for key in EXTRAS if key in d}
    return Occupations(**{part: tuple(parts[part]) for part in PARTS}, **extras)


def _place(bundle_path: str | Path) -> Path:
    path = Path(bundle_path)
    return (path if path.is_dir() else path.parent) / FILE


def _are_texts(texts: object) -> bool:
    """Return whether it is a list of texts, none of them empty."""
    return isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)


def _is_concept(parts: object) -> bool:
    """Return whether it has lists of prompts by part, with some for finetuning."""
    return (
        isinstance(parts, dict)
        and set(parts) <= set(PARTS)
        and bool(parts.get("train"))
        and all(map(_are_texts, parts.values()))
    )


def _is_explicit(templates: object) -> bool:
    """Return whether it has a template for each class, with {occupation} and at most {name} to fill in.

    Both stand alone: "{occupation:>200000000}" would make a prompt of that length.
    """
    if not isinstance(templates, dict) or not _are_texts(list(templates.values())):
        return False
    try:
        fields = [
            [part[1:] for part in Formatter().parse(text) if part[1] is not None]
            for text in templates.values()
        ]
    except ValueError:
        return False
    plain = {("occupation", "", None), ("name", "", None)}
    return all(("occupation", "", None) in of_one and set(of_one) <= plain for of_one in fields)


EXTRAS = {  # optional keys of prompts.json -> the test of each value under the key, and that test in words
    "explicit": (_is_explicit, 'a template of each class: {"woman": "a woman {occupation}", ...}'),
    "concepts": (_is_concept, '{"train": [...], "test": [...]} of prompts'),
    "hiding": (_are_texts, "a list of occupations and prompts"),
}
