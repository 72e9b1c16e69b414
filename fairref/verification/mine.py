"""What is wrong with a reader's answer: `fairref verify --mine my_answers.py`.

An answer's values are compared with those of the reference, then with what the reference becomes when one of its
parts is changed, or two: left out, of the next index, of another sign, replaced by another quantity, ... The first
change that gives the reader's values on all examples says how the answer is wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch

from fairref.errors import said
from fairref.files.own_code import describe, load_file
from fairref.files.paths import expanded
from fairref.verification.changes import RESULT, Apart, candidates
from fairref.verification.quantities import QUANTITIES

EXAMPLES = 4
CLOSE = 1e-7  # of the largest number of a value


@dataclass(frozen=True)
class Verdict:
    """What is said of one answer."""

    name: str
    is_right: bool
    how: str = ""

    def __str__(self) -> str:
        return f"{'right' if self.is_right else 'WRONG'}  {self.name}{f': {self.how}' if self.how else ''}"


def check_answers(file: str | Path) -> list[Verdict]:
    """The verdicts on all quantities that a reader's file defines. The file is run. Raises UserError."""
    module, _ = load_file("--mine", expanded(file).absolute())
    answers = {name: getattr(module, name, None) for name in QUANTITIES}
    return [check_answer(name, answer) for name, answer in answers.items() if callable(answer)]


def check_answer(name: str, answer: Callable[..., object]) -> Verdict:
    """The verdict on one answer, a function of the arguments that the course's table gives."""
    examples, values = [], []
    for seed in range(EXAMPLES):
        arguments, expected = QUANTITIES[name].example(np.random.default_rng(seed))
        examples.append((arguments, np.asarray(expected)))
    changed = raised = ""
    for arguments, _ in examples:
        copies = {key: np.copy(value) if np.ndim(value) else value for key, value in arguments.items()}
        try:
            value = answer(*copies.values())
        except Exception as error:  # whatever a reader's function does
            raised = f"it raises {said(error)} on {_shown(arguments)}"
            values.append(None)
            continue
        try:
            values.append(_as_array(value))
        except TypeError as error:
            return Verdict(name, False, f"{error}.")
        changed = changed or next(
            (key for key in copies if not np.array_equal(copies[key], arguments[key])), ""
        )
    if all(value is None for value in values):
        return Verdict(name, False, f"{raised}.")
    pairs = [(*example, value) for example, value in zip(examples, values, strict=True) if value is not None]
    is_right = all(_is_close(value, expected) for _, expected, value in pairs)
    how = [raised, "" if is_right else _diagnosis(QUANTITIES[name], pairs)]
    how.append(f"it changes its argument {changed} in place; work on a copy" if changed else "")
    return Verdict(name, is_right and not raised, "; ".join(filter(None, how)) + ("." if any(how) else ""))


def _as_array(value):
    """Numbers of numpy, of torch, or of Python. Raises TypeError."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError:  # rows of several lengths
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"it gives {describe(value)}; expected an array of numbers")
    return array.astype(np.float64)


def _shown(arguments):
    return ", ".join(f"{key} {np.shape(value) or value}" for key, value in arguments.items())


def _is_close(value, expected):
    if (
        expected is None
        or value.shape != expected.shape
        or not (np.isfinite(value) & np.isfinite(expected)).all()
    ):
        return False
    return bool(np.abs(value - expected).max() <= CLOSE * max(np.abs(expected).max(), CLOSE))


def _diagnosis(quantity, pairs):
    """How the values of an answer come about, or where they first differ."""
    _, expected, value = pairs[0]
    if value.shape != expected.shape:
        return f"it has the shape {value.shape}; expected {expected.shape}{_of_shape(pairs)}"
    places = np.argwhere(~np.isfinite(value))
    if len(places):
        place = tuple(places[0])
        return f"it is {value[place]} at index {_index(place)}; expected {expected[place]:.4g}"
    examples = [(Apart(quantity, arguments), value) for arguments, _, value in pairs]
    at_one_place = all(_wrong_rows(*pair[1:]).sum() == 1 for pair in pairs)
    with np.errstate(all="ignore"):
        for changes in candidates(examples[0][0]):
            if len(changes) > 1 and at_one_place:
                break  # two changes explain too easily what is wrong at one place
            if all(_is_close(value, apart.value(changes)) for apart, value in examples):
                return _said(changes)
    return _factor(pairs) or _where(expected, value)


def _said(changes):
    first, *more = changes
    if first.part == RESULT and first.by and not more:
        return f"it is {first.by}"
    return f"it is right but for this: {' and '.join(map(str, changes))}"


def _of_shape(pairs):
    """What else may be said of an answer of another shape."""
    for words, change in {
        "its axes are in another order": lambda x: x.T,
        "it was not summed over the first axis": lambda x: x.sum(0),
        "it has an axis too many": np.squeeze,
        "its sign is the other one, and it was not summed over the first axis": lambda x: -x.sum(0),
        "it was not averaged": np.mean,
        "it was not summed": np.sum,
    }.items():
        if all(value.ndim and _is_close(np.asarray(change(value)), expected) for _, expected, value in pairs):
            return f" ({words})"
    return ""


def _factor(pairs):
    """A factor that is the same everywhere in a value: a number, or one of the sizes."""
    ratios = []
    for _, expected, value in pairs:
        known = np.abs(expected) > CLOSE * np.abs(expected).max()
        ratio = (value[known] / expected[known]).ravel()
        if len(ratio) == 0 or np.ptp(ratio) > CLOSE * np.abs(ratio).max():
            return ""
        ratios.append(ratio[0])
    if np.ptp(ratios) <= CLOSE * abs(ratios[0]):
        return f"it is {ratios[0]:.6g} times what it should be"
    sizes = [{n for of in arguments.values() for n in np.shape(of) if n > 1} for arguments, _, _ in pairs]
    for number, power, of_less in sorted(product((1, 2, 0.5), (1, -1, 2, -2), (0, 1, -1)), key=_size):
        if all(
            any(abs(r / (number * n**power * (n - 1.0) ** of_less) - 1) < CLOSE for n in of)
            for r, of in zip(ratios, sizes, strict=True)
        ):
            factors = ((number, 1), ("n", power), ("(n - 1)", of_less))
            words = " ".join(f"{x}{f'^{e}' if e != 1 else ''}" for x, e in factors if e and x != 1)
            return f"it is {words} times what it should be, n the length of an axis: a sum for a mean, or the reverse?"
    return ""


def _size(exponents):
    number, power, of_less = exponents
    return abs(number != 1) + abs(power) + abs(of_less)


def _where(expected, value):
    """Where an answer differs that no change explains."""
    if expected.ndim == 0:
        return f"it is {value:.6g}; expected {expected:.6g}, and no change of one or two parts explains it"
    off, rows = _off(expected, value), _wrong_rows(expected, value)
    first = tuple(np.argwhere(off)[0])
    where = f"{rows.sum()} of {len(rows)} rows are wrong (index {', '.join(map(str, np.flatnonzero(rows)))})"
    return (
        f"{where}; at index {_index(first)} it is {value[first]:.6g}, expected {expected[first]:.6g}, and no change of"
        " one or two parts explains it"
    )


def _off(expected, value):
    return np.abs(value - expected) > CLOSE * np.abs(expected).max()


def _wrong_rows(expected, value):
    """(rows,) bool; a number has no rows."""
    return _off(expected, value).reshape(len(value), -1).any(1) if value.ndim else np.zeros(0, bool)


def _index(place):
    return ", ".join(map(str, map(int, place)))
