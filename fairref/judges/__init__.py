"""Frozen networks that judge images. They do not depend on prompts or on fairness.

ImageClassifier, Features and Embedder are the interfaces of such a network, also of a user's own.
"""

from typing import Protocol

from torch import Tensor

# Mean and standard deviation of ImageNet's pixels in [0, 1], per channel R, G, B.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageClassifier(Protocol):
    """Classifies images by one or more attributes."""

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Each attribute's class names, in the order of the logits."""

    @property
    def input_size(self) -> int | None:
        """Side in pixels of the face crops that it takes; None: it takes whole images."""

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Return {attribute: logits (n, K)} of images x (n, 3, H, W) in [-1, 1], differentiable."""


class Features(Protocol):
    """Extracts features of images."""

    @property
    def width(self) -> int:
        """The number D of features."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the features (n, D) of images x (n, 3, H, W) in [-1, 1], differentiable."""


class Embedder(Features, Protocol):
    """Extracts features of aligned faces; faces of one person have similar ones."""

    @property
    def side(self) -> int:
        """Side in pixels of the faces that it takes."""
