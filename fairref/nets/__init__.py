"""The networks Stable Diffusion is made of, their attention and their linear layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_ROWS = 256  # of a linear layer's input; for fewer, reordering the weights takes longer than it saves
IMAGES = 16  # from so many on, torch has oneDNN convolve them, with one thread too
ONEDNN = torch.backends.mkldnn.is_available()  # not on all systems


class Linear(nn.Linear):
    """x (..., C) -> (..., C_out).

    On a CPU, many rows of float32 are taken as pixels of images and go through a 1 x 1 convolution, which is oneDNN's:
    torch's own way, MKL's product, takes longer on an AMD EPYC (docs/speed.md). So the last digits depend on the batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        fits = ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32
        if not fits or rows < LEAST_ROWS or rows % IMAGES:
            return super().forward(x)
        pixels = x.reshape(IMAGES, 1, -1, self.in_features).permute(0, 3, 1, 2)  # channels last
        y = F.conv2d(pixels, self.weight[:, :, None, None], self.bias)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """q (B, n, C), k and v (B, m, C) -> (B, n, C): softmax(Q K^T / sqrt(C/heads)) V of each head's channels."""
    q, k, v = (y.unflatten(2, (heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, n or m, C/heads)
    h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return h.transpose(1, 2).flatten(2)  # (B, heads, n, C/heads) -> (B, n, C)
