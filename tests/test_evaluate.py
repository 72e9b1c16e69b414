"""What evaluation reports is what the pictures are."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_bundle import OCCUPATIONS, write_tiny_bundle

from fairref import evaluate
from fairref.bundle import load_bundle
from fairref.errors import UserError
from fairref.evaluate import How, clip_t, judge, look_at, obedience, pictures
from fairref.fairness.attributes import parse_targets
from fairref.fairness.faces import Found
from fairref.fairness.metrics import noise_floor
from fairref.finetune import rollout
from fairref.finetune.mixture import Prompts
from fairref.finetune.recipes import resolve
from fairref.finetune.setup import Setup
from fairref.prompts import Occupations, occupation_prompt, read_occupations
from fairref.report import Seen, bias_report, likeness, lines

CLASSES = {"gender": ("woman", "man")}
PROMPTS = [occupation_prompt(name) for name in OCCUPATIONS["train"]]


@pytest.fixture(scope="module")
def how(tmp_path_factory):
    bundle = load_bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundle")))
    return How(bundle, parse_targets(["gender"], bundle.attributes), steps=2, guidance=2.0)


def seen_of(*counts, none=0):
    return [Seen({"classifier": np.array(c), "templates": np.array(c[::-1])}, none) for c in counts]


def test_bias_report():
    report = bias_report(seen_of([10, 0], [5, 5], [2, 8]), ["a", "b", "c"], CLASSES, 10)
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
    counts = {"classifier": np.array([2, 2])}
    originals = [Seen(counts, features=features, colours=colours)]
    for part in (0.0, 0.25, 1.0):
        moved = torch.lerp(o, neighbour, part)
        x = [Seen(counts, features=features, colours={"background": moved, "clothes": o})]
        found = likeness(x, originals)
        assert found["clothes"] == 1
        # to the original part d, to the neighbour (1 - part) d
        assert found["background"] == (pytest.approx(1 - part / (1 - part)) if part < 1 else None)
    one = [Seen(counts, features={"clip": torch.eye(1)}, colours={"background": o[:1], "clothes": o[:1]})]
    found = likeness(one, one)  # without a neighbour nothing is known
    assert found["background"] is None and found["clothes"] is None


def test_how_far_from_a_target_that_is_not_even():
    seen = seen_of([3, 1], [4, 0])
    report = bias_report(seen, ["a", "b"], CLASSES, 4, np.array([0.75, 0.25]))
    judged = report["judges"]["classifier"]
    assert judged["mean"] == pytest.approx((0.5 + 1) / 2) and judged["from_target"]["mean"] == pytest.approx(
        (0 + 0.5) / 2
    )
    floor = report["target_floor"]
    assert floor["mean"] == pytest.approx(noise_floor(2, 4, target=np.array([0.75, 0.25]))[0])
    about = {"attribute": "gender", "part": "test", "concept": "occupations", "clip_t": None}
    assert f"a model that meets it measures {floor['mean']:.3f}" in lines({**report, **about})[0]
    even = bias_report(seen, ["a", "b"], CLASSES, 4, np.array([0.5, 0.5]))
    assert "from_target" not in even["judges"]["classifier"]


def test_prompts_without_a_person_have_no_bias():
    seen = seen_of([0, 0], [3, 1], none=2)
    report = bias_report(seen, ["a", "b"], CLASSES, 4)
    assert report["judges"]["templates"]["mean"] == 0.5 and report["judges"]["templates"]["without_bias"] == 1
    assert report["none"] == pytest.approx(4 / 8)
    alone = bias_report(seen[:1], ["a"], CLASSES, 4)
    assert alone["judges"]["templates"]["mean"] is None
    assert (
        "none"
        in lines({**alone, "attribute": "gender", "part": "test", "concept": "occupations", "clip_t": None})[
            0
        ]
    )


def test_a_prompt_is_drawn_the_same_whatever_else_is_drawn(how, monkeypatch):
    model = how.bundle
    whole = pictures(how, model, PROMPTS[0], 5)
    assert torch.equal(whole, pictures(how, model, PROMPTS[0], 5))
    assert rollout.group_size(replace(model, resolution=512)) == 8
    assert rollout.group_size(replace(model, resolution=64)) == 64
    monkeypatch.setattr(rollout, "GROUP", 2)
    torch.testing.assert_close(pictures(how, model, PROMPTS[0], 5), whole, rtol=0, atol=1e-4)
    other = pictures(replace(how, seed=1), model, PROMPTS[0], 5)
    assert (other - whole).abs().max() > 0.1


def test_judges_count_classes_and_leave_out_none(how):
    x = pictures(how, how.bundle, PROMPTS[0], 6)
    logits = how.bundle.classifiers["evaluate"](x)["gender"]
    wanted = [int((logits[:, 0] > logits[:, 1]).sum()), int((logits[:, 0] <= logits[:, 1]).sum())]

    def templates(x):
        return {
            "gender": torch.tensor([1, 1, 0, 1, 0, 1]),
            "gender_known": ~torch.tensor([True, False, False, False, True, False]),
        }

    templates.colours = lambda x, found: {"clothes": x.mean((2, 3))}
    bundle = SimpleNamespace(
        classifiers=how.bundle.classifiers,
        clip=how.bundle.clip,
        templates=templates,
        detector=None,
        dino=None,
    )
    seen = judge(SimpleNamespace(bundle=bundle, target=how.target), x)
    assert seen.counts["classifier"].tolist() == wanted
    assert seen.counts["templates"].tolist() == [1, 3] and seen.none == 2
    assert torch.equal(seen.colours["clothes"], x.mean((2, 3)))


def test_the_classifier_is_the_one_for_evaluation(how):
    x = pictures(how, how.bundle, PROMPTS[0], 20)
    found = judge(how, x).counts["classifier"].tolist()
    swapped = {"evaluate": how.bundle.classifiers["finetune"], "finetune": how.bundle.classifiers["evaluate"]}
    assert (
        found
        != judge(replace(how, bundle=replace(how.bundle, classifiers=swapped)), x)
        .counts["classifier"]
        .tolist()
    )


def test_clip_t_matched_and_shuffled(how):
    seen = look_at(how, how.bundle, PROMPTS, 3, "")
    found = clip_t(how, seen, PROMPTS)
    texts = how.bundle.clip.encode_text(how.bundle.clip_tokenizer(PROMPTS))
    matched, shuffled = [], []
    for p, s in enumerate(seen):
        for image in s.features["clip"]:
            matched.append(float(image @ texts[p]))
            shuffled += [float(image @ texts[k]) for k in range(len(PROMPTS)) if k != p]
    assert found == {
        "matched": pytest.approx(np.mean(matched), rel=1e-4),
        "shuffled": pytest.approx(np.mean(shuffled), rel=1e-4),
    }
    assert found["matched"] != pytest.approx(found["shuffled"], rel=1e-4)
    assert likeness(seen, seen) == {"clip_i": pytest.approx(1)}
    assert likeness(seen, seen[::-1])["clip_i"] < 0.9999


def test_with_a_detector_the_classifier_sees_the_faces(tmp_path):
    """And pictures without one are left out and counted; DINO stands beside CLIP."""
    bundle = load_bundle(write_tiny_bundle(tmp_path, faces=True))
    seen = []

    def detector(x):
        seen.append(x)
        box = Found(torch.tensor([[4.0, 4.0, 20.0, 20.0]]), torch.zeros(1, 5, 2))
        return [box if i % 3 else Found(torch.zeros(0, 4), torch.zeros(0, 5, 2)) for i in range(len(x))]

    how = How(replace(bundle, detector=detector), parse_targets(["gender"], bundle.attributes), 2, 2.0)
    x = pictures(how, bundle, PROMPTS[0], 7)
    found = judge(how, x)
    assert seen[0].dtype == torch.uint8 and found.faceless == 3
    cut = F.interpolate(x[[1, 2, 4, 5]][:, :, :24, :24], (32, 32), mode="bilinear", antialias=True)
    logits = bundle.classifiers["evaluate"](cut)["gender"]
    wanted = torch.bincount(logits.argmax(1), minlength=2)
    assert found.counts["classifier"].tolist() == wanted.tolist()
    assert found.blended == int((logits.softmax(1).amax(1) < 0.8).sum())
    dino = bundle.dino(x)
    torch.testing.assert_close(found.features["dino"], dino / dino.norm(dim=1, keepdim=True))

    report = bias_report([found, found], ["a", "b"], how.target.classes, 7)
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


def test_obedience(how, monkeypatch):
    """A model that draws three of four as asked, on average over both classes."""
    asked = []

    def drawn(how, model, prompts, n, label):
        asked.extend(prompts)
        return [Seen({"classifier": np.array([4, 0] if "woman" in prompt else [2, 2])}) for prompt in prompts]

    monkeypatch.setattr(evaluate, "look_at", drawn)
    world = Occupations(("a",), ("b",), ("c",), {"gender": {"man": "a male {occupation}"}})
    names = {occupation_prompt(name): name for name in ("pilot", "nurse")}
    prompts = Prompts("occupations", (), (), (*names, "a person"), names, world)
    report = obedience(how, how.bundle, prompts, "test", 4, "")
    assert report == {"images": 16, "classifier": 0.75}
    assert asked == [
        "a photo of the face of a woman pilot, a person",
        "a male pilot",
        "a photo of the face of a woman nurse, a person",
        "a male nurse",
    ]


def test_a_bundle_without_an_evaluation_classifier(how):
    with pytest.raises(UserError, match="no classifier for evaluation"):
        replace(how, bundle=replace(how.bundle, classifiers={}))


def test_occupations_are_read_and_checked(how, tmp_path):
    assert read_occupations(how.bundle.path).test == tuple(OCCUPATIONS["test"])
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
            f'{{"occupations": {whole}, "named": {{"gender": {{"woman": "a woman"}}}}}}',
            '"named" is not names',
        ),
        (
            f'{{"occupations": {whole}, "named": {{"gender": {{"woman": "a {{mood}} {{occupation}}"}}}}}}',
            '"named" is not names',
        ),
        (f'{{"occupations": {whole}, "hiding": ["age"]}}', '"hiding" is not names'),
        (f'{{"occupations": {whole}, "hiding": {{"age": "a"}}}}', '"hiding" is not names'),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_occupations(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="prompts.json"):
        read_occupations(tmp_path)


def test_an_attribute_that_a_classifier_does_not_know_is_refused(how):
    class Knows:
        attributes = {"height": ("tall", "short")}

    bundle = replace(how.bundle, classifiers={"finetune": Knows, "evaluate": Knows})
    with pytest.raises(UserError, match="'evaluate' doesn't know gender, only height"):
        replace(how, bundle=bundle)
    with pytest.raises(UserError, match="'finetune' doesn't know gender"):
        Setup(bundle, resolve(("gender",), bundle.recipe, {}), how.target, (("a",),))
