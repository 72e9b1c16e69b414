"""How a reader's answer differs from the reference.

Its values are compared with what the reference becomes when one of its parts is changed, or two: left out, of the next
index, of another sign, replaced by another quantity, ... The first change that gives the reader's values on all
examples says how the answer is wrong. Where none does, it is said where the values differ: a wrong reason is worse.
"""

from itertools import product
from typing import NamedTuple

import numpy as np

from fairref.errors import said
from fairref.verification.changes import RESULT, Apart, candidates, pairs
from fairref.verification.quantities import Quantity

CLOSE = 1e-7  # of the largest number of a value
ROUNDED, ALMOST = (
    1e-4,
    5e-3,
)  # of the same: float32 is nearer than the first; bfloat16 and luck than the second


class Example(NamedTuple):
    """What an answer was asked, and what it gave."""

    arguments: dict[str, np.ndarray]
    expected: np.ndarray
    value: np.ndarray | None  # None: no numbers
    why: str = ""  # there are none
    changed: str = ""  # the argument that it changed in place

    @property
    def is_close(self) -> bool:
        """The value is right."""
        return _is_close(self.value, self.expected)


def shown(arguments: dict[str, np.ndarray]) -> str:
    """Shapes and numbers of arguments."""
    return ", ".join(f"{key} {np.shape(value) or format(value, '.4g')}" for key, value in arguments.items())


def diagnosis(quantity: Quantity, examples: list[Example]) -> str:
    """How the values of an answer come about, or where they first differ. It never costs another answer's."""
    examples = [example for example in examples if example.value is not None]
    wrong = [example for example in examples if not example.is_close]
    if not wrong:
        return ""
    try:
        how = _misshapen(examples, wrong) or _explained(quantity, examples, wrong) or _where(wrong[0])
    except Exception as error:
        how = f"it is wrong, and looking for the reason ended in {said(error)}"
    if len(wrong) == len(examples) or how.startswith("it is right"):
        return how
    right = f"it is right on {len(examples) - len(wrong)} of {len(examples)} examples"
    return f"{right} and wrong on {shown(wrong[0].arguments)}: {how}"


def _misshapen(examples, wrong):
    """The first that has another shape, or what is no number."""
    for _, expected, value, *_ in wrong:
        if value.shape != expected.shape:
            return f"it has the shape {value.shape}; expected {expected.shape}{_of_shape(examples)}"
    for _, expected, value, *_ in wrong:
        for place in map(tuple, np.argwhere(~np.isfinite(value))):
            return f"it is {value[place]} at index {_index(place)}; expected {expected[place]:.4g}"
    return ""


def _explained(quantity, examples, wrong):
    """The first change that gives the answer's values, or the factor that is wrong, or how near they are."""
    if near := _nearness(examples, ROUNDED):
        return f"{near}: rounded, or computed in float32 (torch's own)? Use float64"
    with np.errstate(all="ignore"):
        aparts = [Apart(quantity, example.arguments) for example in examples]

    def is_it(changes):
        return all(
            _is_close(example.value, apart.value(changes))
            for apart, example in zip(aparts, examples, strict=True)
        )

    with np.errstate(all="ignore"):
        for changes in filter(is_it, candidates(aparts[0])):
            return _said(changes)
        if factor := _factor(examples):
            return factor
        # two changes explain too easily what is wrong at one place
        if not all(_wrong_rows(example).sum() == 1 for example in wrong):
            for changes in filter(is_it, pairs(aparts[0])):
                return _said(changes)
    if near := _nearness(examples, ALMOST):
        return f"{near}: perhaps rounded, of low precision, or drawn at random"
    return _proportion(examples)


def _said(changes):
    first, *more = changes
    if more and (first.part, first.by) == (more[0].by, more[0].part):
        return f"it is right but for this: {first.part} and {first.by} are swapped"
    if first.part == RESULT and first.by and not first.power and (not more or more[0].part == RESULT):
        return f"it is {first.by}{', with the wrong sign' if more else ''}"
    if first.part == RESULT and not more:
        return f"{first}"
    return f"it is right but for this: {' and '.join(map(str, changes))}"


def _of_shape(examples):
    """What else may be said of an answer of another shape."""
    if any(example.value.size == 0 for example in examples):
        return ""
    for words, change in {
        "its axes are in another order": lambda x: x.T,
        "it has an axis too many": np.squeeze,
        "it was not summed over the first axis": lambda x: x.sum(0),
        "its sign is the other one, and it was not summed over the first axis": lambda x: -x.sum(0),
        "it was not averaged": np.mean,
        "it was not summed": np.sum,
        "it has an entry too many, the first": lambda x: x[1:],
    }.items():
        if all(of.value.ndim and _is_close(np.asarray(change(of.value)), of.expected) for of in examples):
            return f" ({words})"
    return ""


def _nearness(examples, limit):
    if not all(_is_close(example.value, example.expected, limit) for example in examples):
        return ""
    error = max(np.abs(of.value - of.expected).max() / np.abs(of.expected).max() for of in examples)
    return f"it is right to {error:.0e} of its largest number"


def _ratios(example, least=1):
    """The one ratio of a value to what it should be; None where there are several, or fewer than `least` numbers."""
    known = np.abs(example.expected) > CLOSE * np.abs(example.expected).max()
    ratios = example.value[known] / example.expected[known]
    if _off(example)[~known].any() or len(ratios) < least:
        return None
    return ratios[0] if np.ptp(ratios) <= CLOSE * np.abs(ratios).max() else None


def _factor(examples):
    """A factor that is the same everywhere in a value: a number, or one of the sizes."""
    ratios = [_ratios(example) for example in examples]
    if None in ratios:
        return ""
    if np.ptp(ratios) <= CLOSE * abs(ratios[0]):
        return f"it is {ratios[0]:.6g} times what it should be"
    sizes = [{n for of in example.arguments.values() for n in np.shape(of) if n > 1} for example in examples]
    for number, power, of_less in sorted(product((1, 2, 0.5), (1, -1, 2, -2), (0, 1, -1)), key=_size):
        if all(
            any(abs(r / (number * n**power * (n - 1.0) ** of_less) - 1) < CLOSE for n in of)
            for r, of in zip(ratios, sizes, strict=True)
        ):
            factors = ((number, 1), ("n", power), ("(n - 1)", of_less))
            words = " ".join(f"{x}{f'^{e}' if e != 1 else ''}" for x, e in factors if e and x != 1)
            why = (
                ": a sum for a mean, or a mean for a sum"
                if (number, of_less) == (1, 0) and abs(power) == 1
                else ""
            )
            return f"it is {words} times what it should be, n the length of an axis{why}"
    return ""


def _size(exponents):
    number, power, of_less = exponents
    return abs(number != 1) + abs(power) + abs(of_less)


def _proportion(examples):
    """A factor that is another one on each example."""
    ratios = [_ratios(example, least=3) for example in examples]
    if None in ratios or 0 in ratios:
        return ""
    return f"it is right up to a common factor, which is wrong: {ratios[0]:.4g} on the first example"


def _where(example):
    """Where an answer differs that no change explains."""
    _, expected, value, *_ = example
    end = "and no change that was tried explains it"
    if expected.ndim == 0:
        return f"it is {value:.6g}; expected {expected:.6g}, {end}"
    first, rows = tuple(np.argwhere(_off(example))[0]), _wrong_rows(example)
    where = f"{rows.sum()} of {len(rows)} rows are wrong (index {', '.join(map(str, np.flatnonzero(rows)))})"
    return (
        f"{where}; at index {_index(first)} it is {value[first]:.6g}, expected {expected[first]:.6g}, {end}"
    )


def _off(example):
    return np.abs(example.value - example.expected) > CLOSE * np.abs(example.expected).max()


def _wrong_rows(example):
    """(rows,) bool; a number has no rows."""
    return _off(example).reshape(len(example.value), -1).any(1) if example.value.ndim else np.zeros(0, bool)


def _index(place):
    return ", ".join(map(str, map(int, place)))


def _is_close(value, expected, limit=CLOSE):
    if value is None or expected is None or value.shape != expected.shape:
        return False
    if not (np.isfinite(value) & np.isfinite(expected)).all():
        return False
    return bool(np.abs(value - expected).max() <= limit * max(np.abs(expected).max(), CLOSE))
