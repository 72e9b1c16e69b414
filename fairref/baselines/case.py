"""What a baseline draws for: one attribute and its target, the occupations it may be fitted on, and evaluation's noise.

K classes, X occupations, n images, T tokens, d width.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.errors import UserError
from fairref.evaluation.judging import EvaluationSettings
from fairref.fairness.attributes import Attribute
from fairref.generation.drawing import draw_embedded, fixed_noise
from fairref.generation.padding import embed_padded
from fairref.nets.clip import end_positions
from fairref.prompts import TEMPLATE
from fairref.prompts.sets import OCCUPATIONS, PLACE, Prompts, evenly, read_prompts

TEXTS = 64  # that are encoded at once
Edit = Callable[[Tensor, list[int]], Tensor]  # c (1, T, d), images -> (1, T, d), or (n, T, d), one an image


@dataclass(frozen=True)
class Case:
    """What stays the same while a baseline is fitted and draws. Raises UserError."""

    settings: EvaluationSettings  # the original bundle, the target, how images are drawn

    def __post_init__(self):
        names = list(self.settings.target.classes)
        if len(names) > 1:
            raise UserError(
                f"--baseline makes one attribute fair, but --attr names {', '.join(names)}; give one."
            )

    @property
    def bundle(self) -> Bundle:
        """The original, which no baseline changes."""
        return self.settings.bundle

    @property
    def attribute(self) -> Attribute:
        """The attribute, its K classes and their shares D."""
        (name,) = self.settings.target.classes
        return self.settings.target.marginal(name)

    @cached_property
    def occupations(self) -> Prompts:
        """The bundle's own, or those for any model. Whatever is fitted sees their part train alone."""
        return read_prompts(OCCUPATIONS, None, self.bundle.path, [self.attribute.name])[0]

    def explicit(self, occupation: str) -> list[str]:
        """K prompts of an occupation, each of which names a class."""
        name, classes = self.attribute.name, self.attribute.classes
        return [self.occupations.world.explicit_prompt(name, k, occupation) for k in classes]

    @property
    def words(self) -> list[str]:
        """K texts: what explicit prompts name each class with, as "woman" or "dark-skinned"."""
        before, after = TEMPLATE.split(PLACE)
        return [text.removeprefix(before).removesuffix(after).strip() for text in self.explicit("")]

    def rng(self, prompt: str, image: int) -> np.random.Generator:
        """What an image draws besides its noise; from (seed, prompt, image), as the noise."""
        return np.random.default_rng((self.settings.seed, zlib.crc32(prompt.encode()), image))


@torch.no_grad()
def states(case: Case, texts: Sequence[str], back: int = 0) -> Tensor:
    """(n, d) float64: the text encoder's state at each text's EOS, or so many tokens before it."""
    encoder, tokenizer, found = case.bundle.text_encoder, case.bundle.tokenizer, []
    for ids in tokenizer(list(texts)).split(TEXTS):
        ends = end_positions(ids, tokenizer.eos) - back
        h = encoder(ids.to(case.bundle.device))  # (TEXTS, T, d)
        found.append(h[torch.arange(len(ids)), ends].cpu().double())
    return torch.cat(found)


def class_states(case: Case, most: int) -> Tensor:
    """(K, X, d) float64: the EOS states of the explicit prompts of at most so many finetuning occupations."""
    known = [case.occupations.short(prompt) for prompt in evenly(case.occupations.train, most)]
    prompts = [case.explicit(occupation) for occupation in known]
    return torch.stack([states(case, of_class) for of_class in zip(*prompts, strict=True)])


@torch.no_grad()
def draw_edited(case: Case, prompt: str, images: range, edit: Edit) -> Tensor:
    """(n, 3, H, W) of a prompt with an edited c; c_empty stays as it is."""
    bundle, drawing = case.bundle, case.settings.drawing
    c, c_empty = embed_padded(bundle, prompt, "", drawing.padding).split(1)
    groups = fixed_noise(bundle, case.settings.seed, prompt, images)
    return torch.cat([draw_embedded(bundle, edit(c, group), c_empty, z_T, drawing) for group, z_T in groups])


def apply(matrix: Tensor, c: Tensor) -> Tensor:
    """matrix (d, d) times every state of c (n, T, d), in the dtype of c."""
    return c @ matrix.T.to(c)
