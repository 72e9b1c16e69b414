"""fairref train: finetune a bundle."""

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from fairref import settings
from fairref.commands import cli
from fairref.errors import explain
from fairref.training.run import run

REPORT = "report.html"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = cli.Parser(
        prog="fairref train",
        description="Finetune an adapter for fairness with the adjusted gradient.",
        example="fairref train --attr gender",
    )
    settings.add_run_options(parser)
    settings.add_recipe_options(
        parser.add_argument_group("recipe", "what is not given is the bundle's, or else SD-1.5's")
    )
    given = vars(parser.parse_args(argv))
    options = settings.RunOptions(**{f.name: given.pop(f.name) for f in fields(settings.RunOptions)})
    folder = run(options, given)
    if os.environ.get("RANK", "0") == "0":  # the first of torchrun's processes
        _write_report(folder)


def _write_report(folder: Path) -> None:
    """The page on the run, in its folder. One that can't be made is no fault of the run, which is finished."""
    try:
        from fairref.reporting.report import write_report

        print(f"read what it measured: {write_report([folder], folder / REPORT)}")
    except Exception as error:
        print(f"the run is finished, but has no {REPORT}: {explain(error)[1]}", file=sys.stderr)
