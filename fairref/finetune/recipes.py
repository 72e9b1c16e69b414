"""The numbers of a finetuning run: docs/method.md §6, overridden by the bundle's, then by the user's."""

import argparse
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from fairref.errors import UserError

CHOICES = {
    "component": ("prefix", "text_encoder", "unet", "both"),
    "end": ("zero", "sigma_min"),
    "gradient": ("paper", "solver", "none", "exact"),
    "face_reference": ("original", "nearest"),
    "evaluate": ("both", "best", "ema", "raw", "none"),
}


LARGEST = 2**32 - 1  # whole number
MOST = 65_536  # images, prompts or widths that memory may hold


class Range(NamedTuple):
    """What is drawn anew at each iteration, from low to high."""

    low: float
    high: float


Shares = float | dict  # one number for every attribute, or attribute -> number


def read_range(value) -> Range:
    """7.5, "19:23" or [19, 23] as a Range; a number is both ends. Raises ValueError."""
    ends = (
        value.split(":") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    )
    if not 1 <= len(ends) <= 2:
        raise ValueError(value)
    return Range(*map(_number, (ends[0], ends[-1])))


def read_shares(value) -> Shares:
    """0.2, "gender=0.2,race=0.6" or an object of the same as Shares. Raises ValueError."""
    if isinstance(value, str) and "=" in value:
        value = dict(pair.split("=") for pair in value.split(","))
    if isinstance(value, dict):
        return {str(name).strip(): float(_number(share)) for name, share in value.items()}
    return float(_number(value))


def _number(value):
    """A whole number stays whole. Raises ValueError."""
    if isinstance(value, str):
        return int(value) if value.strip().isdigit() else float(value)
    if type(value) not in (int, float):
        raise ValueError(value)
    return value


READERS = {Range: read_range, Shares: read_shares}  # of the types that a text can hold


def setting(default, explanation, low=0, high=math.inf, above=-math.inf, below=math.inf):
    """A field with its one-line explanation, which is also its option's help text, and the range of its numbers."""
    limits = {"low": low, "high": high, "above": above, "below": below}
    return field(default=default, metadata={"help": explanation, **limits})


@dataclass(frozen=True)
class Recipe:
    """Settings of one run; the defaults are the source's gender run on SD-1.5. Raises UserError."""

    seed: int = setting(
        0,
        "of the noise, the order of prompts, the step counts and the adapter's first values",
    )
    iterations: int = setting(10_000, "optimizer steps, one prompt each", low=1)
    batch: int = setting(24, "N, images of one prompt, over all processes", low=1, high=MOST)
    group: int = setting(
        1,
        "consecutive prompts of the list that an epoch's order keeps together: where they lean opposite ways, "
        "what they have in common cancels",
        low=1,
    )
    named_every: int = setting(
        0,
        "every so many iterations the prompt names a class, which is then the whole target, so that such prompts "
        "still get it; 0: never",
    )
    C: float = setting(0.8, "images with a target less certain than this have no L_align (eq 6)", high=1)
    lambda_img: float = setting(8.0, "lambda_img,1: weight of L_img (eq 7) where target and original agree")
    lambda_2: Shares = setting(
        0.2,
        "lambda_2 / lambda_1: share of that weight where they disagree; or by attribute: gender=0.2,race=0.6",
        high=1,
    )
    lambda_3: Shares = setting(
        0.2, "lambda_3 / lambda_2: the same inside the face, where they disagree; or by attribute", high=1
    )
    lambda_face: float = setting(1.0, "weight of L_face; 0: none")
    face_reference: str = setting(
        "original",
        "whom L_face makes a face like where target and original surely agree: original, or nearest of the external"
        " faces as everywhere else",
    )
    component: str = setting(
        "text_encoder",
        "what is trained: prefix (soft tokens before the prompt), or LoRA on text_encoder, unet or both",
    )
    rank: int = setting(50, "rank of the LoRA matrices", low=1, high=MOST)
    tokens: int = setting(5, "soft tokens of the prefix", low=1, high=MOST)
    lr: float = setting(5e-5, "AdamW's learning rate")
    lr_end: float = setting(
        1.0, "share of lr at the last iteration, reached along a cosine; 1 is constant", high=1
    )
    warmup: int = setting(0, "iterations over which lr rises linearly")
    beta_1: float = setting(0.9, "AdamW's decay of the mean gradient", below=1)
    beta_2: float = setting(0.999, "AdamW's decay of the mean squared gradient", below=1)
    adam_eps: float = setting(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = setting(1e-2, "AdamW's weight decay")
    clip: float = setting(100.0, "largest norm of the gradient; a longer one is shortened to it; 0: no limit")
    ema: float = setting(
        0.996, "decay of the adapter's moving average, at most (1 + i) / (10 + i) at iteration i", high=1
    )
    steps: Range = setting(
        Range(19, 23), "sampling steps S, or a range from which each iteration draws, as 19:23"
    )
    guidance: Range = setting(
        Range(7.5, 7.5),
        "classifier-free guidance scale s, or a range from which each iteration draws, as 1:12",
    )
    end: str = setting("zero", "end of the solver: zero or sigma_min")
    gradient: str = setting(
        "paper", "weights of the steps in the adjusted gradient: paper, solver or none; or the exact gradient"
    )
    grad_steps: int = setting(
        0, "steps drawn for the adjusted gradient, which stays unbiased; 0: all of them"
    )
    micro_batch: int = setting(
        0,
        "most images at once in the decoder, the judges and the gradient, where more than there are take several steps"
        " together; 0: all of them, a step at a time",
        high=MOST,
    )
    checkpoint_every: int = setting(200, "iterations between checkpoints", low=1)
    keep: int = setting(1, "checkpoints that are kept, the newest ones", low=1)
    validate_every: int = setting(
        200, "iterations between validations, which choose the best adapter (of the moving average); 0: never"
    )
    validate_prompts: int = setting(10, "prompts of a validation", low=1, high=MOST)
    validate_images: int = setting(30, "images of each", low=1, high=MOST)
    until_bias: float = setting(
        0.0,
        "stop at this bias in validation, or at what a fair model measures there, if that is more; 0: never",
    )
    patience: int = setting(2, "validations in a row that must find no more than until_bias", low=1)
    grid_every: int = setting(200, "iterations between sample grids; 0: never")
    tensorboard: bool = setting(False, "write the metrics for TensorBoard, too (extra log)")
    compile: bool = setting(False, "torch.compile the U-Net")
    recompute: bool = setting(
        False,
        "compute a U-Net block again in its backward pass instead of keeping what it needs: less memory",
    )
    evaluate: str = setting(
        "both", "adapters evaluated after the run: both (ema and raw), best, ema, raw or none"
    )
    eval_steps: int = setting(25, "sampling steps of evaluation and of sample.py", low=1)
    eval_guidance: float = setting(7.5, "guidance scale of evaluation and of sample.py")
    eval_images: int = setting(60, "images of each unseen occupation in evaluation", low=1, high=MOST)
    eval_images_train: int = setting(0, "images of each finetuning prompt in evaluation; 0: none", high=MOST)

    def __post_init__(self):
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name)))
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"recipe: {name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}."
                )
        if not all(type(S) is int and S >= 1 for S in self.steps):
            raise UserError(f"recipe: steps is {shown(self.steps)}; expected whole numbers from 1 up.")
        for name in ("steps", "guidance"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"recipe: {name} is {low}:{high}, which falls; write {high}:{low}.")
        if self.until_bias and not self.validate_every:
            raise UserError("recipe: until_bias needs validations; give validate_every.")
        if self.gradient == "exact" and self.grad_steps:
            raise UserError(
                "recipe: grad_steps draws steps of an adjusted gradient; exact needs all: leave it out."
            )

    def to_dict(self) -> dict:
        return asdict(self)


def shown(value) -> str:
    """A setting as its option takes it."""
    if isinstance(value, Range):
        return str(value.low) if value.low == value.high else f"{value.low}:{value.high}"
    return ",".join(f"{key}={v}" for key, v in value.items()) if isinstance(value, dict) else str(value)


def _checked(f, value):
    """A field's value in the field's type, its numbers finite and in the field's range. Raises UserError."""
    try:
        if f.type in READERS:
            value = READERS[f.type](value)
        elif f.type is float and type(value) is int:
            value = float(value)
        elif type(value) is not f.type:
            raise ValueError
    except (ValueError, OverflowError):
        expected = {Range: "a number or two as 19:23", Shares: "a number or some as gender=0.2,race=0.6"}
        kind = expected.get(f.type) or f"a value of type {f.type.__name__}"
        raise UserError(f"recipe: {f.name} is {value!r}; expected {kind}.") from None
    low, high, above, below = (f.metadata[key] for key in ("low", "high", "above", "below"))
    high = min(high, LARGEST) if f.type is int else high
    for v in _numbers(value):
        for holds, expected in (
            (0 <= v < math.inf, "a number from 0 up"),
            (v >= low, f"at least {low}"),
            (v <= high, f"at most {high}"),
            (v > above, f"more than {above}"),
            (v < below, f"less than {below}"),
        ):
            if not holds:
                raise UserError(f"recipe: {f.name} is {shown(value)}; expected {expected}.")
    return value


def _numbers(value):
    """The numbers in a setting's value; none in a text."""
    if isinstance(value, dict):
        return list(value.values())
    return [] if isinstance(value, str) else list(value) if isinstance(value, Range) else [value]


# docs/method.md §6, beside the defaults above, which are the gender run's. Skin tone stands where the source has race.
RACE = {"batch": 32, "lambda_img": 6.0, "lambda_face": 0.1, "iterations": 12_000}
GENDER_RACE = {"batch": 32, "C": 0.6, "lambda_face": 0.1, "iterations": 14_000}
WITH_AGE = {"batch": 40, "lambda_face": 0.1, "iterations": 15_000}
RUNS = {
    frozenset({"gender"}): {},
    frozenset({"race"}): RACE,
    frozenset({"gender", "race"}): GENDER_RACE,
    frozenset({"gender", "race", "age"}): WITH_AGE,
}
LAMBDA_2 = {"gender": 0.2, "race": 0.6, "age": 0.6}
LAMBDA_3 = {"gender": 0.2, "race": 0.3, "age": 0.3}


def methods(attributes: tuple[str, ...]) -> dict:
    """What docs/method.md §6 says of a run for these attributes; the gender run's numbers where it says nothing."""
    known = {name: "race" if name == "skin_tone" else name for name in attributes}
    return {
        **RUNS.get(frozenset(known.values()), {}),
        "lambda_2": {name: LAMBDA_2.get(of, LAMBDA_2["gender"]) for name, of in known.items()},
        "lambda_3": {name: LAMBDA_3.get(of, LAMBDA_3["gender"]) for name, of in known.items()},
    }


def resolve(
    attributes: tuple[str, ...],
    bundle_recipe: dict,
    overrides: dict,
    source: str | Path = "bundle.json",
    known_attributes: Iterable[str] | None = None,
) -> Recipe:
    """The recipe of a run: docs/method.md's, the bundle's, the bundle's for the attributes, the user's; later wins.

    In `bundle_recipe` a key that is no setting, with an object, is for the run of the attributes it names, as
    "gender" or "gender,race": of `known_attributes`, the bundle's. lambda_2 and lambda_3 become a number for each
    attribute. Raises UserError for unknown keys; `source` names the manifest.
    """
    known = {f.name for f in fields(Recipe)}
    runs = {
        key: value for key, value in bundle_recipe.items() if key not in known and isinstance(value, dict)
    }
    strangers = {name for key in runs for name in key.split(",")} - set(known_attributes or ())
    if known_attributes is not None and strangers:
        raise UserError(
            f"{source}: recipe has the unknown key {min(strangers)!r}; expected a setting, or attributes of the bundle,"
            f" {', '.join(known_attributes)}."
        )
    specific = [value for key, value in runs.items() if set(key.split(",")) == set(attributes)]
    layers = [
        (methods(attributes), "docs/method.md"),
        ({key: value for key, value in bundle_recipe.items() if key not in runs}, f"{source}: recipe"),
        *((value, f"{source}: recipe of {','.join(attributes)}") for value in specific),
        (overrides, "options"),
    ]
    settings = {}
    for layer, where in layers:
        unknown = sorted(set(layer) - known)
        if unknown:
            raise UserError(
                f"{where} has the unknown key {unknown[0]!r}; expected some of {', '.join(sorted(known))}."
            )
        shares = {name: _for_each(name, layer, settings, attributes) for name in ("lambda_2", "lambda_3")}
        settings |= {**layer, **{name: value for name, value in shares.items() if value}}
    return Recipe(**settings)


def _for_each(name, layer, settings, attributes):
    """lambda_2 or lambda_3 for each attribute, where the layer has it: over what was set before."""
    try:
        value = read_shares(layer[name]) if name in layer else {}
    except ValueError:
        raise UserError(
            f"recipe: {name} is {layer[name]!r}; expected a number or some as gender=0.2,race=0.6."
        ) from None
    value = value if isinstance(value, dict) else dict.fromkeys(attributes, value)
    strangers = sorted(set(value) - set(attributes)) if attributes else []
    if strangers:
        raise UserError(f"recipe: {name} names {strangers[0]}; the run is for {', '.join(attributes)}.")
    return {**settings.get(name, {}), **value}


def add_options(parser) -> None:
    """Every field of Recipe as an option; one that is not given is absent from the parsed namespace."""
    for f in fields(Recipe):
        flag = "--" + f.name.replace("_", "-")
        explanation = f"{f.metadata['help']} (SD-1.5: {shown(f.default)})"
        how = {"type": READERS.get(f.type, f.type)}
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flag, dest=f.name, default=argparse.SUPPRESS, help=explanation, **how)
