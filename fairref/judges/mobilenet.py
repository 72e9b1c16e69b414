"""MobileNetV3 (Howard et al. 2019), the attribute classifier. Parameter names are torchvision's.

B batch, C channels, H W pixels, K classes of one attribute, M the logits of all attributes side by side.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairref.errors import UserError
from fairref.judges import IMAGENET_MEAN, IMAGENET_STD

# One row for each inverted residual block, features.1 first, channels at width 1: kernel, expanded channels, output
# channels, squeeze-excitation, activation, stride. Input channels are the output channels of the row above.
LARGE = (
    (3, 16, 16, False, "relu", 1),
    (3, 64, 24, False, "relu", 2),
    (3, 72, 24, False, "relu", 1),
    (5, 72, 40, True, "relu", 2),
    (5, 120, 40, True, "relu", 1),
    (5, 120, 40, True, "relu", 1),
    (3, 240, 80, False, "hardswish", 2),
    (3, 200, 80, False, "hardswish", 1),
    (3, 184, 80, False, "hardswish", 1),
    (3, 184, 80, False, "hardswish", 1),
    (3, 480, 112, True, "hardswish", 1),
    (3, 672, 112, True, "hardswish", 1),
    (5, 672, 160, True, "hardswish", 2),
    (5, 960, 160, True, "hardswish", 1),
    (5, 960, 160, True, "hardswish", 1),
)
SMALL = (
    (3, 16, 16, True, "relu", 2),
    (3, 72, 24, False, "relu", 2),
    (3, 88, 24, False, "relu", 1),
    (5, 96, 40, True, "hardswish", 2),
    (5, 240, 40, True, "hardswish", 1),
    (5, 240, 40, True, "hardswish", 1),
    (5, 120, 48, True, "hardswish", 1),
    (5, 144, 48, True, "hardswish", 1),
    (5, 288, 96, True, "hardswish", 2),
    (5, 576, 96, True, "hardswish", 1),
    (5, 576, 96, True, "hardswish", 1),
)
BLOCKS = {"large": LARGE, "small": SMALL}
PIXELS = ("imagenet", "plain")
STEM_CHANNELS = 16
HEAD_CHANNELS = {"large": 1280, "small": 1024}  # of the hidden layer of the head
LAST_EXPANSION = 6  # the last 1x1 convolution widens the last block's output by this
BN_EPS, BN_MOMENTUM = 1e-3, 0.01
ACTIVATIONS = {"relu": nn.ReLU, "hardswish": nn.Hardswish, "none": nn.Identity}


@dataclass(frozen=True)
class MobileNetConfig:
    """The shape of one MobileNetV3. Raises UserError for a value that no network has."""

    kind: str = "large"  # which table of blocks: "large" or "small"
    width: float = 1.0  # multiplies every channel count, which is then rounded to a multiple of 8
    num_logits: int = 1000  # outputs of the last layer
    input_size: int = 224  # side in pixels to which a Classifier resizes its images
    dropout: float = 0.2  # between the two layers of the head, in train mode only
    pixels: str = "imagenet"  # normalisation by a Classifier: "imagenet" mean and std, or "plain", [-1, 1]

    def __post_init__(self):
        if self.kind not in BLOCKS:
            raise UserError(f'MobileNet option "kind" is {self.kind!r}; choose one of {", ".join(BLOCKS)}.')
        if self.pixels not in PIXELS:
            raise UserError(
                f'MobileNet option "pixels" is {self.pixels!r}; choose one of {", ".join(PIXELS)}.'
            )
        if not self.width > 0 or self.num_logits < 1 or self.input_size < 1 or not 0 <= self.dropout < 1:
            raise UserError(
                f"MobileNet options are {asdict(self)}; width, num_logits and input_size must be positive"
                " and dropout in [0, 1): correct the one that is not."
            )

    @classmethod
    def from_dict(cls, d: Mapping[str, object]) -> "MobileNetConfig":
        """Return the config with these fields, and defaults for the others. Raises UserError for other keys."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(d) - set(known))
        if unknown:
            raise UserError(f'MobileNet option "{unknown[0]}" is unknown; choose from {", ".join(known)}.')
        return cls(**d)

    def to_dict(self) -> dict[str, object]:
        """Return the fields, as `from_dict` takes them."""
        return asdict(self)


def make_divisible(channels: float, divisor: int = 8) -> int:
    """Return `channels` rounded to a multiple of `divisor`, at least `divisor`, never more than 10 % down."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def conv_norm_act(
    c_in: int, c_out: int, kernel: int, stride: int, groups: int, activation: str
) -> nn.Sequential:
    """Return convolution (0), BatchNorm (1), activation (2); the padding keeps H and W at stride 1."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, padding=(kernel - 1) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out, eps=BN_EPS, momentum=BN_MOMENTUM),
        ACTIVATIONS[activation](),
    )


class SqueezeExcitation(nn.Module):
    """x (B, C, H, W): each channel times a gate in [0, 1], computed from the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = make_divisible(channels // 4)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        gate = self.fc2(F.relu(self.fc1(gate)))
        return x * F.hardsigmoid(gate)


class InvertedResidual(nn.Module):
    """x (B, c_in, H, W) -> (B, c_out, H/stride, W/stride): widen 1x1, filter each channel, gate, narrow 1x1.

    The input is added if the shapes agree.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        expanded: int,
        kernel: int,
        gated: bool,
        activation: str,
        stride: int,
    ) -> None:
        super().__init__()
        layers = []
        if expanded != c_in:
            layers.append(conv_norm_act(c_in, expanded, 1, 1, 1, activation))
        layers.append(conv_norm_act(expanded, expanded, kernel, stride, expanded, activation))
        if gated:
            layers.append(SqueezeExcitation(expanded))
        layers.append(conv_norm_act(expanded, c_out, 1, 1, 1, "none"))
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class MobileNetV3(nn.Module):
    """x (B, 3, H, W), ImageNet-normalised -> logits (B, num_logits), for any H and W."""

    def __init__(self, config: MobileNetConfig) -> None:
        super().__init__()
        self.config = config

        def wide(channels: int) -> int:
            return make_divisible(channels * config.width)

        c = wide(STEM_CHANNELS)
        features = [conv_norm_act(3, c, 3, 2, 1, "hardswish")]
        for kernel, expanded, c_out, gated, activation, stride in BLOCKS[config.kind]:
            features.append(
                InvertedResidual(c, wide(c_out), wide(expanded), kernel, gated, activation, stride)
            )
            c = wide(c_out)
        features.append(conv_norm_act(c, LAST_EXPANSION * c, 1, 1, 1, "hardswish"))
        self.features = nn.Sequential(*features)
        hidden = wide(HEAD_CHANNELS[config.kind])
        self.classifier = nn.Sequential(
            nn.Linear(LAST_EXPANSION * c, hidden),
            nn.Hardswish(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, config.num_logits),
        )
        for module in self.modules():  # the values that training from scratch starts at
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # (B, 6 c, H/32, W/32)
        x = x.mean((2, 3))  # (B, 6 c)
        return self.classifier(x)  # (B, num_logits)


class Classifier(nn.Module):
    """h of docs/method.md: images x (B, 3, H, W) in [-1, 1] -> {attribute: logits (B, K)}, differentiable.

    `attributes`: name -> class names. `logits`: name -> indices of the classes among the network's M logits; without
    it the classes are the network's logits in order. A new one is in train mode like any module;
    `bundle.judges.load_classifier` returns one in eval mode.
    """

    def __init__(
        self,
        network: MobileNetV3,
        attributes: dict[str, tuple[str, ...]],
        logits: dict[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.classes = {name: tuple(classes) for name, classes in attributes.items()}
        self.logits = {name: tuple(places) for name, places in logits.items()} if logits else None
        self._check(network.config.num_logits)
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        if network.config.pixels == "plain":
            mean, std = torch.full((3,), 0.5), torch.full((3,), 0.5)
        self.register_buffer("mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, 3, 1, 1), persistent=False)

    def _check(self, M: int) -> None:
        total = sum(len(classes) for classes in self.classes.values())
        if self.logits is None and total != M:
            raise UserError(
                f"A classifier's attributes have {total} classes in all but its network has {M} logits; the two"
                " must be equal, or its config say which logits are meant."
            )
        for name, classes in self.classes.items() if self.logits is not None else ():
            places = self.logits.get(name, ())
            if len(places) != len(classes) or not all(type(i) is int and 0 <= i < M for i in places):
                raise UserError(
                    f"A classifier's logits of {name!r} are {list(places)}; expected {len(classes)} places"
                    f" from 0 to {M - 1}."
                )

    @property
    def input_size(self) -> int:
        """Side in pixels of the images that the network takes."""
        return self.network.config.input_size

    def preprocess(self, x: Tensor) -> Tensor:
        """Return x (B, 3, H, W) in [-1, 1] as (B, 3, input_size, input_size), normalised and in the network's dtype."""
        size = (self.input_size,) * 2
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        return (((x + 1) / 2 - self.mean) / self.std).to(next(self.network.parameters()).dtype)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.network(self.preprocess(x))  # (B, M)
        if self.logits is not None:
            return {name: logits[:, list(self.logits[name])] for name in self.classes}
        parts = logits.split([len(classes) for classes in self.classes.values()], dim=1)
        return dict(zip(self.classes, parts, strict=True))  # each (B, K)
