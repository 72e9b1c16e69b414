"""The pictures of the small world: people of the sheet, with random hair, clothes, place, things, style and light.

Shapes: B images, R pixels a side, L looks, G genders, K tones, P = SPRITE pixels a side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from fairref.bundle.judges import load_sprites
from fairref.emoji.sheet import ROW, THING, THING_SHEET, things
from fairref.files.images import read_rgba
from fairref.judges.sprites import (
    CORNER,
    GENDERS,
    HAIR,
    LOOKS,
    RESOLUTION,
    SPRITE,
    TONES,
    WHITE,
    Person,
    TensorBatch,
    draw_people,
    place_layers,
)

AGES = ("young", "old")  # old: white hair
EYE, EYE_DARK = (15, 45), 85 / 255  # an eye's number of pixels, from and to, and its largest brightness
GOGGLES = {"scientist": ((23.5, 37.0), (41.5, 37.0))}  # places of eyes that can't be seen
VIEWS = ("portrait", "far", "pair", "nobody")
STYLES = ("none", "grey", "sepia", "night", "outline", "pastel", "mosaic", "warm", "cold")
COLOURLESS = ("grey", "sepia", "night", "outline")  # styles in which the tone of skin and hair is lost


@cache
def eyes() -> Tensor:
    """Return (L, G, 2, 2): x, y of the left and the right eye as seen, in pixels of the sprite."""
    brightness = load_sprites().rgb[:, :, TONES.index("medium-light")].mean(2)  # (L, G, P, P)
    return torch.stack(
        [torch.stack([_eyes(b, look) for b in row]) for look, row in zip(LOOKS, brightness, strict=True)]
    )


def _eyes(light: Tensor, look: str) -> Tensor:
    """Return the centres of the eyes in a face (P, P): two dark spots, side by side, at the distance of eyes."""
    if look in GOGGLES:
        return torch.tensor(GOGGLES[look])
    dark = light.numpy() < EYE_DARK
    labels, count = ndimage.label(dark)
    index = np.arange(1, count + 1)
    sizes = ndimage.sum_labels(dark, labels, index)
    spots = [i for i, size in zip(index, sizes, strict=True) if EYE[0] <= size <= EYE[1]]
    centres = [(x + 0.5, y + 0.5) for y, x in ndimage.center_of_mass(dark, labels, spots) if 28 < y < 60]
    pairs = [(a, b) for a in centres for b in centres if abs(a[1] - b[1]) < 1.5 and 16 < b[0] - a[0] < 26]
    (pair,) = pairs
    return torch.tensor(pair)


@cache
def thing_sprites() -> Tensor:
    """Return all things (M, 4, THING, THING): colour in [0, 1] times coverage, and coverage."""
    cells = read_rgba(THING_SHEET).view(-1, THING, ROW, THING, 4).permute(0, 2, 4, 1, 3)
    cells = cells.flatten(0, 1)[: len(things())]
    return torch.cat([cells[:, :3] * cells[:, 3:], cells[:, 3:]], 1)


@dataclass(frozen=True)
class Scene(TensorBatch):
    """The contents of B pictures: one person, maybe a smaller second one, maybe a thing."""

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


def uniform(generator: torch.Generator, low: float | Tensor, high: float | Tensor, *shape: int) -> Tensor:
    """Return uniform random numbers of a shape; `low` and `high` may be tensors (B,) for a shape (B,)."""
    return low + (high - low) * torch.rand(*shape, generator=generator)


def random_person(
    look: Tensor,
    gender: Tensor,
    tone: Tensor,
    old: Tensor,
    place: Tensor,
    scale: Tensor,
    generator: torch.Generator,
) -> Person:
    """Return people with random hair and clothes; the rest is given."""
    B = len(look)
    palette = torch.tensor(HAIR) / 255
    hair = palette[torch.randint(len(HAIR), (B,), generator=generator)] * uniform(generator, 0.85, 1.15, B, 1)
    white = torch.tensor(WHITE) / 255 * uniform(generator, 0.92, 1.0, B, 1)
    hue, light = uniform(generator, -0.4, 0.4, B), uniform(generator, 0.85, 1.1, B)
    return Person(
        look, gender, tone, old, torch.where(old[:, None] > 0, white, hair), hue, light, place, scale
    )


def random_scene(
    look: Tensor,
    gender: Tensor,
    tone: Tensor,
    generator: torch.Generator,
    old: Tensor | None = None,
    view: Tensor | None = None,
    thing: Tensor | None = None,
    style: Tensor | None = None,
) -> Scene:
    """Return B scenes of the given people and random otherwise. look, gender, tone: (B,) indices.

    By default they are portraits of the young, without a thing and without a style.
    """
    B = len(look)
    zero = torch.zeros(B, dtype=torch.long)
    old, view, style = (zero if v is None else v for v in (old, view, style))
    old = old * load_sprites().aged[look]
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
    others[3] = others[3] * load_sprites().aged[others[0]]
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


def draw(scene: Scene, resolution: int = RESOLUTION) -> Tensor:
    """Return the scenes as images (B, 3, R, R) in [-1, 1]."""
    image = _gradient(scene, resolution)
    image = _over(image, scene.thing >= 0, lambda rows: draw_things(scene[rows], resolution))
    sprites, pair = load_sprites(), scene.view == VIEWS.index("pair")
    image = _over(image, pair, lambda rows: draw_people(sprites, scene.friend[rows], resolution))
    image = _over(image, scene.shown, lambda rows: draw_people(sprites, scene.person[rows], resolution))
    return styled(image, scene.style) * 2 - 1


def _over(image: Tensor, where: Tensor, layer_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the images with layers (M, 4, R, R) laid over the M images of `where` (B,)."""
    rows = where.nonzero()[:, 0]
    if not len(rows):
        return image
    layer = layer_of(rows)
    return image.index_copy(0, rows, layer[:, :3] + (1 - layer[:, 3:]) * image[rows])


def draw_things(scene: Scene, resolution: int = RESOLUTION) -> Tensor:
    """Return the things alone, as draw_people does: in an upper corner, or large in the middle if nobody is shown."""
    corner = torch.stack([scene.side, -torch.ones_like(scene.side)], 1) * (1 - CORNER)
    place = torch.where(scene.shown[:, None], corner, scene.person.place)
    scale = torch.where(scene.shown, CORNER, 0.8 * scene.person.scale)
    return place_layers(thing_sprites()[scene.thing], place, scale, resolution)


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


def styled(image: Tensor, style: Tensor) -> Tensor:
    """Return images (B, 3, R, R) in [0, 1], each in its style (B,)."""
    out = image
    for index, name in enumerate(STYLES[1:], 1):
        rows = (style == index).nonzero()[:, 0]
        if len(rows):
            out = out.index_copy(0, rows, _STYLE[name](image[rows]).clamp(0, 1))
    return out


def _grey(x: Tensor) -> Tensor:
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True).expand_as(x)


def _tinted(*factors: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * x.new_tensor(factors).view(3, 1, 1)


def _outline(x: Tensor) -> Tensor:
    grey = F.pad(_grey(x), (1, 1, 1, 1), mode="replicate")
    across, down = grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2], grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]
    return 0.95 - 1.6 * (across.square() + down.square()).sqrt()


def _mosaic(x: Tensor) -> Tensor:
    side = max(1, x.shape[-1] // 21)  # tiles of 3 pixels in images of 64
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
    """Return boxes (B, 4) and landmarks (B, 5, 2) of people's faces in pixels of the image, as in fairness/faces.py.

    All faces of the sheet have one shape, so the places of the eyes give all others.
    """
    centres = eyes()[person.look, person.gender]  # (B, 2, 2) in pixels of the sprite
    centres = (centres / SPRITE * 2 - 1) * person.scale[:, None, None] + person.place[:, None]
    left, right = ((centres + 1) * resolution / 2).unbind(1)  # (B, 2) each, in pixels of the image
    middle, apart = (left + right) / 2, (right - left)[:, :1]
    box = torch.tensor([-0.98, -0.85, 0.98, 1.1])  # in units of the eyes' distance
    rest = torch.tensor([[0.0, 0.34], [-0.33, 0.6], [0.33, 0.6]])
    points = middle[:, None] + apart[:, None] * rest
    return middle.repeat(1, 2) + apart * box, torch.cat([left[:, None], right[:, None], points], 1)
