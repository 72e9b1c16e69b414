"""fairref sample: draw images of a prompt, with how they were made in the files' own text."""

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fairref.bundle.loading import load_bundle
from fairref.commands import cli
from fairref.errors import UserError
from fairref.files.images import grid, save_png, to_image
from fairref.files.paths import check_writable, expanded
from fairref.generation.adapters import FILE, load_adapters
from fairref.generation.padding import PADDING_HELP, PADDINGS
from fairref.generation.sampling import SampleSettings, drawing_of, sample_tensor
from fairref.generation.strengths import choose_adapters, describe_adapters
from fairref.processes import DTYPES, choose_device
from fairref.settings import MAX_COUNT

LONGEST = 100  # bytes of a prompt in a folder's name


def parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(
        prog="fairref sample",
        description="Draw images of a prompt.",
        example='fairref sample "a photo of the face of a pilot, a person" --adapter runs/gender',
    )
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument(
        "--num-images",
        "-n",
        dest="n",
        type=cli.whole(1, MAX_COUNT),
        default=SampleSettings.n,
        help="how many",
    )
    parser.add_argument("--seed", type=cli.whole(0), default=SampleSettings.seed, help="seed of the noise")
    parser.add_argument("--steps", type=cli.whole(1), help="sampling steps (None: the bundle's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (None: the bundle's)")
    parser.add_argument("--negative-prompt", default="", help="what not to draw")
    cli.add_common(parser)
    cli.add_adapters(parser)
    parser.add_argument("--padding", default="full", choices=PADDINGS, help=PADDING_HELP)
    parser.add_argument(
        "--out", help="folder for the images (None: samples/<prompt>, and the adapters' names)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: one PNG an image, and a grid of all."""
    options = vars(parser().parse_args(argv))
    weights, out, any_base = (options.pop(key) for key in ("weights", "out", "any_base"))
    adapters = choose_adapters(options.pop("adapter"), options.pop("strength"))
    device, dtype = options.pop("device"), options.pop("dtype")
    settings = SampleSettings(**options)
    bundle = load_bundle(weights, choose_device(device), DTYPES[dtype or "float32"])
    made_by = {**asdict(settings), **drawing_of(bundle, settings)._asdict()}
    made_by |= {"weights": bundle.path.name, "dtype": bundle.dtype}
    made_by["adapters"] = describe_adapters(bundle, adapters)
    model = load_adapters(bundle, adapters, any_base)
    folder = _folder(settings.prompt, adapters, out)
    x = sample_tensor(model, settings)
    common = {"prompt": settings.prompt, "seed": str(settings.seed), "settings": json.dumps(made_by)}
    for i, image in enumerate(x):
        save_png(to_image(image), folder / f"seed{settings.seed}-{i:03d}.png", {**common, "image": str(i)})
    sheet = folder / f"seed{settings.seed}-grid.png"
    save_png(grid(x), sheet, common)
    print(f"{len(x)} images in {folder}, all of them in {sheet}")


def _folder(prompt, adapters, out):
    """The folder for a prompt's images. Raises UserError."""
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-").encode(errors="replace")
    slug = words[:LONGEST].decode(errors="ignore") or "empty-prompt"
    if len(words) > LONGEST or re.search(r"[^\w\s,.-]", prompt):  # others would have the same
        slug += f"-{zlib.crc32(prompt.encode(errors='replace')):08x}"
    for adapter, strength in adapters:  # its images lie beside those without it, not in their place
        file = adapter.file.resolve()
        slug += f"-{file.parent.name}" + (f"-{file.stem}" if file.name != FILE else "")
        slug += f"-{strength:g}" if strength != 1 else ""
    folder = Path("samples") / slug if out is None else expanded(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out is {folder}, which can't be made ({error.strerror}); give a folder."
        ) from None
    check_writable(folder / "seed0-grid.png")
    return folder
