"""The prompts of finetuning and evaluation (docs/method.md §7): a bundle's occupations, and four lists for any model.

The lists are the CSV files beside this one, written for this project; each has disjoint parts.
"""

import csv
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from fairref.errors import UserError
from fairref.weights_io import read_json

FILE = "prompts.json"
PARTS = ("train", "validation", "test")
TEMPLATE = "a photo of the face of a {occupation}, a person"
NAMED_TEMPLATE = "a photo of the face of a {name} {occupation}, a person"

CONCEPTS = ("occupations", "sports", "style_context", "descriptors")
NAMES = {  # concept -> what makes a prompt of a name; the other lists hold whole prompts
    "occupations": TEMPLATE.replace("{occupation}", "{name}"),
    "sports": "a person playing {name}",
}


@dataclass(frozen=True)
class Concept:
    """Whole prompts, in disjoint parts; only occupations have some for validation."""

    name: str  # one of CONCEPTS
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


@cache
def concept(name: str) -> Concept:
    """The prompts of one of CONCEPTS. Raises UserError."""
    if name not in CONCEPTS:
        raise UserError(f"There is no concept {name!r}; give one of {', '.join(CONCEPTS)}.")
    with Path(__file__).with_name(f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    prompts = [NAMES[name].format(name=row["name"]) if name in NAMES else row["prompt"] for row in rows]
    return Concept(
        name,
        **{part: tuple(p for p, row in zip(prompts, rows) if row["split"] == part) for part in PARTS},
    )


@dataclass(frozen=True)
class Occupations:
    """A bundle's prompts.json:

    {"occupations": {"train": [...], "validation": [...], "test": [...]},
     "named": {"gender": {"woman": "a photo of the face of a female {occupation}, a person", ...}},   optional
     "concepts": {"sports": {"train": [...], "test": [...]}},   optional: whole prompts
     "hiding": {"age": [...]}}   optional: the occupations and whole prompts whose pictures don't show an attribute
    """

    train: tuple[str, ...]  # finetuning sees these only
    validation: tuple[str, ...]  # to choose settings by
    test: tuple[str, ...]  # unseen in finetuning
    named: dict = field(default_factory=dict)  # attribute -> class -> template that names the class
    concepts: dict = field(default_factory=dict)  # name -> part -> prompts
    hiding: dict = field(default_factory=dict)  # attribute -> occupations and prompts

    def named_prompt(self, attribute: str, name: str, occupation: str) -> str:
        """The prompt that asks for the class `name` of an attribute."""
        return (
            self.named.get(attribute, {}).get(name, NAMED_TEMPLATE).format(occupation=occupation, name=name)
        )


def occupation_prompt(occupation: str) -> str:
    """The neutral prompt of an occupation."""
    return TEMPLATE.format(occupation=occupation)


def read_own(bundle_path: str | Path) -> Occupations | None:
    """The prompts.json of the bundle in a folder or file; None where it has none. Raises UserError."""
    return read_occupations(bundle_path) if _place(bundle_path).exists() else None


def read_occupations(bundle_path: str | Path) -> Occupations:
    """The prompts.json of the bundle in a folder or file. Raises UserError."""
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
    twice = next((name for name in everyone if everyone.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: {twice!r} is in it twice; every occupation belongs into one part, once.")
    extras = {key: d[key] for key in EXTRAS if key in d}
    return Occupations(**{part: tuple(parts[part]) for part in PARTS}, **extras)


def _place(bundle_path):
    path = Path(bundle_path)
    return (path if path.is_dir() else path.parent) / FILE


def _are_texts(texts):
    """Whether it is a list of texts, none of them empty."""
    return isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)


def _is_concept(parts):
    """Whether it is lists of prompts by part, with some for finetuning."""
    return (
        isinstance(parts, dict)
        and set(parts) <= set(PARTS)
        and bool(parts.get("train"))
        and all(map(_are_texts, parts.values()))
    )


def _is_named(templates):
    """Whether it is class -> template of an occupation, with no other place than {name}."""
    try:
        made = [text.format(occupation="\0", name="") for text in templates.values()]
    except (AttributeError, KeyError, IndexError, ValueError, TypeError):
        return False
    return all("\0" in text for text in made)


EXTRAS = {  # what prompts.json may hold besides: key -> whether a name's value is right, what is expected
    "named": (_is_named, 'a template of each class: {"woman": "a woman {occupation}", ...}'),
    "concepts": (_is_concept, '{"train": [...], "test": [...]} of prompts'),
    "hiding": (_are_texts, "a list of occupations and prompts"),
}
