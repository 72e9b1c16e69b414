"""The autoencoder: images x (B, 3, H, W) in [-1, 1] to latents z (B, 4, H/8, W/8) and back.

Parameter names are those of diffusers' AutoencoderKL. B batch, C channels, H W height and width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairref.errors import require, require_numbers
from fairref.nets import Linear, attention

EPS = 1e-6  # of every GroupNorm of the autoencoder; the U-Net's resnets use 1e-5


@dataclass(frozen=True)
class VAEConfig:
    """Shape of the autoencoder; names as in diffusers' vae/config.json."""

    block_out_channels: tuple[int, ...]  # per level, finest first; every level but the last halves H and W
    layers_per_block: int  # resnets per encoder level (a decoder level has one more)
    in_channels: int = 3  # channels of an image that is encoded
    out_channels: int = 3  # channels of a decoded image
    latent_channels: int = 4  # channels of z
    norm_num_groups: int = 32  # groups of every GroupNorm
    scaling_factor: float = 0.18215  # z = scaling_factor * mean, which makes Var(z) about 1

    def __post_init__(self):
        require_numbers(self)
        for c in self.block_out_channels:
            expected = f"a multiple of norm_num_groups = {self.norm_num_groups}"
            require(c % self.norm_num_groups == 0, f"{c} in block_out_channels", expected)


class Resnet(nn.Module):
    """x (B, C_in, H, W) -> (B, C_out, H, W): two normalised 3x3 convolutions beside a shortcut."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)
        self.changes_width = c_in != c_out

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if self.changes_width else x) + h


class Attention(nn.Module):
    """x (B, C, H, W) -> (B, C, H, W): x + softmax(Q K^T / sqrt(C)) V over all pixels, one head."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=EPS)
        self.to_q = Linear(c, c)
        self.to_k = Linear(c, c)
        self.to_v = Linear(c, c)
        self.to_out = nn.ModuleList([Linear(c, c)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)
        h = self.to_out[0](attention(self.to_q(h), self.to_k(h), self.to_v(h), heads=1))
        return x + h.transpose(1, 2).reshape(x.shape)  # (B, HW, C) -> (B, C, H, W)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2), stride-2 convolution padded at the right and the bottom only."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W), nearest neighbour and a convolution."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One level of the encoder or the decoder: resnets, then half or twice the resolution unless it is the last."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, down: bool = False, up: bool = False):
        super().__init__()
        channels = (c_in, *[c_out] * (layers - 1))
        self.resnets = nn.Sequential(*(Resnet(c, c_out, groups) for c in channels))
        self.downsamplers = nn.Sequential(*([Downsample(c_out)] if down else []))
        self.upsamplers = nn.Sequential(*([Upsample(c_out)] if up else []))

    def forward(self, h: Tensor) -> Tensor:
        return self.upsamplers(self.downsamplers(self.resnets(h)))


class MidBlock(nn.Module):
    """The coarsest level: resnet, attention, resnet."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(c, c, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(c, groups)])

    def forward(self, h: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](h)))


class Encoder(nn.Module):
    """x (B, 3, H, W) -> (B, 2 * latent channels, H/8, W/8): mean and log-variance before `quant_conv`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        layers, last = config.layers_per_block, len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.Sequential(
            *(Level(widths[max(i - 1, 0)], c, layers, groups, down=i < last) for i, c in enumerate(widths))
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid_block(self.down_blocks(self.conv_in(x)))
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class Decoder(nn.Module):
    """Latents (B, 4, h, w) after `post_quant_conv` -> image (B, 3, 8h, 8w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        layers, last = config.layers_per_block + 1, len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.Sequential(
            *(Level(widths[max(i - 1, 0)], c, layers, groups, up=i < last) for i, c in enumerate(widths))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        h = self.up_blocks(self.mid_block(self.conv_in(h)))
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class VAE(nn.Module):
    """Stable Diffusion's autoencoder. H and W must be multiples of 2^(levels - 1), 8 for SD-1.5."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, H, W) in [-1, 1] -> (mean, logvar), each (B, 4, H/8, W/8), unscaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, torch.clamp(logvar, -30.0, 20.0)

    def encode(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> z (B, 4, H/8, W/8) = scaling_factor * mean."""
        return self.config.scaling_factor * self.moments(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        """z (B, 4, h, w) as the U-Net sees it -> image (B, 3, 8h, 8w), nominally in [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z / self.config.scaling_factor))
