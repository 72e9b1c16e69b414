"""`fairref COMMAND ...`: one table of commands, each with help that begins with an example that works."""

import configparser
import runpy
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from fairref import __main__ as console
from fairref import __version__
from fairref.__main__ import COMMANDS, main
from fairref.commands import cli, sample, train

ROOT = Path(__file__).parents[2]


def help_of(capsys, name):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_lists_all_commands():
    done = subprocess.run(
        [sys.executable, "-m", "fairref", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("example: fairref train")
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == list(COMMANDS)


def test_each_file_of_the_room_is_a_command(capsys):
    files = {path.stem for path in (ROOT / "fairref" / "commands").glob("*.py")}
    assert {name.rstrip("_") for name in files - {"__init__", "cli"}} == set(
        COMMANDS
    )  # import_.py: a keyword
    assert main([]) == main(["-h"]) == 0
    shown = capsys.readouterr().out
    assert all(what in shown for what in COMMANDS.values())
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_an_example_that_its_own_parser_takes(capsys, monkeypatch, name):
    first, empty, *_ = help_of(capsys, name).splitlines()
    assert first.startswith(f"example: fairref {name}") and empty == ""

    class Parsed(BaseException):
        pass

    parse = cli.Parser.parse_args

    def only_parse(parser, args=None, namespace=None):
        raise Parsed(parser.prog, parse(parser, args, namespace))

    monkeypatch.setattr(cli.Parser, "parse_args", only_parse)
    _, command, *options = shlex.split(first.removeprefix("example: "))
    with pytest.raises(Parsed) as caught:  # an example that is wrong ends in one sentence and exit code 2
        main([command, *options])
    assert caught.value.args[0] == f"fairref {name}"


@pytest.mark.parametrize("argv", [["dance"], ["dance", "--help"], ["--attr", "gender"], ["Train"], [""]])
def test_an_unknown_command_is_one_sentence(capsys, argv):
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert f"no command {argv[0]!r}" in shown.err and all(name in shown.err for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_one_sentence_that_names_the_command(capsys, name):
    assert main([name, "--no-such-option"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"fairref {name}: ") and message.endswith(f"see fairref {name} --help.\n")
    assert message.count("\n") == 1


def test_the_doors_lead_to_the_same_room():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    ((name, place),) = [
        script.split(" = ")
        for script in setup["options.entry_points"]["console_scripts"].strip().splitlines()
    ]
    module, function = place.split(":")
    assert name == "fairref" and getattr(import_module(module), function) is console.console
    for file, command in (("train.py", train), ("sample.py", sample)):
        assert runpy.run_path(str(ROOT / file))["main"] is command.main
