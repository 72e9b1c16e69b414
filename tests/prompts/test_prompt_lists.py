"""The lists of prompts have the method's sizes (docs/method.md §7), stand once, and name nobody's class."""

import re
from collections import Counter
from pathlib import Path

import pytest

from fairref.errors import UserError
from fairref.prompts import (
    CONCEPTS,
    NAMES,
    PARTS,
    concept,
    occupation_prompt,
    read_occupations,
)
from fairref.prompts.words import WORDS, naming

COUNTS = {  # concept -> prompts for finetuning, validation, test
    "occupations": (1000, 20, 50),
    "sports": (250, 0, 50),
    "style_context": (150, 0, 19),
    "descriptors": (40, 0, 10),
}
# stricter than `naming`: of what is written here a doubtful word is one too many
GENDERED = re.compile(
    r"\b((?!hu)\w*(wo)?m[ae]n|(fe)?males?|(he|she|his|hers?|him)|(boy|girl|lad|guy)s?|lad(y|ies)"
    r"|mothers?|fathers?|sisters?|brothers?|sons?|daughters?|wi(fe|ves)|husbands?|king|queen|prince|lord|sir"
    r"|\w*(waiter|cowboy|maid|wife|master|mistress|groom|bride|nun|monk|priest|seamster)s?"
    r"|\w+tress(es)?|(host|steward|godd|govern|princ|duch|heir|lion)ess(es)?|masseuse|ballerina)\b",
    re.IGNORECASE,
)
# what may be written with capitals: abbreviations, names of languages and places, and of games
PROPER = {
    "3D",
    "CNC",
    "MRI",
    "American",
    "Australian",
    "Basque",
    "Braille",
    "Canadian",
    "Chinese",
    "Danish",
    "Eton",
    "Finnish",
    "Gaelic",
    "Irish",
    "Russian",
    "Texas",
    "Valencian",
    "Monopoly",
    "Scrabble",
    "Uno",
    "Yahtzee",
}
OF_ONE_WORD = 25  # occupations, at most, that end in the same word


def everything(name):
    return [p for part in (concept(name).train, concept(name).validation, concept(name).test) for p in part]


def core(prompt):
    """A prompt without case, hyphens, spaces, apostrophes and plural endings."""
    words = re.sub(r"[^\w]+", " ", prompt.lower().replace("'", "")).split()
    return "".join(word.removesuffix("s") if len(word) > 3 else word for word in words)


@pytest.mark.parametrize("name", CONCEPTS)
def test_counts(name):
    c = concept(name)
    assert c.name == name
    assert (len(c.train), len(c.validation), len(c.test)) == COUNTS[name]


@pytest.mark.parametrize("name", CONCEPTS)
def test_each_prompt_stands_once_in_one_part(name):
    count = Counter(map(core, everything(name)))
    assert [words for words, n in count.items() if n > 1] == []


@pytest.mark.parametrize("name", CONCEPTS)
def test_no_prompt_names_a_gender(name):
    assert [p for p in everything(name) if GENDERED.search(p)] == []


@pytest.mark.parametrize(
    "text, found",
    [
        ("fireman", True),
        ("a business woman", True),
        ("two policemen", True),
        ("her dog", True),
        ("an actress", True),
        ("a chambermaid", True),
        ("a human rights lawyer", False),
        ("the manager of a theater", False),
        ("a shepherd in the mist", False),
        ("a medical examiner", False),
    ],
)
def test_what_names_a_gender(text, found):
    assert bool(GENDERED.search(text)) == found


@pytest.mark.parametrize("attribute", WORDS)
@pytest.mark.parametrize("name", CONCEPTS)
def test_no_prompt_names_a_class(name, attribute):
    assert [p for p in everything(name) if naming(p, attribute)] == []


@pytest.mark.parametrize("attribute", WORDS)
def test_no_prompt_of_the_small_bundle_names_a_class_but_those_that_should(attribute):
    own = read_occupations(Path(__file__).parents[2] / "weights" / "emoji")
    prompts = [occupation_prompt(name) for part in PARTS for name in getattr(own, part)]
    prompts += [p for of_one in own.concepts.values() for texts in of_one.values() for p in texts]
    titles = ["factory foreman"] if attribute == "gender" else []
    found = [p for p in prompts if naming(p, attribute)]
    assert len(prompts) > 300 and found == [occupation_prompt(name) for name in titles]
    for name in own.explicit.get(attribute, {}):
        assert naming(own.explicit_prompt(attribute, name, "pilot"), attribute)


@pytest.mark.parametrize(
    "text, attribute, words",
    [
        ("fireman", "gender", "fireman"),
        ("a business woman", "gender", "woman"),
        ("two policemen", "gender", "policemen"),
        ("HER dog", "gender", "HER"),
        ("an actress", "gender", "actress"),
        ("a chambermaid", "gender", "chambermaid"),
        ("a human rights lawyer", "gender", ""),
        ("the manager of a theater", "gender", ""),
        ("a shepherd in the mist", "gender", ""),
        ("a medical examiner", "gender", ""),
        ("a German baker on a mattress, in stress", "gender", ""),
        ("a shaman with a specimen in a fortress", "gender", ""),
        ("two businesswomen and a sales-man", "gender", "businesswomen"),
        ("a headmistress", "gender", "headmistress"),
        ("a dog groomer on a kingfisher boat", "gender", ""),
        ("an Asian chef", "race", "Asian"),
        ("a Middle Eastern poet", "race", "Middle Eastern"),
        ("a young black woman", "race", "black woman"),
        ("a black-haired man", "race", ""),
        ("a diplomat in a black car", "race", ""),
        ("a medium-light-skinned pilot", "skin_tone", "medium-light-skinned"),
        ("a cook with dark skin", "skin_tone", "dark skin"),
        ("a black woman", "age", ""),
        ("an old bearded man", "age", "old bearded man"),
        ("a photo of the face of an old pilot, a person", "age", "face of an old"),
        ("a 40-year-old nurse", "age", "40-year-old"),
        ("a youngster in an old town", "age", ""),
        ("a woman in a hat", "hat", ""),
    ],
)
def test_the_words_by_which_a_class_is_named(text, attribute, words):
    assert naming(text, attribute) == words


@pytest.mark.parametrize("name", CONCEPTS)
def test_prompts_are_normal(name):
    for prompt in everything(name):
        assert prompt == " ".join(prompt.split())
        assert re.fullmatch(r"[\w', -]+", prompt), prompt
        capitals = {word for word in re.findall(r"\w+", prompt) if word != word.lower()}
        assert capitals <= PROPER, prompt


def test_prompts_are_sentences_of_the_method():
    names = [p.removeprefix("a photo of the face of a ") for p in everything("occupations")]
    assert [occupation_prompt(n.removesuffix(", a person")) for n in names] == everything("occupations")
    assert all(p.startswith("a person playing ") for p in everything("sports"))
    for name in set(CONCEPTS) - set(NAMES):
        for prompt in everything(name):
            assert prompt.endswith(", a person")
            assert not re.search(r"\ba [aeio]|\ban [b-df-gj-np-tv-z]", prompt), prompt


def test_occupations_are_not_one_word_again_and_again():
    last = Counter(p.removesuffix(", a person").split()[-1] for p in everything("occupations"))
    assert max(last.values()) <= OF_ONE_WORD


def test_an_unknown_concept():
    with pytest.raises(UserError, match="'hobbies'; give one of occupations, sports"):
        concept("hobbies")
