"""The losses on generated images (METHOD.md §3, §4, §5; eqs 6 and 7).

Every loss comes as one value an image, already divided by `N`, the number of images over all processes: summing over the
images of any split of the batch, and over the splits, gives the loss of the equation.
"""

import torch
import torch.nn.functional as F


def confident_targets(q, C):
    """y^(i) = argmax_k q_k, and whether c^(i) = max_k q_k >= C: q (N, K) -> y (N,) long, confident (N,) bool.

    A row of zeros (an image that took no part in the transport) has no target, whatever C is.
    """
    c, y = q.max(1)
    return y, (c >= C) & (c > 0)


def align_loss(logits, q, C, N):
    """L_align = 1/N Σ_i 1[c^(i) >= C] CE(h(x^(i)), y^(i))   (6), for images i of this process.

    `logits` (n, K) of h, with gradient; `q` (n, K) the same images' rows of eq 5 (any device); `C` the confidence threshold;
    `N` images over all processes. -> values (n,), confident (n,) bool; values are 0 where not confident.
    """
    y, confident = confident_targets(q.to(logits.device), C)
    cross_entropy = F.cross_entropy(logits, y, reduction="none")  # (n,)
    return cross_entropy.where(confident, 0) / N, confident


def image_loss(x, o, features, N):
    """L_img = 1/N Σ_i Σ_f (1 - cos(f(x^(i)), f(o^(i))))   (7), for images i of this process -> (n,).

    `x`, `o` (n, 3, H, W) in [-1, 1]: the generated images, clamped, and the frozen model's from the same noise;
    `features`: functions of images to (n, D), such as CLIP's and DINO's. No gradient flows into `o`.
    """
    o = o.detach()
    distances = [1 - F.cosine_similarity(f(x), f(o).detach(), dim=1) for f in features]  # each (n,)
    return torch.stack(distances).sum(0) / N


def agreement(y, confident, original):
    """Where the target is the original image's class: y, original (N,) long, confident (N,) bool -> (N,) bool.

    A target that is not confident counts as disagreeing.
    """
    return confident & (y == original)


def dynamic_weights(agrees, lambda_1, lambda_2):
    """λ_img of each image (N,): λ1 where target and original agree, else λ2, weaker so that the image may change (§5).

    `agrees` maps each attribute to (N,) bool, `lambda_2` each attribute to its λ2; the smallest of those that disagree
    counts.
    """
    weights = [
        torch.where(agree, float(lambda_1), float(lambda_2[attribute])) for attribute, agree in agrees.items()
    ]
    return torch.stack(weights).amin(0)


def total_loss(align, image, weights):
    """L = L_align + λ_img L_img: per-image values (n,) each -> the sum over this process's images."""
    return (align + weights * image).sum()
