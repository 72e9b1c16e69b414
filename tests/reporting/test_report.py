"""The report: it says what the files say, of each number by whom; hostile files give a sentence and never markup."""

import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import report_runs
from report_runs import AFTER, evaluation_of, finish, write, write_pictures, write_run

from fairref.commands import cli, report, train
from fairref.errors import UserError
from fairref.evaluation import certainty
from fairref.fairness.attributes import parse_target
from fairref.files.weights import fingerprint
from fairref.files.weights import read as read_tensors
from fairref.reporting import commands, course, pictures, pulled, shares, sweeps
from fairref.reporting import report as report_page
from fairref.reporting.evaluated import parts, wilson
from fairref.reporting.report import write_report
from fairref.reporting.run_files import read_run
from fairref.reporting.tables import likeness, number

VOID = {"meta", "link", "img", "br", "input", "rect", "circle", "path", "line", "image"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;\u202e\x00{{7*7}}"
SECTIONS = (
    "made",
    "pictures",
    "bias",
    "prompts",
    "kept",
    "explicit",
    "course",
    "pulled",
    "guidance",
    "strength",
    "baselines",
)


class Reader(HTMLParser):
    """What a page is made of."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.tables, self.paragraphs = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), [name for name, _ in self.open]))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag == "p":
            self.paragraphs.append((dict(attributes), ""))
        if tag not in VOID:
            self.open.append((tag, attributes))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), [name for name, _ in self.open]))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data):
        if any(tag in ("th", "td") for tag, _ in self.open):
            self.tables[-1][-1][-1] += data

        if any(tag == "p" for tag, _ in self.open):
            attributes, text = self.paragraphs[-1]
            self.paragraphs[-1] = (attributes, text + data)

    def all(self, tag):
        """The attributes of every element of a kind."""
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def row(self, head, first):
        """The cells of the first row with this heading in a table whose columns begin with `head`."""
        return next(row for table in self.tables for row in table if table[0][0] == head and row[0] == first)


def page_of(*folders):
    """A page's text, and what it is made of."""
    out = Path(folders[0]).parent / "page.html"
    write_report(folders, out)
    text = out.read_text(encoding="utf-8")
    return text, Reader(text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        "gender": write_run(folder / "gender", parts=("test",)),
        "small": write_run(folder / "small", prompts=3),
        "unet": write_run(folder / "unet", "unet.json", "unet", new=False, prompts=3),
        "concepts": write_run(folder / "concepts", "concepts.json", new=False, prompts=3),
    }


@pytest.fixture(scope="module")
def page(runs):
    return page_of(runs["gender"])


def test_it_says_what_the_files_say(page):
    text, read = page
    # the numbers of docs/results.md for this very run
    assert read.row("judge, model", "classifier, before")[1:5] == [
        ".83\u00a0±\u00a0.17 [.77,\u00a0.87]",
        ".10\u00a0±\u00a0.08",
        ".84\u00a0[.82,\u00a0.86]",
        ".89\u00a0[.84,\u00a0.95]",
    ]
    assert read.row("judge, model", f"templates, {AFTER}")[1].startswith(".23\u00a0±\u00a0.18")
    assert read.row("judge, model", "classifier, before")[6] == ".86; .94"
    more = read.row("judge, model", f"apparent gender, classifier, {AFTER}")
    assert (
        more[1].startswith("11 of 50: information clerk (< .001), ")
        and "art therapist (< .001), …" in more[1]
    )
    assert "information clerk: .60 (a fair model: .3" in more[2] and more[6].startswith(".24\u00a0[.1")
    for how in ("permutation test", "corrected rms gap: score interval", "corrected bias: delta method"):
        assert how in text
    assert read.row("judge, prompts, file", "classifier, unseen occupations, evaluation.json") == [
        "classifier, unseen occupations, evaluation.json",
        "400",
        "98.8%",
        "99.5%",
    ]
    assert read.row("prompt", "nurse")[1:3] == [
        "93%\u00a0[84%,\u00a097%], n = 60",
        "67%\u00a0[54%,\u00a077%], n = 60",
    ]
    assert read.row(
        "measure", "CLIP-I: likeness to the original's picture of the same noise; 1 is the same picture"
    )[1:] == ["–", ".936"]
    assert read.row("guidance", "3")[0] == "3" and read.row("way", "coin")[3] == "3.0%\u00a0/ –"
    first = read.row("judge, model: where the class is known from", "classifier, before: labelled pictures")
    assert first[1:] == ["woman", "97.0%", "1.0%", "100", ".040"]
    assert read.row("class", "woman")[2].startswith("50.2%; corrected 50.2%\u00a0[4")
    assert "apparent gender" in text and "50 prompts × 60 images" in text
    for section in SECTIONS:
        assert f'id="run1-{section}"' in text
    assert "missing" not in {a.get("class") for a in read.all("p")}


def test_it_stands_alone_and_can_be_read_by_all(page):
    text, read = page
    assert len(text.encode()) < 1_000_000
    names = {name for name, *_ in read.elements}
    assert not names & {"script", "iframe", "object", "embed", "form", "base"}
    for name, attributes, _ in read.elements:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("href", "src") and name != "a":
                assert value.startswith("data:"), (name, value)
    ids = [a["id"] for _, a, _ in read.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in read.all("a")} <= {f"#{one}" for one in ids}
    (policy,) = [a["content"] for a in read.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    assert read.all("html")[0]["lang"] == "en" and len(read.all("h1")) == len(read.all("main")) == 1
    levels = [int(name[1]) for name, *_ in read.elements if re.fullmatch("h[1-6]", name)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(a.get("scope") for a in read.all("th"))
    assert len(read.all("caption")) == len(read.all("table"))
    charts = [inside for name, a, inside in read.elements if name == "svg" and a.get("class") == "chart"]
    figures = [a for a in read.all("figure") if a.get("class") == "chart-box"]
    assert charts and len(charts) == 2 * len(figures) and all("figure" in inside for inside in charts)
    assert all(a.get("role") == "img" for a in read.all("svg"))
    described = [a["aria-label"] for a in read.all("svg") if a.get("class") != "chart"]
    assert "before: no face found" in described and f"{AFTER}: man with probability .97" in described


def test_several_runs_stand_side_by_side(runs):
    text, read = page_of(runs["small"], runs["unet"], runs["concepts"])
    assert "Table 1. What is trained" in text and "Table 2. Several concepts" in text
    assert read.row("run", "unet")[1] == "the U-Net" and read.row("run", "unet")[4].startswith(
        ".24\u00a0±\u00a0.18"
    )
    row = read.row("prompts, model, n", f"unseen sports, {AFTER}, 10 prompts × 60 images")
    assert [cell[:3] for cell in row[1:4]] == [".07", ".28", ".10"]  # joint, gender, skin tone
    assert row[-3:] == [".497", ".845", ".959"]  # CLIP-T, CLIP-I, DINO of docs/results.md
    assert "This evaluation has no intervals" in text  # of the older evaluations


def test_of_unequal_shares_the_distance_from_them_counts(tmp_path):
    """As the paper's run for age: 25 % old, whose share is what the chart shows."""
    text, read = page_of(write_run(tmp_path / "age", "gender-skin_tone-age.json", new=False, prompts=3))
    tables = {table[1][2]: table for table in read.tables if table[0][0] == "judge, model"}  # by their floor
    assert tables[".09\u00a0±\u00a0.07"][2][:3] == [
        f"classifier, {AFTER}",
        ".10\u00a0±\u00a0.08",
        ".09\u00a0±\u00a0.07",
    ]
    assert "Apparent age: distance from the target" in text and "Apparent gender: bias" in text
    assert "Share of “old” (apparent age)" in text and "target 25%" in text and "Share of “young”" not in text
    assert read.row("class", "old")[1] == "25.0%" and read.row("class", "woman, dark, old")[1] == "3.1%"
    assert "age: 75.0% young, 25.0% old" in text


def missing(read):
    """What the sections say whose file is missing."""
    return [text for attributes, text in read.paragraphs if attributes.get("class") == "missing"]


def settings_of(tmp_path, attributes=("gender",), ended=True, recipe=(), **changed):
    """A run's folder with settings.json alone, and an adapter where it has ended."""
    settings = report_runs.settings(list(attributes)) | changed
    settings["recipe"] |= dict(recipe)
    write(tmp_path / "settings.json", settings)
    if ended:
        finish(tmp_path)
    return tmp_path


NUMBERS = "--num-images 60 --steps 12 --guidance 2.5"


@pytest.mark.parametrize(
    "attributes, changed, evaluate, more",
    [
        (["gender"], {}, "", {"baselines": " --baseline coin --baseline projection"}),
        (["age"], {"weights": "/some/sd15"}, "--weights sd15 --attr age --target age=0.75,0.25", {}),
        (["gender", "age"], {}, "--attr gender,age --target age=0.75,0.25", {}),
        (
            ["gender"],
            {"prompts": "sports"},
            "--prompts sports",
            {"baselines": f"{NUMBERS} --baseline projection"},
        ),
        (
            ["gender"],
            {"prompts": "sports,occupations"},
            "--prompts sports,occupations",
            {"guidance": "--prompts sports "},
        ),
        (["gender"], {"prompts": ["a", "b"]}, "--prompts prompts.txt --part train", {}),
        (
            ["gender"],
            {"prompts": ["a", "b"], "command": "python train.py --attr gender --prompts my/own.txt"},
            "--prompts my/own.txt --part train",
            {"components": "python train.py --attr gender --prompts my/own.txt --component unet"},
        ),
        (["gender"], {"recipe": {"component": "prefix"}}, "", {"strength": "--sweep strength=0,1"}),
        (
            ["gender"],
            {"recipe": {"component": "unet"}},
            "",
            {"components": "--attr gender --component text_encoder"},
        ),
    ],
)
def test_a_command_makes_what_is_missing_as_the_run_made_the_rest(
    tmp_path, attributes, changed, evaluate, more
):
    changed = {**changed, "recipe": {"evaluate": "none", **changed.get("recipe", {})}}
    run = read_run(settings_of(tmp_path, attributes, **changed))
    found = {name: lack.command for name, lack in commands.lacks(run).items()}
    start = " ".join(["fairref evaluate --adapter", tmp_path.name, *evaluate.split()])
    assert (
        found["evaluation"] == f"{start} {NUMBERS}"
        and "judged.json" in commands.lacks(run)["evaluation"].said
    )
    assert found["strength"].startswith("fairref evaluate") and "--guidance" not in found["guidance"]
    assert found["guidance"].endswith("--sweep guidance=1,3,5,7.5,12")
    assert not found["metrics"]  # of a run that has ended, nothing writes them again
    for name, part in more.items():
        assert part in found[name]


def test_the_commands_have_the_runs_own_judges_format_and_joint_target(tmp_path):
    table, classes = [[0.4, 0.1], [0.1, 0.4]], {"gender": ["woman", "man"], "age": ["young", "old"]}
    judge = [
        {"role": "evaluate", "clip": "glasses=a person with glasses|a person"},
        {"role": "evaluate", "path": "/somewhere/me/own.py", "name": "load", "sha256": "0"},
        {"role": "finetune", "path": "/somewhere/me/own.py", "name": "load", "sha256": "0"},
    ]
    changed = {"target": {"classes": classes, "table": table}, "judge": judge, "dtype": "bfloat16"}
    text, read = page_of(
        settings_of(tmp_path, recipe={"evaluate": "none"}, prompt_template="a {occupation}", **changed)
    )
    command = next(text for text in missing(read) if "judged.json" in text)
    assert command.endswith(
        f"--attr gender,age --target target.json {NUMBERS} --dtype bfloat16"
        " --judge 'evaluate=clip:glasses=a person with glasses|a person' --judge evaluate=own.py:load"
    )
    assert (
        "gender × age, a joint target: 40.0% woman, young; 10.0% woman, old;" in text
        and "equal shares" not in text
    )
    assert (
        "In target.json is the joint target" in text
        and "not with the run" in text
        and "/somewhere" not in text
    )
    changed["command"] = "python train.py --target /somewhere/x/joint.json"
    assert (
        "--target joint.json"
        in commands.lacks(read_run(settings_of(tmp_path, **changed)))["strength"].command
    )


def test_the_target_that_a_command_names_is_the_runs_own(tmp_path):
    classes, table = {"skin_tone": report_runs.CLASSES["skin_tone"]}, [1 / 3, 1 / 3, 1 / 6, 1 / 6]
    run = read_run(settings_of(tmp_path, target={"classes": classes, "table": table}))
    words = shlex.split(commands.lacks(run)["guidance"].command)
    named = parse_target(words[words.index("--target") + 1], classes)
    assert named.target == pytest.approx(table)


def test_a_run_that_has_not_ended_goes_on_and_one_that_was_to_be_evaluated_is(tmp_path):
    for ended in (False, True):
        found = commands.lacks(read_run(settings_of(tmp_path, ended=ended)))
        assert found["evaluation"].command == f"python train.py --resume {tmp_path.name}"
        assert ("has not ended" in found["evaluation"].said) != ended
        assert ("Once the run has ended, this" in found["guidance"].said) != ended
        assert found["pictures"].command == found["evaluation"].command  # which draws them, too
    _, read = page_of(settings_of(tmp_path, target=None, recipe={"evaluate": "none"}))
    assert "fairref evaluate" not in " ".join(missing(read)) and "no target" in " ".join(missing(read))


@pytest.mark.parametrize(
    "word, short",
    [
        ("/somewhere/me/runs/a", "a"),
        ("--weights=/somewhere/me/sd15", "--weights=sd15"),
        ("evaluate=/somewhere/me/own.py:load", "evaluate=own.py:load"),
        ("evaluate=~/own.py:load", "evaluate=own.py:load"),
        ("../../other/own.py:loss=0.5", "own.py:loss=0.5"),
        ("x/../../own.py", "own.py"),
        ("/somewhere/me/", "me/"),
        ("runs/gender", "runs/gender"),
        ("evaluate=clip:glasses=one with / without|a b/c", "evaluate=clip:glasses=one with / without|a b/c"),
    ],
)
def test_no_command_names_a_folder_of_the_machine(word, short):
    assert commands.short_paths(shlex.join(["a", word])) == shlex.join(["a", short])


def test_an_older_or_unusual_evaluation_makes_a_page(tmp_path):
    folder = write_run(tmp_path / "run", new=False, prompts=3)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for part in evaluation.values():
        judges = part["test"]["judges"]
        judges["templates"] |= {"mean": None, "std": None}
        judges["templates"]["counts"] = {prompt: [0, 0] for prompt in judges["templates"]["counts"]}
    write(folder / "evaluation.json", {AFTER: evaluation[AFTER]})
    text, read = page_of(folder)
    women, men = evaluation[AFTER]["test"]["judges"]["classifier"]["counts"]["toolmaker"]
    share = round(100 * women / (women + men))
    low, high = (round(100 * end) for end in certainty.share(women, 60)[1:])
    assert read.row("prompt", "toolmaker")[1:] == [f"{share}%\u00a0[{low}%,\u00a0{high}%], n = 60", "–"]
    assert "This evaluation has no intervals" in text
    terms = {
        "concept": "occupations",
        "part": "test",
        "prompts": 2,
        "images": 3,
        "terms": {"loss": 0.25, "own": None},
    }
    write(folder / "evaluation.json", {"before": {"test": terms}})
    write(folder / "settings.json", report_runs.settings(["gender"]) | {"target": None})
    text, read = page_of(folder)
    assert read.row("term", "loss")[1] == ".2500" and "no target: the loss alone" in text


def second(evaluation, **made):
    """What `fairref evaluate` of the run's adapter writes: another evaluation with other labels."""
    other = json.loads(json.dumps({"before": evaluation["before"], "after": evaluation[AFTER]}))
    for parts_of in other.values():
        for of in parts_of.values():
            of["made"].update(made)
            of["adapters"] = [{"file": "run/adapter.safetensors", "strength": 1.0, "base": "this one"}]
    return other


@pytest.mark.parametrize(
    "made, images, replaces",
    [
        ({}, 60, True),
        ({}, 80, True),
        ({}, 30, False),
        ({"guidance": 7.5}, 60, False),
        ({"seed": 1}, 60, False),
        ({"weights": "another"}, 60, False),
        ({"strength": 0.5}, 60, False),
    ],
)
def test_another_evaluation_takes_the_place_of_the_runs_own_where_it_lacks_nothing(
    tmp_path, made, images, replaces
):
    folder = write_run(tmp_path / "run", new=False, prompts=3)
    newer = evaluation_of(prompts=3)
    write(folder / "evaluation.json", newer)
    judged = second(newer, **{"weights": "these", **made})
    for of in newer.values():
        for of_part in of.values():
            of_part["made"]["weights"] = "these"
    write(folder / "evaluation.json", newer)
    for of in judged.values():
        of["test"]["images"] = images
    write(folder / "judged.json", {label: {"test": of["test"]} for label, of in judged.items()})
    found = parts(read_run(folder))
    own = [part for part in found if not part.is_second]
    assert [part.key for part in own] == ["test", "train"] and list(own[0].reports) == ["before", AFTER]
    assert own[0].file == ("judged.json" if replaces else "evaluation.json")
    assert [list(part.reports) for part in found if part.is_second] == (
        [] if replaces else [["before", "after"]]
    )
    if made.get("guidance"):
        text, read = page_of(folder)
        other = "Another evaluation, by fairref evaluate: unseen occupations, 50 prompts × 60 images"
        assert f"{other}; 12 steps, guidance 7.5, seed 1000000" in text
        assert read.row("judge, prompts, file", "classifier, unseen occupations, judged.json")[2:] == [
            "98.8%",
            "–",
            "99.5%",
        ]


def test_an_evaluation_of_another_runs_adapter_stands_beside_the_runs_own(tmp_path):
    """Its file has the same name; an older evaluation does not say what it was of."""
    folder = write_run(tmp_path / "run", new=False, prompts=3)
    own, this = evaluation_of(prompts=3), fingerprint(read_tensors(folder / "adapter.safetensors"))
    for known, other, file in (
        (this, "another", "evaluation"),
        (this, this, "judged"),
        (None, this, "judged"),
    ):
        own[AFTER]["test"]["fingerprint"] = known
        if not known:
            del own[AFTER]["test"]["fingerprint"]
        judged = second(own)
        judged["after"]["test"]["fingerprint"] = other
        write(folder / "evaluation.json", own)
        write(folder / "judged.json", {label: {"test": of["test"]} for label, of in judged.items()})
        assert parts(read_run(folder))[0].file == f"{file}.json"


def test_an_evaluation_of_another_adapter_is_no_evaluation_of_this_one(runs, tmp_path):
    folder = write_run(tmp_path / "run", prompts=3)
    evaluation = evaluation_of(prompts=3)
    evaluation[AFTER]["test"]["fingerprint"] = fingerprint(read_tensors(folder / "adapter.safetensors"))
    write(folder / "evaluation.json", evaluation)
    assert "is not the one that was evaluated" not in page_of(folder)[0]
    evaluation[AFTER]["test"]["fingerprint"] = "another"
    write(folder / "evaluation.json", evaluation)
    assert "is not the one that was evaluated as after (ema)" in page_of(folder)[0]
    write(folder / "judged.json", second(evaluation))
    assert parts(read_run(folder))[0].file == "evaluation.json"  # the other is of the adapter that lies here


def test_prompts_of_a_file_are_no_finetuning_prompts_unless_the_run_says_so(tmp_path):
    report = evaluation_of(prompts=3)[AFTER]["train"] | {"concept": "prompts"}
    folder = settings_of(tmp_path)
    for prompts, name in (("other.txt", "Prompts of other.txt"), ("train", "Finetuning prompts")):
        report["made"]["prompts"] = prompts
        write(folder / "judged.json", {"after": {"prompts": report}})
        assert f"{name}, 30 prompts" in page_of(folder)[0]


def test_a_baseline_stands_beside_what_is_of_the_same_images_alone(tmp_path):
    folder = write_run(tmp_path / "run", prompts=3)
    evaluation = evaluation_of(prompts=3)
    seen, other = evaluation[AFTER]["train"], json.loads(json.dumps(evaluation[AFTER]["test"]))
    other["made"]["guidance"] = 7.5
    few = evaluation[AFTER]["test"] | {"images": 30}
    write(
        folder / "baselines.json",
        {
            "coin": {"test": evaluation[AFTER]["test"], "train": seen},
            "uce": {"test": other},
            "few": {"test": few},
        },
    )
    text, read = page_of(folder)
    tables = [[row[0] for row in table[1:]] for table in read.tables if table[0][0] == "way"]
    models = ["the original", f"fairref, {AFTER}"]
    assert tables == [[*models, "coin"], [*models, "coin"], ["uce"], ["few"]]
    assert (
        "guidance 7.5, seed 1000000, padding full, solver’s end zero; the run itself was not evaluated"
        in text
    )
    assert "numbers of images: uce, few." in text  # left out of the chart of strengths
    points = [row[0] for table in read.tables if table[0][0] == "model, strength" for row in table[1:]]
    assert points == ["before, the original", f"{AFTER}, 0", f"{AFTER}, .5", f"{AFTER}, 1", "coin"]


def test_beside_a_baseline_a_run_for_more_attributes_has_its_numbers_of_that_attribute_alone(tmp_path):
    folder = write_run(tmp_path / "run", "concepts.json", prompts=3)
    joint = evaluation_of("concepts.json", prompts=3)[AFTER]["test"]
    gender = joint["attributes"]["gender"]["judges"]["classifier"]
    alone = {**joint, **joint["attributes"]["gender"], "attribute": "gender"}
    write(folder / "baselines.json", {"coin": {"test": alone}})
    _, read = page_of(folder)
    ours, coin = (read.row("way", name) for name in (f"fairref, {AFTER}", "coin"))
    assert ours[1] == coin[1] and ours[1].startswith(number(gender["mean"]))
    assert coin[3].startswith("3.0%") and coin[7] != ours[7]
    assert ours[3] == coin[3] and ours[7] == "–\u00a0/ –"  # explicit prompts are of both attributes
    changes = next(table for table in read.tables if table[0][1] == "change of the squared gap")
    of = ("apparent gender × skin tone", "apparent gender", "skin tone")
    assert [row[0] for row in changes[1:]] == [f"{name}, classifier, {AFTER}" for name in of]
    assert len({row[1] for row in changes}) == 4  # each has its own


def test_what_is_drawn_is_what_all_have(runs):
    found = evaluation_of(prompts=3)["before"]["test"]["judges"]["classifier"]
    assert [sweeps.gaps(of)[0] for of in ([found], [found, {**found, "sure": None}])] == ["rms gap", "bias"]


def test_equal_shares_stand_in_the_order_of_their_prompts():
    judge = {
        "share": {"woman": 0.5, "man": 0.5},
        "counts": {"b": [1, 1], "c": [0, 2], "a": [2, 2], "d": [0, 0]},
    }
    report = {"attribute": "gender", "judges": {"classifier": judge}}
    (found,) = shares.shares_of({"before": report}, "gender", {})
    assert [row[0] for row in found.rows] == ["c", "a", "b", "d"]


def test_what_no_run_made_has_a_page(tmp_path):
    """A folder of --cache, and the report on a folder of images, of some prompts more than of others."""
    evaluation = evaluation_of(prompts=3)
    write(tmp_path / "judged.json", second(evaluation))
    text, read = page_of(tmp_path)
    assert "Apparent gender" in text and not missing(read) and 'id="run1-course"' not in text
    report = evaluation["before"]["test"] | {
        "part": "images",
        "concept": "shots",
        "images": {"nurse": 3, "cook": 70},
    }
    for key in ("faceless", "blended", "classes", "none", "made", "seed", "steps", "guidance"):
        report.pop(key)
    write(tmp_path / "report.json", {"weights": "emoji", **report})
    text, read = page_of(tmp_path / "report.json")
    assert "On images of shots, 50 prompts × 3 to 70 images, the classifier measures a bias" in text
    assert "how the images were made is not known" in text


def test_runs_of_one_name_are_told_apart_and_one_run_is_not_compared_with_itself(tmp_path, capsys):
    folders = [settings_of_folder(tmp_path / name / "run") for name in ("a", "b")]
    text, _ = page_of(*folders)
    assert "<h1>a/run, b/run</h1>" in text and "fairref evaluate --adapter run" not in text
    assert (
        cli.run(
            report.main, [str(folders[0]), f"{folders[1]}/../../a/run", "--out", str(tmp_path / "x.html")]
        )
        == 2
    )
    assert "is named twice" in capsys.readouterr().err


def settings_of_folder(folder):
    folder.mkdir(parents=True)
    return settings_of(folder)


def test_a_report_overwrites_no_file_of_the_run(tmp_path, capsys):
    folder = settings_of(tmp_path)
    before = (folder / "settings.json").read_bytes()
    for name in ("settings.json", "adapter.safetensors"):
        assert cli.run(report.main, [str(folder), "--out", str(folder / name)]) == 2
        assert (
            "would overwrite" in capsys.readouterr().err and (folder / "settings.json").read_bytes() == before
        )
    assert cli.run(report.main, [str(folder), "--out", str(folder / "report.html")]) == 0
    assert cli.run(report.main, [str(folder), "--out", str(folder / "report.html")]) == 0


def changed(path, *keys, to):
    """A JSON file with another value at a place; "*" is the first key or item there."""
    content = place = json.loads(path.read_text())
    for key in keys[:-1]:
        place = place[next(iter(place)) if key == "*" else key]
    place[next(iter(place)) if keys[-1] == "*" else keys[-1]] = to
    write(path, content)


JUDGE = ("before", "test", "judges", "classifier")


@pytest.mark.parametrize(
    "name, change",
    [
        *((name, "") for name in ("settings.json", "evaluation.json", "baselines.json")),
        ("evaluation.json", '{"before": {"test": '),
        ("evaluation.json", '{"before": {"test": {"images": NaN}}}'),
        ("evaluation.json", '{"before": {"test": {"images": 1e999}}}'),
        ("evaluation.json", "[" * 100_000),
        ("evaluation.json", '{"before": {"test": {"images": ' + "9" * 5000 + "}}}"),
        ("sweep-guidance.json", "[1]"),
        ("sweep-strength.json", '{"values": [1, 2], "reports": {"after": []}}'),
        ("metrics.jsonl", '{"iteration": 1}\n{"iter'),
        ("metrics.jsonl", '{"iteration": "one"}\n'),
        ("metrics.jsonl", '{"iteration": 1, "loss": [1]}\n'),
        ("pictures.png", "no picture"),
        ("evaluation.json", (*JUDGE, "mean", "much")),
        ("evaluation.json", (*JUDGE, "mean", 10**400)),
        ("evaluation.json", (*JUDGE, "mean", True)),
        ("evaluation.json", (*JUDGE, "counts", "*", [1])),
        ("evaluation.json", (*JUDGE, "counts", "*", [-1, 3])),
        ("evaluation.json", (*JUDGE, "counts", "*", "many")),
        ("evaluation.json", (*JUDGE, "share", [])),
        ("evaluation.json", ("before", "test", "confusion", "classifier", "gender", [{"counts": [1]}])),
        ("evaluation.json", (*JUDGE, "sure", "fair", {})),
        ("evaluation.json", (*JUDGE, "sure", "prompts", "*", "share", "*", [1, 2])),
        ("evaluation.json", ("before", "test", "noise_floor", {})),
        ("evaluation.json", ("before", "test", "prompts", {})),
        ("settings.json", ("recipe", [])),
        ("settings.json", ("target", {"classes": {"gender": "woman"}, "table": [1]})),
    ],
)
def test_a_file_that_is_not_as_a_run_leaves_it_is_named(runs, tmp_path, capsys, name, change):
    folder = tmp_path / "run"
    folder.mkdir()
    for file in runs["small"].glob("*.*"):
        (folder / file.name).write_bytes(file.read_bytes())
    if isinstance(change, str):
        (folder / name).write_text(change)
        if name == "metrics.jsonl" and "iter" in change[-6:]:
            (folder / name).write_text(change + "\n")  # half a line alone is a run's that goes on
    else:
        changed(folder / name, *change[:-1], to=change[-1])
    assert cli.run(report.main, [str(folder), "--out", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(folder / name) in said and said.strip().endswith(".")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "what, argv",
    [
        ("is no folder", ["nowhere"]),
        ("has no settings.json", ["."]),
        ("its folder doesn't exist", [".", "--out", "no/page.html"]),
    ],
)
def test_a_wrong_command_line_is_refused(tmp_path, monkeypatch, capsys, what, argv):
    monkeypatch.chdir(tmp_path)
    assert cli.run(report.main, argv) == 2 and what in capsys.readouterr().err


def renamed(value, names):
    """JSON with hostile text in the place of some keys and texts."""
    if isinstance(value, dict):
        return {HOSTILE if key in names else key: renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, names) for item in value]
    return HOSTILE if value in names else value


def test_hostile_names_are_text(tmp_path):
    """In every place that a file's text can get to: no element, attribute or template of it is one of the page's."""
    names = {
        "woman",
        "nurse",
        "occupations",
        "ema",
        AFTER,
        "gender",
        "classifier",
        "classifier_evaluate",
        "full",
        "paper",
    }
    folder = write_run(tmp_path / "<script>alert(2)<", prompts=3)
    changed(folder / "evaluation.json", *JUDGE, "sure", "fair", "said", to=HOSTILE)
    for file in folder.glob("*.json"):
        write(file, renamed(json.loads(file.read_text()), names))
    write_pictures(folder / "pictures.png", "gender", seen=HOSTILE)
    settings = json.loads((folder / "settings.json").read_text())
    settings |= {"command": HOSTILE, "loss": [{"name": HOSTILE, "sha256": HOSTILE}], "weights": "\ud800"}
    settings["recipe"][HOSTILE] = {HOSTILE: HOSTILE}
    write(folder / "settings.json", settings)
    rows = [{**row, HOSTILE: 1.0} for row in report_runs.metrics(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, read = page_of(folder)
    assert text.count("alert(1)") > 50
    computed = re.compile("\u202e\0?49")  # what a template would make of it
    assert computed.search(text.replace("{{7*7}}", "49")) and not computed.search(text)
    assert not {"script"} & {name for name, *_ in read.elements}
    assert all(a["src"].startswith("data:image/") for a in read.all("img"))
    assert not any(key.startswith("on") for _, attributes, _ in read.elements for key in attributes)


def test_pictures_are_reduced_until_the_page_is_small(tmp_path):
    write(tmp_path / "settings.json", report_runs.settings(["gender"]))
    write_pictures(tmp_path / "pictures.png", "gender", P=1, n=4, side=200)
    run = read_run(tmp_path)
    large, small = (
        sum(len(picture.data) for row in rows for pair in row.pairs for picture in pair.pictures)
        for rows in (pictures.prompts_of(run), pictures.prompts_of(run, budget=30_000))
    )
    assert 0 < small <= 30_000 < large
    assert pictures.prompts_of(run)[0].pairs[1].pictures[0].box == (20.0, 20.0, 60.0, 60.0)
    pairs = pictures.prompts_of(run)[0].pairs
    assert [pair.changed for pair in pairs] == [False, True, True, True]
    write_pictures(tmp_path / "pictures.png", "gender", P=4, n=1)
    _, read = page_of(tmp_path)
    folded = ["details" in inside for _, a, inside in read.elements if a.get("class") == "pairs"]
    assert folded == [False, False, True, True]  # the first screens are not pictures alone


def test_a_page_that_is_too_large_has_smaller_pictures(tmp_path, monkeypatch):
    write_pictures(settings_of(tmp_path) / "pictures.png", "gender", P=2, n=4, side=160)
    large = len(page_of(tmp_path)[0])
    monkeypatch.setattr(report_page, "LARGEST", large // 2)
    monkeypatch.setattr(pictures, "BYTES", large)
    text, _ = page_of(tmp_path)
    assert len(text) <= large // 2 and text.count("data:image/webp") == 16


def test_a_curve_has_the_mean_of_every_iteration_in_its_bin():
    metrics = [{"iteration": i, "cost": float(i)} for i in range(200)]
    rows = course.binned(metrics, "cost", 5)
    assert len(rows) == 40
    assert rows[0] == {"x": 2.0, "mean": 2.0, "low": pytest.approx(0.2), "high": pytest.approx(3.8)}
    assert rows[-1]["mean"] == 197


def test_iterations_whose_prompt_names_a_class_are_in_no_curve_but_their_own(runs):
    loss, cost, bias = course.curves(read_run(runs["small"]))
    assert loss.table.head == ("iteration", "loss", "L_align", "L_img", "loss (named)")
    assert (
        'stroke-width="5"' in loss.wide
        and {row[-1][:4] for row in loss.table.rows} == {"9.00"}
        and max(row[1] for row in cost.table.rows) < "1"
    )
    assert "66 of 200 iterations, whose prompt names a class, are left out." in cost.caption
    assert all(row[1].startswith(".500") for row in bias.table.rows if row[1] != "–")


@pytest.mark.parametrize(
    "prompts, names",
    [
        (["a photo of a cook, a person", "a photo of a nurse, a person"], ["cook", "nurse"]),
        (["a photo of a baker", "a photo of an actor"], ["a baker", "an actor"]),
        (["cook", "nurse"], ["cook", "nurse"]),
        (["a red cook", "a red cook, too"], ["cook", "cook, too"]),
        (["a cook", "a "], ["a cook", "a "]),
        (["a photo of a cook"], ["a photo of a cook"]),
        ([], []),
    ],
)
def test_a_prompt_is_named_by_what_it_does_not_share(prompts, names):
    assert shares.short_names(prompts) == dict(zip(prompts, names, strict=True))


def test_shares_have_the_interval_of_the_evaluation():
    for n in (0, 1, 60):
        assert [wilson(k, n) for k in range(n + 1)] == [certainty.share(k, n) for k in range(n + 1)]


@pytest.mark.parametrize(
    "value, text",
    [
        (0.834, ".83"),
        (1, "1.00"),
        (-0.054, "\N{MINUS SIGN}.05"),
        (-0.001, ".00"),
        (None, "–"),
        (12.345, "12.35"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    "value, text", [(0.9417, ".942"), (0.99958, ".9996"), (0.9996, ".9996"), (1.0, "1.000")]
)
def test_a_likeness_is_1_only_where_it_is(value, text):
    assert likeness(value) == text


def test_no_torch_is_needed(runs, tmp_path):
    code = "import sys\nfrom fairref.__main__ import main\nsys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    argv = ["report", str(runs["small"]), "--out", str(tmp_path / "page.html")]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == argv[-1], done.stderr


def test_a_report_that_fails_leaves_a_finished_run_finished(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "run", lambda options, given: tmp_path)
    write(tmp_path / "settings.json", report_runs.settings(["gender"]))
    assert cli.run(train.main, ["--attr", "gender"]) == 0
    assert (tmp_path / "report.html").is_file() and "read what it measured" in capsys.readouterr().out
    for broken, said in (
        (lambda: (tmp_path / "settings.json").write_text("{"), "not JSON"),
        (lambda: monkeypatch.setitem(sys.modules, "fairref.reporting.report", None), "fairref/reporting"),
    ):
        (tmp_path / "report.html").unlink(missing_ok=True)
        broken()
        assert cli.run(train.main, ["--attr", "gender"]) == 0
        found = capsys.readouterr().err
        assert (
            "the run is finished, but has no report.html" in found
            and said in found
            and found.count("\n") == 1
        )
    monkeypatch.setenv("RANK", "1")
    assert cli.run(train.main, ["--attr", "gender"]) == 0 and capsys.readouterr() == ("", "")


def test_what_was_recorded_is_said_with_its_reasons():
    calm, broken = np.ones(3), np.array([1, np.nan, 1])
    of = [(0, False, calm), (1, True, calm), (2, True, broken), (3, False, broken)]
    recorded = [SimpleNamespace(iteration=i, explicit=explicit, pull=pull) for i, explicit, pull in of]
    assert pulled._about(recorded) == (
        "Recorded iterations: 4, with 3 pictures each. Left out here because the prompt names a class: 2."
        " Left out here because the gradient was no number: 1."
    )
    assert pulled._about(recorded[:1]).endswith("alone, before the adapter has changed anything.")


def test_what_pulled(tmp_path):
    """Shares within an iteration for groups, all recorded pull for prompts; 12 pictures, half of them the most."""
    run = write_run(tmp_path / "run", new=False)
    assert "--scores" in page_of(run)[0]  # how to record some
    report_runs.write_scores(run, prompts=("a b", "a c", HOSTILE))
    text, page = page_of(run)
    groups, prompts = (
        next(table for table in page.tables if table[0] == head)
        for head in (
            ["group", "of the pictures", "of the pull"],
            ["prompt", "iterations", "of the pictures", "of the pull"],
        )
    )
    assert sorted(groups[1:], reverse=True) == [
        ["no face", "25.0%", f"{(0 + 1 / 4 + 3 / 4) / 3:.1%}"],
        ["gender 1, told nothing", "25.0%", f"{(0 + 1 / 4 + 1 / 4) / 3:.1%}"],
        ["gender 0, told to stay", "25.0%", f"{(1 / 4 + 1 / 4) / 3:.1%}"],
        ["gender 0, told gender 1", "25.0%", f"{(3 / 4 + 1 / 4) / 3:.1%}"],
    ]
    assert [row[1:] for row in prompts[1:]] == [["1", f"{1 / 3:.1%}", f"{of / 14:.1%}"] for of in (8, 4, 2)]
    assert text.index("<b>6 (75.0%)</b>") < text.index("<b>3 (75.0%)</b>") < text.index("Pulled least")
    assert "before clipping and" in text and "Left out here" not in text and "c, the largest q" in text
    assert "<script>" not in text and "Recorded iterations: 3, with 4 pictures each.</p>" in text
    (run / "scores" / "000000.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="000000"):
        write_report([run], tmp_path / "r.html")
