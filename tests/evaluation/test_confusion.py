"""A judge's confusions are counted on images whose class is known otherwise."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from fairref.evaluation.confusion import Confusion, confusion, difference, of_explicit, on_explicit
from fairref.evaluation.folders import LabelledPictures, judge_labelled
from fairref.evaluation.judging import EvaluationSettings
from fairref.evaluation.parts import PromptPart, compare, with_confusions
from fairref.evaluation.sentences import lines
from fairref.evaluation.statistics import JudgedImages
from fairref.fairness.attributes import parse_targets
from fairref.files.images import read_square
from fairref.generation.drawing import Drawing
from fairref.prompts.sets import read_prompts

CLASSES = {"gender": ("woman", "man"), "skin_tone": ("light", "medium", "dark")}


def judged_of(**judges):
    """Judge -> attribute -> class indices."""
    return JudgedImages({j: {a: torch.tensor(rows) for a, rows in of.items()} for j, of in judges.items()})


def test_counts_of_true_and_judged_classes():
    truth, judged = np.array([0, 0, 0, 1, 2, -1, 2]), np.array([0, 1, -1, 1, 0, 1, 0])
    found = confusion(truth, judged, 3, "here")
    assert found.counts.tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 0]]
    assert found.untold.tolist() == [1, 0, 0] and found.source == "here"


def test_explicit_prompts_count_where_the_template_judge_confirms_the_class():
    images = [
        judged_of(
            classifier={"gender": [0, 1, 0, -1], "skin_tone": [0, 0, 0, -1]},
            templates={"gender": [0, 0, 1, 0], "skin_tone": [1, 1, 1, 1]},
        ),
        judged_of(
            classifier={"gender": [1, 0], "skin_tone": [0, 0]},
            templates={"gender": [1, 1], "skin_tone": [1, 1]},
        ),
        judged_of(
            classifier={"gender": [1, 1], "skin_tone": [2, 1]},
            templates={"gender": [0, 0], "skin_tone": [2, -1]},
        ),
    ]
    asked = [("a woman", "gender", 0), ("a man", "gender", 1), ("a dark person", "skin_tone", 2)]
    (judge,) = found = of_explicit(on_explicit(images, asked), CLASSES)
    assert judge == "classifier"
    assert found[judge]["gender"].counts.tolist() == [[1, 1], [1, 1]]
    assert found[judge]["gender"].untold.tolist() == [1, 0]
    assert found[judge]["skin_tone"].counts.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]
    alone = [JudgedImages({"classifier": s.classes["classifier"]}) for s in images]
    assert on_explicit(alone, asked) == {}


def test_labelled_pictures_are_judged_as_drawn_images_are(loaded_tiny, tmp_path):
    rng, table = np.random.default_rng(0), io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["file", "gender"])
    for i in range(7):
        Image.fromarray(rng.integers(0, 256, (40, 32, 3), np.uint8)).save(tmp_path / f"{i}.png")
        rows.writerow([f"{i}.png", ("woman", "man", "")[i % 3]])
    (tmp_path / "labels.csv").write_text(table.getvalue())
    target = parse_targets(["gender", "skin_tone"], loaded_tiny.attributes)
    settings = EvaluationSettings(loaded_tiny, target, Drawing(2, 2.0))
    found = judge_labelled(settings, LabelledPictures.read(tmp_path, target.classes))
    (classifier,) = loaded_tiny.classifiers["evaluate"]
    x = torch.stack([read_square(tmp_path / f"{i}.png", 32) for i in range(7)])
    said = classifier(x)["gender"].argmax(1).tolist()
    expected = np.zeros((2, 2), int)
    for i in range(7):
        if i % 3 < 2:
            expected[i % 3, said[i]] += 1
    assert list(found) == ["classifier"] and list(found["classifier"]) == ["gender"]
    assert found["classifier"]["gender"].counts.tolist() == expected.tolist()


@pytest.mark.parametrize(("worse", "better"), [(9, 2), (3, 3), (6, 0), (0, 0)])
def test_whether_a_judge_errs_alike_before_and_after(worse, better):
    """Of one class, this is McNemar's exact test, however many images are judged as before."""
    before = np.array([0] * worse + [1] * better + [0] * 90)
    after = np.array([1] * worse + [0] * better + [0] * 90)
    truth = np.zeros_like(before)
    expected = binomtest(worse, worse + better).pvalue if worse + better else 1
    assert difference((truth, before), (truth, after)) == pytest.approx(expected, abs=0.02)


def test_errors_of_two_classes_do_not_cancel_and_unknown_ones_are_left_out():
    truth = np.repeat([0, 1], 50)
    before, after = truth.copy(), truth.copy()
    after[:10], after[50:60] = 1, 0
    assert difference((truth, before), (truth, after)) < 0.01
    untold = np.where(np.arange(100) % 50 < 10, -1, after)
    other = np.where(np.arange(100) % 50 < 10, 1 - truth, truth)
    assert difference((truth, before), (truth, untold)) == difference((truth, before), (other, after)) == 1
    assert difference((truth, before), (1 - truth, after)) is None


@pytest.mark.parametrize(
    ("first", "whole"),
    [
        ([[0, 0], [0, 0]], [[3, 1], [0, 4]]),
        ([[5, 0], [0, 0]], [[3, 1], [0, 4]]),
        ([[20, 1], [0, 49]], [[45, 5], [0, 50]]),  # enough of each class for an interval
    ],
)
def test_the_confusion_that_says_most_stands_first(first, whole):
    report = {"confusion": {}}
    known = [{"judge": {"gender": Confusion(np.array(c), np.zeros(2, int), "")}} for c in (first, whole)]
    with_confusions(report, *known)
    found = [one["counts"] for one in report["confusion"]["judge"]["gender"]]
    assert found == [whole, *([first] if np.any(first) else [])]


def test_a_report_has_the_judges_confusions_on_explicit_prompts_and_whether_they_stayed(
    loaded_tiny, tiny_folder
):
    """The template judge confirms about every other image; pictures of known classes come first."""

    def templates(x):
        told = x[:, 1].mean((1, 2)) > x[:, 2].mean((1, 2))
        return {"gender": (x.mean((1, 2, 3)) > 0).long(), "gender_known": told}

    templates.attributes, templates.colours = ("gender",), lambda x, verdict: {}
    bundle = replace(loaded_tiny)
    bundle.__dict__["templates"] = templates
    pictures = {"classifier": {"gender": Confusion(np.array([[3, 1], [0, 4]]), np.zeros(2, int), "pictures")}}
    target = parse_targets(["gender"], bundle.attributes)
    settings = EvaluationSettings(bundle, target, Drawing(2, 2.0), confusions=pictures)
    (concept,) = read_prompts("occupations", None, tiny_folder, ["gender"])
    part = PromptPart(concept, "test", 1)
    (_, before), (_, after) = compare(settings, {"before": bundle, "after": bundle}, part)
    known, own = after.report["confusion"]["classifier"]["gender"]
    assert known == {"counts": [[3, 1], [0, 4]], "untold": [0, 0], "source": "pictures"}
    expected = np.zeros((2, 2), int)
    for s, (*_, k) in zip(after.explicit, part.explicit(target.classes), strict=True):
        for seen, confirmed in zip(
            *(s.classes[j]["gender"] for j in ("classifier", "templates")), strict=True
        ):
            expected[k, seen] += confirmed == k
    assert own["counts"] == expected.tolist() and expected.sum() > 0
    # the same images: it errs alike
    assert own["p_as_before"] == 1
    assert "p_as_before" not in before.report["confusion"]["classifier"]["gender"][1]
    assert "classifier right about apparent gender: 7 of 8, pictures" in lines(after.report)
