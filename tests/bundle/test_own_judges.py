"""--judge ROLE=file.py:loader: a user's own judge in the place of the bundle's. A bundle's file never runs code."""

import json
import shutil

import pytest
import torch
from tiny_bundle import OCCUPATIONS

from fairref.bundle.inspection import inspect_bundle
from fairref.bundle.loading import load_bundle
from fairref.bundle.own_judges import load_own, parse_judges
from fairref.bundle.registry import PARTS
from fairref.commands import cli, evaluate, train
from fairref.errors import UserError
from fairref.evaluation.judging import EvaluationSettings, draw_images, judge
from fairref.fairness.attributes import parse_targets
from fairref.generation.drawing import Drawing
from fairref.prompts import occupation_prompt

SIDE = 32  # pixels of a side of the tiny bundle's images
ROLES = {part.role: part for part in PARTS}
PREAMBLE = "import torch\n"
RED = """
class Red:
    classes = {"gender": ("woman", "man")}
    input_size = 16

    def __call__(self, x):
        red = x[:, 0].mean((1, 2)) - x[:, 1].mean((1, 2))
        return {"gender": torch.stack([-red, red], 1)}

def loader(device, dtype):
    return Red()
"""  # a man is an image that is redder than it is green
MEANS = """
def loader(device, dtype):
    return lambda x: x.mean((2, 3)).to(dtype)
"""  # features (n, 3)


def is_man(x):
    """What RED says, of images x (n, 3, H, W)."""
    return x[:, 0].mean((1, 2)) > x[:, 1].mean((1, 2))


@pytest.fixture
def own(tmp_path):
    """Writes a user's file -> "file.py:loader"."""

    def write(text, name="own.py"):
        (tmp_path / name).write_text(PREAMBLE + text)
        return f"{tmp_path / name}:loader"

    return write


def test_evaluation_asks_ones_own_classifier(tiny_folder, loaded_tiny, own, capsys):
    options = ["--weights", str(tiny_folder), "-n", "8", "--explicit-images", "0"]
    assert cli.run(evaluate.main, [*options, "--judge", f"evaluate={own(RED)}"]) == 0
    counts = json.loads(capsys.readouterr().out)["judges"]["classifier"]["counts"]
    target = parse_targets(["gender"], loaded_tiny.attributes)
    settings = EvaluationSettings(loaded_tiny, target, Drawing(2, 2.0))
    men = [
        int(is_man(draw_images(settings, loaded_tiny, occupation_prompt(name), 8)).sum())
        for name in OCCUPATIONS["test"]
    ]
    assert counts == {name: [8 - n, n] for name, n in zip(OCCUPATIONS["test"], men, strict=True)}


@pytest.mark.parametrize(
    "loader",
    [
        RED.replace("[-red, red], 1)}", "[-red, red], 1).detach()}"),
        RED.replace("def __call__", "@torch.no_grad()\n    def __call__"),
    ],
)
def test_a_judge_without_a_gradient_is_not_for_finetuning(tiny_folder, own, tmp_path, capsys, loader):
    options = ["--attr", "gender", "--weights", str(tiny_folder), "--evaluate", "none"]
    options += ["--iterations", "1", "--out", str(tmp_path / "run")]
    assert cli.run(train.main, [*options, "--judge", f"finetune={own(loader)}"]) == 2
    message = capsys.readouterr().err
    assert "own.py:loader: what it gives has no gradient" in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert cli.run(train.main, [*options, "--judge", f"evaluate={own(loader)}"]) == 0


def test_the_other_parts_stay_the_bundles(tiny_folder, loaded_tiny, own):
    bundle = load_bundle(tiny_folder, judges={"evaluate": own(RED)})
    (classifier,) = bundle.classifiers["evaluate"]
    assert classifier.classes == {"gender": ("woman", "man")} and classifier.input_size == 16
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(classifier(x)["gender"].argmax(1).bool(), is_man(x))
    (mine,), (theirs,) = bundle.classifiers["finetune"], loaded_tiny.classifiers["finetune"]
    assert torch.equal(mine(x)["skin_tone"], theirs(x)["skin_tone"])
    # a part of the target that it doesn't know can't be judged any more
    both = parse_targets(["gender", "skin_tone"], bundle.attributes)
    with pytest.raises(UserError, match="'evaluate' doesn't know skin_tone, only gender"):
        EvaluationSettings(bundle, both, Drawing(2, 2.0))


def test_an_attribute_of_ones_own_is_known_to_the_bundle(tiny_folder, loaded_tiny, own):
    text = RED.replace('"gender"', '"colour"').replace('("woman", "man")', '("green", "red")')
    bundle = load_bundle(tiny_folder, judges={"evaluate": own(text)})
    assert bundle.attributes == {**loaded_tiny.attributes, "colour": ("green", "red")}
    settings = EvaluationSettings(bundle, parse_targets(["colour"], bundle.attributes), Drawing(2, 2.0))
    x = draw_images(settings, bundle, "a pilot", 6)
    red = int(is_man(x).sum())
    assert judge(settings, x).counts("classifier", settings.target.classes).tolist() == [6 - red, red]


def test_features_stand_in_the_place_of_dino(tiny_folder, loaded_tiny, own):
    assert loaded_tiny.dino is None
    bundle = load_bundle(tiny_folder, judges={"dino": own(MEANS)})
    settings = EvaluationSettings(bundle, parse_targets(["gender"], bundle.attributes), Drawing(2, 2.0))
    x = draw_images(settings, bundle, "a pilot", 3)
    means = x.mean((2, 3))
    assert bundle.dino.width == 3 and torch.equal(bundle.dino(x), means)
    found = judge(settings, x).features["dino"]
    torch.testing.assert_close(found, means / means.norm(dim=1, keepdim=True))


def test_an_embedder_must_fit_the_external_faces(tiny_faces_folder, own):
    with pytest.raises(UserError, match="face features have 6 numbers each and the embedder makes 3"):
        load_bundle(tiny_faces_folder, judges={"embedder": own(MEANS)})
    doubled = MEANS.replace("x.mean((2, 3))", "x.mean((2, 3)).repeat(1, 2)")
    bundle = load_bundle(tiny_faces_folder, judges={"embedder": own(doubled)})
    assert (bundle.embedder.width, bundle.embedder.side) == (6, 112)


def test_a_loader_is_given_device_and_number_format(tiny_folder, own):
    text = MEANS.replace(
        "return", "assert device == torch.device('cpu') and dtype == torch.bfloat16\n    return"
    )
    bundle = load_bundle(tiny_folder, dtype=torch.bfloat16, judges={"dino": own(text)})
    assert bundle.dino(torch.zeros(1, 3, 8, 8)).dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"--judge dino: .* ends with AssertionError"):
        load_bundle(tiny_folder, judges={"dino": own(text)})


CLASSIFIERS = {
    "another order": (RED.replace('("woman", "man")', '("man", "woman")'), "the bundle's, in their order: woman, man"),
    "too few logits": (RED.replace("[-red, red]", "[red]"), r"\{gender: a tensor \(1, 1\) of float32\} for"),
    "no rows": (RED.replace("[-red, red], 1", "[-red, red], 0"), r"\{gender: a tensor \(2, 1\) of float32\} for"),
    "a tensor": (RED.replace('{"gender": torch.stack([-red, red], 1)}', "red"), r"gives a tensor \(1,\)"),
    "no tensors": (RED.replace("torch.stack([-red, red], 1)", "[0.0, 1.0]"), "expected logits"),
    "no classes": (RED.replace("    classes =", "    names ="), "expected attribute -> two or more names"),
    "classes of another kind": (RED.replace('{"gender": ("woman", "man")}', '["woman", "man"]'), "classes"),
    "other classes": (RED.replace('{"gender": (', '{"sex": ('), "expected logits"),
    "fails when it is made": (RED.replace("return Red()", "raise OSError('no file')"), "ends with OSError: no file"),
    "fails when it looks": (RED.replace("red = ", "red = 1 / 0 + "), "ends with ZeroDivisionError"),
    "takes no device": (RED.replace("loader(device, dtype)", "loader()"), "ends with TypeError"),
    "no such function": (RED.replace("def loader", "def other"), "has no function 'loader'"),
    "no function": (RED.replace("def loader", "loader = 3\ndef other"), "has no function 'loader'"),
    "no Python": ("def loader(:\n", r"own.py can't be run \(SyntaxError"),
    "an import that is not there": ("import no_such_module_of_this_name", r"can't be run \(ModuleNotFoundError"),
}  # fmt: skip


@pytest.mark.parametrize("text, words", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_a_classifier_that_does_not_fit_is_one_sentence(loaded_tiny, own, text, words):
    with pytest.raises(UserError, match=words) as caught:
        load_own(ROLES["evaluate"], own(text), loaded_tiny.manifest, SIDE, "cpu", torch.float32)
    message = str(caught.value)
    assert message.startswith("--judge evaluate: ") and "own.py" in message and "\n" not in message


@pytest.mark.parametrize(
    "found, words",
    [
        ("x.mean()", r"gives a tensor \(\) of float32 for one image; expected features \(1, D\)"),
        ("x", r"gives a tensor \(1, 3, 32, 32\) of float32 for one image"),
        ("x.mean((2, 3)).repeat(2, 1)", r"gives a tensor \(2, 3\)"),
        ("{'a': x}", r"gives \{a: a tensor \(1, 3, 32, 32\) of float32\}"),
        ("None", "gives None"),
    ],
)
def test_features_that_do_not_fit_are_one_sentence(own, found, words):
    text = f"def loader(device, dtype):\n    return lambda x: {found}\n"
    with pytest.raises(UserError, match=words) as caught:
        load_own(ROLES["dino"], own(text), {}, SIDE, "cpu", torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "texts, words",
    [
        (["clip=a.py:f"], "--judge is 'clip=a.py:f'; expected ROLE=file.py:loader or ROLE=clip:ATTRIBUTE"),
        (["a.py:loader"], "--judge is 'a.py:loader'; expected ROLE=file.py:loader"),
        (["evaluate=a.py:f", "evaluate=a.py:g", "evaluate=a.py:f"], "--judge names evaluate=a.py:f twice"),
        (["dino=a.py:f", "evaluate=a.py:g", "dino=b.py:f"], "--judge names dino twice; leave one out"),
    ],
)  # fmt: skip
def test_roles_that_are_none_or_given_twice_are_refused(tiny_folder, capsys, texts, words):
    options = [word for text in texts for word in ("--judge", text)]
    assert cli.run(evaluate.main, ["--weights", str(tiny_folder), *options]) == 2
    message = capsys.readouterr().err
    assert message.startswith(words) and message.count("\n") == 1


@pytest.mark.parametrize(
    "place, words",
    [
        ("a.txt:loader", "expected path/to/file.py:name"),
        ("a.py", "expected path/to/file.py:name"),
        ("a.py:no name", "expected path/to/file.py:name"),
        ("nowhere.py:loader", "nowhere.py, which is no file; correct the path"),
    ],
)
def test_places_that_name_no_function_are_refused(place, words):
    judges = parse_judges([f"evaluate={place}"])
    with pytest.raises(UserError, match=words):
        load_own(ROLES["evaluate"], *judges["evaluate"], {}, SIDE, "cpu", torch.float32)


def test_the_roles_are_those_of_the_registry():
    own = [part.role for part in PARTS if part.own]
    assert (
        set(parse_judges([f"{role}=a.py:f" for role in own])) == set(own) >= {"finetune", "evaluate", "dino"}
    )
    for part in PARTS:
        if not part.own:
            with pytest.raises(UserError, match="ROLE one of"):
                parse_judges([f"{part.role}=a.py:f"])


@pytest.mark.parametrize("role", ["evaluat", "clip"])
def test_load_bundle_refuses_a_role_that_is_none(tiny_folder, own, role):
    """In a program as on the command line: a slip doesn't leave the bundle's own judge in place."""
    with pytest.raises(UserError, match=role):
        load_bundle(tiny_folder, judges={role: own(MEANS)})


@pytest.mark.parametrize(
    "place", ["code.py:loader", "code.py", "{folder}/code.py:loader", "./code.py:loader"]
)
def test_a_manifest_names_no_code(tiny_faces_folder, tmp_path, place):
    """A folder that was downloaded runs nothing, whatever its bundle.json says and wherever the file lies."""
    folder = shutil.copytree(tiny_faces_folder, tmp_path / "bundle")
    mark, place = tmp_path / "it-ran", place.format(folder=folder)
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w').close()\n{PREAMBLE}{RED}")
    manifest = json.loads((folder / "bundle.json").read_text())
    for part in PARTS:
        with pytest.raises(UserError):
            part.load(folder / place)
        manifest |= (
            {part.group: {**manifest[part.group], part.role: place}} if part.group else {part.key: place}
        )
    (folder / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError):
        load_bundle(folder)
    statuses = inspect_bundle(folder)
    assert len(statuses) == len(PARTS) and all(s.state not in ("ok", "not named") for s in statuses)
    # the file is one that would run: so does --judge
    assert not mark.exists()
    load_own(ROLES["evaluate"], f"{folder / 'code.py'}:loader", {}, SIDE, "cpu", torch.float32)
    assert mark.exists()


def test_a_run_remembers_ones_own_judge_and_resumes_with_no_other(tiny_folder, own, tmp_path, capsys):
    place, out = own(RED), tmp_path / "run"
    options = ["--attr", "gender", "--weights", str(tiny_folder), "--iterations", "1", "--evaluate", "none"]
    assert cli.run(train.main, [*options, "--judge", f"finetune={place}", "--out", str(out)]) == 0
    (kept,) = json.loads((out / "settings.json").read_text())["judge"]
    assert (kept["role"], f"{kept['path']}:{kept['name']}") == ("finetune", place)
    # it is the run's judge: another one makes another loss of the same images
    assert cli.run(train.main, [*options, "--out", str(tmp_path / "plain")]) == 0
    first, plain = (
        json.loads((tmp_path / n / "metrics.jsonl").read_text())["align"] for n in ("run", "plain")
    )
    assert first != plain
    assert cli.run(train.main, ["--resume", str(out)]) == 0
    own(RED + "\n# another comment\n")
    capsys.readouterr()
    assert cli.run(train.main, ["--resume", str(out)]) == 2
    assert "own.py: has changed since the run began" in capsys.readouterr().err
    (tmp_path / "own.py").unlink()
    assert cli.run(train.main, ["--resume", str(out)]) == 2
    assert "own.py: is no longer there since the run began" in capsys.readouterr().err
    assert cli.run(train.main, ["--resume", str(out), "--judge", f"finetune={place}"]) == 2
    assert "--judge can't be changed" in capsys.readouterr().err
