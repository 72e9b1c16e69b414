"""fairref faces: a folder of photographs -> the external faces of L_face."""

import sys
from collections.abc import Sequence

from fairref import settings
from fairref.bundle.loading import DEFAULT
from fairref.commands import cli
from fairref.errors import UserError
from fairref.files.paths import check_writable
from fairref.processes import choose_device
from fairref.tools import faces


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = cli.Parser(
        prog="fairref faces",
        description="Turn a folder of photographs into D_F, one unit embedding of a face each.",
        example="fairref faces --images celeba/img_align_celeba --weights weights/sd15 --out"
        " weights/sd15/faces.safetensors",
    )
    parser.add_argument(
        "--images", required=True, type=cli.path, help="folder of photographs, searched to its depth"
    )
    parser.add_argument("--weights", default=DEFAULT, help="bundle whose detector and embedder are used")
    parser.add_argument("--out", required=True, type=cli.path, help="safetensors file; must not be there yet")
    parser.add_argument(
        "--largest", type=cli.whole(16), default=faces.MAX_SIDE, help="bigger photographs are reduced to this"
    )
    parser.add_argument("--limit", type=cli.whole(1), help="photographs, evenly spread over all; None: all")
    parser.add_argument(
        "--strict", action="store_true", help="refuse unreadable photographs instead of skipping them"
    )
    settings.add_run_options(parser, ("device",))
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"{options.out}: is there already; give another --out.")
    if options.out.suffix != ".safetensors" or not options.out.parent.is_dir():
        raise UserError(f"--out is {options.out}; expected a .safetensors file in a folder that is there.")
    check_writable(options.out)
    files = faces.select(faces.photographs(options.images), options.limit)
    judges = faces.judges_of(options.weights, choose_device(options.device))
    made, left_out = faces.make_face_features(files, *judges, options.out, options.largest, options.strict)
    for reason, some in left_out.items():
        if some:
            print(f"left out {len(some)}, {reason}, such as {some[0]}", file=sys.stderr)
    if not made:
        raise UserError(f"{options.images}: found no face in {len(files)} images; check the folder.")
    print(f"{made} faces of {len(files)} photographs: {options.out}")
    return 0
