"""Captions of pictures, and scenes that match them.

The world is biased on purpose. If a caption names no gender, its picture gets one by the subject's share of women.
The shares of occupations are those of IPUMS USA 2012, as published in fivethirtyeight/data,
male-flight-attendants; those of activities and descriptors are made up. Tones follow TONE_SHARE, ages AGE_SHARE.
"""

import csv
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fairref.bundle.judges import load_sprites
from fairref.emoji.pictures import STYLES, VIEWS, Scene, random_scene
from fairref.emoji.sheet import things
from fairref.judges.sprites import HAIR, LOOKS, PLAIN, TONES, WHITE

Row = TypeVar("Row")
TABLE, CONCEPT_TABLE = (Path(__file__).with_name(f"{name}.csv") for name in ("occupations", "concepts"))
SPLITS = ("train", "validation", "test")
KINDS = ("activity", "context", "style", "descriptor")  # of concepts
TONE_SHARE = (0.65, 0.18, 0.10, 0.07)  # light, medium-light, medium, dark
AGE_SHARE = (0.85, 0.15)  # young, old
WORDS = {  # attribute -> for each class, the words that name it
    "gender": (("woman", "female"), ("man", "male")),
    "tone": tuple((f"{tone}-skinned",) for tone in TONES),
    "old": (("young",), ("old", "elderly")),
}
HAIR_WORDS = ("black", "brown", "red", "blond", "white")
HUES = ("red", "yellow", "green", "cyan", "blue", "purple")

TEMPLATE = "a photo of the face of a {s}, a person"
NEUTRAL = (
    TEMPLATE,  # the method's own template, half of the time
    TEMPLATE,
    TEMPLATE,
    TEMPLATE,
    "a photo of a {s}",
    "a picture of a {s}",
    "the face of a {s}",
    "a {s}",
)
# How often each kind is drawn, for CLIP and in the U-Net's first and second stage.
SHARES = {
    "clip": {"occupation": 0.5, "view": 0.12, "nobody": 0.06,
             "activity": 0.12, "context": 0.08, "style": 0.06, "descriptor": 0.06},
    "first": {"empty": 0.1, "occupation": 0.5, "view": 0.06, "nobody": 0.03,
              "activity": 0.1, "context": 0.08, "style": 0.05, "descriptor": 0.08},
    "second": {"empty": 0.08, "occupation": 0.42, "view": 0.1, "nobody": 0.05,
               "activity": 0.12, "context": 0.1, "style": 0.05, "descriptor": 0.08},
}  # fmt: skip
# How often a caption names each attribute. CLIP's captions name more; tones are harder to learn than genders.
NAMED = {
    "clip": {"gender": 0.6, "tone": 0.6, "old": 0.4},
    "first": {"gender": 0.28, "tone": 0.2, "old": 0.1},
    "second": {"gender": 0.24, "tone": 0.3, "old": 0.12},
}
TWO_PEOPLE, FAR_AWAY, NOBODY = "{c} with a friend", "{c}, far away", "a photo of a {thing}, nobody there"


@dataclass(frozen=True)
class Occupation:
    """A row of the table: an occupation, the look that shows it, and its part."""

    name: str
    look: str
    share_women: float
    split: str


@dataclass(frozen=True)
class Concept:
    """An activity, context, style or descriptor of a caption. `thing` is the thing that shows it, or the style."""

    kind: str
    phrase: str
    thing: str
    share_women: float  # of activities and descriptors
    split: str


def _read(path: Path, make: Callable[..., Row]) -> tuple[Row, ...]:
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(
            make(**{**row, "share_women": float(row["share_women"] or 0.5)}) for row in csv.DictReader(file)
        )


@cache
def occupations() -> tuple[Occupation, ...]:
    """Return all rows of the table of occupations."""
    return _read(TABLE, Occupation)


@cache
def concepts(kind: str) -> tuple[Concept, ...]:
    """Return the rows of one of KINDS in the table of concepts."""
    return tuple(c for c in _read(CONCEPT_TABLE, Concept) if c.kind == kind)


def prompt_of(concept: Concept, occupation: str = "") -> str:
    """Return the neutral prompt of a concept; a context or a style needs an occupation."""
    return _TEMPLATES[concept.kind].format(s=occupation, p=concept.phrase, w="")


_TEMPLATES = {  # w: words that name a class, with a space behind each; s: occupation; p: the concept's phrase
    "activity": "a photo of a {w}person {p}",
    "context": "a photo of the face of a {w}{s}, a person, {p}",
    "style": "a photo of the face of a {w}{s}, a person, {p}",
    "descriptor": "a photo of the face of a {w}{p} person",
}


@dataclass(frozen=True)
class Caption:
    """A caption and what it fixes of the picture; -1 where it names nothing."""

    text: str
    look: str
    share_women: float
    occupation: str = ""
    gender: int = -1
    tone: int = -1
    old: int = -1
    view: str = VIEWS[0]
    thing: int = -1
    style: str = STYLES[0]


def say(rng: random.Random, stage: str = "first") -> Caption:
    """Return one caption: its kind follows SHARES, its words NAMED, all else is uniform."""
    shares = SHARES[stage]
    (kind,) = rng.choices(list(shares), shares.values())
    return _SAY[kind](rng, stage)


def _words(rng: random.Random, stage: str, look: str) -> tuple[str, dict[str, int]]:
    """Return words before a subject, each with a space behind it, and the classes that they name."""
    named = {}
    for name, words in WORDS.items():
        shows = name != "old" or load_sprites().aged[LOOKS.index(look)]
        if shows and rng.random() < NAMED[stage][name]:
            named[name] = rng.randrange(len(words))
    order = [rng.choice(WORDS[name][named[name]]) for name in ("old", "tone", "gender") if name in named]
    return "".join(word + " " for word in order), named


def _occupation(rng: random.Random, stage: str, template: str | None = None) -> Caption:
    job = rng.choice(occupations())
    words, named = _words(rng, stage, job.look)
    template = template or rng.choice(NEUTRAL)
    return Caption(template.format(s=words + job.name), job.look, job.share_women, job.name, **named)


def _empty(rng: random.Random, stage: str) -> Caption:
    return replace(_occupation(rng, stage), text="", gender=-1, tone=-1, old=-1)


def _view(rng: random.Random, stage: str) -> Caption:
    caption = _occupation(rng, stage, rng.choice((TEMPLATE, "a photo of a {s}")))
    far = rng.random() < 0.5
    text = (FAR_AWAY if far else TWO_PEOPLE).format(c=caption.text)
    return replace(caption, text=text, view="far" if far else "pair")


def _nobody(rng: random.Random, stage: str) -> Caption:
    index, name = rng.choice(list(enumerate(things())))
    text = NOBODY.format(thing=name.replace("_", " "))
    return Caption(text, rng.choice(LOOKS), 0.5, view="nobody", thing=index)


def _concept(kind: str) -> Callable[[random.Random, str], Caption]:
    def caption(rng: random.Random, stage: str) -> Caption:
        concept = rng.choice(concepts(kind))
        job = rng.choice(occupations()) if kind in ("context", "style") else None
        look, share = (job.look, job.share_women) if job else (PLAIN, concept.share_women)
        words, named = _words(rng, stage, look)
        name = job.name if job else ""
        text = _TEMPLATES[kind].format(s=name, p=concept.phrase, w=words)
        if kind == "style":
            return Caption(text, look, share, name, **named, style=concept.thing)
        return Caption(text, look, share, name, **named, thing=list(things()).index(concept.thing))

    return caption


_SAY = {
    "empty": _empty,
    "occupation": _occupation,
    "view": _view,
    "nobody": _nobody,
    **{kind: _concept(kind) for kind in KINDS},
}


def draw_world(B: int, generator: torch.Generator, stage: str = "first") -> tuple[list[Caption], Scene]:
    """Return B captions and a scene for each.

    Attributes that a caption does not name follow the world's shares, or are uniform in the stage "clip".
    """
    rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
    captions = [say(rng, stage) for _ in range(B)]

    def column(name: str, names: tuple[str, ...] | None = None) -> Tensor:
        values = [getattr(caption, name) for caption in captions]
        return torch.tensor([names.index(v) for v in values] if names else values)

    even = stage == "clip"
    shares = {
        "gender": torch.stack([v := column("share_women"), 1 - v], 1),
        "tone": torch.tensor(TONE_SHARE).expand(B, -1),
        "old": torch.tensor(AGE_SHARE).expand(B, -1),
    }
    who = {}
    for name, share in shares.items():
        free = torch.multinomial(torch.ones_like(share) if even else share, 1, generator=generator)[:, 0]
        who[name] = torch.where(column(name) < 0, free, column(name))
    scene = random_scene(
        column("look", LOOKS),
        who["gender"],
        who["tone"],
        generator,
        who["old"],
        column("view", VIEWS),
        column("thing"),
        column("style", STYLES),
    )
    return captions, scene


def describe(captions: list[Caption], scene: Scene, generator: torch.Generator) -> list[str]:
    """Return the captions with more details: most of them also name the hair or the background."""
    hair = (
        (scene.person.hair[:, None] - torch.tensor((*HAIR, WHITE)) / 255).square().sum(-1).argmin(1).tolist()
    )
    tells = (torch.rand(len(captions), 2, generator=generator) < 0.6).tolist()
    plain = (scene.style == 0).tolist()
    texts = []
    for b, caption in enumerate(captions):
        tells_hair, tells_background = tells[b]
        hair_shows = load_sprites().aged[scene.person.look[b]] and caption.view != "nobody"
        text = caption.text + (
            f" with {HAIR_WORDS[hair[b]]} hair" if tells_hair and hair_shows and plain[b] else ""
        )
        background = colour_name(scene.background[b].mean(0))
        texts.append(
            text + (f" in front of a {background} background" if tells_background and plain[b] else "")
        )
    return texts


def colour_name(rgb: Tensor) -> str:
    """Return the name of the hue of a colour (3,) in [0, 1]; grey below a saturation of 15 %."""
    high, low = rgb.max(), rgb.min()
    if high - low <= 0.15 * high:
        return "grey"
    r, g, b = ((rgb - low) / (high - low)).tolist()
    sixth = (g - b) % 6 if r == 1 else 2 + b - r if g == 1 else 4 + r - g
    return HUES[round(sixth) % 6]
