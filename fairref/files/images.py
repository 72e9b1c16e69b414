"""Tensors as images, grids of images, and PNG files with texts in them."""

import io
import math
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fairref.files.paths import write_file

GAP = 2  # pixels between the images of a grid
# the errors that Pillow raises on damaged files
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    SyntaxError,
    LookupError,
    ArithmeticError,
    AttributeError,
    struct.error,
    Image.DecompressionBombError,
)


def grid(x: Tensor, columns: int | None = None) -> Image.Image:
    """Return images (N, 3, H, W) in [-1, 1] as one, row by row; by default about as many rows as columns."""
    columns = columns or math.ceil(math.sqrt(len(x)))
    rows, (H, W) = math.ceil(len(x) / columns), x.shape[2:]
    sheet = Image.new("RGB", (columns * (W + GAP) - GAP, rows * (H + GAP) - GAP), "white")
    for i, image in enumerate(x):
        sheet.paste(to_image(image), (i % columns * (W + GAP), i // columns * (H + GAP)))
    return sheet


def to_image(x: Tensor) -> Image.Image:
    """Return one image (3, H, W) in [-1, 1], clamped, as Pillow's."""
    bytes_ = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(bytes_.permute(1, 2, 0).cpu().numpy())  # (H, W, 3)


def read_rgba(path: Path) -> Tensor:
    """Return an image file as (H, W, 4) in [0, 1]: red, green, blue, coverage."""
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("RGBA")).copy()).float() / 255


def save_png(image: Image.Image, path: Path, texts: dict[str, str], optimize: bool = False) -> None:
    """Write a PNG file with `texts` in it, by key, as `write_file` does."""
    info = PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, value)
    data = io.BytesIO()
    image.save(data, "png", pnginfo=info, optimize=optimize)
    write_file(path, data.getvalue())
