"""The baselines of --baseline, one row each: "NAME", "NAME:NUMBER", or a user's own as "file.py:name"."""

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fairref.baselines import coin, fair_pca, projection, uce
from fairref.baselines.case import Case
from fairref.errors import UserError, said
from fairref.evaluation.judging import EvaluationSettings
from fairref.files.own_code import OwnFunction, describe, load_function
from fairref.files.weights import read, read_info, write

Draw = Callable[[str, range], Tensor]  # a prompt and which of its images -> (n, 3, H, W) in [-1, 1]
Fitted = dict[str, Tensor]  # what a baseline knows after its fit


@dataclass(frozen=True)
class Baseline:
    """How one draws, and what is fitted before: once an evaluation, not for each prompt."""

    images_of: Callable[[Case, Fitted, str, range], Tensor]
    # (case, number, what an interrupted fit gave last) -> better and better fits, the last one whole
    fit: Callable[[Case, float, Fitted], Iterable[Fitted]] = lambda *_: [{}]
    number: float | None = None  # where NAME:NUMBER does not say it; None: it has none
    meaning: str = ""  # of the number


BASELINES = {
    "coin": Baseline(coin.images_of),
    "projection": Baseline(
        projection.images_of, lambda case, number, _: [projection.fit(case, number)], 500, "lambda"
    ),
    "uce": Baseline(uce.images_of, uce.fit, 0.5, "lambda"),
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
    if not 0 <= value < float("inf"):
        raise UserError(f"--baseline is {text!r}; expected {name}:NUMBER, its {baseline.meaning}, from 0 up.")
    return Chosen(name if value == baseline.number else f"{name}:{value:g}", baseline, value)


def prepare(chosen: Chosen, settings: EvaluationSettings, cache: Path | None = None) -> Draw:
    """What draws as the baseline does, fitted to this evaluation. Raises UserError.

    A fit is kept in the folder `cache`, by all that it depends on, and one that was interrupted goes on.
    """
    case, baseline = Case(settings), chosen.baseline
    if isinstance(baseline, OwnFunction):
        return partial(_own_images, case, baseline)
    made_of = _made_of(case, chosen)
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    file = cache / f"{chosen.name.partition(':')[0]}-{digest[:16]}.safetensors" if cache else None
    before, whole = _read(file, made_of)
    settings.processes.wait()  # or another might read what the first one writes next
    fitted = before
    for fitted in () if whole else baseline.fit(case, chosen.number, before):
        _write(file, fitted, made_of, False, settings.processes.first)
    if not whole:
        _write(file, fitted, made_of, True, settings.processes.first)
    return partial(baseline.images_of, case, fitted)


def _made_of(case, chosen):
    """All that a fit depends on, ready for JSON."""
    bundle, settings = case.bundle, case.settings
    return {
        "baseline": chosen.name,
        "number": chosen.number,
        "attribute": [case.attribute.name, case.attribute.classes, case.attribute.target],
        "parts": bundle.all_fingerprints,
        "own judges": {
            role: [{key: said for key, said in own.to_dict().items() if key != "path"} for own in of_role]
            for role, of_role in bundle.own_judges.items()
        },
        "drawing": settings.drawing,
        "seed": settings.seed,
        "occupations": case.occupations.train,
        "explicit": case.explicit("X"),
    }


def _read(file, made_of):
    """A kept fit, and whether it is whole; a broken file counts as none."""
    with suppress(UserError):
        if file is not None and file.is_file():
            tensors, info = read(file), read_info(file)
            if info.get("made_of") == json.loads(json.dumps(made_of)):
                return tensors, bool(info["whole"])
    return {}, False


def _write(file, fitted, made_of, whole, first):
    if file is not None and first and fitted:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, fitted, {"made_of": made_of, "whole": whole})


def _own_images(case, function, prompt, images):
    """A user's own function's images, checked. Raises UserError."""
    try:
        with torch.no_grad():
            x = function(case, prompt, images)
    except Exception as error:  # whatever a user's code does
        raise UserError(f"--baseline {function.place}: ends with {said(error)}; correct the file.") from error
    side = case.bundle.resolution
    if not isinstance(x, Tensor) or x.shape != (len(images), 3, side, side) or not x.is_floating_point():
        raise UserError(
            f"--baseline {function.place}: gives {describe(x)} for {len(images)} images; expected"
            f" {(len(images), 3, side, side)} in [-1, 1]."
        )
    return x
