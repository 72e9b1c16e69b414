"""The losses on generated images (docs/method.md §3, §4, §5; eqs 6 and 7).

Every loss comes as one value an image, already divided by `N`, the number of images over all processes: their
sum over the images of any split of the batch, and over the splits, is the loss of the equation.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def confident_targets(q: Tensor, C: float) -> tuple[Tensor, Tensor]:
    """y^(i) = argmax_k q_k, and whether c^(i) = max_k q_k >= C: q (N, K) -> y (N,) long, confident (N,) bool.

    A row of zeros (an image that took no part in the transport) has no target, whatever C is.
    """
    c, y = q.max(1)
    return y, (c >= C) & (c > 0)


def leaving_targets(q: Tensor, own: Tensor, C: float) -> Tensor:
    """q (n, K) of eq 5; but of an image that leaves its class `own` (n,) with a chance of C or more, this chance for
    the likeliest other class, 0 for the rest (docs/method.md §3). If K = 2 and C > 1/2, eq 6 makes the same of both."""
    others = q.masked_fill(F.one_hot(own, q.shape[1]).bool(), 0)
    leaves = others.sum(1, keepdim=True)
    told = F.one_hot(others.argmax(1), q.shape[1]) * leaves
    return told.where((leaves >= C) & (leaves > 0), q)


def align_loss(logits: Tensor, q: Tensor, C: float, N: int, soft: bool = False) -> tuple[Tensor, Tensor]:
    """L_align = 1/N Σ_i 1[c^(i) >= C] CE(h(x^(i)), y^(i))   (6), for images i of this process.

    `logits` (n, K) of h, with gradient; `q` (n, K) the same images' rows of eq 5, on any device; `C` the
    confidence threshold; `N` images over all processes. -> values (n,), confident (n,) bool; else they are 0.
    `soft`: CE(h(x^(i)), q^(i)) of all images in place of that.
    """
    y, confident = (part.to(logits.device) for part in confident_targets(q, C))
    if soft:
        y, confident = q.to(logits), (q > 0).any(1).to(logits.device)
    cross_entropy = F.cross_entropy(logits, y, reduction="none")  # (n,)
    return cross_entropy.where(confident, 0) / N, confident


def image_loss(x: Tensor, o: Tensor, features: Iterable[Callable[[Tensor], Tensor]], N: int) -> Tensor:
    """L_img = 1/N Σ_i Σ_f (1 - cos(f(x^(i)), f(o^(i))))   (7), for images i of this process -> (n,).

    `x`, `o` (n, 3, H, W) in [-1, 1]: generated images, clamped, and the frozen model's from the same noise.
    `features`: functions of images to (n, D): CLIP, or CLIP and DINO. No gradient flows into `o`.
    """
    pairs = [[_full(f(picture)) for picture in (x, o.detach())] for f in features]
    distances = [1 - F.cosine_similarity(of_x, of_o.detach(), dim=1) for of_x, of_o in pairs]  # each (n,)
    return torch.stack(distances).sum(0) / N


def _full(x: Tensor) -> Tensor:
    """At least float32: one minus a cosine near 1 has no digits left in float16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def agreement(y: Tensor, confident: Tensor, original: Tensor) -> Tensor:
    """Where the target is the original's class: y, original (n,) long, confident (n,) bool -> (n,) bool.

    A target that is not confident counts as disagreeing.
    """
    return confident & (y == original)


def dynamic_weights(
    agrees: dict[str, Tensor],
    lambda_1: float,
    lambda_2: dict[str, float],
    face: Tensor | None = None,
    original_face: Tensor | None = None,
) -> Tensor:
    """λ_img of each image (n,): λ1 where target and original agree, else λ2 < λ1: the image may change.

    `agrees` maps each attribute to (n,) bool, `lambda_2` each attribute to its λ2; the smallest λ2 of the
    attributes that disagree counts (docs/method.md §5). With faces, `face` and `original_face` (n,) bool say whether
    x and o show one: an o without leaves nothing to agree with, and an x without has no loss but L_img, with λ1.
    """
    weights = []
    for attribute, agree in agrees.items():
        agree = agree if original_face is None else agree & original_face
        weights.append(_either(agree, lambda_1, lambda_2[attribute]))
    weights = torch.stack(weights).amin(0)
    return weights if face is None else weights.where(face, float(lambda_1))


def region_factors(agrees: dict[str, Tensor], lambda_3: dict[str, float]) -> Tensor:
    """λ3/λ2, by which the gradient of L_img is multiplied inside the face box: (n,), 1 where all agree.

    `lambda_3` maps each attribute to its λ3/λ2; the smallest of those that disagree counts (docs/method.md §5).
    """
    factors = [_either(agree, 1.0, lambda_3[attribute]) for attribute, agree in agrees.items()]
    return torch.stack(factors).amin(0)


def _either(mask, yes, no):
    """float64, in which no constant is rounded."""
    return torch.where(
        mask, *(torch.tensor(float(v), dtype=torch.float64, device=mask.device) for v in (yes, no))
    )


def face_loss(embeddings: Tensor, references: Tensor, N: int) -> Tensor:
    """L_face = 1/N Σ_i (1 - cos(emb(face(x^(i))), F_i)), F_i the reference of face i: (m, D) each -> (m,).

    The images are those with a face and a confident target. With F_i the nearest of D_F (`nearest_faces`) this
    is one minus the largest cosine; no gradient flows into references.
    """
    return (1 - F.cosine_similarity(embeddings, references.detach(), dim=1)) / N


@torch.no_grad()
def nearest_faces(embeddings: Tensor, external: Tensor, chunk: int = 16_384) -> Tensor:
    """The row of D_F, `external` (R, D) of unit norm, that has the largest cosine with each embedding (m, D)."""
    largest = embeddings.new_full((len(embeddings),), -torch.inf)
    nearest = torch.zeros(len(embeddings), dtype=torch.long, device=embeddings.device)
    for start in range(0, len(external), chunk):
        cosine, row = (embeddings @ external[start : start + chunk].to(embeddings).T).max(1)
        better = cosine > largest
        largest, nearest = cosine.where(better, largest), (row + start).where(better, nearest)
    return external[nearest.to(external.device)].to(embeddings)


def face_references(
    embeddings: Tensor, own: Tensor, use_own: Tensor, external: Tensor, chunk: int = 16_384
) -> Tensor:
    """The reference of each face (m, D): the original image's `own` (m, D) where `use_own` (m,), else the nearest.

    `use_own`: target and original agree in every attribute, the classifier gives the original's class p >= 0.9, and
    the original has a face (docs/method.md §5).
    """
    return torch.where(use_own[:, None], own.detach(), nearest_faces(embeddings, external, chunk))


def text_loss(features: Tensor, text: Tensor, N: int) -> Tensor:
    """L_text = 1/N Σ_i (1 - cos(CLIP(x^(i)), CLIP-text(P))): features (n, D) of images, text (1, D) -> (n,)."""
    return (1 - F.cosine_similarity(_full(features), _full(text.detach()), dim=1)) / N
