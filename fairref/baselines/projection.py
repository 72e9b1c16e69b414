"""Projection: take the directions in which explicit prompts differ out of the prompt's text embedding, and draw.

Chuang et al. 2023, "Debiasing Vision-Language Models via Biased Prompts": c becomes P c for every token,
P = (I + lambda M)^-1, where M is the mean of (z_i - z_j)(z_i - z_j)^T over pairs such as "male X" and "female X", and z
the EOS state of unit norm. P minimises |P - I|^2 + lambda (mean of |P z_i - P z_j|^2). c_empty stays.

Limits: it asks that the classes become alike, not that they get their shares, so it knows no target; what replaces a
class is the model's own choice. Prompts that name a class lose the name, too. Here M is the mean over all pairs of K
classes; the paper has two.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fairref.baselines.case import Case, apply, class_states, draw_edited

OCCUPATIONS = 80  # as many as there


def fit(case: Case, strength: float) -> dict[str, Tensor]:
    """P (d, d) of lambda = `strength`."""
    return {"P": projection(F.normalize(class_states(case, OCCUPATIONS), dim=2), strength)}


def projection(z: Tensor, strength: float) -> Tensor:
    """P = (I + lambda M)^-1 (d, d) of unit states z (K, X, d): K classes of X texts."""
    pairs = torch.combinations(torch.arange(len(z)))  # (K (K - 1) / 2, 2)
    difference = (z[pairs[:, 0]] - z[pairs[:, 1]]).flatten(0, 1)  # (pairs X, d)
    M = difference.T @ difference / len(difference)
    return torch.linalg.inv(torch.eye(len(M)).to(M) + strength * M)


def images_of(case: Case, fitted: dict[str, Tensor], prompt: str, images: range) -> Tensor:
    """(n, 3, H, W) of the prompt's projected embedding."""
    return draw_edited(case, prompt, images, lambda c, _: apply(fitted["P"], c))
