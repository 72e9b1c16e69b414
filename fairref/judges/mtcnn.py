"""MTCNN (Zhang et al. 2016), the face detector. Parameter names, and values for values, facenet-pytorch's.

Three small networks look at squares of growing resolution: P proposes windows of 12 pixels on every scale of an
image pyramid, R sees those at 24 pixels, O at 48 and also places five landmarks (eyes, nose, corners of the
mouth). Between them boxes that overlap a better one are dropped. Nothing here carries a gradient.

M boxes (M, 4) are left, top, right, bottom in pixels of the image; the pixel of index i is at i + 1, as in the
original's arrays, which start at one.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairref.errors import UserError

WINDOW, STRIDE = 12, 2  # of the proposal network, in pixels of the scaled image
STEP = 0.709  # between the scales of the pyramid: half the area
OVERLAP_IN_SCALE, OVERLAP = 0.5, 0.7  # of two boxes, from which the worse is dropped
BATCH = 512  # windows seen at once by the second and third network


@dataclass(frozen=True)
class Detections:
    """What was found in one image, the most probable face first."""

    boxes: Tensor  # (M, 4) left, top, right, bottom
    probability: Tensor  # (M,)
    landmarks: Tensor  # (M, 5, 2) x, y of left eye, right eye, nose, left and right corner of the mouth


class PNet(nn.Module):
    """x (B, 3, h, w) -> offsets of a box's sides (B, 4, h', w'), probability of a face (B, h', w')."""

    def __init__(self):
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

    def __init__(self):
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

    def __init__(self):
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
    """Largest of each size x size window, every second; a window that sticks out counts too."""
    return F.max_pool2d(x, size, 2, ceil_mode=True)


def columns_first(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, w h C), in the order of the original's arrays."""
    return x.permute(0, 3, 2, 1).flatten(1)


class MTCNN(nn.Module):
    """Images x (B, 3, H, W), whole numbers 0..255 in RGB, of any dtype -> the Detections of each. Raises UserError."""

    def __init__(self, smallest: int = 20, thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7)):
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
        return [self.find(image) for image in x]

    def find(self, image: Tensor) -> Detections:
        """The faces of one image (3, H, W)."""
        boxes = self.propose(image)
        boxes = self.refine(image, boxes)
        return self.settle(image, boxes)

    def propose(self, image: Tensor) -> Tensor:
        """Square boxes that the first network takes for faces."""
        H, W = image.shape[1:]
        found = []
        for scale in scales(min(H, W), self.smallest):
            small = resize(image[None], (int(H * scale + 1), int(W * scale + 1)))
            offsets, probability = self.pnet(small)
            boxes, score, moves = windows(offsets[0], probability[0], scale, self.thresholds[0])
            keep = suppress(boxes, score, OVERLAP_IN_SCALE)
            found.append(torch.cat([boxes, score[:, None], moves], 1)[keep])
        if not found:
            return image.new_zeros(0, 4)
        boxes, score, moves = torch.cat(found).split([4, 1, 4], 1)
        keep = suppress(boxes, score[:, 0], OVERLAP)
        boxes, moves = boxes[keep], moves[keep]
        size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)  # (M, 4) width, height, width, height
        return square(boxes + moves * size)

    def refine(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Those of the square boxes (M, 4) that the second network keeps, moved and squared again."""
        pixels, boxes = crops(image, boxes, 24)
        if not len(boxes):
            return boxes
        moves, score = in_batches(self.rnet, pixels)
        passed = score > self.thresholds[1]
        boxes, score, moves = boxes[passed], score[passed], moves[passed]
        keep = suppress(boxes, score, OVERLAP)
        return square(move(boxes[keep], moves[keep]))

    def settle(self, image: Tensor, boxes: Tensor) -> Detections:
        """Those of the square boxes (M, 4) that the third network keeps, with landmarks."""
        pixels, boxes = crops(image, boxes, 48)
        if not len(boxes):
            return Detections(boxes, boxes.new_zeros(0), boxes.new_zeros(0, 5, 2))
        moves, points, score = in_batches(self.onet, pixels)
        passed = score > self.thresholds[2]
        boxes, score, moves, points = boxes[passed], score[passed], moves[passed], points[passed]
        size = boxes[:, 2:] - boxes[:, :2] + 1  # (M, 2)
        points = points.unflatten(1, (2, 5)).transpose(1, 2) * size[:, None] + boxes[:, None, :2] - 1
        boxes = move(boxes, moves)
        keep = suppress(boxes, score, OVERLAP, of_smaller=True)
        return Detections(boxes[keep], score[keep], points[keep])


def scales(side: int, smallest: int) -> list[float]:
    """Factors by which the image is resized, so that faces of `smallest` and more pixels fill a window once."""
    found, scale, left = [], WINDOW / smallest, side * WINDOW / smallest
    while left >= WINDOW:
        found.append(scale)
        scale, left = scale * STEP, left * STEP
    return found


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean of the pixels under each new one, and then from 0..255 to about [-1, 1]."""
    return (F.interpolate(x, size=size, mode="area") - 127.5) / 128


def windows(offsets: Tensor, probability: Tensor, scale: float, threshold: float):
    """Boxes (M, 4), probabilities (M,) and offsets (M, 4) where the map (h, w) reaches the threshold."""
    likely = probability >= threshold
    corner = likely.nonzero().flip(1).to(offsets)  # (M, 2) column, row
    start = ((STRIDE * corner + 1) / scale).floor()
    end = ((STRIDE * corner + WINDOW) / scale).floor()
    return torch.cat([start, end], 1), probability[likely], offsets[:, likely].T


def move(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Boxes whose sides are moved by offsets (M, 4) in units of their size."""
    size = (boxes[:, 2:] - boxes[:, :2] + 1).repeat(1, 2)
    return boxes + offsets * size


def square(boxes: Tensor) -> Tensor:
    """The smallest squares of the same centre that hold boxes (M, 4)."""
    size = boxes[:, 2:] - boxes[:, :2]
    side = size.amax(1, keepdim=True)
    start = boxes[:, :2] + size * 0.5 - side * 0.5
    return torch.cat([start, start + side], 1)


def crops(image: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """What boxes (M, 4) show of the image, resized to (M', 3, side, side), and the M' boxes inside it."""
    H, W = image.shape[1:]
    low = boxes[:, :2].trunc().long().clamp(min=1)
    high = torch.minimum(boxes[:, 2:].trunc().long(), torch.tensor([W, H], device=boxes.device))
    inside = (high >= low).all(1)
    places = torch.cat([low - 1, high], 1)[inside].tolist()
    pixels = [
        resize(image[None, :, top:bottom, left:right], (side, side)) for left, top, right, bottom in places
    ]
    return torch.cat(pixels) if pixels else image.new_zeros(0, 3, side, side), boxes[inside]


def in_batches(network: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """network(x), a bounded number of rows at once."""
    return tuple(torch.cat(parts) for parts in zip(*map(network, x.split(BATCH))))


def suppress(boxes: Tensor, score: Tensor, limit: float, of_smaller: bool = False) -> Tensor:
    """Indices, best score first, of the boxes that overlap no better one by more than `limit`.

    The overlap is the share of the union or, `of_smaller`, of the smaller box, whose pixels then count from its
    first to its last."""
    # one box after the other, so on the CPU: a GPU would wait for each
    corners, order = boxes.cpu().numpy(), np.argsort(-score.cpu().numpy(), kind="stable")
    more = 1 if of_smaller else 0
    area = (corners[:, 2:] - corners[:, :2] + more).prod(1)
    keep = []
    while len(order):
        best, order = order[0], order[1:]
        keep.append(best)
        low = np.maximum(corners[best, :2], corners[order, :2])
        high = np.minimum(corners[best, 2:], corners[order, 2:])
        shared = (high - low + more).clip(min=0).prod(1)
        whole = np.minimum(area[best], area[order]) if of_smaller else area[best] + area[order] - shared
        order = order[shared / whole <= limit]
    return torch.tensor(keep, dtype=torch.long, device=boxes.device)
