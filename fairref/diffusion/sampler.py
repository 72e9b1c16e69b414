"""The sampling loop: one generator for images, finetuning, figures and progress bars."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fairref.diffusion.model import Model
from fairref.diffusion.solver import SolverTable, step
from fairref.errors import UserError


class Step(NamedTuple):
    """One U-Net evaluation. The last item of a run is Step(S, None, z_0, None)."""

    i: int  # number of the evaluation, 0..S-1
    t: int | None  # the U-Net's time step, 0..T-1
    z: Tensor  # (N, 4, h, w), the evaluation's input
    eps: Tensor | None  # (N, 4, h, w), the guided noise prediction


def sample(
    model: Model, table: SolverTable, z_T: Tensor, w: Sequence[Tensor] | None = None
) -> Iterator[Step]:
    """Runs the solver from z_T (N, 4, h, w) and yields a Step per U-Net evaluation, then z_0 as
    Step(S, None, z_0, None). w: the S noises of an ancestral table.

    z keeps the dtype of z_T. Under the caller's no_grad there is no graph; without it, z_0 carries the exact
    one (eq 9)."""
    z, previous = z_T, None
    for i, t in enumerate(table.timesteps.tolist()):
        eps = model.eps(z, t)
        yield Step(i, t, z, eps)
        z, previous = step(table, i, z, eps, previous, None if w is None else w[i]), (z, eps)
    yield Step(table.S, None, z, None)


def noise(seed: int, iteration: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """(N, *shape) float32 standard normal, on the CPU. Each image's noise depends on (seed, iteration, its
    global index) alone, so it is the same however images are split over batches and processes."""
    for name, value in [("seed", seed), ("iteration", iteration), *(("image index", n) for n in indices)]:
        if not 0 <= value < 2**32:
            raise UserError(f"{name} is {value}; expected a whole number from 0 to 4294967295.")
    streams = [np.random.Philox(np.random.SeedSequence((seed, iteration, int(n)))) for n in indices]
    draws = [np.random.Generator(x).standard_normal(tuple(shape), dtype=np.float32) for x in streams]
    return torch.from_numpy(np.stack(draws)) if draws else torch.empty(0, *shape)
