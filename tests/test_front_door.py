"""What the library and the command line refuse before any work: wrong types, settings without effect, overflows."""

from dataclasses import fields

import pytest

import fairref
from fairref.bundle.recipe import resolve
from fairref.commands import bundle as bundle_command
from fairref.commands import cli
from fairref.errors import UserError, typed
from fairref.settings import Recipe, refuse_unused


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda b: fairref.sample(b, 3), "sample: prompt is 3; expected str."),
        (
            lambda b: fairref.sample("weights/emoji", "x"),
            "sample: bundle is 'weights/emoji'; expected Bundle.",
        ),
        (lambda b: fairref.sample(b, "x", n=2.5), "sample: n is 2.5; expected int."),
        (lambda b: fairref.sample(b, "x", n=True), "sample: n is True"),
        (lambda b: fairref.sample(b, "x", n=0), "number of images is 0"),
        (lambda b: fairref.sample(b, "x", seed="1"), "sample: seed is '1'"),
        (lambda b: fairref.sample(b, "x", seed=-1), "seed is -1"),
        (lambda b: fairref.sample(b, "x", seed=2**70), f"seed is {2**70}"),
        (
            lambda b: fairref.sample(b, "x", adapter=3),
            "sample: adapter is 3; expected str | pathlib.Path | ",
        ),
        (lambda b: fairref.sample(b, "x", steps="9"), "sample: steps is '9'"),
        (lambda b: fairref.sample(b, "x", guidance="much"), "sample: guidance is 'much'"),
        (lambda b: fairref.evaluate(b, attr=["gender"]), "evaluate: attr is ['gender']"),
        (lambda b: fairref.evaluate(b, target=[3]), "evaluate: target is [3]"),
        (lambda b: fairref.evaluate(b, images="many"), "evaluate: images is 'many'"),
        (lambda b: fairref.evaluate(b, prompts=3), "evaluate: prompts is 3"),
        (lambda b: fairref.evaluate(b, part="all"), "The part is 'all'"),
        (lambda b: fairref.train(b, 3), "train: attr is 3"),
        (lambda b: fairref.train(b, out=3), "train: out is 3"),
        (lambda b: fairref.train(b, loss=3), "train: loss is 3"),
        (lambda b: fairref.train(b, lr="fast"), "lr is 'fast'"),
        (lambda b: fairref.train(b, prompts=[3]), "train: prompts is [3]"),
        (lambda b: fairref.load_bundle(3), "load_bundle: path is 3"),
        (lambda b: fairref.load_bundle("emoji", device=3), "load_bundle: device is 3"),
        (lambda b: fairref.load_bundle("emoji", dtype="float32"), "load_bundle: dtype is 'float32'"),
        (lambda b: fairref.load_bundle("emoji", judges=["x"]), "load_bundle: judges is ['x']"),
        (lambda b: fairref.load_bundle("a\0b"), "no file has such a name"),
    ],
)
def test_arguments_of_wrong_types_are_refused_by_name(loaded_tiny, call, words):
    with pytest.raises(UserError) as refused:
        call(loaded_tiny)
    assert words in str(refused.value)


def test_whole_numbers_are_numbers_and_all_else_is_as_it_was(loaded_tiny):
    import numpy as np

    images = fairref.sample(loaded_tiny, "x", np.int64(1), steps=2, guidance=np.float32(2))
    assert len(images) == 1 and fairref.sample.__name__ == "sample" and "Raises" in fairref.sample.__doc__

    @typed
    def function(a: float | None = None, **more: int) -> object:
        return a, more

    assert function(2) == (2, {}) and function(b="x") == (None, {"b": "x"})
    with pytest.raises(TypeError, match="too many positional"):
        function(1, 2)


@pytest.mark.parametrize(
    "given, has_target, words",
    [
        ({"rank": 3, "component": "prefix"}, True, "--rank has no effect with --component prefix"),
        ({"tokens": 3}, True, "--tokens has no effect with --component text_encoder"),
        ({"C": 0.5}, False, "--C has no effect without --attr"),
        ({"lambda_img": 3}, False, "--lambda-img has no effect without --attr"),
        (
            {"face_reference": "nearest", "lambda_face": 0},
            True,
            "--face-reference has no effect with --lambda-face 0.0",
        ),
        ({"patience": 3}, True, "--patience has no effect with --until-bias 0.0"),
        (
            {"validate_prompts": 3, "validate_every": 0, "grid_every": 0},
            True,
            "--validate-prompts has no effect with --validate-every 0 and with --grid-every 0",
        ),
        ({"validate_images": 3, "validate_every": 0}, True, "--validate-images has no effect with"),
        ({"eval_images": 3, "evaluate": "none"}, True, "--eval-images has no effect with --evaluate none"),
    ],
)
def test_settings_without_effect_are_refused(given, has_target, words):
    recipe = resolve(("gender",), {}, given)
    with pytest.raises(UserError, match=words):
        refuse_unused(recipe, given, has_target)
    refuse_unused(recipe, {}, has_target)  # a bundle may say it


def test_what_switches_off_may_always_be_said():
    off = {"eval_images_train": 0, "evaluate": "none", "explicit_every": 0, "lambda_face": 0}
    refuse_unused(resolve(("gender",), {}, off), off, False)
    on = {"rank": 3, "component": "unet", "validate_prompts": 2, "validate_every": 0, "grid_every": 1}
    refuse_unused(resolve(("gender",), {}, on), on, True)
    names = {f.name for f in fields(Recipe)}
    assert all(set(f.metadata["only_with"]) <= names | {"attr"} for f in fields(Recipe))


@pytest.mark.parametrize(
    "given",
    [
        {"lr": 1e300},
        {"adam_eps": 1e-320},
        {"adam_eps": 1e300},
        {"weight_decay": 1e300},
        {"lambda_img": 1e300},
        {"lambda_text": 1e300},
        {"guidance": "1:1e300"},
        {"eval_guidance": 1e300},
    ],
)
def test_numbers_that_float32_does_not_hold_are_refused(given):
    (name,) = given
    with pytest.raises(UserError, match=f"recipe: {name} is .*; expected at (least|most)"):
        resolve(("gender",), {}, given)


def test_a_folder_of_other_things_is_no_bundle(tmp_path, monkeypatch, capsys):
    (tmp_path / "letter.txt").write_text("dear")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.run(bundle_command.main, ["check", "~"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert f"{tmp_path}: is no bundle; expected a folder with bundle.json" in shown.err
