"""A user's own losses: their texts, their gradient, and runs that minimise them alone."""

import hashlib
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_bundle import OCCUPATIONS, write_tiny_bundle
from tiny_run import images_by_hand, make_setup, moved

from fairref.bundle.loading import load_bundle
from fairref.errors import UserError
from fairref.evaluation import judging
from fairref.files.weights import read_info
from fairref.generation.adapters import load_adapter
from fairref.generation.drawing import Drawing, fixed_images
from fairref.processes import Processes
from fairref.prompts import occupation_prompt
from fairref.settings import RunOptions
from fairref.training.checks import check
from fairref.training.loop import finetune
from fairref.training.own_losses import parse_losses
from fairref.training.run import run, train
from fairref.training.step import iteration_gradient
from fairref.training.terms import STATISTICS, TERMS, own_term
from fairref.training.validation import SEED, LossValidation, start_validation

LOSSES = '''
def bright(x, o, prompt, bundle):
    return (x - 1).square().mean((1, 2, 3))

def moved(x, o, prompt, bundle):
    """Where the original is light alone."""
    return len(prompt) * (x - o).abs().mean((1, 2, 3)), o.mean((1, 2, 3)) > LIGHT

def fails(x, o, prompt, bundle):
    return x.no_such_thing

def original(x, o, prompt, bundle):
    return o.mean((1, 2, 3))

def short(x, o, prompt, bundle):
    return x.mean((1, 2, 3))[1:]

def number(x, o, prompt, bundle):
    return 0.5

def whole(x, o, prompt, bundle):
    return x.mean((1, 2, 3)).long()

def weights_as_mask(x, o, prompt, bundle):
    return x.mean((1, 2, 3)), x.new_ones(len(x))

def short_mask(x, o, prompt, bundle):
    return x.mean((1, 2, 3)), x[1:].mean((1, 2, 3)) > 0
'''
LIGHT = 0.07  # some originals have a mean above it, some below
PARTS = ("clip", "finetune", "evaluate")  # the folders of all that is not Stable Diffusion
HOW = Drawing(2, 2.0)  # what tiny_bundle.RECIPE says of evaluations
PROMPTS = ("a photo of the face of a cook, a person", "a judge")
SMALL = {"iterations": 1, "batch": 2, "steps": 1, "rank": 1, "validate_every": 0, "grid_every": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A whole bundle, and one of Stable Diffusion alone."""
    whole, alone = (tmp_path_factory.mktemp(name) for name in ("whole", "alone"))
    write_tiny_bundle(whole)
    shutil.copytree(whole, alone, ignore=shutil.ignore_patterns(*PARTS), dirs_exist_ok=True)
    manifest = json.loads((whole / "bundle.json").read_text())
    del manifest["clip"], manifest["classifiers"], manifest["attributes"]
    (alone / "bundle.json").write_text(json.dumps(manifest))
    return whole, alone


@pytest.fixture(scope="module")
def alone(folders):
    """Without CLIP, classifiers and faces."""
    bundle = load_bundle(folders[1])
    assert bundle.clip is None and not bundle.classifiers and bundle.detector is None
    return bundle


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("own=code") / "losses.py"  # a path may have a =
    file.write_text(f"LIGHT = {LIGHT}\n{LOSSES}")
    return file


def texts(file):
    return [f"{file}:bright=0.5", f"{file}:moved=0.25"]


def with_losses(bundle, file, attribute=None, **recipe):
    setup = make_setup(bundle, attribute, **{"validate_images": 3, "grid_every": 0, **recipe})
    return replace(setup, own_losses=parse_losses(texts(file), ()), validation=PROMPTS)


def by_hand(prompt, x, o):
    """Both functions' values (n,), image by image."""
    bright, moved = [], []
    for image, original in zip(x, o, strict=True):
        bright.append(((image - 1) ** 2).mean())
        light = float(original.mean()) > LIGHT
        moved.append(len(prompt) * (image - original).abs().mean() if light else torch.zeros_like(bright[-1]))
    return torch.stack(bright), torch.stack(moved)


def test_texts_are_parsed(file):
    bright, moved = parse_losses([f"{file}:bright=0.5", f"{file}:moved"], ("loss",))
    assert (bright.name, bright.weight, moved.name, moved.weight) == ("bright", 0.5, "moved", 1.0)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert bright.to_dict() == {"name": "bright", "path": str(file), "sha256": sha256, "weight": 0.5}
    assert parse_losses((), ()) == ()


@pytest.mark.parametrize(
    "text, said",
    [
        ("nowhere.py:bright", "which is no file"),
        ("{}:dark", "has no function 'dark'"),
        ("{}:LIGHT", "has no function 'LIGHT'"),
        ("losses.py", "expected path/to/file.py:name"),
        ("bright", "expected path/to/file.py:name"),
        ("{}:bright=much", "whose weight is 'much'; expected a number"),
        ("{}:bright=", "whose weight is ''; expected a number"),
        ("{}:bright=-1", "whose weight is '-1'; expected a number"),
        ("{}:bright=inf", "whose weight is 'inf'; expected a number"),
        ("{}:bright=nan", "whose weight is 'nan'; expected a number"),
        ("{}:moved", "--loss names 'moved', which another loss or metric is called"),
    ],
)
def test_a_text_that_names_no_loss_is_refused(file, text, said):
    with pytest.raises(UserError, match=said) as error:
        parse_losses([text.format(file)], ("loss", "moved"))
    assert "--loss" in str(error.value) and "\n" not in str(error.value)


def test_two_losses_of_one_name_and_a_file_that_fails_are_refused(file, tmp_path):
    with pytest.raises(UserError, match="--loss names 'bright', which another loss or metric is called"):
        parse_losses([f"{file}:bright", f"{file}:bright=2"], ())
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(UserError, match=r"broken.py can't be run \(ZeroDivisionError: division by zero\)"):
        parse_losses([f"{tmp_path / 'broken.py'}:f"], ())


@pytest.mark.parametrize(
    "name, said",
    [
        ("short", r"short gives a tensor \(2,\) of float32 for 3 images"),
        ("number", "number gives a float for 3 images"),
        ("whole", r"whole gives a tensor \(3,\) of int64 for 3 images"),
        ("weights_as_mask", r"gives a tensor \(3,\) of float32 as its mask"),
        ("short_mask", r"gives a tensor \(2,\) of bool as its mask"),
    ],
)
def test_what_is_not_one_number_an_image_is_refused(alone, file, name, said):
    (own,) = parse_losses([f"{file}:{name}"], ())
    with pytest.raises(UserError, match=said):
        own(torch.zeros(3, 3, 4, 4), torch.zeros(3, 3, 4, 4), "a cook", alone)


@pytest.mark.parametrize(
    "name, said",
    [
        ("fails", "fails ends with AttributeError: 'Tensor' object has no attribute 'no_such_thing'"),
        ("original", "original does not depend on x, so it has no gradient"),
        ("short", r"short gives a tensor \(1,\)"),
    ],
)
def test_what_would_fail_in_a_run_is_refused_before_it(alone, file, tmp_path, name, said):
    with pytest.raises(UserError, match=f"--loss {said}"):
        train(alone, None, str(tmp_path / "run"), loss=[f"{file}:{name}"], **SMALL)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("attribute, micro_batch", [(None, 0), (None, 2), ("gender", 0)])
def test_its_gradient_is_its_own_through_algorithm_A1(folders, file, attribute, micro_batch):
    """Alone, of a bundle that has no judges; and what it adds to the method's losses."""
    bundle = load_bundle(folders[attribute is None], dtype=torch.float64)
    recipe = {"batch": 4, "steps": 2, "micro_batch": micro_batch, "C": 0.5}
    setup = with_losses(bundle, file, attribute, **recipe)
    check(setup)
    model, state = moved(setup)
    parameters = list(state.adapter.parameters())
    gradient, metrics = iteration_gradient(setup, model, parameters, 0)
    values = by_hand(metrics["prompt"], *images_by_hand(setup, model, 0))
    assert 0 < int((values[1] != 0).sum()) < 4, "the mask takes some and leaves some"
    wanted = torch.autograd.grad((0.5 * values[0].sum() + 0.25 * values[1].sum()) / 4, parameters)
    others, without = [torch.zeros_like(p) for p in parameters], {"loss": 0.0}
    if attribute:
        others, without = iteration_gradient(replace(setup, own_losses=()), model, parameters, 0)
    for name, value in zip(("bright", "moved"), values, strict=True):
        assert metrics[name] == pytest.approx(value.mean().item(), rel=1e-12)
    own = 0.5 * metrics["bright"] + 0.25 * metrics["moved"]
    assert metrics["loss"] == pytest.approx(without["loss"] + own, rel=1e-12)
    for found, other, expected in zip(gradient, others, wanted, strict=True):
        assert expected.abs().max() > 1e-7
        scale = float(torch.maximum(expected.abs(), other.abs()).max())
        torch.testing.assert_close(found - other, expected, rtol=1e-7, atol=1e-10 * scale)
    names = {"prompt", "S", "guidance", "loss", "bright", "moved"}
    assert metrics.keys() == names if attribute is None else metrics.keys() > {*names, "align", "bias"}


def drawn(bundle, model, prompts, seed, n):
    """Of each prompt: the prompt, x and o."""
    return [
        (prompt, *(fixed_images(m, seed, prompt, range(n), HOW) for m in (model, bundle)))
        for prompt in prompts
    ]


def means_by_hand(bundle, model, prompts, seed, n):
    values = [by_hand(*one) for one in drawn(bundle, model, prompts, seed, n)]
    bright, moved = (torch.cat(of_one).double().mean().item() for of_one in zip(*values, strict=True))
    return {"loss": 0.5 * bright + 0.25 * moved, "bright": bright, "moved": moved}


def test_a_validation_compares_the_weighted_sum(alone, file, monkeypatch):
    setup = with_losses(alone, file)
    model, _ = moved(setup)
    validation = start_validation(setup)
    assert isinstance(validation, LossValidation)
    wanted = means_by_hand(alone, model, PROMPTS, SEED, 3)
    measured = validation.measure(model)
    assert measured == pytest.approx(wanted, rel=1e-5) and wanted["moved"] > 1e-3
    assert validation.measure(alone)["moved"] == 0
    # and two processes, one of which has one image and the other two, sum up to one
    monkeypatch.setattr(Processes, "total", lambda self, tensors: tensors)
    shares = [
        start_validation(replace(setup, processes=Processes(rank, 2))).measure(model) for rank in range(2)
    ]
    assert measured == pytest.approx({name: shares[0][name] + shares[1][name] for name in measured}, rel=1e-5)


def test_a_run_keeps_the_adapter_of_the_least_loss(alone, file, tmp_path, capsys):
    setup = with_losses(
        alone, file, iterations=4, validate_every=1, lr=0.3, ema=0.0, steps=1, component="both", batch=2
    )
    files = finetune(setup, tmp_path, {})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation"]["loss"] for line in lines]
    assert len(set(losses)) == 4 and losses.index(min(losses)) < 3, "the last one isn't the best by itself"
    best = read_info(files["best"])
    assert best["iterations"] == losses.index(min(losses)) + 1
    measured = start_validation(setup).measure(load_adapter(alone, files["best"]))
    assert measured["loss"] == pytest.approx(min(losses), rel=1e-5)
    assert (
        f"has the least loss, {min(losses):.3g} after iteration {best['iterations']}"
        in capsys.readouterr().out
    )


@pytest.fixture(scope="module")
def finished(alone, file, tmp_path_factory):
    """A run's folder, of a file of losses of its own, which a test may change."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(file, folder / "losses.py")
    recipe = {**SMALL, "evaluate": "ema", "lr": 0.1, "component": "both"}
    out = str(folder / "run")
    return train(alone, None, out, loss=texts(folder / "losses.py"), **recipe)


def test_an_evaluation_has_each_terms_mean_before_and_after(alone, finished):
    found = json.loads((finished / "evaluation.json").read_text())
    model = load_adapter(alone, finished)
    assert found.keys() == {"before", "after (ema)"}
    for label, drawer in (("before", alone), ("after (ema)", model)):
        for part, n in (("test", 2), ("train", 1)):
            prompts = [occupation_prompt(name) for name in OCCUPATIONS[part]]
            report = found[label][part]
            assert (report["prompts"], report["images"]) == (len(prompts), n)
            wanted = means_by_hand(alone, drawer, prompts, judging.SEED, n)
            assert report["terms"] == pytest.approx(wanted, rel=1e-5)
    before, after = (found[label]["test"]["terms"] for label in found)
    assert before["moved"] == 0 and before["bright"] != after["bright"]
    assert (finished / "before_after.png").is_file()


def test_settings_keep_which_file_it_was_and_resume_wants_the_same(finished, capsys):
    file = finished.parent / "losses.py"
    settings = json.loads((finished / "settings.json").read_text())
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    wanted = [("bright", 0.5), ("moved", 0.25)]
    assert settings["target"] is None and settings["loss"] == [
        {"name": name, "path": str(file), "sha256": sha256, "weight": weight} for name, weight in wanted
    ]
    settings["recipe"] |= {"iterations": 2, "evaluate": "none"}  # a run that was stopped
    (finished / "settings.json").write_text(json.dumps(settings))
    begun = load_file(finished / "adapter_raw.safetensors")
    run(RunOptions(resume=str(finished)), {})
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1] and lines[1].keys() >= {"bright", "moved"}
    ended = load_file(finished / "adapter_raw.safetensors")
    assert any(not torch.equal(begun[name], ended[name]) for name in begun)
    content = file.read_text()
    file.write_text(content + "\n")
    with pytest.raises(UserError, match=r"losses.py: has changed since the run began; put the old file back"):
        run(RunOptions(resume=str(finished)), {})
    file.unlink()
    with pytest.raises(UserError, match=r"losses.py: is no longer there since the run began"):
        run(RunOptions(resume=str(finished)), {})
    file.write_text(content)


def test_without_an_attribute_nothing_may_ask_for_one(alone, file, tmp_path):
    out, own = str(tmp_path / "run"), {"loss": texts(file), **SMALL}
    with pytest.raises(UserError, match="--target is for a run with --attr; leave it out"):
        train(alone, None, out, target=["gender=0.5,0.5"], **own)
    with pytest.raises(UserError, match="--until-bias is for a run with --attr; leave it out"):
        train(alone, None, out, until_bias=0.1, **{**own, "validate_every": 1})
    with pytest.raises(UserError, match="--attr is missing"):
        train(alone, None, out, **SMALL)
    assert not (tmp_path / "run").exists()


def test_prompts_are_explicit_with_an_attribute_only_and_no_metrics_name_is_free(
    folders, file, finished, tmp_path
):
    neutral = {occupation_prompt(name) for name in OCCUPATIONS["train"]}
    alone = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    assert alone["prompt"] in neutral and "align" not in alone
    with pytest.raises(UserError, match="--explicit-every has no effect without --attr"):
        train(load_bundle(folders[0]), None, loss=texts(file), **SMALL, explicit_every=1)
    bundle, recipe = load_bundle(folders[0]), {**SMALL, "C": 0.5, "explicit_every": 1, "evaluate": "none"}
    recipe |= {"validate_every": 1, "validate_images": 1, "validate_prompts": 1}
    out = train(bundle, "gender", str(tmp_path / "run"), loss=texts(file), **recipe)
    (line,) = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert line["prompt"] not in neutral and line.keys() > {"align", "bright", "moved", "validation"}
    taken = {*line, *TERMS, *STATISTICS, "bias"} - {"bright", "moved"}
    (tmp_path / "taken.py").write_text(
        "".join(f"def {name}(x, o, prompt, bundle):\n    return x.mean((1, 2, 3))\n" for name in taken)
    )
    for name in taken:
        with pytest.raises(UserError, match=f"--loss names '{name}', which another loss or metric is called"):
            train(bundle, "gender", loss=[f"{tmp_path / 'taken.py'}:{name}"], **recipe)


def test_a_loss_that_overwrites_the_original_leaves_it_to_the_other_terms():
    o = torch.ones(2, 3, 4, 4)
    recipe = SimpleNamespace(batch=2)
    view = SimpleNamespace(
        x=o,
        pair=SimpleNamespace(o=o),
        task=SimpleNamespace(prompt=""),
        setup=SimpleNamespace(bundle=None, recipe=recipe),
    )

    class Zeroes:
        weight = 1.0

        def __call__(self, x, o, prompt, bundle):
            return o.zero_().mean((1, 2, 3))

    own_term(Zeroes())(view)
    assert (o == 1).all()
