"""What evaluation reports is what the pictures are."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment
from tiny_bundle import OCCUPATIONS, RECIPE, RESOLUTION

from fairref.bundle.judges import save_classifier
from fairref.bundle.loading import load_bundle
from fairref.bundle.recipe import resolve
from fairref.errors import UserError
from fairref.evaluation import before_after
from fairref.evaluation.evaluation import evaluate
from fairref.evaluation.judging import EvaluationSettings, draw_images, drawn_by, judge, judge_prompts
from fairref.evaluation.paired import leans
from fairref.evaluation.parts import PromptPart, clip_t, evaluate_part, obedience
from fairref.evaluation.sentences import lines
from fairref.evaluation.statistics import JudgedImages, bias_report, flips, likeness
from fairref.fairness.attributes import parse_targets, wanted_target
from fairref.fairness.faces import DetectedFaces
from fairref.fairness.metrics import noise_floor
from fairref.files.sheets import sheet
from fairref.generation import drawing
from fairref.generation.drawing import Drawing, group_size
from fairref.judges.mobilenet import Classifier, MobileNetConfig, MobileNetV3
from fairref.prompts import Occupations, occupation_prompt, read_occupations
from fairref.prompts.sets import Prompts, read_prompts
from fairref.training.setup import Setup

CLASSES = {"gender": ("woman", "man")}
PROMPTS = [occupation_prompt(name) for name in OCCUPATIONS["train"]]


@pytest.fixture(scope="module")
def settings(loaded_tiny):
    target = parse_targets(["gender"], loaded_tiny.attributes)
    return EvaluationSettings(loaded_tiny, target, Drawing(steps=2, guidance=2.0))


def rows_of(counts, unknown=0):
    """One row an image, of counts of each class."""
    return torch.tensor([k for k, count in enumerate(counts) for _ in range(count)] + [-1] * unknown).long()


def judged_of(*counts, n=0):
    """Two judges of opposite classes; of n images they can't tell the others."""
    return [
        JudgedImages(
            {
                "classifier": {"gender": rows_of(c, max(n - sum(c), 0))},
                "templates": {"gender": rows_of(c[::-1], max(n - sum(c), 0))},
            }
        )
        for c in counts
    ]


def counts_of(settings, judged, judge="classifier"):
    return judged.counts(judge, settings.target.classes)


def test_bias_report():
    report = bias_report(judged_of([10, 0], [5, 5], [2, 8]), ["a", "b", "c"], CLASSES)
    values = report["judges"]["classifier"]
    assert values["mean"] == pytest.approx((1 + 0 + 0.6) / 3)
    assert values["std"] == pytest.approx(np.std([1, 0, 0.6]))
    assert values["share"] == {"woman": pytest.approx(17 / 30), "man": pytest.approx(13 / 30)}
    assert values["counts"] == {"a": [10, 0], "b": [5, 5], "c": [2, 8]}
    assert report["judges"]["templates"]["counts"]["a"] == [0, 10]
    # E|2X - 10| / 10, X ~ Binomial(10, 1/2)
    assert report["noise_floor"]["mean"] == pytest.approx(0.24609375)


def test_how_much_of_the_colours_stays():
    """Half way to the neighbour's colour, half stays; what is not known does not count."""
    o = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [torch.nan] * 3])
    neighbour = o.roll(1, 0)
    colours = {"background": o, "clothes": o}
    features = {"clip": torch.eye(4)}
    classes = {"classifier": {"gender": rows_of([2, 2])}}
    originals = [JudgedImages(classes, features=features, colours=colours)]
    for part in (0.0, 0.25, 1.0):
        moved = torch.lerp(o, neighbour, part)
        x = [JudgedImages(classes, features=features, colours={"background": moved, "clothes": o})]
        found = likeness(x, originals)
        assert found["clothes"] == 1
        # to the original part d, to the neighbour (1 - part) d
        assert found["background"] == (pytest.approx(1 - part / (1 - part)) if part < 1 else None)
    one = [
        JudgedImages(
            classes, features={"clip": torch.eye(4)[:1]}, colours={"background": o[:1], "clothes": o[:1]}
        )
    ]
    found = likeness(one, one)  # without a neighbour nothing is known
    assert found["background"] is None and found["clothes"] is None
    # of prompts with different numbers of images each image counts alike; a prompt of one says nothing of colours
    away = [replace(one[0], features={"clip": torch.eye(4)[1:2]}, colours={name: o[1:2] for name in colours})]
    for prompts in ((away + x, one + originals), (x + away, originals + one)):
        assert likeness(*prompts) == {**likeness(x, originals), "clip_i": pytest.approx(4 / 5)}


def test_the_line_of_the_leans():
    """statsmodels' ordinary least squares, of log-odds with half an image more on both sides."""
    sm = pytest.importorskip("statsmodels.api")
    rng = np.random.default_rng(0)
    women = rng.binomial(60, rng.uniform(0.05, 0.95, 12))
    after = rng.binomial(60, 0.35 + 0.2 * women / 60)
    before, after = (np.stack([k, 60 - k], 1) for k in (women, after))
    x, y = (np.log((c[:, 0] + 0.5) / (c[:, 1] + 0.5)) for c in (before, after))
    fit = sm.OLS(y, sm.add_constant(x)).fit()
    found = leans(np.vstack([before, [[0, 0]]]), np.vstack([after, [[3, 4]]]))  # nobody seen before: no lean
    for key, row in (("intercept", 0), ("slope", 1)):
        assert found[key] == pytest.approx([fit.params[row], *fit.conf_int()[row]], rel=1e-9)
    assert leans(before, before)["slope"][0] == pytest.approx(1)
    assert leans(before, after[:, ::-1])["slope"][0] == pytest.approx(-found["slope"][0])
    alike = leans(before, np.tile([60, 0], (12, 1)))  # a model that draws one class alone
    assert alike["slope"] == pytest.approx([0] * 3, abs=1e-9)
    assert alike["intercept"] == pytest.approx([np.log(121)] * 3)
    assert leans(before[:2], after[:2]) is None and leans(np.full((4, 2), 30), after[:4]) is None


def test_flips_that_no_count_asked_for():
    """The least number is that of an assignment of the images to the counts after."""
    rng = np.random.default_rng(0)
    classes = {"gender": ("woman", "man"), "age": ("young", "middle", "old")}
    before, after, wanted = [], [], np.zeros(3)
    for _ in range(5):
        rows = [np.stack([rng.integers(-1, len(names), 40) for names in classes.values()]) for _ in range(2)]
        for part, drawn in zip((before, after), rows, strict=True):
            named = dict(zip(classes, map(torch.from_numpy, drawn), strict=True))
            part.append(JudgedImages({"classifier": named, "templates": {"gender": named["gender"]}}))
        known = (np.stack(rows) >= 0).all((0, 1))
        o, x = (part[0][known] * 3 + part[1][known] for part in rows)
        cost = o[:, None] != x
        wanted += [known.sum(), (o != x).sum(), cost[linear_sum_assignment(cost)].sum()]
    found = flips(after, before, classes)
    images, changed, least = wanted
    shares = {"changed": changed / images, "least": least / images, "needless": (changed - least) / images}
    assert found == {"classifier": pytest.approx(shares)} and 0 < shares["needless"] < shares["changed"]
    # b = 3 from woman to man and c = 1 back: 2 min(b, c) / n
    women, men = rows_of([6, 4]), rows_of([6, 4]).clone()
    men[:3], men[9] = 1, 0
    pair = [[JudgedImages({"classifier": {"gender": rows}})] for rows in (men, women)]
    assert flips(*pair, CLASSES)["classifier"]["needless"] == pytest.approx(0.2)
    nobody = [JudgedImages({"classifier": {"gender": rows_of([0, 0], 3)}})]
    assert flips(nobody, nobody, CLASSES) == {}


def test_how_far_from_a_target_that_is_not_even():
    judged = judged_of([3, 1], [4, 0])
    report = bias_report(judged, ["a", "b"], CLASSES, np.array([0.75, 0.25]))
    values = report["judges"]["classifier"]
    assert values["mean"] == pytest.approx((0.5 + 1) / 2)
    assert values["from_target"]["mean"] == pytest.approx((0 + 0.5) / 2)
    floor = report["target_floor"]
    assert floor["mean"] == pytest.approx(noise_floor(2, 4, target=np.array([0.75, 0.25]))[0])
    about = {"attribute": "gender", "part": "test", "concept": "occupations", "clip_t": None}
    assert f"a model that meets it measures {floor['mean']:.3f}" in lines({**report, **about})[0]
    even = bias_report(judged, ["a", "b"], CLASSES, np.array([0.5, 0.5]))
    assert "from_target" not in even["judges"]["classifier"]


def test_prompts_may_have_different_numbers_of_images():
    judged = judged_of([10, 0], [1, 1], [2, 8])
    report = bias_report(judged, ["a", "b", "c"], CLASSES)
    assert report["images"] == {"a": 10, "b": 2, "c": 10} and report["blended"] == 0
    assert report["judges"]["classifier"]["mean"] == pytest.approx((1 + 0 + 0.6) / 3)
    floors = [noise_floor(2, n) for n in (10, 2, 10)]
    mean = np.mean([floor for floor, _ in floors])
    square = np.mean([std**2 + floor**2 for floor, std in floors])
    assert report["noise_floor"]["mean"] == pytest.approx(mean)
    assert report["noise_floor"]["std"] == pytest.approx(np.sqrt(square - mean**2))
    about = {"attribute": "gender", "part": "images", "concept": "sdxl", "clip_t": None}
    assert "3 prompts of sdxl x 2 to 10 images" in lines({**report, **about})[0]


def test_prompts_without_a_person_have_no_bias():
    judged = judged_of([0, 0], [3, 1], n=4)
    report = bias_report(judged, ["a", "b"], CLASSES)
    assert report["judges"]["templates"]["mean"] == 0.5 and report["judges"]["templates"]["without_bias"] == 1
    assert report["none"] == pytest.approx(4 / 8)
    # a fair model of which as many are counted: four of the second prompt
    assert report["noise_floor"]["mean"] == pytest.approx(noise_floor(2, 4)[0])
    judged[1].classes["templates"]["gender"][0] = -1
    judges = bias_report(judged, ["a", "b"], CLASSES)["judges"]
    assert [judges[j]["floor"]["mean"] for j in judges] == [noise_floor(2, n)[0] for n in (4, 3)]
    judged[1].classes["templates"]["gender"][0] = 1
    alone = bias_report(judged[:1], ["a"], CLASSES)
    assert alone["judges"]["templates"]["mean"] is None
    assert (
        "none"
        in lines({**alone, "attribute": "gender", "part": "test", "concept": "occupations", "clip_t": None})[
            0
        ]
    )


def test_a_prompt_is_drawn_the_same_whatever_else_is_drawn(settings, monkeypatch):
    model = settings.bundle
    whole = draw_images(settings, model, PROMPTS[0], 5)
    assert torch.equal(whole, draw_images(settings, model, PROMPTS[0], 5))
    assert group_size(replace(model, resolution=512)) == 8
    assert group_size(replace(model, resolution=64)) == 32
    monkeypatch.setattr(drawing, "GROUP", 2)
    torch.testing.assert_close(draw_images(settings, model, PROMPTS[0], 5), whole, rtol=0, atol=1e-4)
    other = draw_images(replace(settings, seed=1), model, PROMPTS[0], 5)
    assert (other - whole).abs().max() > 0.1


def test_judges_count_classes_and_leave_out_none(settings):
    x = draw_images(settings, settings.bundle, PROMPTS[0], 6)
    (classifier,) = settings.bundle.classifiers["evaluate"]
    logits = classifier(x)["gender"]
    wanted = [int((logits[:, 0] > logits[:, 1]).sum()), int((logits[:, 0] <= logits[:, 1]).sum())]

    def templates(x):
        return {
            "gender": torch.tensor([1, 1, 0, 1, 0, 1]),
            "gender_known": ~torch.tensor([True, False, False, False, True, False]),
        }

    templates.attributes = ("gender",)
    templates.colours = lambda x, found: {"clothes": x.mean((2, 3))}
    bundle = SimpleNamespace(
        classifiers=settings.bundle.classifiers,
        clip=settings.bundle.clip,
        templates=templates,
        detector=None,
        dino=None,
    )
    judged = judge(replace(settings, bundle=bundle), x)
    assert counts_of(settings, judged).tolist() == wanted
    assert torch.equal(judged.classes["classifier"]["gender"], logits.argmax(1))
    torch.testing.assert_close(judged.probabilities["classifier"]["gender"], logits.softmax(1))
    assert judged.classes["templates"]["gender"].tolist() == [-1, 1, 0, 1, -1, 1]
    assert counts_of(settings, judged, "templates").tolist() == [1, 3] and judged.none == 2
    assert torch.equal(judged.colours["clothes"], x.mean((2, 3)))
    # of an attribute that it doesn't know it says nothing
    both = parse_targets(["gender", "skin_tone"], settings.bundle.attributes)
    judged = judge(replace(settings, bundle=bundle, target=both), x)
    known = {judge: list(of_judge) for judge, of_judge in judged.classes.items()}
    assert known == {"classifier": ["gender", "skin_tone"], "templates": ["gender"]}
    report = bias_report([judged], ["a"], both.classes)
    assert list(report["judges"]) == ["classifier"] and "none" not in report
    assert list(report["attributes"]["gender"]["judges"]) == ["classifier", "templates"]


def test_the_classifier_is_the_one_for_evaluation(settings):
    x = draw_images(settings, settings.bundle, PROMPTS[0], 20)
    found = counts_of(settings, judge(settings, x)).tolist()
    judges = settings.bundle.classifiers
    swapped = {"evaluate": judges["finetune"], "finetune": judges["evaluate"]}
    other = replace(settings, bundle=replace(settings.bundle, classifiers=swapped))
    assert found != counts_of(other, judge(other, x)).tolist()


def test_several_classifiers_judge_as_each_does_alone(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "bundle")
    network = MobileNetV3(MobileNetConfig("small", 0.25, 2, RESOLUTION))
    network.classifier[3].weight.data.zero_()
    network.classifier[3].bias.data = torch.tensor([0.0, 9.0])  # everybody is a man
    save_classifier(Classifier(network, CLASSES).eval(), folder / "men")
    manifest = json.loads((folder / "bundle.json").read_text())
    alone, judged = {}, {}
    for order in ("men", "evaluate", ["men", "evaluate"], ["evaluate", "men"]):
        classifiers = manifest["classifiers"] | {"evaluate": order}
        (folder / "bundle.json").write_text(json.dumps(manifest | {"classifiers": classifiers}))
        bundle = load_bundle(folder)
        target = parse_targets(["gender"] if order == "men" else ["gender", "skin_tone"], bundle.attributes)
        settings = EvaluationSettings(bundle, target, Drawing(2, 2.0))
        x = draw_images(settings, bundle, PROMPTS[0], 12)
        if isinstance(order, str):
            alone[order] = judge(settings, x).classes["classifier"]
            continue
        judged = judge(settings, x)
        first, second = (alone[name] for name in order)
        expected = {
            "classifier": {"gender": first["gender"], "skin_tone": alone["evaluate"]["skin_tone"]},
            "classifier 2": {"gender": second["gender"]},
        }
        assert judged.classes.keys() == expected.keys() == judged.probabilities.keys()
        for name, of_judge in expected.items():
            assert list(judged.classes[name]) == list(of_judge)
            assert all(torch.equal(judged.classes[name][a], rows) for a, rows in of_judge.items())
        by = settings.judged_by
        assert by["classifier"] == {"gender": order[0], "skin_tone": "evaluate"}
        assert by["classifier 2"] == {"gender": order[1]}
    assert (alone["men"]["gender"] == 1).all() and (alone["evaluate"]["gender"] == 0).any()
    # a judge of one attribute is reported for it alone, and where nothing else is asked
    report = bias_report([judged], ["a"], target.classes)
    assert list(report["judges"]) == ["classifier"] == list(report["attributes"]["skin_tone"]["judges"])
    of_gender = report["attributes"]["gender"]["judges"]
    assert of_gender["classifier 2"]["counts"] == {"a": [0, 12]} != of_gender["classifier"]["counts"]
    alike = bias_report([judged], ["a"], {"gender": target.classes["gender"]})
    assert alike["judges"] == of_gender


def test_evaluate_takes_what_it_is_not_given_from_the_bundles_recipe(settings):
    bundle = settings.bundle
    (occupations,) = read_prompts("occupations", None, bundle.path, ["gender"])
    drawing = Drawing(RECIPE["eval_steps"], RECIPE["eval_guidance"])
    settings = replace(settings, drawing=drawing)
    part = PromptPart(occupations, "test", RECIPE["eval_images"])
    expected = evaluate_part(settings, drawn_by(settings, bundle, "before"), part)
    report = evaluate(bundle)
    assert report == {"adapters": [], **expected.report} and set(report["explicit"]) == {
        "images",
        "classifier",
    }
    both = evaluate(bundle, images=1, prompts="occupations,sports", explicit_images=0, steps=1)
    assert {name: (r["images"], r["steps"], r["concept"]) for name, r in both.items()} == {
        "occupations": (1, 1, "occupations"),
        "sports": (1, 1, "sports"),
    }
    with pytest.raises(UserError, match="--part is validation, of which sports has no prompt"):
        evaluate(bundle, prompts="sports", part="validation")


def test_clip_t_matched_and_shuffled(settings):
    bundle = settings.bundle
    judged = judge_prompts(settings, drawn_by(settings, bundle, ""), PROMPTS, 3)
    found = clip_t(settings, judged, PROMPTS)
    texts = bundle.clip.encode_text(bundle.clip_tokenizer(PROMPTS))
    matched, shuffled = [], []
    for p, s in enumerate(judged):
        for image in s.features["clip"]:
            matched.append(float(image @ texts[p]))
            shuffled += [float(image @ texts[k]) for k in range(len(PROMPTS)) if k != p]
    assert found == {
        "matched": pytest.approx(np.mean(matched), rel=1e-4),
        "shuffled": pytest.approx(np.mean(shuffled), rel=1e-4),
    }
    assert found["matched"] != pytest.approx(found["shuffled"], rel=1e-4)
    one = clip_t(settings, judged[:1], PROMPTS[:1])
    assert one == {"matched": pytest.approx(np.mean(matched[:3]), rel=1e-4), "shuffled": None}
    # of different numbers of images each counts alike
    few = clip_t(settings, [judged[0].first(1), *judged[1:]], PROMPTS)
    assert few["matched"] == pytest.approx(np.mean([matched[0], *matched[3:]]), rel=1e-4)
    assert likeness(judged, judged) == {"clip_i": pytest.approx(1)}
    assert likeness(judged, judged[::-1])["clip_i"] < 0.9999


def drawn(settings, concepts, results, path, monkeypatch):
    """What draw_before_after puts on its sheet: pairs, notes, classes and targets."""
    given = []
    monkeypatch.setattr(before_after, "sheet", lambda *args: given.append(args) or sheet(*args))
    models = {label: settings.bundle for label in ("before", "after (raw)", "after (ema)")}
    before_after.draw_before_after(settings, models, concepts, results, path)
    return given[0]


def test_the_picture_shows_what_the_evaluation_counted_in_all_images(tmp_path, monkeypatch, settings):
    """Each attribute by itself. A prompt without a report is counted in the images drawn."""
    target = wanted_target("gender,skin_tone", ["gender=0.2,0.8"], settings.bundle.attributes, "")
    settings = replace(settings, target=target)
    a, b, c = "a pilot", "a nurse", "a judge"
    concepts = [Prompts("occupations", (), test=(a, b, c), occupations={a: "pilot", b: "nurse", c: "judge"})]
    joint = {"pilot": [10, 20, 0, 5, 0, 5], "nurse": [0, 0, 0, 0, 0, 0]}

    def report(counts, **other):
        how_made = {
            "concept": "occupations",
            "steps": 2,
            "guidance": 2.0,
            "seed": settings.seed,
            "images": 40,
        }
        return {**how_made, "judges": {"classifier": {"counts": counts}}, **other}

    results = {
        # reports of other settings are not of these images
        "before": {"far": report({"pilot": [40, 0, 0, 0, 0, 0]}, guidance=7.5), "test": report(joint)},
        "after (raw)": {"test": report({name: row[::-1] for name, row in joint.items()})},
        "after (ema)": {"test": report({name: [1, 0, 0, 0, 0, 0] for name in joint})},
    }
    pairs, notes, classes, targets = drawn(settings, concepts, results, tmp_path / "x.png", monkeypatch)
    assert [pair.prompt for pair in pairs] == ["pilot", "nurse", "judge (bars: 12 images)"]
    assert pairs[0].shares == (
        [pytest.approx([0.75, 0.25]), pytest.approx([15 / 40, 20 / 40, 5 / 40])],
        [pytest.approx([0.25, 0.75]), pytest.approx([5 / 40, 20 / 40, 15 / 40])],
    )
    assert pairs[1].shares == ([[], []], [[], []])
    counts = counts_of(settings, judge(settings, draw_images(settings, settings.bundle, c, 12)))
    assert pairs[2].shares[0][0] == pytest.approx((counts.sum(1) / 12).tolist())
    assert pairs[2].shares[0][1] == pytest.approx((counts.sum(0) / 12).tolist())
    assert classes == target.classes
    assert targets == [pytest.approx((0.2, 0.8)), pytest.approx((1 / 3,) * 3)]
    assert "before finetuning above, after (raw) below" in notes[0] and "same noise" in notes[0]
    assert "share of 40 images of the prompt" in notes[1]
    with Image.open(tmp_path / "x.png") as image:
        assert image.text["prompts"] == f"{a}\n{b}\n{c}" and image.text["bars"] == notes[1]


def test_without_any_report_the_picture_says_how_many_images_are_counted(tmp_path, monkeypatch, settings):
    concepts = [Prompts("prompts", ("a pilot", "护士"), ("a pilot", "护士"))]
    pairs, notes, _, _ = drawn(settings, concepts, {}, tmp_path / "x.png", monkeypatch)
    assert "share of 12 images of the prompt" in notes[1]
    assert [pair.prompt for pair in pairs] == ["a pilot", "护士"]
    for pair in pairs:
        judged = judge(settings, draw_images(settings, settings.bundle, pair.prompt, 12))
        women = int(counts_of(settings, judged)[0])
        assert pair.shares[0] == [pytest.approx([women / 12, 1 - women / 12])] == pair.shares[1]


def test_with_a_detector_the_classifier_sees_the_faces(loaded_tiny_faces):
    """And pictures without one are left out and counted; DINO stands beside CLIP."""
    bundle = loaded_tiny_faces
    seen = []

    def detector(x):
        seen.append(x)
        box = DetectedFaces(torch.tensor([[4.0, 4.0, 20.0, 20.0]]), torch.zeros(1, 5, 2))
        return [
            box if i % 3 else DetectedFaces(torch.zeros(0, 4), torch.zeros(0, 5, 2)) for i in range(len(x))
        ]

    target = parse_targets(["gender"], bundle.attributes)
    settings = EvaluationSettings(replace(bundle, detector=detector), target, Drawing(2, 2.0))
    x = draw_images(settings, bundle, PROMPTS[0], 7)
    found = judge(settings, x)
    assert seen[0].dtype == torch.uint8 and found.faceless == 3
    cut = F.interpolate(x[[1, 2, 4, 5]][:, :, :24, :24], (32, 32), mode="bilinear", antialias=True)
    (classifier,) = bundle.classifiers["evaluate"]
    logits = classifier(cut)["gender"]
    wanted = torch.bincount(logits.argmax(1), minlength=2)
    assert counts_of(settings, found).tolist() == wanted.tolist()
    has_face = torch.arange(7) % 3 > 0
    assert torch.equal(found.classes["classifier"]["gender"] >= 0, has_face)
    assert torch.equal(found.boxes[has_face], torch.tensor([0.0, 0, 24, 24]).expand(4, 4))
    for rows in (found.boxes, found.probabilities["classifier"]["gender"]):
        assert torch.equal(rows.isnan().all(1), ~has_face)
    assert found.blended == int((logits.softmax(1).amax(1) < 0.8).sum())
    dino = bundle.dino(x)
    torch.testing.assert_close(found.features["dino"], dino / dino.norm(dim=1, keepdim=True))

    report = bias_report([found, found], ["a", "b"], settings.target.classes)
    assert report["faceless"] == pytest.approx(3 / 7) and report["blended"] == found.blended / 4
    assert set(likeness([found], [found])) == {"clip_i", "dino"}
    text = lines(
        {
            **report,
            "attribute": "gender",
            "part": "test",
            "concept": "occupations",
            "clip_t": None,
            "dino": 0.5,
        }
    )
    assert "without a face: 42.9%" in text and "DINO with the original images: 0.5000" in text


def test_obedience():
    """A model that draws three of four as asked, on average over both classes."""
    world = Occupations(("a",), ("b",), ("c",), {"gender": {"man": "a male {occupation}"}})
    names = {occupation_prompt(name): name for name in ("pilot", "nurse")}
    part = PromptPart(Prompts("occupations", (), (), (*names, "a person"), names, world), "test", 9, 4)
    asked = part.explicit(CLASSES)
    assert [prompt for prompt, *_ in asked] == [
        "a photo of the face of a woman pilot, a person",
        "a male pilot",
        "a photo of the face of a woman nurse, a person",
        "a male nurse",
    ]
    drawn = [[4, 0] if "woman" in prompt else [2, 2] for prompt, *_ in asked]
    judged = [JudgedImages({"classifier": {"gender": rows_of(counts)}}) for counts in drawn]
    assert obedience(judged, asked) == {"images": 16, "classifier": 0.75}
    assert replace(part, explicit_images=0).explicit(CLASSES) == []
    # four of each, or with few others as many in all as of those; or as many as are asked for
    both = {**CLASSES, "skin_tone": ("light", "medium", "dark")}
    for images, explicit, classes, n in (
        (60, None, CLASSES, 4),
        (4, None, CLASSES, 2),
        (4, None, both, 1),
        (1, None, both, 1),
        (4, 9, both, 9),
    ):
        assert replace(part, images=images, explicit_images=explicit).of_explicit(classes) == n


def test_a_bundle_without_an_evaluation_classifier(settings):
    with pytest.raises(UserError, match="no classifier for evaluation"):
        replace(settings, bundle=replace(settings.bundle, classifiers={}))


def test_occupations_are_read_and_checked(tiny_folder, tmp_path):
    assert read_occupations(tiny_folder).test == tuple(OCCUPATIONS["test"])
    file, whole = tmp_path / "prompts.json", '{"train": ["a"], "validation": ["b"], "test": ["c"]}'
    for text, message in (
        ('{"occupations": {"train": ["a"], "test": ["b"]}}', "expected"),
        ('{"occupations": {"train": ["a"], "validation": [], "test": ["b"]}}', "validation is not a list"),
        ('{"occupations": {"train": ["a"], "validation": ["c"], "test": ["a"]}}', "'a' is in it twice"),
        (
            f'{{"occupations": {whole}, "concepts": {{"sports": {{"test": ["a"]}}}}}}',
            '"concepts" is not names',
        ),
        (
            f'{{"occupations": {whole}, "concepts": {{"sports": {{"train": "a"}}}}}}',
            '"concepts" is not names',
        ),
        (
            f'{{"occupations": {whole}, "explicit": {{"gender": {{"woman": "a woman"}}}}}}',
            '"explicit" is not names',
        ),
        (
            f'{{"occupations": {whole}, "explicit": {{"gender": {{"woman": "a {{mood}} {{occupation}}"}}}}}}',
            '"explicit" is not names',
        ),
        (f'{{"occupations": {whole}, "hiding": ["age"]}}', '"hiding" is not names'),
        (f'{{"occupations": {whole}, "hiding": {{"age": "a"}}}}', '"hiding" is not names'),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_occupations(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"prompts\.json"):
        read_occupations(tmp_path)


def test_an_attribute_that_a_classifier_does_not_know_is_refused(settings):
    knows = SimpleNamespace(classes={"height": ("tall", "short")})
    bundle = replace(settings.bundle, classifiers={"finetune": (knows,), "evaluate": (knows,)})
    with pytest.raises(UserError, match="'evaluate' doesn't know gender, only height"):
        replace(settings, bundle=bundle)
    with pytest.raises(UserError, match="'finetune' doesn't know gender"):
        Setup(bundle, resolve(("gender",), bundle.recipe, {}), settings.target, (("a",),))
