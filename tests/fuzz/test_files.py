"""A tenth of what the fuzzer of files does by hand, always the same: see `tests/fuzz/files.py`."""

import pytest
from fuzz.files import KINDS, MUTATORS, fuzz

CASES = 124  # four of each kind


@pytest.mark.slow
def test_no_damaged_file_ends_in_a_traceback_a_hang_or_silent_damage(tmp_path):
    report = fuzz(tmp_path, CASES, seed=0)
    assert len(KINDS) >= 12 and len(MUTATORS) >= 8
    assert not report.faults
    assert sum(report.verdicts.values()) == CASES
    assert report.verdicts["refused"] > CASES / 2 and report.verdicts["equal"] > CASES / 10
