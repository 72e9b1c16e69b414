"""A tenth of the kills; `python -m tests.fuzz.kills` does them all."""

import subprocess
import sys

import pytest
from waiting import ROOT


@pytest.mark.slow
def test_runs_that_are_killed_end_as_one_that_nobody_disturbed():
    """In a process of its own, which has no threads when it forks."""
    command = [sys.executable, "-m", "tests.fuzz.kills", "--kills", "10", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("10 kills of "), done.stdout + done.stderr
