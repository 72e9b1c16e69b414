"""The sampling loop: one generator for pictures, finetuning, figures and progress bars."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fairref.diffusion.solver import SolverTable, step
from fairref.errors import UserError


class Step(NamedTuple):
    """One U-Net evaluation. The last item of a run is Step(S, None, z_0, None)."""

    i: int  # number of the evaluation, 0..S-1
    t: int | None  # the U-Net's time step, 0..T-1
    z: Tensor  # (N, 4, h, w), the evaluation's input
    eps: Tensor | None  # (N, 4, h, w), the guided noise prediction


def guide(eps_empty: Tensor, eps_prompt: Tensor, s: float) -> Tensor:
    """Classifier-free guidance: eps = eps_empty + s (eps_prompt - eps_empty)."""
    return eps_empty + s * (eps_prompt - eps_empty)


def sample(
    unet: nn.Module,
    table: SolverTable,
    z_T: Tensor,
    c: Tensor,
    c_empty: Tensor | None,
    guidance: float,
    w: Sequence[Tensor] | None = None,
) -> Iterator[Step]:
    """Runs the solver from z_T (N, 4, h, w) and yields a Step per U-Net evaluation, then z_0 as
    Step(S, None, z_0, None).

    c (the prompt) and c_empty (the empty or negative prompt) are (1, T, d), the same for all images, or
    (N, T, d); c_empty may be None at guidance 1. w: the S noises of an ancestral table. z keeps the dtype of
    z_T, the U-Net runs in its own. Under the caller's no_grad there is no graph; without it, z_0 carries the
    exact one (eq 9)."""
    z, previous = z_T, None
    for i, t in enumerate(table.timesteps.tolist()):
        eps = predict(unet, z, t, c, c_empty, guidance)
        yield Step(i, t, z, eps)
        z, previous = step(table, i, z, eps, previous, None if w is None else w[i]), (z, eps)
    yield Step(table.S, None, z, None)


def predict(unet: nn.Module, z: Tensor, t: int, c: Tensor, c_empty: Tensor | None, guidance: float) -> Tensor:
    """The guided noise prediction (N, 4, h, w) in the dtype of z. The branches [empty, prompt] are one U-Net
    call; at guidance 1 the empty one has no weight and is left out."""
    dtype = network_dtype(unet, z)
    if guidance == 1:
        return unet(z.to(dtype), t, c.to(dtype)).to(z.dtype)
    rows = max(len(c), len(c_empty))  # 1: the U-Net reads each text once for all images
    both = torch.cat([c_empty.expand(rows, -1, -1), c.expand(rows, -1, -1)]).to(dtype)  # (2, T, d) or (2N, T, d)
    eps = unet(torch.cat([z, z]).to(dtype), t, both).to(z.dtype)  # (2N, 4, h, w)
    return guide(*eps.chunk(2), guidance)


def network_dtype(unet: nn.Module, z: Tensor) -> torch.dtype:
    """The dtype the network computes in: its first parameter's, or that of z where it has none."""
    return next((parameter.dtype for parameter in unet.parameters()), z.dtype)


def noise(seed: int, iteration: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """(N, *shape) float32 standard normal, on the CPU. Each image's noise depends on (seed, iteration, its
    global index) alone, so it is the same however images are split over batches and processes."""
    for name, value in [("seed", seed), ("iteration", iteration), *(("image index", n) for n in indices)]:
        if not 0 <= value < 2**32:
            raise UserError(f"{name} is {value}; expected a whole number from 0 to 4294967295")
    streams = [np.random.Philox(np.random.SeedSequence((seed, iteration, int(n)))) for n in indices]
    draws = [np.random.Generator(x).standard_normal(tuple(shape), dtype=np.float32) for x in streams]
    return torch.from_numpy(np.stack(draws)) if draws else torch.empty(0, *shape)
