"""Charts: numbers -> the text of an SVG file. No script, no font, no file; the same numbers make the same bytes.

An interval is (value, low, high); low and high are None where none is known. What has no finite value is left out.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby, pairwise

from fairref.reporting.frame import (
    BOLD,
    FOOT,
    MARGIN,
    WIDTH,
    below,
    head,
    horizontal_grid,
    mark,
    vertical_grid,
)
from fairref.reporting.svg import (
    DASHES,
    LINE,
    SERIES,
    SIZE,
    Axis,
    axis,
    bare,
    coloured,
    coordinate,
    document,
    element,
    is_number,
    label,
    line,
    shortened,
    spaced,
    text_width,
    words,
)
from fairref.reporting.tables import Interval, number

Row = Mapping[str, str | float | None]

PLOT = 280  # height of a plot, where rows don't make it
NAMES = 0.3  # of the width, at most, for a name beside a mark
PITCH = 19  # height of a row of dumbbells, and of a bar
DOTS = 20  # points of a curve, at most, that are dots too
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
BIASES = (0.0, 0.2)  # an axis of biases has these, so that noise does not fill it
Mark = tuple[float, str]  # a value with a dashed line, and what it is


def curves(
    series: Mapping[str, Sequence[Row]],
    x_label: str,
    y_label: str,
    title: str,
    log: bool = False,
    width: float = WIDTH,
    percent: bool = False,
    holds: Sequence[float] = (),
    marked: Mark | None = None,
    under: str = "",
) -> str:
    """Return a curve for each name: the mean, and a band from low to high. Rows have "x", "mean", "low" and "high".

    A name stands at its curve's end, or behind a dotted line from there. `under`: the name of a wide one, so that no
    other hides it. Of the y axis: `log`; `percent`, from 0 to 100; `holds`, values that are on it; `marked`, one with a
    dashed line.
    """
    height = max(PLOT, LINE * SIZE * len(series))
    above, top = head(title, width, y_label)
    goal = "" if marked is None else _goal(marked, percent)
    bottom, names = top + height, min(NAMES * width, max(map(text_width, [*series, goal]), default=0))
    rows = [row for of in series.values() for row in of]
    held = [*holds, *(marked or ())[:1], *(row.get(key) for row in rows for key in ("mean", "low", "high"))]
    y = Axis(0, 1, bottom, top, SHARES, percent=True) if percent else axis(held, bottom, top, log)
    left = MARGIN + _room(y) + 6
    right = width - MARGIN - names - 26
    x = axis([row["x"] for row in rows], left, right, most=_ticks(right - left), tight=True)
    drawn, ends, said = [], [], []
    if marked is not None:
        drawn.append(coloured("ink", _dashes(left, y(marked[0]), x.end)))
        ends.append(("ink", goal, x.end, y(marked[0])))
    for i, (name, of) in enumerate(series.items()):
        colour, known = _colour(i), [row for row in of if _is_shown(row["mean"], log)]
        dash, wide = DASHES[i // SERIES % len(DASHES)], 5 if name == under else 2
        drawn.append(coloured(colour, *_band(of, x, y), *_curve(of, x, y, dash, wide)))
        if known:
            first, last = known[0], known[-1]
            ends.append((colour, name, x(last["x"]), y(last["mean"])))
            said.append(f"{name}: {_said(first['mean'])} to {_said(last['mean'])}.")
    places = spaced([end[-1] for end in ends], LINE * SIZE, top + SIZE / 2, bottom - SIZE / 2)
    for (colour, name, at, end), place in zip(ends, places, strict=True):
        early = {"stroke_dasharray": "1 5"} if at < right - 1 else {}  # it is no part of the curve
        drawn.append(coloured(colour, line(at, end, right + 20, place, 1.2, **early)))
        drawn.append(coloured("ink", label(right + 24, place, name, names)))
    about = " ".join(
        [f"{y_label}, by {x_label}; first to last value.", *said, f"{goal}." if goal else ""]
    ).strip()
    body = (above, horizontal_grid(y, left, x.end), below(x, bottom, x_label), *drawn)
    return document(width, bottom + FOOT, title, about, *body)


def dumbbells(
    rows: Sequence[tuple[str, Interval, Interval | None]],
    target: float | None,
    x_label: str,
    title: str,
    names: tuple[str, str] = ("before", "after"),
    width: float = WIDTH,
) -> str:
    """Return a share from 0 to 1 for each row, in the rows' order: before, after (None: before alone), with intervals.

    A dashed line stands at the target.
    """
    some = [any(row[r] is not None for row in rows) for r in (1, 2)]
    colours = {name: colour for name, colour, shown in zip(names, ("c0", "c1"), some, strict=True) if shown}
    above, top = head(title, width, "", colours.items())
    top += 0 if target is None else 18
    bottom = top + 6 + PITCH * len(rows)
    column = min(1.3 * NAMES * width, max((text_width(name) for name, *_ in rows), default=0))
    left, right = MARGIN + column + 10, width - MARGIN - 20
    x = Axis(0, 1, left, right, SHARES if right - left > 200 else SHARES[::2], percent=True)
    goal = "" if target is None else f"target {target:.0%}"
    body = [
        above,
        vertical_grid(x, top, bottom),
        below(x, bottom, x_label),
        mark(x, target, goal, top, bottom),
    ]
    about = [f"{x_label}; {goal}."]
    for r, (name, *intervals) in enumerate(rows):
        middle = top + 3 + PITCH * (r + 0.5)
        ends = {of: v for of, v in zip(names, intervals, strict=True) if v is not None and is_number(v[0])}
        about.append(f"{name}: {', '.join(f'{of} {_percent(v)}' for of, v in ends.items()) or 'none'}.")
        row = _dumbbell(x, middle, [(colours[of], v) for of, v in ends.items()])
        body.append(coloured("ink", label(x.start - 10, middle, name, column, text_anchor="end")))
        body.append(element("g", element("title", words(about[-1])), *row))
    return document(width, bottom + FOOT, title, " ".join(about), *body)


def bars(
    groups: Mapping[str, Mapping[str, Interval]],
    x_label: str,
    title: str,
    floor: float | None = None,
    floor_name: str = "floor",
    width: float = WIDTH,
) -> str:
    """Return horizontal bars from 0: group -> series -> interval. A dashed line stands at the floor.

    A group's name stands above its bars, a value behind its bar.
    """
    series = dict.fromkeys(name for group in groups.values() for name in group)
    colours = {name: _colour(i) for i, name in enumerate(series)}
    above, top = head(title, width, "", colours.items() if len(series) > 1 else ())
    top += 0 if floor is None else 18
    heights = [LINE * SIZE + 10 + PITCH * len(group) for group in groups.values()]
    bottom = top + sum(heights)
    values = [value for group in groups.values() for interval in group.values() for value in interval]
    room = max((text_width(number(value)) for value in values if is_number(value)), default=0) + 8
    x = axis([*BIASES, floor, *values], MARGIN + 20, width - MARGIN - max(room, 20), most=_ticks(width))
    goal = "" if floor is None else f"{floor_name} {number(floor)}"
    body, about = [above, below(x, bottom, x_label), mark(x, floor, goal, top, top)], [f"{x_label}; {goal}."]
    for (name, group), y in zip(groups.items(), accumulate(heights, initial=top), strict=False):
        heading = label(MARGIN, y + LINE * SIZE / 2, name, (width - 2 * MARGIN) / BOLD, font_weight="600")
        first = y + LINE * SIZE + 3
        last = first + PITCH * len(group)
        body += [coloured("ink", heading), vertical_grid(x, first, last)]
        for i, (of, interval) in enumerate(group.items()):
            about.append(f"{name}, {of}: {_written(interval)}.")
            if is_number(interval[0]):
                bar = _bar(x, first + PITCH * i, interval, colours[of])
                body.append(element("g", element("title", words(about[-1])), *bar))
        body.append(mark(x, floor, "", first, last))
    return document(width, bottom + FOOT, title, " ".join(about), *body)


def scatter(
    series: Mapping[str, Sequence[tuple[str, Interval, Interval]]],
    x_label: str,
    y_label: str,
    title: str,
    width: float = WIDTH,
    holds: tuple[Sequence[float], Sequence[float]] = ((), ()),
    marked: Mark | None = None,
) -> str:
    """Return points (name, x, y) for each series, x and y intervals; a line joins a series' points in their order.

    `holds`: values that are on the x axis, and on the y axis; `marked`: one of the y axis with a dashed line.
    """
    colours = {name: _colour(i) for i, name in enumerate(series)}
    above, top = head(title, width, y_label, colours.items() if len(series) > 1 else ())
    bottom = top + 1.2 * PLOT
    shown = {
        of: [p for p in points if is_number(p[1][0]) and is_number(p[2][0])] for of, points in series.items()
    }
    xs, ys = ([value for points in shown.values() for p in points for value in p[i]] for i in (1, 2))
    y = axis([*holds[1], *(marked or ())[:1], *ys], bottom, top)
    left = MARGIN + _room(y) + 6
    x = axis([*holds[0], *xs], left, width - MARGIN - 20, most=_ticks(width - left))
    body = [above, horizontal_grid(y, left, x.end), vertical_grid(x, top, bottom), below(x, bottom, x_label)]
    about, labels, taken = [f"{y_label}, by {x_label}."], [], []
    if marked is not None:
        goal, at = _goal(marked), y(marked[0])
        body.append(coloured("ink", _dashes(left, at, x.end), label(left + 4, at - 9, goal, x.end - left)))
        taken += [(left, at - 18, left + text_width(goal), at), (left, at - 1, x.end, at + 1)]
        about.append(f"{goal}.")
    for of, points in shown.items():
        places = [(x(px[0]), y(py[0])) for _, px, py in points]
        if len(places) > 1:
            body.append(coloured(colours[of], _stroke(places, 1.5, stroke_opacity=0.55)))
            taken += [box for ends in pairwise(places) for box in _along(*ends)]
        for place, (name, px, py) in zip(places, points, strict=True):
            about.append(f"{name} ({of}): {_written(px)}; {_written(py)}.")
            disc = coloured(colours[of], *_disc(x, y, px, py))
            body.append(element("g", element("title", words(about[-1])), disc))
            labels.append((*place, name))
            taken += [_around(*place, 5), (x(_low(px)), place[1] - 1, x(_high(px)), place[1] + 1)]
            taken.append((place[0] - 1, y(_high(py)), place[0] + 1, y(_low(py))))
    for at_x, at_y, name in labels:
        box, anchor, at = _free_place(
            at_x, at_y, shortened(name, NAMES * width), (left, top, width - MARGIN, bottom), taken
        )
        taken.append(box)
        body.append(
            coloured("ink", label(at, (box[1] + box[3]) / 2, name, NAMES * width, text_anchor=anchor))
        )
    return document(width, bottom + FOOT, title, " ".join(about), *body)


def _colour(i):
    return f"c{i % SERIES}"


def _ticks(width):
    """How many ticks of an x axis there is room for."""
    return max(4, round(width / 70))


def _room(axis):
    """The width of an axis's values."""
    return max(text_width(axis.said(tick)) for tick in axis.ticks)


def _is_shown(value, log):
    return is_number(value) and (value > 0 or not log)


def _said(value):
    return bare(f"{value:.3g}") if is_number(value) else "none"


def _goal(marked, percent=False):
    value, words = marked
    return f"{words} {value:.0%}" if percent else f"{words} {number(value)}"


def _low(interval):
    return interval[1] if is_number(interval[1]) else interval[0]


def _high(interval):
    return interval[2] if is_number(interval[2]) else interval[0]


def _written(interval):
    """An interval as text."""
    value, low, high = interval
    return _said(value) + (f" ({_said(low)} to {_said(high)})" if is_number(low) and is_number(high) else "")


def _percent(interval):
    """An interval of shares as text."""
    value, low, high = interval
    return f"{value:.1%}" + (f" ({low:.1%} to {high:.1%})" if is_number(low) and is_number(high) else "")


def _polyline(points):
    return "M" + "L".join(f"{coordinate(x)},{coordinate(y)}" for x, y in points)


def _stroke(points, width, **attributes):
    look = {"fill": "none", "stroke": "currentColor", "stroke_width": width, "stroke_linejoin": "round"}
    return element("path", d=_polyline(points), **look, **attributes)


def _runs(rows, is_known):
    """The stretches of rows without a gap."""
    return [list(run) for known, run in groupby(rows, is_known) if known]


def _band(rows, x, y):
    """The area between low and high."""
    for run in _runs(rows, lambda row: is_number(row.get("low")) and is_number(row.get("high"))):
        high, low = ([(x(row["x"]), y(row[key])) for row in run] for key in ("high", "low"))
        yield element("path", d=_polyline(high + low[::-1]) + "Z", fill_opacity=0.16)


def _curve(rows, x, y, dash, width):
    """The line of means; few points, and one alone, are dots too."""
    for run in _runs(rows, lambda row: _is_shown(row["mean"], y.log)):
        points = [(x(row["x"]), y(row["mean"])) for row in run]
        yield _stroke(points, width, stroke_dasharray=dash)
        for cx, cy in points if len(rows) <= DOTS or len(run) == 1 else ():
            yield element("circle", cx=cx, cy=cy, r=3)


def _dumbbell(x, y, ends):
    """A row: a ring before, a disc after, a line between them, and pale lines for intervals, above it and below."""
    if len(ends) == 2:
        yield coloured("muted", line(*(p for _, v in ends for p in (x(v[0]), y)), 1.5, stroke_opacity=0.7))
    for shift, (colour, (value, low, high)) in zip(
        (-3.5, 3.5) if len(ends) == 2 else (0,), ends, strict=False
    ):
        is_ring = colour == "c0"
        look = {"fill": "none", "stroke": "currentColor", "stroke_width": 2} if is_ring else {}
        parts = [element("circle", cx=x(value), cy=y, r=5 if is_ring else 3.5, **look)]
        if is_number(low) and is_number(high):
            parts.insert(0, line(x(low), y + shift, x(high), y + shift, 2.5, stroke_opacity=0.45))
        yield coloured(colour, *parts)


def _bar(x, y, interval, colour):
    """A bar with its top at y, its whisker and its value."""
    value, low, high = interval
    (start, end), middle = sorted((x(0), x(value))), y + PITCH / 2
    edge = end
    yield coloured(colour, element("rect", x=start, y=y + 2, width=end - start, height=PITCH - 4))
    if is_number(low) and is_number(high):
        ends = [line(x(at), middle - 4, x(at), middle + 4, 1.5) for at in (low, high)]
        yield coloured("ink", line(x(low), middle, x(high), middle, 1.5), *ends)
        edge = max(edge, x(high))
    yield coloured("ink", label(edge + 6, middle, number(value)))


def _disc(x, y, px, py):
    """A point with its error bars."""
    (a, left, right), (b, low, high) = px, py
    if is_number(left) and is_number(right):
        yield line(x(left), y(b), x(right), y(b), 1.5, stroke_opacity=0.6)
    if is_number(low) and is_number(high):
        yield line(x(a), y(low), x(a), y(high), 1.5, stroke_opacity=0.6)
    yield element("circle", cx=x(a), cy=y(b), r=4.5)


def _along(start, end, pieces=16):
    """Boxes on a straight line."""
    (a, b), (c, d) = start, end
    return [_around(a + (c - a) * k / pieces, b + (d - b) * k / pieces, 1) for k in range(pieces + 1)]


def _dashes(left, y, right):
    return line(left, y, right, y, 1.5, stroke_dasharray="5 4")


def _around(x, y, r):
    return x - r, y - r, x + r, y + r


def _overlap(a, b):
    """The area that two boxes share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _free_place(x, y, name, plot, taken):
    """Where a point's name covers least: its box, its anchor and the anchor's place."""
    wide, high, places = text_width(name), 1.2 * SIZE, []
    for far in (9, 18, 30):
        for right, down in (
            (1, 0),
            (-1, 0),
            (0, -1.2),
            (0, 1.2),
            (0.8, -0.9),
            (0.8, 0.9),
            (-0.8, -0.9),
            (-0.8, 0.9),
        ):
            anchor = "middle" if right == 0 else "start" if right > 0 else "end"
            at, middle = x + far * right, y + far * down
            left = at - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
            places.append(((left, middle - high / 2, left + wide, middle + high / 2), anchor, at))
    inside = [place for place in places if _overlap(place[0], plot) > 0.999 * wide * high]
    return min(inside or places, key=lambda place: sum(_overlap(place[0], other) for other in taken))
