"""The people of the nearest-template judge: sprites from a sheet, and images of people made from them.

Shapes: B people, R pixels a side of an image, L looks, G genders, K tones, P = SPRITE pixels a side of a sprite.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

PLAIN = "plain"  # the look of people without an occupation
LOOKS = (
    "health_worker",
    "student",
    "teacher",
    "judge",
    "farmer",
    "cook",
    "mechanic",
    "factory_worker",
    "office_worker",
    "scientist",
    "technologist",
    "singer",
    "artist",
    "pilot",
    "police_officer",
    "construction_worker",
    PLAIN,
)
GENDERS = ("woman", "man")
TONES = ("light", "medium-light", "medium", "dark")  # of skin
HAIR = ((40, 36, 36), (84, 57, 48), (135, 72, 40), (171, 135, 60))  # black, brown, auburn, blond
WHITE = (232, 230, 226)  # hair of old people

SPRITE = 80  # pixels a side
RESOLUTION = 64  # pixels a side of an image
CORNER = 0.36  # side of the square in an upper corner where a thing may lie / side of the image

DIFFERS = 24 / 255  # summed colour difference between tones from which a pixel is skin or hair
DARK = 110 / 255  # in the light tone, hair is darker than this and skin is not
MIN_HAIR_PART = 40  # pixels: smaller dark parts are eyes and mouth
MIN_AGED_HAIR = 250  # pixels of hair that both genders of a look need for its age to show

Self = TypeVar("Self", bound="TensorBatch")


class TensorBatch:
    """Base of a dataclass of tensors (B, ...) and of other such dataclasses. Indexing it indexes each field."""

    def __len__(self) -> int:
        return len(getattr(self, next(iter(self.__dataclass_fields__))))

    def __getitem__(self: Self, index: Tensor) -> Self:
        return type(self)(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Person(TensorBatch):
    """B people. The first four fields decide nothing about the others, except that old people have white hair."""

    look: Tensor  # (B,) index into LOOKS
    gender: Tensor  # (B,) index into GENDERS
    tone: Tensor  # (B,) index into TONES
    old: Tensor  # (B,) 0: young, 1: old
    hair: Tensor  # (B, 3) colour in [0, 1]
    hue: Tensor  # (B,) rotation of the clothes' colours, radians
    light: Tensor  # (B,) brightness factor of the clothes
    place: Tensor  # (B, 2) offset of the sprite's centre, fraction of half the image
    scale: Tensor  # (B,) sprite side / image side


@dataclass(frozen=True)
class Sprites:
    """All people of the sheet, in [0, 1]."""

    rgb: Tensor  # (L, G, K, 3, P, P)
    alpha: Tensor  # (L, G, P, P)
    skin: Tensor  # (L, G, P, P)  boolean: changes with the tone and is not hair
    hair: Tensor  # (L, G, P, P)  0 or 1
    shade: Tensor  # (L, G, P, P)  brightness of the hair relative to its median
    clothes: Tensor  # (L, G, P, P)  boolean: the same in all tones
    aged: Tensor  # (L,)  boolean: enough hair shows for white to be seen


def cut_sprites(sheet: Tensor) -> Sprites:
    """Return the sprites of a sheet (L G P, K P, 4), RGBA in [0, 1]: a row a (look, gender), a column a tone.

    Pixels that change with the tone are skin or hair, the others are clothes.
    """
    L, G, K, P = len(LOOKS), len(GENDERS), len(TONES), SPRITE
    cells = sheet.view(L, G, P, K, P, 4).permute(0, 1, 3, 5, 2, 4)  # (L, G, K, 4, P, P)
    rgb, alpha = cells[:, :, :, :3], cells[:, :, 0, 3]
    inside = alpha > 0.5
    changes = ((rgb - rgb[:, :, :1]).abs().sum(3).amax(2) > DIFFERS) & inside
    light = rgb[:, :, TONES.index("light")].mean(2)
    dark = changes & (light < DARK)
    hair = torch.stack([_large_parts(m) for m in dark.flatten(0, 1)]).view(L, G, P, P)
    brightness = rgb[:, :, TONES.index("medium-light")].mean(2)  # blond: the best shading of the four
    median = torch.stack(
        [
            b[m].median() if m.any() else b.new_ones(())  # two looks hide all hair under a hat
            for b, m in zip(brightness.flatten(0, 1), hair.flatten(0, 1), strict=True)
        ]
    )
    shade = (brightness / median.view(L, G, 1, 1)).clamp(0.5, 1.5)
    aged = (hair.sum((2, 3)) >= MIN_AGED_HAIR).all(1)
    return Sprites(rgb, alpha, changes & ~dark, hair.float(), shade, inside & ~changes, aged)


def _large_parts(mask: Tensor) -> Tensor:
    labels, count = ndimage.label(mask.numpy())
    sizes = ndimage.sum_labels(mask.numpy(), labels, range(1, count + 1))
    return torch.from_numpy(np.isin(labels, 1 + np.flatnonzero(sizes >= MIN_HAIR_PART)))


def rotate_hue(angle: Tensor) -> Tensor:
    """Return the rotations (B, 3, 3) of RGB space about the grey axis by angles (B,) in radians."""
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


def draw_people(sprites: Sprites, person: Person, resolution: int = RESOLUTION) -> Tensor:
    """Return people without a background, (B, 4, R, R): colour in [0, 1] times coverage, and coverage."""
    who = person.look, person.gender
    rgb = sprites.rgb[person.look, person.gender, person.tone]  # (B, 3, P, P)
    dyed = (sprites.shade[who][:, None] * person.hair[:, :, None, None]).clamp(0, 1)
    rgb = torch.lerp(rgb, dyed, sprites.hair[who][:, None])
    turned = torch.einsum("bij,bjhw->bihw", rotate_hue(person.hue), rgb) * person.light[:, None, None, None]
    rgb = torch.where(sprites.clothes[who][:, None], turned.clamp(0, 1), rgb)
    alpha = sprites.alpha[who][:, None]
    return place_layers(torch.cat([rgb * alpha, alpha], 1), person.place, person.scale, resolution)


def place_layers(layer: Tensor, place: Tensor, scale: Tensor, resolution: int) -> Tensor:
    """Return layers (B, C, P, P) placed and scaled in images (B, C, R, R); small ones are averaged first."""
    B, C, P = layer.shape[:3]
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = -place / scale[:, None]
    grid = F.affine_grid(theta, [B, C, resolution, resolution], align_corners=False)
    sharp = F.grid_sample(layer, grid, align_corners=False)
    # fewer than two thirds of the sprite's pixels: they would be skipped
    fine = scale * resolution / P < 0.65
    if not fine.any():
        return sharp
    half = F.interpolate(layer, (P // 2, P // 2), mode="area")
    return torch.where(fine.view(-1, 1, 1, 1), F.grid_sample(half, grid, align_corners=False), sharp)
