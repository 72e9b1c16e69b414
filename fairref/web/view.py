"""What somebody asks to see: one set of settings, which a link holds and a request must keep within limits."""

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from urllib.parse import urlencode

from fairref.errors import UserError
from fairref.generation.adapters import STRONGEST

MAX_SEED = 2**32 - 1
MAX_GUIDANCE = 30.0


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait."""

    images: int = 8  # by each model
    steps: int = 100
    letters: int = 1000  # of a prompt
    seconds: float = 300.0  # of drawing
    waiting: int = 32  # requests in the queue, over all visitors
    body: int = 64 * 2**10  # bytes of a request


@dataclass(frozen=True)
class View:
    """Everything that images follow from, beside the model."""

    prompt: str
    negative: str = ""
    seed: int = 0
    n: int = 4  # images by each model
    guidance: float = 7.5
    steps: int = 25
    adapter: str = ""  # its name on this server
    strength: float = 1.0

    def query(self) -> str:
        """The link's part behind the question mark."""
        return urlencode(asdict(self))


def read_view(values: Mapping[str, object], default: View, limits: Limits) -> View:
    """The view that a request or a link asks for; what it leaves out is the default's. Raises UserError."""
    given = {f.name: _read(f, values[f.name]) for f in fields(View) if values.get(f.name) not in (None, "")}
    texts = {
        name: " ".join(str(values[name] or "").split()) for name in ("prompt", "negative") if name in values
    }
    view = View(**{**asdict(default), **given, **texts})
    if not view.prompt:
        raise UserError("There is no prompt; write what to draw.")
    for name, text in (("prompt", view.prompt), ("negative prompt", view.negative)):
        if len(text) > limits.letters:
            raise UserError(f"The {name} has {len(text)} letters; expected at most {limits.letters}.")
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
            raise UserError(f"The {name} has control characters; write it without them.")
    _check("seed", view.seed, 0, MAX_SEED)
    _check("number of images", view.n, 1, limits.images)
    _check("guidance scale", view.guidance, 0, MAX_GUIDANCE)
    _check("number of steps", view.steps, 1, limits.steps)
    _check("strength", view.strength, 0, STRONGEST)
    return view


def _read(field, value):
    """A value as its field's type has it. Raises UserError."""
    if field.type is str:
        if not isinstance(value, str):
            raise UserError(f"{field.name} is {str(value)[:40]!r}; expected text.")
        return value
    try:
        if isinstance(value, bool) or "_" in str(value):  # for Python 1 and 10, for nobody else
            raise ValueError(value)
        number = float(value)
        if field.type is int and number != int(number):
            raise ValueError(number)
    except (TypeError, ValueError, OverflowError):
        kind = "a whole number" if field.type is int else "a number"
        raise UserError(f"{field.name} is {str(value)[:40]!r}; expected {kind}.") from None
    return int(number) if field.type is int else number


def _check(what, value, low, high):
    if not (math.isfinite(value) and low <= value <= high):
        expected = f"{low:.10g} to {high:.10g}" if low < high else f"{low:.10g}"
        raise UserError(f"The {what} is {value:.10g}; expected {expected}.")
