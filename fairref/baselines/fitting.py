"""Baselines' names -> what makes their images, fitted once an evaluation; a fit is kept in a folder."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fairref.baselines.case import Case
from fairref.baselines.registry import Chosen
from fairref.errors import UserError, said
from fairref.evaluation.judging import EvaluationSettings, ImageSource
from fairref.evaluation.kept import judges_of, model_of, read_kept
from fairref.files.own_code import OwnFunction, describe
from fairref.files.weights import finite, read_info, write

FORMAT = "fairref-baseline-1"  # the number grows where a baseline fits or draws otherwise than before
FITTED_BY = ("classifiers.finetune", "detector")  # parts of a bundle that look at images in a fit


def fit_baselines(
    chosen: Sequence[Chosen],
    settings: EvaluationSettings,
    prompts: Sequence[str] = (),
    folder: Path | None = None,
) -> tuple[ImageSource, ...]:
    """The baselines, fitted to this evaluation; `prompts` are what they shall draw. Raises UserError, before the first
    is fitted.

    A fit is kept in the folder, by all that it follows from, and one that was interrupted goes on.
    """
    case = Case(settings)
    for one in chosen:
        if not isinstance(one.baseline, OwnFunction):
            one.baseline.check(case, prompts)
    return tuple(_fit(case, one, folder) for one in chosen)


def _fit(case, chosen, folder):
    made_of = _made_of(case, chosen)
    if isinstance(chosen.baseline, OwnFunction):
        draw = partial(_own_images, case, chosen.baseline)
    else:
        draw = partial(_images, case, chosen, _fitted(case, chosen, made_of, folder))
    return ImageSource(f"baseline {chosen.name}", draw, made_of)


def _made_of(case, chosen):
    """All that the images follow from beside prompt and number, ready for JSON; None where that can't be told."""
    own = chosen.baseline if isinstance(chosen.baseline, OwnFunction) else None
    judges = judges_of(case.bundle, FITTED_BY)
    return judges and {
        "format": FORMAT,
        "baseline": chosen.name.partition(":")[0] if own is None else [own.name, own.sha256],
        "number": chosen.number,
        "attribute": [case.attribute.name, case.attribute.classes, case.attribute.target],
        "model": model_of(case.bundle, case.settings.drawing, case.settings.seed),
        "judges": judges,
        "occupations": [case.occupations.train, case.explicit("X")],
    }


def _fitted(case, chosen, made_of, folder):
    """The fit, which is read from the folder, or made and kept there."""
    info = json.loads(json.dumps({"made_of": made_of}))
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    file = folder / f"{digest[:32]}.safetensors" if folder and made_of else None
    fitted = (read_kept(file, info, "it is fitted again") if file else None) or {}
    processes = case.settings.processes
    # as far as all processes have it; after this none reads what the first one writes
    some, whole = processes.least([bool(fitted), bool(fitted and read_info(file)["whole"])])
    if whole:
        return fitted
    before = fitted if some else {}
    for fitted in chosen.baseline.fit(case, chosen.number, before):
        _write(file, fitted, {**info, "whole": False}, processes.first)
    _write(file, fitted, {**info, "whole": True}, processes.first)
    return fitted


def _write(file, fitted, info, first):
    if file is not None and first and fitted:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, fitted, info)


def _images(case, chosen, fitted, prompt, images):
    """A fitted baseline's images. Raises UserError."""
    x = chosen.baseline.images_of(case, fitted, prompt, images)
    if not finite(x):
        raise UserError(
            f"--baseline {chosen.name}: images of {prompt!r} are no numbers; give it another number, or measure at a"
            " lower --guidance or in float32."
        )
    return x


def _own_images(case, function, prompt, images):
    """A user's own function's images. Raises UserError."""
    try:
        x = function(case, prompt, images)
    except (Exception, SystemExit) as error:  # whatever a user's code does
        raise UserError(f"--baseline {function.place}: ends with {said(error)}; correct the file.") from error
    shape = (len(images), 3, case.bundle.resolution, case.bundle.resolution)
    if not isinstance(x, Tensor) or x.shape != shape or not x.is_floating_point():
        raise UserError(
            f"--baseline {function.place}: gives {describe(x)} for {len(images)} images; expected a tensor {shape} in"
            " [-1, 1]."
        )
    low, high = (float(end) for end in torch.aminmax(x))
    if not -1 <= low <= high <= 1:
        raise UserError(
            f"--baseline {function.place}: gives values from {low:g} to {high:g} for {prompt!r}; expected numbers in"
            " [-1, 1]: correct the file."
        )
    return x
