"""Fair PCA: project the prompt's text embedding onto directions that hold no class, then add a class as noise.

FairImagen (Fu et al. 2025), whose projection is the fair PCA of Kleindessner et al. 2023. X (n, d) are the EOS states
of explicit prompts, Z (n, K) their classes as 0 and 1 less the mean. U (d, D) are the D orthonormal directions of the
largest X^T X among those with Z^T X U = 0, in which the classes' means are equal. c becomes U U^T c for every token.
Then each image gets a class of the target and one of its prompts x_j, and scale (v . x_j) v is added to every token: v
is the unit direction of that class in Z^T X.

Limits: it takes the difference of means at the EOS state of explicit prompts out of all other tokens, too. Prompts that
name a class lose the name and get a drawn one. Left out: further text encoders, which Stable Diffusion 1.5 has not;
several attributes at once; and the projection of c_empty, which the published code also makes, with another noise. Here
c_empty stays. The published noise of .6 is multiplied in twice there, so it is a scale of .36 here.
"""

import torch
import torch.nn.functional as F
from scipy.linalg import null_space
from torch import Tensor

from fairref.baselines.case import Case, apply, class_states, draw_edited

KEPT = 0.88  # D / d: 1800 of 2048 there
OCCUPATIONS = 1000  # at most; what fewer prompts than d say nothing of is lost
RANK = 1e-6  # X has nothing of a direction in which it is less than this share of its largest


def fit(case: Case, scale: float) -> dict[str, Tensor]:
    """U U^T (d, d), and the noise (K, X, d) of each explicit prompt."""
    x = class_states(case, OCCUPATIONS)
    directions = class_directions(x)
    along = torch.einsum("kxd,kd->kx", x, directions)
    noise = scale * along[:, :, None] * directions[:, None]
    U = fair_directions(x, int(KEPT * x.shape[2]))
    return {"projector": U @ U.T, "noise": noise}


def between_classes(x: Tensor) -> Tensor:
    """Z^T X (K, d) of x (K, X, d): X times each class's mean less the mean of all."""
    return x.sum(1) - x.mean((0, 1)) * x.shape[1]


def class_directions(x: Tensor) -> Tensor:
    """v (K, d): the unit direction of each class; those of two classes differ by their sign."""
    return F.normalize(between_classes(x), dim=1)


def fair_directions(x: Tensor, D: int) -> Tensor:
    """U (d, D) with orthonormal columns: the largest tr U^T X^T X U with Z^T X U = 0. x (K, X, d).

    Fewer columns where X is 0 in the rest.
    """
    X = x.flatten(0, 1)  # (n, d)
    R = null_space(between_classes(x).numpy())  # (d, d - rank of Z^T X)
    _, size, Vh = torch.linalg.svd(X @ torch.from_numpy(R), full_matrices=False)  # the largest first
    D = min(D, int((size > size[0] * RANK).sum()))
    return torch.from_numpy(R) @ Vh[:D].T


def images_of(case: Case, fitted: dict[str, Tensor], prompt: str, images: range) -> Tensor:
    """(n, 3, H, W) of the prompt's projected embedding, each image with its own noise."""

    def edit(c, group):
        noise = torch.stack(
            [fitted["noise"][drawn_member(case, prompt, i, fitted["noise"].shape[1])] for i in group]
        )
        return apply(fitted["projector"], c) + noise[:, None].to(c)  # (n, T, d)

    return draw_edited(case, prompt, images, edit)


def drawn_member(case: Case, prompt: str, image: int, X: int) -> tuple[int, int]:
    """The class of an image's noise, drawn from the target, and which of its X prompts."""
    rng, shares = case.rng(prompt, image), case.attribute.target
    return int(rng.choice(len(shares), p=shares)), int(rng.integers(X))
