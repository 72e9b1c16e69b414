"""Targets as a user writes them."""

import json

import numpy as np
import pytest
from scipy.stats import chisquare

from fairref.errors import UserError
from fairref.evaluation.certainty import p_value
from fairref.fairness.attributes import (
    Attribute,
    JointTarget,
    parse_target,
    parse_targets,
)

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
        ("shape=0.3333333,0.3333333,0.3333333", pytest.approx((1 / 3, 1 / 3, 1 / 3), abs=1e-15)),
    ],
)
def test_a_target_is_read(text, target):
    attribute = parse_target(text, KNOWN)
    assert attribute.target == target
    assert attribute.classes == KNOWN[attribute.name]


def test_a_target_in_decimals_is_its_fraction_wherever_it_is_used():
    """scipy's test and numpy's draws refuse shares whose sum is a millionth off, which the command line takes."""
    for numbers in ("0.4444444,0.3333333,0.1111111,0.1111111", "0.3333333,0.3333333,0.3333333,0"):
        target = parse_target(f"race={numbers}", KNOWN).target
        joint = parse_targets([f"race={numbers}", "gender=0.3333333,0.6666667"], KNOWN)
        for shares in (np.array(target), joint.table.ravel(), np.array(joint.marginal("race").target)):
            assert abs(shares.sum() - 1) < 1e-12
            counts = np.random.default_rng(0).multinomial(60, shares)
            np.random.default_rng(0).choice(len(shares), 3, p=shares)
            assert 0 < p_value(counts, shares) <= 1
    rounded = JointTarget({"gender": KNOWN["gender"]}, np.array([0.3333333, 0.6666666]))
    assert rounded.table.sum() == pytest.approx(1, abs=1e-12)


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
        ("gender=0.5,0.500002", "sums to 1.000002; the sum must be 1"),
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


AGES = {"gender": ("woman", "man"), "age": ("young", "old")}
EVERY_GROUP = {"woman": {"young": 0.375, "old": 0.125}, "man": {"young": 0.375, "old": 0.125}}


def test_independent_targets_are_multiplied():
    target = parse_targets(["gender=0.4,0.6", "race", "shape=1,0,0"], KNOWN)
    assert list(target.classes) == ["gender", "race", "shape"] and target.table.shape == (2, 4, 3)
    assert target.table[1, 2].tolist() == pytest.approx([0.15, 0, 0])
    for name, shares in (("gender", (0.4, 0.6)), ("race", (0.25,) * 4), ("shape", (1, 0, 0))):
        assert target.marginal(name).target == pytest.approx(shares)


def test_the_same_shares_in_every_group():
    base = parse_targets(["gender=0.3,0.7"], AGES)
    target = base.and_in_every_group(Attribute("age", AGES["age"], (0.75, 0.25)))
    np.testing.assert_allclose(target.table / target.table.sum(1, keepdims=True), [[0.75, 0.25]] * 2)
    assert target.marginal("gender").target == pytest.approx((0.3, 0.7))


def test_a_joint_table(tmp_path):
    file = tmp_path / "target.json"
    file.write_text(json.dumps({"attributes": ["gender", "age"], "shares": EVERY_GROUP}))
    assert parse_targets([str(file)], AGES).table.tolist() == [[0.375, 0.125], [0.375, 0.125]]
    shares = {"man": {"old": 0.5}, "woman": {"young": 0.5}}  # any order; what is left out has no share
    file.write_text(json.dumps({"attributes": ["gender", "age"], "shares": shares}))
    assert parse_targets([str(file)], AGES).table.tolist() == [[0.5, 0], [0, 0.5]]


def gender_and_age(shares):
    return {"attributes": ["gender", "age"], "shares": shares}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "not JSON"),
        ([1], "found a list, expected a JSON object"),
        ({"attributes": ["gender"]}, "expected an object with the keys"),
        ({"attributes": ["height"], "shares": {}}, "expected some of: gender, age"),
        ({"attributes": [], "shares": {}}, "expected some of"),
        ({"attributes": [{"gender": ["woman"]}], "shares": {}}, "expected some of"),
        ({"attributes": ["age", "age"], "shares": {}}, "names one twice"),
        (gender_and_age({"women": {"young": 1}}), 'found women for "gender"; expected shares of woman, man'),
        (gender_and_age({"woman": 1}), 'found 1 for "age"'),
        (gender_and_age({"woman": {"young": "1"}}), "found '1' as a share"),
        (gender_and_age({"woman": {"young": True}}), "found True as a share"),
        (gender_and_age({"woman": {"young": 0.5}}), "the sum must be 1"),
        (gender_and_age({"woman": {"young": 1.5, "old": -0.5}}), "must be from 0 to 1"),
    ],
)
def test_a_wrong_table_is_explained(tmp_path, content, said):
    file = tmp_path / "target.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as error:
        parse_targets([str(file)], AGES)
    assert said in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def test_wrong_combinations_are_refused(tmp_path):
    with pytest.raises(UserError, match='names the attribute "gender" twice'):
        parse_targets(["gender", "gender=1,0"], KNOWN)
    with pytest.raises(UserError, match="stands alone"):
        parse_targets(["gender", "joint.json"], KNOWN)
    with pytest.raises(UserError, match=r"joint\.json"):
        parse_targets([str(tmp_path / "joint.json")], KNOWN)
    with pytest.raises(UserError, match=r"expected \(2, 2\)"):
        JointTarget(AGES, np.full((4,), 0.25))


def test_joint_classes_are_drawn_from_the_table():
    table = np.array([[0.375, 0.125], [0.5, 0.0]])
    drawn = JointTarget(AGES, table).drawn(4000, np.random.default_rng(0))
    assert all((rows.sum(1) == 1).all() and rows.shape == (4000, 2) for rows in drawn.values())
    gender, age = (rows.argmax(1) for rows in drawn.values())
    counts = np.bincount(2 * gender + age, minlength=4)
    assert counts[3] == 0 and chisquare(counts[:3], 4000 * table.reshape(-1)[:3]).pvalue > 0.01
