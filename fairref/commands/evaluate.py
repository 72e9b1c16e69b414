"""fairref evaluate: how fair, and how faithful, a model's images are."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fairref import settings
from fairref.bundle.loading import load_bundle
from fairref.bundle.own_judges import parse_judges
from fairref.commands import cli
from fairref.errors import UserError
from fairref.evaluation.evaluation import EXPLICIT_IMAGES, evaluate
from fairref.evaluation.judging import SEED
from fairref.evaluation.statistics import lines
from fairref.files.paths import check_writable, write_json
from fairref.generation.padding import PADDING_HELP, PADDINGS
from fairref.processes import DTYPES, choose_device
from fairref.prompts import PARTS
from fairref.prompts.sets import OCCUPATIONS


def parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(
        prog="fairref evaluate",
        description="Measure the bias of a model's images.",
        example="fairref evaluate --adapter runs/gender",
    )
    cli.add_common(parser)
    cli.add_adapters(parser)
    parser.add_argument(
        "--attr", help="attributes, as in train.py (None: gender, where --target is not given)"
    )
    parser.add_argument(
        "--target", action="append", help="the shares that were aimed at, as in train.py (None: equal shares)"
    )
    parser.add_argument(
        "--prompts",
        default=OCCUPATIONS,
        help="concepts, as sports,descriptors, each measured alone; or a text file (all of it is its part train)",
    )
    parser.add_argument("--part", default="test", choices=PARTS, help="which of a concept's parts")
    parser.add_argument(
        "--num-images",
        "-n",
        type=cli.whole(1, settings.MAX_COUNT),
        help="images of each prompt (None: the bundle's, else 60, for race or skin_tone 80, for several attributes"
        " 160)",
    )
    parser.add_argument(
        "--explicit-images",
        type=cli.whole(0, settings.MAX_COUNT),
        default=EXPLICIT_IMAGES,
        help="images of each occupation and class that a prompt names",
    )
    parser.add_argument("--steps", type=cli.whole(1), help="sampling steps (None: the bundle's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (None: the bundle's)")
    parser.add_argument("--padding", default="full", choices=PADDINGS, help=PADDING_HELP)
    parser.add_argument("--seed", type=cli.whole(0), default=SEED, help="seed of the noise")
    settings.add_run_options(parser, ("judge",))
    parser.add_argument("--out", type=cli.path, help="JSON file (None: the JSON goes to stdout)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit code 1 where nobody takes the result."""
    options = parser().parse_args(argv)
    if options.out:
        check_writable(options.out)
    elif cli.lost_stdout():
        raise UserError("stdout is closed, so the result would be lost; give a file as --out.")
    judges = parse_judges(options.judge or [])
    bundle = load_bundle(
        options.weights, choose_device(options.device), DTYPES[options.dtype or "float32"], judges
    )
    report = evaluate(
        bundle,
        options.adapter,
        options.attr or (None if options.target else "gender"),
        options.num_images,
        strength=options.strength,
        any_base=options.any_base,
        target=options.target,
        prompts=options.prompts,
        part=options.part,
        steps=options.steps,
        guidance=options.guidance,
        padding=options.padding,
        explicit_images=options.explicit_images,
        seed=options.seed,
    )
    reports = [report] if "judges" in report else list(report.values())
    text = "\n".join(line for one in reports for line in lines(one))
    own = [
        {
            "role": role,
            **{key: Path(said).name if key == "path" else said for key, said in source.to_dict().items()},
        }
        for role, sources in bundle.own_judges.items()
        for source in sources
    ]
    made_by = {"weights": bundle.path.name}
    report = {**made_by, **({"judge": own} if own else {}), **report}
    if options.out:
        write_json(options.out, report)
        print(text)
        print(f"written: {options.out}")
        return 0
    print(text, file=sys.stderr)
    print(json.dumps(report, indent=2))
    return 1 if cli.lost_stdout() else 0
