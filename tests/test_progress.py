"""The progress bar on a terminal, a narrow one too, and in a file."""

import io

import pytest

from fairref import progress
from fairref.progress import Progress, note

NOTE = "align 0.412  image 0.021  face 0.052  cost 0.301  faces 1.000  confident 0.833  bias 0.42  skipped 3"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time that passes only where a test says so: a machine may stop for longer than a bar stays quiet."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("columns, lines", [(300, 1), (80, 2), (40, 4)])
def test_all_of_a_note_is_seen_however_narrow_the_terminal(monkeypatch, columns, lines):
    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", str(columns))
    with Progress(10, "finetuning") as bar:
        bar.step(NOTE)
        bar.step("short")
    shown = progress.sys.stderr.getvalue()
    first, second = shown.split("\r\033[J", 1)[1].split("\r", 1)
    assert all(part in first for part in ("1/10", *NOTE.split("  ")))
    assert len(first.split("\n")) == lines and max(map(len, first.split("\n"))) < columns
    # the second goes up to where the first began, and takes all of it away
    up = f"\033[{lines - 1}A" if lines > 1 else ""
    assert second.startswith(f"{up}\033[Jfinetuning") and "2/10" in second and second.endswith("\n")


def test_a_file_gets_whole_lines_and_few(monkeypatch):
    monkeypatch.setattr(progress.sys, "stderr", io.StringIO())
    with Progress(10, "finetuning") as bar:
        for _ in range(10):
            bar.step(NOTE)
    lines = progress.sys.stderr.getvalue().splitlines()
    assert len(lines) == 2 and all(line.endswith(NOTE) for line in lines) and "10/10" in lines[1]


def test_a_file_gets_a_line_again_after_a_while(monkeypatch, clock):
    monkeypatch.setattr(progress.sys, "stderr", io.StringIO())
    with Progress(10, "finetuning") as bar:
        for _ in range(10):
            bar.step(NOTE)
            clock[0] += progress.QUIET / 2
    shown = [line.split(", ")[0].split("] ")[1] for line in progress.sys.stderr.getvalue().splitlines()]
    assert shown == ["1/10", "3/10", "5/10", "7/10", "9/10", "10/10"]


def test_a_note_is_said_once(caplog):
    note.cache_clear()
    for sentence in ("a tensor is ignored.", "a tensor is ignored.", "another."):
        note(sentence)
    assert caplog.messages == ["a tensor is ignored.", "another."]
    assert {record.name for record in caplog.records} == {"fairref"}
