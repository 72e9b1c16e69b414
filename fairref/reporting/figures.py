"""Figures (extra `figures`): curves with bands, and the paths of the gradient."""

import io
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from types import ModuleType

from fairref.errors import UserError
from fairref.files.paths import write_file

COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee")

Row = dict[str, str | float]  # of a table of numbers: column -> value


def pyplot() -> ModuleType:
    """Return matplotlib.pyplot without a window. Raises UserError if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise UserError('Figures need matplotlib; install it with pip install "fairref[figures]".') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def curves(
    path: Path,
    series: Mapping[str, Sequence[Row]],
    x: str,
    labels: tuple[str, str],
    title: str,
    log: bool = False,
) -> None:
    """Write a figure with a curve for each name: the mean, and a band from low to high.

    Rows have `x`, "mean", "low" and "high". `labels`: of both axes.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (name, rows), colour in zip(series.items(), COLOURS, strict=False):  # there may be more colours
        xs = [row[x] for row in rows]
        axes.plot(xs, [row["mean"] for row in rows], color=colour, label=name, linewidth=1.6)
        low, high = ([row[key] for row in rows] for key in ("low", "high"))
        axes.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
    if log:
        axes.set_yscale("log")
    axes.set(xlabel=labels[0], ylabel=labels[1], title=title)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=len(series))  # beside the curves, not over them
    _save(figure, path)


def gradient_paths(path: Path, T: int = 3) -> None:
    """Write fig 7: all paths from the noise prediction eps^(t) to z_0, one row for each t = 1..T.

    A step from z_s to z_{s-1} is direct, or indirect, through eps^(s). The adjusted gradient keeps the path of
    direct steps alone, which has the first colour.
    """
    plt = pyplot()
    columns = 2 ** (T - 1)
    figure, grid = plt.subplots(
        T, columns, figsize=(3.0 * columns, 1.9 * T), layout="constrained", squeeze=False
    )
    for row, t in zip(grid, range(1, T + 1), strict=True):
        ways = list(product((False, True), repeat=t - 1))
        for axes, way in zip(row, ways, strict=False):  # a row of small t has fewer paths than columns
            _draw_way(axes, T, t, way)
        for axes in row[len(ways) :]:
            axes.axis("off")
    figure.suptitle(
        f"How $\\varepsilon^{{(t)}}$ reaches $z_0$ for T = {T}: the products of $B_t$;"
        " the adjusted gradient keeps the first column"
    )
    _save(figure, path)


def _save(figure: object, path: Path) -> None:
    """Write a figure as PNG, and close it."""
    data = io.BytesIO()
    figure.savefig(data, dpi=150, format="png")
    pyplot().close(figure)
    write_file(path, data.getvalue())


def _draw_way(axes: object, T: int, t: int, way: Sequence[bool]) -> None:
    """Draw one path: `way[s - 1]` is whether z_s -> z_{s-1} goes through eps^(s), s < t."""
    kept = not any(way)
    colour = COLOURS[0] if kept else COLOURS[1]
    place = {s: (T - s, 0.0) for s in range(T + 1)}  # z_T on the left
    above = {s: (T - s + 0.5, 1.0) for s in range(1, T + 1)}  # eps^(s), between z_s and z_{s-1}

    def arrow(start: tuple[float, float], end: tuple[float, float], used: bool) -> None:
        style = {"arrowstyle": "-|>", "shrinkA": 11, "shrinkB": 11, "mutation_scale": 11}
        style |= {"color": colour if used else "0.82", "linewidth": 2.2 if used else 0.9}
        axes.annotate("", end, start, arrowprops=style)

    for s in range(T, 0, -1):
        through = s < t and way[s - 1]
        arrow(place[s], place[s - 1], s < t and not through)
        arrow(place[s], above[s], through)
        arrow(above[s], place[s - 1], through or s == t)
    for s in range(T + 1):
        axes.text(*place[s], f"$z_{s}$", ha="center", va="center")
    for s in range(1, T + 1):
        weight = {"color": colour} if s == t else {}
        axes.text(*above[s], f"$\\varepsilon^{{({s})}}$", ha="center", va="center", **weight)
    factors = "".join(f"J_{s}" for s in range(1, t) if way[s - 1]) or "I"
    axes.set_title(f"t = {t}:  ${factors}$" + ("  (kept)" if kept else ""), fontsize=9, color=colour)
    axes.set(xlim=(-0.4, T + 0.4), ylim=(-0.45, 1.4))
    axes.axis("off")
