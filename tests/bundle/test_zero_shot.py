"""--judge evaluate=clip:...: CLIP as a classifier that nobody trained says what transformers' CLIP says."""

import json

import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from fairref.bundle.loading import load_bundle
from fairref.bundle.registry import PARTS
from fairref.bundle.zero_shot import load_zero_shot
from fairref.commands import cli, evaluate, train
from fairref.errors import UserError

TEXTS = ["a person with glasses", "a face", "a photo of a pilot"]
ROLES = {part.role: part for part in PARTS}
GLASSES = "clip:glasses=a person with glasses|a person without"


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_its_logits_are_those_of_transformers(tiny_folder, images):
    peer = CLIPModel.from_pretrained(tiny_folder / "clip").eval()
    tokenizer = CLIPTokenizer.from_pretrained(tiny_folder / "clip")
    tokens = tokenizer(TEXTS, padding="max_length", max_length=77, return_tensors="pt")
    mean, std = (torch.tensor(v)[:, None, None] for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    with torch.no_grad():
        expected = peer(pixel_values=((images + 1) / 2 - mean) / std, **tokens).logits_per_image
    bundle = load_bundle(tiny_folder, judges={"evaluate": f"clip:look={'|'.join(TEXTS)}"})
    (classifier,) = bundle.classifiers["evaluate"]
    assert classifier.classes == {"look": tuple(TEXTS)} == {"look": bundle.attributes["look"]}
    assert classifier.input_size is None  # it sees whole images
    torch.testing.assert_close(classifier(images)["look"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "text, classes",
    [
        ("gender=a photo of a woman|a photo of a man", ("woman", "man")),  # the bundle's, found in the texts
        ("gender=woman:she|man:he", ("woman", "man")),
        ("hat=with: a person: hat | without:a person", ("with", "without")),
        ("hat=a hat|bare:a head", ("a hat", "bare")),
    ],
)
def test_the_classes_names(loaded_tiny, images, text, classes):
    clip = loaded_tiny.clip, loaded_tiny.clip_tokenizer
    classifier = load_zero_shot(ROLES["finetune"], f"clip:{text}", loaded_tiny.manifest, clip)
    ((attribute, names),) = classifier.classes.items()
    assert (attribute, names) == (text.partition("=")[0], classes)
    if classes == ("with", "without"):  # a name is no part of its text
        text = "clip:hat=x:a person: hat|y:a person"
        other = load_zero_shot(ROLES["finetune"], text, loaded_tiny.manifest, clip)
        assert torch.equal(other(images)["hat"], classifier(images)["hat"])


@pytest.mark.parametrize(
    "role, text, words",
    [
        ("evaluate", "clip:glasses=a face", "expected clip:ATTRIBUTE=TEXT|TEXT"),
        ("evaluate", "clip:glasses", "expected clip:ATTRIBUTE=TEXT|TEXT"),
        ("evaluate", "clip:=a|b", "expected clip:ATTRIBUTE=TEXT|TEXT"),
        ("evaluate", "clip:a,b=a|b", "expected clip:ATTRIBUTE=TEXT|TEXT"),
        ("evaluate", "clip:glasses=a| ", "expected clip:ATTRIBUTE=TEXT|TEXT"),
        ("evaluate", "clip:glasses=:a|b", "expected clip:ATTRIBUTE=TEXT|TEXT"),
        ("evaluate", "clip:glasses=x:a|y:A", "'A' is to CLIP the same as a text before it"),
        ("evaluate", "clip:glasses=x:a|x:b", "calls two classes the same"),
        ("evaluate", "clip:glasses=a|" + "so " * 80 + "end", "longer than the 77 tokens"),
        ("evaluate", "clip:gender=a man|a woman", "the classes a man, a woman; expected the bundle's of 'gender', in"),
        ("evaluate", "clip:gender=a woman|a man|a child", "the classes woman, man, a child; expected the bundle's"),
        ("dino", "clip:glasses=a|b", "is a classifier; give it to finetune or evaluate"),
    ],
)  # fmt: skip
def test_what_is_no_classifier_is_one_sentence(loaded_tiny, role, text, words):
    clip = loaded_tiny.clip, loaded_tiny.clip_tokenizer
    with pytest.raises(UserError) as caught:
        load_zero_shot(ROLES[role], text, loaded_tiny.manifest, clip)
    message = str(caught.value)
    assert message.startswith(f"--judge {role}") and words in message and "\n" not in message


def test_it_needs_the_bundles_clip():
    with pytest.raises(UserError, match="needs CLIP, which the bundle lacks"):
        load_zero_shot(ROLES["evaluate"], GLASSES, {}, None)


def test_finetuning_follows_it_and_resumes_and_evaluation_asks_it(tiny_folder, tmp_path, capsys):
    out, weights = tmp_path / "run", ["--weights", str(tiny_folder), "--attr", "glasses"]
    judges = ["--judge", f"finetune={GLASSES}", "--judge", f"evaluate={GLASSES}"]
    options = [*weights, *judges, "--iterations", "1", "--evaluate", "none", "--out", str(out)]
    assert cli.run(train.main, options) == 0
    kept = json.loads((out / "settings.json").read_text())["judge"]
    assert [f"{row['role']}=clip:{row['clip']}" for row in kept] == judges[1::2]
    assert json.loads((out / "metrics.jsonl").read_text())["norm"] > 0
    assert cli.run(train.main, ["--resume", str(out)]) == 0
    capsys.readouterr()
    assert cli.run(evaluate.main, [*weights, *judges[2:], "-n", "2", "--explicit-images", "0"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["judge"] == [{"role": "evaluate", "clip": GLASSES.removeprefix("clip:")}]
    assert set(report["judges"]["classifier"]["share"]) == {"a person with glasses", "a person without"}


def test_a_judge_of_something_else_is_refused(tiny_folder, capsys):
    weights, judges = ["--weights", str(tiny_folder), "-n", "1"], ["--judge", f"evaluate={GLASSES}"]
    gender = ["--judge", "evaluate=clip:gender=a woman|a man"]
    assert cli.run(evaluate.main, [*weights, *judges, *gender]) == 2
    message = capsys.readouterr().err
    assert (
        message.startswith(f"--judge evaluate={GLASSES} judges glasses and not gender")
        and message.count("\n") == 1
    )
