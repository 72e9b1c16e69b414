"""A run's settings as one schema: options of the command line, settings.json and its check derive from it.

Recipe has the numbers of a run, RunOptions what a run is of.
"""

import argparse
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import NamedTuple

from fairref.errors import UserError

MAX_INT = 2**32 - 1
MAX_COUNT = 65_536  # images, prompts or widths that memory may hold
MAX_NUMBER = 1e6  # of a weight, a rate or a scale, beyond which float32 soon overflows
DTYPES = ("float32", "float16", "bfloat16")


class Range(NamedTuple):
    """What is drawn anew at each iteration, from low to high, or one of the two by turns."""

    low: float
    high: float
    turns: bool = False


Shares = float | dict[str, float]  # one number for every attribute, or attribute -> number


def read_range(value: object) -> Range:
    """7.5, "19:23", "1,7.5" or [19, 23, false] as a Range; a number is both ends. Raises ValueError."""
    ends, turns = value if isinstance(value, list | tuple) else [value], False
    if isinstance(value, str):
        turns = "," in value
        ends = value.split("," if turns else ":")
    elif len(ends) == 3 and type(ends[2]) is bool:
        *ends, turns = ends
    if not 1 <= len(ends) <= 2:
        raise ValueError(value)
    return Range(*map(_number, (ends[0], ends[-1])), turns)


def read_shares(value: object) -> Shares:
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
read_range.__name__, read_shares.__name__ = "range", "share"  # in argparse's "invalid … value"


def setting(
    default: object,
    explanation: str,
    *,
    low: float = 0,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    choices: Sequence[str] = (),
    only_with: Mapping[str, Sequence[str]] | None = None,
    alone: object = None,
) -> object:
    """A field with its option's help text, and what its values may be.

    `only_with`: it has an effect where one of these settings has one of the values, or without values any but 0;
    "attr" is whether the run has an attribute. `alone`: what the option means without a value.
    """
    limits = {"low": low, "high": high, "above": above, "below": below, "choices": choices}
    metadata = {"help": explanation, "only_with": only_with or {}, "alone": alone, **limits}
    return field(default=default, metadata=metadata)


TARGET = {"attr": ()}
ADJUSTED = ("paper", "solver", "none")
SOFT = ("prefix", "suffix", "deep", "generated")  # soft prompts
LORA, EVALUATED = ("text_encoder", "unet", "both"), ("both", "best", "ema", "raw")


@dataclass(frozen=True)
class Recipe:
    """The numbers of one run; the defaults are the paper's gender run on SD-1.5. Raises UserError."""

    seed: int = setting(0, "seed of the noise, the order of prompts, the step counts and the adapter's start")
    iterations: int = setting(10_000, "optimizer steps, one prompt each", low=1)
    batch: int = setting(24, "N: images of one prompt, over all processes", low=1, high=MAX_COUNT)
    group: int = setting(
        1,
        "how many consecutive prompts of the list stay together when an epoch is shuffled. Raise it where neighbours"
        " in the list lean opposite ways",
        low=1,
    )
    explicit_every: int = setting(
        0,
        "every so many iterations the prompt names a class, and all its images shall show it. This keeps prompts that"
        " name a class working. 0: never",
        only_with=TARGET,
    )
    targets: str = setting(
        "transport",
        "what an image's target class is. transport: that of expected optimal transport (eqs 4, 5). random: drawn from"
        " the target shares, whatever the image shows. This ablation says what the transport is worth. soft: the"
        " transport's chances of all classes (eq 5), of all images, without the threshold C in L_align",
        choices=("transport", "random", "soft"),
        only_with=TARGET,
    )
    C: float = setting(
        0.8,
        "L_align leaves out images whose target is less certain than this (eq 6)",
        high=1,
        only_with=TARGET,
    )
    threshold: str = setting(
        "reach",
        "which chance must be C. reach: that of the likeliest class (eq 6). leave: that of leaving the image's own"
        " class, whose target is then the likeliest other; C is then above .5. With two classes both are the same",
        choices=("reach", "leave"),
        only_with=TARGET,
    )
    lambda_img: float = setting(
        8.0,
        "lambda_img,1: weight of L_img (eq 7) on images whose target is the original's class",
        high=MAX_NUMBER,
        only_with=TARGET,
    )
    lambda_2: Shares = setting(
        0.2,
        "lambda_2 / lambda_1: share of that weight on all other images; or one by attribute, as gender=0.2,race=0.6",
        high=1,
        only_with=TARGET,
    )
    lambda_3: Shares = setting(
        0.2,
        "lambda_3 / lambda_2: the same, inside the face of those other images; or one by attribute",
        high=1,
        only_with=TARGET,
    )
    lambda_face: float = setting(1.0, "weight of L_face; 0: none", high=MAX_NUMBER, only_with=TARGET)
    lambda_text: float = setting(
        0.0,
        "weight of L_text, the distance in CLIP between an image and its prompt; 0: none",
        high=MAX_NUMBER,
    )
    face_reference: str = setting(
        "original",
        "the face that L_face pulls towards. original: the original image's own face where it already has the target"
        " class, else the nearest external face. nearest: always the nearest external face",
        choices=("original", "nearest"),
        only_with={"lambda_face": ()},
    )
    component: str = setting(
        "text_encoder",
        "what is trained: LoRA on text_encoder, unet or both; or a soft prompt. prefix: tokens before the prompt;"
        " suffix: behind it; deep: tokens before it in each layer; generated: tokens before it that are made from it",
        choices=(*SOFT, *LORA),
    )
    rank: int = setting(50, "rank of the LoRA matrices", low=1, high=MAX_COUNT, only_with={"component": LORA})
    tokens: int = setting(5, "tokens of a soft prompt", low=1, high=MAX_COUNT, only_with={"component": SOFT})
    lr: float = setting(5e-5, "AdamW's learning rate", high=MAX_NUMBER)
    lr_end: float = setting(
        1.0,
        "share of the learning rate that is left at the last iteration. It falls along a cosine. 1: constant",
        high=1,
    )
    warmup: int = setting(0, "iterations over which the learning rate rises linearly")
    beta_1: float = setting(0.9, "AdamW's decay of the mean gradient", below=1)
    beta_2: float = setting(0.999, "AdamW's decay of the mean squared gradient", below=1)
    adam_eps: float = setting(1e-8, "AdamW's epsilon", low=1e-30, high=MAX_NUMBER)
    weight_decay: float = setting(1e-2, "AdamW's weight decay", high=MAX_NUMBER)
    clip: float = setting(100.0, "longest gradient; a longer one is shortened to it; 0: no limit")
    ema: float = setting(
        0.996, "decay of the adapter's moving average, at most (1 + i) / (10 + i) at iteration i", high=1
    )
    steps: Range = setting(
        Range(19, 23), "S: sampling steps, or a range that each iteration draws from, as 19:23"
    )
    guidance: Range = setting(
        Range(7.5, 7.5),
        "s: guidance scale; or a range that each iteration draws from, as 1:12; or two that take turns, as 1,7.5, of"
        " which the scale 1 takes half the time",
        high=MAX_NUMBER,
    )
    empty_prompt: str = setting(
        "trained",
        "what becomes of the empty prompt, from which guidance leads away. frozen: it, or a negative prompt, goes"
        " through the base's text encoder, which other tools can't do; unread: LoRA reads little or nothing of the"
        " empty text, so that it moves less, or with Stable Diffusion not at all, in any tool",
        choices=("trained", "frozen", "unread"),
        only_with={"component": ("text_encoder", "both")},
    )
    end: str = setting("zero", "end of the solver: zero or sigma_min", choices=("zero", "sigma_min"))
    gradient: str = setting(
        "paper",
        "gradient of the sampling process. exact: backpropagation through all steps; last:K: through the last K;"
        " random:K: through up to K, drawn anew in each iteration; bernoulli: each step drawn, late ones more often."
        " paper, solver, none: adjusted gradients with different weights of the steps; drtune:M: none's, of M steps."
        " couple:ALPHA: from none (0) to exact (1). docs/derivation.md has the papers",
    )
    grad_steps: int = setting(
        0,
        "sampling steps an image, on the average, that are drawn for the adjusted gradient, which stays unbiased; 0:"
        " all of them",
        only_with={"gradient": ADJUSTED},
    )
    keep_graphs: bool = setting(
        False,
        "keep the U-Net's graph of each sampling step until its gradient is known: less time, and memory that grows"
        " with the steps, whatever --micro-batch is; without --grad-steps",
        only_with={"gradient": ADJUSTED},
    )
    micro_batch: int = setting(
        0,
        "images that the decoder, the judges and the gradient take at once. Lower it if memory runs out. 0: all",
        high=MAX_COUNT,
    )
    checkpoint_every: int = setting(200, "iterations between checkpoints", low=1)
    keep: int = setting(
        2,
        "how many of the newest checkpoints are kept; where one is damaged, the one before it is taken",
        low=1,
    )
    validate_every: int = setting(
        200, "iterations between validations, which choose the best adapter (of the moving average); 0: never"
    )
    validate_prompts: int = setting(
        10,
        "prompts of a validation",
        low=1,
        high=MAX_COUNT,
        only_with={"validate_every": (), "grid_every": ()},
    )
    validate_images: int = setting(
        30, "images of each of them", low=1, high=MAX_COUNT, only_with={"validate_every": ()}
    )
    until_bias: float = setting(
        0.0,
        "stop when validations find at most this bias, or at most what a fair model measures if that is more."
        " 0: never stop early",
    )
    patience: int = setting(
        2, "validations in a row that must find so little bias", low=1, only_with={"until_bias": ()}
    )
    grid_every: int = setting(200, "iterations between sample grids; 0: never")
    scores: int = setting(
        0,
        "iterations between those that record how much each image pulled, with thumbnails (--scores alone: 20). On the"
        " small bundle such an iteration takes 2.3 times as long, where the U-Net is trained 4 times. 0: never",
        alone=20,
    )
    tensorboard: bool = setting(False, "write the metrics for TensorBoard, too (extra log)")
    compile: bool = setting(False, "torch.compile the U-Net")
    recompute: bool = setting(
        False,
        "recompute the blocks of the U-Net, the decoder, CLIP and DINO in their backward pass: less memory, more time",
    )
    evaluate: str = setting(
        "both",
        "adapters evaluated after the run: both (ema and raw), best, ema, raw or none",
        choices=("both", "best", "ema", "raw", "none"),
    )
    eval_steps: int = setting(25, "sampling steps of evaluation and of sample.py", low=1)
    eval_guidance: float = setting(7.5, "guidance scale of evaluation and of sample.py", high=MAX_NUMBER)
    eval_images: int = setting(
        60,
        "images of each unseen prompt in evaluation. The method takes 80 for race or skin_tone, 160 for several"
        " attributes",
        low=1,
        high=MAX_COUNT,
        only_with={"evaluate": EVALUATED},
    )
    eval_images_train: int = setting(
        0,
        "images of each finetuning prompt in evaluation; 0: none",
        high=MAX_COUNT,
        only_with={"evaluate": EVALUATED},
    )

    def __post_init__(self):
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name)))
        if self.steps.turns or not all(type(S) is int and S >= 1 for S in self.steps[:2]):
            expected = "a whole number from 1 up, or a range of them as 19:23"
            raise UserError(f"recipe: steps is {shown(self.steps)}; expected {expected}.")
        for name in ("steps", "guidance"):
            low, high, turns = getattr(self, name)
            if low > high and not turns:
                raise UserError(f"recipe: {name} is {low}:{high}, which falls; write {high}:{low}.")
        if self.keep_graphs and self.grad_steps:
            raise UserError("recipe: keep_graphs has no effect with grad_steps; set grad_steps to 0.")
        if self.threshold == "leave" and (self.targets != "transport" or self.C <= 0.5):
            found = f"targets is {self.targets} and C {self.C:g}"
            raise UserError(f"recipe: {found}; threshold leave takes targets of transport, and C above .5.")
        if self.until_bias and not self.validate_every:
            raise UserError("recipe: until_bias needs validations; give validate_every.")

    def to_dict(self) -> dict[str, object]:
        """The fields, ready for JSON."""
        found = asdict(self)
        ranges = {name: list(v if v.turns else v[:2]) for name, v in found.items() if isinstance(v, Range)}
        return {**found, **ranges}


def refuse_unused(recipe: Recipe, given: Mapping[str, object], has_target: bool) -> None:
    """Refuses a setting that was given and has no effect in this run. Raises UserError.

    One that switches something off, as 0, may always be given.
    """
    values = {**vars(recipe), "attr": has_target}
    for f in fields(Recipe):
        others = f.metadata["only_with"]
        works = any(values[name] in of if of else values[name] for name, of in others.items())
        if others and given.get(f.name) and not works:
            state = " and ".join(
                "without --attr" if name == "attr" else f"with {_option(name)} {values[name]}"
                for name in others
            )
            raise UserError(f"{_option(f.name)} has no effect {state}; leave it out.")


def option(
    explanation: str, *, kept: object = None, with_resume: bool = False, metavar: str | None = None
) -> object:
    """A field of RunOptions: its help text, its type in settings.json (None: not there), whether --resume allows it."""
    metadata = {"help": explanation, "kept": kept, "with_resume": with_resume, "metavar": metavar}
    return field(default=None, metadata=metadata)


@dataclass(frozen=True)
class RunOptions:
    """What a run is of; None: not given."""

    attr: str | None = option(
        "what to make fair: attributes of the bundle, as gender or gender,race. One attribute may have its shares, as"
        " gender=0.3,0.7 (None: equal shares). Without --attr the run minimises --loss and --lambda-text alone"
    )
    target: Sequence[str] | None = option(
        "shares of an attribute within every group of the others, as age=0.75,0.25, or a joint table in a .json file"
        " (None: equal shares). May be given several times"
    )
    loss: Sequence[str] | None = option(
        "a loss of your own, as path/to/file.py:name=0.5: a function of (x, o, prompt, bundle), and its weight."
        " docs/extend.md has an example. May be given several times",
        kept=list,
    )
    judge: Sequence[str] | None = option(
        "a judge in the place of the bundle's: your own, as finetune=path/to/file.py:loader, or CLIP with a text for"
        " each class, as evaluate='clip:glasses=a person with glasses|a person without'. docs/extend.md has examples."
        " May be given several times. Several of evaluate or of finetune take the place of all of the bundle's",
        kept=list,
    )
    prompts: str | Sequence[str] | None = option(
        "concepts that take turns, as occupations,sports, or a text file, one prompt a line (None: occupations)",
        kept=str | list,
    )
    prompt_template: str | None = option(
        'prompt of an occupation, as "a photo of a {occupation}" (None: that of the method)',
        kept=str | None,
        metavar="TEXT",
    )
    out: str | None = option("folder of the run (None: the first free of runs/<attr>, runs/<attr>-2, ...)")
    resume: str | None = option(
        "go on with the run in this folder, with its settings", with_resume=True, metavar="FOLDER"
    )
    weights: str | None = option(
        "bundle, diffusers-layout folder or single file (None: weights/emoji, or those of the run that --resume goes on"
        " with)",
        kept=str,
        with_resume=True,
    )
    device: str | None = option(
        "cpu, cuda, cuda:1, ... (None: cuda where there is one)", kept=str, with_resume=True
    )
    dtype: str | None = option(
        "number format of the networks: float32, float16 or bfloat16 (None: float32)", kept=str
    )


FACTS = {
    "target": dict | None,
    "recipe": dict,
    "processes": int,
    "versions": dict,
}  # in settings.json, no options


def check_settings(settings: Mapping[str, object]) -> bool:
    """Whether a settings.json has all that a run of this version goes on with, each in its type."""
    kept = {f.name: f.metadata["kept"] for f in fields(RunOptions) if f.metadata["kept"] is not None}
    if not all(
        name in settings and isinstance(settings[name], kind) for name, kind in {**kept, **FACTS}.items()
    ):
        return False
    if not isinstance(settings.get("fingerprints", {}), dict):  # older runs have none
        return False
    lines = settings["prompts"] if isinstance(settings["prompts"], list) else []
    known = settings["dtype"] in DTYPES and set(settings["recipe"]) == {f.name for f in fields(Recipe)}
    return known and all(isinstance(line, str) for line in lines)


def command_line(options: RunOptions, recipe: Mapping[str, object]) -> str:
    """The call of train.py with these options; prompts that came as a list of lines are left out."""
    words = ["python", "train.py"]
    for f in fields(RunOptions):
        value = getattr(options, f.name)
        given = value if f.type == Sequence[str] | None else [value] if isinstance(value, str) else []
        words += [word for text in given or () for word in (_flag(f), text)]
    for name, value in recipe.items():
        no = "no-" if value is False else ""
        words += [f"--{no}{_option(name)[2:]}"] if isinstance(value, bool) else [_option(name), shown(value)]
    return shlex.join(words)


def shown(value: object) -> str:
    """A setting as its option takes it."""
    if isinstance(value, Range):
        ends = f"{value.low}{',' if value.turns else ':'}{value.high}"
        return str(value.low) if value.low == value.high else ends
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
    choices = f.metadata["choices"]
    if choices and value not in choices:
        raise UserError(f"recipe: {f.name} is {value!r}; expected one of {', '.join(choices)}.")
    low, high, above, below = (f.metadata[key] for key in ("low", "high", "above", "below"))
    high = min(high, MAX_INT) if f.type is int else high
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
    return [] if isinstance(value, str) else list(value[:2]) if isinstance(value, Range) else [value]


def add_recipe_options(parser: argparse._ActionsContainer) -> None:
    """Every field of Recipe as an option; one that is not given is absent from the parsed namespace."""
    for f in fields(Recipe):
        how = {"type": READERS.get(f.type, f.type)}
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        if f.metadata["alone"] is not None:
            how |= {"nargs": "?", "const": f.metadata["alone"]}
        explanation = f"{f.metadata['help']} (SD-1.5: {shown(f.default)})"
        parser.add_argument(_flag(f), dest=f.name, default=argparse.SUPPRESS, help=explanation, **how)


def add_run_options(parser: argparse._ActionsContainer, names: Sequence[str] = ()) -> None:
    """Fields of RunOptions as options: those with these names, or all. One of several texts may be given repeatedly."""
    for f in fields(RunOptions):
        how = {"action": "append"} if f.type == Sequence[str] | None else {}
        if f.name == "dtype":
            how["choices"] = DTYPES
        if not names or f.name in names:
            parser.add_argument(_flag(f), metavar=f.metadata["metavar"], help=f.metadata["help"], **how)


def _flag(f):
    return _option(f.name)


def _option(name):
    return "--" + name.replace("_", "-")
