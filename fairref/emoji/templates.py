"""The judge that no gradient can fool: which real person, at which place and size, is a picture closest to?

A template is a sprite (colour T premultiplied by its coverage a). The background b is not known: for each look
it is fitted to the picture, affine in its two axes, on the pixels that no person of that look covers. The error
of a template is |picture - T - (1 - a) b|, smallest over shifts, sizes and hair colours, relative to what a
background without anybody leaves of the picture: 0 is a perfect person, 1 is no better than nobody. The upper
corners of a template, where things lie, do not count.

A picture must also take sides. With P the best template and P' the same person in the other gender, both on b,
share = <picture - P', P - P'> / |P - P'|^2 is 1 for the person and 1/2 for an even blend; what both miss cancels.
An autoencoder blurs what tells the genders of a look apart, of some more than of others: with the mean share m of
the look's real pictures behind it, the share is stretched about 1/2 so that m becomes 1.

Shapes: B pictures, R = 32 pixels a side, L looks, M templates of one look = G genders x K tones x hair x sizes,
D shifts. It knows people at the size of a portrait; one far away, or in a style, is mostly nobody to it.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairref.emoji.pictures import CORNER, HAIR, RESOLUTION, WHITE, Person, draw_people, placed, sprites
from fairref.emoji.sheet import GENDERS, LOOKS, TONES
from fairref.errors import UserError
from fairref.weights_io import read_json

SIZE = 32  # pixels a side at which pictures are compared
SCALES = (0.88, 0.93, 0.98)  # sprite side / picture side, over the range that pictures are drawn with
REACH = 2  # shifts in pixels, both ways
MARGIN = 2  # pixels around a look that are not trusted to be background
LEAST = 30  # pixels that a mean colour is taken of
SHARE = 0.7  # of the gender found; below, the picture is a blend


def read_settings(path: str | Path) -> tuple[float, dict[str, float]]:
    """The threshold and each look's share of a templates.json. Raises UserError."""
    d = read_json(path)
    try:
        threshold, shares = float(d["threshold"]), {look: float(d["shares"][look]) for look in LOOKS}
        if not (0 < threshold < math.inf and all(0.5 < m <= 1.5 for m in shares.values())):
            raise ValueError("a threshold that is not positive, or a share outside 0.5 to 1.5")
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise UserError(
            f'{path}: found {error!r}, expected a JSON object with a number "threshold" and one for each look '
            'under "shares"; take the file from the bundle it belongs to.'
        ) from None
    return threshold, shares


class Templates(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] -> who is seen, each (B,).

    look, gender, skin_tone, age: indices; error, share: as above; place (B, 2), scale: as in pictures.Person.
    Boolean: none, nobody or a blend; gender_known, all but those; skin_tone_known, also where two genders blend;
    age_known, the same, where the look shows enough hair.
    """

    def __init__(self, threshold: float, shares: dict[str, float] | None = None):
        """`shares`: of a look, m; 1 where it is not given."""
        super().__init__()
        self.threshold = threshold
        m = torch.tensor([(shares or {}).get(look, 1.0) for look in LOOKS])
        layers = _layers()  # (L, M, 4, R, R)
        counts = torch.ones(SIZE, SIZE)
        corner = round(CORNER * SIZE)
        counts[:corner, :corner] = counts[:corner, -corner:] = 0
        T, a = layers[:, :, :3] * counts, layers[:, :, 3:] * counts
        rows = torch.cat([p.flatten(2) for p in (-2 * T, 2 * a, -2 * a * T, a.square())], 2)
        covered = F.max_pool2d(a.amax((1, 2))[:, None], 2 * MARGIN + 1, 1, MARGIN)[:, 0] > 0.02  # (L, R, R)
        axis = torch.linspace(-1, 1, SIZE)
        one, x, y = torch.ones(SIZE, SIZE), axis.expand(SIZE, SIZE), axis[:, None].expand(SIZE, SIZE)
        plane = torch.stack([one, x, y]).flatten(1).T  # (R R, 3)
        free = [(~c & (counts > 0)).flatten() for c in (*covered, torch.zeros_like(covered[0]))]
        fits = [plane @ torch.linalg.pinv(plane * f[:, None]) * f for f in free]  # each: pixels -> background
        for name, tensor in (
            ("layers", layers),
            ("counts", counts),  # (R, R) zero where things lie
            ("aged", sprites().aged),  # (L,)
            ("stretch", 0.5 / (m - 0.5)),  # (L,)
            ("rows", rows),  # (L, M, 8 R R)
            ("constant", T.square().sum((2, 3, 4))),  # (L, M)
            ("fit", torch.stack(fits[:-1])),  # (L, R R, R R)
            ("fit_all", fits[-1]),  # (R R, R R)
        ):
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def from_file(cls, path: str | Path) -> "Templates":
        """Read the judge's threshold and shares from its JSON file; the people come from the sprite sheet."""
        return cls(*read_settings(path))

    @torch.no_grad()
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.to(self.layers)  # in half precision the differences of large squares would be lost
        if x.shape[-1] != SIZE:
            x = F.interpolate(x, (SIZE, SIZE), mode="area")
        parts = [self._judge(part) for part in x.split(32)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def colours(self, x: Tensor, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean colours (B, 3) of the background and of the clothes, where `found` is what the judge says of x.

        NaN where nobody is known and where a look has no clothes.
        """
        s, who = sprites(), (found["look"].cpu(), found["gender"].cpu())
        layers = torch.stack([s.alpha[who], s.clothes[who] * s.alpha[who]], 1)  # (B, 2, P, P)
        place, scale = found["place"].float().cpu(), found["scale"].float().cpu()
        person, clothes = placed(layers, place, scale, x.shape[-1]).to(x).unbind(1)  # (B, R, R)
        # places are known to a pixel
        person, clothes = (F.max_pool2d(m, 3, 1, 1) for m in (person, -clothes))
        corner = round(CORNER * x.shape[-1])
        background = (person < 0.02).to(x)
        background[:, :corner, :corner] = background[:, :corner, -corner:] = 0  # where things lie
        masks = {"background": background, "clothes": (clothes < -0.5).to(x)}
        colours = {}
        for name, mask in masks.items():
            size = mask.sum((1, 2))
            mean = (x * mask[:, None]).sum((2, 3)) / size[:, None]
            enough = (size >= LEAST) & ~found["none"]
            colours[name] = mean.where(enough[:, None], torch.nan)
        return colours

    def _judge(self, x: Tensor) -> dict[str, Tensor]:
        # each (B, L)
        square, template, share, shift = (
            torch.stack(v, 1) for v in zip(*(self._closest(x, look) for look in range(len(LOOKS))))
        )
        square, look = square.min(1)
        template, share, shift = (v.gather(1, look[:, None])[:, 0] for v in (template, share, shift))
        share = 0.5 + (share - 0.5) * self.stretch[look]
        nobody = (x - (x.flatten(2) @ self.fit_all.T).view_as(x)).mul(self.counts).square().sum((1, 2, 3))
        error = (square.clamp(min=0) / nobody.clamp(min=1e-6)).sqrt()
        somebody = error <= self.threshold  # not so for a picture that is not finite
        known = somebody & (share >= SHARE)
        hair, scale = template // len(SCALES) % (len(HAIR) + 1), template % len(SCALES)
        person = template // (len(SCALES) * (len(HAIR) + 1))
        span = 2 * REACH + 1
        return {
            "look": look,
            "gender": person // len(TONES),
            "skin_tone": person % len(TONES),
            "age": (hair == len(HAIR)).long(),
            "error": error,
            "share": share,
            "place": torch.stack([shift % span - REACH, shift // span - REACH], 1) * 2 / SIZE,
            "scale": x.new_tensor(SCALES)[scale],
            "gender_known": known,
            "skin_tone_known": somebody,
            "age_known": somebody & self.aged[look],
            "none": ~known,
        }

    def _closest(self, x: Tensor, look: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Squared error, index, share of the gender and shift, each (B,), of the look's closest template."""
        B, M = len(x), self.rows.shape[1]
        background = (x.flatten(2) @ self.fit[look].T).view_as(x)  # (B, 3, R, R)
        y = x - background
        cross, power = (y * background).sum(1, keepdim=True), background.square().sum(1, keepdim=True)
        image = torch.cat([y, cross, background, power], 1)  # (B, 8, R, R), beside `rows`
        padded = F.pad(image, (REACH,) * 4, mode="replicate")
        span = range(2 * REACH + 1)
        shifted = [padded[:, :, i : i + SIZE, j : j + SIZE] for i in span for j in span]
        shifted = torch.stack(shifted, 1)  # (B, D, 8, R, R)
        square = shifted[:, :, :3].square().mul(self.counts).sum((2, 3, 4))  # (B, D)
        error = square[:, :, None] + shifted.flatten(2) @ self.rows[look].T + self.constant[look]  # (B, D, M)
        least, index = error.flatten(1).min(1)
        shift, best = index // M, index % M

        image = shifted[torch.arange(B), shift]
        y, background = image[:, :3], image[:, 4:7]
        layers = self.layers[look]
        # P - b, P' - b
        shown, other = (
            layers[m, :3] - layers[m, 3:] * background for m in (best, (best + M // len(GENDERS)) % M)
        )
        apart = (shown - other) * self.counts
        share = ((y - other) * apart).sum((1, 2, 3)) / apart.square().sum((1, 2, 3))
        return least, best, share, shift


def _layers() -> Tensor:
    """(L, M, 4, R, R): colour in [-1, 1] times coverage, and coverage."""
    colours = torch.tensor((*HAIR, WHITE)) / 255
    shape = (len(LOOKS), len(GENDERS), len(TONES), len(colours), len(SCALES))
    look, gender, tone, hair, scale = (
        i.flatten() for i in torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    )
    n = len(look)
    zero, one = torch.zeros(n), torch.ones(n)
    person = Person(
        look, gender, tone, zero, colours[hair], zero, one, torch.zeros(n, 2), torch.tensor(SCALES)[scale]
    )
    # (n, 4, R, R), colour in [0, 1]
    layer = torch.cat(
        [
            F.interpolate(draw_people(person[part], RESOLUTION), (SIZE, SIZE), mode="area")
            for part in torch.arange(n).split(128)
        ]
    )
    colour, a = layer[:, :3] * 2 - layer[:, 3:], layer[:, 3:]  # a (2 c - 1): colour of [-1, 1]
    return torch.cat([colour, a], 1).view(shape[0], -1, 4, SIZE, SIZE)
