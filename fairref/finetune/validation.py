"""The adapters of a run compared with one another: fixed noise, which finetuning does not see, and fixed prompts, which
it does not see where a concept has some for validation.

V prompts, n images of each, K joint classes, D width of CLIP's features.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairref.bundle import Bundle
from fairref.fairness.metrics import bias, joint_counts, noise_floor
from fairref.finetune.checkpoints import State
from fairref.finetune.looking import classify, faces_of
from fairref.finetune.recipes import Recipe
from fairref.finetune.rollout import fixed_pictures
from fairref.finetune.setup import Setup

SEED = 2_000_000  # of validation's noise, far from those of finetuning and of evaluation
COLLAPSED = 0.1  # share of CLIP-I's range below which pictures have lost their originals


@dataclass(frozen=True)
class Validation:
    """What the frozen model draws of the validation prompts, and with it what an adapted one is held against."""

    setup: Setup
    originals: list[Tensor]  # (n_here, D) CLIP features of this process's images, for each prompt
    unlike: float  # mean cosine of different originals: the CLIP-I of pictures that have nothing of theirs

    @classmethod
    def start(cls, setup: Setup) -> "Validation":
        """Draws the originals."""
        originals = [_look(setup, setup.bundle, prompt)[1] for prompt in setup.validation]
        total, count = setup.processes.total([sum(f.double().sum(0) for f in originals), _count(originals)])
        pairs = count * (count - 1)  # features are of unit norm, so |sum|^2 is the sum of all pairs' cosines
        return cls(setup, originals, float((total.square().sum() - count) / pairs.clamp(min=1)))

    def measure(self, model: Bundle) -> dict:
        """Mean bias of the prompts, CLIP-I, and the share of CLIP-I's range that is kept."""
        setup = self.setup
        counts, cosines = [], []
        for prompt, original in zip(setup.validation, self.originals):
            of_prompt, features = _look(setup, model, prompt)
            counts.append(of_prompt)
            cosines.append((features * original).sum(1).double())
        counts, cosine, count = setup.processes.total(
            [torch.stack(counts), torch.cat(cosines).sum(), _count(self.originals)]
        )
        counts = counts.cpu().numpy().reshape(len(counts), -1)  # (V, K)
        seen = counts[counts.sum(1) > 0]
        clip_i = float(cosine / count)
        return {
            "bias": float(bias(seen, setup.target.table.reshape(-1)).mean()) if len(seen) else None,
            "clip_i": clip_i,
            "kept": (clip_i - self.unlike) / max(1 - self.unlike, 1e-6),
        }


@torch.no_grad()
def _look(setup, model, prompt):
    """Joint counts of this process's images of a prompt, float64, and their CLIP features (n_here, D)."""
    bundle, recipe = setup.bundle, setup.recipe
    counts = torch.zeros(setup.target.table.shape, dtype=torch.float64)
    images = setup.processes.part(recipe.validate_images)
    if not len(images):
        return counts, torch.zeros(0, bundle.clip.config.projection_dim)
    x = fixed_pictures(model, SEED, prompt, images, recipe.eval_steps, recipe.eval_guidance, recipe.end)
    logits = classify(bundle.classifiers["evaluate"], tuple(setup.target.classes), x, faces_of(bundle, x))
    counts += torch.from_numpy(joint_counts([of_one.argmax(1) for of_one in logits.values()], counts.shape))
    return counts, bundle.clip.encode_image(x).float()


def _count(features):
    return torch.tensor(float(sum(map(len, features))), dtype=torch.float64)


def better(found: dict, best: dict | None) -> bool:
    """Whether a validation found a smaller bias than the best before, without a collapse of CLIP-I."""
    whole = found["bias"] is not None and found["kept"] >= COLLAPSED
    return whole and (best is None or found["bias"] < best["bias"])


def limit(recipe: Recipe, target: np.ndarray) -> float:
    """The bias from a target (K,) at which a run is aligned: until_bias, or what a model that meets it exactly measures
    at so few images."""
    return max(recipe.until_bias, noise_floor(len(target), recipe.validate_images, target=target)[0])


def aligned(recipe: Recipe, state: State) -> bool:
    """Whether the last `patience` validations were at most the limit."""
    return bool(recipe.until_bias) and state.streak >= recipe.patience


def note(setup: Setup, state: State, found: dict) -> bool:
    """Counts a validation in `state` -> whether its adapter is the best so far."""
    fair = better(found, None) and found["bias"] <= limit(setup.recipe, setup.target.table.reshape(-1))
    state.streak = state.streak + 1 if fair else 0
    if not better(found, state.best):
        return False
    state.best = {"iteration": state.iteration, **found}
    return True
