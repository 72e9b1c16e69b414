"""MTCNN (Zhang et al. 2016), the face detector. Parameter names and values agree with facenet-pytorch's.

Three small networks look at squares of growing resolution. P proposes windows of 12 pixels on every scale of an
image pyramid. R judges these at 24 pixels, and O at 48 pixels. O also places five landmarks: eyes, nose, corners of
the mouth. After each network, boxes that overlap a better one are dropped. Nothing here carries a gradient.

M boxes (M, 4) are left, top, right, bottom in pixels of the image. The pixel of index i is at i + 1, because the
arrays of the original start at one.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairref.errors import UserError

WINDOW, STRIDE = 12, 2  # of the proposal network, in pixels of the scaled image
STEP = 0.709  # between the scales of the pyramid: half the area
OVERLAP_IN_SCALE, OVERLAP = 0.5, 0.7  # of two boxes, above which the worse is dropped
BATCH = 512  # windows seen at once by the second and third network


@dataclass(frozen=True)
class Detections:
    """The faces of one image, the most probable first."""

    boxes: Tensor  # (M, 4) left, top, right, bottom
    probability: Tensor  # (M,)
    landmarks: Tensor  # (M, 5, 2) x, y of left eye, right eye, nose, left and right corner of the mouth


class PNet(nn.Module):
    """x (B, 3, h, w) -> offsets of a box's sides (B, 4, h', w'), probability of a face (B, h', w')."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = pool(self.prelu1(self.conv1(x)), 2)
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return self.conv4_2(x), self.conv4_1(x).softmax(1)[:, 1]


class RNet(nn.Module):
    """x (B, 3, 24, 24) -> offsets (B, 4), probability (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = pool(self.prelu1(self.conv1(x)), 3)
        x = pool(self.prelu2(self.conv2(x)), 3)
        x = columns_first(self.prelu3(self.conv3(x)))
        x = self.prelu4(self.dense4(x))
        return self.dense5_2(x), self.dense5_1(x).softmax(1)[:, 1]


class ONet(nn.Module):
    """x (B, 3, 48, 48) -> offsets (B, 4), landmarks (B, 10) as five x and five y, probability (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = pool(self.prelu1(self.conv1(x)), 3)
        x = pool(self.prelu2(self.conv2(x)), 3)
        x = pool(self.prelu3(self.conv3(x)), 2)
        x = columns_first(self.prelu4(self.conv4(x)))
        x = self.prelu5(self.dense5(x))
        return self.dense6_2(x), self.dense6_3(x), self.dense6_1(x).softmax(1)[:, 1]


def pool(x: Tensor, size: int) -> Tensor:
    """Return the maximum of size x size windows, at stride 2; windows that reach over the edge count too."""
    return F.max_pool2d(x, size, 2, ceil_mode=True)


def columns_first(x: Tensor) -> Tensor:
    """Return (B, C, h, w) as (B, w h C), in the order of the original's arrays."""
    return x.permute(0, 3, 2, 1).flatten(1)


class MTCNN(nn.Module):
    """Images x (B, 3, H, W), whole numbers 0..255 in RGB, of any dtype -> the Detections of each. Raises UserError."""

    def __init__(self, smallest: int = 20, thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7)) -> None:
        super().__init__()
        if type(smallest) is not int or smallest < 1:
            raise UserError(
                f"MTCNN's smallest face is {smallest!r} pixels; expected a whole number from 1 up."
            )
        shares = isinstance(thresholds, (tuple, list)) and all(
            isinstance(v, (int, float)) for v in thresholds
        )
        if not shares or len(thresholds) != 3 or not all(0 <= v <= 1 for v in thresholds):
            raise UserError(f"MTCNN's thresholds are {thresholds!r}; expected three numbers from 0 to 1.")
        self.pnet, self.rnet, self.onet = PNet(), RNet(), ONet()
        self.smallest = smallest  # side of the smallest face that is looked for, pixels
        self.thresholds = thresholds  # probability that a box needs to pass each network

    @torch.no_grad()
    def forward(self, x: Tensor) -> list[Detections]:
        x = x.to(self.pnet.conv1.weight)
        boxes, image = self.propose(x)
        boxes, image = self.refine(x, boxes, image)
        detections, image = self.settle(x, boxes, image)
        counts = image.bincount(minlength=len(x)).tolist()  # faces of each image
        return list(map(Detections, *(part.split(counts) for part in detections)))

    def propose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return square boxes (M, 4) of the first network's faces, and their image (M,), in order of images."""
        H, W = x.shape[2:]
        proposals = [(x.new_zeros(0, 9), torch.zeros(0, dtype=torch.long, device=x.device))]
        for scale in scales(min(H, W), self.smallest):
            small = resize(x, (int(H * scale + 1), int(W * scale + 1)))
            boxes, score, moves, image = windows(*self.pnet(small), scale, self.thresholds[0])
            keep = suppress(boxes, score, image, OVERLAP_IN_SCALE)
            proposals.append((torch.cat([boxes, score[:, None], moves], 1)[keep], image[keep]))
        rows, image = (torch.cat(part) for part in zip(*proposals, strict=True))
        boxes, score, moves = rows.split([4, 1, 4], 1)
        keep = suppress(boxes, score[:, 0], image, OVERLAP)
        boxes, moves = boxes[keep], moves[keep]
        size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)  # (M, 4) width, height, width, height
        return square(boxes + moves * size), image[keep]

    def refine(self, x: Tensor, boxes: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the boxes (M, 4) that the second network keeps, moved and made square again, and their image."""
        pixels, boxes, image = crops(x, boxes, image, 24)
        moves, score = in_batches(self.rnet, pixels)
        passed = score > self.thresholds[1]
        boxes, score, moves, image = boxes[passed], score[passed], moves[passed], image[passed]
        keep = suppress(boxes, score, image, OVERLAP)
        return square(move(boxes[keep], moves[keep])), image[keep]

    def settle(self, x: Tensor, boxes: Tensor, image: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Return (boxes, probability, landmarks) of the boxes (M, 4) that the third network keeps, and their image."""
        pixels, boxes, image = crops(x, boxes, image, 48)
        moves, points, score = in_batches(self.onet, pixels)
        passed = score > self.thresholds[2]
        boxes, score, moves, points = boxes[passed], score[passed], moves[passed], points[passed]
        size = boxes[:, 2:] - boxes[:, :2] + 1  # (M, 2)
        points = points.unflatten(1, (2, 5)).transpose(1, 2) * size[:, None] + boxes[:, None, :2] - 1
        boxes, image = move(boxes, moves), image[passed]
        keep = suppress(boxes, score, image, OVERLAP, of_smaller=True)
        return (boxes[keep], score[keep], points[keep]), image[keep]


def scales(side: int, smallest: int) -> list[float]:
    """Return the factors of the image pyramid: every face from `smallest` pixels up fills a window at one of them."""
    factors, scale, left = [], WINDOW / smallest, side * WINDOW / smallest
    while left >= WINDOW:
        factors.append(scale)
        scale, left = scale * STEP, left * STEP
    return factors


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return x resized by the mean of the pixels under each new one, and centred."""
    return centred(F.adaptive_avg_pool2d(x, size))


def centred(x: Tensor) -> Tensor:
    """Return pixels of 0..255 in about [-1, 1]."""
    return (x - 127.5) / 128


def windows(
    offsets: Tensor, probability: Tensor, scale: float, threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return boxes (M, 4), probabilities (M,), offsets (M, 4) and images (M,) of the windows above the threshold.

    offsets (B, 4, h, w) and probability (B, h, w): the maps of the first network at one scale.
    """
    likely = probability >= threshold
    image, *corner = likely.nonzero().T  # (M,) image, row, column
    corner = torch.stack(corner[::-1], 1).to(offsets)  # (M, 2) column, row
    start = ((STRIDE * corner + 1) / scale).floor()
    end = ((STRIDE * corner + WINDOW) / scale).floor()
    return torch.cat([start, end], 1), probability[likely], offsets.permute(0, 2, 3, 1)[likely], image


def move(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Return boxes with sides moved by offsets (M, 4) in units of their size."""
    size = (boxes[:, 2:] - boxes[:, :2] + 1).repeat(1, 2)
    return boxes + offsets * size


def square(boxes: Tensor) -> Tensor:
    """Return the smallest squares with the same centres that hold boxes (M, 4)."""
    size = boxes[:, 2:] - boxes[:, :2]
    side = size.amax(1, keepdim=True)
    start = boxes[:, :2] + size * 0.5 - side * 0.5
    return torch.cat([start, start + side], 1)


def crops(x: Tensor, boxes: Tensor, image: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return crops (M', 3, side, side) of the boxes (M, 4) that meet their image, these boxes, and their image."""
    H, W = x.shape[2:]
    low = boxes[:, :2].trunc().long().clamp(min=1)
    high = torch.minimum(boxes[:, 2:].trunc().long(), torch.tensor([W, H], device=boxes.device))
    inside = (high >= low).all(1)
    places = torch.cat([image[:, None], low - 1, high], 1)[inside].tolist()
    pixels = [
        F.adaptive_avg_pool2d(x[n, :, top:bottom, left:right], side) for n, left, top, right, bottom in places
    ]
    pixels = torch.stack(pixels) if pixels else x.new_zeros(0, 3, side, side)
    return centred(pixels), boxes[inside], image[inside]


def in_batches(network: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Return network(x), computed for at most BATCH rows at once."""
    # pooling is several times as fast where a pixel's channels lie side by side
    x = x.contiguous(memory_format=torch.channels_last)
    return tuple(torch.cat(parts) for parts in zip(*map(network, x.split(BATCH)), strict=True))


def suppress(boxes: Tensor, score: Tensor, image: Tensor, limit: float, of_smaller: bool = False) -> Tensor:
    """Return indices of the boxes that overlap no better box of their image by more than `limit`.

    They come image by image, the best score first. Overlap is shared area over the union or, with `of_smaller`, over
    the smaller box. With `of_smaller` a box includes its last pixels.
    """
    device = boxes.device
    # one box after the other, so on the CPU: a GPU would wait for each
    boxes, score, image = (part.cpu().numpy() for part in (boxes, score, image))
    more = 1 if of_smaller else 0
    area = (boxes[:, 2:] - boxes[:, :2] + more).prod(1)
    keep = []
    for n in np.unique(image):
        rows = np.flatnonzero(image == n)
        order = rows[np.argsort(-score[rows], kind="stable")]
        while len(order):
            best, order = order[0], order[1:]
            keep.append(best)
            low = np.maximum(boxes[best, :2], boxes[order, :2])
            high = np.minimum(boxes[best, 2:], boxes[order, 2:])
            shared = (high - low + more).clip(min=0).prod(1)
            whole = np.minimum(area[best], area[order]) if of_smaller else area[best] + area[order] - shared
            order = order[shared / whole <= limit]
    return torch.tensor(keep, dtype=torch.long, device=device)
