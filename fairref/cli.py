"""What the command lines share: one sentence and exit code 2 for a user's mistake, the device, the dtype."""

import argparse
import errno
import io
import math
import sys
from pathlib import Path

import torch

from fairref.errors import UserError
from fairref.weights_io import expanded

WEIGHTS = "weights/emoji"  # the default bundle
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNUSABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each option's default; where it is None the help text says what that means."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Raises UserError instead of printing its usage; options are not abbreviated."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=Defaults, **options)

    def error(self, message):
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help.")

    def parse_args(self, args=None, namespace=None):
        """An option may be empty only if that is its default: an unset shell variable shall not leave it out."""
        found = super().parse_args(args, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if action.option_strings and "" in (value, *(value if isinstance(value, list) else ())):
                if action.default != "":
                    self.error(f"{action.option_strings[0]} is empty")
        return found


def run(main, argv=None) -> int:
    """The exit code of main(argv), None being 0; 2 with one sentence on stderr for a UserError, a full disk, a forbidden
    file or too little memory; 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal can't show ends no run
    try:
        return main(argv) or 0
    except UserError as error:
        print(error, file=sys.stderr)
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


def of_files(error: OSError) -> str:
    """The sentence for a full disk, or for a file that may not be read or written."""
    if error.errno in FULL:
        return f"{error.filename or 'a file'}: can't be written ({error.strerror}); make room."
    why = f"can't be read or written ({error.strerror})"
    return f"{error.filename or 'a file'}: {why}; change its permissions or choose another place."


def is_of_memory(error: Exception) -> bool:
    """Whether there was not enough of it, on the device or here."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def add_common(parser: Parser, ask: bool = False) -> None:
    """--weights, --device and --dtype; where one must `ask` whether weights and dtype were given, theirs is None."""
    weights, dtype = "bundle, diffusers-layout folder or single file", "what the networks compute in"
    weights, dtype = (f"{weights} (None: {WEIGHTS})", f"{dtype} (None: float32)") if ask else (weights, dtype)
    parser.add_argument("--weights", default=None if ask else WEIGHTS, help=weights)
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: cuda where there is one"
    )
    parser.add_argument("--dtype", default=None if ask else "float32", choices=DTYPES, help=dtype)


def device(name: str) -> torch.device:
    """The torch device of an option's value, on which float32 is float32. Raises UserError."""
    # torch's default for convolutions, of 10 bits; matrix products have none
    torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device is {name!r}; expected cpu, cuda or cuda:NUMBER.") from None
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {name!r}; expected cpu, cuda or cuda:NUMBER.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device is {name!r} but torch finds {torch.cuda.device_count()} GPUs; use cpu.")
    return found


def warn_of_cut(tokenizer, prompts: list[str], prefix: int = 0) -> None:
    """Says on stderr that prompts, with `prefix` soft tokens before them, are longer than the tokenizer takes."""
    ends = [end for end in tokenizer.cut(prompts, prefix) if end]
    if len(ends) == 1:
        print(f"warning: a prompt is too long, its end is not used: {ends[0]!r}", file=sys.stderr)
    elif ends:
        print(
            f"warning: {len(ends)} prompts are too long, their ends are not used, as in: {ends[0]!r}",
            file=sys.stderr,
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


def whole(low: int, high: int = 2**32 - 1):
    """An argparse type: a whole number from low to high."""

    def parse(text):
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"is {value}, expected a whole number from {low} to {high}")
        return value

    parse.__name__ = "whole number"
    return parse
