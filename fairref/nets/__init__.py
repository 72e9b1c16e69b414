"""The networks Stable Diffusion is made of, their attention, and less memory for a network's gradient."""

import copy
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """q (B, n, C), k and v (B, m, C) -> (B, n, C): softmax(Q K^T / sqrt(C/heads)) V of each head's channels."""
    q, k, v = (y.unflatten(2, (heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, n or m, C/heads)
    h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return h.transpose(1, 2).flatten(2)  # (B, heads, n, C/heads) -> (B, n, C)


def recomputed(network: nn.Module, blocks: tuple[type[nn.Module], ...]) -> nn.Module:
    """The same network and weights, whose `blocks` keep only their inputs for a gradient, and then compute the rest
    again."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    again = copy.deepcopy(network, shared)
    keep_inputs = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for module in again.modules():
        if isinstance(module, blocks):
            module.forward = partial(keep_inputs, module.forward)
    return again
