"""What the command lines share: what an error says and its exit code; streams that outlive their reader; types."""

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from fairref import settings
from fairref.errors import UserError, explain, is_debugging
from fairref.files.paths import expanded

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # a reader, a terminal, or none from the start
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
            if value == [] or (
                isinstance(value, list) and [] in value
            ):  # what some versions of argparse make of --option=--
                self.error(f"{(action.option_strings or [action.dest])[0]} is '--', expected a value")
        return found


class Stream(io.FileIO):
    """stdout or stderr. What nobody reads any more is dropped: a run shall not end because its terminal has gone."""

    lost: OSError | None = None  # why its text is dropped

    def write(self, data: bytes) -> int:
        """Writes the bytes, or drops them."""
        if self.lost is None:
            try:
                return super().write(data)
            except OSError as error:
                self.lost = error
        return len(data)


def keep_streams() -> None:
    """Puts a Stream in the place of the process's own stdout and stderr; one that is closed takes nothing."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        if old is not getattr(sys, f"__{name}__"):
            continue  # somebody else's, or a Stream already
        if old is None:
            raw = Stream(os.devnull, "wb")
            raw.lost = OSError(errno.EBADF, os.strerror(errno.EBADF))
        else:
            old.flush()
            raw = Stream(descriptor, "wb", closefd=False)
        encoding, by_line = getattr(old, "encoding", "utf-8"), name == "stderr" or raw.isatty()
        new = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=by_line)
        setattr(sys, name, new)


def lost_stdout() -> OSError | None:
    """Why what is printed reaches nobody; None where it does."""
    sys.stdout.flush()
    return getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "lost", None)


def run(main: Main, argv: Sequence[str] | None = None) -> int:
    """The exit code of main(argv): 2 with one sentence on stderr for a user's mistake, 1 for a defect, 130 after
    Ctrl-C. With FAIRREF_DEBUG=1 errors keep their traceback."""
    keep_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal can't show ends no run
    try:
        code = main(argv) or 0
    except KeyboardInterrupt as stop:
        code = 130
        print(str(stop) or "interrupted", file=sys.stderr)
    except Exception as error:
        if is_debugging():
            raise
        code, sentence = explain(error)
        print(sentence, file=sys.stderr)
    lost = lost_stdout()
    if lost and lost.errno not in GONE:
        print(f"stdout: can't be written ({lost.strerror}); what was printed is lost.", file=sys.stderr)
        return code or 2
    return code


def add_common(parser: Parser) -> None:
    """--weights, --device and --dtype, as train.py has them."""
    settings.add_run_options(parser, ("weights", "device", "dtype"))


def add_adapters(parser: Parser) -> None:
    """--adapter, --strength and --any-base."""
    parser.add_argument(
        "--adapter",
        action="append",
        help="a run's folder or an adapter file; several add up, one a soft prompt at most",
    )
    parser.add_argument(
        "--strength",
        type=float,
        action="append",
        help="how much an adapter changes, 0 to 1.5; one for each --adapter, in their order, or one for all LoRAs"
        " (None: 1)",
    )
    add_any_base(parser)


def add_any_base(parser: Parser) -> None:
    """--any-base."""
    parser.add_argument(
        "--any-base", action="store_true", help="go on where an adapter was made from other weights"
    )


def path(text: str) -> Path:
    """An argparse type: a path, as `expanded` has it."""
    try:
        return expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None


def positive(high: float) -> Callable[[str], float]:
    """An argparse type: a number above 0, at most `high`."""

    def parse(text):
        value = float(text)
        if not 0 < value <= high:
            raise argparse.ArgumentTypeError(f"is {text}, expected a number above 0, at most {high:g}")
        return value

    parse.__name__ = "number"
    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from low to high."""

    def parse(text):
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"is {text}, expected a number from {low:g} to {high:g}")
        return value

    parse.__name__ = "number"
    return parse


def whole(low: int, high: int = 2**32 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number from low to high."""

    def parse(text):
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"is {value}, expected a whole number from {low} to {high}")
        return value

    parse.__name__ = "whole number"
    return parse
