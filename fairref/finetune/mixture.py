"""Which prompts a run takes: concepts by their names, a text file, or a template for the occupations.

A concept is a bundle's own (prompts.json) or else one of fairref.prompts'. Several concepts take turns in finetuning.
"""

from dataclasses import dataclass, field
from pathlib import Path

from fairref.errors import UserError
from fairref.prompts import CONCEPTS, PARTS, Occupations, concept, occupation_prompt, read_own
from fairref.prompts.words import naming
from fairref.weights_io import expanded

OCCUPATIONS = "occupations"
PLACE = "{occupation}"  # of an occupation in a template


@dataclass(frozen=True)
class Prompts:
    """The whole prompts of one concept, in disjoint parts; a part may be empty."""

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    occupations: dict[str, str] = field(default_factory=dict)  # prompt -> its occupation, where it is one
    world: Occupations | None = None  # says how a prompt names an occupation's class

    def named(self, part: str, classes: dict[str, tuple[str, ...]]) -> list[tuple[str, str, int]]:
        """A prompt that names it for each occupation of the part, and each class: (prompt, attribute, class index)."""
        known = [self.occupations[prompt] for prompt in getattr(self, part) if prompt in self.occupations]
        return [
            (self.world.named_prompt(attribute, name, occupation), attribute, k)
            for occupation in known
            for attribute, of_one in classes.items()
            for k, name in enumerate(of_one)
        ]

    def naming(self, attribute: str) -> dict[str, str]:
        """The prompts for finetuning that name a class of the attribute -> by which words; an occupation's title, such as
        foreman, is not one."""
        found = {}
        for prompt in self.train:
            title = self.occupations.get(prompt)
            found[prompt] = naming(prompt.replace(title, "") if title else prompt, attribute)
        return {prompt: words for prompt, words in found.items() if words}

    def short(self, prompt: str) -> str:
        """What a report calls a prompt."""
        return self.occupations.get(prompt, prompt)


def read_prompts(
    wanted: str | list[str], template: str | None, bundle, attributes: list[str]
) -> list[Prompts]:
    """The concepts of --prompts: names with commas between them, the path of a text file, or a file's lines.

    `attributes`: what the pictures must show, where a bundle says that those of some prompts do not. Raises UserError.
    """
    if template is not None and PLACE not in template:
        raise UserError(f"--prompt-template is {template!r}; expected a prompt with {PLACE} in it.")
    if template is not None and (isinstance(wanted, list) or is_file(wanted)):
        raise UserError(
            f"--prompt-template is for {OCCUPATIONS}; a text file has whole prompts: leave one out."
        )
    if isinstance(wanted, list):
        return [Prompts("prompts", tuple(wanted), tuple(wanted))]
    if is_file(wanted):
        return read_prompts(read_lines(expanded(wanted)), template, bundle, attributes)
    names = wanted.split(",")
    if len(set(names)) < len(names):
        raise UserError(f"--prompts is {wanted}, which names a concept twice.")
    if template is not None and OCCUPATIONS not in names:
        raise UserError(f"--prompt-template is for {OCCUPATIONS}, which --prompts {wanted} leaves out.")
    own = read_own(bundle.path)
    return [_concept(name, template, own, attributes) for name in names]


def validation_prompts(concepts: list[Prompts], count: int) -> tuple[str, ...]:
    """At least `count` prompts, evenly from all concepts; of one without validation prompts, from those of finetuning."""
    share, found = -(-count // len(concepts)), []
    for prompts in concepts:
        found += evenly(prompts.validation or prompts.train, share)
    return tuple(found)


def evenly(texts: tuple[str, ...], count: int) -> list[str]:
    """`count` of the texts, evenly from all of them; all of fewer. Some at even, some at odd places, so that of pairs
    that lean opposite ways both kinds are there."""
    count = min(count, len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


def is_file(wanted: str) -> bool:
    """Whether --prompts means a text file, which a concept's name can't look like."""
    return "/" in wanted or "." in wanted


def read_lines(path: Path) -> list[str]:
    """The prompts of a text file: one a line, without blank lines and lines that begin with #. Raises UserError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: can't be read ({error}); expected a text file, one prompt a line."
        ) from None
    found = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not found:
        raise UserError(f"{path}: no prompt in it; write one a line.")
    return found


def _concept(name, template, own, attributes):
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
    found = concept(name)
    parts = {part: getattr(found, part) for part in PARTS}
    if name != OCCUPATIONS:
        return Prompts(name, **parts)
    before, after = occupation_prompt("\0").split("\0")
    names = {part: [text.removeprefix(before).removesuffix(after) for text in parts[part]] for part in PARTS}
    return _occupations(names, template, Occupations((), (), ()))


def _occupations(names, template, world):
    """Prompts of occupations by part."""
    make = occupation_prompt if template is None else lambda name: template.replace(PLACE, name)
    parts = {part: tuple(map(make, names[part])) for part in PARTS}
    return Prompts(
        OCCUPATIONS, **parts, occupations={make(n): n for part in PARTS for n in names[part]}, world=world
    )


def _showing(names, own, attributes):
    """Those whose pictures show all of the attributes."""
    hidden = {name for attribute in attributes for name in own.hiding.get(attribute, ())}
    return tuple(name for name in names if name not in hidden)
