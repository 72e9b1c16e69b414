"""A user's own judge in the place of a bundle's: `--judge ROLE=file.py:loader`, or one of some classifiers.

loader(device, dtype) gives a function of images x (n, 3, H, W) in [-1, 1], which are at least float32. In the place
of a classifier it gives {attribute: logits (n, K)} and has `.classes`, attribute -> class names in the order of the
logits; in that of dino or embedder it gives features (n, D). Where the bundle finds faces, a classifier sees squares
around them of `.input_size` pixels a side (without it: 224), or the whole images of those that have a face if this is
None; else all whole images, as dino does. An embedder sees aligned faces (without `.input_size`: 112 pixels).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fairref.bundle.manifest import Manifest
from fairref.bundle.registry import PARTS, Part
from fairref.errors import UserError, said
from fairref.fairness.faces import ALIGNED, CROP
from fairref.files.own_code import describe, load_function


class OwnSource(Protocol):
    """What made a user's own judge."""

    @property
    def place(self) -> str:
        """As a command line names it."""

    @property
    def short(self) -> str:
        """The same without a folder of this machine."""

    def to_dict(self) -> dict[str, str]:
        """What settings.json keeps of it."""


@dataclass(frozen=True)
class OwnClassifier:
    """judges.ImageClassifier."""

    source: OwnSource
    function: Callable[[Tensor], dict[str, Tensor]]
    classes: dict[str, tuple[str, ...]]
    input_size: int | None

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """x (n, 3, H, W) -> {attribute: logits (n, K)}."""
        return self.function(x)


@dataclass(frozen=True)
class OwnFeatures:
    """judges.Features, and judges.Embedder."""

    source: OwnSource
    function: Callable[[Tensor], Tensor]
    width: int
    side: int

    def __call__(self, x: Tensor) -> Tensor:
        """x (n, 3, H, W) -> (n, D)."""
        return self.function(x)


def parse_judges(texts: Sequence[str]) -> dict[str, list[str]]:
    """--judge's texts "ROLE=PLACE" as role -> places, "file.py:loader" or zero_shot's "clip:...". Raises UserError."""
    known = [part.role for part in PARTS if part.own]
    judges: dict[str, list[str]] = {}
    for text in texts:
        role, equals, place = text.partition("=")
        if not equals or role not in known:
            raise UserError(
                f"--judge is {text!r}; expected ROLE=file.py:loader or ROLE=clip:ATTRIBUTE=TEXT|TEXT, ROLE one of"
                f" {', '.join(known)}."
            )
        judges.setdefault(role, []).append(place)
    check_roles(judges)
    return judges


def check_roles(judges: Mapping[str, Sequence[str]]) -> None:
    """Refuses a role that no own judge can take, and two judges in a place for one. Raises UserError."""
    known = {part.role: part for part in PARTS if part.own}
    for role, places in judges.items():
        if role not in known:
            raise UserError(f"--judge {role}: no such role; expected one of {', '.join(known)}.")
        if len(places) > 1 and not known[role].several:
            raise UserError(f"--judge names {role} twice; leave one out.")
        if len(set(places)) < len(places):
            raise UserError(f"--judge names {role}={max(places, key=places.count)} twice; leave one out.")


def load_own(
    part: Part,
    text: str,
    manifest: Manifest,
    resolution: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> OwnClassifier | OwnFeatures:
    """The judge that "file.py:loader" makes for the part, tried on one black image. Raises UserError.

    `resolution`: pixels of a side of the bundle's images.
    """
    option = f"--judge {part.role}"
    loader = load_function(option, text)
    is_classifier = part.group == "classifiers"
    try:
        judge = loader(torch.device(device), dtype)
        if not callable(judge):
            raise TypeError(f"the loader gives {describe(judge)}, expected a judge")
        side = getattr(judge, "input_size", ALIGNED if part.key == "embedder" else CROP)
        side = None if side is None and is_classifier else int(side)
        sees_whole = part.key == "dino" or (is_classifier and (side is None or "detector" not in manifest))
        seen = resolution if sees_whole else side
        answer = judge(torch.full((1, 3, seen, seen), -1.0, device=device))
    except Exception as error:  # whatever a user's code does
        raise UserError(f"{option}: {text} ends with {said(error)}; correct the file.") from error
    if not is_classifier:
        if not isinstance(answer, Tensor) or answer.dim() != 2 or len(answer) != 1:
            raise UserError(
                f"{option}: {text} gives {describe(answer)} for one image; expected features (1, D)."
            )
        return OwnFeatures(loader, judge, answer.shape[1], side)
    classes = _classes(option, text, judge)
    wanted = {name: (1, len(names)) for name, names in classes.items()}
    logits = answer if isinstance(answer, dict) else {}
    if {name: tuple(getattr(v, "shape", ())) for name, v in logits.items()} != wanted:
        raise UserError(
            f"{option}: {text} gives {describe(answer)} for one image and has the classes {classes}; expected logits"
            " (1, K) of each attribute in .classes."
        )
    for name, names in manifest.get("attributes", {}).items():
        if classes.get(name, tuple(names)) != tuple(names):
            raise UserError(
                f"{option}: {text} has the classes {classes[name]} of {name!r}; expected the bundle's, in their order:"
                f" {', '.join(names)}."
            )
    return OwnClassifier(loader, judge, classes, side)


def _classes(option, text, judge):
    """A classifier's .classes: attribute -> two or more names. Raises UserError."""
    classes = getattr(judge, "classes", None)
    right = isinstance(classes, dict) and all(
        isinstance(names, list | tuple) and len(names) > 1 and all(isinstance(n, str) for n in names)
        for names in classes.values()
    )
    if not right or not classes:
        raise UserError(
            f"{option}: {text} has the classes {classes!r}; expected attribute -> two or more names, as"
            ' {"gender": ("woman", "man")}.'
        )
    return {name: tuple(names) for name, names in classes.items()}
