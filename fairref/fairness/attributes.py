"""What is to be made fair: an attribute, its classes, and the distribution a user wants of them."""

from dataclasses import dataclass
from fractions import Fraction

from fairref.errors import UserError

SUM_TOLERANCE = 1e-6  # how far the numbers of a target may sum from 1


@dataclass(frozen=True)
class Attribute:
    """One attribute and its target distribution D. Raises UserError if the two do not fit."""

    name: str  # as the classifier calls it, e.g. "gender"
    classes: tuple[str, ...]  # K >= 2 class names, in the order of the classifier's logits
    target: tuple[float, ...]  # K shares >= 0 with sum 1

    def __post_init__(self):
        name, classes, target = self.name, self.classes, self.target
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise UserError(
                f'Attribute "{name}" has the classes {list(classes)}; give at least two different names.'
            )
        if len(target) != len(classes):
            raise UserError(
                f'The target of "{name}" has {len(target)} numbers but there are {len(classes)} classes'
                f" ({', '.join(classes)}); give one number for each."
            )
        if not all(share >= 0 for share in target):
            raise UserError(f'The target of "{name}" is {_shown(target)}; its numbers must be from 0 to 1.')
        if abs(sum(target) - 1) > SUM_TOLERANCE:
            raise UserError(
                f'The target of "{name}" is {_shown(target)}, which sums to {sum(target):.6g};'
                " the sum must be 1 (fractions such as 1/3 are understood)."
            )


def parse_target(text: str, attributes: dict[str, tuple[str, ...]]) -> Attribute:
    """The target "gender=0.5,0.5" as an Attribute; "gender" alone means equal shares.

    Numbers may be fractions ("1/3"). `attributes` maps the names that the classifier knows to their class
    names. Raises UserError.
    """
    name, equals, numbers = text.partition("=")
    name = name.strip()
    if name not in attributes:
        known = ", ".join(attributes) or "none"
        raise UserError(f'The target "{text}" names the attribute "{name}"; the classifier knows: {known}.')
    classes = tuple(attributes[name])
    if not equals:
        return Attribute(name, classes, (1 / len(classes),) * len(classes))
    try:
        target = tuple(float(Fraction(number.strip())) for number in numbers.split(","))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UserError(
            f'The target "{text}" has "{numbers}" after "="; expected {len(classes)} numbers, separated'
            f" by commas, for {', '.join(classes)}."
        ) from None
    return Attribute(name, classes, target)


def _shown(target):
    return ", ".join(f"{share:g}" for share in target)
