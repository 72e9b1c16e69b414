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
import training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_tiny_bundle(tmp_path_factory.mktemp("bundle")))


@pytest.mark.parametrize("scope", ["picture", "iteration"])
def test_the_released_way_gives_the_same_gradient(folder, scope):
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
    product = (
        2 * 2 * 24 * 24 * 8
    )  # one of attention's, of which there are two, and back four and the weights again
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
    biases = {"noise_floor": {"mean": 0.1, "std": 0.08}, "judges": {j: judged for j in results.JUDGES}}
    named = {judge: 0.98 for judge in results.JUDGES}
    return {**biases, "clip_t": {"matched": clip_t, "shuffled": 0.1}, "named": named, "none": 0.04, **kept}


def test_the_tables_of_results():
    after = report(0.5, 0.55, clip_i=0.9, dino=0.8, background=0.7, clothes=0.95)
    run = {"before": {"test": report(0.75), "train": report(0.75)}, "minutes": 12.0}
    lines = results.shown({"gender": {**run, "after": {"test": after, "train": after}}}).splitlines()
    assert "| original | .50 ± .25 | .50 ± .25 | .10 ± .08 | 0.600 | – | – | – | – |" in lines
    row = "| text encoder | .50 ± .25 | .50 ± .25 | .10 ± .08 | 0.550 | 0.900 | 0.800 | 12 | `python train.py --attr gender` |"
    assert row in lines
    biases = ".50 ± .25 / .50 ± .25"
    assert f"| original | {biases} | {biases} | 0.600 | 0.0% | 98.0% / 98.0% | 4.0% |" in lines
    assert f"| seed 0 | {biases} | {biases} | 0.550 | 10.0% | 98.0% / 98.0% | 4.0% |" in lines, (
        ".05 of a gap of .5"
    )
    row = (
        "| .50 ± .25 | .50 ± .25 | 0.550 | 0.900 | 0.800 | 0.700 | 0.950 | `python train.py --attr gender` |"
    )
    assert f"| align + img + face {row}" in lines
    titles = [line for line in lines if line.startswith("#")]
    assert titles == ["### components", "### seeds", "### losses", "### gradients"]


def test_several_attributes_in_the_tables_of_results():
    age = report(0.5)
    for of_one in age["judges"].values():
        of_one["share"] = {"young": 0.75, "old": 0.25}
        of_one["counts"] = {"pilot": [45, 15], "nurse": [0, 0]}
    joint = {**report(0.5), "attributes": {"gender": report(0.5), "age": age}}
    run = {"before": {"test": joint}, "after": {"test": joint}, "minutes": None}
    assert "| … age alone, 25% ± 0% / 25% ± 0% old |" in results.shown({"gender-skin_tone-age": run})
    run = {when: {f"{name}, test": joint for name in results.CONCEPTS} for when in ("before", "after")}
    text = results.shown({"concepts": {**run, "minutes": 1.0}})
    assert "| sports, after | .50 ± .25 / .50 ± .25 | .50 ± .25 / .50 ± .25 |" in text


def test_the_original_is_evaluated_once_for_all_runs_and_the_finetuning_prompts_are_thinned(
    folder, monkeypatch, tmp_path
):
    made = []

    def evaluated(how, model, prompts, part, n, label, named):
        made.append((label, part, len(getattr(prompts, part))))
        return {"label": label}, label

    monkeypatch.setattr(results, "evaluate", evaluated)
    monkeypatch.setattr(results, "likeness", lambda seen, originals: {"like": (seen, originals)})
    monkeypatch.setattr(results, "lines", lambda report: [])
    monkeypatch.setattr(results, "load_adapter", lambda bundle, file: None)
    bundle = measure.bundle_of(folder)
    setup = measure.setup_of(bundle)
    settings = {"prompts": "occupations", "prompt_template": None, "recipe": setup.recipe.to_dict()}
    settings["target"] = {"classes": setup.target.classes, "table": setup.target.table.tolist()}
    (tmp_path / results.SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / results.METRICS).write_text('{"seconds": 30}\n{"seconds": 60}\n', encoding="utf-8")
    evaluator = results.Evaluator(bundle)
    found = [evaluator(name, tmp_path) for name in ("gender", "gender-1", "unet")]
    assert [label for label, *_ in made] == ["original", "gender"] * 2 + ["gender-1"] * 2 + ["unet"]
    bundle_prompts = read_prompts("occupations", None, bundle, ["gender"])[0]
    assert {(part, n) for _, part, n in made} == {
        ("test", len(bundle_prompts.test)),
        ("train", math.ceil(len(bundle_prompts.train) / results.EVERY)),
    }
    assert found[1]["before"] == {"test": {"label": "original"}, "train": {"label": "original"}}
    assert found[1]["after"]["test"] == {"label": "gender-1", "like": ("gender-1", "original")}
    assert found[2]["minutes"] == 1.5 and list(found[2]["after"]) == ["test"]


def test_the_queue_names_every_run_of_a_table():
    assert set().union(*results.TABLES.values()) == set(results.RUNS)
    assert results.wanted(["seeds", "gender"]) == ["gender", "gender-1", "gender-2"]
    assert results.wanted(None) == list(results.RUNS)
