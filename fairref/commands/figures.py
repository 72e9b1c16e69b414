"""fairref figures: the paper's figures 6a to 9 of any bundle, adapter and prompts."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from fairref import settings
from fairref.bundle.loading import load_bundle
from fairref.bundle.own_judges import parse_judges
from fairref.commands import cli
from fairref.errors import UserError
from fairref.evaluation.evaluation import EvaluationOptions, prepare
from fairref.evaluation.judging import SEED
from fairref.files.paths import check_new_folder
from fairref.generation.adapters import load_adapters
from fairref.generation.strengths import choose_adapters
from fairref.processes import DTYPES, choose_device
from fairref.prompts import PARTS, occupation_prompt
from fairref.prompts.sets import OCCUPATIONS, is_file, read_prompts
from fairref.reporting.comparison import IMAGES, figure_8, figures_9, measured, read_evaluation
from fairref.reporting.figures import NAMES, THETA, Figure, figure_6a, figure_6b, figure_7, renderer
from fairref.reporting.gradient_study import GUIDANCE, MODES, check_mode

# an option of these asks for other images than a run's evaluation counted
OF_EVALUATION = ("prompts", "part", "num_images", "attr", "target", "judge")
OF_FIGURES = {  # an option that not all figures take -> those that do
    **dict.fromkeys(("attr", "num_images", "steps", "seed", "judge"), ("8", "9")),
    **dict.fromkeys(
        ("weights", "device", "dtype", "adapter", "strength", "any_base"), ("6a", "6b", "8", "9")
    ),
    **dict.fromkeys(("prompts", "part"), ("6a", "6b", "8", "9")),
    "guidance": ("6b", "8", "9"),
    "target": ("9",),
    "modes": ("6a",),
    "over": ("6b",),
}


def parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(
        prog="fairref figures",
        description="Draw the paper's figures: SVG files, and their numbers as CSV. 6a: the loss by iteration, for each"
        " gradient (minutes). 6b: the size of the gradient by diffusion time (minutes). 7: the paths of the gradient."
        " 8: images before and after. 9: the share of a class for each prompt, before and after.",
        example="fairref figures 8 9 --adapter runs/gender",
    )
    parser.add_argument("figures", nargs="+", type=_name, help=f"some of {', '.join(NAMES)}")
    cli.add_common(parser)
    cli.add_adapters(parser)
    parser.add_argument(
        "--attr", help="8, 9: attributes, as in train.py (None: those of the adapter, or gender)"
    )
    parser.add_argument(
        "--target",
        action="append",
        help="9: the shares that were aimed at, as in train.py (None: the adapter's, or equal shares)",
    )
    parser.add_argument(
        "--prompts",
        help="concepts or a text file, as in `fairref evaluate`; 6a and 6b take its first prompt, and 6a the second as"
        " its fixed image (None: occupations; 9 reads what the run's evaluation counted, if it is of this adapter)",
    )
    parser.add_argument(
        "--part", choices=PARTS, help="which of a concept's parts (None: test; train of a text file)"
    )
    parser.add_argument(
        "--num-images",
        "-n",
        type=cli.whole(1, settings.MAX_COUNT),
        help=f"images of each prompt (None: {IMAGES} in 8, the bundle's in 9)",
    )
    parser.add_argument("--steps", type=cli.whole(1), help="8, 9: sampling steps (None: the bundle's)")
    parser.add_argument(
        "--guidance",
        type=float,
        help=f"6b, 8, 9: guidance scale (None: {GUIDANCE:g} in 6b, else the bundle's)",
    )
    parser.add_argument("--seed", type=cli.whole(0), default=SEED, help="8, 9: seed of the noise")
    parser.add_argument(
        "--modes", type=_modes, default=",".join(MODES), help="6a: gradients to compare, as in train.py"
    )
    parser.add_argument(
        "--over",
        default="c",
        choices=THETA,
        help="6b: what the gradient is of. c: the text embeddings. text_encoder, unet: the LoRA there, the --adapter's"
        " or one at its start",
    )
    settings.add_run_options(parser, ("judge",))
    parser.add_argument("--png", action="store_true", help="write each figure as PNG, too (extra figures)")
    parser.add_argument("--out", type=cli.path, default=Path("figures"), help="folder for the figures")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parser().parse_args(argv)
    _refuse_unused(options)
    if options.png:
        renderer()
    check_new_folder(options.out)
    for figure in _figures(options):
        print(*figure.write(options.out, options.png), sep="\n", flush=True)


def _name(text: str) -> str:
    """An argparse type: the name of a figure, also as "fig8"."""
    name = text.removeprefix("fig")
    if name not in NAMES:
        raise argparse.ArgumentTypeError(f"is {text}, expected some of {', '.join(NAMES)}")
    return name


def _modes(text: str) -> list[str]:
    """An argparse type: gradient modes with commas between them."""
    try:
        for name in text.split(","):
            check_mode(name)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None
    return text.split(",")


def _refuse_unused(options):
    """Refuses an option that none of the figures takes. Raises UserError."""
    defaults = parser().parse_args(["7"])
    for name, takers in OF_FIGURES.items():
        if getattr(options, name) != getattr(defaults, name) and not set(takers) & set(options.figures):
            named = " and ".join(dict.fromkeys(options.figures))
            raise UserError(
                f"--{name.replace('_', '-')} is for {', '.join(takers)} and has no effect on {named}; leave it out."
            )


def _figures(options: argparse.Namespace) -> Iterator[Figure]:
    """The figures, one after the other. What can't work is refused before the first. Raises UserError."""
    wanted = set(options.figures)
    if wanted == {"7"}:  # needs no bundle
        yield figure_7()
        return
    judges = parse_judges(options.judge or [])
    dtype = DTYPES[options.dtype or "float32"]
    bundle = load_bundle(options.weights, choose_device(options.device), dtype, judges)
    if "6a" in wanted and bundle.clip is None:
        raise UserError(f"{bundle.path}: has no CLIP, which figure 6a needs; use a bundle that names one.")
    adapters = choose_adapters(options.adapter, options.strength)
    evaluation = _evaluation(options, bundle) if wanted & {"8", "9"} else None
    model = load_adapters(bundle, adapters, options.any_base) if wanted & {"6a", "6b"} else None
    first, second = _two_prompts(options, bundle)
    if "6a" in wanted:
        yield figure_6a(model, options.modes, first, second)
    if "6b" in wanted:
        yield figure_6b(model, options.over, options.guidance, first)
    if "7" in wanted:
        yield figure_7()
    if "8" in wanted:
        yield figure_8(evaluation, options.num_images or IMAGES)
    if "9" in wanted:
        as_evaluated = len(adapters) == 1 and not any(getattr(options, name) for name in OF_EVALUATION)
        reports = read_evaluation(evaluation) if as_evaluated else []
        yield from figures_9(evaluation.settings.target, reports or measured(evaluation))


def _two_prompts(options, bundle):
    """The prompts of figures 6a and 6b: the first two of --prompts, or the one that there is."""
    if not options.prompts:
        return [occupation_prompt(name) for name in ("pilot", "nurse")]
    concepts = read_prompts(options.prompts, None, bundle.path, [])
    texts = [
        text for concept in concepts for text in getattr(concept, options.part or "test") or concept.train
    ]
    return (texts * 2)[:2]


def _evaluation(options, bundle):
    """What figures 8 and 9 draw. Raises UserError."""
    prompts = options.prompts or OCCUPATIONS
    return prepare(
        bundle,
        EvaluationOptions(
            options.adapter,
            options.strength,
            options.any_base,
            options.attr,
            options.target,
            prompts,
            options.part or ("train" if is_file(prompts) else "test"),
            options.num_images,
            explicit_images=0,
            steps=options.steps,
            guidance=options.guidance,
            seed=options.seed,
        ),
    )
