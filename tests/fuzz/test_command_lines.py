"""A tenth of the random command lines; `python -m tests.fuzz.command_lines` runs them all."""

import pytest

from tests.fuzz import command_lines


@pytest.mark.slow
def test_command_lines_end_with_a_sentence():
    assert command_lines.run(50, seed=0) == {}
