"""From a text to the pictures of a bundle, in three pieces: embed, run the sampler, decode; and in one."""

import zlib

import torch
from torch import Tensor

from fairref.diffusion.sampler import Step, noise, sample
from fairref.diffusion.solver import SolverTable, solver_table

# at most so many pictures are drawn at once, and so many pixels: 8 pictures of 512²
GROUP, PIXELS = 64, 2**21


def latent_shape(bundle) -> tuple[int, int, int]:
    """(4, h, w) of the bundle's pictures."""
    factor = 2 ** (len(bundle.vae.config.block_out_channels) - 1)
    side = bundle.resolution // factor
    return bundle.vae.config.latent_channels, side, side


def first_noise(bundle, seed: int, iteration: int, indices) -> Tensor:
    """z_T (N, 4, h, w) of the images `indices`, on the bundle's device, in at least float32."""
    parameter = next(bundle.unet.parameters())
    z_T = noise(seed, iteration, indices, latent_shape(bundle))
    return z_T.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))


def embed(bundle, prompt: str, negative: str = "") -> Tensor:
    """[c, c_empty] (2, T, d) of a prompt and the empty or negative one.

    A soft prompt (P, D) stands between BOS and the prompt's first word, and not in c_empty; what no longer fits
    into T tokens is dropped before the last one, which is EOS in every text.
    """
    encoder, P = bundle.text_encoder, 0 if bundle.prefix is None else len(bundle.prefix)
    ids = bundle.tokenizer([prompt, negative])
    words = encoder.embed(ids.to(next(encoder.parameters()).device))  # (2, T, D)
    if P:
        bos, kept, _, eos = words[0].split([1, words.shape[1] - P - 2, P, 1])
        first = torch.cat([bos, bundle.prefix.to(words.dtype), kept, eos])  # (T, D)
        words = torch.stack([first, words[1]])
    return encoder(embeddings=words)


def rollout(
    bundle, table: SolverTable, z_T: Tensor, c: Tensor, c_empty: Tensor, guidance: float
) -> list[Step]:
    """The path z_1..z_S, z_0 of one run, without a graph."""
    with torch.no_grad():
        return list(sample(bundle.unet, table, z_T, c.detach(), c_empty.detach(), guidance))


def decode(bundle, z_0: Tensor) -> Tensor:
    """x (N, 3, H, W) in [-1, 1], at least float32; the clamp is part of the picture, so of its gradient."""
    x = bundle.vae.decode(z_0.to(next(bundle.vae.parameters()).dtype))
    return x.to(torch.promote_types(x.dtype, torch.float32)).clamp(-1, 1)


def group_size(bundle) -> int:
    """How many pictures are drawn at once where nothing else says so."""
    return max(1, min(GROUP, PIXELS // bundle.resolution**2))


def draw(bundle, texts, z_T: Tensor, steps: int, guidance: float, end="zero", on_step=None) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] of texts = (prompt, negative prompt) from noise z_T, by a bundle, adapted or not.

    no_grad is the caller's. `on_step` is called after each U-Net evaluation.
    """
    c, c_empty = embed(bundle, *texts).split(1)
    table = solver_table(bundle.schedule, steps, end)
    for step in sample(bundle.unet, table, z_T, c, c_empty, guidance):
        if on_step and step.eps is not None:
            on_step()
    return decode(bundle, step.z)


@torch.no_grad()
def fixed_pictures(
    bundle, seed: int, prompt: str, images: range, steps: int, guidance: float, end: str
) -> Tensor:
    """(n, 3, H, W) of these images of a prompt; their noise follows from (seed, prompt, image)."""
    stream = zlib.crc32(prompt.encode())
    parts = []
    for group in torch.tensor(images).split(group_size(bundle)):
        z_T = first_noise(bundle, seed, stream, group.tolist())
        parts.append(draw(bundle, (prompt, ""), z_T, steps, guidance, end))
    return torch.cat(parts)
