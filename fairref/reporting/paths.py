"""Fig 7: the paths of the gradient, a small diagram each."""

from itertools import product

from fairref.reporting.frame import MARGIN, head
from fairref.reporting.svg import coloured, coordinate, document, element, label, line

CELL = (172.0, 112.0)  # width and height of a diagram
ABOVE, ON = 46.0, 90.0  # heights of the eps^(s) and of the z_s in it
APART = 13.0  # of an arrow's ends and the letters
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def paths(T: int = 3) -> str:
    """Return fig 7: all paths from the noise prediction eps^(t) to z_0, one row for each t = 1..T.

    A step from z_s to z_{s-1} is direct, or indirect, through eps^(s). The adjusted gradient keeps the path of direct
    steps alone, the first of each row.
    """
    rows = [list(product((False, True), repeat=t - 1)) for t in range(1, T + 1)]
    width = 2 * MARGIN + CELL[0] * len(rows[-1])
    kept = "A row for each ε. The adjusted gradient keeps the first column, the paths of direct steps."
    title = f"Every path from a noise prediction ε to the latent z₀, T = {T}"
    above, top = head(title, width, kept)
    cells = [
        element(
            "g",
            *_way(T, t, way),
            transform=f"translate({coordinate(left)},{coordinate(top + (t - 1) * CELL[1])})",
        )
        for t, ways in enumerate(rows, 1)
        for left, way in zip(range(int(MARGIN), int(width), int(CELL[0])), ways, strict=False)
    ]
    factors = [f"t = {t}: {', '.join(map(_factors, ways))}." for t, ways in enumerate(rows, 1)]
    about = f"The products of B_t, a path each; those that are I are kept. {' '.join(factors)}"
    return document(width, top + T * CELL[1], title, about, above, *cells)


def _factors(way):
    """The product of a path: way[s - 1] is whether it goes through eps^(s)."""
    return "".join(f"J{str(s).translate(SUBSCRIPTS)}" for s, through in enumerate(way, 1) if through) or "I"


def _way(T, t, way):
    """One path in its cell: arrows that it takes in colour, the others in grey."""
    colour = "c0" if any(way) else "c1"
    pitch = (CELL[0] - 36) / T
    place = {s: (8 + (T - s) * pitch, ON) for s in range(T + 1)}  # z_T on the left
    over = {
        s: (8 + (T - s + 0.5) * pitch, ABOVE) for s in range(1, T + 1)
    }  # eps^(s), between z_s and z_{s-1}
    arrows = {colour: [], "grid": []}
    for s in range(T, 0, -1):
        through = s < t and way[s - 1]
        for start, end, used in (
            (place[s], place[s - 1], s < t and not through),
            (place[s], over[s], through),
            (over[s], place[s - 1], through or s == t),
        ):
            arrows[colour if used else "grid"].append(_arrow(start, end, 2.2 if used else 1.2))
    kept = "" if any(way) else ", kept"
    letters = [label(*place[s], f"z{str(s).translate(SUBSCRIPTS)}", text_anchor="middle") for s in place]
    predictions = {
        s: label(*over[s], f"ε⁽{str(s).translate(SUPERSCRIPTS)}⁾", text_anchor="middle") for s in over
    }
    return (
        coloured(colour, label(0, 16, f"t = {t}: {_factors(way)}{kept}", CELL[0] - 8, font_weight="600")),
        *(coloured(name, *of) for name, of in (("grid", arrows["grid"]), (colour, arrows[colour]))),
        coloured("ink", *letters, *(text for s, text in predictions.items() if s != t)),
        coloured(colour, predictions[t]),
    )


def _arrow(start, end, width):
    """An arrow that leaves room for the letters at its ends."""
    (x1, y1), (x2, y2) = start, end
    length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
    dx, dy = (x2 - x1) / length, (y2 - y1) / length
    x1, y1, x2, y2 = x1 + APART * dx, y1 + APART * dy, x2 - APART * dx, y2 - APART * dy
    back, side = 6, 3.2
    tip = [(x2, y2), (x2 - back * dx - side * dy, y2 - back * dy + side * dx)]
    tip.append((x2 - back * dx + side * dy, y2 - back * dy - side * dx))
    points = " ".join(f"{coordinate(x)},{coordinate(y)}" for x, y in tip)
    shaft = line(x1, y1, x2 - back * dx / 2, y2 - back * dy / 2, width)
    return shaft + element("polygon", points=points)
