"""The prompts of a run: concepts by name, a text file, or a template for the occupations.

A concept is looked for in the bundle's prompts.json first, then in fairref.prompts. Several concepts take turns in
finetuning.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fairref.errors import UserError
from fairref.files.paths import expanded, read_text
from fairref.files.tokenizer import Tokenizer
from fairref.prompts import (
    CONCEPTS,
    PARTS,
    Occupations,
    concept,
    occupation_prompt,
    read_own,
)
from fairref.prompts.words import naming

OCCUPATIONS = "occupations"
PLACE = "{occupation}"  # where a template takes the occupation


@dataclass(frozen=True)
class Prompts:
    """The whole prompts of one concept, in disjoint parts; a part may be empty."""

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    occupations: dict[str, str] = field(default_factory=dict)  # prompt -> its occupation, if it has one
    world: Occupations | None = None  # has the templates of explicit prompts
    file: str = ""  # name of the text file that they are from

    def explicit(self, part: str, classes: dict[str, tuple[str, ...]]) -> list[tuple[str, str, int]]:
        """Return an explicit prompt for each occupation of the part and class: (prompt, attribute, class index)."""
        known = [self.occupations[prompt] for prompt in getattr(self, part) if prompt in self.occupations]
        return [
            (self.world.explicit_prompt(attribute, name, occupation), attribute, k)
            for occupation in known
            for attribute, names in classes.items()
            for k, name in enumerate(names)
        ]

    def naming(self, attribute: str) -> dict[str, str]:
        """Return the prompts for finetuning that name a class of the attribute, each with the words that name it.

        The title of an occupation, such as foreman, does not count.
        """
        words_of = {}
        for prompt in self.train:
            title = self.occupations.get(prompt)
            words_of[prompt] = naming(prompt.replace(title, "") if title else prompt, attribute)
        return {prompt: words for prompt, words in words_of.items() if words}

    def short(self, prompt: str) -> str:
        """Return the name of a prompt in reports: its occupation, or the prompt itself."""
        return self.occupations.get(prompt, prompt)


def read_prompts(
    wanted: str | Sequence[str], template: str | None, bundle_path: Path, attributes: Sequence[str]
) -> list[Prompts]:
    """Return the concepts of --prompts. Raises UserError.

    `wanted`: names with commas between them, the path of a text file, or a file's lines. `attributes`: prompts whose
    pictures do not show one of them, as the bundle says, are left out.
    """
    if template is not None and PLACE not in template:
        raise UserError(f"--prompt-template is {template!r}; expected a prompt with {PLACE} in it.")
    if template is not None and (not isinstance(wanted, str) or is_file(wanted)):
        raise UserError(
            f"--prompt-template is for {OCCUPATIONS}; a text file has whole prompts: leave one out."
        )
    if not isinstance(wanted, str):
        return [Prompts("prompts", tuple(wanted), tuple(wanted))]
    if is_file(wanted):
        file, prompts = expanded(wanted), tuple(read_lines(expanded(wanted)))
        return [Prompts("prompts", prompts, prompts, file=file.name)]
    names = wanted.split(",")
    if len(set(names)) < len(names):
        raise UserError(f"--prompts is {wanted}, which names a concept twice.")
    if template is not None and OCCUPATIONS not in names:
        raise UserError(f"--prompt-template is for {OCCUPATIONS}, which --prompts {wanted} leaves out.")
    own = read_own(bundle_path)
    return [_concept(name, template, own, attributes) for name in names]


def validation_prompts(concepts: list[Prompts], count: int) -> tuple[str, ...]:
    """Return at least `count` validation prompts, evenly from all concepts.

    A concept without validation prompts gives some of its prompts for finetuning.
    """
    share, chosen = -(-count // len(concepts)), []
    for prompts in concepts:
        chosen += evenly(prompts.validation or prompts.train, share)
    return tuple(chosen)


def evenly(texts: tuple[str, ...], count: int) -> list[str]:
    """Return `count` of the texts, evenly from all of them, or all if there are fewer.

    It takes even and odd places. So it takes both kinds from a list of pairs with opposite biases.
    """
    count = min(count, len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


def is_file(wanted: str) -> bool:
    """Return whether --prompts is the path of a text file: no name of a concept has a slash or a dot."""
    return "/" in wanted or "." in wanted


def read_lines(path: Path) -> list[str]:
    """Return the prompts of a text file, one a line; blank lines and # lines are left out. Raises UserError."""
    lines = [line.strip() for line in read_text(path).splitlines()]
    prompts = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not prompts:
        raise UserError(f"{path}: no prompt in it; write one a line.")
    return prompts


def _concept(name: str, template: str | None, own: Occupations | None, attributes: Sequence[str]) -> Prompts:
    if name == OCCUPATIONS and own is not None:
        parts = {part: _showing(getattr(own, part), own, attributes) for part in PARTS}
        return _occupations(parts, template, own)
    concepts = {} if own is None else own.concepts
    if name in concepts:
        return Prompts(
            name, **{part: _showing(texts, own, attributes) for part, texts in concepts[name].items()}
        )
    if name not in CONCEPTS:
        known = {*concepts, *CONCEPTS}
        raise UserError(
            f"--prompts names {name!r}; expected some of {', '.join(sorted(known))}, or a text file."
        )
    listed = concept(name)
    parts = {part: getattr(listed, part) for part in PARTS}
    if name != OCCUPATIONS:
        return Prompts(name, **parts)
    before, after = occupation_prompt("\0").split("\0")
    names = {part: [text.removeprefix(before).removesuffix(after) for text in parts[part]] for part in PARTS}
    return _occupations(names, template, Occupations((), (), ()))


def _occupations(names: Mapping[str, Sequence[str]], template: str | None, world: Occupations) -> Prompts:
    """Return the prompts of occupations by part."""
    make = occupation_prompt if template is None else lambda name: template.replace(PLACE, name)
    parts = {part: tuple(map(make, names[part])) for part in PARTS}
    return Prompts(
        OCCUPATIONS, **parts, occupations={make(n): n for part in PARTS for n in names[part]}, world=world
    )


def _showing(names: Sequence[str], own: Occupations, attributes: Sequence[str]) -> tuple[str, ...]:
    """Return the occupations or prompts whose pictures show all of the attributes."""
    hidden = {name for attribute in attributes for name in own.hiding.get(attribute, ())}
    return tuple(name for name in names if name not in hidden)


def warn_of_cut(tokenizer: Tokenizer, prompts: list[str], soft: int = 0) -> None:
    """Warn on stderr of prompts that are too long for the tokenizer, with `soft` soft tokens beside them."""
    ends = [end for end in tokenizer.cut(prompts, soft) if end]
    if len(ends) == 1:
        print(f"warning: a prompt is too long, its end is not used: {ends[0]!r}", file=sys.stderr)
    elif ends:
        print(
            f"warning: {len(ends)} prompts are too long, their ends are not used, as in: {ends[0]!r}",
            file=sys.stderr,
        )
