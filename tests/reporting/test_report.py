"""The report: it says what the files say, of each number by whom; hostile files give a sentence and never markup."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import report_runs
from report_runs import AFTER, write, write_pictures, write_run

from fairref.commands import cli, report, train
from fairref.reporting import course, pictures
from fairref.reporting.report import write_report
from fairref.reporting.run_files import read_run
from fairref.reporting.tables import number

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
    "guidance",
    "strength",
    "baselines",
)


class Reader(HTMLParser):
    """What a page is made of."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.tables = [], [], []
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
        "gender": write_run(folder / "gender"),
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
        ".83\u00a0±\u00a0.17 [.81,\u00a0.85]",
        ".10\u00a0±\u00a0.08",
        ".83\u00a0[.81,\u00a0.85]",
        ".84\u00a0[.82,\u00a0.86]",
    ]
    assert read.row("judge, model", f"templates, {AFTER}")[1].startswith(".23\u00a0±\u00a0.15")
    assert read.row("judge, prompts", "classifier, unseen occupations") == [
        "classifier, unseen occupations",
        "400",
        "98.8%",
        "99.5%",
    ]
    assert read.row("prompt", "nurse")[1:3] == [
        "93%\u00a0[47%,\u00a097%], n = 60",
        "63%\u00a0[32%,\u00a082%], n = 60",
    ]
    assert read.row(
        "measure", "CLIP-I: likeness to the original's picture of the same noise; 1 is the same picture"
    )[1:] == ["–", ".942"]
    assert read.row("guidance", "3")[0] == "3" and read.row("way, n", "coin, 50 × 60")[3] == "3.0%\u00a0/ –"
    first = read.row("judge, model: where the class is known from", "classifier, before: labelled pictures")
    assert first[1:] == ["woman", "97.0%", "1.0%", "100", ".040"]
    assert read.row("class", "woman")[2] == "50.2%; corrected 50.2%\u00a0[50.2%,\u00a050.2%]"
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
        ".20\u00a0±\u00a0.14"
    )
    row = read.row("prompts, model, n", f"unseen sports, {AFTER}, 10 prompts × 60 images")
    assert [cell[:3] for cell in row[1:4]] == [".07", ".24", ".08"]  # joint, gender, skin tone
    assert row[-3:] == [".481", ".818", ".954"]  # CLIP-T, CLIP-I, DINO of docs/results.md
    assert "it has no intervals" in text  # of the older evaluations


def test_of_unequal_shares_the_distance_from_them_counts(tmp_path):
    """As the paper's run for age: 25 % old, whose share is what the chart shows."""
    text, read = page_of(write_run(tmp_path / "age", "gender-skin_tone-age.json", new=False, prompts=3))
    tables = {table[1][2]: table for table in read.tables if table[0][0] == "judge, model"}  # by their floor
    assert tables[".09\u00a0±\u00a0.07"][2][:3] == [
        f"classifier, {AFTER}",
        ".11\u00a0±\u00a0.08",
        ".09\u00a0±\u00a0.07",
    ]
    assert "Apparent age: distance from the target" in text and "Apparent gender: bias" in text
    assert "Share of old (apparent age)" in text and "target 25%" in text and "Share of young" not in text
    assert read.row("class", "old")[1] == "25.0%" and read.row("class", "woman, dark, old")[1] == "3.1%"
    assert "age: 75.0% young, 25.0% old" in text


def test_what_is_missing_names_its_command(tmp_path):
    made = {"weights": "/somewhere/sd15", "command": "python train.py --attr age --weights /somewhere/sd15"}
    write(tmp_path / "settings.json", report_runs.settings(["age"]) | made)
    text, read = page_of(tmp_path)
    missing = [a for a in read.all("p") if a.get("class") == "missing"]
    assert len(missing) == len(SECTIONS) - 1
    command = f"fairref evaluate --adapter {tmp_path.name} --weights sd15 --attr age --target age=0.75,0.25"
    assert command in text and f"{command} --sweep strength=0,0.25,0.5,0.75,1,1.25" in text
    assert (
        "python train.py --attr age --weights sd15<" in text
        and "/somewhere" not in text
        and str(tmp_path) not in text
    )


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
    assert read.row("prompt", "toolmaker")[1:] == [f"{share}%, n = 60", "–"] and share < 50
    assert "it has no intervals" in text
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


def test_of_two_evaluations_the_one_with_intervals_counts(runs, tmp_path):
    folder = write_run(tmp_path / "run", new=False, prompts=3)
    newer = json.loads((runs["small"] / "evaluation.json").read_text())
    write(folder / "judged.json", {"before": newer["before"], "after": newer[AFTER]})
    assert read_run(folder).evaluated_in == "judged.json" and "after" in read_run(folder).evaluation
    write(folder / "evaluation.json", newer)
    assert read_run(folder).evaluated_in == "evaluation.json" and AFTER in read_run(folder).evaluation


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
    for file in runs["small"].iterdir():
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
        "Not fair (p < .001).",
        "paper",
    }
    folder = write_run(tmp_path / "<script>alert(2)<", prompts=3)
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
    assert text.count("alert(1)") > 50 and "49" not in re.findall(r"&amp;\S{0,3}(49)", text)
    assert "{{7*7}}" in text
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


def test_a_curve_has_the_mean_of_every_iteration_in_its_bin():
    metrics = [{"iteration": i, "cost": float(i)} for i in range(200)]
    rows = course._binned(metrics, "cost")
    assert len(rows) == 40
    assert rows[0] == {"x": 2.0, "mean": 2.0, "low": pytest.approx(0.2), "high": pytest.approx(3.8)}
    assert rows[-1]["mean"] == 197


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


def test_no_torch_is_needed(runs, tmp_path):
    code = "import sys; sys.modules['torch'] = None\nfrom fairref.__main__ import main\nsys.exit(main(sys.argv[1:]))"
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
