"""A user's own term of the loss: `--loss path/to/file.py:name=0.5`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.errors import UserError, said
from fairref.files.own_code import OwnFunction, describe, load_function


@dataclass(frozen=True)
class OwnLoss:
    """A function of (x, o, prompt, bundle) -> values (n,), or (values, mask), and its weight in the loss."""

    function: OwnFunction
    weight: float

    @property
    def name(self) -> str:
        """Its metric's name: the function's."""
        return self.function.name

    def to_dict(self) -> dict[str, str | float]:
        """What settings.json keeps of it."""
        return {**self.function.to_dict(), "weight": self.weight}

    def __call__(self, x: Tensor, o: Tensor, prompt: str, bundle: Bundle) -> Tensor:
        """Values (n,) of images x with graph and the frozen model's o, 0 outside the mask. Raises UserError."""
        answer = self.function(x, o, prompt, bundle)
        values, mask = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, None)
        if not isinstance(values, Tensor) or values.shape != (len(x),) or not values.is_floating_point():
            raise UserError(
                f"--loss {self.name} gives {describe(values)} for {len(x)} images; expected one number an image,"
                f" a tensor of shape ({len(x)},)."
            )
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if mask is None:
            return values
        if not isinstance(mask, Tensor) or mask.shape != values.shape or mask.dtype != torch.bool:
            raise UserError(
                f"--loss {self.name} gives {describe(mask)} as its mask; expected a boolean tensor of shape"
                f" ({len(x)},)."
            )
        return values.where(mask.to(values.device), 0)

    def check(self, bundle: Bundle, prompt: str) -> None:
        """Tries it on two grey images, so that what is wrong shows before a run. Raises UserError."""
        o = torch.zeros(2, 3, bundle.resolution, bundle.resolution, device=bundle.device)
        x = o.clone().requires_grad_(True)
        try:
            with torch.enable_grad():
                values = self(x, o, prompt, bundle)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # whatever a user's code does
            raise UserError(f"--loss {self.name} ends with {said(error)}; correct the file.") from error
        if not values.requires_grad:
            raise UserError(
                f"--loss {self.name} does not depend on x, so it has no gradient; correct the file."
            )


def parse_losses(texts: Sequence[str], taken: Sequence[str]) -> tuple[OwnLoss, ...]:
    """--loss's texts "file.py:name=weight" (the weight may be left out: 1).

    `taken` names are refused. Raises UserError."""
    losses: list[OwnLoss] = []
    for text in texts:
        has_weight = "=" in text.rpartition(":")[2] and ":" in text
        place, _, weight = text.rpartition("=") if has_weight else (text, "", "1")
        try:
            number = float(weight)
        except ValueError:
            number = float("nan")
        if not 0 <= number < float("inf"):
            raise UserError(f"--loss is {text!r}, whose weight is {weight!r}; expected a number from 0 up.")
        function = load_function("--loss", place)
        if function.name in (*taken, *(loss.name for loss in losses)):
            raise UserError(
                f"--loss names {function.name!r}, which another loss or metric is called; rename the function."
            )
        losses.append(OwnLoss(function, number))
    return tuple(losses)
