"""Make the external faces of L_face from photographs: D_F, one unit embedding for each (docs/method.md §5).

    fairref faces --images celeba/img_align_celeba --weights weights/sd15 --out weights/sd15/faces.safetensors

The largest face of each photograph counts. It is detected and aligned as in finetuning. Photographs that can't be read
and those without a face are left out and counted.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from fairref.bundle.judges import FACE_FEATURES, load_detector, load_embedder
from fairref.bundle.loading import bundle_path
from fairref.bundle.manifest import MANIFEST, read_manifest
from fairref.errors import UserError
from fairref.fairness.faces import Detector, align_crops, find
from fairref.files.images import UNREADABLE
from fairref.files.weights import write
from fairref.judges.sfnet import embed_faces
from fairref.progress import Progress

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
MAX_SIDE = 1024  # pixels of the longer side; larger photographs are reduced to this


def photographs(folder: Path) -> list[Path]:
    """Return the image files in a folder and below it, in order of name. Raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one that holds the photographs.")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(
            f"{folder}: found no image in it or below; expected {', '.join(sorted(SUFFIXES))} files."
        )
    return files


def load(file: Path, largest: int = MAX_SIDE) -> Tensor | None:
    """Return a photograph (1, 3, H, W) in [-1, 1], upright, at most `largest` pixels a side; None if unreadable."""
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
    files: list[Path], detector: Detector, embedder: nn.Module, largest: int = MAX_SIDE
) -> Iterator[tuple[Path, Tensor | str]]:
    """Yield each file with its face's unit embedding (D,) on the CPU, or with "unreadable" or "no face"."""
    parameter = next(embedder.parameters())
    for file in files:
        x = load(file, largest)
        if x is None:
            yield file, "unreadable"
            continue
        x = x.to(parameter)
        faces = find(detector, x)
        if not faces.has_face.any():
            yield file, "no face"
            continue
        yield file, embed_faces(embedder, align_crops(x, faces, embedder.side))[0].float().cpu()


def judges_of(weights: str, device: torch.device) -> tuple[Detector, nn.Module]:
    """Return the detector and the embedder of a bundle. Raises UserError."""
    path = bundle_path(weights)
    manifest = read_manifest(path / MANIFEST) if (path / MANIFEST).is_file() else {}
    for key in ("detector", "embedder"):
        if key not in manifest:
            raise UserError(f"{path / MANIFEST}: names no {key}; D_F is made with the bundle's own.")
    embedder = load_embedder(path / manifest["embedder"]).to(device).requires_grad_(False)
    return load_detector(path / manifest["detector"], device), embedder


def select(files: list[Path], limit: int | None) -> list[Path]:
    """Return at most `limit` of the files, evenly from all; None: all."""
    if not limit or limit >= len(files):
        return files
    return [files[i * len(files) // limit] for i in range(limit)]


def make_face_features(
    files: list[Path],
    detector: Detector,
    embedder: nn.Module,
    out: Path,
    largest: int = MAX_SIDE,
    strict: bool = False,
) -> tuple[int, dict[str, list[Path]]]:
    """Write D_F; return the number of faces in it, and the photographs that are left out, by reason.

    Raises UserError, with `strict` also for an unreadable photograph.
    """
    embeddings, left_out = [], {"unreadable": [], "no face": []}
    with Progress(len(files), "faces") as progress:
        for file, result in features(files, detector, embedder, largest):
            if isinstance(result, Tensor):
                embeddings.append(result)
            else:
                left_out[result].append(file)
                if strict and result == "unreadable":
                    raise UserError(f"{file}: can't be read; mend it or leave --strict out.")
            progress.step(f"{len(embeddings)} found, {len(left_out['no face'])} without a face")
    if embeddings:
        write(out, {FACE_FEATURES: torch.stack(embeddings)}, {})
    return len(embeddings), left_out
