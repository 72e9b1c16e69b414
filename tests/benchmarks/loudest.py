"""How evenly the images of a batch share its gradient: of each image, the length of dL/dz_0.

    python tests/benchmarks/loudest.py RUN [--adapter FILE] [--batches 60] [--report FILE]

The batches have the prompts and noise that training would draw next, all kinds; FILE is the run's moving average,
unless another is named. "Asked" are images that are to show another class. An
image's share is that of its squared length in the sum over the batch. A few seconds a batch.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))
from measure import machine, table, write

from fairref.generation.adapters import FILE
from fairref.tools.balance import Point, asked_images, point_of
from fairref.training.run import setup_of_run
from fairref.training.scores import seen_by_losses
from fairref.training.step import iteration_gradient

MOST = 0.9  # of a batch's squares


def of_batch(squares: np.ndarray, asked: np.ndarray) -> dict:
    """squares, asked (N,) of the images -> how many are asked, and how few hold how much."""
    falling = np.sort(squares)[::-1] / squares.sum()
    return {
        "asked": int(asked.sum()),
        "largest": float(falling[0]),
        "images": int(np.searchsorted(falling.cumsum(), MOST) + 1),
        "length": float(np.sqrt(squares.sum())),
    }


def seen_in(point: Point, i: int) -> dict:
    """The row of iteration i's batch."""
    seen = []
    iteration_gradient(point.setup, point.model, point.parameters, i, lambda *parts: seen.append(parts))
    _, _, pair, q, g, _ = seen[0]
    asked = asked_images(seen_by_losses(point.setup, pair, q), q)
    squares = g.double().flatten(1).square().sum(1)
    return of_batch(squares.cpu().numpy(), asked.cpu().numpy())


def measure(run: Path, file: Path, batches: int) -> list[dict]:
    """A row for each batch."""
    point = point_of(setup_of_run(run), file)
    first = point.setup.recipe.iterations
    return [seen_in(point, i) for i in range(first, first + batches)]


def lines_of(rows: list[dict]) -> str:
    """A table by how many images are asked: medians."""
    kinds = {
        "none": [r for r in rows if not r["asked"]],
        "1 to 3": [r for r in rows if 1 <= r["asked"] <= 3],
        "4 or more": [r for r in rows if r["asked"] > 3],
    }
    lines = [
        [name, len(of), *(float(np.median([r[key] for r in of])) for key in ("length", "largest", "images"))]
        for name, of in kinds.items()
        if of
    ]
    header = ["images asked", "batches", "length", "share of the largest", f"images that hold {MOST:.0%}"]
    return table(header, lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--adapter", type=Path, help=f"default: {FILE} of the run")
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args(argv)
    rows = measure(args.run, args.adapter or args.run / FILE, args.batches)
    if args.report:
        write(args.report, {"machine": machine(), "rows": rows})
    print(lines_of(rows))


if __name__ == "__main__":
    main()
