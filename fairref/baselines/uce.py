"""Unified Concept Editing: new K and V matrices of the U-Net's cross-attention for a list of concepts, in closed form.

Gandikota et al. 2024. Of each concept e, c_e (d,) is the state of its last word, and a_k that of class k. Each matrix W
of K or V becomes the W' that minimises

    sum_e |W' c_e - W (c_e + sum_k alpha_ek a_k)|^2 + lambda |W' - W|^2,

which is W Q with Q = (sum_e (c_e + sum_k alpha_ek a_k) c_e^T + lambda I) (sum_e c_e c_e^T + lambda I)^-1 for
all layers.
alpha starts at 0 and is found in rounds: draw images of each concept, add to alpha_e a share (STEP) of what its shares
lack, D - share, and solve again from the original W; a concept within TOLERANCE stays. The published loop draws 10
images of a concept and asks CLIP. Here it draws IMAGES, and the classifier for finetuning looks at them.

Limits: it edits the concepts of its list, here the neutral prompts of CONCEPTS finetuning occupations. Other prompts
are changed as far as they are like these. Its rounds draw as many images as a short finetuning. c_empty goes through
the same K and V. The published code edits "doctor" towards "male", bare; here both stand in the prompt's template,
because what a bare name is edited to hardly reaches the prompts that are drawn. That template ends with "a person", so
the word of all concepts is "person": c_e is what its state knows of the occupation, and a_k what it knows of the class.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fairref.baselines.case import Case, states
from fairref.bundle.loading import Bundle
from fairref.errors import UserError
from fairref.generation.drawing import fixed_images
from fairref.generation.lora import put_layer, shared_copy
from fairref.generation.views import classify, faces_of, require_attributes
from fairref.progress import Progress
from fairref.prompts import occupation_prompt
from fairref.prompts.sets import evenly

CONCEPTS = 36  # how many it edits; as many as the paper's professions
IMAGES = 60  # of each of them in a round
ROUNDS = 10  # at most; 30 there
TOLERANCE = 0.05  # of a concept's shares
STEP = 0.3  # the published code names .1 and then leaves it out
EDITED = ("attn2.to_k", "attn2.to_v")  # ends of the names of K and V
LAST_WORD = 1  # tokens before EOS


def check(case: Case, prompts: Sequence[str]) -> None:
    """Refuses a bundle without a classifier that a fit could ask. Raises UserError."""
    if "finetune" not in case.bundle.classifiers:
        raise UserError(f"{case.bundle.path}: has no classifier for finetuning, which uce asks; name one.")
    require_attributes(case.bundle, "finetune", case.settings.target)


def fit(case: Case, strength: float, state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Q (d, d), alpha (E, K) and the rounds done, after each round; `state`: what an interrupted fit gave last."""
    concepts = evenly(case.occupations.train, CONCEPTS)
    c = states(case, concepts, LAST_WORD)  # (E, d)
    a = states(case, [occupation_prompt(word) for word in case.words], LAST_WORD)  # (K, d)
    target = torch.tensor(case.attribute.target, dtype=torch.float64)
    if not state:
        eye, alpha = torch.eye(c.shape[1]).to(c), torch.zeros(len(c), len(a)).to(c)
        yield (state := {"Q": eye, "alpha": alpha, "rounds": torch.tensor(0)})
    while (done := int(state["rounds"])) < ROUNDS:
        off = target - shares(case, edited(case.bundle, state["Q"]), concepts, done)  # (E, K)
        off = off.nan_to_num(0)  # no image of a concept shows a face
        off[off.abs().amax(1) < TOLERANCE] = 0
        if not off.any():
            break
        alpha = state["alpha"] + STEP * off
        yield (state := {"Q": solve(c, a, alpha, strength), "alpha": alpha, "rounds": torch.tensor(done + 1)})


def solve(c: Tensor, a: Tensor, alpha: Tensor, strength: float) -> Tensor:
    """Q (d, d) of concepts c (E, d), classes a (K, d), alpha (E, K) and lambda."""
    eye = strength * torch.eye(c.shape[1]).to(c)
    wanted = c + alpha @ a  # (E, d)
    return (wanted.T @ c + eye) @ torch.linalg.inv(c.T @ c + eye)


def edited(bundle: Bundle, Q: Tensor) -> Bundle:
    """The bundle whose cross-attention has W Q for each W of K and V."""
    unet = shared_copy(bundle.unet)
    for name, layer in bundle.unet.named_modules():
        if name.endswith(EDITED):
            new = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            W = layer.weight
            new.weight = nn.Parameter((W.double() @ Q.to(W.device)).to(W.dtype), requires_grad=False)
            put_layer(unet, name, new)
    return replace(bundle, unet=unet.eval())


@torch.no_grad()
def shares(case: Case, model: Bundle, concepts: list[str], done: int) -> Tensor:
    """(E, K) float64: the shares of each concept's classes in new images of it; NaN where none shows a face."""
    bundle, settings, name = case.bundle, case.settings, case.attribute.name
    mine = settings.processes.part(len(concepts))
    found = torch.zeros(len(mine), len(case.attribute.classes), dtype=torch.float64)
    seed = settings.seed + 1 + done  # images that no evaluation sees
    with Progress(len(mine), f"uce, round {done + 1}", settings.processes.first) as progress:
        for row, e in zip(found, mine, strict=True):
            x = fixed_images(model, seed, concepts[e], range(IMAGES), settings.drawing)
            logits = classify(bundle.classifiers["finetune"], (name,), x, faces_of(bundle, x))[name]  # (M, K)
            counts = torch.bincount(logits.argmax(1).cpu(), minlength=len(row))
            row[:] = counts / len(logits) if len(logits) else torch.nan
            progress.step(concepts[e][-40:])
    return settings.processes.gather(found, len(concepts))


def images_of(case: Case, fitted: dict[str, Tensor], prompt: str, images: range) -> Tensor:
    """(n, 3, H, W) by the edited U-Net."""
    model = edited(case.bundle, fitted["Q"])
    return fixed_images(model, case.settings.seed, prompt, images, case.settings.drawing)
