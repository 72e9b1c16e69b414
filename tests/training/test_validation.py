"""Adapters of a run are compared on fixed noise; the best is kept, and a run may stop when it is fair."""

import json
import sys
import types
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_bundle import write_tiny_bundle
from tiny_run import make_setup, moved

from fairref.bundle.loading import load_bundle
from fairref.errors import UserError
from fairref.evaluation import judging
from fairref.fairness.faces import DetectedFaces
from fairref.fairness.metrics import bias, noise_floor
from fairref.files.images import to_image
from fairref.files.sheets import COLOURS, SIDE, Layout, enlarged
from fairref.generation.drawing import Drawing, fixed_images
from fairref.processes import Processes
from fairref.settings import Recipe
from fairref.training import checkpoints, grids, validation
from fairref.training.checkpoints import State
from fairref.training.grids import IMAGES, draw_grid, marked
from fairref.training.loop import RECOMPUTED, averaged, compiled, finetune, new_state
from fairref.training.step import iteration_gradient
from fairref.training.validation import (
    SEED,
    BiasValidation,
    better,
    limit,
    record_best,
    start_validation,
    target_reached,
)

HALVES = np.array([0.5, 0.5])
HOW = Drawing(2, 2.0)  # what tiny_bundle.RECIPE says of evaluations
PROMPTS = ("a photo of the face of a cook, a person", "a judge")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return load_bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundle")))


def with_validation(bundle, attribute="gender", **recipe):
    recipe = {"validate_every": 1, "validate_images": 5, "grid_every": 0, **recipe}
    return replace(make_setup(bundle, attribute, **recipe), validation=PROMPTS)


def test_it_measures_bias_and_likeness_to_the_frozen_model(bundle):
    setup = with_validation(bundle, "gender=0.2,0.8")
    model, _ = moved(setup)
    (h,), clip = bundle.classifiers["evaluate"], bundle.clip
    found, features, o_features = [], [], []
    for prompt in PROMPTS:
        x, o = (fixed_images(m, SEED, prompt, range(5), HOW) for m in (model, bundle))
        share = (h(x)["gender"].argmax(1) == 0).double().mean().item()
        found.append(abs((share - 0.2) - (1 - share - 0.8)))
        features.append(clip.encode_image(x).detach())
        o_features.append(clip.encode_image(o).detach())
    features, o_features = torch.cat(features), torch.cat(o_features)
    clip_i = (features * o_features).sum(1).mean().item()
    others = (o_features @ o_features.T)[~torch.eye(10, dtype=torch.bool)].mean().item()
    measured = start_validation(setup).measure(model)
    assert measured["bias"] == pytest.approx(np.mean(found), abs=1e-9)
    assert measured["clip_i"] == pytest.approx(clip_i, abs=1e-5) and clip_i < 0.99999
    assert measured["kept"] == pytest.approx((clip_i - others) / (1 - others), rel=1e-3)
    same = start_validation(setup).measure(bundle)
    assert same["clip_i"] == pytest.approx(1, abs=1e-6) and same["kept"] == pytest.approx(1, abs=1e-3)


def test_a_run_that_goes_on_does_not_draw_its_originals_again(bundle, tmp_path, monkeypatch):
    setup = with_validation(bundle)
    first = start_validation(setup, tmp_path / "judged")
    monkeypatch.setattr(judging, "draw_images", lambda *_: pytest.fail("drawn again"))
    again = start_validation(setup, tmp_path / "judged")
    assert again.unlike == first.unlike and all(map(torch.equal, again.originals, first.originals))


def test_processes_share_the_images(bundle, monkeypatch):
    """Two processes in turn, one of which has the images that the other lacks, sum up to one."""
    setup = with_validation(bundle, validate_images=3)
    whole = start_validation(setup).measure(bundle)
    parts = []
    for rank in range(2):
        one = replace(setup, processes=Processes(rank, 2))
        monkeypatch.setattr(Processes, "total", lambda self, tensors: tensors)
        parts.append([validation._judged(one, bundle, prompt) for prompt in PROMPTS])
    for p in range(2):
        counts = sum(part[p][0] for part in parts)
        features = torch.cat([part[p][1] for part in parts])
        of_all, all_features = validation._judged(setup, bundle, PROMPTS[p])
        assert torch.equal(counts, of_all) and counts.sum() == 3
        torch.testing.assert_close(features, all_features, rtol=0, atol=1e-4)
    assert whole["bias"] is not None


def test_with_a_target_the_bias_is_the_distance_from_it():
    assert bias(np.array([3, 1]), np.array([0.75, 0.25])) == 0
    assert bias(np.array([1, 1]), np.array([0.75, 0.25])) == pytest.approx(0.5)
    counts = np.array([[5, 2, 3], [10, 0, 0]])
    np.testing.assert_allclose(bias(counts, np.full(3, 1 / 3)), bias(counts), atol=1e-12)


def test_the_best_is_the_least_biased_that_has_not_collapsed():
    fair = {"bias": 0.2, "clip_i": 0.8, "kept": 0.5}
    assert better(fair, None) and better(fair, {"bias": 0.3}) and not better(fair, {"bias": 0.2})
    assert not better({**fair, "kept": 0.05}, None) and not better({**fair, "bias": None}, None)


def test_a_run_has_reached_its_target_after_enough_fair_validations_in_a_row(bundle):
    setup = with_validation(bundle, until_bias=0.5, patience=2, validate_images=100)
    state = State(None, {}, None)
    seen = []
    for i, found in enumerate([0.4, 0.6, 0.5, 0.45, 0.1]):
        state.iteration = i
        best = record_best(setup, state, {"bias": found, "clip_i": 1.0, "kept": 1.0 if i < 4 else 0.0})
        seen.append((best, state.streak, target_reached(setup.recipe, state)))
    assert seen == [
        (True, 1, False),
        (False, 0, False),
        (False, 1, False),
        (False, 2, True),
        (False, 0, False),
    ]
    assert state.best["iteration"] == 0 and state.best["bias"] == 0.4
    assert not target_reached(replace(setup.recipe, until_bias=0.0), State(None, {}, None, streak=99))
    few = replace(setup.recipe, until_bias=0.1, validate_images=4)
    assert limit(setup.recipe, HALVES) == 0.5 and limit(few, HALVES) == noise_floor(2, 4)[0] > 0.3
    uneven = np.array([0.75, 0.25])
    assert limit(few, uneven) == noise_floor(2, 4, target=uneven)[0] != limit(few, HALVES)
    with pytest.raises(UserError, match="until_bias needs validations"):
        Recipe(until_bias=0.1, validate_every=0)


def test_a_run_stops_when_its_target_is_reached_and_leaves_its_best(bundle, tmp_path, monkeypatch, capsys):
    found = iter([0.5, 0.3, 0.35, 0.3])
    measured = []

    def measure(self, model):
        with torch.no_grad():
            measured.append(model.text_encoder(torch.zeros(1, 4, dtype=torch.long)))
        return {"bias": next(found), "clip_i": 0.9, "kept": 0.8}

    monkeypatch.setattr(BiasValidation, "measure", measure)
    setup = with_validation(bundle, iterations=9, until_bias=0.4, patience=3, lr=0.05, validate_images=100)
    files = finetune(setup, tmp_path, {})
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("iterations 1 to 4 took") and "skipped" not in "".join(said)
    assert said[1] == "3 validations in a row were at most until_bias: the run ends here"
    assert said[2] == f"of the validated adapters {files['best']} has the least bias, 0.30 after iteration 2"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["validation"]["bias"] for line in lines] == [0.5, 0.3, 0.35, 0.3]
    again = tmp_path / "two"
    again.mkdir()
    monkeypatch.setattr(
        BiasValidation, "measure", lambda self, model: {"bias": 0.5, "clip_i": 0.9, "kept": 0.8}
    )
    two = finetune(replace(setup, recipe=replace(setup.recipe, iterations=2, lr_end=1.0)), again, {})
    best, of_two = load_file(files["best"]), load_file(two["ema"])
    assert best.keys() == of_two.keys()
    assert all(torch.equal(best[name], of_two[name]) for name in best)
    assert not torch.equal(measured[0], measured[1])
    assert "best" in two and not (again / "grids").exists()


def test_a_resumed_run_goes_on_choosing(bundle, tmp_path, monkeypatch):
    setup = with_validation(bundle, iterations=4, checkpoint_every=2, lr=0.05, keep=2)
    folders = [tmp_path / "whole", tmp_path / "interrupted"]
    for folder in folders:
        folder.mkdir()
    finetune(setup, folders[0], {})
    real = checkpoints.append_metrics

    def stop(folder, metrics):
        if metrics["iteration"] == 3:
            raise KeyboardInterrupt
        real(folder, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "append_metrics", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(setup, folders[1], {})
    finetune(setup, folders[1], {})
    names = ["adapter", "adapter_best", "adapter_raw", "checkpoint-000002", "checkpoint-000004"]
    for name in names:
        first, second = ((folder / f"{name}.safetensors").read_bytes() for folder in folders)
        assert first == second
    assert sorted(p.stem for p in folders[0].glob("*.safetensors")) == names


def test_the_average_stands_in_for_the_raw_adapter_and_goes_again(bundle):
    _, state = new_state(with_validation(bundle))
    before = {name: p.detach().clone() for name, p in state.parameters().items()}
    state.ema = {name: value + 1 for name, value in before.items()}
    with pytest.raises(ZeroDivisionError), averaged(state):
        assert all(torch.equal(p, before[name] + 1) for name, p in state.parameters().items())
        raise ZeroDivisionError
    assert all(torch.equal(p, before[name]) for name, p in state.parameters().items())


def test_grids_of_a_run(bundle, tmp_path, monkeypatch):
    setup = with_validation(bundle, iterations=2, validate_every=0, grid_every=2, lr=0.05)
    finetune(setup, tmp_path, {})
    assert [p.name for p in (tmp_path / "grids").iterdir()] == ["000002.png"]
    assert not (tmp_path / "adapter_best.safetensors").exists()
    model, _ = moved(setup)
    draw_grid(setup, model, tmp_path / "g.png", 7)
    picture = Image.open(tmp_path / "g.png")
    assert picture.text["prompts"] == "\n".join(PROMPTS) and picture.text["iteration"] == "7"
    layout = Layout((SIDE, SIDE + grids.BAR), IMAGES)
    layout = replace(layout, head=picture.height - layout.height(len(PROMPTS)))
    assert picture.width == layout.width and layout.head > 0
    for p, prompt in enumerate(PROMPTS):
        for r, drawer in enumerate((setup.bundle, model)):
            x = fixed_images(drawer, SEED, prompt, range(IMAGES), HOW)
            for n, with_bar in enumerate(marked(setup, x)):
                left, top = layout.image(p, r, n)
                cell = picture.crop((left, top, left + SIDE, top + SIDE + grids.BAR))
                assert cell.tobytes() == with_bar.tobytes()
                assert cell.crop((0, 0, SIDE, SIDE)).tobytes() == enlarged(to_image(x[n])).tobytes()


def test_a_bar_is_a_class_and_its_probability_and_the_face_has_its_box(bundle):
    def detector(x):
        box = DetectedFaces(torch.tensor([[8.0, 8.0, 16.0, 16.0]]), torch.zeros(1, 5, 2))
        return [box if i else DetectedFaces(torch.zeros(0, 4), torch.zeros(0, 5, 2)) for i in range(len(x))]

    setup = with_validation(bundle, "gender,skin_tone")
    setup = replace(setup, bundle=replace(bundle, detector=detector))
    x = torch.full((2, 3, 32, 32), -0.5)
    faceless, face = marked(setup, x)
    assert faceless.size == face.size == (SIDE, SIDE + 2 * grids.BAR)
    grey = to_image(x[0]).getpixel((0, 0))
    assert faceless.getcolors() == [(2 * grids.BAR * SIDE, (255, 255, 255)), (SIDE * SIDE, grey)]
    scale = SIDE // 32
    left = 6 * scale  # a square half as wide again
    assert face.getpixel((left, 12 * scale)) == (255, 255, 255)
    assert face.getpixel((left + 2 * scale, 12 * scale)) == grey
    cut = torch.full((1, 3, 32, 32), -0.5)
    for a, name in enumerate(setup.target.classes):
        p = bundle.classifiers["evaluate"][0](cut)[name].softmax(1)[0]
        row = [face.getpixel((i, SIDE + a * grids.BAR + 3)) for i in range(SIDE)]
        colour = tuple(bytes.fromhex(COLOURS[int(p.argmax())][1:]))
        assert sum(pixel == colour for pixel in row) == pytest.approx(float(p.max()) * SIDE, abs=1.5)


def test_the_newest_checkpoints_are_kept(bundle, tmp_path):
    _, state = new_state(with_validation(bundle))
    for state.iteration in (5, 10, 100):
        checkpoints.save(tmp_path, state, keep=2)
    assert [p.stem for p in checkpoints.saved(tmp_path)] == ["checkpoint-000010", "checkpoint-000100"]


def test_recomputing_and_compiling_change_nothing(bundle, monkeypatch):
    torch._dynamo.reset()
    bundle = load_bundle(bundle.path, dtype=torch.float64)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for component in ("text_encoder", "both"):
        setup = make_setup(bundle, component=component, batch=3, steps=2)
        model, state = moved(setup)
        parameters = list(state.adapter.parameters())
        plain, metrics = iteration_gradient(setup, model, parameters, 0)
        for name in ("recompute", "compile"):
            asked = replace(setup, recipe=replace(setup.recipe, **{name: True}))
            again, other = compiled(asked, model)
            assert (other.unet is again.bundle.unet) == (component == "text_encoder")
            assert other.unet is not model.unet
            if (component, name) == ("text_encoder", "compile"):
                continue  # compiling takes long; `both` has this text encoder
            gradient, found = iteration_gradient(again, other, parameters, 0)
            assert found == {
                k: pytest.approx(v, rel=1e-9) if type(v) is float else v for k, v in metrics.items()
            }
            for a, b in zip(gradient, plain, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * float(b.abs().max()))


def test_what_is_recomputed_keeps_less_of_the_decoder_and_of_the_judges(tmp_path):
    setup = make_setup(load_bundle(write_tiny_bundle(tmp_path, faces=True)), batch=3, steps=2)
    model, _ = moved(setup)
    asked, _ = compiled(replace(setup, recipe=replace(setup.recipe, recompute=True)), model)
    kept = []
    for of in (setup.bundle, asked.bundle):
        frozen = {
            p.untyped_storage().data_ptr() for name in RECOMPUTED for p in getattr(of, name).parameters()
        }
        for run in (
            lambda of, x: of.vae.decode(x[:, [0, 1, 2, 0]]),
            lambda of, x: of.clip.encode_image(x),
            lambda of, x: of.dino(x),
        ):
            saved = {}

            def keep(tensor, saved=saved, frozen=frozen):
                if (place := tensor.untyped_storage().data_ptr()) not in frozen:
                    saved[place] = (tensor.untyped_storage().nbytes(), tensor)
                return tensor

            x = torch.rand(2, 3, 32, 32, requires_grad=True)
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                run(of, x)
            kept.append(sum(size for size, _ in saved.values()))
    assert all(after < 0.7 * before for before, after in zip(kept[:3], kept[3:], strict=True)), kept


def test_tensorboard_has_the_metrics(bundle, tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    setup = with_validation(bundle, iterations=1, tensorboard=True)
    finetune(setup, tmp_path, {})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert written[0] == (tmp_path / "tensorboard", 1) and written[-1] == "closed"
    assert ("loss", line["loss"], 1) in written and (
        "validation/bias",
        line["validation"]["bias"],
        1,
    ) in written
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install"):
        finetune(setup, tmp_path, {})
