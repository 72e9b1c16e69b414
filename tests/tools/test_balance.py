"""fairref balance: each term's part of a batch's gradient, and how it pulls on the lean that is left."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from scipy.stats import binom
from tiny_bundle import RESOLUTION
from tiny_run import make_setup, moved

from fairref.__main__ import main
from fairref.bundle.loading import load_bundle
from fairref.commands import balance as command
from fairref.diffusion.sampler import noise
from fairref.diffusion.solver import solver_table
from fairref.errors import UserError
from fairref.fairness.attributes import JointTarget
from fairref.fairness.faces import TEMPLATE, DetectedFaces, crops, find
from fairref.files.own_code import OwnFunction
from fairref.generation.adapters import load_adapter, save_adapter
from fairref.generation.rollout import decode, embed, guided, rollout
from fairref.settings import Recipe
from fairref.tools.balance import Batch, Point, leanings, measure, point_of, pulls, report
from fairref.training.loop import update
from fairref.training.own_losses import OwnLoss
from fairref.training.setup import Task
from fairref.training.step import draw_task, iteration_gradient
from fairref.training.terms import ImagePair


def detector(x):
    """A face at a fixed place in two of three images, by their numbers."""
    box, landmarks = torch.tensor([4.0, 6, 25, 29]), torch.tensor(TEMPLATE) / 5 + 4
    face, none = (
        DetectedFaces(box[None], landmarks[None]),
        DetectedFaces(torch.zeros(0, 4), torch.zeros(0, 5, 2)),
    )
    return [face if n % 3 else none for n in range(len(x))]


WEIGHTS = {"lambda_img": 2.0, "lambda_face": 0.5, "lambda_text": 0.3}


def faced(folder, **recipe):
    """A point away from the adapter's start, in float64, with faces and all kinds of terms; and its state."""
    bundle = replace(load_bundle(folder, dtype=torch.float64), detector=detector)
    own = OwnLoss(OwnFunction("bright", Path("own.py"), "", lambda x, *_: x.mean((1, 2, 3))), 0.7)
    setup = make_setup(bundle, batch=6, steps=2, C=0.6, micro_batch=4, **WEIGHTS, **recipe)
    return adapted(replace(setup, own_losses=(own,)))


def adapted(setup):
    model, state = moved(setup)
    return Point(setup, model, list(state.adapter.parameters())), state


@pytest.fixture(scope="module")
def gender(tiny_faces_folder):
    """A point with the exact gradient, its state, and three batches."""
    point, state = faced(tiny_faces_folder, gradient="exact", seed=4)
    return point, state, [measure(point, i) for i in range(3)]


def flat(gradient):
    return torch.cat([part.flatten() for part in gradient])


def whole(point, i, own=True, **recipe):
    """Iteration i's gradient as training finds it, with other numbers of the recipe."""
    setup = replace(point.setup, recipe=replace(point.setup.recipe, **recipe))
    setup = setup if own else replace(setup, own_losses=())
    return flat(iteration_gradient(setup, point.model, point.parameters, i)[0])


def test_the_terms_are_those_of_the_batchs_gradient(gender):
    point, _, (*_, batch) = gender
    assert list(batch.terms) == ["align", "image", "face", "text", "bright"]
    near = {"rtol": 0, "atol": 1e-9 * batch.norm}
    torch.testing.assert_close(sum(batch.terms.values()), whole(point, 2), **near)
    nothing = dict.fromkeys(WEIGHTS, 0.0)
    align = whole(point, 2, own=False, **nothing)
    torch.testing.assert_close(batch.terms["align"], align, **near)
    for name, weight in zip(("image", "face", "text"), WEIGHTS, strict=True):
        alone = whole(point, 2, own=False, **{**nothing, weight: WEIGHTS[weight]}) - align
        torch.testing.assert_close(batch.terms[name], alone, **near)
        assert alone.norm() > 1e-3 * align.norm()


def test_drawn_steps_are_those_of_the_whole_batch(tiny_faces_folder):
    point, _ = faced(tiny_faces_folder, grad_steps=1)
    all_terms = replace(point, setup=replace(point.setup, recipe=replace(point.setup.recipe, grad_steps=0)))
    for i in range(20):
        batch = measure(point, i)
        assert float(sum(batch.terms.values()).norm()) == pytest.approx(batch.norm, rel=1e-9)
        if batch.u:
            break
    for name, u in measure(all_terms, i).u.items():  # the log-odds' gradient is of all terms
        torch.testing.assert_close(batch.u[name], u)
    assert batch.u


def log_odds(point, i, attribute, k):
    """The mean log-odds of class k in iteration i's images where the parameters are now, from its noise on."""
    setup, r = point.setup, point.setup.recipe
    task = draw_task(setup, i)
    z_T = noise(r.seed, i, range(r.batch), (4, RESOLUTION // 4, RESOLUTION // 4)).double()
    model = guided(point.model, embed(point.model, task.prompt), task.guidance)
    x = decode(setup.bundle, rollout(model, solver_table(setup.bundle.schedule, task.S, r.end), z_T)[-1].z)
    if setup.bundle.detector:
        x = crops(x, find(detector, x), RESOLUTION)
    (classifier,) = setup.bundle.classifiers["finetune"]
    p = classifier(x)[attribute].softmax(1)[:, k]
    return float((p / (1 - p)).log().mean())


def check_slopes(point, a, b, attribute):
    """The pulls of batch a's first two terms are how fast batch b's log-odds change along them; and b's, of a's.

    By central differences, over so short a way that no ReLU turns."""
    kept = [p.detach().clone() for p in point.parameters]
    for one, other, row in zip((a, b), (b, a), pulls([a, b], attribute), strict=True):
        for g, pull in list(zip(one.terms.values(), row, strict=False))[:2]:
            said = []
            for h in (1e-6, -1e-6):
                parts = (-h * g / g.norm()).split([p.numel() for p in kept])
                for p, before, part in zip(point.parameters, kept, parts, strict=True):
                    p.data.copy_(before + part.view_as(p))
                with torch.no_grad():
                    said.append(log_odds(point, other.iteration, attribute, other.leans[attribute]))
            slope = (said[0] - said[1]) / 2e-6
            of_pull = pull * float(other.u[attribute].norm() / g.norm())
            assert of_pull == pytest.approx(slope, rel=1e-4, abs=1e-7)
    for p, before in zip(point.parameters, kept, strict=True):
        p.data.copy_(before)


def test_a_pull_is_how_fast_the_log_odds_change_along_the_term(gender):
    point, _, batches = gender
    check_slopes(point, *batches[:2], "gender")


def test_of_more_classes_the_odds_are_against_all_others(tiny_folder):
    bundle = load_bundle(tiny_folder, dtype=torch.float64)
    point, _ = adapted(make_setup(bundle, "skin_tone", batch=3, steps=2, gradient="exact", C=0.4, seed=3))
    check_slopes(point, *(measure(point, i) for i in range(2)), "skin_tone")


def test_the_clipped_sum_is_what_an_update_applies(gender, monkeypatch):
    point, state, batches = gender
    r = point.setup.recipe
    low, middle, _ = sorted(batch.norm for batch in batches)
    recipe, applied = replace(r, clip=(low + middle) / 2), []
    monkeypatch.setattr(
        state.optimizer, "step", lambda: applied.append(flat(p.grad for p in point.parameters))
    )
    for batch in batches:
        gradient, metrics = iteration_gradient(point.setup, point.model, point.parameters, batch.iteration)
        update(recipe, state, gradient)
        M = sum(metrics["counts"])  # images with a face, of which so many are told each class
        told = int((binom.sf(range(M), M, 0.5) >= r.C).sum())
        assert batch.asked == sum(max(0, told - shown) for shown in metrics["counts"])
    assert len({batch.asked for batch in batches}) > 1
    found = report(recipe, point.setup.target.classes, batches)
    pull = found["attributes"]["gender"]["pull"]
    as_applied = [replace(batch, terms={"all": g}) for batch, g in zip(batches, applied, strict=True)]
    assert pull["clipped"]["sum"]["mean"] == pytest.approx(pulls(as_applied, "gender")[:, 0].mean(), rel=1e-9)
    assert found["clipped"] == pytest.approx(2 / 3)


def batch_by_hand(i, align, image, u=None, k=1, asked=1):
    terms = {name: torch.tensor(g) for name, g in (("align", align), ("image", image))}
    task, norm = Task("a", None, False, 2, 1.0), float(sum(terms.values()).norm())
    return Batch(i, task, asked, terms, norm, {"gender": k}, {} if u is None else {"gender": torch.tensor(u)})


def test_a_report_by_hand(caplog):
    """The two that still lean are held against each other's u, the third against both; u's length does not count."""
    batches = [
        batch_by_hand(5, [3.0, 0.0], [0.0, 4.0], u=[7.0, 0.0]),
        batch_by_hand(6, [0.0, 1.0], [-1.0, 0.0], u=[0.0, 7.0], asked=0),
        batch_by_hand(7, [2.0, 2.0], [-1.0, -1.0], asked=3),
    ]
    half = 2**0.5
    rows = np.array([[0, -4, -4], [0, 1, 1], [-2 * half, half, -half]])
    np.testing.assert_allclose(pulls(batches, "gender"), rows, atol=1e-12)
    found = report(Recipe(clip=half), {"gender": ("woman", "man")}, batches)
    of = found["attributes"]["gender"]
    assert (found["neutral"], found["clipped"]) == (3, pytest.approx(1 / 3))
    assert (of["leaned"], of["still_lean"]) == ({"woman": 0, "man": 3}, {"woman": 0, "man": 2})
    scales = np.array([half / 5, 1, 1])[:, None]
    for clip, values in (("unclipped", rows), ("clipped", rows * scales)):
        for name, column in zip(("align", "image", "sum"), values.T, strict=True):
            error = np.sqrt(((column - column.mean()) ** 2).sum() / 2 / 3)
            assert of["pull"][clip][name] == pytest.approx(
                {"mean": column.mean(), "error": error, "batches": 3}
            )
    assert found["norm"]["asked"] == pytest.approx(
        {"mean": (5 + half) / 2, "error": (5 - half) / 2, "batches": 2}
    )
    assert found["norm"]["not_asked"] == {"mean": pytest.approx(half), "error": None, "batches": 1}
    assert found["length"] == pytest.approx({"unclipped": (5 + 2 * half) / 3, "clipped": half})
    assert found["rows"][0]["leaned"] == {"gender": "man"} and found["rows"][2]["still_leans"] == []
    with pytest.raises(UserError, match="no two of 2 batches still lean to one class of gender"):
        pulls(batches[1:], "gender")
    classes = {"gender": ("woman", "man"), "age": ("young", "old")}  # of age no prompt leans
    assert report(Recipe(clip=half), classes, batches)["attributes"] == found["attributes"]
    assert "no two of 3 batches still lean to one class of age" in caplog.text
    with pytest.raises(UserError, match="one class of age"):
        report(Recipe(clip=half), {"age": classes["age"]}, batches)


def test_what_moves_all_prompts_to_one_class_cancels_out():
    """Each batch drives all prompts from its own class, (1, 0), and shrinks the lean, (0, 1), a little.

    A plain mean over the others would lean against the batch's own class, and a pull of (1, 0) would be left.
    """
    batches = [
        batch_by_hand(i, [3.0 * sign, 0.0], [0.0, 0.5], u=[10.0 * sign, 1.0], k=k)
        for i, (k, sign) in enumerate([(0, -1), (1, 1)] * 3)
    ]
    np.testing.assert_allclose(pulls(batches, "gender"), [[0, -0.5, -0.5]] * 6, atol=1e-12)
    alone = batch_by_hand(9, [0.0, 1.0], [0.0, 0.0], u=[0.0, -99.0], k=2)  # says nothing of the others
    np.testing.assert_allclose(pulls([*batches, alone], "gender")[-1], [-1, 0, -1], atol=1e-12)


@pytest.mark.parametrize(
    "o_class, shown, share, expected",
    [
        ([1, 1, 1, 0], [1, 1, 1, 0], 0.5, (1, True)),
        ([1, 1, 1, 0], [1, 1, 0, 0], 0.5, (1, False)),
        ([0, 0, 0, 0], [1, 1, 1, 0], 0.5, (0, False)),
        ([1, 1, 0, 0], [1, 1, 1, 1], 0.5, None),
        ([1, 1, 0, 0], [1, 0, 0, 0], 0.25, (0, True)),  # half women, where a quarter was asked for
        ([1, 1, 0, 0], [-1, -1, 1, 0], 0.25, (0, True)),  # images without a face do not count
    ],
)
def test_what_leans(loaded_tiny, o_class, shown, share, expected):
    setup = make_setup(loaded_tiny)
    target = JointTarget(setup.target.classes, np.array([share, 1 - share]))
    pair = ImagePair(None, None, None, o_class=torch.tensor(o_class)[:, None])
    found = leanings(replace(setup, target=target), pair, {"shown gender": torch.tensor(shown)})
    assert found == ({} if expected is None else {"gender": expected})


@pytest.fixture(scope="module")
def run_folder(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "gender"
    argv = ["--attr", "gender", "--weights", str(tiny_folder), "--evaluate", "none", "--validate-every", "0"]
    more = ["--lr", "0.05", "--grid-every", "0", "--explicit-every", "4", "--out", str(folder)]
    assert main(["train", *argv, *more]) == 0
    return folder


def test_the_command_writes_its_numbers_and_a_figure(run_folder, capsys, monkeypatch):
    monkeypatch.setattr(command, "LEAST", 4)
    capsys.readouterr()
    assert main(["balance", str(run_folder), "--batches", "8"]) == 0
    said = capsys.readouterr().out
    found = json.loads((run_folder / "balance.json").read_text())
    assert [row["iteration"] for row in found["rows"]] == list(range(2, 10))
    assert sum(row["explicit"] for row in found["rows"]) == 2 and found["neutral"] == 6
    assert not any(row["leaned"] for row in found["rows"] if row["explicit"])
    pull = found["attributes"]["gender"]["pull"]
    assert f"{pull['clipped']['sum']['mean']:.3g} ± {pull['clipped']['sum']['error']:.2g}" in said
    for terms in pull.values():
        assert terms["sum"]["mean"] == pytest.approx(terms["align"]["mean"] + terms["image"]["mean"])
    svg = ElementTree.parse(run_folder / "balance.svg").getroot()
    assert svg.tag.endswith("svg") and "gender, clipped" in "".join(svg.itertext())


def test_the_point_is_the_adapters(run_folder, loaded_tiny):
    for name in ("adapter_raw", "adapter"):
        file = run_folder / f"{name}.safetensors"
        point = point_of(make_setup(loaded_tiny), file)
        adapter, prompt = load_adapter(loaded_tiny, file), "a photo of a pilot"
        assert torch.equal(embed(point.model, prompt), embed(adapter, prompt))


def test_what_it_refuses(run_folder, loaded_tiny, tiny_faces_folder, tmp_path, capsys):
    def refused(*argv):
        capsys.readouterr()
        assert main(["balance", *map(str, argv)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "settings.json" in refused(tmp_path)
    assert "19, expected a whole number from 20" in refused(run_folder, "--batches", 19)
    assert "not what the run was made from" in refused(run_folder, "--weights", tiny_faces_folder)
    assert "no such adapter" in refused(run_folder, "--adapter", tmp_path / "none")
    (tmp_path / "open").mkdir()
    shutil.copy(run_folder / "settings.json", tmp_path / "open")
    assert "no such adapter" in refused(tmp_path / "open")
    other = tmp_path / "other.safetensors"
    save_adapter(other, {"prefix": torch.zeros(2, 32)}, {"base": loaded_tiny.fingerprints})
    assert "missing" in refused(run_folder, "--adapter", other)
    save_adapter(other, {"prefix": torch.zeros(2, 32)}, {"base": {}})
    assert "made from another" in refused(run_folder, "--adapter", other)
    with pytest.raises(UserError, match="no --attr"):
        point_of(make_setup(loaded_tiny, None, lambda_text=1.0), other)
