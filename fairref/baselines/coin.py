"""Coin: put the word of a class, drawn from the target, into the prompt of each image.

The ceiling of fairness: images miss the target by the scatter of independent draws alone, where prompts are obeyed.
Of needless flips too, because the class that an image would have shown has no say. Limits: it rewrites prompts, so it
must know where the word goes. Here these are the prompts of occupations; a prompt that names a class stays as it is.
"""

from itertools import chain

import torch
from torch import Tensor

from fairref.baselines.case import Case
from fairref.errors import UserError
from fairref.generation.drawing import draw, fixed_noise
from fairref.prompts import PARTS
from fairref.prompts.words import naming


@torch.no_grad()
def images_of(case: Case, fitted: dict[str, Tensor], prompt: str, images: range) -> Tensor:
    """(n, 3, H, W): each image of the prompt with the word of its own class. Raises UserError."""
    bundle, settings = case.bundle, case.settings
    of_class, x = texts(case, prompt), []
    for group, z_T in fixed_noise(bundle, settings.seed, prompt, images):
        wanted = [of_class[toss(case, prompt, image)] for image in group]
        rows = {text: [row for row, w in enumerate(wanted) if w == text] for text in dict.fromkeys(wanted)}
        parts = [draw(bundle, (text, ""), z_T[of_text], settings.drawing) for text, of_text in rows.items()]
        x.append(torch.cat(parts)[torch.tensor([*chain(*rows.values())]).argsort()])
    return torch.cat(x)


def toss(case: Case, prompt: str, image: int) -> int:
    """The class of an image of the prompt, drawn from the target."""
    shares = case.attribute.target
    return int(case.rng(prompt, image).choice(len(shares), p=shares))


def texts(case: Case, prompt: str) -> list[str]:
    """What is drawn for each class of a prompt: K texts. Raises UserError."""
    attribute, occupations = case.attribute, case.occupations
    occupation = occupations.occupations.get(prompt)
    if occupation is not None:
        return case.explicit(occupation)
    asked = {
        text for part in PARTS for text, *_ in occupations.explicit(part, {attribute.name: attribute.classes})
    }
    if prompt in asked or naming(prompt, attribute.name):
        return [prompt] * len(attribute.classes)
    raise UserError(
        f"--baseline coin: {prompt!r} is no prompt of an occupation, so where the word goes is not known; leave it out."
    )
