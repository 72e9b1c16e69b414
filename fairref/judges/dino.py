"""DINOv2 (Oquab et al. 2023), the image encoder of eq 7's second term. Parameter names are the released code's.

B images, P patches, D width. A pre-norm vision transformer whose branches are scaled channel by channel.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairref.errors import UserError
from fairref.judges import IMAGENET_MEAN, IMAGENET_STD
from fairref.nets import Linear

# The released models place the grid of patches with scale (n + 0.1) / n_trained, not n / n_trained, in their
# bicubic interpolation; it moves the position embeddings of 224 pixels a little.
OFFSET = 0.1
LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class DinoConfig:
    """Shape of the encoder; the defaults are ViT-B/14 as released. Raises UserError."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: int = 4
    patch: int = 14
    trained_size: int = 518  # pixels a side that the position embedding was trained for
    input_size: int = 224  # pixels a side to which images are resized
    offset: float = OFFSET

    def __post_init__(self):
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.type is int}
        if wrong := [name for name, size in sizes.items() if type(size) is not int or size < 1]:
            raise UserError(f"DINO's {wrong[0]} is {sizes[wrong[0]]!r}; expected a whole number from 1 up.")
        if not isinstance(self.offset, int | float):
            raise UserError(f"DINO's offset is {self.offset!r}; expected a number.")
        if self.width % self.heads or self.trained_size % self.patch or self.input_size % self.patch:
            raise UserError(
                f"DINO's width is {self.width} with {self.heads} heads, its sizes are {self.trained_size} and"
                f" {self.input_size} pixels with patches of {self.patch}; expected each to divide."
            )


class Attention(nn.Module):
    """x (B, 1 + P, D) -> (B, 1 + P, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, 1 + P, d)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """x (..., D) times one factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class MLP(nn.Module):
    """x (..., D) -> (..., D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + ls1 attn(norm1(x)), then x + ls2 mlp(norm2(x))."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.attn = Attention(config.width, config.heads)
        self.ls1 = LayerScale(config.width)
        self.norm2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config.width, config.mlp_ratio * config.width)
        self.ls2 = LayerScale(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """x (B, 3, H, W) -> one token for each patch, row by row, (B, P, D)."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch, config.patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class Dino(nn.Module):
    """Images x (B, 3, H, W) in [-1, 1] -> features (B, D), the class token after the last norm; differentiable."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.config = config
        side = config.trained_size // config.patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, config.width))
        self.mask_token = nn.Parameter(torch.zeros(1, config.width))  # of pretraining; in the checkpoint
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    @property
    def width(self) -> int:
        """The number D of features."""
        return self.config.width

    def preprocess(self, x: Tensor) -> Tensor:
        """Return x (B, 3, H, W) in [-1, 1] as (B, 3, input_size, input_size), ImageNet-normalised."""
        size = (self.config.input_size,) * 2
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)
        return ((x + 1) / 2 - self.mean) / self.std

    def positions(self, rows: int, columns: int) -> Tensor:
        """Return the position embedding (1, 1 + P, D) of a grid of patches, interpolated from that of training."""
        side = self.config.trained_size // self.config.patch
        if (rows, columns) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
        scale = tuple((n + self.config.offset) / side for n in (rows, columns))
        options = {"scale_factor": scale} if self.config.offset else {"size": (rows, columns)}
        grid = F.interpolate(grid.float(), mode="bicubic", align_corners=False, **options).to(grid.dtype)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    def tokens(self, x: Tensor) -> Tensor:
        """Return all tokens (B, 1 + P, D) after the norm. x (B, 3, H, W): preprocessed, multiples of the patch."""
        rows, columns = (n // self.config.patch for n in x.shape[-2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], 1)
        x = x + self.positions(rows, columns)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(self.preprocess(x))[:, 0]
