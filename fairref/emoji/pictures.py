"""The pictures of the small world: people of the sheet; hair, clothes, place, things, style and light are drawn anew.

Shapes: B pictures, R pixels a side, L looks, G genders, K tones, P = SPRITE pixels a side.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from fairref.emoji.sheet import (
    GENDERS,
    LOOKS,
    ROW,
    SHEET,
    SPRITE,
    THING,
    THING_SHEET,
    TONES,
    things,
)

RESOLUTION = 64
HAIR = ((40, 36, 36), (84, 57, 48), (135, 72, 40), (171, 135, 60))  # black, brown, auburn, blond
WHITE = (232, 230, 226)
AGES = ("young", "old")  # old: white hair
AGED_AREA = 250  # pixels of hair that both genders of a look need for its age to show
DIFFERS = 24 / 255  # summed colour difference between tones from which a pixel is skin or hair
DARK = 110 / 255  # in the light tone, hair is darker than this and skin is not
HAIR_AREA = 40  # pixels: smaller dark parts are eyes and mouth
EYE, EYE_DARK = (15, 45), 85 / 255  # pixels that an eye covers, and what it is darker than
GOGGLES = {"scientist": ((23.5, 37.0), (41.5, 37.0))}  # where eyes must be that can't be seen
VIEWS = ("portrait", "far", "pair", "nobody")
STYLES = ("none", "grey", "sepia", "night", "outline", "pastel", "mosaic", "warm", "cold")
COLOURLESS = ("grey", "sepia", "night", "outline")  # styles in which the tone of skin and hair is lost
CORNER = 0.36  # side of a thing, of the picture's


@dataclass(frozen=True)
class Sprites:
    """All people as torch tensors in [0, 1]."""

    rgb: Tensor  # (L, G, K, 3, P, P)
    alpha: Tensor  # (L, G, P, P)
    skin: Tensor  # (L, G, P, P)  boolean: changes with the tone and is not hair
    hair: Tensor  # (L, G, P, P)  soft mask
    shade: Tensor  # (L, G, P, P)  brightness of the hair relative to its median
    clothes: Tensor  # (L, G, P, P)  boolean: the same in all tones
    eyes: Tensor  # (L, G, 2, 2)  x, y of the left and the right eye as seen, in pixels
    aged: Tensor  # (L,)  boolean: enough hair shows for white to be seen


@cache
def sprites() -> Sprites:
    """The sheet, cut up. What is skin, hair or clothes follows from which pixels change with the tone."""
    sheet = torch.from_numpy(np.asarray(Image.open(SHEET).convert("RGBA")).copy()).float() / 255
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
            for b, m in zip(brightness.flatten(0, 1), hair.flatten(0, 1))
        ]
    )
    shade = (brightness / median.view(L, G, 1, 1)).clamp(0.5, 1.5)
    eyes = torch.stack([_eyes(b, look) for look, row in zip(LOOKS, brightness) for b in row]).view(L, G, 2, 2)
    aged = (hair.sum((2, 3)) >= AGED_AREA).all(1)
    return Sprites(rgb, alpha, changes & ~dark, hair.float(), shade, inside & ~changes, eyes, aged)


def _large_parts(mask: Tensor) -> Tensor:
    labels, count = ndimage.label(mask.numpy())
    sizes = ndimage.sum_labels(mask.numpy(), labels, range(1, count + 1))
    return torch.from_numpy(np.isin(labels, 1 + np.flatnonzero(sizes >= HAIR_AREA)))


def _eyes(light: Tensor, look: str) -> Tensor:
    """Centres of the two dark spots of an eye's size in a face (P, P) that lie side by side, a face's width apart."""
    if look in GOGGLES:
        return torch.tensor(GOGGLES[look])
    dark = light.numpy() < EYE_DARK
    labels, count = ndimage.label(dark)
    index = np.arange(1, count + 1)
    sizes = ndimage.sum_labels(dark, labels, index)
    spots = [i for i, size in zip(index, sizes) if EYE[0] <= size <= EYE[1]]
    centres = [(x + 0.5, y + 0.5) for y, x in ndimage.center_of_mass(dark, labels, spots) if 28 < y < 60]
    pairs = [(a, b) for a in centres for b in centres if abs(a[1] - b[1]) < 1.5 and 16 < b[0] - a[0] < 26]
    (pair,) = pairs
    return torch.tensor(pair)


@cache
def thing_sprites() -> Tensor:
    """All things (M, 4, THING, THING): colour in [0, 1] times coverage, and coverage."""
    sheet = torch.from_numpy(np.asarray(Image.open(THING_SHEET).convert("RGBA")).copy()).float() / 255
    cells = sheet.view(-1, THING, ROW, THING, 4).permute(0, 2, 4, 1, 3).flatten(0, 1)[: len(things())]
    return torch.cat([cells[:, :3] * cells[:, 3:], cells[:, 3:]], 1)


class Rows:
    """A dataclass of tensors (B, ...), or of other such dataclasses, that is indexed as one."""

    def __len__(self) -> int:
        return len(getattr(self, next(iter(self.__dataclass_fields__))))

    def __getitem__(self, index):
        return type(self)(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Person(Rows):
    """B people. Everything but the first four is independent of them, but for old people's white hair."""

    look: Tensor  # (B,) index into LOOKS
    gender: Tensor  # (B,) index into GENDERS
    tone: Tensor  # (B,) index into TONES
    old: Tensor  # (B,) index into AGES
    hair: Tensor  # (B, 3) colour
    hue: Tensor  # (B,) rotation of the clothes' colours, radians
    light: Tensor  # (B,) brightness factor of the clothes
    place: Tensor  # (B, 2) offset of the sprite's centre, fraction of half the picture
    scale: Tensor  # (B,) sprite side / picture side


@dataclass(frozen=True)
class Scene(Rows):
    """What B pictures show: one person, maybe a smaller second one, maybe a thing."""

    person: Person
    view: Tensor  # (B,) index into VIEWS; nobody: without the person
    friend: Person  # seen in pairs only
    thing: Tensor  # (B,) index into things(), -1: none
    side: Tensor  # (B,) of the thing: -1 left, 1 right
    style: Tensor  # (B,) index into STYLES
    background: Tensor  # (B, 2, 3) colours at the two ends of a gradient
    angle: Tensor  # (B,) direction of the gradient, radians

    @property
    def shown(self) -> Tensor:
        """(B,) boolean: the person is in the picture."""
        return self.view != VIEWS.index("nobody")


def uniform(generator: torch.Generator, low, high, *shape: int) -> Tensor:
    """Numbers of a shape; `low` and `high` may be tensors (B,) that go with its first dimension."""
    return low + (high - low) * torch.rand(*shape, generator=generator)


def random_person(look, gender, tone, old, place, scale, generator: torch.Generator) -> Person:
    """Draw hair and clothes; the rest is given."""
    B = len(look)
    palette = torch.tensor(HAIR) / 255
    hair = palette[torch.randint(len(HAIR), (B,), generator=generator)] * uniform(generator, 0.85, 1.15, B, 1)
    white = torch.tensor(WHITE) / 255 * uniform(generator, 0.92, 1.0, B, 1)
    hue, light = uniform(generator, -0.4, 0.4, B), uniform(generator, 0.85, 1.1, B)
    return Person(
        look, gender, tone, old, torch.where(old[:, None] > 0, white, hair), hue, light, place, scale
    )


def random_scene(look, gender, tone, generator: torch.Generator, old=None, view=None, thing=None, style=None):
    """Draw all that is free, given who is to be seen: look, gender, tone (B,) indices, and maybe more -> Scene.

    By default portraits of the young, without a thing, in no style.
    """
    B = len(look)
    zero = torch.zeros(B, dtype=torch.long)
    old, view, style = (zero if v is None else v for v in (old, view, style))
    old = old * sprites().aged[look]
    low, high = torch.tensor(((0.86, 1.0), (0.42, 0.6), (0.6, 0.72), (0.86, 1.0)))[view].unbind(1)
    scale = uniform(generator, low, high, B)
    place = uniform(generator, -0.08, 0.08, B, 2)
    side = torch.randint(2, (B,), generator=generator) * 2 - 1
    far, pair = (view == VIEWS.index(v) for v in ("far", "pair"))
    reach = (1 - scale)[:, None] * uniform(generator, -0.9, 0.9, B, 2)
    place = torch.where(far[:, None], reach, place)
    beside = torch.stack([-0.34 * side, 1 - scale], 1) + 0.5 * place
    place = torch.where(pair[:, None], beside, place)
    small = uniform(generator, 0.38, 0.48, B)
    there = torch.stack([0.5 * side + 0.04, 1 - small], 1)
    others = [torch.randint(len(names), (B,), generator=generator) for names in (LOOKS, GENDERS, TONES, AGES)]
    others[3] = others[3] * sprites().aged[others[0]]
    return Scene(
        random_person(look, gender, tone, old, place, scale, generator),
        view,
        random_person(*others, there, small, generator),
        zero - 1 if thing is None else thing,
        side.float(),
        style,
        background=uniform(generator, 0.35, 0.75, B, 1, 3) + uniform(generator, -0.12, 0.12, B, 2, 3),
        angle=uniform(generator, 0, 2 * torch.pi, B),
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
    picture = _gradient(scene, resolution)
    picture = _over(picture, scene.thing >= 0, lambda rows: draw_things(scene[rows], resolution))
    pair = scene.view == VIEWS.index("pair")
    picture = _over(picture, pair, lambda rows: draw_people(scene.friend[rows], resolution))
    picture = _over(picture, scene.shown, lambda rows: draw_people(scene.person[rows], resolution))
    return styled(picture, scene.style) * 2 - 1


def _over(picture: Tensor, where: Tensor, layer_of) -> Tensor:
    """Layers (M, 4, R, R) laid over the M pictures of `where` (B,)."""
    rows = where.nonzero()[:, 0]
    if not len(rows):
        return picture
    layer = layer_of(rows)
    return picture.index_copy(0, rows, layer[:, :3] + (1 - layer[:, 3:]) * picture[rows])


def draw_people(person: Person, resolution: int = RESOLUTION) -> Tensor:
    """People alone: (B, 4, R, R), colour in [0, 1] times coverage, and coverage."""
    s = sprites()
    who = person.look, person.gender
    rgb = s.rgb[person.look, person.gender, person.tone]  # (B, 3, P, P)
    dyed = (s.shade[who][:, None] * person.hair[:, :, None, None]).clamp(0, 1)
    rgb = torch.lerp(rgb, dyed, s.hair[who][:, None])
    turned = torch.einsum("bij,bjhw->bihw", rotate_hue(person.hue), rgb) * person.light[:, None, None, None]
    rgb = torch.where(s.clothes[who][:, None], turned.clamp(0, 1), rgb)
    alpha = s.alpha[who][:, None]
    return placed(torch.cat([rgb * alpha, alpha], 1), person.place, person.scale, resolution)


def draw_things(scene: Scene, resolution: int = RESOLUTION) -> Tensor:
    """The things alone, as draw_people: in an upper corner or, where nobody is, large and in the middle."""
    corner = torch.stack([scene.side, -torch.ones_like(scene.side)], 1) * (1 - CORNER)
    place = torch.where(scene.shown[:, None], corner, scene.person.place)
    scale = torch.where(scene.shown, CORNER, 0.8 * scene.person.scale)
    return placed(thing_sprites()[scene.thing], place, scale, resolution)


def placed(layer: Tensor, place: Tensor, scale: Tensor, resolution: int) -> Tensor:
    """Layers (B, C, P, P) at a place and of a size in pictures (B, C, R, R); small ones are averaged first."""
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


def _gradient(scene: Scene, resolution: int) -> Tensor:
    axis = torch.linspace(-1, 1, resolution)
    # (B, R, R)
    along = (
        torch.cos(scene.angle)[:, None, None] * axis[None, None, :]
        + torch.sin(scene.angle)[:, None, None] * axis[None, :, None]
    )
    mix = (along / 2**0.5 + 1)[:, None] / 2
    first, second = scene.background[:, 0, :, None, None], scene.background[:, 1, :, None, None]
    return torch.lerp(first, second, mix)


def styled(picture: Tensor, style: Tensor) -> Tensor:
    """Pictures (B, 3, R, R) in [0, 1], each in its style (B,)."""
    out = picture
    for index, name in enumerate(STYLES[1:], 1):
        rows = (style == index).nonzero()[:, 0]
        if len(rows):
            out = out.index_copy(0, rows, _STYLE[name](picture[rows]).clamp(0, 1))
    return out


def _grey(x: Tensor) -> Tensor:
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True).expand_as(x)


def _tinted(*factors: float):
    return lambda x: x * x.new_tensor(factors).view(3, 1, 1)


def _outline(x: Tensor) -> Tensor:
    grey = F.pad(_grey(x), (1, 1, 1, 1), mode="replicate")
    across, down = grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2], grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]
    return 0.95 - 1.6 * (across.square() + down.square()).sqrt()


def _mosaic(x: Tensor) -> Tensor:
    side = max(1, x.shape[-1] // 21)  # tiles of 3 pixels in pictures of 64
    small = F.interpolate(x, (x.shape[-1] // side,) * 2, mode="area")
    return F.interpolate(small, x.shape[-2:], mode="nearest")


_STYLE = {
    "grey": _grey,
    "sepia": lambda x: _tinted(1.08, 0.86, 0.62)(_grey(x)),
    "night": lambda x: _tinted(0.42, 0.48, 0.74)(0.5 * x + 0.5 * _grey(x)),
    "outline": _outline,
    "pastel": lambda x: 0.5 + 0.5 * x,
    "mosaic": _mosaic,
    "warm": _tinted(1.12, 0.9, 0.66),
    "cold": _tinted(0.72, 0.92, 1.16),
}


def face_points(person: Person, resolution: int = RESOLUTION) -> tuple[Tensor, Tensor]:
    """Boxes (B, 4) and landmarks (B, 5, 2) of people's faces in pixels of the picture, as in fairness/faces.py.

    All faces of the sheet have one shape, so their eyes say where the rest is.
    """
    eyes = sprites().eyes[person.look, person.gender]  # (B, 2, 2) in pixels of the sprite
    eyes = (eyes / SPRITE * 2 - 1) * person.scale[:, None, None] + person.place[:, None]
    left, right = ((eyes + 1) * resolution / 2).unbind(1)  # (B, 2) each, in pixels of the picture
    middle, apart = (left + right) / 2, (right - left)[:, :1]
    box = torch.tensor([-0.98, -0.85, 0.98, 1.1])  # in units of the eyes' distance
    rest = torch.tensor([[0.0, 0.34], [-0.33, 0.6], [0.33, 0.6]])
    points = middle[:, None] + apart[:, None] * rest
    return middle.repeat(1, 2) + apart * box, torch.cat([left[:, None], right[:, None], points], 1)
