"""Which prompts a run takes."""

from dataclasses import replace

import pytest
import torch
from tiny_bundle import OCCUPATIONS

from fairref.bundle.recipe import resolve
from fairref.errors import UserError
from fairref.fairness.attributes import parse_targets
from fairref.prompts import Concept, Occupations, occupation_prompt, sets
from fairref.prompts.sets import Prompts, evenly, read_prompts
from fairref.training.setup import Setup
from fairref.training.step import draw_task

CLASSES = {"gender": ("woman", "man")}
SPORTS = {
    "train": ("a person playing chess", "a person playing golf"),
    "validation": (),
    "test": ("a person rowing",),
}


@pytest.fixture
def bundle(loaded_tiny):
    return loaded_tiny


@pytest.fixture
def lists(monkeypatch):
    """fairref.prompts' lists, two of them, tiny."""

    found = {
        "occupations": Concept(
            "occupations", (occupation_prompt("cook"),), (), (occupation_prompt("smith"),)
        ),
        "sports": Concept("sports", **SPORTS),
    }
    monkeypatch.setattr(sets, "CONCEPTS", tuple(found))
    monkeypatch.setattr(sets, "concept", found.__getitem__)


def read(bundle, wanted="occupations", template=None, attributes=("gender",)):
    return read_prompts(wanted, template, bundle.path, list(attributes))


def test_occupations_are_the_bundles(bundle):
    (found,) = read(bundle)
    assert found.train == tuple(map(occupation_prompt, OCCUPATIONS["train"]))
    assert found.short(found.test[0]) == "singer" and found.short("a person") == "a person"
    explicit = found.explicit("test", CLASSES)
    assert (
        explicit[1] == ("a photo of the face of a man singer, a person", "gender", 1) and len(explicit) == 4
    )


def test_a_template_takes_the_place_of_the_methods(bundle):
    (found,) = read(bundle, template="a drawing of a {occupation}")
    assert found.test == ("a drawing of a singer", "a drawing of a farmer")
    assert found.explicit("test", CLASSES)[0][0] == "a photo of the face of a woman singer, a person"


def test_concepts_are_the_bundles_or_those_of_the_lists(bundle, lists):
    occupations, sports = read(bundle, "occupations,sports")
    assert occupations.test[0] == occupation_prompt("singer")
    assert (sports.name, sports.train, sports.test) == ("sports", SPORTS["train"], SPORTS["test"])
    assert sports.explicit("test", CLASSES) == []
    elsewhere = replace(bundle, path=bundle.path / "unet")  # has no prompts.json
    (listed,) = read(elsewhere, template="a {occupation}")
    assert (listed.train, listed.test) == (("a cook",), ("a smith",))
    assert listed.explicit("test", CLASSES)[0] == (
        "a photo of the face of a woman smith, a person",
        "gender",
        0,
    )


def test_a_bundles_own_concept_and_what_shows_an_attribute(bundle, monkeypatch):
    moods = {"moods": {"train": ["a brave person"], "test": ["a shy person"]}}
    hiding = {"age": ["b", "d", "f", "a shy person"]}
    own = Occupations(("a", "b", "c"), ("d",), ("e", "f"), concepts=moods, hiding=hiding)
    monkeypatch.setattr("fairref.prompts.sets.read_own", lambda path: own)
    occupations, moods = read(bundle, "occupations,moods", attributes=("gender", "age"))
    assert list(occupations.occupations.values()) == ["a", "c", "e"] and occupations.validation == ()
    assert (moods.train, moods.validation, moods.test) == (("a brave person",), (), ())
    assert read(bundle, "moods")[0].test == ("a shy person",)
    assert len(read(bundle)[0].train) == 3


def test_words_that_name_a_class():
    occupations = {"a foreman": "foreman", "a lady cook": "cook", "a pilot": "pilot"}
    prompts = Prompts("occupations", (*occupations, "a king"), test=("a man",), occupations=occupations)
    assert prompts.naming("gender") == {"a lady cook": "lady", "a king": "king"}
    assert prompts.naming("age") == {}


def test_an_even_choice_has_both_of_pairs():
    names = tuple(map(str, range(50)))
    assert evenly(names, 6) == ["0", "8", "16", "25", "33", "41"]
    assert evenly(names[:3], 6) == ["0", "1", "2"] and evenly((), 6) == []


def test_a_text_file(bundle, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# mine\n\na cook\n  a judge \na cook\n")
    (found,) = read(bundle, str(file))
    assert found.train == ("a cook", "a judge") == found.validation and found.test == ()
    assert found.file == "prompts.txt"
    assert read(bundle, ["a cook", "a judge"]) == [replace(found, file="")]


@pytest.mark.parametrize(
    "wanted, template, words",
    [
        ("occupations,height", None, "'height'; expected some of occupations, sports, or a text file"),
        ("sports,sports", None, "twice"),
        ("occupations", "a photo", "with {occupation} in it"),
        ("sports", "a {occupation}", "leaves out"),
        ("nowhere.txt", None, "nowhere.txt: can't be read"),
        ("EMPTY", None, "no prompt in it"),
    ],
)
def test_mistakes(bundle, lists, tmp_path, wanted, template, words):
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(UserError) as error:
        read(bundle, wanted.replace("EMPTY", str(tmp_path / "empty.txt")), template)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_concept_without_prompts_for_finetuning_is_refused(bundle):
    target = parse_targets(["gender"], bundle.attributes)
    recipe = resolve(("gender",), bundle.recipe, {})
    for concepts in ((("a",), ()), ()):
        with pytest.raises(UserError, match="without a prompt for finetuning"):
            Setup(bundle, recipe, target, concepts)


def test_concepts_take_turns(bundle):
    target = parse_targets(["gender"], bundle.attributes)
    recipe = resolve(("gender",), bundle.recipe, {"explicit_every": 3})
    concepts = (tuple("abcd"), ("x",), ("1", "2"))
    setup = Setup(bundle, recipe, target, concepts, explicit=(("explicit", "gender", 0),))
    tasks = [draw_task(setup, i) for i in range(36)]
    neutral = [task.prompt for task in tasks if not task.explicit]
    assert len(neutral) == 24
    for which, prompts_of_one in enumerate(concepts):
        turns = neutral[which::3]
        assert set(turns) <= set(prompts_of_one)
        for epoch in torch.arange(8).split(len(prompts_of_one)):
            assert sorted(turns[i] for i in epoch) == sorted(prompts_of_one)
