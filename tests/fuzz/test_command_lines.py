"""A tenth of the random command lines; `python -m tests.fuzz.command_lines` runs them all."""

import pytest

from fairref.__main__ import COMMANDS
from tests.fuzz import command_lines


def test_every_command_has_a_command_line():
    assert command_lines.BASES.keys() == COMMANDS.keys()


@pytest.mark.slow
def test_command_lines_end_with_a_sentence():
    assert command_lines.run(50, seed=0) == {}
