"""The external faces of L_face: a folder of photographs -> D_F, one unit embedding a photograph (docs/method.md §5).

    python -m fairref.face_features --images celeba/img_align_celeba --weights weights/sd15 --out weights/sd15/faces.safetensors

The largest face of each photograph counts, found and aligned as in finetuning. Photographs that can't be read and
those without a face are counted and left out.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from fairref import cli
from fairref.bundle import MANIFEST, bundle_path, read_manifest
from fairref.errors import UserError
from fairref.fairness.faces import Detector, aligned, find
from fairref.images import UNREADABLE
from fairref.judge_files import FACE_FEATURES, load_detector, load_embedder
from fairref.judges.sfnet import embed_faces
from fairref.progress import Progress
from fairref.weights_io import write

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
LARGEST = 1024  # pixels of the longer side that a photograph is reduced to


def photographs(folder: Path) -> list[Path]:
    """The image files in a folder and below it, in order of name. Raises UserError where there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one that holds the photographs.")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(
            f"{folder}: found no image in it or below; expected {', '.join(sorted(SUFFIXES))} files."
        )
    return found


def load(file: Path, largest: int = LARGEST) -> Tensor | None:
    """A photograph (1, 3, H, W) in [-1, 1], turned as its camera says, at most `largest` a side; None if unreadable."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            image.thumbnail((largest, largest))
            pixels = np.asarray(image)
    except UNREADABLE:
        return None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


@torch.no_grad()
def features(
    files: list[Path], detector: Detector, embedder: nn.Module, largest: int = LARGEST
) -> Iterator[tuple[Path, Tensor | str]]:
    """Of each file its face's unit embedding (D,) on the CPU, or "unreadable" or "no face"."""
    parameter = next(embedder.parameters())
    for file in files:
        x = load(file, largest)
        if x is None:
            yield file, "unreadable"
            continue
        x = x.to(parameter)
        faces = find(detector, x)
        if not faces.found.any():
            yield file, "no face"
            continue
        yield file, embed_faces(embedder, aligned(x, faces, embedder.config.side))[0].float().cpu()


def judges_of(weights: str, device: torch.device) -> tuple[Detector, nn.Module]:
    """The detector and the embedder that a bundle's manifest names. Raises UserError."""
    path = bundle_path(weights)
    manifest = read_manifest(path / MANIFEST) if (path / MANIFEST).is_file() else {}
    for key in ("detector", "embedder"):
        if key not in manifest:
            raise UserError(f"{path / MANIFEST}: names no {key}; D_F is made with the bundle's own.")
    embedder = load_embedder(path / manifest["embedder"]).to(device).requires_grad_(False)
    return load_detector(path / manifest["detector"], device), embedder


def main(argv=None) -> int:
    parser = cli.Parser(prog="python -m fairref.face_features", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--images", required=True, type=cli.path, help="folder of photographs, searched to its depth"
    )
    parser.add_argument("--weights", default=cli.WEIGHTS, help="bundle whose detector and embedder are used")
    parser.add_argument("--out", required=True, type=cli.path, help="safetensors file; must not be there yet")
    parser.add_argument(
        "--largest", type=cli.whole(16), default=LARGEST, help="bigger photographs are reduced to this"
    )
    parser.add_argument("--limit", type=cli.whole(1), help="photographs, evenly spread over all; None: all")
    parser.add_argument(
        "--strict", action="store_true", help="refuse unreadable photographs instead of skipping them"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: cuda where there is one"
    )
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"{options.out}: is there already; give another --out.")
    if options.out.suffix != ".safetensors" or not options.out.parent.is_dir():
        raise UserError(f"--out is {options.out}; expected a .safetensors file in a folder that is there.")
    files = photographs(options.images)
    if options.limit and options.limit < len(files):
        files = [files[i * len(files) // options.limit] for i in range(options.limit)]
    detector, embedder = judges_of(options.weights, cli.device(options.device))

    found, left_out = [], {"unreadable": [], "no face": []}
    with Progress(len(files), "faces") as progress:
        for file, result in features(files, detector, embedder, options.largest):
            if isinstance(result, Tensor):
                found.append(result)
            else:
                left_out[result].append(file)
                if options.strict and result == "unreadable":
                    raise UserError(f"{file}: can't be read; mend it or leave --strict out.")
            progress.step(f"{len(found)} found, {len(left_out['no face'])} without a face")
    for reason, out in left_out.items():
        if out:
            print(f"left out {len(out)}, {reason}, such as {out[0]}", file=sys.stderr)
    if not found:
        raise UserError(f"{options.images}: found no face in {len(files)} images; check the folder.")
    write(options.out, {FACE_FEATURES: torch.stack(found)}, {})
    print(f"{len(found)} faces of {len(files)} photographs: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
