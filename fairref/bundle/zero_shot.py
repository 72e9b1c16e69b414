"""CLIP as a classifier that nobody trained: `--judge evaluate=clip:glasses=a person with glasses|a person without`.

One text for each class. A class's logit is exp(logit_scale) of the bundle's own CLIP, a number in its checkpoint, times
the cosine of the image and the text. It sees whole images, as CLIP did when it was trained, also where others see faces
alone; an image without a face is left out there all the same. A class is called what stands before the text's first
colon. Without a colon it is called as the bundle calls it, if the text has this name in it, and else by its whole text.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from fairref.bundle.manifest import Manifest
from fairref.bundle.own_judges import OwnClassifier
from fairref.bundle.registry import Part
from fairref.errors import UserError
from fairref.files.tokenizer import Tokenizer
from fairref.nets.clip import Clip

PREFIX = "clip:"
FORM = "clip:ATTRIBUTE=TEXT|TEXT, with a text for each of two or more classes"


@dataclass(frozen=True)
class ClipTexts:
    """The words that a zero-shot classifier was made from."""

    text: str  # "glasses=a person with glasses|a person without"

    @property
    def place(self) -> str:
        """As a command line names it."""
        return PREFIX + self.text

    @property
    def short(self) -> str:
        """The same: it names no folder."""
        return self.place

    def to_dict(self) -> dict[str, str]:
        """What settings.json keeps of it."""
        return {"clip": self.text}


@dataclass(frozen=True)
class ZeroShot:
    """Images x (n, 3, H, W) in [-1, 1] -> {attribute: logits (n, K)}, differentiable, in at least float32."""

    attribute: str
    clip: Clip
    texts: Tensor  # (K, D) of unit norm

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        cosines = self.clip.encode_image(x).to(self.texts) @ self.texts.T  # (n, K)
        return {self.attribute: self.clip.logit_scale.to(cosines).exp() * cosines}


def load_zero_shot(
    part: Part, text: str, manifest: Manifest, clip: tuple[Clip, Tokenizer] | None
) -> OwnClassifier:
    """The classifier of "clip:ATTRIBUTE=TEXT|TEXT" by the bundle's CLIP, None if it has none. Raises UserError."""
    option = f"--judge {part.role}"
    if part.group != "classifiers":
        raise UserError(f"{option}: {text} is a classifier; give it to finetune or evaluate.")
    if clip is None:
        raise UserError(f"{option}: {text} needs CLIP, which the bundle lacks; name clip in its bundle.json.")
    network, tokenizer = clip
    attribute, texts, names = _parsed(option, text, manifest)
    ids = tokenizer(texts)
    for k, (words, end) in enumerate(zip(texts, tokenizer.cut(texts), strict=True)):
        if end:
            raise UserError(
                f"{option}: the text {words!r} is longer than the {tokenizer.length} tokens that CLIP takes, so {end!r}"
                " would be lost; shorten it."
            )
        if (ids[:k] == ids[k]).all(1).any():
            raise UserError(
                f"{option}: {words!r} is to CLIP the same as a text before it; give another text."
            )
    device = network.logit_scale.device
    with torch.no_grad():
        features = network.encode_text(ids.to(device))
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return OwnClassifier(
        ClipTexts(text.removeprefix(PREFIX)),
        ZeroShot(attribute, network, features),
        {attribute: names},
        input_size=None,  # whole images
    )


def _parsed(option, text, manifest):
    """The attribute, its texts, and its classes' names. Raises UserError."""
    attribute, _, rest = (piece.strip() for piece in text.removeprefix(PREFIX).partition("="))
    rows = [row.strip() for row in rest.split("|")]
    known = manifest.get("attributes", {}).get(attribute, ())
    texts, names = [], []
    for k, row in enumerate(rows):
        name, colon, words = (piece.strip() for piece in row.partition(":"))
        of_bundle = known[k] if k < len(known) else ""
        is_named = of_bundle and re.search(rf"(?<![\w-]){re.escape(of_bundle)}(?![\w-])", row)
        texts.append(words if colon else row)
        names.append(name if colon else of_bundle if is_named else row)
    if not attribute or "," in attribute or len(rows) < 2 or not all((*texts, *names)):
        raise UserError(f"{option} is {text!r}; expected {FORM}.")
    if known and names != list(known):
        raise UserError(
            f"{option}: {text} has the classes {', '.join(names)}; expected the bundle's of {attribute!r}, in their"
            f" order: {', '.join(known)}; write {'|'.join(f'{name}:TEXT' for name in known)}."
        )
    if len(set(names)) < len(names):
        raise UserError(f"{option}: {text} calls two classes the same; write another name before a colon.")
    return attribute, texts, tuple(names)
