"""From a text to the pictures of a bundle, in three pieces: embed, run the sampler, decode."""

import torch
from torch import Tensor, nn

from fairref.diffusion.sampler import Step, noise, sample
from fairref.diffusion.solver import SolverTable


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


def embed(bundle, text_encoder: nn.Module, texts: list[str]) -> Tensor:
    """c (B, T, d) of B texts by the bundle's own or an adapted text encoder."""
    ids = bundle.tokenizer(texts)
    return text_encoder(ids.to(next(text_encoder.parameters()).device))


def rollout(
    bundle, table: SolverTable, z_T: Tensor, c: Tensor, c_empty: Tensor, guidance: float
) -> list[Step]:
    """The path z_1..z_S, z_0 of one run, without a graph."""
    with torch.no_grad():
        return list(sample(bundle.unet, table, z_T, c.detach(), c_empty.detach(), guidance))


def decode(bundle, z_0: Tensor) -> Tensor:
    """x (N, 3, H, W) in [-1, 1]; the clamp is part of the picture, so of its gradient."""
    return bundle.vae.decode(z_0.to(next(bundle.vae.parameters()).dtype)).clamp(-1, 1)
