"""Charts as numbers: where the marks stand is read back from the SVG by its own ticks, and no text is cut."""

import math
import re
from functools import cache
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import ImageFont

from fairref.reporting import charts, svg
from fairref.reporting.paths import paths

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = [
    "a",
    "<b>&\"'</b>]]>",
    "nul \0 bell \a lone \ud800 end \uffff",
    "electrical and electronics repairer of commercial and industrial equipment " * 3,
    "W" * 90,
    "護士 " * 20,
    "\U0001f469\U0001f3fd\u200d\u2708\ufe0f" * 12,
    "نص طويل جدا " * 9,
    " ",
]


def parse(text):
    """The root of a chart, and the parent of each element."""
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg" and "nan" not in re.sub(r"<(title|desc)>.*?</\1>|>[^<]*<", "", text)
    return root, {child: parent for parent in root.iter() for child in parent}


def said(element):
    """What a text element shows, without its title."""
    return "".join([element.text or "", *(child.tail or "" for child in element)])


def value_of(tick):
    """The number that a tick's text means."""
    if tick.startswith("10") and tick[2:] and set(tick[2:]) <= set("⁻⁰¹²³⁴⁵⁶⁷⁸⁹"):
        return 10.0 ** int(tick[2:].translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))
    text = tick.replace(",", "").replace("\u2212", "-")
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def axes(root, log=False):
    """Functions value -> x and value -> y, by a straight line through the axes' ticks."""
    (muted,) = [g for g in root.iter(f"{SVG}g") if g.get("class") == "muted" and g[0].tag == f"{SVG}text"][
        -1:
    ]
    y_texts = [
        t
        for g in root.iter(f"{SVG}g")
        if g.get("class") == "muted"
        for t in g
        if t.get("text-anchor") == "end" and re.fullmatch(r"[\d.,\u2212⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", said(t))
    ]
    x_texts = [t for t in muted if t.get("text-anchor") == "middle"]
    found = []
    for texts, key, lower, is_log in ((x_texts, "x", 0, False), (y_texts, "y", 0.35, log)):
        if len(texts) < 2:
            found.append(None)
            continue
        values = np.array([value_of(said(t)) for t in texts])
        places = np.array([float(t.get(key)) - lower * float(t.get("font-size")) for t in texts])
        values = np.log(values) if is_log else values
        slope, offset = np.polyfit(values, places, 1)
        assert np.abs(slope * values + offset - places).max() < 0.02  # the ticks are evenly spaced, too
        found.append(lambda v, s=slope, o=offset, f=math.log if is_log else float: s * f(v) + o)
    return found


def near(found, wanted):
    return np.testing.assert_allclose(found, wanted, atol=0.03)


def points(path):
    return np.array(
        [tuple(map(float, pair.split(","))) for pair in re.findall(r"[-\d.]+,[-\d.]+", path.get("d"))]
    )


def of_series(root, i, tag):
    return [e for g in root.iter(f"{SVG}g") if g.get("class") == f"c{i}" for e in g.iter(f"{SVG}{tag}")]


@pytest.mark.parametrize(
    "log, scale", [(False, 1.0), (False, 3e4), (False, -0.02), (True, 1.0), (True, 1e-5)]
)
def test_curves_stand_where_their_numbers_are(log, scale):
    x = [1, 10, 40, 90]
    rows = [
        {"x": t, "mean": scale * m, "low": scale * m * 0.5, "high": scale * m * 2}
        for t, m in zip(x, (1, 7, 30, 2.2), strict=True)
    ]
    other = [{"x": t, "mean": scale * 5, "low": None, "high": None} for t in x]
    root, _ = parse(charts.curves({"one": rows, "two": other}, "time", "size", "A title", log))
    to_x, to_y = axes(root, log)
    band, curve = of_series(root, 0, "path")
    edge = [(r["x"], r["high"]) for r in rows] + [(r["x"], r["low"]) for r in rows[::-1]]
    near(points(band), [(to_x(a), to_y(b)) for a, b in edge])
    near(points(curve), [(to_x(r["x"]), to_y(r["mean"])) for r in rows])
    (flat,) = of_series(root, 1, "path")  # no band
    near(points(flat), [(to_x(t), to_y(scale * 5)) for t in x])


def test_noise_does_not_fill_an_axis_and_a_mark_stands_where_it_is():
    rows = [{"x": t, "mean": m, "low": None, "high": None} for t, m in enumerate((0.101, 0.102, 0.1))]
    series = {"one": rows, "two": rows}
    options = {"holds": charts.BIASES, "marked": (0.15, "fair"), "under": "one"}
    root, _ = parse(charts.curves(series, "x", "y", "t", **options))
    _, to_y = axes(root)
    near(points(of_series(root, 0, "path")[0])[:, 1], [to_y(row["mean"]) for row in rows])
    texts = [said(t) for t in root.iter(f"{SVG}text")]
    assert {"0", ".2", "fair .15"} <= set(texts)
    (dashes,) = [e for e in root.iter(f"{SVG}line") if e.get("stroke-dasharray")]
    near([float(dashes.get(k)) for k in ("y1", "y2")], [to_y(0.15)] * 2)
    assert [of_series(root, i, "path")[0].get("stroke-width") for i in (0, 1)] == ["5", "2"]
    root, _ = parse(charts.curves(series, "x", "y", "t", percent=True, marked=(0.25, "target")))
    assert {"0%", "100%", "target 25%"} <= {said(t) for t in root.iter(f"{SVG}text")}
    dots = {"a": [("p", (0.9996, None, None), (0.1, 0.05, 0.15))]}
    root, _ = parse(
        charts.scatter(dots, "x", "y", "t", holds=((0.95, 1), charts.BIASES), marked=(0.1, "fair"))
    )
    assert {".95", "1", "0", ".2", "fair .10"} <= {said(t) for t in root.iter(f"{SVG}text")}
    _, to_y = axes(root)
    (dashes,) = [e for e in root.iter(f"{SVG}line") if e.get("stroke-dasharray")]
    near(float(dashes.get("y1")), to_y(0.1))


def test_a_curve_has_gaps_where_numbers_are_missing():
    rows = [
        {"x": t, "mean": m, "low": m, "high": m} for t, m in enumerate([1, 2, float("nan"), 3, None, 0, 4])
    ]
    root, _ = parse(charts.curves({"one": rows}, "x", "y", "t", log=True))
    drawn = [points(p) for p in of_series(root, 0, "path") if p.get("fill") == "none"]
    assert [len(run) for run in drawn] == [2, 1, 1]  # 0 has no place on a log axis


def test_the_way_to_a_name_looks_like_no_part_of_a_curve_that_ends_early():
    series = {
        name: [{"x": x, "mean": x, "low": None, "high": None} for x in range(n)]
        for name, n in (("a", 2), ("b", 9))
    }
    root, _ = parse(charts.curves(series, "x", "y", "title"))
    ways = [line for line in root.iter(f"{SVG}line") if line.get("stroke-width") == "1.2"]
    assert [line.get("stroke-dasharray") for line in ways] == ["1 5", None]


def test_dumbbells_stand_where_their_shares_are():
    rows = [("cook", (0.1, 0.05, 0.2), (0.45, 0.33, 0.58)), ("judge", (0.9, 0.8, 1.0), (0.5, 0.4, 0.6))]
    rows.append(("nobody", (None, None, None), None))
    root, parents = parse(charts.dumbbells(rows, 0.4, "share", "Shares"))
    to_x, _ = axes(root)
    titles = [t for t in root.iter(f"{SVG}title") if parents[t].tag == f"{SVG}g"]
    assert [t.text for t in titles] == [
        "cook: before 10.0% (5.0% to 20.0%), after 45.0% (33.0% to 58.0%).",
        "judge: before 90.0% (80.0% to 100.0%), after 50.0% (40.0% to 60.0%).",
        "nobody: none.",
    ]
    heights = []
    for (_, *ends), title in zip(rows[:2], titles[:2], strict=True):
        row = parents[title]
        discs = list(row.iter(f"{SVG}circle"))
        near([float(d.get("cx")) for d in discs], [to_x(v) for v, *_ in ends])
        between, *intervals = [(float(e.get("x1")), float(e.get("x2"))) for e in row.iter(f"{SVG}line")]
        near(between, [to_x(v) for v, *_ in ends])
        near(intervals, [(to_x(low), to_x(high)) for _, low, high in ends])
        heights.append(float(discs[0].get("cy")))
    names = {said(t): float(t.get("y")) - 0.35 * 12 for t in root.iter(f"{SVG}text")}
    near(heights, [names["cook"], names["judge"]])
    (target,) = [e for e in root.iter(f"{SVG}line") if e.get("stroke-dasharray")]
    near([float(target.get(k)) for k in ("x1", "x2")], [to_x(0.4)] * 2)
    assert "target 40%" in names


def test_bars_are_as_long_as_their_values():
    groups = {"a": {"x": (0.6, 0.5, 0.75), "y": (0.1, None, None)}, "b": {"y": (0.2, 0.0, 0.3)}}
    root, _ = parse(charts.bars(groups, "bias", "Bias", floor=0.13, floor_name="fair"))
    to_x, _ = axes(root)
    bars = [e for i in (0, 1) for e in of_series(root, i, "rect") if e.get("height") == "15"]
    near([float(b.get("x")) for b in bars], [to_x(0)] * 3)
    near([float(b.get("width")) + to_x(0) for b in bars], [to_x(0.6), to_x(0.1), to_x(0.2)])
    whiskers = [
        [float(w.get(k)) for k in ("x1", "x2")] for w in root.iter(f"{SVG}line") if w.get("y1") == w.get("y2")
    ]
    near(whiskers, [(to_x(0.5), to_x(0.75)), (to_x(0), to_x(0.3))])
    near([float(e.get("x1")) for e in root.iter(f"{SVG}line") if e.get("stroke-dasharray")], [to_x(0.13)] * 3)
    texts = [said(t) for t in root.iter(f"{SVG}text")]
    assert {"fair .13", ".60", ".10", ".20", "a", "b"} <= set(texts)


def test_points_stand_where_their_numbers_are_and_their_names_apart():
    strengths = (0, 0.25, 0.5, 0.75, 1, 1.25)
    of = [
        (f"strength {s}", (1 - 0.2 * s, 0.98 - 0.2 * s, None), (0.7 * 0.2**s, 0.6 * 0.2**s, 0.8 * 0.2**s))
        for s in strengths
    ]
    series = {
        "ours": of,
        "coin": [("coin", (0.81, None, None), (0.14, None, None)), ("gone", (math.nan, 0, 1), (1, 0, 1))],
    }
    root, _ = parse(charts.scatter(series, "likeness", "gap", "Pareto"))
    to_x, to_y = axes(root)
    discs = [(float(d.get("cx")), float(d.get("cy"))) for d in of_series(root, 0, "circle")]
    near(discs, [(to_x(a), to_y(b)) for _, (a, *_), (b, *_) in of])
    (path,) = of_series(root, 0, "path")
    near(points(path), discs)
    bars = [[float(e.get(k)) for k in ("x1", "y1", "x2", "y2")] for e in of_series(root, 0, "line")]
    near(
        bars, [(to_x(a), to_y(low), to_x(a), to_y(high)) for _, (a, *_), (_, low, high) in of]
    )  # x has no upper end
    (coin,) = of_series(root, 1, "circle")
    near([float(coin.get("cx")), float(coin.get("cy"))], [to_x(0.81), to_y(0.14)])
    names = [t for t in root.iter(f"{SVG}text") if said(t).startswith(("strength", "coin"))]
    boxes = [extent(t) for t in names if t.get("font-weight") is None][-7:]
    for i, a in enumerate(boxes):
        assert not any(overlap(a, b) for b in boxes[:i])
        assert not any(overlap(a, (x - 3, y - 3, x + 3, y + 3)) for x, y in discs)


def overlap(a, b):
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


@cache
def font(bold, size):
    """A wide font that browsers take."""
    matplotlib = pytest.importorskip("matplotlib")
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", size)


def extent(text):
    """Left, top, right and bottom of a text element."""
    size = float(text.get("font-size"))
    wide = font(text.get("font-weight") == "600", 40).getlength(said(text)) * size / 40
    x, y = float(text.get("x")), float(text.get("y"))
    left = x - {"start": 0, "middle": wide / 2, "end": wide}[text.get("text-anchor", "start")]
    return left, y - size, left + wide, y + 0.3 * size


def charts_of(names, width):
    """One chart of each kind with these names."""
    interval, rng = (0.4, 0.3, 0.6), np.random.default_rng(len(names))
    every = {name: [{"x": t, "mean": t + 1, "low": t, "high": 1e6 * t} for t in (0, 1, 5)] for name in names}
    dots = {
        n: [(n, (a, a / 2, a), (b, b, 2 * b))]
        for n, (a, b) in zip(names, rng.random((len(names), 2)), strict=True)
    }
    yield charts.curves(every, names[0], names[-1], names[3 % len(names)], width=width)
    yield charts.curves(every, names[0], names[-1], names[3 % len(names)], log=True, width=width)
    yield charts.dumbbells(
        [(name, interval, interval) for name in names], 0.0, names[0], names[-1], width=width
    )
    yield charts.bars(
        {n: dict.fromkeys(names, interval) for n in names}, names[0], names[-1], 0.6, names[-1], width
    )
    yield charts.scatter(dots, names[0], names[-1], names[3 % len(names)], width=width)


@pytest.mark.parametrize("width", [340, 640])
def test_no_text_and_no_mark_is_cut_whatever_the_names(width):
    for names in (["a", "b"], HOSTILE, HOSTILE[3:4], HOSTILE[6:7]):
        for text in charts_of(names, width):
            root, parents = parse(text)
            _, _, W, H = map(float, root.get("viewBox").split())
            assert width == W
            for e in root.iter():
                if e.tag == f"{SVG}text":
                    left, top, right, bottom = extent(e)
                    assert left >= -0.5 and top >= -0.5 and right <= W + 0.5 and bottom <= H + 0.5, said(e)
                    if said(e).endswith("…") and parents[e] is not root:
                        assert e.find(f"{SVG}title").text.startswith(said(e)[:-1].rstrip())
                for key, limit in (
                    ("x", W),
                    ("x1", W),
                    ("x2", W),
                    ("cx", W),
                    ("y1", H),
                    ("y2", H),
                    ("cy", H),
                ):
                    assert 0 <= float(e.get(key, 0)) <= limit
            for path in root.iter(f"{SVG}path"):
                assert (points(path) >= 0).all() and (points(path) <= (W, H)).all()


def test_a_whole_name_stays_readable():
    long = HOSTILE[3].strip()
    root, _ = parse(charts.dumbbells([(long, (0.5, 0.4, 0.6), None)], None, "share", "t"))
    (cut,) = [t for t in root.iter(f"{SVG}text") if said(t).endswith("…")]
    assert cut.find(f"{SVG}title").text == long


def test_numbers_make_the_same_bytes_and_charts_without_numbers_are_drawn():
    assert list(charts_of(HOSTILE[:3], 640)) == list(charts_of(HOSTILE[:3], 640))
    for text in (
        charts.curves({}, "x", "y", "t"),
        charts.dumbbells([], None, "x", "t"),
        charts.bars({}, "x", "t"),
        charts.scatter({}, "x", "y", "t"),
    ):
        parse(text)


@pytest.mark.parametrize(
    "values, ticks",
    [
        ((0, 1), (0, 0.2, 0.4, 0.6, 0.8, 1)),
        ((0.13, 0.31), (0.1, 0.15, 0.2, 0.25, 0.3, 0.35)),
        ((-3, 41), (-10, 0, 10, 20, 30, 40, 50)),
        ((5, 5), (2, 3, 4, 5, 6, 7, 8)),
        ((1e-9, 3e-9), (1e-9, 1.5e-9, 2e-9, 2.5e-9, 3e-9)),
        ((1, 1 + 1e-15), (0.4, 0.6, 0.8, 1, 1.2, 1.4, 1.6)),
    ],
)
def test_ticks_are_round_and_hold_the_values(values, ticks):
    assert svg.axis(values, 0, 100).ticks == pytest.approx(ticks)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [(-1e308, 1e308), (5e-324, 1e308), (0, 5e-324), (math.inf, math.nan, None, -1)]
)
def test_numbers_beyond_measurement_stand_at_an_end(values, log):
    rows = [{"x": v, "mean": v, "low": v, "high": v} for v in values]
    root, _ = parse(charts.curves({"a": rows}, "x", "y", "t", log))
    for path in of_series(root, 0, "path"):
        assert np.isfinite(points(path)).all()


def test_the_paths_are_the_products_of_B_t():
    """Each arrow of colour is one that the product takes: t = 3 has I, J_2, J_1 and J_1 J_2."""
    root, _ = parse(paths(3))
    headings = [said(t) for t in root.iter(f"{SVG}text") if said(t).startswith("t = ")]
    wanted = [
        "t = 1: I, kept",
        "t = 2: I, kept",
        "t = 2: J₁",
        "t = 3: I, kept",
        "t = 3: J₂",
        "t = 3: J₁",
        "t = 3: J₁J₂",
    ]
    assert headings == wanted
    cells = [g for g in root if g.get("transform")]
    used = [
        sum(
            len(g.findall(f"{SVG}line"))
            for g in cell
            if g.get("class") in ("c0", "c1") and g.find(f"{SVG}line") is not None
        )
        for cell in cells
    ]
    # from eps^(t) down, then one arrow for a direct step and two for one through a prediction
    assert used == [1, 2, 3, 3, 4, 4, 5]
