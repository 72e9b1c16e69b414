"""SVG as text: elements, text that fits its place, axes with round ticks.

Lengths are in pixels, y grows downwards. Colours stand as attributes, so that every viewer shows a file on white; a
page adds STYLE, whose rules for a dark screen win over attributes.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

# name -> on white, on a dark page; colour-blind readers can tell those of series apart
COLOURS = {
    "paper": ("#ffffff", "transparent"),
    "ink": ("#1f2328", "#e8eaed"),
    "muted": ("#59636e", "#a6adb5"),
    "grid": ("#d9dde2", "#454b52"),
    "c0": ("#cc6a54", "#e0753f"),
    "c1": ("#3355dd", "#5a88ff"),
    "c2": ("#1f5a1c", "#c4f7a4"),
    "c3": ("#9a8b14", "#ffe14a"),
    "c4": ("#6f3a9c", "#a583bb"),
    "c5": ("#0d9fb2", "#78f2ec"),
}
SERIES = 6  # colours of series; further ones repeat them with another dash
DASHES = ("none", "6 3", "2 3", "8 3 2 3")
STYLE = (
    ".chart{max-width:100%;height:auto}.chart .paper{color:transparent}@media screen and (prefers-color-scheme:dark){"
    + "".join(f".chart .{name}{{color:{dark}}}" for name, (_, dark) in COLOURS.items())
    + "}"
)
SIZE = 12  # of text
EXTREME = 1e100  # the largest number of an axis
LINE = 1.35  # height of a line, in sizes
FONT = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', Arial, sans-serif"
# no XML file may hold these
FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# widths of characters, in sizes, of a wide font
NARROW, THIN, WIDE = frozenset("ijl.,:;'|!I"), frozenset("frt()[]{}-/ "), frozenset("mwMW@%…—–")
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def coordinate(value: float) -> str:
    """Return a coordinate with at most two decimals, always in the same way."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def bare(number: str) -> str:
    """Return a number's text without the 0 before its point."""
    return re.sub(r"^(-?)0\.", r"\1.", number)


def element(name: str, *content: str, **attributes: float | str | None) -> str:
    """Return an element with SVG as its content. Of attributes, `class_` is class and `font_size` font-size."""
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}="
        + (quoteattr(FORBIDDEN.sub("", value)) if isinstance(value, str) else f'"{coordinate(value)}"')
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{''.join(content)}</{name}>" if content else f"<{name}{written}/>"


def words(text: str) -> str:
    """Return text as SVG's content: in one line, escaped, without what XML forbids."""
    return escape(FORBIDDEN.sub("", " ".join(text.split())))


def coloured(colour: str, *content: str) -> str:
    """Return a group of a named colour; `currentColor` is that colour inside."""
    return element("g", *content, class_=colour, color=COLOURS[colour][0], fill="currentColor")


def line(x1: float, y1: float, x2: float, y2: float, width: float = 1, **attributes: float | str) -> str:
    """Return a straight line of its group's colour."""
    return element(
        "line", x1=x1, y1=y1, x2=x2, y2=y2, stroke="currentColor", stroke_width=width, **attributes
    )


def text_width(text: str, size: float = SIZE) -> float:
    """Return how wide a text is at most; the font is the reader's, so a wide one is assumed."""
    return size * sum(map(_em, text))


def _em(character):
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    if character in NARROW:
        return 0.42
    if character in THIN:
        return 0.46
    if character in WIDE:
        return 1.02
    if unicodedata.east_asian_width(character) in "WF":
        return 1.3
    if ord(character) > 0x24F:
        return 0.95
    return 0.82 if character.isupper() else 0.68


def shortened(text: str, width: float, size: float = SIZE) -> str:
    """Return a text of at most `width`: whole, or its beginning and an ellipsis."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def folded(text: str, width: float, size: float = SIZE, most: int = 2) -> list[str]:
    """Return a text in at most `most` lines of `width`; what is left stands in the last one, which may be wider."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or text_width(longer, size) <= width or len(lines) == most:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def label(
    x: float, y: float, text: str, width: float = math.inf, size: float = SIZE, **attributes: float | str
) -> str:
    """Return a text at (x, y), its middle at height y; one that is cut to `width` has the whole text as its title."""
    text = " ".join(text.split())
    short = shortened(text, width, size)
    whole = element("title", words(text)) if short != text else ""
    # SVG's own vertical centring is not known to every viewer
    return element("text", whole, words(short), x=x, y=y + 0.35 * size, font_size=size, **attributes)


def document(width: float, height: float, title: str, description: str, *content: str) -> str:
    """Return an SVG file's text, also fit to stand in HTML. `description` is for those who can't see it."""
    paper = element("rect", width=width, height=height, fill="currentColor")
    return element(
        "svg",
        element("title", words(title)),
        element("desc", words(description)),
        coloured("paper", paper),
        *content,
        xmlns="http://www.w3.org/2000/svg",
        class_="chart",
        viewBox=f"0 0 {coordinate(width)} {coordinate(height)}",
        width=width,
        height=height,
        role="img",
        font_family=FONT,
    )


@dataclass(frozen=True)
class Axis:
    """Values -> pixels, and round values to mark. `low` and `high` are the values at pixels `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False
    percent: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value; one beyond an end is at the end."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def said(self, value: float) -> str:
        """Return a tick's value as text."""
        if self.percent:
            return f"{value:.0%}"
        power = math.log10(value) if self.log else 0
        if abs(power) > 3 and power == round(power):
            return "10" + str(round(power)).translate(SUPERSCRIPTS)
        return bare(f"{value:,.10g}").replace("-", "\u2212")


def axis(
    values: Iterable[float | None],
    start: float,
    end: float,
    log: bool = False,
    most: int = 6,
    tight: bool = False,
) -> Axis:
    """Return an axis that holds all finite values (log: above 0), with about `most` round ticks.

    It ends at ticks; with `tight`, which log has not, at the smallest and the largest value.
    """
    # what is beyond any measurement stands at an end of the axis
    values = [min(max(v, -EXTREME), EXTREME) for v in values if is_number(v) and (v > 0 or not log)]
    low, high = (min(values), max(values)) if values else (1, 10) if log else (0, 1)
    if log:
        first, last = (
            math.floor(math.log10(max(low, 1 / EXTREME))),
            math.ceil(math.log10(max(high, 1 / EXTREME))),
        )
        last = max(last, first + 1)
        every = -(-(last - first) // most)
        digits = (1, 2, 5) if last - first == 1 else (1,)
        ticks = [
            d * 10.0**k for k in range(first, last + 1, every) for d in digits if d * 10.0**k <= 10.0**last
        ]
        return Axis(10.0**first, 10.0**last, start, end, tuple(ticks), log=True)
    size = max(abs(low), abs(high))
    if size < 1 / EXTREME:
        low, high = 0, 1
    elif high - low < 1e-9 * size:  # no tick could tell them apart
        low, high = low - size / 2, high + size / 2
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(float(f"{k * step:.12g}") for k in range(first, last + 1))
    if tight:
        return Axis(low, high, start, end, tuple(tick for tick in ticks if low <= tick <= high))
    return Axis(ticks[0], ticks[-1], start, end, ticks)


def is_number(value: float | None) -> bool:
    """Return whether there is a finite value."""
    return value is not None and math.isfinite(value)


def spaced(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return places moved as little as need be to be `gap` apart, from low to high, in their order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [0.0] * len(places)
    least = low
    for i in order:
        moved[i] = max(places[i], least)
        least = moved[i] + gap
    most = high
    for i in reversed(order):
        moved[i] = min(moved[i], most)
        most = moved[i] - gap
    return moved
