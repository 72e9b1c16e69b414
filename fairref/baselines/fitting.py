"""A baseline's name -> what makes its images, fitted once an evaluation; a fit is kept in a folder."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from torch import Tensor

from fairref.baselines.case import Case
from fairref.baselines.registry import Chosen
from fairref.errors import UserError, said
from fairref.evaluation.judging import EvaluationSettings, ImageSource
from fairref.evaluation.kept import model_of
from fairref.files.own_code import OwnFunction, describe
from fairref.files.weights import finite, read, read_info, write

FORMAT = "fairref-baseline-1"  # the number grows where a baseline fits or draws otherwise than before


def fit_baseline(
    chosen: Chosen, settings: EvaluationSettings, prompts: Sequence[str] = (), folder: Path | None = None
) -> ImageSource:
    """The baseline, fitted to this evaluation; `prompts` are what it shall draw. Raises UserError.

    A fit is kept in the folder, by all that it follows from, and one that was interrupted goes on.
    """
    case, baseline = Case(settings), chosen.baseline
    made_of = _made_of(case, chosen)
    if isinstance(baseline, OwnFunction):
        images_of = partial(_own_images, case, baseline)
    else:
        for prompt in prompts:
            baseline.check(case, prompt)
        images_of = partial(baseline.images_of, case, _fitted(case, chosen, made_of, folder))

    def draw(prompt: str, images: range) -> Tensor:
        x = images_of(prompt, images)
        if not finite(x):
            raise UserError(
                f"--baseline {chosen.name}: images of {prompt!r} are no numbers; give it another number, or measure at"
                " a lower --guidance or in float32."
            )
        return x

    return ImageSource(f"baseline {chosen.name}", draw, made_of)


def _made_of(case, chosen):
    """All that the images follow from beside prompt and number, ready for JSON."""
    own = chosen.baseline if isinstance(chosen.baseline, OwnFunction) else None
    bundle, judges = case.bundle, case.bundle.own_judges.get("finetune", ())
    return {
        "format": FORMAT,
        "baseline": chosen.name.partition(":")[0] if own is None else [own.name, own.sha256],
        "number": chosen.number,
        "attribute": [case.attribute.name, case.attribute.classes, case.attribute.target],
        "model": model_of(bundle, case.settings.drawing, case.settings.seed),
        "judges": [bundle.all_fingerprints.get(key) for key in ("classifiers.finetune", "detector")],
        "own judges": [{key: v for key, v in judge.to_dict().items() if key != "path"} for judge in judges],
        "occupations": [case.occupations.train, case.explicit("X")],
    }


def _fitted(case, chosen, made_of, folder):
    """The fit, which is read from the folder, or made and kept there."""
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    file = None if folder is None else folder / f"{digest[:32]}.safetensors"
    fitted, whole = _read(file, made_of)
    processes = case.settings.processes
    processes.wait()  # or another might read what the first one writes next
    if not whole:
        before = fitted
        for fitted in chosen.baseline.fit(case, chosen.number, before):
            _write(file, fitted, made_of, False, processes.first)
        _write(file, fitted, made_of, True, processes.first)
    return fitted


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
    """A user's own function's images. Raises UserError."""
    try:
        x = function(case, prompt, images)
    except Exception as error:  # whatever a user's code does
        raise UserError(f"--baseline {function.place}: ends with {said(error)}; correct the file.") from error
    shape = (len(images), 3, case.bundle.resolution, case.bundle.resolution)
    if not isinstance(x, Tensor) or x.shape != shape or not x.is_floating_point():
        raise UserError(
            f"--baseline {function.place}: gives {describe(x)} for {len(images)} images; expected a tensor {shape} in"
            " [-1, 1]."
        )
    return x
