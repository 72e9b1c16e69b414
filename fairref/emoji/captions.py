"""What is said about the pictures: occupations with look and share of women, and captions made of them.

The world is biased on purpose. A caption that names no gender gets one by its occupation's share of women
(IPUMS USA 2012, as published in fivethirtyeight/data, male-flight-attendants), and a tone by TONE_SHARE.
"""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fairref.emoji.pictures import HAIR, Scene
from fairref.emoji.sheet import GENDERS, LOOKS, TONES

TABLE = Path(__file__).with_name("occupations.csv")
SPLITS = ("train", "validation", "test")
TONE_SHARE = (0.65, 0.18, 0.10, 0.07)  # light, medium-light, medium, dark
GENDER_WORDS = {"woman": ("woman", "female"), "man": ("man", "male")}
HAIR_WORDS = ("black", "brown", "red", "blond")
HUES = ("red", "yellow", "green", "cyan", "blue", "purple")

NEUTRAL = (
    "a photo of the face of a {o}, a person",
    "a photo of a {o}",
    "a picture of a {o}",
    "the face of a {o}",
    "a {o}",
)
GENDERED = (
    "a photo of the face of a {g} {o}, a person",
    "a photo of the face of a {g} {o}",
    "a photo of the face of a {o}, a {g}",
    "a photo of a {g} {o}",
    "a {g} {o}",
)
TONED = ("a photo of the face of a {t}-skinned {o}, a person", "a photo of a {o} with {t} skin")
BOTH = ("a photo of the face of a {t}-skinned {g} {o}", "a photo of a {g} {o} with {t} skin")
# How often each kind is drawn, in the U-Net's first and second stage: tones are harder to learn than genders.
SHARES = {
    "first": {"empty": 0.10, "neutral": 0.52, "gendered": 0.17, "toned": 0.10, "both": 0.11},
    "second": {"empty": 0.10, "neutral": 0.51, "gendered": 0.09, "toned": 0.16, "both": 0.14},
}


@dataclass(frozen=True)
class Occupation:
    name: str
    look: str
    share_women: float
    split: str


@cache
def occupations() -> tuple[Occupation, ...]:
    """All rows of the table."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(
            Occupation(r["name"], r["look"], float(r["share_women"]), r["split"])
            for r in csv.DictReader(file)
        )


@dataclass(frozen=True)
class Captions:
    """Every caption of the world with how often it is drawn and what it names; -1 where it names nothing."""

    texts: tuple[str, ...]
    weight: Tensor  # (M,) sums to 1
    occupation: Tensor  # (M,) index into occupations()
    gender: Tensor  # (M,) index into GENDERS
    tone: Tensor  # (M,) index into TONES


@cache
def captions(stage: str = "first") -> Captions:
    """The captions' table: each kind has its share of the draws, each template and word in it the same."""
    shares = SHARES[stage]
    rows: list[tuple[str, float, int, int, int]] = [("", shares["empty"], -1, -1, -1)]

    def add(kind: str, made: list[tuple[str, int, int, int]]) -> None:
        rows.extend((text, shares[kind] / len(made), o, g, t) for text, o, g, t in made)

    jobs = list(enumerate(job.name for job in occupations()))
    words = [(g, word) for g, name in enumerate(GENDERS) for word in GENDER_WORDS[name]]
    tones = list(enumerate(TONES))
    repeated = (NEUTRAL[0],) * 4 + NEUTRAL[1:]  # the method's own template half of the time
    add("neutral", [(s.format(o=job), o, -1, -1) for s in repeated for o, job in jobs])
    add(
        "gendered",
        [(s.format(o=job, g=word), o, g, -1) for s in GENDERED for o, job in jobs for g, word in words],
    )
    add("toned", [(s.format(o=job, t=tone), o, -1, t) for s in TONED for o, job in jobs for t, tone in tones])
    add(
        "both",
        [
            (s.format(o=job, g=word, t=tone), o, g, t)
            for s in BOTH
            for o, job in jobs
            for g, word in words
            for t, tone in tones
        ],
    )
    texts, weight, *named = zip(*rows)
    return Captions(texts, torch.tensor(weight), *(torch.tensor(column) for column in named))


def draw_captions(
    B: int, generator: torch.Generator, stage: str = "first"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """B draws: caption index, look, gender, tone, each (B,).

    What a caption leaves open follows the world's shares.
    """
    table, jobs = captions(stage), occupations()
    index = torch.multinomial(table.weight, B, replacement=True, generator=generator)
    any_job = torch.randint(len(jobs), (B,), generator=generator)
    job = torch.where(table.occupation[index] < 0, any_job, table.occupation[index])
    look = torch.tensor([LOOKS.index(o.look) for o in jobs])[job]
    man = torch.rand(B, generator=generator) >= torch.tensor([o.share_women for o in jobs])[job]
    gender = torch.where(table.gender[index] < 0, man.long(), table.gender[index])
    free = torch.multinomial(torch.tensor(TONE_SHARE), B, replacement=True, generator=generator)
    return index, look, gender, torch.where(table.tone[index] < 0, free, table.tone[index])


@dataclass(frozen=True)
class Description:
    """Captions of B pictures; gender and tone (B,) are indices, -1 where the caption does not name them."""

    texts: list[str]
    gender: Tensor
    tone: Tensor


def describe(scene: Scene, generator: torch.Generator) -> Description:
    """A caption for each picture: an occupation with its look, and some of what else can be seen."""
    texts = []
    named = torch.rand(len(scene), 4, generator=generator) < 0.6
    choice, word = torch.rand(2, len(scene), generator=generator)
    hair = (scene.hair[:, None] - torch.tensor(HAIR) / 255).square().sum(-1).argmin(1).tolist()
    for b, (named_gender, named_tone, named_hair, named_background) in enumerate(named.tolist()):
        jobs = [job.name for job in occupations() if job.look == LOOKS[scene.look[b]]]
        job = jobs[int(choice[b] * len(jobs))]
        words = GENDER_WORDS[GENDERS[scene.gender[b]]]
        gender = words[int(word[b] * len(words))] if named_gender else ""
        tone = f"{TONES[scene.tone[b]]}-skinned" if named_tone else ""
        text = " ".join(filter(None, ("a photo of the face of a", tone, gender, job))) + ", a person"
        text += f" with {HAIR_WORDS[hair[b]]} hair" if named_hair else ""
        background = colour_name(scene.background[b].mean(0))
        text += f" in front of a {background} background" if named_background else ""
        texts.append(text)
    return Description(texts, scene.gender.where(named[:, 0], -1), scene.tone.where(named[:, 1], -1))


def colour_name(rgb: Tensor) -> str:
    """The hue's name of a colour (3,) in [0, 1]; grey below a saturation of 15 %."""
    high, low = rgb.max(), rgb.min()
    if high - low <= 0.15 * high:
        return "grey"
    r, g, b = ((rgb - low) / (high - low)).tolist()
    sixth = (g - b) % 6 if r == 1 else 2 + b - r if g == 1 else 4 + r - g
    return HUES[round(sixth) % 6]
