"""How large J_s = d eps^(s)/d z_s is, and the product B_t that it enters: whether the exact gradient can explode.

    python tests/benchmarks/jacobians.py [--weights FOLDER] [--guidance 1 3 7.5] [--depths 20 100] [--out FILE.csv]

For each guidance scale and depth (steps of an ancestral run) one line for each of some times t, the mean over images:
|J| is the largest singular value of J_t, |I - b J| that of its factor in B, and |B_t| that of the product of all
factors below t (eq 9), all by power iteration; |R B_t| / |R| is the product's gain for a random cotangent R, as figure
6b has it. What is in the file is not measured again, so a run that was stopped goes on.
"""

import argparse
import csv
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fairref.bundle.loading import DEFAULT, load_bundle
from fairref.diffusion.model import GuidedModel
from fairref.diffusion.sampler import noise, sample
from fairref.diffusion.solver import SolverTable, ancestral_table
from fairref.files.paths import write_file
from fairref.generation.rollout import embed, first_noise, latent_shape
from fairref.prompts import occupation_prompt

COLUMNS = ("guidance", "depth", "t", "|J|", "|I - b J|", "|B_t|", "|R B_t| / |R|")
SEED = 20_000  # of the noise, that of figure 6b


class Product:
    """B as a chain of factors I - b_i J_i, i in run order, of n images at once: products from both sides."""

    def __init__(self, model: GuidedModel, table: SolverTable, path: list):
        self.model, self.table, self.path = model, table, path
        self.b = (-table.q / table.p).tolist()  # eq 9's factors: a step's scalar p_i is part of A_t

    def jacobian(self, i: int, u: Tensor) -> Tensor:
        """J_i u (n, 4, h, w)."""
        t = int(self.table.timesteps[i])
        with sdpa_kernel(SDPBackend.MATH):  # which can be differentiated twice
            _, product = torch.autograd.functional.jvp(lambda z: self.model.eps(z, t), self.path[i].z, u)
        return product

    def transposed(self, i: int, v: Tensor) -> Tensor:
        """v^T J_i (n, 4, h, w)."""
        t = self.table.timesteps[i].expand(len(v))
        return self.model.vjp(self.path[i].z, t, v, wrt_z=True)[1]

    def right(self, steps: Sequence[int], u: Tensor) -> Tensor:
        """The product of these factors and u: the first step acts first."""
        for i in steps:
            u = u - self.b[i] * self.jacobian(i, u)
        return u

    def left(self, steps: Sequence[int], v: Tensor) -> Tensor:
        """v^T and the product of these factors."""
        for i in reversed(steps):
            v = v - self.b[i] * self.transposed(i, v)
        return v


def norms(x: Tensor) -> Tensor:
    """(n,) of (n, ...)."""
    return x.flatten(1).norm(dim=1)


def largest(
    right: Callable[[Tensor], Tensor], left: Callable[[Tensor], Tensor], u: Tensor, rounds: int
) -> float | None:
    """The largest singular value of a linear map of each image by power iteration, its mean; None without rounds."""
    if not rounds:
        return None
    for _ in range(rounds):
        v = right(u / norms(u).view(-1, 1, 1, 1))
        u = left(v / norms(v).view(-1, 1, 1, 1))
    return float(norms(u).mean())


def measure(
    product: Product, start: Tensor, times: int, rounds: int
) -> Iterator[tuple[int, float | None, float | None, float | None, float]]:
    """t, |J|, |I - b J|, |B_t| and |R B_t| / |R| at so many times, from early ones on."""
    S = product.table.S
    v, reached = start, S  # R B_t has the factors of the times below t, of which more come with each t
    for k in range(1, times + 1):
        i = S - round(k * S / times)  # the last one is the first step of the run
        v, reached = product.left(range(i + 1, reached), v), i + 1
        below = range(i + 1, S)
        yield (
            int(product.table.timesteps[i]) + 1,
            largest(partial(product.jacobian, i), partial(product.transposed, i), start, rounds),
            largest(partial(product.right, [i]), partial(product.left, [i]), start, rounds),
            largest(partial(product.right, below), partial(product.left, below), start, rounds),
            float((norms(v) / norms(start)).mean()),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default=DEFAULT)
    parser.add_argument("--prompt", default=occupation_prompt("pilot"))
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0, 7.5])
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument(
        "--rounds",
        type=int,
        default=10,
        help="of a power iteration; 0: none, |R B_t| / |R| alone, which is quick",
    )
    parser.add_argument("--out", type=Path, default=Path("jacobians.csv"))
    options = parser.parse_args()
    bundle, rows = load_bundle(options.weights), []
    if options.out.exists():
        with options.out.open(newline="", encoding="utf-8") as file:
            rows = [
                tuple(float(cell) if cell else None for cell in row) for row in list(csv.reader(file))[1:]
            ]
    c, c_empty = embed(bundle, options.prompt).detach().split(1)
    images, shape = range(options.images), latent_shape(bundle)
    for depth in options.depths:
        for s in options.guidance:
            if sum(row[:2] == (s, depth) for row in rows) == options.times:
                continue
            rows = [row for row in rows if row[:2] != (s, depth)]  # of a run that was stopped
            table, model = ancestral_table(bundle.schedule, depth), GuidedModel(bundle.unet, c, c_empty, s)
            z_T = first_noise(bundle, 0, SEED, images)
            w = [noise(0, SEED + 1 + i, images, shape).to(z_T) for i in range(depth)]
            with torch.no_grad():
                product = Product(model, table, list(sample(model, table, z_T, w)))
            start = noise(0, SEED - 1, images, shape).to(z_T)
            for line in measure(product, start, options.times, options.rounds):
                rows.append((s, depth, *line))
                text = [COLUMNS, *(["" if v is None else f"{v:.6g}" for v in row] for row in rows)]
                write_file(options.out, "".join(",".join(row) + "\n" for row in text).encode())
                print(",".join(text[-1]), flush=True)


if __name__ == "__main__":
    main()
