"""The small world's concepts and the things that show them are what their tables promise."""

import csv
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from fairref import emoji

FOLDER = Path(emoji.__file__).parent
COUNTS = {  # kind -> names for finetuning, unseen names
    "activity": (40, 10),
    "context": (34, 8),
    "style": (6, 2),
    "descriptor": (30, 10),
}
STYLES = {"grey", "sepia", "night", "outline", "pastel", "mosaic", "warm", "cold"}
NOBODY = 12  # things, at least, that no concept has
EMOJI_STYLE = "FE0F"
# a word that names a gender, a skin tone or an age
NAMING = re.compile(
    r"\b((wo)?m[ae]n|(fe)?male|girl|boy|lady|lord|king|queen|his|her|dark|pale|skinned|young|old|child|aged)\b"
)


def table(name):
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


CONCEPTS = table("concepts.csv")
THINGS = {row["name"]: row["code"].split() for row in table("things.csv")}


def test_counts():
    count = Counter((row["kind"], row["split"]) for row in CONCEPTS)
    expected = {
        (kind, split): n
        for kind, numbers in COUNTS.items()
        for split, n in zip(("train", "test"), numbers, strict=True)
    }
    assert count == expected


def test_phrases_are_normal_and_stand_once():
    phrases = [row["phrase"] for row in CONCEPTS]
    assert len(set(map(str.lower, phrases))) == len(phrases)
    assert all(re.fullmatch(r"[A-Za-z]+([ -][A-Za-z]+)*", phrase) for phrase in phrases)
    for row in CONCEPTS:
        if row["kind"] == "activity":
            assert any(word.endswith("ing") for word in row["phrase"].split()[:2])
        if row["kind"] == "descriptor":
            assert " " not in row["phrase"]


@pytest.mark.parametrize("kind", COUNTS)
def test_within_a_kind_a_thing_shows_one_phrase(kind):
    things = [row["thing"] for row in CONCEPTS if row["kind"] == kind]
    assert len(set(things)) == len(things)
    assert set(things) == STYLES if kind == "style" else set(things) <= set(THINGS)


def test_no_concept_names_a_gender_a_skin_tone_or_an_age():
    for row in CONCEPTS:
        if row["kind"] != "style":  # "in warm light" is about the picture
            assert not NAMING.search(f"{row['phrase']} {row['thing'].replace('_', ' ')}".lower()), row


def test_things_stand_in_the_order_of_their_first_use_then_those_of_nobody():
    used = list(dict.fromkeys(row["thing"] for row in CONCEPTS if row["kind"] != "style"))
    names = [row["name"] for row in table("things.csv")]
    assert names[: len(used)] == used and len(set(names)) == len(names)
    assert len(names) >= len(used) + NOBODY


def test_each_code_is_one_character_that_unicode_calls_so():
    assert len(set(map(tuple, THINGS.values()))) == len(THINGS)
    for thing, code in THINGS.items():
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", thing)
        assert code[1:] in ([], [EMOJI_STYLE]), thing
        name = unicodedata.name(chr(int(code[0], 16)))
        assert set(thing.upper().split("_")) <= set(name.split()), (thing, name)
        assert not re.search(r"\b(FACE|PERSON|MAN|WOMAN|FLAG|MODIFIER|REGIONAL)\b", name), (thing, name)
