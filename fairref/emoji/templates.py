"""The judge that no gradient can fool: which real person, at which place and size, is a picture closest to?

A template is a sprite (colour T premultiplied by its coverage a); the background is not known, so for each look it
is fitted to the picture: affine in x and y, on the pixels that no person of that look covers. The error of a
template is the mean square of picture - (T + (1 - a) background), smallest over shifts, sizes and hair colours.

Shapes: B pictures, R = 32 pixels a side, L looks, M templates of one look = G genders x K tones x hair x sizes,
D shifts.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairref.emoji.pictures import HAIR, RESOLUTION, Scene, draw_layer
from fairref.emoji.sheet import GENDERS, LOOKS, TONES
from fairref.errors import UserError

SIZE = 32  # pixels a side at which pictures are compared
SCALES = (0.88, 0.93, 0.98)  # sprite side / picture side, over the range that pictures are drawn with
REACH = 2  # shifts in pixels, both ways
MARGIN = 2  # pixels around a look that are not trusted to be background


class Templates(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] -> look, gender, skin_tone (B,) indices, error (B,) and none (B,) boolean."""

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = threshold
        layers = _layers()  # (L, M, 4, R, R)
        T, a = layers[:, :, :3], layers[:, :, 3:]
        parts = (-2 * T, 2 * a, -2 * a * T, a.square())
        self.register_buffer(
            "rows", torch.cat([p.flatten(2) for p in parts], 2), persistent=False
        )  # (L, M, 8 R R)
        self.register_buffer("constant", T.square().sum((2, 3, 4)), persistent=False)  # (L, M)
        covered = F.max_pool2d(a.amax((1, 2))[:, None], 2 * MARGIN + 1, 1, MARGIN)[:, 0] > 0.02  # (L, R, R)
        axis = torch.linspace(-1, 1, SIZE)
        plane = torch.stack(
            [torch.ones(SIZE, SIZE), axis.expand(SIZE, SIZE), axis[:, None].expand(SIZE, SIZE)]
        )
        plane = plane.flatten(1).T  # (R R, 3): 1, x, y
        fits = [plane @ torch.linalg.pinv(plane * (~c).flatten()[:, None]) * (~c).flatten() for c in covered]
        self.register_buffer(
            "fit", torch.stack(fits), persistent=False
        )  # (L, R R, R R): pixels -> background

    @classmethod
    def from_file(cls, path: str | Path) -> "Templates":
        """Read the judge's threshold from its JSON file; the people come from the sprite sheet."""
        try:
            return cls(float(json.loads(Path(path).read_text(encoding="utf-8"))["threshold"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{path}: found {error!r}, expected a JSON object with a number "threshold"; '
                "take the file from the bundle it belongs to"
            ) from error

    def errors(self, x: Tensor) -> Tensor:
        """(B, L, G, K): root mean square error, in units of [-1, 1], of the best template of each person."""
        if x.shape[-1] != SIZE:
            x = F.interpolate(x, (SIZE, SIZE), mode="area")
        best = [self._look_errors(x, look) for look in range(len(LOOKS))]
        return torch.stack(best, 1)

    def _look_errors(self, x: Tensor, look: int) -> Tensor:
        B, pixels = len(x), SIZE * SIZE
        background = (x.flatten(2) @ self.fit[look].T).view_as(x)  # (B, 3, R, R)
        y = x - background
        image = torch.cat(
            [y, (y * background).sum(1, keepdim=True), background, background.square().sum(1, keepdim=True)],
            1,
        )  # (B, 8, R, R), beside `rows`
        padded = F.pad(image, (REACH,) * 4, mode="replicate")
        span = range(2 * REACH + 1)
        shifted = torch.stack(
            [padded[:, :, i : i + SIZE, j : j + SIZE] for i in span for j in span], 1
        )  # (B, D, 8, R, R)
        square = shifted[:, :, :3].square().sum((2, 3, 4))  # (B, D)
        error = square[:, :, None] + shifted.flatten(2) @ self.rows[look].T + self.constant[look]  # (B, D, M)
        error = error.amin(1).view(B, len(GENDERS), len(TONES), -1).amin(3)
        return (error.clamp(min=0) / (3 * pixels)).sqrt()

    @torch.no_grad()
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        errors = (
            torch.cat([self.errors(part) for part in x.split(32)])
            if len(x)
            else x.new_zeros(0, len(LOOKS), len(GENDERS), len(TONES))
        )
        error, index = (
            errors.flatten(1).min(1) if len(x) else (x.new_zeros(0), x.new_zeros(0, dtype=torch.long))
        )
        tones, genders = len(TONES), len(GENDERS)
        return {
            "look": index // (tones * genders),
            "gender": index // tones % genders,
            "skin_tone": index % tones,
            "error": error,
            "none": error > self.threshold,
        }


def _layers() -> Tensor:
    """(L, M, 4, R, R): colour in [-1, 1] times coverage, and coverage."""
    shape = (len(LOOKS), len(GENDERS), len(TONES), len(HAIR), len(SCALES))
    look, gender, tone, hair, scale = (
        i.flatten() for i in torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    )
    n = len(look)
    scene = Scene(
        look,
        gender,
        tone,
        hair=(torch.tensor(HAIR) / 255)[hair],
        hue=torch.zeros(n),
        light=torch.ones(n),
        place=torch.zeros(n, 2),
        scale=torch.tensor(SCALES)[scale],
        background=torch.zeros(n, 2, 3),
        angle=torch.zeros(n),
    )
    layer = torch.cat(
        [
            F.interpolate(draw_layer(scene[part], RESOLUTION), (SIZE, SIZE), mode="area")
            for part in torch.arange(n).split(128)
        ]
    )  # (n, 4, R, R), colour in [0, 1]
    colour, a = layer[:, :3] * 2 - layer[:, 3:], layer[:, 3:]  # a (2 c - 1): colour of [-1, 1]
    return torch.cat([colour, a], 1).view(shape[0], -1, 4, SIZE, SIZE)
