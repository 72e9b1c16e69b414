"""What stands around a chart's marks: title, legend, grids, the axes' values, a line at one value."""

from collections.abc import Iterable

from fairref.reporting.svg import LINE, SIZE, Axis, coloured, element, folded, label, line, text_width

WIDTH = 640
MARGIN = 14
TITLE, BOLD = 15, 1.1  # of a title: size, and how much wider its bold letters are
FOOT = 46  # height of what stands below a plot


def head(
    title: str, width: float, y_label: str = "", legend: Iterable[tuple[str, str]] = ()
) -> tuple[str, float]:
    """Return the title, the legend of (name, colour) and what the y axis is, below each other; and the plot's top."""
    room, y, parts = width - 2 * MARGIN, MARGIN + TITLE / 2, []
    for text in folded(title, room / BOLD, TITLE):
        parts.append(coloured("ink", label(MARGIN, y, text, room / BOLD, TITLE, font_weight="600")))
        y += LINE * TITLE
    x = right = MARGIN
    for name, colour in legend:
        need = 16 + min(text_width(name), room - 16)
        if x + need > width - MARGIN and x > MARGIN:
            x, y = MARGIN, y + LINE * SIZE
        swatch = element("rect", x=x, y=y - 5, width=10, height=10, rx=2)
        parts += [coloured(colour, swatch), coloured("ink", label(x + 16, y, name, room - 16))]
        x = right = x + need + 14
    y += LINE * SIZE if right > MARGIN else 0
    for text in folded(y_label, room) if y_label else ():
        parts.append(coloured("muted", label(MARGIN, y, text, room)))
        y += LINE * SIZE
    return "".join(parts), y + 4


def horizontal_grid(y: Axis, left: float, right: float) -> str:
    """Return lines at the ticks of a y axis, and their values on the left."""
    lines = [line(left, y(tick), right, y(tick)) for tick in y.ticks]
    values = [label(left - 6, y(tick), y.said(tick), text_anchor="end") for tick in y.ticks]
    return coloured("grid", *lines) + coloured("muted", *values)


def vertical_grid(x: Axis, top: float, bottom: float) -> str:
    """Return lines at the ticks of an x axis."""
    return coloured("grid", *(line(x(tick), top, x(tick), bottom) for tick in x.ticks))


def below(x: Axis, bottom: float, x_label: str) -> str:
    """Return the values at the ticks of an x axis, and below them what it is."""
    values = [label(x(tick), bottom + 12, x.said(tick), text_anchor="middle") for tick in x.ticks]
    name = label(x.end, bottom + 30, x_label, x.end - MARGIN, text_anchor="end")
    return coloured("muted", *values, name)


def mark(x: Axis, value: float | None, said: str, top: float, bottom: float) -> str:
    """Return a dashed line at a value of an x axis with a text above it; nothing where there is no value."""
    if value is None:
        return ""
    half = min(text_width(said), x.end - x.start) / 2
    middle = min(max(x(value), x.start + half), x.end - half)  # inside the axis, wherever the line is
    text = label(middle, top - 12, said, 2 * half, text_anchor="middle")
    return coloured("ink", line(x(value), top - 4, x(value), bottom, 1.5, stroke_dasharray="5 4"), text)
