"""What pulled: the rows of a batch's gradient, what is recorded of them, and that recording changes no run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny_bundle import write_tiny_bundle
from tiny_run import make_setup, moved

from fairref.bundle.loading import load_bundle
from fairref.diffusion.gradient import step_weights
from fairref.errors import UserError
from fairref.files.scores import Score, by_pull, line_of, most_and_least, read_scores, score_sheet
from fairref.files.weights import read, read_info, write
from fairref.generation.rollout import embed
from fairref.training import scores
from fairref.training.loop import finetune, new_state
from fairref.training.scores import Recorder, gradient_rows
from fairref.training.step import iteration_gradient, sampling_gradient
from fairref.verification.derivation import gradient_matrix, importance


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return load_bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundle")), dtype=torch.float64)


def watched(setup, model, parameters, i=0):
    """What iteration i shows, and its gradient."""
    seen = []
    gradient, _ = iteration_gradient(setup, model, parameters, i, lambda *parts: seen.append(parts))
    return seen[0], gradient


@pytest.mark.parametrize("component", ["prefix", "text_encoder", "unet", "both"])
@pytest.mark.parametrize("gradient", ["paper", "exact", "random:2", "bernoulli", "drtune:1", "couple:0.5"])
def test_the_rows_sum_to_the_batchs_gradient(bundle, component, gradient):
    setup = make_setup(bundle, component=component, gradient=gradient, batch=3, steps=3, seed=1)
    model, state = moved(setup)
    parameters = list(state.adapter.parameters())
    (task, drawn, _, _, g, mine), whole = watched(setup, model, parameters)
    rows = torch.stack(list(gradient_rows(setup, model, parameters, task, drawn, g)))
    flat = torch.cat([part.flatten() for part in whole])
    assert torch.equal(flat, torch.cat([part.flatten() for part in mine]))
    torch.testing.assert_close(rows.sum(0), flat, rtol=0, atol=1e-10 * float(flat.abs().max()))
    assert (torch.linalg.vector_norm(rows, dim=1) > 0).all()


@pytest.mark.parametrize("grad_steps", [1, 2, 3])
def test_rows_of_drawn_terms_are_each_images_own_and_its_score_is_of_all_terms(bundle, tmp_path, grad_steps):
    setup = make_setup(bundle, batch=3, steps=4, grad_steps=grad_steps, scores=1)
    model, state = moved(setup)
    parameters = list(state.adapter.parameters())
    for i in range(4):
        (task, drawn, _, _, g, mine), _ = watched(setup, model, parameters, i)
        rows = list(gradient_rows(setup, model, parameters, task, drawn, g))
        for n, row in enumerate(rows):
            others = drawn.w.clone()
            others[:, n] = 0
            left = sampling_gradient(
                setup, drawn._replace(w=others), g, embed(model, task.prompt), parameters
            )
            flat = torch.cat([(a - b).flatten() for a, b in zip(mine, left, strict=True)])
            torch.testing.assert_close(row, flat, rtol=0, atol=1e-10 * float(torch.stack(rows).abs().max()))
        whole = replace(setup, recipe=replace(setup.recipe, grad_steps=0))
        said = []
        for of, folder in ((setup, tmp_path / "drawn"), (whole, tmp_path / "whole")):
            watch = Recorder(of, model, folder).watch(parameters, i)
            (tmp_path / folder / "scores").mkdir(parents=True, exist_ok=True)
            iteration_gradient(of, model, parameters, i, watch)
            said.append(read(next((folder / "scores").glob(f"{i:06d}*")))["pull"])
        torch.testing.assert_close(*said)


def test_a_row_is_that_of_the_gradient_matrix(bundle):
    """The matrix of docs/derivation.md gives each image a leaf of its own."""
    setup = make_setup(bundle, batch=3, steps=4)
    model, state = moved(setup)
    parameters = list(state.adapter.parameters())
    (task, drawn, _, _, g, _), _ = watched(setup, model, parameters)
    rows = torch.stack(list(gradient_rows(setup, model, parameters, task, drawn, g)))
    w = step_weights(bundle.schedule, drawn.table)
    text = embed(model, task.prompt)
    matrix = gradient_matrix(drawn.model, drawn.table, w, drawn.path, g, text.split(1), parameters)
    torch.testing.assert_close(rows, matrix, rtol=0, atol=1e-10 * float(matrix.abs().max()))
    torch.testing.assert_close(torch.linalg.vector_norm(rows, dim=1), importance(matrix))


def test_what_a_run_records_and_that_it_changes_nothing(loaded_tiny, tmp_path):
    runs = [tmp_path / "with", tmp_path / "without"]
    for folder, every in zip(runs, (2, 0), strict=True):
        folder.mkdir()
        finetune(make_setup(loaded_tiny, iterations=4, batch=5, validate_every=0, scores=every), folder, {})
    assert (runs[0] / "adapter.safetensors").read_bytes() == (runs[1] / "adapter.safetensors").read_bytes()
    assert not (runs[1] / "scores").exists() and not (runs[1] / "scores.png").exists()
    found = read_scores(runs[0])
    lines = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert [score.iteration for score in found] == [0, 2]
    for score in found:
        line = lines[score.iteration]
        assert score.prompt == line["prompt"] and score.share.sum() == pytest.approx(1)
        assert np.bincount(score.shown["gender"], minlength=2).tolist() == line["counts"]
        assert np.mean(score.target["gender"] >= 0) == pytest.approx(line["confident"])
        assert ((score.target["gender"] >= 0) == (score.confidence["gender"] >= 0.8)).all()
    path = runs[0] / "scores" / "000002.safetensors"
    assert read_info(path)["apart"] < 1e-4  # float32: rounding
    with Image.open(runs[0] / "scores.png") as image:
        assert image.text["scores"].startswith("10 images")
    pulls = [score.pull[n] for score, n in by_pull(found)]
    assert len(pulls) == 10 and pulls == sorted(pulls, reverse=True)


def scored(iteration, pull, explicit=False):
    """A recorded iteration; each image is told 1."""
    N = len(pull)
    columns = ({"gender": np.full(N, value)} for value in (0, 1, 0.86))
    pictures, classes = np.zeros((N, 8, 8, 3), np.uint8), {"gender": ["woman", "man"]}
    return Score(iteration, "a", explicit, np.array(pull), pictures, classes, *columns)


def test_the_pull_is_the_norm_and_not_its_share_of_a_calm_iteration():
    """Images of explicit prompts are in neither list; the least begins with the least."""
    calm, loud, explicit = (
        scored(0, [2e-3, 1e-3]),
        scored(1, [0.5, 0.16, 0.4]),
        scored(2, [9.0], explicit=True),
    )
    blocks = most_and_least(by_pull([calm, loud, explicit]))
    pulls = {what: [float(score.pull[n]) for score, n in of] for what, of in blocks.items()}
    assert pulls == {"Pulled most": [0.5, 0.4, 0.16], "Pulled least": [1e-3, 2e-3]}
    assert line_of(loud, 1) == "0.16: woman > man .86"


def test_each_tile_of_the_sheet_has_its_line(monkeypatch):
    """All in one size."""
    drawn, sizes = [], []

    def text(*args, font, **_):
        drawn.append(args[2])
        sizes.append(font.size)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    score = scored(1, [0.5, 0.16])
    score.target["gender"][0] = -1
    score_sheet(by_pull([score]))
    assert len(set(sizes[1::2])) == 1
    assert drawn == [
        "Pulled most; a full bar: 0.5",
        "0.5: woman",
        "Pulled least; a full bar: 0.5",
        "0.16: woman > man .86",
    ]


def test_a_damaged_file_costs_the_sheet_and_not_the_run(loaded_tiny, tmp_path, caplog):
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "000001.safetensors").write_bytes(b"x" * 100)
    Recorder(make_setup(loaded_tiny), loaded_tiny, tmp_path).write_sheet()
    assert "scores.png is not drawn: " in caplog.text and "000001.safetensors" in caplog.text


def test_a_run_that_records_its_first_iteration_alone_says_so(loaded_tiny, tmp_path, caplog):
    for every, is_said in ((3, False), (4, True)):
        Recorder(make_setup(loaded_tiny, iterations=4, scores=every), loaded_tiny, tmp_path).watch([], 0)
        assert ("--scores 4 records iteration 0 alone" in caplog.text) == is_said


def test_rows_that_do_not_sum_to_the_batch_are_said(loaded_tiny, tmp_path, monkeypatch, caplog):
    real = scores.gradient_rows
    monkeypatch.setattr(scores, "gradient_rows", lambda *args: (1.01 * row for row in real(*args)))
    setup = make_setup(loaded_tiny, batch=2, steps=2, scores=1)
    model, state = new_state(setup)
    parameters = list(state.adapter.parameters())
    iteration_gradient(setup, model, parameters, 0, Recorder(setup, model, tmp_path).watch(parameters, 0))
    assert "iteration 0: the images' gradients miss the batch's by 0.01" in caplog.text


@pytest.mark.parametrize(
    "change", [{"pull": torch.ones(2)}, {"target gender": torch.ones(3, 1)}, {"pictures": None}]
)
def test_a_file_of_another_shape_is_named(loaded_tiny, tmp_path, change):
    setup = make_setup(loaded_tiny, batch=3, steps=2, scores=1)
    model, state = new_state(setup)
    parameters = list(state.adapter.parameters())
    iteration_gradient(setup, model, parameters, 0, Recorder(setup, model, tmp_path).watch(parameters, 0))
    path = tmp_path / "scores" / "000000.safetensors"
    tensors = {name: of for name, of in {**read(path), **change}.items() if of is not None}
    write(path, tensors, read_info(path))
    with pytest.raises(UserError, match=r"000000\.safetensors: is not what --scores writes"):
        read_scores(tmp_path)
