"""SphereFace's residual network (Liu et al. 2017), the face embedder. Parameter names are opensphere's.

B faces, D features. No normalisation layers. opensphere has two kinds of this network, `sfnet20` and the earlier
`sfnet20_deprecated`. They differ in the place of a block's last ReLU. Checkpoints of both may have the same names.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fairref.errors import UserError
from fairref.judges import Embedder

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
    relu_before_sum: bool = False  # sfnet20_deprecated: a block is x + relu(h) instead of relu(x + h)
    first: str = "conv1"  # name of a level's first convolution; "conv" in the last sfnet20_deprecated

    def __post_init__(self):
        for name in ("depth", "features", "side"):
            if type(size := getattr(self, name)) is not int or size < 1:
                raise UserError(f"SFNet's {name} is {size!r}; expected a whole number from 1 up.")
        if type(self.relu_before_sum) is not bool:
            raise UserError(f"SFNet's relu_before_sum is {self.relu_before_sum!r}; expected true or false.")
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

    def __init__(self, c_in: int, c: int, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Conv2d(c_in, c, 3, stride=2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(getattr(self, self.name)(x))


class Residual(nn.Module):
    """x (B, C, h, w) -> relu(x + conv2(relu(conv1(x)))); relu_before_sum: x + relu(conv2(relu(conv1(x))))."""

    def __init__(self, c: int, relu_before_sum: bool) -> None:
        super().__init__()
        self.relu_before_sum = relu_before_sum
        self.conv1 = nn.Conv2d(c, c, 3, padding=1)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x)))
        return x + F.relu(h) if self.relu_before_sum else F.relu(x + h)


class SFNet(nn.Module):
    """Aligned faces x (B, 3, side, side), RGB in [-1, 1] -> features (B, D), not normalised; differentiable."""

    def __init__(self, config: SFNetConfig) -> None:
        super().__init__()
        self.config = config
        c_in, before = 3, config.relu_before_sum
        for level, (c, blocks) in enumerate(zip(config.channels, BLOCKS_OF[config.depth], strict=True), 1):
            layer = nn.Sequential(Down(c_in, c, config.first), *(Residual(c, before) for _ in range(blocks)))
            self.add_module(f"layer{level}", layer)
            c_in = c
        self.fc = nn.Linear(c_in * (config.side // STRIDE) ** 2, config.features)

    @property
    def side(self) -> int:
        """Side in pixels of the faces that it takes."""
        return self.config.side

    @property
    def width(self) -> int:
        """The number D of features."""
        return self.config.features

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.fc.weight.dtype)
        for level in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = level(x)
        return self.fc(x.flatten(1))


def embed_faces(network: Embedder, x: Tensor) -> Tensor:
    """Return emb of docs/method.md §5: unit vectors (B, D) along the mean of a face's and its mirror image's features.

    x (B, 3, side, side): aligned faces.
    """
    return F.normalize(network(x) + network(x.flip(3)), dim=1)


def config_of(
    tensors: dict[str, Tensor], side: int = SIDE, relu_before_sum: bool | None = None
) -> SFNetConfig:
    """Return the shape of a checkpoint's tensors. Raises UserError, also if `relu_before_sum` is needed but None."""
    name = "conv" if "layer1.0.conv.weight" in tensors else "conv1"
    first = f"layer{{}}.0.{name}.weight"
    missing = [name for name in (*map(first.format, range(1, 5)), "fc.weight") if name not in tensors]
    if missing:
        raise UserError(f"An SFNet checkpoint lacks {missing[0]}; take one that opensphere wrote.")
    channels = tuple(len(tensors[first.format(level)]) for level in range(1, 5))
    blocks = tuple(
        len({key.split(".")[1] for key in tensors if key.startswith(f"layer{level}.")}) - 1
        for level in range(1, 5)
    )
    depth = next((depth for depth, counts in BLOCKS_OF.items() if counts == blocks), 0)
    if relu_before_sum is None and name == "conv1" and depth and any(blocks):
        raise UserError(
            "An SFNet's tensors don't say which of opensphere's two kinds it is, but the config.yml beside the"
            ' checkpoint does, as "type". Write {"relu_before_sum": true} into config.json for sfnet20_deprecated,'
            " false for sfnet20."
        )
    before = name == "conv" if relu_before_sum is None else relu_before_sum
    return SFNetConfig(depth, channels, len(tensors["fc.weight"]), side, before, name)
