"""How a command ends: its sentence and exit code, also where nobody listens any more."""

import errno
import json
import os
import pty
import shutil
import subprocess
import sys

import pytest
import waiting
from waiting import ROOT, wait_for

from fairref.commands import cli, train
from fairref.errors import DEBUG, UserError
from fairref.evaluation import comparison
from fairref.training import loop

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SHORT = "--attr gender --iterations 2 --evaluate ema --eval-images 2 --eval-images-train 0 --device cpu"


@pytest.fixture(autouse=True)
def without_debugging(monkeypatch):
    monkeypatch.delenv(DEBUG, raising=False)


def shell(command, **options):
    """bash's exit code, stdout and stderr; $PYTHON is this one."""
    environment = {**ENVIRONMENT, "PYTHON": sys.executable}
    command = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, **options)
    return done.returncode, done.stdout, done.stderr


# ---- defects and other people's code


def test_a_defect_is_one_sentence_that_names_its_place_and_keeps_its_traceback_for_who_asks(
    capsys, monkeypatch
):
    assert cli.run(cli.path, None) == 1  # None for a text
    message = capsys.readouterr().err
    assert message.startswith("TypeError: ") and message.count("\n") == 1
    assert "at fairref/files/paths.py:" in message and "FAIRREF_DEBUG=1 shows the traceback" in message
    monkeypatch.setenv(DEBUG, "1")
    with pytest.raises(TypeError):
        cli.run(cli.path, None)
    monkeypatch.setenv(DEBUG, "0")
    assert cli.run(cli.path, None) == 1


@pytest.mark.parametrize("own", ["loss", "judge"])
def test_own_code_that_fails_in_the_middle_of_a_run_is_named_with_its_line(
    tiny_folder, tmp_path, capsys, own
):
    file = tmp_path / "own.py"
    if own == "loss":
        file.write_text(
            "calls = []\n"
            "def own(x, o, prompt, bundle):\n"
            "    calls.append(1)\n"
            "    if len(calls) > 2:\n"
            "        [][len(calls)]\n"
            "    return x.square().mean((1, 2, 3))\n"
        )
        option = ["--loss", f"{file}:own"]
    else:
        file.write_text(
            "import torch\n"
            "def own(device, dtype):\n"
            "    def judge(x):\n"
            "        if len(x) > 1: torch.ones(2) @ torch.ones(3)\n"
            "        return {'gender': x.mean((2, 3))[:, :2]}\n"
            "    judge.classes = {'gender': ('woman', 'man')}\n"
            "    return judge\n"
        )
        option = ["--judge", f"finetune={file}:own"]
    options = [*SHORT.split(), *option, "--weights", str(tiny_folder), "--out", str(tmp_path / "run")]
    assert cli.run(train.main, options) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    line, error = (5, "IndexError") if own == "loss" else (4, "RuntimeError")
    assert message.startswith(f"{file}:{line}: your own code ends with {error}: "), message


def test_very_long_values_make_no_long_sentence(capsys):
    def main(argv):
        raise UserError("begin\n" + "x" * 10_000_000 + " end")

    assert cli.run(main) == 2
    message = capsys.readouterr().err
    assert message.startswith("begin xxx") and message.endswith(" end\n") and len(message) < 3000


@pytest.mark.parametrize("module, name", [(loop, "update"), (comparison, "compare")])
def test_a_runs_folder_that_has_gone_is_one_sentence(
    tiny_folder, tmp_path, capsys, monkeypatch, module, name
):
    real, out = getattr(module, name), tmp_path / "run"

    def without_folder(*args):
        shutil.rmtree(out, ignore_errors=True)
        return real(*args)

    monkeypatch.setattr(module, name, without_folder)
    options = [*SHORT.split(), "--weights", str(tiny_folder), "--out", str(out)]
    assert cli.run(train.main, options) == 2
    assert f"{out}: the run's folder has gone while it ran" in capsys.readouterr().err.splitlines()[-1]


# ---- stdout and stderr that nobody reads


def test_a_stream_drops_what_nobody_takes():
    reader, writer = os.pipe()
    os.close(reader)
    stream = cli.Stream(writer, "wb")
    assert stream.lost is None and stream.write(b"text") == 4 and stream.lost.errno == errno.EPIPE
    assert stream.write(memoryview(b"more")) == 4
    stream.close()
    reader, writer = os.pipe()
    with cli.Stream(writer, "wb") as stream:
        stream.write(b"text")
    assert os.read(reader, 9) == b"text"
    os.close(reader)


@pytest.mark.parametrize(
    "command, code, said",
    [
        ("$PYTHON -m fairref --help | true", 0, ""),
        ("$PYTHON -m fairref --help >&-", 0, ""),
        ("$PYTHON -m fairref --version 2>&- >&-", 0, ""),
        ("$PYTHON -m fairref dance 2>&-", 2, ""),
        ("$PYTHON -m fairref train --help | true", 0, ""),
        ("$PYTHON -m fairref --help >/dev/full", 2, "stdout: can't be written (No space left on device)"),
        ("$PYTHON -m fairref evaluate >&-", 2, "stdout is closed, so the result would be lost; give a file"),
    ],
)
def test_help_and_refusals_without_a_reader(command, code, said):
    found, _, stderr = shell(command)
    assert found == code and said in stderr and stderr.count("\n") == bool(said), stderr


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">&- 2>&-", "2>/dev/full", "2>&1 | true"])
def test_a_run_a_picture_and_an_evaluation_keep_their_results_without_a_reader(
    tiny_folder, tmp_path, streams
):
    weights = f"--weights {tiny_folder} --device cpu"
    for command, result in (
        (f"train.py {weights} {SHORT} --out {tmp_path}/run", "run/evaluation.json"),
        (f"sample.py pilot -n 1 --steps 2 {weights} --out {tmp_path}/images", "images/seed0-000.png"),
        (f"-m fairref evaluate {weights} -n 1 --steps 2 --out {tmp_path}/report.json", "report.json"),
    ):
        code, _, stderr = shell(f"$PYTHON {command} {streams}")
        assert code == 0 and "Traceback" not in stderr and "ignored" not in stderr, (command, stderr)
        assert (tmp_path / result).is_file(), command
    code, _, stderr = shell(f"$PYTHON -m fairref evaluate {weights} -n 1 --steps 2 | true")
    assert code == 1 and "Traceback" not in stderr and "ignored" not in stderr, stderr


@pytest.mark.slow
@pytest.mark.parametrize("signals", [True, False], ids=["the run is told", "the run is in another session"])
def test_a_terminal_that_hangs_up_leaves_a_run_that_can_go_on(tiny_folder, tmp_path, signals):
    """Closing a terminal sends SIGHUP to its own session; whoever else prints there gets an error."""
    out, ours, theirs = tmp_path / "run", *pty.openpty()
    count = "1000000" if signals else "6"
    command = [sys.executable, str(ROOT / "train.py"), "--weights", str(tiny_folder), "--out", str(out)]
    command += ["--attr", "gender", "--evaluate", "none", "--device", "cpu", "--iterations", count]
    code = "import fcntl, os, signal, sys, termios\nif sys.argv[1] == 'True':\n    os.setsid()\n"
    code += "    signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # under nohup it would be ignored
    code += "    fcntl.ioctl(0, termios.TIOCSCTTY, 0)\nos.execv(sys.argv[2], sys.argv[2:])"
    command = [sys.executable, "-c", code, str(signals), *command]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT)
    os.close(theirs)
    metrics = out / "metrics.jsonl"
    os.set_blocking(ours, False)
    wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") > 0, [])
    os.close(ours)
    assert process.wait(waiting.patience(60)) == (130 if signals else 0)
    done = [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()]
    assert done == list(range(len(done)))
    assert (out / f"checkpoint-{len(done):06d}.safetensors").is_file()
    assert (out / "adapter.safetensors").is_file() is not signals


@pytest.mark.parametrize("action", ["store", "append"])
def test_two_dashes_are_no_value(action):
    parser = cli.Parser(prog="fairref x")
    parser.add_argument("--target", action=action)
    try:
        found = parser.parse_args(["--target=--"]).target
    except UserError as error:
        assert "--target" in str(error)
    else:  # newer versions of argparse take it as a text
        assert found in ("--", ["--"])
    assert parser.parse_args(["--target=a"]).target in ("a", ["a"])
