"""fairref export: an adapter as diffusers, ComfyUI and web UIs take it."""

import shlex
from collections.abc import Sequence

from fairref import settings
from fairref.bundle.loading import load_bundle
from fairref.commands import cli
from fairref.errors import UserError
from fairref.exchange.export import FORMATS, export_adapter
from fairref.exchange.exported import SPACE, WHOLE
from fairref.generation.adapters import own_adapters


def parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(
        prog="fairref export",
        description="Write an adapter as other tools take it, with a model card and a check.",
        example="fairref export runs/gender --to kohya --out fairer",
    )
    parser.add_argument(
        "adapter",
        nargs="?",
        help="a run's folder, or an adapter file (None: the bundle's own, with --to space)",
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=FORMATS,
        help="diffusers, kohya (for ComfyUI and web UIs): LoRA. embedding: a prefix or suffix."
        " merged (a folder), single-file (a checkpoint): the whole changed model. space: a Hugging Face Space with"
        " the page of `fairref serve`",
    )
    parser.add_argument("--out", required=True, type=cli.path, help="a new folder for the files")
    settings.add_run_options(parser, ("weights",))
    parser.add_argument(
        "--half",
        action="store_true",
        help="write a whole model in float16: half the size, nearly the same images",
    )
    parser.add_argument(
        "--hub-id",
        default="",
        help="with --to space: the base's OWNER/NAME on the hub, in diffusers' layout, where it is not Stable Diffusion"
        " 1.5 itself",
    )
    cli.add_any_base(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: the folder, and how to check it."""
    options = parser().parse_args(argv)
    bundle = load_bundle(options.weights)
    adapter = options.adapter
    if adapter is None and options.to == SPACE:
        adapter = next(iter(own_adapters(bundle)), None)
    if adapter is None:
        raise UserError("fairref export: no adapter is named; give a run's folder or an adapter file.")
    folder = export_adapter(
        bundle, adapter, options.to, options.out, options.half, options.any_base, options.hub_id
    )
    if options.to == SPACE:
        print(
            f"{folder}: README.md says what is in it. pip install huggingface_hub and hf auth login, then push it:"
        )
        print(f"hf upload NAME/SPACE {shlex.quote(str(folder))} . --repo-type space")
        return
    base = "" if options.to in WHOLE else " BASE, the folder or id of the base model"
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    print(f"README.md says how to load it. Check it: python {shlex.quote(str(folder / 'check.py'))}{base}")
