"""The adapters of a run compared with one another: fixed noise, which finetuning does not see, and fixed prompts, which
it does not see where a concept has some for validation.

V prompts, n images of each, K joint classes, D width of CLIP's features.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.evaluation.judging import EvaluationSettings, drawn_by, judge_prompts
from fairref.fairness.metrics import bias, joint_counts, noise_floor
from fairref.generation.drawing import Drawing, fixed_images
from fairref.generation.views import classify, faces_of
from fairref.settings import Recipe
from fairref.training.checkpoints import State
from fairref.training.setup import Setup, Task
from fairref.training.terms import ImagePair, View, loss_of, sums_of

SEED = 2_000_000  # of validation's noise, far from those of finetuning and of evaluation
COLLAPSED = 0.1  # share of CLIP-I's range below which images have lost their originals
Measured = dict[str, float | None]


class Validation(Protocol):
    """What adapters are compared by."""

    def measure(self, model: Bundle) -> Measured:
        """The numbers of an adapted bundle; the one called `goal` of the setup decides."""


def start_validation(setup: Setup, kept: Path | None = None) -> Validation:
    """Draws the originals: of a run for a target to compare biases, else to compare losses.

    `kept`: folder of judgements, in which a run that goes on finds those of its originals.
    """
    return LossValidation.start(setup) if setup.target is None else BiasValidation.start(setup, kept)


def goal(setup: Setup) -> str:
    """Which number of a validation is to be small."""
    return "loss" if setup.target is None else "bias"


@dataclass(frozen=True)
class BiasValidation:
    """What the frozen model draws of the validation prompts, and what an adapted one is compared with."""

    setup: Setup
    originals: list[Tensor]  # (n_here, D) CLIP features of this process's images, for each prompt, on the CPU
    unlike: float  # mean cosine of different originals: the CLIP-I of images that have nothing of theirs

    @classmethod
    def start(cls, setup: Setup, kept: Path | None = None) -> "BiasValidation":
        """Draws the originals, or takes what is kept of them."""
        recipe, processes = setup.recipe, setup.processes
        settings = EvaluationSettings(setup.bundle, setup.target, drawing_of(recipe), SEED, processes, kept)
        source = drawn_by(settings, setup.bundle, "originals of validations")
        judged = judge_prompts(settings, source, setup.validation, recipe.validate_images)
        features = [of_prompt.features["clip"] for of_prompt in judged]  # (n, D), of all processes
        count = sum(map(len, features))
        pairs = max(count * (count - 1), 1)
        # features are of unit norm, so |sum|^2 is the sum of all pairs' cosines
        unlike = (torch.cat(features).double().sum(0).square().sum() - count) / pairs
        mine = processes.part(recipe.validate_images)
        return cls(setup, [rows[mine.start : mine.stop] for rows in features], float(unlike))

    def measure(self, model: Bundle) -> Measured:
        """Mean bias of the prompts, CLIP-I, and the share of CLIP-I's range that is kept."""
        setup = self.setup
        counts, cosines = [], []
        for prompt, original in zip(setup.validation, self.originals, strict=True):
            of_prompt, features = _judged(setup, model, prompt)
            counts.append(of_prompt)
            cosines.append((features.cpu() * original).sum(1).double())
        counts, cosine, count = setup.processes.total(
            [torch.stack(counts), torch.cat(cosines).sum(), _count(self.originals)]
        )
        counts = counts.cpu().numpy().reshape(len(counts), -1)  # (V, K)
        judged = counts[counts.sum(1) > 0]
        clip_i = float(cosine / count)
        return {
            "bias": float(bias(judged, setup.target.table.reshape(-1)).mean()) if len(judged) else None,
            "clip_i": clip_i,
            "kept": (clip_i - self.unlike) / max(1 - self.unlike, 1e-6),
        }


@torch.no_grad()
def _judged(setup, model, prompt):
    """Joint counts of this process's images of a prompt, float64, and their CLIP features (n_here, D)."""
    bundle = setup.bundle
    counts = torch.zeros(setup.target.table.shape, dtype=torch.float64)
    images = setup.processes.part(setup.recipe.validate_images)
    if not len(images):
        return counts, torch.zeros(0, bundle.clip.config.projection_dim)
    x = fixed_images(model, SEED, prompt, images, drawing_of(setup.recipe))
    logits = classify(bundle.classifiers["evaluate"], tuple(setup.target.classes), x, faces_of(bundle, x))
    classes = [of_attribute.argmax(1) for of_attribute in logits.values()]
    counts += torch.from_numpy(joint_counts(classes, counts.shape))
    return counts, bundle.clip.encode_image(x).float()


def _count(features):
    return torch.tensor(float(sum(map(len, features))), dtype=torch.float64)


def drawing_of(recipe: Recipe) -> Drawing:
    """How validations and evaluations draw."""
    return Drawing(recipe.eval_steps, recipe.eval_guidance, recipe.end)


@dataclass(frozen=True)
class LossValidation:
    """The frozen model's images of the validation prompts, for a run without a target."""

    setup: Setup
    originals: list[Tensor]  # (n_here, 3, H, W) of this process, for each prompt, on the CPU

    @classmethod
    def start(cls, setup: Setup) -> "LossValidation":
        """Draws the originals."""
        images = setup.processes.part(setup.recipe.validate_images)
        how = drawing_of(setup.recipe)
        drawn = [_drawn(setup.bundle, prompt, images, how) for prompt in setup.validation]
        return cls(setup, [o.cpu() for o in drawn])

    def measure(self, model: Bundle) -> Measured:
        """The mean of each term over all images, and of their weighted sum, "loss"."""
        setup, recipe = self.setup, self.setup.recipe
        images = setup.processes.part(recipe.validate_images)
        sums = torch.zeros(len(sums_of(setup)), dtype=torch.float64)
        for prompt, o in zip(setup.validation, self.originals, strict=True):
            x = _drawn(model, prompt, images, drawing_of(recipe))
            sums += term_sums(setup, prompt, x, o.to(x))
        (sums,) = setup.processes.total([sums])
        return dict(
            zip(
                sums_of(setup),
                (sums / (recipe.validate_images * len(setup.validation))).tolist(),
                strict=True,
            )
        )


def _drawn(model, prompt, images, how):
    if not len(images):
        return torch.zeros(0, 3, model.resolution, model.resolution, device=model.device)
    return fixed_images(model, SEED, prompt, images, how)


@torch.no_grad()
def term_sums(setup: Setup, prompt: str, x: Tensor, o: Tensor) -> Tensor:
    """The terms of a run without a target, and their weighted sum, added up over images x beside their originals o."""
    if not len(x):
        return torch.zeros(len(sums_of(setup)), dtype=torch.float64)
    task = Task(prompt, None, False, setup.recipe.eval_steps, setup.recipe.eval_guidance)
    pair, sums = ImagePair(x, x, o), torch.zeros(len(sums_of(setup)), dtype=torch.float64)
    for rows in torch.arange(len(x)).split(setup.recipe.micro_batch or len(x)):
        sums += loss_of(View(setup, task, x[rows], pair[rows], {}))[1].cpu()
    return sums * setup.recipe.batch  # which a term's values are divided by


def better(measured: Measured, best: Measured | None, of: str = "bias") -> bool:
    """Whether a validation's number `of` is less than the best before, without a collapse of CLIP-I."""
    kept = measured["kept"] if of == "bias" else 1.0
    whole = measured[of] is not None and np.isfinite(measured[of]) and kept >= COLLAPSED
    return bool(whole and (best is None or measured[of] < best[of]))


def limit(recipe: Recipe, target: np.ndarray) -> float:
    """The bias from a target (K,) at which a run has reached it: until_bias, or what a model that meets it exactly
    measures at so few images."""
    return max(recipe.until_bias, noise_floor(len(target), recipe.validate_images, target=target)[0])


def target_reached(recipe: Recipe, state: State) -> bool:
    """Whether the last `patience` validations were at most the limit."""
    return bool(recipe.until_bias) and state.streak >= recipe.patience


def record_best(setup: Setup, state: State, measured: Measured) -> bool:
    """Counts a validation in `state` -> whether its adapter is the best so far."""
    if setup.target is not None:
        fair = better(measured, None) and measured["bias"] <= limit(
            setup.recipe, setup.target.table.reshape(-1)
        )
        state.streak = state.streak + 1 if fair else 0
    if not better(measured, state.best, goal(setup)):
        return False
    state.best = {"iteration": state.iteration, **measured}
    return True
