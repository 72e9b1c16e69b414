"""The figures of the paper, 6a to 9: each as SVG with its numbers, and as PNG with the extra `figures`."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fairref.bundle.loading import Bundle
from fairref.errors import UserError
from fairref.files.paths import write_file
from fairref.reporting import charts
from fairref.reporting.gradient_study import GUIDANCE, Row, descent, scales
from fairref.reporting.paths import paths

NAMES = ("6a", "6b", "7", "8", "9")
SCALE = 2  # pixels of a PNG for each one of its SVG
THETA = {"c": "the text embeddings", "text_encoder": "the text encoder's LoRA", "unet": "the U-Net's LoRA"}


class Figure(NamedTuple):
    """One figure: its files' name without ending, its SVG and its numbers, [] of a drawing."""

    stem: str
    svg: str
    rows: Sequence[Row] = ()

    def write(self, folder: Path, as_png: bool = False) -> list[Path]:
        """Write the SVG, the numbers as CSV and, if wanted, a PNG into a folder; return the files. Raises UserError."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.stem}.svg"
        written = [path]
        write_file(path, self.svg.encode())
        if self.rows:
            written.append(path.with_suffix(".csv"))
            write_csv(written[-1], self.rows)
        if as_png:
            written.append(path.with_suffix(".png"))
            write_file(written[-1], bytes(renderer().svg_to_bytes(svg_string=self.svg, zoom=SCALE)))
        return written


def renderer() -> object:
    """Return the library that makes a PNG of an SVG. Raises UserError where it is missing."""
    try:
        import resvg_py
    except ImportError:
        raise UserError('--png needs resvg_py; install it with pip install -e ".[figures]".') from None
    return resvg_py


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write a table: one line for each row, and the keys of the first row on top."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def by_curve(rows: Sequence[Row], x: str) -> dict[str, list[Row]]:
    """Return the rows of each curve, in the order of the curves, with column `x` as their "x"."""
    curves: dict[str, list[Row]] = {}
    for row in rows:
        curves.setdefault(row["curve"], []).append({**row, "x": row[x]})
    return curves


def figure_6a(bundle: Bundle, modes: Sequence[str], prompt: str, target: str) -> Figure:
    """Return the loss to one fixed image by iteration, a curve for each mode of the gradient."""
    rows = descent(bundle, prompt, target, tuple(modes))
    about = "1 - cos, mean and range of 3 seeds"
    title = "Distance in CLIP to one fixed image, by gradient"
    return Figure("fig6a", charts.curves(by_curve(rows, "iteration"), "iteration", about, title), rows)


def figure_6b(bundle: Bundle, over: str, guidance: float | None, prompt: str) -> Figure:
    """Return the norms of the gradient's terms by diffusion time; `over`: a key of THETA."""
    guidance = GUIDANCE if guidance is None else guidance
    rows = scales(bundle, prompt, over=over, guidance=guidance)
    title = f"Scale of the gradient by time: θ is {THETA[over]}, guidance {guidance:g}"
    svg = charts.curves(
        by_curve(rows, "t"), "diffusion time t", "norm, mean and 90% band of 20 runs", title, log=True
    )
    parts = ("fig6b", *([over] if over != "c" else []), *([f"{guidance:g}"] if guidance != GUIDANCE else []))
    return Figure("-".join(parts), svg, rows)


def figure_7() -> Figure:
    """Return all paths of the gradient for T = 3."""
    return Figure("fig7", paths(3))
