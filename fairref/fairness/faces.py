"""Faces in images: which one counts, what of it the judges see, and how the gradient gets back (docs/method.md §5).

B images of H x W pixels, M of them with a face. Coordinates are pixels: the pixel of index i reaches from i to
i + 1 and has its centre at i + 0.5. A box is (left, top, right, bottom), landmarks are (5, 2): x, y of the left and
the right eye as seen, the nose, the left and the right corner of the mouth. Boxes may reach outside the image, and
what is seen there is black. Finding faces carries no gradient; cutting them out does.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ENLARGE = 0.5  # of a detector's tight box: share of its longer side that the square around it has more
CROP, ALIGNED = 224, 112  # pixels of a side: what the classifier sees, what the embedder sees
BLACK = -1.0
# The five landmarks of an aligned face of 112 x 112 pixels, as indices of pixels (the template of ArcFace).
TEMPLATE = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)


@dataclass(frozen=True)
class DetectedFaces:
    """What a detector found in one image, in any order. Any M faces >= 0."""

    boxes: Tensor  # (M, 4)
    landmarks: Tensor  # (M, 5, 2)


Detector = Callable[[Tensor], list[DetectedFaces]]  # (B, 3, H, W) uint8, RGB -> the faces of each image


@dataclass(frozen=True)
class MTCNNDetector:
    """MTCNN as a detector: its boxes name their first and last pixel from one on, its landmarks pixels from zero."""

    network: Callable[[Tensor], list[DetectedFaces]]

    def __call__(self, x: Tensor) -> list[DetectedFaces]:
        """x (B, 3, H, W) uint8 -> the faces of each image."""
        shift = torch.tensor([1.0, 1.0, 0.0, 0.0], device=x.device)
        faces = self.network(x)
        return [DetectedFaces(seen.boxes - shift.to(seen.boxes), seen.landmarks + 0.5) for seen in faces]


@dataclass(frozen=True)
class Faces:
    """The face that counts in each image of a batch; M = has_face.sum()."""

    has_face: Tensor  # (B,) bool
    boxes: Tensor  # (M, 4) square, enlarged
    landmarks: Tensor  # (M, 5, 2)

    def __getitem__(self, images: Tensor) -> "Faces":
        """Those of the images with these indices, in their order."""
        has_face = self.has_face[images]
        rows = (self.has_face.cumsum(0) - 1)[images][has_face]  # where each one's face is among the M
        return Faces(has_face, self.boxes[rows], self.landmarks[rows])

    def only(self, mask: Tensor) -> "Faces":
        """The same images, of which those outside mask (B,) bool count as showing no face."""
        kept = mask[self.has_face]
        return Faces(self.has_face & mask, self.boxes[kept], self.landmarks[kept])


def to_bytes(x: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8, rounded, without gradient."""
    return ((x.detach().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def inside(boxes: Tensor, H: int, W: int) -> Tensor:
    """The part of boxes (M, 4) that lies in the image; an empty one has no area."""
    low = boxes[:, :2].clamp(min=0)
    high = torch.minimum(boxes[:, 2:], boxes.new_tensor([W, H]))
    return torch.cat([low, torch.maximum(low, high)], 1)


def area(boxes: Tensor) -> Tensor:
    """(M, 4) -> (M,) square pixels."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def square_around(boxes: Tensor, enlarge: float = ENLARGE) -> Tensor:
    """Squares of the same centre as boxes (M, 4) and (1 + enlarge) times their longer side."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True) * (1 + enlarge) / 2
    return torch.cat([centre - half, centre + half], 1)


@torch.no_grad()
def find(detector: Detector, x: Tensor) -> Faces:
    """The largest face, by area inside the image, of each of the images x (B, 3, H, W) in [-1, 1]."""
    H, W = x.shape[2:]
    found, boxes, landmarks = [], [x.new_zeros(0, 4)], [x.new_zeros(0, 5, 2)]
    for seen in detector(to_bytes(x)) if len(x) else []:
        areas = area(inside(seen.boxes, H, W))
        found.append(bool((areas > 0).any()))
        if found[-1]:
            best = areas.argmax()
            boxes.append(seen.boxes[best, None].to(x))
            landmarks.append(seen.landmarks[best, None].to(x))
    found = torch.tensor(found, dtype=torch.bool, device=x.device)
    return Faces(found, square_around(torch.cat(boxes)), torch.cat(landmarks))


def crops(x: Tensor, faces: Faces, side: int = CROP) -> Tensor:
    """What the boxes show of images x (B, 3, H, W), to whole pixels, as (M, 3, side, side); with gradient."""
    H, W = x.shape[2:]
    shown = [x.new_zeros(0, x.shape[1], side, side)]
    for image, box in zip(x[faces.has_face], faces.boxes.round().long().tolist(), strict=True):
        left, top, right, bottom = box[0], box[1], max(box[2], box[0] + 1), max(box[3], box[1] + 1)
        margins = (max(-left, 0), max(right - W, 0), max(-top, 0), max(bottom - H, 0))
        part = image[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
        part = F.pad(part, margins, value=BLACK)
        size = (side, side)
        shown.append(F.interpolate(part[None], size, mode="bilinear", align_corners=False, antialias=True))
    return torch.cat(shown)


FLAT = 1e-6  # the least scale of a similarity


def similarity(landmarks: Tensor, side: int = ALIGNED) -> Tensor:
    """The turn, scale and shift (M, 2, 3) that bring landmarks (M, 5, 2) nearest to the template's, in float64.

    Least squares over x + i y: the slope is <p, d> / <p, p> of the centred points p and their destinations d.
    """
    p = torch.view_as_complex(landmarks.double().contiguous())  # (M, 5)
    template = (landmarks.new_tensor(TEMPLATE, dtype=torch.float64) + 0.5) * (side / ALIGNED)
    d = torch.view_as_complex(template)  # (5,)
    mean_p, mean_d = p.mean(1, keepdim=True), d.mean()
    p, d = p - mean_p, d - mean_d
    slope = (p.conj() * d).sum(1) / (p.conj() * p).sum(1).real.clamp(min=1e-12)  # (M,)
    slope = slope.where(slope.abs() > FLAT, FLAT)  # else five landmarks in one place could not be taken back
    shift = mean_d - slope * mean_p[:, 0]
    rows = torch.stack([slope.real, -slope.imag, shift.real, slope.imag, slope.real, shift.imag], 1)
    return rows.view(-1, 2, 3)


def align_crops(x: Tensor, faces: Faces, side: int = ALIGNED) -> Tensor:
    """The faces of images x (B, 3, H, W), turned and scaled to the template, (M, 3, side, side); with gradient.

    Each pixel of the result is read, between four pixels, at the place that the similarity takes to its centre.
    """
    H, W = x.shape[2:]
    there = similarity(faces.landmarks, side)  # image -> aligned face
    turn, shift = there[:, :, :2], there[:, :, 2:]
    back = torch.linalg.inv(turn) if len(turn) else turn
    axis = torch.arange(side, dtype=torch.float64, device=x.device) + 0.5
    y, column = torch.meshgrid(axis, axis, indexing="ij")
    place = torch.stack([column, y]).flatten(1)  # (2, side side)
    place = (back @ (place - shift)).transpose(1, 2)  # (M, side side, 2) in pixels of the image
    grid = 2 * place / place.new_tensor([W, H]) - 1
    grid = grid.view(-1, side, side, 2).to(x.dtype)
    return F.grid_sample(x[faces.has_face] - BLACK, grid, "bilinear", "zeros", align_corners=False) + BLACK


def scale_gradient(x: Tensor, boxes: list[Tensor | None], factors: Tensor) -> Tensor:
    """x (B, 3, H, W) itself, whose gradient is multiplied by factors (B,) inside each image's box.

    x.detach() + m (x - x.detach()) with m = the factor where a pixel's centre lies in the box, else 1. None: no box.
    """
    H, W = x.shape[2:]
    m = x.new_ones(len(x), 1, H, W)
    across, down = (torch.arange(n, device=x.device) + 0.5 for n in (W, H))
    for image, box, factor in zip(m, boxes, factors, strict=True):
        if box is not None:
            left, top, right, bottom = box
            rows, columns = (top <= down) & (down < bottom), (left <= across) & (across < right)
            image[0][rows[:, None] & columns] = factor.to(x.dtype)
    return x.detach() + m * (x - x.detach())


def shared_boxes(a: Faces, b: Faces) -> list[Tensor | None]:
    """For each image the intersection of its two boxes (4,): None where either has no face or they don't meet."""
    of_a, of_b = iter(a.boxes), iter(b.boxes)
    found = []
    for in_a, in_b in zip(a.has_face.tolist(), b.has_face.tolist(), strict=True):
        one, other = (next(of_a) if in_a else None), (next(of_b) if in_b else None)
        if one is None or other is None:
            found.append(None)
            continue
        box = torch.cat([torch.maximum(one[:2], other[:2]), torch.minimum(one[2:], other[2:])])
        found.append(box if (box[2:] > box[:2]).all() else None)
    return found
