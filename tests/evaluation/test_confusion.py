"""A judge's confusions are counted on images whose class is known otherwise."""

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import fisher_exact

from fairref.evaluation.confusion import Confusion, confusion, difference, of_explicit, of_photographs
from fairref.evaluation.judging import EvaluationSettings
from fairref.evaluation.statistics import JudgedImages
from fairref.fairness.attributes import parse_targets
from fairref.files.datasets import read_labelled
from fairref.files.images import read_square
from fairref.generation.drawing import Drawing

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
    (judge,) = found = of_explicit(images, asked, CLASSES, "drawn before")
    assert judge == "classifier" and "drawn before" in found[judge]["gender"].source
    assert found[judge]["gender"].counts.tolist() == [[1, 1], [1, 1]]
    assert found[judge]["gender"].untold.tolist() == [1, 0]
    assert found[judge]["skin_tone"].counts.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]
    alone = [JudgedImages({"classifier": s.classes["classifier"]}) for s in images]
    assert of_explicit(alone, asked, CLASSES, "") == {}


def test_labelled_pictures_are_judged_as_drawn_images_are(loaded_tiny, tmp_path):
    rng, table = np.random.default_rng(0), io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["file", "gender"])
    for i in range(7):
        Image.fromarray(rng.integers(0, 256, (40, 32, 3), np.uint8)).save(tmp_path / f"{i}.png")
        rows.writerow([f"{i}.png", ("woman", "man", "")[i % 3]])
    (tmp_path / "labels.csv").write_text(table.getvalue())
    photographs = read_labelled(tmp_path, loaded_tiny.attributes)
    target = parse_targets(["gender", "skin_tone"], loaded_tiny.attributes)
    settings = EvaluationSettings(loaded_tiny, target, Drawing(2, 2.0))
    found = of_photographs(settings, photographs, "seven pictures")
    (classifier,) = loaded_tiny.classifiers["evaluate"]
    x = torch.stack([read_square(tmp_path / f"{i}.png", 32) for i in range(7)])
    said = classifier(x)["gender"].argmax(1).tolist()
    expected = np.zeros((2, 2), int)
    for i in range(7):
        if i % 3 < 2:
            expected[i % 3, said[i]] += 1
    assert list(found) == ["classifier"] and list(found["classifier"]) == ["gender"]
    assert found["classifier"]["gender"].counts.tolist() == expected.tolist()


@pytest.mark.parametrize("table", [[[18, 2], [9, 11]], [[50, 0], [47, 3]], [[10, 10], [10, 10]]])
def test_whether_a_judge_errs_alike_before_and_after(table):
    """Of one class, this is Fisher's exact test, where both order tables alike."""
    rows = np.array(table)
    counts = np.zeros((2, 2, 2), np.int64)
    counts[:, 0] = rows
    one, other = (Confusion(c, np.zeros(2, int), "") for c in counts)
    expected = fisher_exact(rows).pvalue
    assert difference(one, other) == pytest.approx(expected, abs=0.02)
    # a second class, on which it errs in the same way, only adds noise
    counts[:, 1] = [[5, 45], [5, 45]]
    one, other = (Confusion(c, np.zeros(2, int), "") for c in counts)
    assert difference(one, other) >= expected - 0.02
