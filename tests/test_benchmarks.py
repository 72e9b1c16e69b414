"""What of the benchmarks needs no quiet machine: both ways give one gradient, and the counts and tables are right."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_bundle import write_tiny_bundle
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fairref.finetune.mixture import read_prompts

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "benchmarks"))

import collectives
import flops
import measure
import results
import sampling
import training
import transport


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_tiny_bundle(tmp_path_factory.mktemp("bundle")))


@pytest.mark.parametrize("scope", ["picture", "iteration", "iteration with all judges"])
def test_the_released_way_gives_the_same_gradient(folder, tmp_path, scope):
    scope, _, judges = scope.partition(" with ")
    folder = str(write_tiny_bundle(tmp_path, faces=True)) if judges else folder
    work = training.Work(folder, 3, 4, scope=scope, micro_batch=2)
    found = {}
    for way in training.WAYS:
        one = replace(work, way=way)
        found[way] = training.gradient_of(*training.prepare(one), one)
    for way in ("ours", "ours, recomputed"):
        assert all(g.abs().max() > 0 for g in found[way])
        assert training.relative(found[way], found["released"]) < 1e-4


def test_the_table_of_ways():
    ways = {
        "ours": {"seconds": 1.234, "time_ratio": 0.61728, "peak_mb": 12.0, "memory_ratio": 0.25},
        "released": {"seconds": 2.0, "time_ratio": 1.0, "peak_mb": 480.0, "memory_ratio": 1.0},
    }
    for way in ways.values():
        way["gradient_difference"] = 2e-6
    comparison = {"work": vars(training.CASES["emoji"]), "ways": ways}
    steps = [{"case": "emoji", "S": [10, 50], "peak_mb": [100.0, 101.0], "ratio": 1.01}]
    text = training.shown([comparison], steps)
    assert "| emoji, N = 24, S = 20, picture | ours | 1.23 | 0.617 | 12 | 0.25 | 2.0e-06 |" in text
    assert "| emoji | 10 | 50 | 100 | 101 | 1.01 |" in text


def test_peak_memory_is_what_was_there_at_once():
    memory = measure.Memory()
    for _ in range(2):
        torch.ones(16 * measure.MEGABYTE)  # 64 MB, freed again
    assert 60 < memory.above() / measure.MEGABYTE < 100


def test_one_process_has_nothing_to_say(folder):
    processes = collectives.Timed()
    rows = collectives.measured(processes, measure.bundle_of(folder), 1)
    assert len(rows) == 1 and rows[0]["collectives"] < collectives.BAR * rows[0]["seconds"]
    assert processes.clock.collectives > 0, "the trainer's calls are the timed ones"


class Small(nn.Module):
    """A convolution, attention and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        h = self.conv(x).flatten(2).transpose(1, 2)[:, None].contiguous()  # (B, 1, HW, 8)
        return self.linear(nn.functional.scaled_dot_product_attention(h, h, h))


def test_flops_are_those_counted_by_hand():
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 6, requires_grad=True)
        cost = flops.counted(Small().requires_grad_(False), lambda net: net(x), x)
    conv, linear = 2 * 2 * 24 * 8 * 3 * 9, 2 * 2 * 24 * 8 * 5
    # one of attention's, of which there are two, and back four and the weights again
    product = 2 * 2 * 24 * 24 * 8
    assert cost.forward == conv + linear + 2 * product
    assert cost.backward == conv + linear + 5 * product
    assert cost.parameters == 8 * 28 + 45


def test_the_cost_page_has_the_scripts_tables():
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    found = flops.report(312, 0.35)
    for part in flops.tables(found).split("\n\n"):
        assert part in page
    unet = found["networks"]["U-Net"]
    assert unet["parameters"] == 859_520_964 and 0.7e12 < unet["forward"] < 0.85e12


def report(women, clip_t=0.6, **kept):
    """As an evaluation has it, for one prompt."""
    judged = {"mean": 0.5, "std": 0.25, "share": {"woman": women, "man": 1 - women}}
    judged["counts"] = {"pilot": [round(60 * women), 60 - round(60 * women)]}
    biases = {
        "noise_floor": {"mean": 0.1, "std": 0.08},
        "judges": {j: judged for j in ("classifier", "templates")},
    }
    named = {judge: 0.98 for judge in ("classifier", "templates")}
    return {**biases, "clip_t": {"matched": clip_t, "shuffled": 0.1}, "named": named, "none": 0.04, **kept}


def table(title, **found):
    """The rows of one table of results, in which runs are not compared with others."""
    names = {title: {name: results.TABLES[title][name] for name in found}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "TABLES", names)
        return results.tables(found).get(title, "").splitlines()


def test_the_tables_of_results():
    after = report(0.5, 0.55, clip_i=0.9, dino=0.8, background=0.7, clothes=0.95)
    run = {"command": "python train.py --attr gender", "minutes": 12.0}
    run["before"] = {"test": report(0.75), "train": report(0.75)}
    run["after"] = {"test": after, "train": after}
    gender, command = "| text encoder | .50 ± .25 | .50 ± .25 | .10 ± .08", "`python train.py --attr gender`"
    assert table("components", gender=run)[2:] == [
        "| original | .50 ± .25 | .50 ± .25 | .10 ± .08 | 0.600 | – | – | – | – |",
        f"{gender} | 0.550 | 0.900 | 0.800 | 12 | {command} |",
    ]
    biases = ".50 ± .25 / .50 ± .25"
    assert table("seeds", gender=run)[2:] == [
        f"| original | {biases} | {biases} | .10 ± .08 | 0.600 | 0.0% | 98.0% / 98.0% | 4.0% | – |",
        # .05 of a gap of .5
        f"| seed 0 | {biases} | {biases} | .10 ± .08 | 0.550 | 10.0% | 98.0% / 98.0% | 4.0% | {command} |",
    ]
    row = f".50 ± .25 | .50 ± .25 | .10 ± .08 | 0.550 | 0.900 | 0.800 | 0.700 | 0.950 | {command} |"
    assert f"| align + img + face | {row}" in table("losses", gender=run)
    other = {**run, "command": results.RUNS["align"].command}
    assert list(results.tables({"gender": run, "align": other})) == ["losses"]
    scaled = {look.key: after for look in results.SCALED}
    run = {**run, "before": {**run["before"], **scaled}, "after": {**run["after"], **scaled}}
    assert (
        table("scales", gender=run)[-1]
        == f"| the bundle's | {' | '.join([biases] * 5)} | .10 ± .08 | {command} |"
    )
    assert not table("seeds", gender={**run, "command": "python train.py --attr gender --lr 1"})


def test_the_tables_in_the_readme_are_those_of_the_committed_evaluations():
    readme = (measure.ROOT / "README.md").read_text(encoding="utf-8")
    made = results.tables(results.found_in(measure.ROOT / "docs" / "results"))
    assert made
    for title, text in made.items():
        assert text in readme, f"{title}: put in what results.py --tables prints"


def test_the_speeds_in_the_readme_are_those_that_were_measured():
    readme = (measure.ROOT / "README.md").read_text(encoding="utf-8")
    files = ("training", "sampling", "choices", "collectives", "transport")
    found = {n: json.loads((measure.ROOT / "docs" / "speed" / f"{n}.json").read_text()) for n in files}
    texts = [
        training.shown(found["training"]["comparisons"], found["training"]["steps"]),
        sampling.shown(found["sampling"]["rows"]),
        sampling.shown_choices(found["choices"]["choices"]),
        collectives.shown(found["collectives"]["ranks"]),
        transport.shown(found["transport"]["rows"]),
    ]
    for text in texts:
        for part in text.split("\n\n"):
            assert part in readme or part.startswith("bars:"), part


def test_several_attributes_in_the_tables_of_results():
    """Where the target is uneven, its bias and its floor are shown; the shares of old are (45 + 6) / 2 of 60."""
    age = report(0.5)
    for of_one in age["judges"].values():
        of_one |= {"share": {"young": 0.6, "old": 0.4}, "from_target": {"mean": 0.2, "std": 0.125}}
        of_one["counts"] = {"pilot": [45, 15], "nurse": [30, 30], "welder": [0, 0]}
    age["target_floor"] = {"mean": 0.09, "std": 0.07}
    joint = {**report(0.5), "attributes": {"gender": report(0.5), "age": age}}
    run = {"before": {"test": joint}, "after": {"test": joint}, "minutes": None}
    run["command"] = results.RUNS["gender-skin_tone-age"].command
    rows = table("attributes", **{"gender-skin_tone-age": run})
    assert "| … gender alone | .50 ± .25 | .50 ± .25 | .10 ± .08 | – | – | – | – | – |" in rows
    assert "| … age alone | .20 ± .12 | .20 ± .12 | .09 ± .07 | – | – | – | – | – |" in rows
    rows = table("old", **{"gender-skin_tone-age": run})[2:]
    half = "38% ± 12% / 38% ± 12%"
    assert rows[0] == f"| all, gender × skin tone × age | {half} | {half} | `{run['command']}` |"
    assert rows[1:3] == ["| pilot | 25% / 25% | 25% / 25% | – |", "| nurse | 50% / 50% | 50% / 50% | – |"]
    reports, command = {look.key: joint for look in results.OF_CONCEPTS}, results.RUNS["concepts"].command
    concepts = {"command": command, "minutes": 1.0, "before": reports, "after": reports}
    row = next(row for row in table("concepts", concepts=concepts) if row.startswith("| sports, after |"))
    assert row.startswith("| sports, after | .50 ± .25 / .50 ± .25 | .20 ± .12 / .20 ± .12 |")
    assert row.endswith(f"`{command}` |")


def test_a_run_of_another_command_is_not_taken(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(results, "call", lambda *command: calls.append(command) or 0)
    assert results.finetune("gender", tmp_path / "gender", "cpu")
    (tmp_path / "gender").mkdir()
    (tmp_path / "gender" / results.SETTINGS).touch()
    assert results.finetune("gender", tmp_path / "gender", "cpu") and calls[-1][1] == "--resume"
    (tmp_path / "gender" / results.FILE).touch()
    assert results.finetune("gender", tmp_path / "gender", "cpu") and len(calls) == 2
    monkeypatch.setitem(
        results.RUNS, "gender", results.Run("text encoder", ("--attr", "gender", "--lr", "1"))
    )
    assert not results.finetune("gender", tmp_path / "gender", "cpu") and len(calls) == 2
    assert "is a run of python train.py --attr gender; move it away" in capsys.readouterr().err


def test_the_original_is_evaluated_once_for_all_runs_and_what_is_there_stays(folder, monkeypatch, tmp_path):
    made, saves = [], []

    def evaluated(how, model, prompts, part, n, label, named):
        made.append((label, part, how.guidance, len(getattr(prompts, part)), named))
        return {"label": label}, label

    monkeypatch.setattr(results, "evaluate", evaluated)
    monkeypatch.setattr(results, "likeness", lambda seen, originals: {"like": (seen, originals)})
    monkeypatch.setattr(results, "lines", lambda report: [])
    monkeypatch.setattr(results, "load_adapter", lambda bundle, file: None)
    bundle = measure.bundle_of(folder)
    setup = measure.setup_of(bundle)
    settings = {"prompts": "occupations", "prompt_template": None, "device": "cpu"}
    settings["recipe"] = setup.recipe.to_dict()
    settings["target"] = {"classes": setup.target.classes, "table": setup.target.table.tolist()}
    (tmp_path / results.SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / results.METRICS).write_text('{"seconds": 30}\n{"seconds": 60}\n', encoding="utf-8")
    evaluator, found = results.Evaluator(bundle), {}
    for name, before, after in (("gender-1", {}, {}), ("gender", {"test": 1}, {"test": 2}), ("unet", {}, {})):
        found[name] = {"command": results.RUNS[name].command, "before": before, "after": after}
    for name, of_one in found.items():
        evaluator(name, tmp_path, of_one, lambda now: saves.append(list(now["after"])))
    labels = [label for label, *_ in made]
    assert labels == ["original", "gender-1"] * 2 + ["gender"] + ["original", "gender"] * 5 + ["unet"]
    prompts = read_prompts("occupations", None, bundle, ["gender"])[0]
    guidance, few = (
        setup.recipe.eval_guidance,
        [math.ceil(n / results.EVERY) for n in map(len, (prompts.test, prompts.train))],
    )
    assert {row[1:] for row in made} == {
        ("test", guidance, len(prompts.test), results.NAMED_IMAGES),
        ("train", guidance, few[1], 0),
        *(("test", scale, few[0], 0) for scale in (1.0, 3.0, 5.0, 7.5, 12.0)),
    }
    assert found["gender-1"]["before"] == {"test": {"label": "original"}, "train": {"label": "original"}}
    assert found["gender-1"]["after"]["test"] == {"label": "gender-1", "like": ("gender-1", "original")}
    assert found["gender"]["after"]["test"] == 2 and not results.RUNS["gender"].missing(found["gender"])
    assert found["unet"]["minutes"] == 1.5 and list(found["unet"]["after"]) == ["test"]
    assert saves[:3] == [["test"], ["test", "train"], ["test", "train"]]


def test_the_queue_names_every_run_of_a_table():
    assert set().union(*results.TABLES.values()) == set(results.RUNS)
    assert results.wanted(["seeds", "gender"]) == ["gender", "gender-1", "gender-2"]
    assert results.wanted(None) == list(results.RUNS)
