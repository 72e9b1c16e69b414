"""What a report is made of: tables, charts with their tables, and numbers as a reader sees them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fairref.fairness.attributes import apparent

WIDE, NARROW = 720, 340  # pixels of a chart on a screen or on paper, and on a telephone
MOST_ROWS = 400  # of a table; a file has the rest
MOST_LETTERS = 160  # of a name or a prompt
NONE = "–"
SLASH = "\u00a0/ "  # between numbers of several judges; no line begins with it
Interval = tuple[float | None, float | None, float | None]


@dataclass(frozen=True)
class Table:
    """Cells as texts; the first one of a row is its heading."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def left_out(self) -> int:
        """Rows that a page does not show."""
        return max(len(self.rows) - MOST_ROWS, 0)

    @property
    def shown(self) -> Sequence[Sequence[str]]:
        """The rows that a page shows."""
        return self.rows[:MOST_ROWS]


@dataclass(frozen=True)
class Chart:
    """One chart in two widths, of which a page shows the one that fits, and its numbers."""

    wide: str  # SVG, whose texts are escaped
    narrow: str
    caption: str
    table: Table


def chart(caption: str, table: Table, draw: Callable[..., str], *numbers: object, **options: object) -> Chart:
    """The chart that a function of charts.py draws of numbers."""
    wide, narrow = (draw(*numbers, **options, width=width) for width in (WIDE, NARROW))
    return Chart(wide, narrow, caption, table)


def number(value: float | None, digits: int = 2) -> str:
    """.83, 1.20, with a minus sign where it is below 0; a dash for none."""
    if value is None:
        return NONE
    text = f"{abs(value):.{digits}f}"
    sign = "\N{MINUS SIGN}" if value < 0 and float(text) else ""
    return sign + (text.removeprefix("0") if abs(value) < 1 and digits and text.startswith("0.") else text)


def likeness(value: float | None) -> str:
    """.942, with more digits where fewer would say 1."""
    digits = next((d for d in (3, 4, 5, 6) if value is None or value >= 1 or round(value, d) < 1), 3)
    return number(value, digits)


def percent(value: float | None) -> str:
    """98.8%."""
    return NONE if value is None else f"{value:.1%}"


def spread(values: Mapping[str, float | None]) -> str:
    """Mean ± standard deviation."""
    return NONE if values["mean"] is None else f"{number(values['mean'])}\u00a0±\u00a0{number(values['std'])}"


def interval(values: Interval, said: Callable[[float | None], str] = number) -> str:
    """.22 [.19, .26]; the value alone where no interval is known."""
    return f"{said(values[0])}\u00a0{ends(values, said)}".rstrip()


def ends(values: Interval, said: Callable[[float | None], str] = number) -> str:
    """[.19, .26], in which no line breaks; nothing where no interval is known."""
    return "" if None in values else f"[{said(values[1])},\u00a0{said(values[2])}]"


def probability(p: float | None) -> str:
    """.03, or < .001."""
    return NONE if p is None else "< .001" if p < 0.001 else number(p, 3 if p < 0.1 else 2)


def triple(values: Mapping[str, float | None] | None) -> Interval:
    """What a file calls value, low and high."""
    return (None, None, None) if values is None else (values["value"], values["low"], values["high"])


def short(text: str) -> str:
    """A name in one line, its end left out where it is very long."""
    text = " ".join(text.split())
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}…"


def sentence(text: str) -> str:
    """A text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def attribute_words(name: str) -> str:
    """An attribute as a judge sees it: apparent gender, skin tone."""
    return " × ".join(short(one).replace("_", " ") for one in apparent(name).split(","))
