"""What a report holds of how sure its numbers are: by each judge and attribute, raw and corrected, before and after."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from fairref.evaluation.certainty import certainty
from fairref.evaluation.judge_errors import prediction_powered
from fairref.evaluation.labels import BY_HAND
from fairref.evaluation.paired import diversities, paired, paired_by_judge
from fairref.evaluation.parts import correct
from fairref.evaluation.sentences import lines
from fairref.evaluation.statistics import JudgedImages, bias_report
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


def test_what_is_corrected_and_by_what(report_of_both):
    target = JointTarget(BOTH, TABLE)
    report = deepcopy(report_of_both)
    known = {"counts": [[180, 20], [30, 170]], "untold": [0, 0], "source": "labelled pictures"}
    report["confusion"] = {"classifier": {"gender": [known, {**known, "counts": [[1, 0], [0, 1]]}]}}
    correct(report, target)
    of_judge = report["attributes"]["gender"]["judges"]["classifier"]
    found = of_judge["corrected"]
    assert found["confusion"] == [[0.9, 0.15], [0.1, 0.85]] and found["source"] == "labelled pictures"
    share = of_judge["share"]["woman"]
    assert found["share"]["woman"][0] == pytest.approx((share - 0.15) / 0.75)
    assert "corrected" not in report["attributes"]["skin_tone"]["judges"]["classifier"]
    # labels of 60 of the 90 images themselves: the others are what the judge counts in all, less those
    labelled, (women, men) = np.array([[33, 2], [1, 24]]), np.sum(list(of_judge["counts"].values()), 0)
    known |= {"source": BY_HAND, "counts": labelled.tolist()}
    correct(report, target)
    expected = prediction_powered(np.array([women - 34, men - 26]), labelled, BOTH["gender"])
    assert {key: of_judge["corrected"][key] for key in expected} == expected


def test_a_report_says_it_in_one_line_more(before):
    report = {**bias_report(before, NAMES, {"gender": BOTH["gender"]}), "attribute": "gender"}
    report |= {"part": "test", "concept": "jobs", "clip_t": None, "confusion": {}}
    sure = report["judges"]["classifier"]["sure"]
    (line,) = [line for line in lines(report) if "rms gap" in line]
    gap, within = sure["rms_gap"], sure["fair"]["upper"]
    ends = f"[{gap['low']:.3f}, {gap['high']:.3f}]"
    assert f"{gap['value']:.3f} {ends}, fair within {within:.3f} (classifier)" in line
    report["judges"]["classifier"]["corrected"] = {"rms_gap": {"value": 0.5, "low": 0.25, "high": 0.75}}
    assert "corrected 0.500 [0.250, 0.750]" in "\n".join(lines(report))


def test_before_and_after_by_each_judge_that_knows_all_attributes(before, after):
    target = JointTarget(BOTH, TABLE)
    found = paired_by_judge(after, before, target)
    counts = [np.stack([s.counts("classifier", BOTH).reshape(-1) for s in part]) for part in (before, after)]
    assert found == {"classifier": paired(*counts, TABLE.reshape(-1))}
    gender = JointTarget({"gender": BOTH["gender"]}, np.array([0.5, 0.5]))
    assert all(of_judge["difference"] < 0 for of_judge in paired_by_judge(after, before, gender).values())


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
