"""Targets as a user writes them."""

import pytest

from fairref.errors import UserError
from fairref.fairness.attributes import Attribute, parse_target

KNOWN = {"gender": ("woman", "man"), "race": ("WMELH", "Asian", "Black", "Indian"), "shape": ("a", "b", "c")}


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("gender=0.5,0.5", (0.5, 0.5)),
        ("gender", (0.5, 0.5)),
        (" gender = .25 , 75e-2 ", (0.25, 0.75)),
        ("gender=1,0", (1.0, 0.0)),
        ("race", (0.25, 0.25, 0.25, 0.25)),
        ("race=1/8,1/8,1/4,1/2", (0.125, 0.125, 0.25, 0.5)),
        ("shape=1/3,1/3,1/3", (1 / 3, 1 / 3, 1 / 3)),
        ("shape=0.3333333,0.3333333,0.3333333", (0.3333333, 0.3333333, 0.3333333)),
    ],
)
def test_a_target_is_read(text, target):
    attribute = parse_target(text, KNOWN)
    assert attribute.target == target
    assert attribute.classes == KNOWN[attribute.name]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("age=0.5,0.5", 'names the attribute "age"; the classifier knows: gender, race, shape'),
        ("=0.5,0.5", 'names the attribute ""'),
        ("", 'names the attribute ""'),
        ("gender=", "expected 2 numbers"),
        ("gender=half,half", "for woman, man"),
        ("gender=1/0,1", "expected 2 numbers"),
        ("gender=1e999,0", "expected 2 numbers"),
        ("gender=nan,nan", "expected 2 numbers"),
        ("gender=0.5", "has 1 numbers but there are 2 classes"),
        ("gender=0.2,0.3,0.5", "has 3 numbers but there are 2 classes"),
        ("gender=0.5,0.6", "sums to 1.1; the sum must be 1"),
        ("shape=0.333,0.333,0.333", "sums to 0.999"),
        ("gender=1.5,-0.5", "must be from 0 to 1"),
    ],
)
def test_a_wrong_target_is_explained_in_one_sentence(text, said):
    with pytest.raises(UserError) as error:
        parse_target(text, KNOWN)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_attribute_made_by_hand_is_checked_too():
    with pytest.raises(UserError, match="at least two different names"):
        Attribute("gender", ("woman", "woman"), (0.5, 0.5))
    with pytest.raises(UserError, match="at least two different names"):
        Attribute("gender", ("woman",), (1.0,))
    with pytest.raises(UserError, match="sums to inf"):
        Attribute("gender", ("woman", "man"), (float("inf"), 1.0))
    with pytest.raises(UserError, match="from 0 to 1"):
        Attribute("gender", ("woman", "man"), (float("nan"), 1.0))
