"""A test that a timeout ended says so, after how long, and what its processes had printed."""

import subprocess
import sys

import pytest
import waiting

PRINTS_AND_STAYS = (
    "import sys, time; print('begun', flush=True); print('so far', file=sys.stderr, flush=True); "
)
PRINTS_AND_STAYS += "open(sys.argv[1], 'w').close(); time.sleep(1e6)"


def begun(file, code=PRINTS_AND_STAYS):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code, str(file)], **pipes)
    waiting.wait_for(file.exists, [process])
    return process


@pytest.mark.parametrize(
    "waits", [waiting.ends, lambda p, timeout: waiting.wait_for(lambda: False, p, timeout)]
)
def test_a_cut_off_is_said(tmp_path, monkeypatch, waits):
    process = begun(tmp_path / "begun")
    monkeypatch.setattr(waiting, "slowness", lambda: 3.0)
    with pytest.raises(pytest.fail.Exception) as failed:
        waits([process], 0.4)
    said = str(failed.value)
    assert said.startswith("cut off, not wrong: the timeout ended") and "after 1 s" in said
    assert "process 0, stdout:\nbegun\n" in said and "process 0, stderr:\nso far\n" in said
    assert process.returncode is not None


def test_a_process_that_ends_too_early_is_not_waited_for(tmp_path):
    process = begun(
        tmp_path / "begun", "import sys; open(sys.argv[1], 'w').close(); sys.exit('too little memory')"
    )
    with pytest.raises(pytest.fail.Exception, match=r"ended \(code 1\) before(?s:.)*too little memory"):
        waiting.wait_for(lambda: False, [process])


def test_patience_is_measured(patience):
    assert patience(60) >= 60 and patience(2) == 2 * patience(1)
