"""Image files of any kind as 8-bit RGB, tensors as images, grids of images, and PNG files with texts in them."""

import io
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from fairref.errors import UserError
from fairref.files.paths import write_file

if TYPE_CHECKING:  # a report reads image files without waiting for torch
    from torch import Tensor

GAP = 2  # pixels between the images of a grid
# Pillow's decoders that may look at a foreign file, whatever its name is; that of PostScript would start a program
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
TIFF_BITS, TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
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


def grid(x: "Tensor", columns: int | None = None) -> Image.Image:
    """Return images (N, 3, H, W) in [-1, 1] as one, row by row; by default about as many rows as columns."""
    columns = columns or math.ceil(math.sqrt(len(x)))
    rows, (H, W) = math.ceil(len(x) / columns), x.shape[2:]
    sheet = Image.new("RGB", (columns * (W + GAP) - GAP, rows * (H + GAP) - GAP), "white")
    for i, image in enumerate(x):
        sheet.paste(to_image(image), (i % columns * (W + GAP), i // columns * (H + GAP)))
    return sheet


def to_image(x: "Tensor") -> Image.Image:
    """Return one image (3, H, W) in [-1, 1], clamped, as Pillow's."""
    bytes_ = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(bytes_.permute(1, 2, 0).cpu().numpy())  # (H, W, 3)


def read_image(path: str | Path, mode: str = "RGB") -> Image.Image:
    """Return an image file as 8-bit "RGB" or "RGBA", upright as its camera's mark says. Raises UserError.

    In RGB, what is transparent lies on white. Of several images in a file, the first counts.
    """
    path = Path(path)
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise ValueError("it is no regular file" if path.exists() else "there is no such file")
        with Image.open(path, formats=FORMATS) as file:
            image = _with_8_bits(ImageOps.exif_transpose(file), file)
        if mode == "RGB" and image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert(mode)
    except UNREADABLE as error:
        unknown = "its content is of another kind" if isinstance(error, UnidentifiedImageError) else None
        reason = unknown or getattr(error, "strerror", None) or str(error) or type(error).__name__
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise UserError(
            f"{path}: can't be read as an image ({reason.rstrip('.')}); give a whole {kinds} file."
        ) from None


def read_square(path: str | Path, side: int) -> "Tensor":
    """Return an image file as (3, side, side) in [-1, 1]; what is no square lies on a black one. Raises UserError."""
    image = read_image(path)
    if image.width != image.height:
        longer = max(image.size)
        square = Image.new("RGB", (longer, longer))
        square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
        image = square
    if image.width != side:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    import torch

    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1


def _with_8_bits(image: Image.Image, file: Image.Image) -> Image.Image:
    """Return an image with grey values of 16 bits, or floats in [0, 1], as one of 8 bits. `file` knows its tags."""
    tags = getattr(file, "tag_v2", {})
    if image.mode == "F":
        top = 1
    elif image.mode.startswith("I;16") or (image.mode == "I" and file.format == "PNG"):  # Pillow < 11: I
        top = 2 ** tags.get(TIFF_BITS, (16,))[0] - 1  # 12 bits are I;16 too
    elif image.mode == "I":
        raise ValueError("its pixels are whole numbers of unknown range; save it with 8 or 16 bits")
    else:
        return image
    grey = np.asarray(image, dtype=np.float32) / top
    low, high = grey.min(), grey.max()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"its pixels go from {low * top:g} to {high * top:g}, expected 0 to {top}")
    if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow minds it with at most 8 bits alone
        grey = 1 - grey
    return Image.fromarray((grey * 255).round().astype(np.uint8))


def read_rgba(path: str | Path) -> "Tensor":
    """Return an image file as (H, W, 4) in [0, 1]: red, green, blue, coverage. Raises UserError."""
    import torch

    return torch.from_numpy(np.asarray(read_image(path, "RGBA")).copy()).float() / 255


def png_bytes(image: Image.Image, texts: Mapping[str, str], optimize: bool = False) -> bytes:
    """Return a PNG file's content with `texts` in it, by key."""
    info = PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, value)
    data = io.BytesIO()
    image.save(data, "png", pnginfo=info, optimize=optimize)
    return data.getvalue()


def save_png(image: Image.Image, path: Path, texts: Mapping[str, str], optimize: bool = False) -> None:
    """Write a PNG file with `texts` in it, by key, as `write_file` does."""
    write_file(path, png_bytes(image, texts, optimize))
