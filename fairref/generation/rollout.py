"""From a text to the images of a bundle, in three pieces: embed, run the sampler, decode; and in one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.diffusion.model import GuidedModel, KeepingModel, Model
from fairref.diffusion.sampler import Step, noise, sample
from fairref.diffusion.solver import SolverTable


def latent_shape(bundle: Bundle) -> tuple[int, int, int]:
    """(4, h, w) of the bundle's images."""
    factor = 2 ** (len(bundle.vae.config.block_out_channels) - 1)
    side = bundle.resolution // factor
    return bundle.vae.config.latent_channels, side, side


def first_noise(bundle: Bundle, seed: int, iteration: int, indices: Sequence[int]) -> Tensor:
    """z_T (N, 4, h, w) of the images `indices`, on the bundle's device, in at least float32."""
    parameter = next(bundle.unet.parameters())
    z_T = noise(seed, iteration, indices, latent_shape(bundle))
    return z_T.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))


def embed(bundle: Bundle, prompt: str, negative: str = "") -> Tensor:
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
    if bundle.empty_encoder is None:
        return encoder(embeddings=words)
    return torch.cat([encoder(embeddings=words[:1]), bundle.empty_encoder(embeddings=words[1:])])


def guided(bundle: Bundle, text_embeddings: Tensor, s: float, keep: bool = False) -> GuidedModel:
    """The bundle's U-Net with [c, c_empty] (2, T, d), detached, and the guidance scale s; it may keep its graphs."""
    return (KeepingModel if keep else GuidedModel)(bundle.unet, *text_embeddings.detach().split(1), s)


@torch.no_grad()
def rollout(model: Model, table: SolverTable, z_T: Tensor) -> list[Step]:
    """The path z_1..z_S, z_0 of one run, without a graph."""
    return list(sample(model, table, z_T))


def decode(bundle: Bundle, z_0: Tensor) -> Tensor:
    """x (N, 3, H, W) in [-1, 1], at least float32; the clamp is part of the image, so of its gradient."""
    x = bundle.vae.decode(z_0.to(next(bundle.vae.parameters()).dtype))
    return x.to(torch.promote_types(x.dtype, torch.float32)).clamp(-1, 1)
