"""What of the benchmarks needs no quiet machine: both ways give one gradient, and the counts and tables are right."""

import csv
import itertools
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import baselines
import collectives
import flops
import gradient_runs
import gradient_truth
import guidance_drift
import interval_coverage
import iteration
import leftover
import loudest
import measure
import numpy as np
import prefix_limits
import pytest
import recompute
import result_tables
import results
import sampling
import screen
import swings
import time_to_bias
import torch
import training
import transport
from tiny_bundle import write_tiny_bundle
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from waiting import done

from fairref.baselines import uce
from fairref.bundle.loading import load_bundle
from fairref.evaluation.parts import Evaluated
from fairref.prompts.sets import read_prompts
from fairref.settings import RunOptions
from fairref.training.run import run as run_of_train

ROOT = Path(__file__).resolve().parents[1]


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
    for way in training.WAYS[:-1]:
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


PEAKS = """
import torch, measure
torch.ones(measure.MEGABYTE)  # what a first tensor brings into memory is there
for count in (1, 2):
    memory = measure.Memory()
    for _ in range(2):
        blocks = [torch.ones(16 * measure.MEGABYTE) for _ in range(count)]  # 64 MB each
        del blocks
    print(memory.above() / measure.MEGABYTE)
"""


def test_peak_memory_is_what_was_there_at_once():
    """In a process of its own, where no other test's threads take memory meanwhile."""
    folders = (str(ROOT), str(ROOT / "tests" / "benchmarks"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    one, two = map(float, done([sys.executable, "-c", PEAKS], env=environment).stdout.split())
    assert 60 < one < 100 and 120 < two < 160


def test_one_process_has_nothing_to_say(folder, monkeypatch):
    """By a clock that goes on by a second at each look, which nothing outside the test delays."""
    looks = itertools.count()
    monkeypatch.setattr(collectives.time, "perf_counter", lambda: float(next(looks)))
    processes = collectives.Timed()
    rows = collectives.measured(processes, measure.bundle_of(folder), 1)
    # each call looks three times: before it waits, before it begins, behind it
    calls = rows[0]["collectives"]
    assert len(rows) == 1 and rows[0]["waiting"] == calls and rows[0]["seconds"] == 3 * calls + 1
    assert calls > 0, "the trainer's calls are the timed ones"


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


@pytest.mark.slow
def test_the_cost_page_has_the_scripts_tables():
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    found = flops.report(312, 0.35)
    for part in flops.tables(found).split("\n\n"):
        assert part in page
    small, large = found["one_gpu"]
    assert small["gigabytes"] < 12 and large["gigabytes"] < 24
    page = (ROOT / "docs" / "sd15.md").read_text(encoding="utf-8")
    assert all(row["options"].strip("`") in page for row in found["one_gpu"])
    ways = found["ways"]
    assert ways["stored path, recomputed"]["gigabytes"] < 0.5 * ways["stored path"]["gigabytes"]
    assert ways["stored path, recomputed"]["petaflop"] < 1.25 * ways["stored path"]["petaflop"]
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
    explicit = {judge: 0.98 for judge in ("classifier", "templates")}
    about = {"clip_t": {"matched": clip_t, "shuffled": 0.1}, "explicit": explicit, "none": 0.04}
    return {**biases, **about, **kept}


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
    gender, command = "| text encoder | .50 ± .25 / .50 ± .25 | .10 ± .08", "`python train.py --attr gender`"
    # 45 of 60 women: the squared gap without noise is (60 / 4 - 1) / 59
    wide, none = ".49 [.30, .77]", ".00 [.00, .51]"
    assert table("components", gender=run)[2:] == [
        f"| original | .50 ± .25 / .50 ± .25 | .10 ± .08 | {wide} | 0.600 | – | – | – |",
        f"{gender} | {none} | 0.550 | 0.900 / 0.800 | 12 | {command} |",
    ]
    biases = ".50 ± .25 / .50 ± .25"
    seed = f"{run['command']} --seed 3"
    assert table("seeds", **{"gender-3": {**run, "command": seed}})[2:] == [
        f"| original | {biases} | {biases} | .10 ± .08 | {wide} | 0.600 (0.0%) | 98.0% / 98.0%; 4.0% | – |",
        # .05 of a gap of .5
        f"| text encoder, seed 3 | {biases} | {biases} | .10 ± .08 | {none} | 0.550 (10.0%) | 98.0% / 98.0%; 4.0% "
        f"| `{seed}` |",
    ]
    row = f"{biases} | .10 ± .08 | {none} | 0.550 | 0.900 / 0.800 | 0.700 / 0.950 | {command} |"
    assert f"| L_align + L_img + L_face | {row}" in table("losses", gender=run)
    other = {**run, "command": results.RUNS["align"].command}
    assert list(results.tables({"gender": run, "align": other})) == ["losses"]
    for when, women in (("before", 0.75), ("after", 0.5)):
        run = {**run, when: {**run[when], **{look.key: report(women) for look in results.SCALED}}}
    assert (
        table("scales", gender=run)[-1]
        == f"| the bundle's | {' | '.join([biases] * 5)} | .10 ± .08 | {command} |"
    )
    assert table("drift", gender=run)[2:] == [
        f"| {label} | {' | '.join([f'{share} / {share}'] * 5)} |"
        for label, share in (("original", ".75"), ("the bundle's", ".50"))
    ]
    assert table("summary", gender=run)[2:] == [
        f"| gender | .50 ± .25 | .50 ± .25 | .10 ± .08 | {none} | {command} |"
    ]
    assert not table("summary", gender={**run, "command": "python train.py --attr gender --lr 1"})


def test_a_lean_that_is_halved_has_the_slope_one_half():
    """Counts whose log-odds, with half an image added, are on the line after = before / 2 + log 2."""
    odds = np.array([1 / 9, 1.0, 4.0, 9.0])
    reports = []
    for values in (odds, 2 * np.sqrt(odds)):
        women = 61 * values / (1 + values) - 0.5
        counts = {str(n): [w, 60 - w] for n, w in enumerate(women)}
        reports.append({"test": {"judges": {"classifier": {"counts": counts}}}})
    run = result_tables.Result("gender", "python train.py", *reports, 1.0)
    assert result_tables.lean(run) == pytest.approx((0.5, math.log(2), 1))


def document(name):
    return (ROOT / name).read_text(encoding="utf-8")


def words(name):
    """A document's text, whose line breaks don't count."""
    return " ".join(document(name).split())


def committed():
    """The evaluations in docs/results."""
    return results.found_in(ROOT / "docs" / "results")


def test_the_tables_in_the_documents_are_those_of_the_committed_evaluations():
    made = results.tables(committed())
    assert set(made) == set(results.TABLES)
    for title, text in made.items():
        page = "README.md" if title == "summary" else "docs/results.md"
        assert text in document(page), f"{title}: put what results.py --tables prints into {page}"
    simulated = json.loads((ROOT / "docs" / "results" / "coverage.json").read_text())
    assert simulated["runs"] == 5000
    assert interval_coverage.summary(simulated["rows"]) in document("docs/method.md")


@pytest.mark.parametrize(
    "name",
    [
        "baselines",
        "drift",
        "gradient_runs",
        "gradient_truth",
        "leftover",
        "loudest",
        "prefix_limits",
        "screens",
        "time_to_bias",
    ],
)
def test_the_tables_in_the_documents_are_those_of_long_measurements(name):
    found = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
    if name == "baselines":
        texts = baselines.shown(found).split("\n\n")
    elif name == "gradient_runs":
        figure = gradient_runs.figure(gradient_runs.of_modes(found))
        drawn = list(csv.DictReader((ROOT / "docs" / "figures" / "minutes.csv").read_text().splitlines()))
        assert [{key: str(value) for key, value in row.items()} for row in figure.rows] == drawn
        texts = [gradient_runs.lines_of(gradient_runs.of_modes(found))]
    elif name == "drift":
        texts = [guidance_drift.lines_of(found)]
    elif name == "prefix_limits":
        texts = [prefix_limits.lines_of(found)]
    elif name == "time_to_bias":
        drawn = list(csv.DictReader(document("docs/figures/time_to_bias.csv").splitlines()))
        made = time_to_bias.figure(found).rows
        assert [{key: str(value) for key, value in row.items()} for row in made] == drawn
        texts = [time_to_bias.lines_of(found)]
    elif name == "leftover":
        texts = [leftover.lines_of(found)]
    elif name == "screens":
        texts = screen.tables(found, 100, screen.SHORT).split("\n\n")
        assert screen.by_scale(found, 100) in document("docs/guidance.md"), (
            "put what screen.py --short prints there"
        )
    elif name == "loudest":
        texts = [loudest.lines_of(found["rows"])]
    else:
        texts = [gradient_truth.shown(*point).strip().split("\n\n")[1] for point in found["points"].items()]
    pages = dict.fromkeys(("leftover", "screens", "time_to_bias"), "docs/recipe.md")
    pages |= {"drift": "docs/guidance.md", "prefix_limits": "docs/prefix.md"}
    page = pages.get(name, "docs/results.md")
    for text in texts:
        assert text in document(page), f"put what {name}.py prints into {page}"


def test_no_table_of_a_document_is_wider_than_eight_columns():
    for page in ("README.md", *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))):
        for line in document(page).splitlines():
            assert not line.startswith("|") or line.count("|") <= 9, f"{page}: {line}"


def test_the_numbers_in_the_prose_of_the_results():
    found, page = committed(), words("docs/results.md")
    after = {name: run["after"].get("test") for name, run in found.items()}
    before = {name: run["before"].get("test") for name, run in found.items()}
    fit = result_tables.lean(result_tables.Result("prefix", **found["prefix"]))
    slope, intercept, r = (f"{value:.2f}".removeprefix("0") for value in fit)
    assert f"log-odds after = {slope} × log-odds before + {intercept}, with r = {r}" in page
    assert f"shrinks by {1 - fit[0]:.0%}".replace("%", " %") in page
    shares = [
        result_tables.first_shares(found["gender"]["after"][look.key], "classifier")
        for look in results.SCALED
    ]
    assert (np.diff(shares, axis=0) >= 0).all() and (shares[-1] > shares[0]).all()
    assert "In every occupation, in those of men too, it rises and nowhere falls" in page
    assert f"CLIP-T falls to {after['align']['clip_t']['matched']:.2f}".replace("0.", ".") in page
    runs = ("gender-skin_tone", "gender-skin_tone-age")
    for text, reports, what in (
        ("{} % before and {} % after gender × skin tone", (before, after), 0),
        ("{} % before and {} % after the run with age", (before, after), 1),
    ):
        for number in (
            lambda report: report["explicit"]["templates"],
            lambda report: report["none"],
        ):
            assert text.format(*(f"{100 * number(of[runs[what]]):.0f}" for of in reports)) in page
    means = [
        f"{np.mean([after[f'{name}-{seed}']['judges'][judge]['mean'] for seed in results.SEEDS]):.3f}"[1:]
        for name in ("gender", "both")
        for judge in result_tables.JUDGES
    ]
    of_text, of_both = (
        "The mean of the text encoder's three is {} by the classifier and {} by templates",
        "Of both components it is {} and {}.",
    )
    assert of_text.format(*means[:2]) in page and of_both.format(*means[2:]) in page


def test_how_often_batches_of_more_classes_ask_anybody_in_the_prose():
    page = words("docs/results.md")
    found = json.loads((ROOT / "docs" / "results" / "screens.json").read_text())
    reach, joint, soft = (
        found[f"quick, {name}-100-0"]
        for name in ("skin_tone, reach", "gender,skin_tone, reach", "skin_tone, soft")
    )
    for row, text in (
        (reach, "somebody in {} % of"),
        (joint, "in {} % of one for gender"),
        (soft, "asks in {} % of"),
    ):
        assert text.format(f"{100 * row['asked']:.0f}") in page
    ends = [" / ".join(f"{v:.2f}".removeprefix("0") for v in row["bias"]) for row in (soft, reach)]
    assert "ends at {} on validation occupations where the threshold ends at {}".format(*ends) in page
    assert f"{soft['blended']:.2f} {reach['blended']:.2f}" == "0.10 0.10" and "as blended (10 %)" in page
    assert f"CLIP-I of {soft['CLIP-I']:.2f} in place of {reach['CLIP-I']:.2f}".replace("0.", ".") in page


def test_the_leans_that_are_left():
    """The range over the seeds and both parts of the share of the gender that an occupation had more of."""
    found, page = committed(), words("docs/results.md")
    for judge in result_tables.JUDGES:
        left = {"women": [], "men": []}
        for name in results.TABLES["seeds"]:
            for part in ("test", "train"):
                old, new = (
                    result_tables.first_shares(found[name][when][part], judge) for when in ("before", "after")
                )
                left["women"].append(new[old > 0.5].mean())
                left["men"].append(1 - new[old < 0.5].mean())
        of_women, of_men = (f"{100 * min(v):.0f} to {100 * max(v):.0f} %" for v in left.values())
        assert f"{of_women} women" in page and f"{of_men} men" in page


def test_the_speeds_in_the_document_are_those_that_were_measured():
    page = document("docs/speed.md")
    files = ("training", "iteration", "recompute", "sampling", "choices", "collectives", "transport")
    found = {n: json.loads((measure.ROOT / "docs" / "speed" / f"{n}.json").read_text()) for n in files}
    texts = [
        training.shown(found["training"]["comparisons"], found["training"]["steps"]),
        iteration.shown(found["iteration"]["ways"]),
        recompute.shown(found["recompute"]["ways"]),
        sampling.shown(found["sampling"]["rows"]),
        sampling.shown_choices(found["choices"]["choices"]),
        collectives.shown(found["collectives"]["ranks"]),
        transport.shown(found["transport"]["rows"]),
    ]
    for text in texts:
        for part in text.split("\n\n"):
            assert part in page or part.startswith("bars:"), part


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
    rows, label = (
        table("attributes", **{"gender-skin_tone-age": run}),
        "gender × skin tone × age",
    )
    alone, dashes = f"| {label}, after: {{}} alone |", "| – | – | – | – |"
    assert f"{alone.format('gender')} .50 ± .25 / .50 ± .25 | .10 ± .08 | .00 [.00, .51] {dashes}" in rows
    assert f"{alone.format('age')} .20 ± .12 / .20 ± .12 | .09 ± .07 | – {dashes}" in rows
    rows = table("old", **{"gender-skin_tone-age": run})[2:]
    half = "38% ± 12% / 38% ± 12%"
    assert rows[0] == f"| all, {label} | {half} | {half} | `{run['command']}` |"
    assert rows[1:3] == ["| pilot | 25% / 25% | 25% / 25% | – |", "| nurse | 50% / 50% | 50% / 50% | – |"]
    reports, command = {look.key: joint for look in results.OF_CONCEPTS}, results.RUNS["concepts"].command
    concepts = {"command": command, "minutes": 1.0, "before": reports, "after": reports}
    row = next(row for row in table("concepts", concepts=concepts) if row.startswith("| sports, after |"))
    assert row.startswith("| sports, after | .50 ± .25 / .50 ± .25 | .20 ± .12 / .20 ± .12 |")
    assert row.endswith("| .10 ± .08; .09 ± .07; .10 ± .08 | 0.600 | – |")


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


def test_the_runs_of_another_bundle_are_those_of_its_attributes(monkeypatch):
    for name in ("RUNS", "TABLES"):
        monkeypatch.setattr(results, name, dict(getattr(results, name)))
    results.turn_to("weights/sd15", ["gender", "race"])
    assert results.RUNS["race"].command == "python train.py --attr race --weights weights/sd15"
    assert results.RUNS["gender-race"].command.startswith("python train.py --attr gender,race --weights")
    assert "gender-skin_tone-age" not in results.RUNS and "old" not in results.TABLES
    assert list(results.TABLES["summary"]) == ["gender", "race", "gender-race"]
    results.turn_to("weights/other", ["gender"])
    assert {run.options[1] for run in results.RUNS.values()} == {"gender"}


def test_the_picture_of_a_finished_run_is_drawn_again(folder, tmp_path):
    """From its evaluation, or from the report on the run; the images are not evaluated anew."""
    run, reports = tmp_path / "gender", tmp_path / "reports"
    options = RunOptions("gender", out=str(run), weights=folder)
    run_of_train(options, {"lr": 0.05, "iterations": 1})
    bundle, again = measure.bundle_of(folder), tmp_path / "again.png"
    results.draw_picture(run, reports, bundle, again)
    assert again.read_bytes() == (run / "before_after.png").read_bytes()
    reports.mkdir()
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    for part in found.values():
        part["test"]["judges"]["classifier"]["counts"]["singer"] = [2, 1]
    (run / "evaluation.json").unlink()
    report = {"command": "", "before": found["before"], "after": found["after (ema)"], "minutes": 1}
    (reports / "gender.json").write_text(json.dumps(report), encoding="utf-8")
    results.draw_picture(run, reports, bundle, again)
    assert again.read_bytes() != (run / "before_after.png").read_bytes()
    (reports / "gender.json").unlink()
    with pytest.raises(SystemExit, match="evaluate the run first"):
        results.draw_picture(run, reports, bundle, again)


def test_what_is_there_of_an_evaluation_stays_and_what_is_judged_is_kept_for_all_runs(
    folder, monkeypatch, tmp_path
):
    made, saves = [], []

    def compared(how, models, part):
        explicit = part.explicit_images
        made.append((part.part, how.drawing.guidance, len(part.prompts), part.images, explicit, how.kept))
        return [
            (label, Evaluated({"label": label, "sure": {"prompts": {}}, "prompts": 3}, []))
            for label in models
        ]

    monkeypatch.setattr(results, "compare", compared)
    monkeypatch.setattr(results, "lines", lambda report: [])
    monkeypatch.setattr(results, "load_adapter", lambda bundle, file: None)
    bundle = measure.bundle_of(folder)
    setup = measure.setup_of(bundle)
    settings = {"prompts": "occupations", "prompt_template": None, "device": "cpu"}
    settings["recipe"] = setup.recipe.to_dict()
    settings["target"] = {"classes": setup.target.classes, "table": setup.target.table.tolist()}
    (tmp_path / results.SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / results.METRICS).write_text('{"seconds": 30}\n{"seconds": 60}\n', encoding="utf-8")
    found = {}
    for name, before, after in (("gender-3", {}, {}), ("gender", {"test": 1}, {"test": 2}), ("unet", {}, {})):
        found[name] = {"command": results.RUNS[name].command, "before": before, "after": after}
    for name, of_one in found.items():
        results.evaluate_run(bundle, name, tmp_path, of_one, lambda now: saves.append(list(now["after"])))
    assert [part for part, *_ in made] == ["test", "train", "train", *["test"] * 6]
    prompts = read_prompts("occupations", None, bundle.path, ["gender"])[0]
    guidance, few = (
        setup.recipe.eval_guidance,
        [math.ceil(n / results.EVERY) for n in map(len, (prompts.test, prompts.train))],
    )
    kept = (results.IMAGES, 0, tmp_path.parent / "judged")
    assert set(made) == {
        ("test", guidance, len(prompts.test), results.IMAGES, results.EXPLICIT_IMAGES, kept[-1]),
        ("train", guidance, few[1], *kept),
        *(("test", scale, few[0], *kept) for scale in (1.0, 3.0, 5.0, 7.5, 12.0)),
    }
    assert found["gender-3"]["before"] == {
        part: {"label": "before", "sure": {}, "prompts": 3} for part in ("test", "train")
    }
    assert found["gender"]["after"]["test"] == 2 and not results.RUNS["gender"].missing(found["gender"])
    assert found["unet"]["minutes"] == 1.5 and list(found["unet"]["after"]) == ["test"]
    assert saves[:3] == [["test"], ["test", "train"], ["test", "train"]]


def test_the_queue_names_every_run_of_a_table():
    assert set().union(*results.TABLES.values()) == set(results.RUNS)
    assert results.wanted(["concepts", "gradients", "none"]) == ["concepts", "gender", "solver", "none"]
    assert results.wanted(None) == list(results.RUNS)


def test_how_few_images_hold_most_of_a_batchs_gradient():
    of = loudest.of_batch(np.array([1.0, 64.0, 2.0, 33.0]), np.array([False, True, False, True]))
    assert of == {"asked": 2, "largest": 0.64, "images": 2, "length": 10.0}
    assert loudest.of_batch(np.ones(3), np.zeros(3, bool))["images"] == 3
    rows = [of, of | {"largest": 0.5}, of | {"asked": 0}]
    assert "| 1 to 3 | 2 | 10 | 0.57 | 2 |" in loudest.lines_of(rows)


def test_a_runs_own_batches_tell_a_lean_from_a_swing_of_all():
    place = {"nurse": 0, "pilot": 1}
    rows = [
        {"prompt": prompt, "counts": counts, "image": 0.5, "bias": 0.1}
        for prompt, counts in (("nurse", [20, 4]), ("pilot", [4, 20]), ("nurse", [20, 4]), ("pilot", [20, 4]))
    ]
    rows.append({"prompt": "a woman pilot", "counts": [24, 0], "image": 0.0})  # explicit
    odds = np.log(20.5 / 4.5)
    first, second, _ = swings.windows(rows, place, 2)
    assert first == pytest.approx({"iteration": 0, "lean": odds, "common": 0.0, "image": 0.5})
    assert second == pytest.approx({"iteration": 2, "lean": 0.0, "common": odds, "image": 0.5})


def test_what_remains_beside_the_line_is_parted_by_who_shares_it():
    """Simulated parts of known variances; and a line leaves nothing."""
    draw, P = np.random.default_rng(0), 40_000
    known = dict(zip(leftover.SHARED, (0.04, 0.02, 0.05, 0.07), strict=True))
    shapes = ((1, 1, P), (3, 1, P), (1, 2, P), (3, 2, P))
    left = sum(np.sqrt(v) * draw.normal(size=shape) for v, shape in zip(known.values(), shapes, strict=True))
    assert leftover.parted(left) == pytest.approx(known, abs=2e-3)
    before = draw.normal(size=12)
    np.testing.assert_allclose(leftover.leftover(before, 0.2 * before - 1), 0, atol=1e-12)
    assert leftover.lines_of({"variance": known}).splitlines()[2:4] == [
        "| the prompt's own | 0.040 | 22% |",
        "| the run's | 0.020 | 11% |",
    ]


def test_moments_of_gradients_are_free_of_their_noise():
    """Against all pairs of different batches, one by one."""
    g = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    found = gradient_truth.load(Path("nowhere"), ("exact",), 4)["exact"]
    for gradient in g:
        found.add(gradient, 1.0)
    pairs = [(a, b) for a, b in itertools.permutations(range(6), 2)]
    assert found.square_of_mean() == pytest.approx(np.mean([float(g[a] @ g[b]) for a, b in pairs]))
    assert found.agreement() == pytest.approx(np.mean([gradient_truth.cosine(g[a], g[b]) for a, b in pairs]))
    assert found.variance() == pytest.approx(float(g.var(0).sum()))
    torch.testing.assert_close(found.halves, torch.stack([g[::2].sum(0), g[1::2].sum(0)]))
    # two pairs, of means 2 and 4
    assert gradient_truth.error_of_mean(np.array([1.0, 3.0, 4.0, 4.0, 99.0])) == pytest.approx(1.0)


def test_the_true_gradient_is_that_of_the_loss_and_the_study_goes_on_where_it_was(
    folder, tmp_path, monkeypatch
):
    modes = ("drtune:1",)
    counts = {"batches": 2, "compared": 2, "tested": 4, "confirmed": 1, "images": 3, "steps": 3}
    few = [f"--{name}={count}" for name, count in counts.items()]
    argv = ["start", "--weights", folder, "--out", str(tmp_path), "--modes", *modes]
    monkeypatch.setattr(gradient_truth.torch, "set_num_threads", lambda n: None)
    gradient_truth.main([*argv, *few, "--report", str(tmp_path / "report.json"), "--figure", str(tmp_path)])
    found = json.loads((tmp_path / "report.json").read_text())["points"]["start"]
    assert [row["direction"] for row in found["confirm"]] == [
        "the truth",
        *(f"random {n}" for n in range(1, 6)),
    ]
    for row in found["confirm"]:
        assert row["difference"] == pytest.approx(row["exact"], rel=1e-5, abs=1e-9) and row["exact"] != 0
    assert list(found["modes"]) == ["exact", *modes]
    assert found["modes"]["exact"]["cosine_with_exact"] == pytest.approx(1)
    assert all(abs(found["modes"][mode]["cosine_with_exact"]) < 0.9999 for mode in modes)

    (exact, other) = csv.DictReader((tmp_path / "gradient_truth.csv").read_text().splitlines())
    assert (exact["mode"], other["mode"], exact["cosine_with_exact"]) == ("exact", "drtune:1", "1.0")
    assert "drtune:1, start" in (tmp_path / "gradient_truth.svg").read_text()

    monkeypatch.setattr(gradient_truth, "batch_of", None)  # nothing is done twice
    gradient_truth.main([*argv, *few, "--report", str(tmp_path / "again.json")])
    again = json.loads((tmp_path / "again.json").read_text())["points"]["start"]
    assert again["confirm"] == found["confirm"]
    for mode, row in found["modes"].items():
        numbers = {key: value for key, value in row.items() if value is not None}
        assert {key: again["modes"][mode][key] for key in numbers} == pytest.approx(numbers, rel=1e-9)


def test_baselines_are_chosen_on_validation_prompts_and_measured_once(folder, tmp_path, monkeypatch):
    for key, value in (("IMAGES", 1), ("ROUNDS", 1)):
        monkeypatch.setattr(uce, key, value)
    monkeypatch.setattr(baselines, "NUMBERS", {"projection": (0, 500), "uce": (0.5,)})
    found = {"chosen": {}, "validation": {}, "minutes": {}, "reports": {}}
    bench = baselines.Bench(load_bundle(folder), tmp_path, 1, found, lambda: None)
    baselines.run(bench, {})
    assert list(found["validation"]) == ["original", "projection:0", "projection:500", "uce:0.5"]
    assert found["validation"]["projection:0"]["prompts"] == 1 and found["reports"]["coin"]["prompts"] == 2
    assert found["validation"]["projection:0"]["clip_i"] == pytest.approx(1)
    names = ["original", "coin", found["chosen"]["projection"], "uce:0.5", "fair_pca"]
    assert list(found["reports"]) == names and all(
        "explicit" in report for report in found["reports"].values()
    )
    text = baselines.shown(found)
    assert text.count("| coin |") == 1 and "| original | 1.00 ± .00 / – |" in text
    told = {"mean_gap": {"value": 0.123}}
    report = found["reports"]["coin"]
    report["judges"]["classifier"]["corrected"] = told
    assert baselines.row("coin", report, 1.26)[2:4] == [
        ".12",
        f"{report['flips']['classifier']['needless']:.1%}",
    ]
    assert baselines.row("coin", report, 1.26)[-1] == "1.3"
    monkeypatch.setattr(baselines.Bench, "measure", None)  # all of it is there
    baselines.run(bench, {})


def test_the_best_number_keeps_people_and_the_prompt_in_its_pictures():
    def report(bias, none, clip_t=0.66):
        return {"judges": {"classifier": {"mean": bias}}, "none": none, "clip_t": {"matched": clip_t}}

    reports = {"a": report(0.5, 0.02), "b": report(0.1, 0.5), "c": report(0.3, 0.06, 0.63)}
    reports["d"] = report(0.2, 0.02, 0.62)
    assert baselines.best(reports, report(0.8, 0.02)) == "c"
    assert baselines.best({"b": reports["b"]}, report(0.8, 0.02)) == "b"


def test_bias_by_minutes_is_of_whole_runs(tmp_path, monkeypatch):
    """Two seeds of `exact` and one of `last:1`."""
    monkeypatch.setattr(gradient_runs, "EVERY", 2)
    monkeypatch.setattr(gradient_runs, "ITERATIONS", 4)
    whole = {"exact-0": (0.8, 0.4), "exact-1": (0.6, 0.5), "last:1-0": (0.9, 0.7)}
    for name, biases in whole.items():
        run = gradient_runs.place(tmp_path, name)
        run.mkdir()
        lines = [
            {"iteration": i, "norm": 0.03 - 0.02 * i}
            | ({"validation": {"bias": b, "clip_i": 1 - b / 10}} if i % 2 else {})
            for b in biases
            for i in (0, 1)
        ]
        (run / "settings.json").write_text('{"recipe": {"clip": 0.02}}')
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    runs = {name: gradient_runs.of_run(tmp_path / name.replace(":", "_")) for name in whole}
    modes = gradient_runs.of_modes({"seconds": {"exact": 30.0, "last:1": 6.0}, "runs": runs})
    figure = gradient_runs.figure(modes)
    assert [(row["curve"], row["minutes"], row["mean"], row["low"], row["high"]) for row in figure.rows] == [
        ("exact (2 seeds)", 1.0, 0.7, 0.6, 0.8),
        ("exact (2 seeds)", 2.0, 0.45, 0.4, 0.5),
        ("last:1", 0.2, 0.9, 0.9, 0.9),
        ("last:1", 0.4, 0.7, 0.7, 0.7),
    ]
    lines = gradient_runs.lines_of(modes)
    assert "| `exact` | 30 | 50% | .80 .60 | .92 .94 | .40 .50 | .96 .95 |" in lines


def test_what_was_measured_of_other_cases_stays():
    def rows(**seconds):
        return [{"work": {"case": case}, "seconds": n} for case, n in seconds.items()]

    steps = [{"case": "emoji", "S": 10}]
    before = {"comparisons": rows(emoji=1, sd15=2), "steps": steps}
    found = training.joined(before, {"comparisons": rows(sd15=3), "steps": []})
    assert found == {"comparisons": rows(emoji=1, sd15=3), "steps": steps}
