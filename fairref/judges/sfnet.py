"""SphereFace's residual network (Liu et al. 2017), the face embedder. Parameter names are opensphere's.

B faces, D features. No normalisation layers. Two generations of checkpoints exist, with other names and another
place of the last ReLU of a block: `config_of` tells them apart.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fairref.errors import UserError

BLOCKS_OF = {4: (0, 0, 0, 0), 10: (0, 1, 2, 0), 20: (1, 2, 4, 1), 36: (2, 4, 8, 2), 64: (3, 8, 16, 3)}
SIDE = 112  # pixels of an aligned face
STRIDE = 16  # of the four levels together


@dataclass(frozen=True)
class SFNetConfig:
    """Shape of the network; the defaults are SFNet-20. Raises UserError."""

    depth: int = 20
    channels: tuple[int, ...] = (64, 128, 256, 512)
    features: int = 512
    side: int = SIDE
    relu_before_sum: bool = False  # as in the older checkpoints, whose first layer is layer1.0.conv

    def __post_init__(self):
        for name in ("depth", "features", "side"):
            if type(size := getattr(self, name)) is not int or size < 1:
                raise UserError(f"SFNet's {name} is {size!r}; expected a whole number from 1 up.")
        if self.depth not in BLOCKS_OF:
            depths = ", ".join(map(str, BLOCKS_OF))
            raise UserError(f"SFNet's depth is {self.depth}; expected one of {depths}.")
        if len(self.channels) != 4 or self.side % STRIDE:
            raise UserError(
                f"SFNet has {len(self.channels)} channel counts and a side of {self.side} pixels; expected four and"
                f" a multiple of {STRIDE}."
            )


class Down(nn.Module):
    """x (B, C_in, h, w) -> (B, C, h/2, w/2)."""

    def __init__(self, c_in: int, c: int, older: bool):
        super().__init__()
        self.name = "conv" if older else "conv1"
        self.add_module(self.name, nn.Conv2d(c_in, c, 3, stride=2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(getattr(self, self.name)(x))


class Residual(nn.Module):
    """x (B, C, h, w) -> relu(x + conv2(relu(conv1(x)))); older: x + relu(conv2(relu(conv1(x))))."""

    def __init__(self, c: int, older: bool):
        super().__init__()
        self.older = older
        self.conv1 = nn.Conv2d(c, c, 3, padding=1)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x)))
        return x + F.relu(h) if self.older else F.relu(x + h)


class SFNet(nn.Module):
    """Aligned faces x (B, 3, side, side), RGB in [-1, 1] -> features (B, D), not normalised; differentiable."""

    def __init__(self, config: SFNetConfig):
        super().__init__()
        self.config = config
        c_in, older = 3, config.relu_before_sum
        for level, (c, blocks) in enumerate(zip(config.channels, BLOCKS_OF[config.depth]), 1):
            layer = nn.Sequential(Down(c_in, c, older), *(Residual(c, older) for _ in range(blocks)))
            self.add_module(f"layer{level}", layer)
            c_in = c
        self.fc = nn.Linear(c_in * (config.side // STRIDE) ** 2, config.features)

    def forward(self, x: Tensor) -> Tensor:
        for level in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = level(x)
        return self.fc(x.flatten(1))


def embed_faces(network: nn.Module, x: Tensor) -> Tensor:
    """emb of docs/method.md section 5: (B, 3, side, side) -> unit vectors (B, D), mean of a face and its mirror image."""
    x = x.to(next(network.parameters()).dtype)
    return F.normalize(network(x) + network(x.flip(3)), dim=1)


def config_of(tensors: dict[str, Tensor], side: int = SIDE) -> SFNetConfig:
    """The shape that a checkpoint's tensors have. Raises UserError."""
    older = "layer1.0.conv.weight" in tensors
    first = "layer{}.0.conv.weight" if older else "layer{}.0.conv1.weight"
    missing = [name for name in (*map(first.format, range(1, 5)), "fc.weight") if name not in tensors]
    if missing:
        raise UserError(f"An SFNet checkpoint lacks {missing[0]}; take one that opensphere wrote.")
    channels = tuple(len(tensors[first.format(level)]) for level in range(1, 5))
    blocks = tuple(
        len({key.split(".")[1] for key in tensors if key.startswith(f"layer{level}.")}) - 1
        for level in range(1, 5)
    )
    depth = next((depth for depth, counts in BLOCKS_OF.items() if counts == blocks), 0)
    return SFNetConfig(depth, channels, len(tensors["fc.weight"]), side, older)
