"""What is said about the pictures: captions, and who and what a picture with that caption shows.

The world is biased on purpose. A caption that names no gender gets one by its subject's share of women
(occupations: IPUMS USA 2012, as published in fivethirtyeight/data, male-flight-attendants; activities and
descriptors: made up), a tone by TONE_SHARE and an age by AGE_SHARE.
"""

import csv
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fairref.emoji.pictures import HAIR, STYLES, VIEWS, WHITE, Scene, random_scene, sprites
from fairref.emoji.sheet import LOOKS, PLAIN, TONES, things

TABLE, CONCEPT_TABLE = (Path(__file__).with_name(f"{name}.csv") for name in ("occupations", "concepts"))
SPLITS = ("train", "validation", "test")
KINDS = ("activity", "context", "style", "descriptor")  # of concepts
TONE_SHARE = (0.65, 0.18, 0.10, 0.07)  # light, medium-light, medium, dark
AGE_SHARE = (0.85, 0.15)  # young, old
WORDS = {  # an index or a tuple of words that name it
    "gender": (("woman", "female"), ("man", "male")),
    "tone": tuple((f"{tone}-skinned",) for tone in TONES),
    "old": (("young",), ("old", "elderly")),
}
HAIR_WORDS = ("black", "brown", "red", "blond", "white")
HUES = ("red", "yellow", "green", "cyan", "blue", "purple")

TEMPLATE = "a photo of the face of a {s}, a person"
NEUTRAL = (
    TEMPLATE,  # the method's own template half of the time
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
    "clip": {"occupation": 0.5, "view": 0.12, "nobody": 0.06, "activity": 0.12, "context": 0.08, "style": 0.06, "descriptor": 0.06},
    "first": {"empty": 0.1, "occupation": 0.5, "view": 0.06, "nobody": 0.03, "activity": 0.1, "context": 0.08, "style": 0.05, "descriptor": 0.08},
    "second": {"empty": 0.08, "occupation": 0.42, "view": 0.1, "nobody": 0.05, "activity": 0.12, "context": 0.1, "style": 0.05, "descriptor": 0.08},
}  # fmt: skip
# How often a caption names each attribute: all of CLIP's are more telling, tones are harder to learn than genders.
NAMED = {
    "clip": {"gender": 0.6, "tone": 0.6, "old": 0.4},
    "first": {"gender": 0.28, "tone": 0.2, "old": 0.1},
    "second": {"gender": 0.24, "tone": 0.3, "old": 0.12},
}
TWO_PEOPLE, FAR_AWAY, NOBODY = "{c} with a friend", "{c}, far away", "a photo of a {thing}, nobody there"


@dataclass(frozen=True)
class Occupation:
    name: str
    look: str
    share_women: float
    split: str


@dataclass(frozen=True)
class Concept:
    """What else can be said: an activity, a context, a style, a descriptor. `thing` shows it; or names a style."""

    kind: str
    phrase: str
    thing: str
    share_women: float  # of activities and descriptors
    split: str


def _read(path, make):
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(
            make(**{**row, "share_women": float(row["share_women"] or 0.5)}) for row in csv.DictReader(file)
        )


@cache
def occupations() -> tuple[Occupation, ...]:
    """All rows of the table."""
    return _read(TABLE, Occupation)


@cache
def concepts(kind: str) -> tuple[Concept, ...]:
    """The table's rows of one of KINDS."""
    return tuple(c for c in _read(CONCEPT_TABLE, Concept) if c.kind == kind)


def prompt_of(concept: Concept, occupation: str = "") -> str:
    """The neutral prompt of a concept; a context or a style needs an occupation."""
    return _TEMPLATES[concept.kind].format(s=occupation, p=concept.phrase, w="")


_TEMPLATES = {  # w: words of a person, with a space behind each; s: occupation; p: the concept's phrase
    "activity": "a photo of a {w}person {p}",
    "context": "a photo of the face of a {w}{s}, a person, {p}",
    "style": "a photo of the face of a {w}{s}, a person, {p}",
    "descriptor": "a photo of the face of a {w}{p} person",
}


@dataclass(frozen=True)
class Said:
    """A caption and what it fixes; -1 or None where it says nothing."""

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


def say(rng: random.Random, stage: str = "first") -> Said:
    """One caption of the world: its kind by SHARES, its words by NAMED, all else alike."""
    shares = SHARES[stage]
    (kind,) = rng.choices(list(shares), shares.values())
    return _SAY[kind](rng, stage)


def _words(rng, stage, look) -> tuple[str, dict]:
    """Words before a subject, each with a space behind it, and what they name."""
    named = {}
    for name, words in WORDS.items():
        may = name != "old" or sprites().aged[LOOKS.index(look)]
        if may and rng.random() < NAMED[stage][name]:
            named[name] = rng.randrange(len(words))
    order = [rng.choice(WORDS[name][named[name]]) for name in ("old", "tone", "gender") if name in named]
    return "".join(word + " " for word in order), named


def _occupation(rng, stage, template=None):
    job = rng.choice(occupations())
    words, named = _words(rng, stage, job.look)
    template = template or rng.choice(NEUTRAL)
    return Said(template.format(s=words + job.name), job.look, job.share_women, job.name, **named)


def _empty(rng, stage):
    return replace(_occupation(rng, stage), text="", gender=-1, tone=-1, old=-1)


def _view(rng, stage):
    said = _occupation(rng, stage, rng.choice((TEMPLATE, "a photo of a {s}")))
    far = rng.random() < 0.5
    text = (FAR_AWAY if far else TWO_PEOPLE).format(c=said.text)
    return replace(said, text=text, view="far" if far else "pair")


def _nobody(rng, stage):
    index, name = rng.choice(list(enumerate(things())))
    text = NOBODY.format(thing=name.replace("_", " "))
    return Said(text, rng.choice(LOOKS), 0.5, view="nobody", thing=index)


def _concept(kind: str) -> Callable:
    def made(rng, stage):
        concept = rng.choice(concepts(kind))
        job = rng.choice(occupations()) if kind in ("context", "style") else None
        look, share = (job.look, job.share_women) if job else (PLAIN, concept.share_women)
        words, named = _words(rng, stage, look)
        name = job.name if job else ""
        text = _TEMPLATES[kind].format(s=name, p=concept.phrase, w=words)
        if kind == "style":
            return Said(text, look, share, name, **named, style=concept.thing)
        return Said(text, look, share, name, **named, thing=list(things()).index(concept.thing))

    return made


_SAY = {
    "empty": _empty,
    "occupation": _occupation,
    "view": _view,
    "nobody": _nobody,
    **{kind: _concept(kind) for kind in KINDS},
}


def draw_world(B: int, generator: torch.Generator, stage: str = "first") -> tuple[list[Said], Scene]:
    """B captions and a scene for each. What a caption leaves open follows the world's shares; CLIP's is even."""
    rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
    said = [say(rng, stage) for _ in range(B)]

    def column(name: str, names: tuple | None = None) -> Tensor:
        values = [getattr(s, name) for s in said]
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
    return said, scene


def describe(said: list[Said], scene: Scene, generator: torch.Generator) -> list[str]:
    """The captions, with more of what can be seen: most of them also tell the hair or the background."""
    hair = (
        (scene.person.hair[:, None] - torch.tensor((*HAIR, WHITE)) / 255).square().sum(-1).argmin(1).tolist()
    )
    tells = (torch.rand(len(said), 2, generator=generator) < 0.6).tolist()
    plain = (scene.style == 0).tolist()
    texts = []
    for b, s in enumerate(said):
        tells_hair, tells_background = tells[b]
        hair_shows = sprites().aged[scene.person.look[b]] and s.view != "nobody"
        text = s.text + (
            f" with {HAIR_WORDS[hair[b]]} hair" if tells_hair and hair_shows and plain[b] else ""
        )
        background = colour_name(scene.background[b].mean(0))
        texts.append(
            text + (f" in front of a {background} background" if tells_background and plain[b] else "")
        )
    return texts


def colour_name(rgb: Tensor) -> str:
    """The hue's name of a colour (3,) in [0, 1]; grey below a saturation of 15 %."""
    high, low = rgb.max(), rgb.min()
    if high - low <= 0.15 * high:
        return "grey"
    r, g, b = ((rgb - low) / (high - low)).tolist()
    sixth = (g - b) % 6 if r == 1 else 2 + b - r if g == 1 else 4 + r - g
    return HUES[round(sixth) % 6]
