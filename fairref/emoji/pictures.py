"""The pictures of the small world: people of the sheet; hair, clothes, place and background are drawn anew.

Shapes: B pictures, R = RESOLUTION pixels a side, L looks, G genders, K tones, P = SPRITE pixels a side.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from fairref.emoji.sheet import GENDERS, LOOKS, SHEET, SPRITE, TONES

RESOLUTION = 64
HAIR = ((40, 36, 36), (84, 57, 48), (135, 72, 40), (171, 135, 60))  # black, brown, auburn, blond
DIFFERS = 24 / 255  # summed colour difference between tones from which a pixel is skin or hair
DARK = 110 / 255  # in the light tone, hair is darker than this and skin is not
HAIR_AREA = 40  # pixels: smaller dark parts are eyes and mouth


@dataclass(frozen=True)
class Sprites:
    """All people as torch tensors in [0, 1]."""

    rgb: Tensor  # (L, G, K, 3, P, P)
    alpha: Tensor  # (L, G, P, P)
    skin: Tensor  # (L, G, P, P)  boolean: changes with the tone and is not hair
    hair: Tensor  # (L, G, P, P)  soft mask
    shade: Tensor  # (L, G, P, P)  brightness of the hair relative to its median
    clothes: Tensor  # (L, G, P, P)  boolean: the same in all tones


@cache
def sprites() -> Sprites:
    """The sheet, cut up. What is skin, hair or clothes follows from which pixels change with the tone."""
    sheet = torch.from_numpy(np.asarray(Image.open(SHEET).convert("RGBA")).copy()).float() / 255
    L, G, K, P = len(LOOKS), len(GENDERS), len(TONES), SPRITE
    cells = sheet.view(L, G, P, K, P, 4).permute(0, 1, 3, 5, 2, 4)  # (L, G, K, 4, P, P)
    rgb, alpha = cells[:, :, :, :3], cells[:, :, 0, 3]
    inside = alpha > 0.5
    changes = ((rgb - rgb[:, :, :1]).abs().sum(3).amax(2) > DIFFERS) & inside
    dark = changes & (rgb[:, :, TONES.index("light")].mean(2) < DARK)
    hair = torch.stack([_large_parts(m) for m in dark.flatten(0, 1)]).view(L, G, P, P)
    brightness = rgb[:, :, TONES.index("medium-light")].mean(2)  # blond: the best shading of the four
    median = torch.stack(
        [
            b[m].median() if m.any() else b.new_ones(())  # two looks hide all hair under a hat
            for b, m in zip(brightness.flatten(0, 1), hair.flatten(0, 1))
        ]
    )
    shade = (brightness / median.view(L, G, 1, 1)).clamp(0.5, 1.5)
    return Sprites(rgb, alpha, changes & ~dark, hair.float(), shade, inside & ~changes)


def _large_parts(mask: Tensor) -> Tensor:
    labels, count = ndimage.label(mask.numpy())
    sizes = ndimage.sum_labels(mask.numpy(), labels, range(1, count + 1))
    return torch.from_numpy(np.isin(labels, 1 + np.flatnonzero(sizes >= HAIR_AREA)))


@dataclass(frozen=True)
class Scene:
    """What B pictures show. Everything but the first three is independent of them."""

    look: Tensor  # (B,) index into LOOKS
    gender: Tensor  # (B,) index into GENDERS
    tone: Tensor  # (B,) index into TONES
    hair: Tensor  # (B, 3) colour
    hue: Tensor  # (B,) rotation of the clothes' colours, radians
    light: Tensor  # (B,) brightness factor of the clothes
    place: Tensor  # (B, 2) offset of the sprite's centre, fraction of half the picture
    scale: Tensor  # (B,) sprite side / picture side
    background: Tensor  # (B, 2, 3) colours at the two ends of a gradient
    angle: Tensor  # (B,) direction of the gradient, radians

    def __len__(self) -> int:
        return len(self.look)

    def __getitem__(self, index) -> "Scene":
        return Scene(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def random_scene(look: Tensor, gender: Tensor, tone: Tensor, generator: torch.Generator) -> Scene:
    """Draw all that is free, given who is to be seen: look, gender, tone (B,) indices."""
    B = len(look)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(B, *shape, generator=generator)

    palette = torch.tensor(HAIR) / 255
    hair = palette[torch.randint(len(HAIR), (B,), generator=generator)] * uniform(0.85, 1.15, 1)
    return Scene(
        look,
        gender,
        tone,
        hair,
        hue=uniform(-0.4, 0.4),
        light=uniform(0.85, 1.1),
        place=uniform(-0.08, 0.08, 2),
        scale=uniform(0.86, 1.0),
        background=uniform(0.35, 0.75, 1, 3) + uniform(-0.12, 0.12, 2, 3),
        angle=uniform(0, 2 * torch.pi),
    )


def rotate_hue(angle: Tensor) -> Tensor:
    """(B, 3, 3) rotations of RGB space about the grey axis."""
    cos, sin = torch.cos(angle), torch.sin(angle) / 3**0.5
    rest = (1 - cos) / 3
    rows = [
        torch.stack(row, -1)
        for row in (
            (cos + rest, rest - sin, rest + sin),
            (rest + sin, cos + rest, rest - sin),
            (rest - sin, rest + sin, cos + rest),
        )
    ]
    return torch.stack(rows, -2)


def draw(scene: Scene, resolution: int = RESOLUTION) -> Tensor:
    """Scene -> pictures (B, 3, R, R) in [-1, 1]."""
    layer = draw_layer(scene, resolution)
    return (layer[:, :3] + (1 - layer[:, 3:]) * _gradient(scene, resolution)) * 2 - 1


def draw_layer(scene: Scene, resolution: int = RESOLUTION) -> Tensor:
    """The person alone: (B, 4, R, R), colour in [0, 1] times coverage, and coverage."""
    s, B = sprites(), len(scene)
    who = scene.look, scene.gender
    rgb = s.rgb[scene.look, scene.gender, scene.tone]  # (B, 3, P, P)
    dyed = (s.shade[who][:, None] * scene.hair[:, :, None, None]).clamp(0, 1)
    rgb = torch.lerp(rgb, dyed, s.hair[who][:, None])
    turned = torch.einsum("bij,bjhw->bihw", rotate_hue(scene.hue), rgb) * scene.light[:, None, None, None]
    rgb = torch.where(s.clothes[who][:, None], turned.clamp(0, 1), rgb)
    alpha = s.alpha[who][:, None]
    zoom = 1 / scene.scale
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = -scene.place * zoom[:, None]
    grid = F.affine_grid(theta, [B, 4, resolution, resolution], align_corners=False)
    return F.grid_sample(torch.cat([rgb * alpha, alpha], 1), grid, align_corners=False)


def _gradient(scene: Scene, resolution: int) -> Tensor:
    axis = torch.linspace(-1, 1, resolution)
    along = (
        torch.cos(scene.angle)[:, None, None] * axis[None, None, :]
        + torch.sin(scene.angle)[:, None, None] * axis[None, :, None]
    )  # (B, R, R)
    mix = (along / 2**0.5 + 1)[:, None] / 2
    first, second = scene.background[:, 0, :, None, None], scene.background[:, 1, :, None, None]
    return torch.lerp(first, second, mix)
