"""What a report holds of how sure its numbers are: by each judge and attribute, raw and corrected, before and after."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from fairref.evaluation import judge_errors
from fairref.evaluation.certainty import certainty
from fairref.evaluation.confusion import confusions
from fairref.evaluation.judge_errors import MISFIT, corrected, prediction_powered
from fairref.evaluation.labels import BY_HAND
from fairref.evaluation.paired import diversities, diversity, paired, paired_by_judge
from fairref.evaluation.parts import correct, put_beside, with_confusions
from fairref.evaluation.sentences import lines
from fairref.evaluation.statistics import JudgedImages, bias_report, flips, joint_names
from fairref.fairness.attributes import JointTarget

BOTH = {"gender": ("woman", "man"), "skin_tone": ("light", "medium", "dark")}
NAMES = ["a", "b", "c"]
TABLE = np.outer([0.4, 0.6], [0.5, 0.3, 0.2])


def images(rng, lean, n=30):
    """n images of one prompt, of which the second judge can't tell some and knows one attribute alone."""
    gender = torch.tensor(rng.choice(2, n, p=[0.5 + lean, 0.5 - lean]))
    tone = torch.tensor(rng.choice(3, n))
    unsure = gender.clone()
    unsure[:4] = -1
    features = torch.nn.functional.normalize(torch.tensor(rng.normal(size=(n, 5))), dim=1)
    return JudgedImages(
        {"classifier": {"gender": gender, "skin_tone": tone}, "templates": {"gender": unsure}},
        features={"clip": features},
    )


@pytest.fixture(scope="module")
def before():
    rng = np.random.default_rng(0)
    return [images(rng, lean) for lean in (0.4, -0.4, 0.3)]


@pytest.fixture(scope="module")
def after():
    rng = np.random.default_rng(1)
    return [images(rng, lean) for lean in (0.1, 0, 0.05)]


@pytest.fixture(scope="module")
def report_of_both(before):
    return bias_report(before, NAMES, BOTH, TABLE)


def test_every_judge_of_every_attribute_is_as_sure_as_its_counts(before, report_of_both):
    report = report_of_both
    alone = report["attributes"]["gender"]["judges"]
    for judge, undecided in (("classifier", 0), ("templates", 4)):
        counts = np.array(list(alone[judge]["counts"].values()))
        expected = certainty(counts, np.full(3, undecided), NAMES, BOTH["gender"], np.array([0.4, 0.6]))
        assert alone[judge]["sure"] == expected
    assert alone["templates"]["sure"]["bounds"]["low"] < alone["templates"]["from_target"]["mean"]
    joint = report["judges"]["classifier"]["sure"]
    assert set(joint["prompts"]["a"]["share"]) == {
        f"{g}, {t}" for g in BOTH["gender"] for t in BOTH["skin_tone"]
    }
    assert "templates" not in report["judges"]
    # equal shares need no target
    even = bias_report(before, NAMES, {"gender": BOTH["gender"]})["judges"]["classifier"]
    gaps = [abs(a - b) / 30 for a, b in even["counts"].values()]
    assert even["sure"]["worst_prompt"]["bias"] == pytest.approx(max(gaps))


def test_what_is_corrected_and_by_what(report_of_both, monkeypatch):
    target = JointTarget(BOTH, TABLE)
    report = {**deepcopy(report_of_both), "attribute": "gender,skin_tone"}
    known = {"counts": [[180, 20], [30, 170]], "untold": [0, 0], "source": "labelled pictures"}
    report["confusion"] = {"classifier": {"gender": [known, {**known, "counts": [[1, 0], [0, 1]]}]}}
    correct(report, target)
    of_judge = report["attributes"]["gender"]["judges"]["classifier"]
    found = of_judge["corrected"]
    assert found["confusion"] == [[0.9, 0.15], [0.1, 0.85]] and found["source"] == "labelled pictures"
    share = of_judge["share"]["woman"]
    assert found["share"]["woman"][0] == pytest.approx((share - 0.15) / 0.75)
    assert "corrected" not in report["attributes"]["skin_tone"]["judges"]["classifier"]
    assert found["rms_gap"] == corrected_rms_gap(of_judge, [0.4, 0.6])
    # labels of 60 of the 90 images themselves are too few for an interval, and M has one
    labelled, (women, men) = np.array([[33, 2], [1, 24]]), np.sum(list(of_judge["counts"].values()), 0)
    by_hand = {**known, "source": BY_HAND, "counts": labelled.tolist()}
    report["confusion"]["classifier"]["gender"] = [known, by_hand]
    correct(report, target)
    assert of_judge["corrected"] == found
    # where they are enough, the others are what the judge counts in all, less those
    monkeypatch.setattr(judge_errors, "MIN_POWERED", 60)
    correct(report, target)
    expected = prediction_powered(np.array([women - 34, men - 26]), labelled, BOTH["gender"])
    powered = of_judge["corrected"]
    assert {key: powered[key] for key in expected} == expected and powered["rms_gap"] == found["rms_gap"]
    assert (
        powered["source"].startswith(f"{BY_HAND}; for the gaps") and "labelled pictures" in powered["source"]
    )
    # a class without a label: they need no M
    report["confusion"]["classifier"]["gender"] = [{**by_hand, "counts": [[30, 4], [0, 0]]}]
    correct(report, target)
    powered = of_judge["corrected"]
    assert powered["share"]["woman"][0] > 0.5 and powered["rms_gap"] is None
    assert powered["source"] == f"{BY_HAND}; for the gaps: none without M"


def corrected_rms_gap(of_judge, target):
    """That of the pictures by which `known` says how often the judge errs."""
    counts = np.array(list(of_judge["counts"].values()))
    return corrected(counts, np.array([[180, 20], [30, 170]]), "", BOTH["gender"], np.array(target))[
        "rms_gap"
    ]


def test_joint_classes_are_corrected_where_pictures_have_labels_of_all_attributes(report_of_both):
    rng = np.random.default_rng(0)
    truth = {"gender": rng.choice(2, 900), "skin_tone": rng.choice([-1, 0, 1, 2], 900)}
    judged = {name: np.where(rng.random(900) < 0.95, of, np.maximum(of - 1, 0)) for name, of in truth.items()}
    by_judge = {"classifier": judged, "templates": {"gender": judged["gender"]}}
    known = confusions(truth, by_judge, BOTH, "pictures")
    joint, told = known["classifier"]["gender,skin_tone"], truth["skin_tone"] >= 0
    assert joint.counts.sum() == told.sum() and set(known["templates"]) == {"gender"}
    at = (
        (truth["gender"] == 1)
        & (truth["skin_tone"] == 2)
        & (judged["gender"] == 0)
        & (judged["skin_tone"] == 2)
    )
    assert joint.counts[5, 2] == at.sum() > 0
    report = {**deepcopy(report_of_both), "attribute": "gender,skin_tone", "confusion": {}}
    with_confusions(report, known)
    correct(report, JointTarget(BOTH, TABLE))
    found = report["judges"]["classifier"]
    counts = np.array(list(found["counts"].values()))
    expected = corrected(counts, joint.counts, "pictures", joint_names(BOTH), TABLE.reshape(-1))
    assert found["corrected"] == expected and expected["rms_gap"]
    many = {"gender": tuple("abc"), "skin_tone": tuple("xyz")}
    assert set(confusions(truth, by_judge, many, "pictures")["classifier"]) == set(BOTH)


def test_a_report_says_it_in_one_line_more(before):
    report = {**bias_report(before, NAMES, {"gender": BOTH["gender"]}), "attribute": "gender"}
    report |= {"part": "test", "concept": "jobs", "clip_t": None, "confusion": {}}
    sure = report["judges"]["classifier"]["sure"]
    (line,) = [line for line in lines(report) if "rms gap" in line]
    gap, within = sure["rms_gap"], sure["fair"]["upper"]
    ends = f"[{gap['low']:.3f}, {gap['high']:.3f}]"
    assert f"{gap['value']:.3f} {ends}, upper 95% bound {within:.3f} (classifier)" in line
    assert "as this judge sees them" in line and line.startswith("apparent gender")
    fixed = {"rms_gap": {"value": 0.5, "low": 0.25, "high": 0.75}, "upper": 0.7}
    report["judges"]["classifier"]["corrected"] = fixed
    assert "corrected 0.500 [0.250, 0.750], upper 95% bound 0.700 (classifier)" in "\n".join(lines(report))
    report["judges"]["classifier"]["corrected"] = {"rms_gap": None, "method": MISFIT}
    assert f", corrected: {MISFIT} (classifier)" in "\n".join(lines(report))


def test_before_and_after_by_each_judge_that_knows_all_attributes(before, after):
    target = JointTarget(BOTH, TABLE)
    found = paired_by_judge(after, before, target)
    counts = [np.stack([s.counts("classifier", BOTH).reshape(-1) for s in part]) for part in (before, after)]
    assert found == {"classifier": paired(*counts, TABLE.reshape(-1))}
    gender = JointTarget({"gender": BOTH["gender"]}, np.array([0.5, 0.5]))
    assert all(of_judge["difference"] < 0 for of_judge in paired_by_judge(after, before, gender).values())


def test_beside_the_original_each_attribute_has_its_own_test_and_flips(before, after, report_of_both):
    """By the judge that knows it alone, too."""
    report = {**deepcopy(report_of_both), "attribute": "gender,skin_tone"}
    put_beside(report, after, before, JointTarget(BOTH, TABLE))
    gender = {"gender": BOTH["gender"]}
    alone = report["attributes"]["gender"]
    assert alone["paired"] == paired_by_judge(after, before, JointTarget(gender, np.array([0.4, 0.6])))
    assert alone["flips"] == flips(after, before, gender) and set(alone["flips"]) == {
        "classifier",
        "templates",
    }
    assert set(report["paired"]) == set(report["flips"]) == {"classifier"}


@pytest.mark.parametrize("first", [0, 1])
def test_a_prompt_with_one_image_before_or_after_is_no_pair(first):
    """And a gap is that from the target."""
    target, pair = np.array([0.75, 0.25]), [np.array([[30, 30]] * 3), np.array([[45, 15]] * 3)]
    found = paired(*pair, target)
    assert found["difference"] < -0.2 and "never below .05" in found["method"]
    pair[first], pair[1 - first] = (
        np.vstack([pair[first], [[1, 0]]]),
        np.vstack([pair[1 - first], [[45, 15]]]),
    )
    assert paired(*pair, target) == found


def test_images_of_no_known_class_are_not_alike():
    assert diversity([np.array([[1.0, 0], [0, 1], [1, 0]])], [np.array([-1, -1, 0])]) is None


def test_diversity_of_joint_classes(before):
    found = diversities(before, BOTH)
    distances = []
    for s in before:
        x, joint = (
            s.features["clip"],
            s.classes["classifier"]["gender"] * 3 + s.classes["classifier"]["skin_tone"],
        )
        distances += [1 - x[i] @ x[j] for i in range(30) for j in range(i) if joint[i] == joint[j]]
    assert found == {"clip": pytest.approx(float(torch.stack(distances).mean()))}


def test_images_of_which_a_judge_tells_none_have_no_shares():
    """Not shares of 0, which would be a finding."""
    nobody = JudgedImages(classes={"classifier": {"gender": torch.full((4,), -1)}})
    found = bias_report([nobody] * 2, ["a", "b"], {"gender": BOTH["gender"]})["judges"]["classifier"]
    assert found["share"] == {"woman": None, "man": None} and found["mean"] is None
