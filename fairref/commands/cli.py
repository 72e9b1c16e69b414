"""What the command lines share: one sentence and exit code 2 for a user's mistake; common options; types."""

import argparse
import io
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from fairref import settings
from fairref.errors import FULL, UNUSABLE, UserError, is_of_memory, of_files
from fairref.files.paths import expanded

Main = Callable[[Sequence[str] | None], int | None]  # arguments -> exit code, None being 0


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each option's default; where it is None the help text says what that means."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Raises UserError instead of printing its usage; options are not abbreviated; --help begins with an example."""

    def __init__(self, example: str = "", **options: object):
        super().__init__(allow_abbrev=False, formatter_class=Defaults, **options)
        self.example = example

    def format_help(self) -> str:
        """The example, then argparse's help."""
        return (
            f"example: {self.example}\n\n{super().format_help()}" if self.example else super().format_help()
        )

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help.")

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """An option may be empty only if that is its default: an unset shell variable shall not leave it out."""
        found = super().parse_args(args, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            is_empty = "" in (value, *(value if isinstance(value, list) else ()))
            if action.option_strings and is_empty and action.default != "":
                self.error(f"{action.option_strings[0]} is empty")
        return found


def run(main: Main, argv: Sequence[str] | None = None) -> int:
    """The exit code of main(argv): 2 with one sentence on stderr for a UserError, a full disk, a forbidden file or too
    little memory; 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal can't show ends no run
    try:
        return main(argv) or 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("fairref."):
            raise
        folder = error.name.replace(".", "/")
        print(f"This needs {folder}, which this copy of fairref lacks; get it again.", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (*FULL, *UNUSABLE):
            raise
        print(of_files(error), file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "MemoryError"
        print(
            f"not enough memory ({reason}); take fewer images at once, in train.py by --micro-batch.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130


def add_common(parser: Parser) -> None:
    """--weights, --device and --dtype, as train.py has them."""
    settings.add_run_options(parser, ("weights", "device", "dtype"))


def add_adapters(parser: Parser) -> None:
    """--adapter, --strength and --any-base."""
    parser.add_argument(
        "--adapter",
        action="append",
        help="a run's folder or an adapter file; several add up, one a prefix at most",
    )
    parser.add_argument(
        "--strength",
        type=float,
        action="append",
        help="how much an adapter changes, 0 to 1.5; one for each --adapter, in their order, or one for all LoRAs"
        " (None: 1)",
    )
    parser.add_argument(
        "--any-base", action="store_true", help="take adapters that were made from other weights, too"
    )


def path(text: str) -> Path:
    """An argparse type: a path, as `expanded` has it."""
    try:
        return expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"is {text}, expected a number above 0")
    return value


def whole(low: int, high: int = 2**32 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number from low to high."""

    def parse(text):
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"is {value}, expected a whole number from {low} to {high}")
        return value

    parse.__name__ = "whole number"
    return parse
