"""Tensors as pictures: one, a grid of them, and PNG files that say how they were made."""

import math
import struct
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

GAP = 2  # pixels between the pictures of a grid
# what Pillow raises on damaged files
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
    """Pictures (N, 3, H, W) in [-1, 1], row by row, in about a square."""
    columns = columns or math.ceil(math.sqrt(len(x)))
    rows, (H, W) = math.ceil(len(x) / columns), x.shape[2:]
    sheet = Image.new("RGB", (columns * (W + GAP) - GAP, rows * (H + GAP) - GAP), "white")
    for i, picture in enumerate(x):
        sheet.paste(to_image(picture), (i % columns * (W + GAP), i // columns * (H + GAP)))
    return sheet


def to_image(x: Tensor) -> Image.Image:
    """One picture (3, H, W) in [-1, 1], clamped."""
    bytes_ = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(bytes_.permute(1, 2, 0).cpu().numpy())  # (H, W, 3)


def save_png(image: Image.Image, path: Path, texts: dict[str, str]) -> None:
    """Writes a PNG with `texts` in it."""
    info = PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, value)
    image.save(path, pnginfo=info)
