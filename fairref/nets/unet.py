"""The U-Net: noise prediction eps(z_t, t, c) of Stable Diffusion.

Parameter names are those of diffusers' UNet2DConditionModel. B batch, C channels, h w latent height and
width, T tokens, D width of the text encoder. SD-1.5, level by level (one entry a resnet, "*" if attention
follows; the way down is read top to bottom, the way up bottom to top; skips are used last made, first used):

    level   h w       down                  up: channels from below + skip
    0       64 x 64    320*  320*            640 +  320*   320 +  320*   320 +  320*
    1       32 x 32    640*  640*           1280 +  640*   640 +  640*   640 +  320*
    2       16 x 16   1280* 1280*           1280 + 1280*  1280 + 1280*  1280 +  640*
    3        8 x 8    1280  1280            1280 + 1280   1280 + 1280   1280 + 1280
    mid      8 x 8    1280* 1280
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairref.errors import require, require_numbers
from fairref.nets import Linear, attention

TRANSFORMER_GROUP_EPS = 1e-6  # GroupNorm before a transformer; the resnets' is config.norm_eps
LAYER_NORM_EPS = 1e-5
MAX_PERIOD = 10000  # of the time features

ATTENDS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net; names as in diffusers' unet/config.json."""

    block_out_channels: tuple[int, ...]  # channels per level, finest first
    down_block_types: tuple[str, ...]  # per level, finest first: with or without attention on the way down
    up_block_types: tuple[str, ...]  # per level, coarsest first: with or without attention on the way up
    layers_per_block: int  # resnets per level on the way down (one more on the way up)
    cross_attention_dim: int  # D, width of the text encoder
    attention_head_dim: int | tuple[int, ...] = 8  # NUMBER of heads (diffusers' name), for all levels or each
    in_channels: int = 4  # channels of z
    out_channels: int = 4  # channels of eps
    norm_num_groups: int = 32  # groups of every GroupNorm
    norm_eps: float = 1e-5  # eps of the resnets' GroupNorm and of the last one
    use_linear_projection: bool = False  # linear layers, not 1x1 convolutions, into and out of a transformer

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads per level."""
        per_level = self.attention_head_dim
        return per_level if isinstance(per_level, tuple) else (per_level,) * len(self.block_out_channels)

    def __post_init__(self):
        require_numbers(self)
        widths, groups = self.block_out_channels, self.norm_num_groups
        require(len(widths) >= 2, f"block_out_channels = {widths!r}", "two levels or more")
        require(widths[0] % 2 == 0, f"{widths[0]} channels at the finest level", "an even number")
        for name in ("down_block_types", "up_block_types", "attention_head_dim"):
            entries = self.heads if name == "attention_head_dim" else getattr(self, name)
            fits = isinstance(entries, tuple) and len(entries) == len(widths)
            require(fits, f"{name} = {entries!r}", f"one entry per level, {len(widths)}")
        for c, heads in zip(widths, self.heads, strict=True):
            expected = f"a multiple of norm_num_groups = {groups} and of its {heads} heads"
            require(c % groups == 0 and c % heads == 0, f"a level of {c} channels", expected)


SD15 = UNetConfig(
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=2,
    cross_attention_dim=768,
    attention_head_dim=8,
)


@dataclass(frozen=True)
class Level:
    """One row of the channel table: a level's way down and its way up."""

    width: int  # channels of every resnet's output
    down: tuple[int, ...]  # channels into each resnet on the way down
    up: tuple[tuple[int, int], ...]  # (channels from below, of the skip) into each resnet on the way up
    heads: int  # attention heads
    attends_down: bool  # whether each resnet on the way down is followed by attention
    attends_up: bool  # whether each resnet on the way up is followed by attention


def channel_table(config: UNetConfig) -> tuple[Level, ...]:
    """The `Level` rows of a U-Net, finest first: every channel count of the network."""
    widths, layers = config.block_out_channels, config.layers_per_block
    coarsest = len(widths) - 1
    skips = [widths[0]]  # made by conv_in
    downs = []
    for i, width in enumerate(widths):
        downs.append((widths[max(i - 1, 0)],) + (width,) * (layers - 1))
        skips += [width] * (layers if i == coarsest else layers + 1)  # one a resnet, one the downsampling
    rows, below = [], widths[-1]
    for i, width in reversed(list(enumerate(widths))):
        up = ((below, skips.pop()), *((width, skips.pop()) for _ in range(layers)))
        attends = ATTENDS[config.down_block_types[i]], ATTENDS[config.up_block_types[coarsest - i]]
        rows.append(Level(width, downs[i], up, config.heads[i], *attends))
        below = width
    return tuple(reversed(rows))


def time_features(t: Tensor, width: int) -> Tensor:
    """t (B,), index 0..999 -> (B, width) float32: cos(t f_j), then sin(t f_j), f_j = 10000^(-2j/width)."""
    half = width // 2
    # on the CPU: the last bit of exp is another on a GPU, and t makes a thousand of it
    frequency = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32) / half)
    angle = t.float()[:, None] * frequency.to(t.device)  # (B, width/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Time features (B, C_0) -> (B, 4 C_0), what every resnet is told about t."""

    def __init__(self, c: int):
        super().__init__()
        self.linear_1 = Linear(c, 4 * c)
        self.linear_2 = Linear(4 * c, 4 * c)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))


class Conv3x3(nn.Conv2d):
    """(B, C, h, w) -> (B, C_out, h, w), padded by one pixel.

    On a CPU a quarter as many pixels as output channels, or fewer, make one matrix product: there the library's
    convolution, which reorders the weights at every call, takes up to five times as long. So the last digits depend on
    the batch.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, h, w = x.shape
        if x.device.type != "cpu" or 4 * B * h * w > self.out_channels:
            return super().forward(x)
        padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # (B, h + 2, w + 2, C)
        patches = padded.unfold(1, 3, 1).unfold(2, 3, 1)  # (B, h, w, C, 3, 3)
        rows = patches.permute(0, 1, 2, 4, 5, 3).reshape(B * h * w, 9 * C)
        weight = self.weight.permute(0, 2, 3, 1).reshape(-1, 9 * C)  # channels last: a view
        return F.linear(rows, weight, self.bias).view(B, h, w, -1).permute(0, 3, 1, 2)


class Resnet(nn.Module):
    """x (B, C_in, h, w), time embedding (B, C_t) -> (B, C_out, h, w)."""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig):
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = Conv3x3(c_in, c_out)
        self.time_emb_proj = Linear(4 * config.block_out_channels[0], c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = Conv3x3(c_out, c_out)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)
        self.changes_width = c_in != c_out

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]  # (B, C_out, 1, 1)
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if self.changes_width else x) + h


class Attention(nn.Module):
    """x (B, n, C) attends to context (R, m, D): softmax(Q K^T / sqrt(C/heads)) V, then a linear layer.

    R divides B: the first B/R rows of x attend to the first of context, and so on."""

    def __init__(self, c: int, c_context: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(c, c, bias=False)
        self.to_k = Linear(c_context, c, bias=False)
        self.to_v = Linear(c_context, c, bias=False)
        self.to_out = nn.ModuleList([Linear(c, c)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        grouped = x.reshape(len(context), -1, x.shape[2])  # (B, n, C) -> (R, B/R n, C)
        h = attention(self.to_q(grouped), self.to_k(context), self.to_v(context), self.heads)
        return self.to_out[0](h.reshape(x.shape))  # (R, B/R n, C) -> (B, n, C)


class GEGLU(nn.Module):
    """x (..., C) -> (..., C_out): a * gelu(b), where (a, b) is one linear layer of x."""

    def __init__(self, c: int, c_out: int):
        super().__init__()
        self.proj = Linear(c, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.proj(x).chunk(2, dim=-1)
        return a * F.gelu(b, approximate="none")


class FeedForward(nn.Module):
    """x (..., C) -> (..., C) through 4 C gated channels."""

    def __init__(self, c: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(c, 4 * c), nn.Identity(), Linear(4 * c, c)])  # [1]: a dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Pixels x (B, hw, C) attend to each other, to the text c (R, T, D), and go through an MLP."""

    def __init__(self, width: int, c_text: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn2 = Attention(width, c_text, heads)
        self.norm3 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), c)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Feature map x (B, C, h, w) and text c (R, T, D) -> (B, C, h, w)."""

    def __init__(self, width: int, heads: int, config: UNetConfig):
        super().__init__()
        self.linear = linear = config.use_linear_projection
        self.norm = nn.GroupNorm(config.norm_num_groups, width, eps=TRANSFORMER_GROUP_EPS)
        self.proj_in = Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, config.cross_attention_dim, heads)])
        self.proj_out = Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.norm(x)
        if not self.linear:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, hw, C)
        if self.linear:
            h = self.proj_in(h)
        h = self.transformer_blocks[0](h, c)
        if self.linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).reshape(x.shape)  # (B, hw, C) -> (B, C, h, w)
        if not self.linear:
            h = self.proj_out(h)
        return x + h


class Downsample(nn.Module):
    """(B, C, h, w) -> (B, C, h/2, w/2), stride-2 convolution padded on all sides, unlike the VAE's."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, *size), nearest neighbour and a convolution."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = Conv3x3(c, c)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Block(nn.Module):
    """The modules of a level, one way; `UNet.forward` says in which order they run."""

    def __init__(self, config: UNetConfig, level: Level, channels: Sequence[int], attentions: int):
        """One resnet for each entry of `channels`, its input channels, and `attentions` transformers."""
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(c, level.width, config) for c in channels)
        transformers = (Transformer(level.width, level.heads, config) for _ in range(attentions))
        self.attentions = nn.ModuleList(transformers)
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()


class UNet(nn.Module):
    """eps(z_t, t, c), the noise in z_t as predicted from the time and the text."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.table = channel_table(config)
        c_0, coarsest = config.block_out_channels[0], self.table[-1]
        self.conv_in = nn.Conv2d(config.in_channels, c_0, 3, padding=1)
        self.time_embedding = TimeEmbedding(c_0)
        self.down_blocks = nn.ModuleList()
        for level in self.table:
            attentions = len(level.down) if level.attends_down else 0
            self.down_blocks.append(Block(config, level, level.down, attentions))
            if level is not coarsest:
                self.down_blocks[-1].downsamplers.append(Downsample(level.width))
        self.mid_block = Block(config, coarsest, (coarsest.width, coarsest.width), attentions=1)
        self.up_blocks = nn.ModuleList()
        for level in reversed(self.table):
            channels = [below + skip for below, skip in level.up]
            attentions = len(level.up) if level.attends_up else 0
            self.up_blocks.append(Block(config, level, channels, attentions))
            if level is not self.table[0]:
                self.up_blocks[-1].upsamplers.append(Upsample(level.width))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, c_0, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(c_0, config.out_channels, 3, padding=1)

    def forward(self, z: Tensor, t: int | float | Tensor, c: Tensor) -> Tensor:
        """z (B, 4, h, w), t time step index 0..999, a number or (B,), c (R, T, D) -> eps (B, 4, h, w).

        R divides B: each text serves B/R consecutive latents, and is read once for them."""
        t = torch.as_tensor(t, device=z.device).expand(len(z))  # (B,)
        features = time_features(t, self.config.block_out_channels[0])  # (B, C_0)
        time = self.time_embedding(features.to(z.dtype))  # (B, 4 C_0)

        h = self.conv_in(z)
        skips = [h]
        for block in self.down_blocks:
            for j, resnet in enumerate(block.resnets):
                h = resnet(h, time)
                if block.attentions:
                    h = block.attentions[j](h, c)
                skips.append(h)
            for downsample in block.downsamplers:
                h = downsample(h)
                skips.append(h)

        h = self.mid_block.resnets[0](h, time)
        h = self.mid_block.attentions[0](h, c)
        h = self.mid_block.resnets[1](h, time)

        for block in self.up_blocks:
            for j, resnet in enumerate(block.resnets):
                h = resnet(torch.cat([h, skips.pop()], dim=1), time)
                if block.attentions:
                    h = block.attentions[j](h, c)
            for upsample in block.upsamplers:
                h = upsample(h, size=skips[-1].shape[2:])  # the finer level's own size, also where it is odd

        return self.conv_out(F.silu(self.conv_norm_out(h)))
