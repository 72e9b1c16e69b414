"""The code of docs/extend.md runs, and does what the page says."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_bundle import write_tiny_bundle

from fairref.bundle import loading
from fairref.commands import evaluate, train
from fairref.training import run

PAGE = (Path(__file__).parents[1] / "docs" / "extend.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
MEASURED = re.findall(r"^    fairref evaluate (.*--baseline.*)$", PAGE, re.MULTILINE)
COMMANDS = re.findall(r"^    python train\.py (.*)$", PAGE, re.MULTILINE)
MOST_LINES = 15  # of a loss of one's own


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, with the tiny bundle as the default."""
    monkeypatch.chdir(tmp_path)
    tiny = str(write_tiny_bundle(tmp_path / "tiny"))
    for module in (loading, run):
        monkeypatch.setattr(module, "DEFAULT", tiny)
    return tmp_path


def block(start):
    """The page's block that begins with this line or holds it."""
    (found,) = [code for code in BLOCKS if start in code]
    return found


def write_own(folder):
    for name in ("brighter.py", "background.py", "stronger.py"):
        (folder / name).write_text(block(f"# {name}"), encoding="utf-8")


def test_the_notebook(here, capsys):
    names = {}
    exec(block("from fairref import evaluate"), names)
    assert len(names["images"]) == len(names["after"]) == 2 and names["images"][0].size == (32, 32)
    assert (names["folder"] / "adapter.safetensors").is_file()
    assert names["report"]["images"] == 2 and names["report"]["judges"]["classifier"]["counts"]


def test_targets_and_gradients_alone(capsys):
    names = {}
    exec(block("expected_ot"), names)
    assert names["transport"].q[:, 0].tolist() == pytest.approx([15 / 16, 11 / 16, 5 / 16, 1 / 16])
    torch.manual_seed(0)
    exec(block("class Toy"), names)
    toy, path, table = names["toy"], names["path"], names["table"]
    w = names["step_weights"](names["schedule"], table)
    expected = sum(
        float(w[step.i]) * float((names["z_0"] / 5 * step.z).sum()) for step in path[:-1]
    )  # d eps_i/d theta = z_i
    (found,) = names["adjusted_gradient"](toy, table, w, path, names["z_0"] / 5)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_a_loss_of_ones_own(here, capsys):
    write_own(here)
    assert len(block("# brighter.py").splitlines()) <= MOST_LINES
    for command, folder in zip(COMMANDS[:2], ("runs/gender", "runs/brighter"), strict=True):
        train.main(command.split())
        lines = (here / folder / "metrics.jsonl").read_text().splitlines()
        assert all(json.loads(line)["brighter"] >= 0 for line in lines) and len(lines) == 2
    assert "bias" not in json.loads(lines[-1]) and "align" not in json.loads(lines[-1])
    results = json.loads((here / "runs" / "brighter" / "evaluation.json").read_text())
    assert {label: report["test"]["terms"]["brighter"] > 0 for label, report in results.items()} == {
        "before": True,
        "after (ema)": True,
        "after (raw)": True,
    }
    (own,) = json.loads((here / "runs" / "brighter" / "settings.json").read_text())["loss"]
    assert own["path"] == str(here / "brighter.py") and own["weight"] == 1 and len(own["sha256"]) == 64


def test_a_judge_of_ones_own(here, capsys):
    write_own(here)
    train.main(COMMANDS[2].split())
    results = json.loads((here / "runs" / "background" / "evaluation.json").read_text())
    assert results["before"]["test"]["classes"] == ["light", "dark"]


def test_a_baseline_of_ones_own(here, capsys):
    write_own(here)
    (command,) = MEASURED
    evaluate.main([*command.split(), "--out", "report.json"])
    found = json.loads((here / "runs" / "baselines" / "baselines.json").read_text())
    assert found["stronger"]["test"]["clip_i"] < 0.99999


def test_the_page_has_no_command_that_is_not_run():
    assert len(COMMANDS) == 3 and len(BLOCKS) == 6
