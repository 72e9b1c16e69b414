"""What is wrong with a reader's answer: `fairref verify --mine my_answers.py`.

Each answer is asked on a few examples and compared with the reference (examples.py); diagnosis.py says how it differs.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fairref.errors import UserError, said
from fairref.files.own_code import describe, load_file
from fairref.files.paths import expanded
from fairref.verification.diagnosis import Example, diagnosis, shown
from fairref.verification.examples import EXAMPLES
from fairref.verification.quantities import QUANTITIES

COUNT = 4  # examples
CLOSE = 1e-7  # of the largest number of a value
ROUNDED, ALMOST = (
    1e-4,
    5e-3,
)  # of the same: float32 is nearer than the first; bfloat16 and luck than the second


@dataclass(frozen=True)
class Verdict:
    """What is said of one answer."""

    name: str
    is_right: bool
    how: str = ""

    def __str__(self) -> str:
        return f"{'right' if self.is_right else 'WRONG'}  {self.name}{f': {self.how}' if self.how else ''}"


def check_answers(file: str | Path) -> list[Verdict]:
    """The verdicts on all quantities that a reader's file defines, also as A_T for A_t. It is run. Raises UserError."""
    path = expanded(file).absolute()
    if path.suffix != ".py":
        raise UserError(f"--mine is {path.name}; expected a .py file: copy a notebook's functions into one.")
    module, _ = load_file("--mine", path)
    answers = {name: getattr(module, name, None) for name in QUANTITIES}
    verdicts = [check_answer(name, answer) for name, answer in answers.items() if answer is not None]
    for name, value in vars(module).items():
        meant = next((of for of in QUANTITIES if _plain(of) == _plain(name)), name)
        if callable(value) and answers.get(meant, name) is None:
            verdicts.append(Verdict(meant, False, f"the file has '{name}'; expected the name {meant}."))
    return verdicts


def _plain(name):
    return name.replace("_", "").lower()


def check_answer(name: str, answer: Callable[..., object]) -> Verdict:
    """The verdict on one answer, a function of the arguments that the course's table gives. Raises UserError."""
    if name not in QUANTITIES:
        raise UserError(f"check_answer: '{name}' is no quantity; expected one of {', '.join(QUANTITIES)}.")
    if not callable(answer):
        return Verdict(name, False, f"it is {_described(answer)}; expected a function.")
    drawn = [EXAMPLES[name](np.random.default_rng(seed)) for seed in range(COUNT)]
    asked = [(arguments, np.asarray(expected)) for arguments, expected in drawn]
    examples = [_ask(answer, *example) for example in asked]
    why, changed = (next(filter(None, texts), "") for texts in list(zip(*examples, strict=True))[3:])
    is_right = all(example.is_close for example in examples)
    how = [why, "" if is_right else _swapped(answer, asked) or diagnosis(QUANTITIES[name], examples)]
    how.append(f"it changes its argument {changed} in place; work on a copy" if changed else "")
    return Verdict(name, is_right, "; ".join(filter(None, how)) + ("." if any(how) else ""))


def _ask(answer, arguments, expected, by_name=False):
    copies = {key: np.copy(value) if np.ndim(value) else value for key, value in arguments.items()}
    value, why = None, ""
    try:
        value = answer(**copies) if by_name else answer(*copies.values())
    except (Exception, SystemExit) as error:  # whatever a reader's function does
        why = f"it raises {said(error)} on {shown(arguments)}"
    else:
        try:
            value = _as_array(value)
        except (Exception, SystemExit) as error:  # so may a reader's object
            reason = "" if isinstance(error, TypeError) else f" ({said(error)})"
            value, why = None, f"it gives {_described(value)}; expected an array of numbers{reason}"
    changed = (key for key in copies if not np.array_equal(copies[key], arguments[key]))
    return Example(arguments, expected, value, why, next(changed, ""))


def _as_array(value):
    """Numbers of numpy, of torch, or of Python."""
    if isinstance(value, torch.Tensor):
        value = value.detach().to_dense().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(array.dtype)
    return array.astype(np.float64)


def _described(value):
    is_array = isinstance(value, np.ndarray)
    return f"an array {value.shape} of {value.dtype}" if is_array else describe(value)


def _swapped(answer, asked):
    """The answer is right, but for the order of its arguments."""
    try:
        names = list(inspect.signature(answer).parameters)
    except (TypeError, ValueError):  # what has none
        return ""
    wanted = list(asked[0][0])
    if names == wanted or sorted(names) != sorted(wanted):
        return ""
    if not all(_ask(answer, *example, by_name=True).is_close for example in asked):
        return ""
    return f"its arguments are in the order {', '.join(names)}; expected {', '.join(wanted)}"
