"""Make the external faces of L_face from photographs: D_F, one unit embedding for each (docs/method.md §5).

    fairref faces --images celeba/img_align_celeba --weights weights/sd15 --out weights/sd15/faces.safetensors

The largest face of each photograph counts. It is detected and aligned as in finetuning. Photographs that can't be read
and those without a face are left out and counted.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fairref.bundle.judges import FACE_FEATURES, load_detector, load_embedder
from fairref.bundle.loading import bundle_path
from fairref.bundle.manifest import MANIFEST, read_manifest
from fairref.errors import UserError
from fairref.fairness.faces import Detector, align_crops, find
from fairref.files.images import read_image
from fairref.files.weights import write
from fairref.judges.sfnet import embed_faces
from fairref.progress import Progress

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
MAX_SIDE = 1024  # pixels of the longer side; larger photographs are reduced to this


def photographs(folder: Path) -> list[Path]:
    """Return the image files in a folder and below it, in order of name. Raises UserError if there are none.

    Links to folders are followed, but no folder is taken twice. Pipes, sockets and devices are left out.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one that holds the photographs.")
    files, seen = [], set()
    for here, below, names in os.walk(folder, onerror=_refuse, followlinks=True):
        place = os.path.realpath(here)
        if place in seen:
            below.clear()
            continue
        seen.add(place)
        below.sort()  # so that it does not depend on the disk which of two ways to a folder is the first
        files += [Path(here, name) for name in names if Path(name).suffix.lower() in SUFFIXES]
    files = sorted(file for file in files if file.is_file() or not file.exists())  # a broken link is reported
    if not files:
        raise UserError(
            f"{folder}: found no image in it or below; expected {', '.join(sorted(SUFFIXES))} files."
        )
    return files


def _refuse(error: OSError) -> None:
    """A folder that can't be listed would be left out without a word."""
    raise error


def load(file: Path, largest: int = MAX_SIDE) -> Tensor:
    """Return a photograph (1, 3, H, W) in [-1, 1], at most `largest` pixels a side. Raises UserError."""
    image = read_image(file)
    image.thumbnail((largest, largest))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


@torch.no_grad()
def features(
    files: list[Path], detector: Detector, embedder: nn.Module, largest: int = MAX_SIDE
) -> Iterator[tuple[Path, Tensor | UserError | None]]:
    """Yield each file with its face's unit embedding (D,) on the CPU, with why it can't be read, or without a face."""
    parameter = next(embedder.parameters())
    for file in files:
        try:
            x = load(file, largest).to(parameter)
        except UserError as error:
            yield file, error
            continue
        faces = find(detector, x)
        if not faces.has_face.any():
            yield file, None
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
) -> tuple[int, dict[str, list[str]]]:
    """Write D_F; return the number of faces in it, and what is said of each photograph left out, by reason.

    Raises UserError, with `strict` also for an unreadable photograph.
    """
    embeddings, left_out = [], {"unreadable": [], "no face": []}
    with Progress(len(files), "faces") as progress:
        for file, result in features(files, detector, embedder, largest):
            if isinstance(result, Tensor):
                embeddings.append(result)
            elif result is None:
                left_out["no face"].append(str(file))
            elif strict:
                raise UserError(f"{str(result).rstrip('.')}, or leave --strict out.")
            else:
                left_out["unreadable"].append(str(result))
            progress.step(f"{len(embeddings)} found, {len(left_out['no face'])} without a face")
    if embeddings:
        write(out, {FACE_FEATURES: torch.stack(embeddings)}, {})
    return len(embeddings), left_out
