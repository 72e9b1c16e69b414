"""What is to be made fair: attributes, their classes, and the distribution a user wants of them."""

import sys
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from itertools import product
from math import prod
from pathlib import Path

import numpy as np

from fairref.errors import UserError
from fairref.files.paths import read_json

SUM_TOLERANCE = 1e-6  # how far the numbers of a target may sum from 1
ROUNDING = 1e-12  # of such a sum in float64: scipy's tests and numpy's draws want no more
APPARENT = ("gender", "race", "age")  # of people, not of pictures


def apparent(names: str) -> str:
    """An attribute, or several with commas, as a judge of pictures sees it: apparent gender."""
    return ",".join(f"apparent {name}" if name in APPARENT else name for name in names.split(","))


@dataclass(frozen=True)
class Attribute:
    """One attribute and its target distribution D. Raises UserError if the two do not fit."""

    name: str  # as the classifier calls it, e.g. "gender"
    classes: tuple[str, ...]  # K >= 2 class names, in the order of the classifier's logits
    target: tuple[float, ...]  # K shares >= 0 with sum 1, to rounding

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
                f'The target of "{name}" is {_shown(target)}, which sums to {sum(target):.9g};'
                " the sum must be 1 (fractions such as 1/3 are understood)."
            )
        if abs(sum(target) - 1) > ROUNDING:  # .3333333 is a third
            object.__setattr__(self, "target", tuple(share / sum(target) for share in target))


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


def parse_attributes(text: str, attributes: dict[str, tuple[str, ...]]) -> list[Attribute]:
    """What --attr says: "gender", "gender,race", each with equal shares, or one with its own, "gender=0.3,0.7"."""
    names = [text] if "=" in text else text.split(",")
    return [parse_target(name, attributes) for name in names]


@dataclass(frozen=True)
class JointTarget:
    """Several attributes and a target for every combination of their classes. Raises UserError."""

    classes: dict[str, tuple[str, ...]]  # A attributes and their K_a class names, in the order of the axes
    table: np.ndarray  # (K_1, ..., K_A) float64, shares >= 0 with sum 1

    def __post_init__(self):
        shape = tuple(map(len, self.classes.values()))
        if not shape or self.table.shape != shape:
            raise UserError(f"The joint target has the shape {self.table.shape}; expected {shape}.")
        flat = Attribute("joint target", tuple(map(str, range(prod(shape)))), tuple(self.table.reshape(-1)))
        object.__setattr__(self, "table", np.reshape(flat.target, shape))

    def marginal(self, name: str) -> Attribute:
        """The target of one attribute, whatever the others are."""
        axis = list(self.classes).index(name)
        others = tuple(a for a in range(self.table.ndim) if a != axis)
        return Attribute(name, self.classes[name], tuple(self.table.sum(others).tolist()))

    def ordered(self, names: list[str]) -> "JointTarget":
        """The same target with its attributes in this order."""
        axes = [list(self.classes).index(name) for name in names]
        return JointTarget({name: self.classes[name] for name in names}, self.table.transpose(axes))

    def given(self, name: str, k: int) -> "JointTarget":
        """The target where one attribute must be its class k, and the others are as they are in that class."""
        axis = list(self.classes).index(name)
        others = self.table.take(k, axis)
        # nobody is to be of class k: as in all classes
        others = others if others.any() else self.table.sum(axis)
        table = np.zeros_like(self.table)
        np.moveaxis(table, axis, 0)[k] = others / others.sum()
        return JointTarget(self.classes, table)

    def drawn(self, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Joint classes of n images, drawn from the table: of each attribute (n, K_a), 1 for the class, else 0."""
        joint = rng.multinomial(1, self.table.reshape(-1), n)
        joint, axes = joint.reshape(n, *self.table.shape), range(1, 1 + self.table.ndim)
        return {
            name: joint.sum(tuple(b for b in axes if b != a))
            for a, name in zip(axes, self.classes, strict=True)
        }

    def and_in_every_group(self, attribute: Attribute) -> "JointTarget":
        """One attribute more, with the same target within every group: D(g) D(a | g), D(a | g) = D(a).

        docs/method.md's conditional target, as age 75/25 in every gender x race group; for independent attributes
        it is the product.
        """
        if attribute.name in self.classes:
            raise UserError(f'The target names the attribute "{attribute.name}" twice.')
        table = self.table[..., None] * np.array(attribute.target)
        return JointTarget({**self.classes, attribute.name: attribute.classes}, table)


def product_target(attributes: list[Attribute]) -> JointTarget:
    """Independent attributes: the joint target is the product of theirs."""
    first, *others = attributes
    alone = JointTarget({first.name: first.classes}, np.array(first.target, dtype=np.float64))
    return reduce(JointTarget.and_in_every_group, others, alone)


def parse_targets(texts: list[str], attributes: dict[str, tuple[str, ...]]) -> JointTarget:
    """What a user asks for: one or more of `parse_target`'s texts, or the path of a joint table (.json).

    Texts make independent targets. A table has the names of its attributes and, nested in that order, the
    shares by class name; a class that is left out has none:

        {"attributes": ["gender", "age"],
         "shares": {"woman": {"young": 0.375, "old": 0.125}, "man": {"young": 0.375, "old": 0.125}}}

    Raises UserError.
    """
    if any(text.endswith(".json") for text in texts):
        if len(texts) > 1:
            raise UserError(
                f"The targets {', '.join(texts)} are a file and more; a joint table stands alone."
            )
        return read_joint_target(Path(texts[0]), attributes)
    return product_target([parse_target(text, attributes) for text in texts])


def wanted_target(
    attr: str | None, targets: list[str] | None, attributes: dict[str, tuple[str, ...]], where: str
) -> JointTarget:
    """What --attr and --target ask of a bundle, `where`, together: --attr says which, in which order, and --target
    the shares; an attribute without shares gets equal ones, in every group of the others. Raises UserError."""
    if not attributes and (attr or targets):
        raise UserError(
            f"{where}: has no judge, so no attribute can be told; name classifiers in its bundle.json, as"
            " docs/sd15.md says."
        )
    if not attr and not targets:
        known = ", ".join(attributes) or "none"
        raise UserError(f"--attr is missing: it says what to make fair; {where} knows: {known}.")
    wanted = parse_attributes(attr, attributes) if attr else []
    if not targets:
        return product_target(wanted)
    target, names = parse_targets(targets, attributes), [attribute.name for attribute in wanted]
    if wanted and "=" in attr:
        raise UserError(f"--attr {attr} and --target both give shares; leave one out.")
    strangers = [name for name in target.classes if name not in names]
    if wanted and strangers:
        raise UserError(f"--attr is {attr} and --target is for {strangers[0]}; name it in --attr, too.")
    for attribute in wanted:
        if attribute.name not in target.classes:
            target = target.and_in_every_group(attribute)
    return target.ordered(names) if wanted else target


def read_joint_target(path: Path, attributes: dict[str, tuple[str, ...]]) -> JointTarget:
    """The joint table of a JSON file, as in `parse_targets`. Raises UserError."""
    content = read_json(path)
    if set(content) != {"attributes", "shares"}:
        raise UserError(f'{path}: expected an object with the keys "attributes" and "shares".')
    names = content["attributes"]
    known_names = isinstance(names, list) and all(isinstance(n, str) and n in attributes for n in names)
    if not known_names or not names:
        known = ", ".join(attributes) or "none"
        raise UserError(f'{path}: "attributes" is {names!r}; expected some of: {known}.')
    if len(set(names)) < len(names):
        raise UserError(f'{path}: "attributes" is {names!r}, which names one twice.')
    classes = {name: tuple(attributes[name]) for name in names}
    table = np.zeros(tuple(map(len, classes.values())))
    for joint in product(*map(range, table.shape)):
        table[joint] = _share(content["shares"], joint, classes, path)
    try:
        return JointTarget(classes, table)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _share(shares, joint, classes, path):
    """The share of one joint class (indices), from nested objects by class name."""
    for k, (name, known) in zip(joint, classes.items(), strict=True):
        if not isinstance(shares, dict) or not set(shares) <= set(known):
            found = ", ".join(map(str, shares)) if isinstance(shares, dict) else repr(shares)
            raise UserError(f'{path}: found {found} for "{name}"; expected shares of {", ".join(known)}.')
        if known[k] not in shares:
            return 0.0
        shares = shares[known[k]]
    if isinstance(shares, bool) or not isinstance(shares, (int, float)) or abs(shares) > sys.float_info.max:
        raise UserError(f"{path}: found {shares!r} as a share; expected a number.")
    return float(shares)


def _shown(target):
    return ", ".join(f"{share:g}" for share in target)
