"""fairref import: turn another tool's adapter into one of ours."""

from collections.abc import Sequence

from fairref.bundle.loading import load_bundle
from fairref.commands import cli
from fairref.exchange.importing import import_adapter
from fairref.files.names import some


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = cli.Parser(
        prog="fairref import",
        description="Turn an adapter of the paper's released code, PEFT, diffusers, kohya or UCE into one that sample,"
        " evaluate and export take.",
        example="fairref import text_encoder_lora_EMA.pth --out released",
    )
    parser.add_argument("file", help="the adapter's file, or PEFT's folder")
    parser.add_argument("--out", required=True, help="a folder, or a .safetensors file")
    parser.add_argument(
        "--weights",
        help="the weights that it was made from (None: Stable Diffusion 1.5's layers, base unknown)",
    )
    parser.add_argument(
        "--drop", action="store_true", help="leave out what belongs to no layer that can be adapted"
    )
    options = parser.parse_args(argv)
    bundle = None if options.weights is None else load_bundle(options.weights)
    target, imported = import_adapter(options.file, options.out, bundle, options.drop)
    print(f"{target}: {imported.summary}")
    for names, why in ((imported.equal, "the base's own"), (imported.dropped, "no layer's")):
        if names:
            print(f"left out {len(names)} tensors, {why}: {some(names)}")
    print(
        f"its base is {options.weights}, as you say" if bundle else "its base is unknown; --weights names it"
    )
