"""The nearest-template judge: it finds the person, place and size closest to an image. It has no gradient.

A template is a sprite (colour T premultiplied by its coverage a). The background b is not known: for each look
it is fitted to the image, affine in its two axes, on the pixels that no person of that look covers. The error
of a template is |image - T - (1 - a) b|, smallest over shifts, sizes and hair colours, relative to what a
background without anybody leaves of the image: 0 is a perfect person, 1 is no better than nobody. The upper
corners of a template, where things lie, do not count.

An image must also show one gender, not a blend. Let P be the best template and P' the same person in the other
gender, both on b. Then share = <image - P', P - P'> / |P - P'|^2 is 1 for the person and 1/2 for an even blend. An
autoencoder blurs the difference between the genders, for some looks more than for others. So the share is stretched
about 1/2: the mean share m of the look's real images behind the autoencoder becomes 1.

Shapes: B images, R = 32 pixels a side, L looks, M templates of one look = G genders x K tones x hair x sizes,
D shifts. The tone and the hair never colour the same pixel, so a template is one of G x K x sizes with the first
hair, plus what another hair of G x hair x sizes changes: E = G x (K + hair) x sizes rows make all M. It knows people
at the size of a portrait; one far away, or in a style, is mostly nobody to it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairref.judges.sprites import (
    CORNER,
    GENDERS,
    HAIR,
    LOOKS,
    TONES,
    WHITE,
    Person,
    Sprites,
    draw_people,
    place_layers,
)

SIZE = 32  # pixels a side at which images are compared
SCALES = (0.88, 0.93, 0.98)  # sprite side / image side, over the range that portraits are drawn with
MAX_SHIFT = 2  # shifts in pixels, both ways
MARGIN = 2  # pixels around a look that do not count as background
MIN_COLOUR_AREA = 30  # pixels that a mean colour needs
MIN_SHARE = 0.7  # of the closest gender; below, the image is a blend


class Templates(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> the verdict on who is seen, a dict of tensors (B,).

    look, gender, skin_tone, age: indices. error, share: as above. place (B, 2), scale: as in sprites.Person.
    Booleans: `none`, the image shows nobody or a blend; `gender_known`, all others; `skin_tone_known`, blends of two
    genders too; `age_known`, as `skin_tone_known` if the look shows enough hair.
    """

    attributes = ("gender", "skin_tone", "age")  # whose classes it tells

    def __init__(self, sprites: Sprites, threshold: float, shares: dict[str, float] | None = None) -> None:
        """`threshold`: the largest error of a person. `shares`: m of each look, by default 1."""
        super().__init__()
        self.sprites = sprites
        self.threshold = threshold
        m = torch.tensor([(shares or {}).get(look, 1.0) for look in LOOKS])
        layers = template_layers(sprites)  # (L, M, 4, R, R)
        counts = torch.ones(SIZE, SIZE)
        corner = round(CORNER * SIZE)
        counts[:corner, :corner] = counts[:corner, -corner:] = 0
        T, a = layers[:, :, :3] * counts, layers[:, :, 3:] * counts
        rows = torch.cat([p.flatten(2) for p in (-2 * T, 2 * a, -2 * a * T, a.square())], 2)
        rows = rows.unflatten(1, (len(GENDERS), len(TONES), -1, len(SCALES)))  # (L, G, K, hair, sizes, 8 R R)
        first = rows[:, :, :, 0]  # hair
        rows = torch.cat([first, rows[:, :, 0] - first[:, :, :1]], 2)  # (L, G, K + hair, sizes, 8 R R)
        covered = F.max_pool2d(a.amax((1, 2))[:, None], 2 * MARGIN + 1, 1, MARGIN)[:, 0] > 0.02  # (L, R, R)
        axis = torch.linspace(-1, 1, SIZE)
        one, x, y = torch.ones(SIZE, SIZE), axis.expand(SIZE, SIZE), axis[:, None].expand(SIZE, SIZE)
        plane = torch.stack([one, x, y]).flatten(1).T  # (R R, 3)
        free = [(~c & (counts > 0)).flatten() for c in (*covered, torch.zeros_like(covered[0]))]
        fits = [torch.linalg.pinv(plane * f[:, None]) * f for f in free]  # each: pixels -> its three numbers
        for name, tensor in (
            ("layers", layers),
            ("counts", counts),  # (R, R) zero where things lie
            ("aged", sprites.aged),  # (L,)
            ("stretch", 0.5 / (m - 0.5)),  # (L,)
            ("rows", rows.flatten(1, 3).unflatten(2, (8, SIZE, SIZE))),  # (L, E, 8, R, R)
            ("constant", T.square().sum((2, 3, 4))),  # (L, M)
            ("fit", torch.stack(fits)),  # (L + 1, 3, R R), the last of nobody
            ("plane", plane),  # (R R, 3)
        ):
            self.register_buffer(name, tensor, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.to(self.layers)  # in half precision the differences of large squares would be lost
        if x.shape[-1] != SIZE:
            x = F.interpolate(x, (SIZE, SIZE), mode="area")
        parts = [self._judge(part) for part in x.split(32)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def colours(self, x: Tensor, verdict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean colours (B, 3) of the background and of the clothes; `verdict` is the judge's on x.

        NaN if nobody is known or the look has no clothes.
        """
        s, who = self.sprites, (verdict["look"].cpu(), verdict["gender"].cpu())
        layers = torch.stack([s.alpha[who], s.clothes[who] * s.alpha[who]], 1)  # (B, 2, P, P)
        place, scale = verdict["place"].float().cpu(), verdict["scale"].float().cpu()
        person, clothes = place_layers(layers, place, scale, x.shape[-1]).to(x).unbind(1)  # (B, R, R)
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
            enough = (size >= MIN_COLOUR_AREA) & ~verdict["none"]
            colours[name] = mean.where(enough[:, None], torch.nan)
        return colours

    def _judge(self, x: Tensor) -> dict[str, Tensor]:
        # each (B, L)
        square, template, share, shift = (
            torch.stack(v, 1)
            for v in zip(*(self._closest(x, look) for look in range(len(LOOKS))), strict=True)
        )
        square, look = square.min(1)
        template, share, shift = (v.gather(1, look[:, None])[:, 0] for v in (template, share, shift))
        share = 0.5 + (share - 0.5) * self.stretch[look]
        nobody = (x - self._background(x, -1)).mul(self.counts).square().sum((1, 2, 3))
        error = (square.clamp(min=0) / nobody.clamp(min=1e-6)).sqrt()
        somebody = error <= self.threshold  # not so for an image that is not finite
        known = somebody & (share >= MIN_SHARE)
        hair, scale = template // len(SCALES) % (len(HAIR) + 1), template % len(SCALES)
        person = template // (len(SCALES) * (len(HAIR) + 1))
        span = 2 * MAX_SHIFT + 1
        return {
            "look": look,
            "gender": person // len(TONES),
            "skin_tone": person % len(TONES),
            "age": (hair == len(HAIR)).long(),
            "error": error,
            "share": share,
            "place": torch.stack([shift % span - MAX_SHIFT, shift // span - MAX_SHIFT], 1) * 2 / SIZE,
            "scale": x.new_tensor(SCALES)[scale],
            "gender_known": known,
            "skin_tone_known": somebody,
            "age_known": somebody & self.aged[look],
            "none": ~known,
        }

    def _background(self, x: Tensor, look: int) -> Tensor:
        """Return the background (B, 3, R, R) fitted to the pixels that the look does not cover; -1 covers none."""
        return (x.flatten(2) @ self.fit[look].T @ self.plane.T).view_as(x)

    def _closest(self, x: Tensor, look: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return squared error, index, share and shift, each (B,), of the look's closest template."""
        B, M = len(x), self.constant.shape[1]
        background = self._background(x, look)  # (B, 3, R, R)
        y = x - background
        cross, power = (y * background).sum(1, keepdim=True), background.square().sum(1, keepdim=True)
        image = torch.cat([y, cross, background, power], 1)  # (B, 8, R, R), beside `rows`
        padded = F.pad(image, (MAX_SHIFT,) * 4, mode="replicate")
        square = padded[:, :3].square().sum(1, keepdim=True)
        square = F.conv2d(square, self.counts[None, None]).flatten(1)  # (B, D)
        found = F.conv2d(padded, self.rows[look]).flatten(2).transpose(1, 2)  # (B, D, E)
        found = found.unflatten(2, (len(GENDERS), -1, len(SCALES)))
        tones, hair = found.split([len(TONES), found.shape[3] - len(TONES)], 3)  # (B, D, G, K or hair, sizes)
        products = (tones[:, :, :, :, None] + hair[:, :, :, None]).flatten(2)  # (B, D, M)
        error = square[:, :, None] + products + self.constant[look]
        least, index = error.flatten(1).min(1)
        shift, best = index // M, index % M

        down, right = shift // (2 * MAX_SHIFT + 1), shift % (2 * MAX_SHIFT + 1)
        image = padded.unfold(2, SIZE, 1).unfold(3, SIZE, 1)[torch.arange(B), :, down, right]  # (B, 8, R, R)
        y, background = image[:, :3], image[:, 4:7]
        layers = self.layers[look]
        # P - b, P' - b
        shown, other = (
            layers[m, :3] - layers[m, 3:] * background for m in (best, (best + M // len(GENDERS)) % M)
        )
        apart = (shown - other) * self.counts
        share = ((y - other) * apart).sum((1, 2, 3)) / apart.square().sum((1, 2, 3))
        return least, best, share, shift


def template_layers(sprites: Sprites) -> Tensor:
    """Return all templates (L, M, 4, R, R): colour in [-1, 1] times coverage, and coverage."""
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
            F.interpolate(draw_people(sprites, person[part]), (SIZE, SIZE), mode="area")
            for part in torch.arange(n).split(128)
        ]
    )
    colour, a = layer[:, :3] * 2 - layer[:, 3:], layer[:, 3:]  # a (2 c - 1): colour of [-1, 1]
    return torch.cat([colour, a], 1).view(shape[0], -1, 4, SIZE, SIZE)
