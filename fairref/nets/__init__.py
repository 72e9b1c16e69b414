"""The networks Stable Diffusion is made of, and the attention that they share."""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """q (B, n, C), k and v (B, m, C) -> (B, n, C): softmax(Q K^T / sqrt(C/heads)) V of each head's channels."""
    q, k, v = (y.unflatten(2, (heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, n or m, C/heads)
    h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return h.transpose(1, 2).flatten(2)  # (B, heads, n, C/heads) -> (B, n, C)
