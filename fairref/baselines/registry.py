"""The baselines of --baseline, one row each: "NAME", "NAME:NUMBER", or a user's own as "file.py:name".

A baseline is a function of (case, what was fitted, prompt, images) -> (n, 3, H, W) in [-1, 1]; a user's own has no fit:
(case, prompt, images). The case holds bundle, attribute, target, noise and how images are drawn; `images` is a range of
their numbers.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fairref.baselines import coin, fair_pca, projection, uce
from fairref.baselines.case import Case
from fairref.errors import UserError
from fairref.files.own_code import OwnFunction, load_function

Fitted = dict[str, Tensor]  # what a baseline knows after its fit


@dataclass(frozen=True)
class Baseline:
    """How one draws, and what is fitted before: once an evaluation, not for each prompt."""

    images_of: Callable[[Case, Fitted, str, range], Tensor]
    # (case, number, what an interrupted fit gave last) -> better and better fits, the last one whole
    fit: Callable[[Case, float, Fitted], Iterable[Fitted]] = lambda *_: [{}]
    number: float | None = None  # where NAME:NUMBER does not say it; None: it has none
    meaning: str = ""  # of the number
    above_zero: bool = False  # of the number: 0 has no solution
    check: Callable[[Case, Sequence[str]], object] = lambda *_: None  # refuses what it can't fit or draw


BASELINES = {
    "coin": Baseline(coin.images_of, check=lambda case, prompts: [coin.texts(case, p) for p in prompts]),
    "projection": Baseline(
        projection.images_of, lambda case, number, _: [projection.fit(case, number)], 500, "lambda"
    ),
    "uce": Baseline(uce.images_of, uce.fit, 0.5, "lambda", above_zero=True, check=uce.check),
    "fair_pca": Baseline(
        fair_pca.images_of, lambda case, number, _: [fair_pca.fit(case, number)], 0.36, "scale of the noise"
    ),
}


@dataclass(frozen=True)
class Chosen:
    """What --baseline names."""

    name: str  # in reports
    baseline: Baseline | OwnFunction
    number: float | None = None


def parse_baselines(texts: Iterable[str]) -> list[Chosen]:
    """What --baseline names, each once. Raises UserError."""
    chosen = [_parse(text) for text in texts]
    names = [one.name for one in chosen]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--baseline names {name} twice; leave one out.")
    return chosen


def _parse(text):
    name, colon, number = text.partition(":")
    if name not in BASELINES:
        if ".py:" in text:
            function = load_function("--baseline", text)
            return Chosen(function.name, function)
        raise UserError(
            f"--baseline is {text!r}; expected one of {', '.join(BASELINES)}, or path/to/file.py:name of your own."
        )
    baseline = BASELINES[name]
    if not colon:
        return Chosen(name, baseline, baseline.number)
    if baseline.number is None:
        raise UserError(f"--baseline is {text!r}, but {name} has no number; leave it out.")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf") or (baseline.above_zero and not value):
        least = "above 0" if baseline.above_zero else "from 0 up"
        raise UserError(f"--baseline is {text!r}; expected {name}:NUMBER, its {baseline.meaning}, {least}.")
    return Chosen(name if value == baseline.number else f"{name}:{value:g}", baseline, value)
