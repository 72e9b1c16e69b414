"""Images of a prompt, by a bundle with or without an adapter."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.bundle.recipe import resolve
from fairref.errors import UserError, typed
from fairref.files.images import to_image
from fairref.files.weights import finite
from fairref.generation.adapters import load_adapters
from fairref.generation.drawing import Drawing, draw, group_size
from fairref.generation.rollout import first_noise
from fairref.generation.strengths import choose_adapters
from fairref.progress import Progress
from fairref.prompts.sets import warn_of_cut


@dataclass(frozen=True)
class SampleSettings:
    """What is drawn; None: what the bundle's recipe says."""

    prompt: str
    n: int = 8
    seed: int = 0  # of the noise; image i of a seed is the same whatever n is
    steps: int | None = None  # S
    guidance: float | None = None  # s
    negative_prompt: str = ""  # takes the place of the empty prompt
    padding: str = "full"  # one of PADDINGS


def drawing_of(bundle: Bundle, settings: SampleSettings) -> Drawing:
    """How the settings draw with this bundle. Raises UserError."""
    recipe = resolve((), bundle.recipe, {}, bundle.path, bundle.attributes)
    steps = recipe.eval_steps if settings.steps is None else settings.steps
    guidance = recipe.eval_guidance if settings.guidance is None else settings.guidance
    if not math.isfinite(guidance):
        raise UserError(f"--guidance is {guidance}; expected a number.")
    return Drawing(steps, guidance, recipe.end, settings.padding)


@torch.no_grad()
def sample_tensor(bundle: Bundle, settings: SampleSettings) -> Tensor:
    """(n, 3, H, W) in [-1, 1], by a bundle that may be adapted. Raises UserError."""
    drawing = drawing_of(bundle, settings)
    texts = (settings.prompt, settings.negative_prompt)
    for text, soft in zip(texts, (bundle.soft_tokens, 0), strict=True):
        warn_of_cut(bundle.tokenizer, [text], soft)
    if settings.n < 1:
        raise UserError(f"The number of images is {settings.n}; expected 1 or more.")
    groups, images = torch.arange(settings.n).split(group_size(bundle)), []
    with Progress(drawing.steps * len(groups), "drawing") as progress:
        for group in groups:
            z_T = first_noise(bundle, settings.seed, 0, group.tolist())
            x = draw(bundle, texts, z_T, drawing, progress.step)
            if not finite(x):
                raise UserError(
                    f"--guidance {drawing.guidance} and --dtype {bundle.dtype} draw what is no number; take a lower"
                    " guidance or float32."
                )
            images.append(x)
    return torch.cat(images)


@typed
def sample(
    bundle: Bundle,
    prompt: str,
    n: int = 8,
    seed: int = 0,
    adapter: str | Path | Sequence[str | Path] | None = None,
    *,
    strength: float | Sequence[float] | None = None,
    any_base: bool = False,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str = "",
    padding: str = "full",
) -> list[Image.Image]:
    """n images of a prompt, without an adapter, with one (a run's folder or a file) or with several.

    `strength`: of each adapter, or one of all LoRAs (None: 1); `any_base`: as in `load_adapter`. Raises UserError.
    """
    model = load_adapters(bundle, choose_adapters(adapter, strength), any_base)
    settings = SampleSettings(prompt, n, seed, steps, guidance, negative_prompt, padding)
    return [to_image(x) for x in sample_tensor(model, settings)]
