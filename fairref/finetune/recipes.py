"""The numbers of a finetuning run: METHOD.md §6, overridden by the bundle's, then by the user's."""

import argparse
import math
from dataclasses import asdict, dataclass, field, fields

from fairref.errors import UserError

CHOICES = {
    "component": ("prefix", "text_encoder", "unet", "both"),
    "end": ("zero", "sigma_min"),
    "standardise": ("paper", "solver", "none"),
    "face_reference": ("original", "nearest"),
    "evaluate": ("both", "ema", "raw", "none"),
}


def setting(default, explanation):
    """A field with its one-line explanation, which is also its option's help text."""
    return field(default=default, metadata={"help": explanation})


@dataclass(frozen=True)
class Recipe:
    """Settings of one run; the defaults are the source's gender run on SD-1.5. Raises UserError."""

    seed: int = setting(
        0, "of the noise, the order of prompts, the step counts and the adapter's first values"
    )
    iterations: int = setting(10_000, "optimizer steps, one prompt each")
    batch: int = setting(24, "N, images of one prompt, over all processes")
    group: int = setting(
        1,
        "consecutive prompts of the list that an epoch's order keeps together: where they lean opposite ways, "
        "what they have in common cancels",
    )
    named_every: int = setting(
        0,
        "every so many iterations the prompt names a class, which is then the whole target, so that such prompts "
        "still get it; 0: never",
    )
    C: float = setting(0.8, "images with a target less certain than this have no L_align (eq 6)")
    lambda_img: float = setting(8.0, "lambda_img,1: weight of L_img (eq 7) where target and original agree")
    lambda_2: float = setting(0.2, "lambda_2 / lambda_1: share of that weight where they disagree")
    lambda_3: float = setting(0.2, "lambda_3 / lambda_2: the same inside the face, where they disagree")
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
    rank: int = setting(50, "rank of the LoRA matrices")
    tokens: int = setting(5, "soft tokens of the prefix")
    lr: float = setting(5e-5, "AdamW's learning rate")
    lr_end: float = setting(1.0, "share of lr at the last iteration, reached along a cosine; 1 is constant")
    warmup: int = setting(0, "iterations over which lr rises linearly")
    beta_1: float = setting(0.9, "AdamW's decay of the mean gradient")
    beta_2: float = setting(0.999, "AdamW's decay of the mean squared gradient")
    adam_eps: float = setting(1e-8, "AdamW's epsilon")
    weight_decay: float = setting(1e-2, "AdamW's weight decay")
    clip: float = setting(100.0, "largest norm of the gradient; a longer one is shortened to it")
    ema: float = setting(
        0.996, "decay of the adapter's moving average, at most (1 + i) / (10 + i) at iteration i"
    )
    steps_min: int = setting(19, "fewest sampling steps S of an iteration")
    steps_max: int = setting(23, "most sampling steps S of an iteration")
    guidance: float = setting(7.5, "classifier-free guidance scale s")
    end: str = setting("zero", "end of the solver: zero or sigma_min")
    standardise: str = setting("paper", "weights of the steps in the gradient: paper, solver or none")
    grad_steps: int = setting(0, "steps drawn for the gradient, which stays unbiased; 0: all of them")
    micro_batch: int = setting(
        0, "most U-Net inputs at once in the gradient, and images decoded at once; 0: all"
    )
    checkpoint_every: int = setting(200, "iterations between checkpoints")
    evaluate: str = setting("both", "adapters evaluated after the run: both, ema, raw or none")
    eval_steps: int = setting(25, "sampling steps of evaluation and of sample.py")
    eval_images: int = setting(60, "images of each unseen occupation in evaluation")
    eval_images_train: int = setting(60, "images of each finetuning occupation in evaluation; 0: none")

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is float and type(value) is int:
                object.__setattr__(self, f.name, float(value))
            elif type(value) is not f.type:
                raise UserError(f"recipe: {f.name} is {value!r}; expected a value of type {f.type.__name__}.")
            if f.type is not str and not (math.isfinite(value) and value >= 0):
                raise UserError(f"recipe: {f.name} is {value}; expected a number from 0 up.")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"recipe: {name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}."
                )
        at_least_1 = (
            "iterations",
            "batch",
            "group",
            "rank",
            "tokens",
            "steps_min",
            "eval_steps",
            "eval_images",
            "checkpoint_every",
        )
        for name in at_least_1:
            if getattr(self, name) < 1:
                raise UserError(f"recipe: {name} is {getattr(self, name)}; expected at least 1.")
        for name in ("C", "lambda_2", "lambda_3", "lr_end", "beta_1", "beta_2", "ema"):
            if getattr(self, name) > 1:
                raise UserError(f"recipe: {name} is {getattr(self, name)}; expected at most 1.")
        if self.steps_max < self.steps_min:
            raise UserError(
                f"recipe: steps_max is {self.steps_max}, less than steps_min {self.steps_min}; raise it."
            )

    def to_dict(self) -> dict:
        return asdict(self)


# What METHOD.md §6 gives for other attributes than gender; skin tone stands where the source has race.
RACE = {
    "batch": 32,
    "lambda_img": 6.0,
    "lambda_2": 0.6,
    "lambda_3": 0.3,
    "lambda_face": 0.1,
    "iterations": 12_000,
}
BY_ATTRIBUTE = {"gender": {}, "race": RACE, "skin_tone": RACE}


def resolve(attribute: str, bundle_recipe: dict, overrides: dict, source: str = "bundle.json") -> Recipe:
    """The recipe of a run: METHOD.md's, the bundle's, the bundle's for the attribute, the user's; later wins.

    In `bundle_recipe` a key whose value is an object holds the settings for the attribute of that name.
    Raises UserError for unknown keys; `source` names the manifest.
    """
    general = {key: value for key, value in bundle_recipe.items() if not isinstance(value, dict)}
    specific = bundle_recipe.get(attribute, {})
    known = {f.name for f in fields(Recipe)}
    for settings, where in (
        (general, f"{source}: recipe"),
        (specific, f"{source}: recipe of {attribute}"),
        (overrides, "options"),
    ):
        unknown = sorted(set(settings) - known)
        if unknown:
            raise UserError(
                f"{where} has the unknown key {unknown[0]!r}; expected some of {', '.join(sorted(known))}."
            )
    return Recipe(**{**BY_ATTRIBUTE.get(attribute, {}), **general, **specific, **overrides})


def add_options(parser) -> None:
    """Every field of Recipe as an option; one that is not given is absent from the parsed namespace."""
    for f in fields(Recipe):
        flag = "--" + f.name.replace("_", "-")
        explanation = f"{f.metadata['help']} (SD-1.5: {f.default})"
        parser.add_argument(flag, type=f.type, dest=f.name, default=argparse.SUPPRESS, help=explanation)


def given_options(namespace) -> dict:
    """The fields of Recipe that the user gave."""
    return {f.name: getattr(namespace, f.name) for f in fields(Recipe) if hasattr(namespace, f.name)}
