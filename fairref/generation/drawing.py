"""Images of a bundle, from a text and noise in one call: what evaluation, validation and sample.py use."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.diffusion.model import GuidedModel
from fairref.diffusion.sampler import sample
from fairref.diffusion.solver import solver_table
from fairref.generation.padding import embed_padded
from fairref.generation.rollout import decode, first_noise

# at most so many images are drawn at once, and so many pixels: 8 images of 512²
GROUP, PIXELS = 32, 2**21


def group_size(bundle: Bundle) -> int:
    """How many images are drawn at once where nothing else says so."""
    return max(1, min(GROUP, PIXELS // bundle.resolution**2))


class Drawing(NamedTuple):
    """How images are drawn."""

    steps: int  # S
    guidance: float  # s
    end: str = "zero"  # of the solver
    padding: str = "full"  # of the texts, one of PADDINGS


def draw(
    bundle: Bundle,
    texts: tuple[str, str],
    z_T: Tensor,
    how: Drawing,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] of texts = (prompt, negative prompt) from noise z_T, by a bundle, adapted or not.

    no_grad is the caller's. `on_step` is called after each U-Net evaluation.
    """
    c, c_empty = embed_padded(bundle, *texts, how.padding).split(1)
    return draw_embedded(bundle, c, c_empty, z_T, how, on_step)


def draw_embedded(
    bundle: Bundle,
    c: Tensor,
    c_empty: Tensor,
    z_T: Tensor,
    how: Drawing,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """The same, of text embeddings c and c_empty: (1, T, d) for all images, or c (N, T, d), one for each."""
    table = solver_table(bundle.schedule, how.steps, how.end)
    model = GuidedModel(bundle.unet, c.detach(), c_empty.detach(), how.guidance)
    for step in sample(model, table, z_T):
        if on_step and step.eps is not None:
            on_step()
    return decode(bundle, step.z)


def fixed_noise(bundle: Bundle, seed: int, prompt: str, images: range) -> Iterator[tuple[list[int], Tensor]]:
    """These images of a prompt in groups, each with its noise z_T, which follows from (seed, prompt, image)."""
    for group in torch.tensor(images).split(group_size(bundle)):
        yield group.tolist(), first_noise(bundle, seed, zlib.crc32(prompt.encode()), group.tolist())


@torch.no_grad()
def fixed_images(bundle: Bundle, seed: int, prompt: str, images: range, how: Drawing) -> Tensor:
    """(n, 3, H, W) of these images of a prompt, from their `fixed_noise`."""
    groups = fixed_noise(bundle, seed, prompt, images)
    return torch.cat([draw(bundle, (prompt, ""), z_T, how) for _, z_T in groups])


@torch.no_grad()
def fixed_images_of(bundle: Bundle, seed: int, prompts: Sequence[str], images: range, how: Drawing) -> Tensor:
    """(P n, 3, H, W): the same of P prompts, drawn at once, which is faster where each has few images.

    The texts' padding is "full": then c_empty is the same for all.
    """
    texts = [embed_padded(bundle, prompt, "", how.padding).split(1) for prompt in prompts]
    c = torch.cat([c for c, _ in texts]).repeat_interleave(len(images), 0)
    z_T = torch.cat([z for prompt in prompts for _, z in fixed_noise(bundle, seed, prompt, images)])
    return draw_embedded(bundle, c, texts[0][1], z_T, how)
