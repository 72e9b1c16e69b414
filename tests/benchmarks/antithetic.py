"""Whether an evaluation whose noise comes in pairs z, -z would need fewer images.

    python tests/benchmarks/antithetic.py RUN [--pairs 30]

The share of a class among pairs has (1 + rho) times the variance of a share among as many independent images, rho being
the correlation of the two classes of a pair. It is measured on the 12 validation occupations, for the original and for
RUN's adapter, within occupations. About 4 core minutes.
"""

import argparse
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent))
from measure import table

from fairref.bundle.loading import DEFAULT, Bundle, load_bundle
from fairref.evaluation.judging import SEED, judge_all
from fairref.generation.adapters import load_adapter
from fairref.generation.drawing import Drawing, draw
from fairref.generation.rollout import first_noise
from fairref.progress import Progress
from fairref.prompts.sets import OCCUPATIONS, read_prompts

DRAWING = Drawing(12, 2.5)


@torch.no_grad()
def pairs_of(bundle: Bundle, model: Bundle, prompt: str, pairs: int) -> np.ndarray:
    """(pairs, 2) whether the classifier sees a woman in the images of z and of -z."""
    z_T = first_noise(bundle, SEED, zlib.crc32(prompt.encode()), range(pairs))
    images = (draw(model, (prompt, ""), noise, DRAWING) for noise in (z_T, -z_T))
    return np.stack([judge_all(bundle, x).classes["classifier"]["gender"] == 0 for x in images], 1)


def correlation(found: list[np.ndarray]) -> tuple[float, float]:
    """rho within occupations, of both members' deviations from their occupation's share, and its standard error, from
    the scatter of occupations."""
    left = [of - of.mean() for of in found]  # (pairs, 2)
    products, squares = (np.array([f(of) for of in left]) for f in (product, square))
    rho = products.sum() / squares.sum()
    error = np.sqrt(((products - rho * squares) ** 2).sum()) / squares.sum()
    return float(rho), float(error)


def product(left: np.ndarray) -> float:
    """Without the bias of a mean that is taken from the same images."""
    return left.prod(1).sum() + square(left) / left.size


def square(left: np.ndarray) -> float:
    """Of one member."""
    return (left**2).sum() / 2


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--pairs", type=int, default=30)
    options = parser.parse_args()
    bundle = load_bundle(DEFAULT)
    (concept,) = read_prompts(OCCUPATIONS, None, bundle.path, ["gender"])
    rows = []
    for name, model in {"original": bundle, "adapted": load_adapter(bundle, options.run)}.items():
        found = []
        with Progress(len(concept.validation), name) as progress:
            for prompt in concept.validation:
                found.append(pairs_of(bundle, model, prompt, options.pairs))
                progress.step(prompt[-40:])
        rho, error = correlation(found)
        rows.append([name, rho, error, 1 + rho])
    print(table(["model", "rho", "standard error", "variance, of independent noise's"], rows))


if __name__ == "__main__":
    main()
