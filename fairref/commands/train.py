"""fairref train: finetune a bundle."""

from collections.abc import Sequence
from dataclasses import fields

from fairref import settings
from fairref.commands import cli
from fairref.training.run import run


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
    run(options, given)
