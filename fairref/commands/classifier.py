"""fairref classifier: CelebA or FairFace -> an attribute classifier."""

import json
import sys
from collections.abc import Sequence

from fairref import settings
from fairref.commands import cli
from fairref.errors import UserError
from fairref.files.datasets import describe_bad, read_photographs
from fairref.files.paths import check_new_folder
from fairref.judges.mobilenet import MobileNetConfig
from fairref.processes import choose_device
from fairref.tools.classifier import (
    Settings,
    describe_unread,
    make_classifier,
    unreadable,
)


def parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(
        prog="fairref classifier",
        description="Train an attribute classifier, MobileNetV3, on CelebA or FairFace.",
        example="fairref classifier --data fairface --root fairface --attr gender+race --out"
        " weights/sd15/classifier_finetune",
    )
    parser.add_argument("--data", required=True, choices=("celeba", "fairface"), help="data set")
    parser.add_argument("--root", required=True, help="folder that it was unpacked to")
    parser.add_argument("--attr", required=True, help="gender, race or age; several joined by +")
    parser.add_argument("--out", required=True, type=cli.path, help="folder of the classifier, new or empty")
    parser.add_argument("--kind", default="large", choices=("large", "small"), help="of MobileNetV3")
    parser.add_argument(
        "--width", type=cli.positive(16), default=1.0, help="multiplies the channels of MobileNetV3"
    )
    parser.add_argument("--input-size", type=cli.whole(32, 4096), default=224, help="pixels a side")
    parser.add_argument(
        "--init", help="torchvision's weights as .safetensors, to start from; None: from scratch"
    )
    parser.add_argument("--epochs", type=cli.whole(1), default=Settings.epochs, help="times through the data")
    parser.add_argument("--batch", type=cli.whole(2), default=Settings.batch, help="images a step")
    parser.add_argument(
        "--lr", type=cli.positive(1e30), default=Settings.lr, help="AdamW's rate at the start"
    )
    parser.add_argument(
        "--seed", type=cli.whole(0), default=Settings.seed, help="of order, changes and weights"
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse bad rows and images instead of skipping them"
    )
    settings.add_run_options(parser, ("device",))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    options = parser().parse_args(argv)
    device = choose_device(options.device)
    if options.out.exists() and not (options.out.is_dir() and not any(options.out.iterdir())):
        raise UserError(f"{options.out}: is there already; give a new or an empty folder as --out.")
    check_new_folder(options.out)
    photographs = read_photographs(options.data, options.root, options.attr.split("+"), options.strict)
    if photographs.bad:
        print(f"left out {describe_bad(photographs.bad)}", file=sys.stderr)
    logits = sum(map(len, photographs.attributes.values()))
    config = MobileNetConfig(options.kind, options.width, logits, options.input_size)
    if options.strict and (broken := unreadable(photographs, config.input_size)):
        raise UserError(f"{options.root}: {describe_unread(broken).rstrip('.')}, or leave --strict out.")
    how = Settings(options.epochs, options.batch, options.lr, options.seed)
    trained = make_classifier(photographs, config, how, options.out, options.init, device)
    if trained.unread:
        print(describe_unread(trained.unread), file=sys.stderr)
    for name, values in trained.measured.items():
        shown = {key: value for key, value in values.items() if key != "confusion"}
        print(f"{name}, {trained.part}: {json.dumps(shown)}")
    print(options.out)
    return 0
