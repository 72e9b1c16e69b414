"""A quantity's formula with one part changed, or two: what an answer that is nearly right may be.

A part may be left out, be that of the next index, have another sign, give its place to another quantity, ...
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations, product

import numpy as np

from fairref.verification.quantities import QUANTITIES, Of, Quantity, Values

RESULT = ""  # the name of what a formula gives, beside its parts'

# What may have happened to an array, in words of {part}. None: not to this one.
Change = Callable[[np.ndarray], np.ndarray | None]


def _ones(x):
    """Left out of a product; a matrix is the identity there."""
    is_square = x.ndim > 2 and x.shape[-1] == x.shape[-2]
    return np.broadcast_to(np.eye(x.shape[-1]), x.shape) if is_square else np.ones_like(x)


def _filled(x, by, fill):
    """Each entry is the one before it (by 1), or after it (-1); what is missing at the end is `fill`."""
    if x.ndim == 0 or len(x) < 2:
        return None
    y = np.roll(x, by, axis=0)
    edge = 0 if by > 0 else -1
    y[edge] = {"wrapped": y[edge], "kept": x[edge], "zero": np.zeros_like(x[0]), "one": _ones(x)[0]}[fill]
    return y


def _without(x, edge, by):
    """The first entry or the last one is left out, of a sum or of a product."""
    if x.ndim == 0:
        return None
    y = x.copy()
    y[edge] = by(x)[edge]
    return y


def _of_all_rows(x):
    return np.broadcast_to(np.sqrt(np.square(x).sum(-1, keepdims=True)), x.shape) if x.ndim else None


def _transposed(x):
    return x.swapaxes(-1, -2) if x.ndim > 1 and x.shape[-1] == x.shape[-2] else None


SLIPS: list[tuple[str, Change]] = [  # what may happen to two parts of one answer
    ("{part} has the wrong sign", np.negative),
    ("{part} is left out", _ones),
    ("{part} is 0", np.zeros_like),
    ("{part} is one too large", lambda x: x + 1),
    ("{part} is one too small", lambda x: x - 1),
    ("{part} has its columns swapped", lambda x: x[..., ::-1] if x.ndim == 2 else None),
    ("{part} is transposed (the order of a product)", _transposed),
    ("{part} is squared (a root is missing)", np.square),
    ("a root of {part} is taken too often", lambda x: x**0.5 if (x >= 0).all() else None),
]
ALONE: list[tuple[str, Change]] = [  # two of these explain too much by accident
    *(
        (f"{{part}} is that of the index {words} (an index shift)", partial(_filled, by=by, fill=fill))
        for (by, words), fill in product(((1, "before"), (-1, "after")), ("one", "wrapped", "kept", "zero"))
    ),
    *(
        (f"the {words} of {{part}} is {fill}", partial(_without, edge=edge, by=by))
        for (words, edge), (fill, by) in product(
            (("last", -1), ("first", 0)), (("left out (0)", np.zeros_like), ("1", _ones))
        )
    ),
    ("{part} is in reverse order", lambda x: x[::-1] if x.ndim else None),
    ("{part} is upside down (one over it)", lambda x: 1 / x if (x != 0).all() else None),
    ("1 less {part} stands for {part}", lambda x: 1 - x),
    ("{part} is summed up along its axis", lambda x: x.cumsum(0) if x.ndim else None),
    ("{part} is in the order of its size", lambda x: np.sort(x, 0) if x.ndim else None),
    ("{part} is that of all rows together (an axis is missing)", _of_all_rows),
]
LENGTH = "length"  # in the names of parts that an axis may be missing in
COUNTS = ("rank", "time", "number")  # parts that are whole numbers: one too large, one too small


@dataclass(frozen=True)
class PartChange:
    """One part that is not as it should be; or the result."""

    part: str
    words: str = ""  # "": a statement that does not hold
    change: Change | None = None  # the row of SLIPS or ALONE with these words
    by: str = ""  # the quantity that stands in its place
    power: int = 0  # 1 or -1: the part has this power of `by` as a factor too many; it is not replaced
    inner: tuple["PartChange", ...] = ()  # what is changed in a part that is a quantity of its own

    def __str__(self) -> str:
        if self.inner:
            return f"in {self.part}, {' and '.join(map(str, self.inner))}"
        part = self.part or "the result"
        if self.power:
            return f"{part} has a factor too many, {'1/' * (self.power < 0)}{self.by}"
        if self.by:
            return f"{self.by} stands for {part}"
        return self.words.format(part=part) if self.words else f"it does not hold that {self.part}"


class Apart:
    """A quantity taken apart on one example; what its parts become is kept, for each change is tried with many."""

    def __init__(self, quantity: Quantity, arguments: Values, is_inner: bool = False) -> None:
        self.formula = quantity.formula
        self.parts = quantity.parts(**arguments)
        self.others = {name: np.asarray(of) for name, of in quantity.others(**arguments).items()}
        self.inner = {
            name: Apart(QUANTITIES[part.name], part.arguments, True)
            for name, part in self.parts.items()
            if isinstance(part, Of)
        }
        self.part = cache(self._part)
        self.rearranged = {} if is_inner else dict(_rearranged(quantity, arguments))

    def value(self, changes: tuple[PartChange, ...] = ()) -> np.ndarray | None:
        """What the formula gives with changed parts; None where a part can't be changed so."""
        values = [self.part(name, tuple(c for c in changes if c.part == name)) for name in self.parts]
        if any(value is None for value in values):
            return None
        return self._changed(np.asarray(self.formula(*values)), [c for c in changes if c.part == RESULT])

    def _part(self, name, changes):
        part = self.parts[name]
        if isinstance(part, bool):
            return part != bool(changes)
        if name in self.inner:
            part = self.inner[name].value(tuple(of for c in changes for of in c.inner))
            changes = [c for c in changes if not c.inner]
        return self._changed(None if part is None else np.asarray(part), changes)

    def _changed(self, value, changes):
        for change in changes:
            if value is None:
                return None
            if change.by:
                wholes = self.others | self.rearranged
                other = wholes[change.by] if change.by in wholes else self.part(change.by, ())
                value = _by(value, other, change.power)
            else:
                value = change.change(value)
        return value

    def named(self) -> Iterator[PartChange]:
        """What may stand in the place of the result, or of a part; a statement that does not hold."""
        yield from (PartChange(RESULT, by=name) for name in [*self.others, *self.rearranged])
        for name, part in self.parts.items():
            if isinstance(part, bool):
                yield PartChange(name)
            else:
                yield from (PartChange(name, by=other) for other in self._known() if other != name)

    def factors(self) -> Iterator[PartChange]:
        """What the result, or a part, may be multiplied by or divided by, too."""
        names = [
            name for name, part in self.parts.items() if not isinstance(part, bool) and not _is_count(name)
        ]
        for name, by, power in product([*names, RESULT], self._known(), (1, -1)):
            if by != name:
                yield PartChange(name, by=by, power=power)

    def _known(self):
        """What may stand for a part: not the answer itself, which says nothing of how it was come by."""
        right = self.value()
        others = [name for name, of in self.others.items() if not _is_same(of, right)]
        return [*others, *(k for k, of in self.parts.items() if isinstance(of, Of) or np.ndim(of))]

    def rows(self, table: list[tuple[str, Change]], of_result: bool = True) -> Iterator[PartChange]:
        """What may happen to the result and to each part."""
        for name in [RESULT] * of_result + [k for k, of in self.parts.items() if not isinstance(of, bool)]:
            x = self.value() if name == RESULT else self.part(name, ())
            is_count = np.ndim(x) == 0 or _is_count(name)
            for words, change in table:
                if ("one too" not in words or is_count) and ("an axis" not in words or LENGTH in name):
                    yield PartChange(name, words, change)


def _is_count(name):
    return any(word in name for word in COUNTS)


def _is_same(a, b):
    return a is not None and b is not None and a.shape == b.shape and np.allclose(a, b, rtol=1e-9, atol=0)


def _by(value, other, power):
    """The other quantity, or the value with its power as a factor more."""
    if other is None or (other.shape != (value.shape[:1] or None) if power else other.shape != value.shape):
        return None
    return value * (other**power).reshape(-1, *[1] * (value.ndim - 1)) if power else other


def _rearranged(quantity, arguments):
    """What the formula gives with two arguments swapped, or with all steps in reverse order (and put back again)."""
    arrays = [key for key in arguments if np.ndim(arguments[key])]
    for a, b in combinations(arrays, 2):
        if arguments[a].shape == arguments[b].shape:
            swapped = {**arguments, a: arguments[b], b: arguments[a]}
            yield f"what comes out if {a} and {b} are swapped", Apart(quantity, swapped, True).value()
    n = max(len(arguments[key]) for key in arrays)

    def flipped(x):
        return x[::-1] if np.ndim(x) and len(x) == n else x

    value = Apart(quantity, {key: flipped(x) for key, x in arguments.items()}, True).value()
    yield "what comes out if the steps are taken from the other end", flipped(value)


def _are_two(a, b):
    """Two changes of two parts, or one inside of a part and one of that part."""
    return a.part != b.part or (bool(a.inner) != bool(b.inner) and not (a.by or b.by))


def candidates(apart: Apart) -> Iterator[tuple[PartChange, ...]]:
    """The single changes to try: first what has a name, two parts that are swapped, then what may happen to a part."""
    named = list(apart.named())
    by = {(change.part, change.by): change for change in named}
    yield from ((change,) for change in named)
    yield from (
        (change, by[change.by, change.part])
        for change in named
        if change.part < change.by and (change.by, change.part) in by
    )
    yield from ((change,) for change in apart.rows([*SLIPS, *ALONE]))
    yield from ((change,) for change in _nested(apart, [*SLIPS, *ALONE]))
    for name, inner in apart.inner.items():
        yield from ((PartChange(name, inner=(of,)),) for of in inner.factors() if of.part != RESULT)
    yield from ((change,) for change in apart.factors())


def pairs(apart: Apart) -> Iterator[tuple[PartChange, ...]]:
    """The pairs of changes to try: one slip made twice, of two parts, with one inside of a part, with both."""
    yield from _twice(apart.rows(SLIPS, of_result=False))
    for name, inner in apart.inner.items():
        of_two = _twice(inner.rows(SLIPS, of_result=False))
        yield from ((PartChange(name, inner=pair),) for pair in of_two)
    own = _that_matter(apart, [*apart.named(), *apart.rows(SLIPS)])
    nested = _that_matter(apart, _nested(apart, SLIPS))
    yield from (pair for pair in combinations(own, 2) if _are_two(*pair))
    yield from _twice(apart.rows(ALONE, of_result=False))
    yield from ((PartChange(RESULT, by=name), PartChange(RESULT, *SLIPS[0])) for name in apart.others)
    yield from (pair for pair in product(nested, own) if _are_two(*pair))
    for a, b in combinations([change for change in nested if not change.inner[0].by], 2):
        if a.part == b.part and a.inner[0].part != b.inner[0].part:
            yield (PartChange(a.part, inner=(*a.inner, *b.inner)),)


def _twice(changes):
    """The same slip in two parts."""
    return (pair for pair in combinations(changes, 2) if pair[0].words == pair[1].words and _are_two(*pair))


def _nested(apart, table):
    """Changes inside of a part; the result of that is the part itself."""
    for name, inner in apart.inner.items():
        changes = (*inner.named(), *inner.rows(table, of_result=False))
        yield from (PartChange(name, inner=(of,)) for of in changes if of.part != RESULT)


def _that_matter(apart, changes):
    """Those that give another value: two of the others are one, or none. A statement may need another change."""
    right = apart.value()
    return [
        change
        for change in changes
        if (value := apart.value((change,))) is not None
        and np.isfinite(value).all()
        and (not _is_same(value, right) or not (change.words or change.by or change.inner))
    ]
