"""What a report says of other guidance scales and of an adapter's other strengths."""

from collections.abc import Mapping, Sequence

from fairref.reporting import charts
from fairref.reporting.evaluated import (
    BEFORE,
    Report,
    bias,
    floor,
    made_words,
    mean_gap,
    of_judge,
    prompts_name,
    rms_gap,
    same_noise,
    size,
    target_shares,
    view,
)
from fairref.reporting.run_files import Run
from fairref.reporting.svg import bare
from fairref.reporting.tables import (
    Chart,
    Interval,
    Table,
    attribute_words,
    chart,
    interval,
    likeness,
    number,
    percent,
    sentence,
    short,
    spread,
)

FAIR = "fair"
Judged = Mapping[str, object]  # what a judge says of a view


def guidance_charts(run: Run) -> list[Chart]:
    """Bias, and the share of a class, at each guidance scale."""
    sweep = run.guidance
    judged = _judged(sweep)
    if not judged:
        return []
    measure, of = gaps([found for rows in judged.values() for found in rows])
    (_, judge), first = next(iter(judged)), next(iter(next(iter(judged.values()))[0]["share"]))
    report = next(iter(sweep["reports"].values()))[0]
    name = report["attribute"]
    about = f"{attribute_words(name)} by the {judge}, {_words(report, 'guidance')}"
    by_gap = {label: [of(found) for found in rows] for label, rows in judged.items()}
    by_share = {
        label: [(found["share"].get(first), None, None) for found in rows] for label, rows in judged.items()
    }
    target = target_shares(run, name).get(first)
    return [
        _sweep_chart(
            sweep["values"],
            by_gap,
            (measure, f"{sentence(measure)} at each guidance scale", f"{about}; {_says(measure)}"),
            holds=charts.BIASES,
            marked=_floor(report, measure),
        ),
        _sweep_chart(
            sweep["values"],
            by_share,
            (
                f"share of {short(first)}",
                f"Share of “{short(first)}” at each guidance scale",
                f"{about}; in all pictures.",
            ),
            percent,
            percent=True,
            marked=None if target is None else (target, "target"),
        ),
    ]


def gaps(judged: Sequence[Judged | None]) -> tuple[str, object]:
    """What is drawn of judges' numbers, and its function: the rms gap where all have it, else the bias."""
    known = all(rms_gap(found)[0] is not None for found in judged)
    return ("rms gap", rms_gap) if known else ("bias", mean_gap)


def _says(measure):
    return (
        "with 95% intervals; 0 is fair."
        if measure == "rms gap"
        else "the dashed line is what a fair model measures."
    )


def _floor(report, measure):
    """A bias is held against what a fair model measures, an rms gap against 0."""
    level = floor(view(report, report["attribute"]))["mean"]
    return None if measure == "rms gap" or level is None else (level, FAIR)


def _words(report: Report, changed: str) -> str:
    """What a sweep is of, and how its images were made."""
    how = {**report, changed: None, "made": {**(report.get("made") or {}), changed: None}}
    return f"{prompts_name(report)}, {size(report)}, {made_words({BEFORE: how})}"


def _judged(sweep):
    """Label and judge -> what it says at each value of a sweep."""
    found = {}
    for label, reports in sweep["reports"].items():
        for judge in reports[0]["judges"] if reports else ():
            rows = [of_judge(report, report["attribute"], judge) for report in reports]
            if all(rows):
                found[label, judge] = rows
    return found


def _sweep_chart(values, series, words, said=number, **options):
    """The first judge's curves, and all judges' numbers."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    (_, first), *_ = series
    drawn = {
        label: [dict(zip(("x", "mean", "low", "high"), (values[i], *rows[i]), strict=True)) for i in order]
        for (label, judge), rows in series.items()
        if judge == first
    }
    measure, title, about = words
    rows = [(f"{values[i]:g}", *(interval(of[i], said) for of in series.values())) for i in order]
    table = Table(title, ("guidance", *(f"{judge}, {label}" for label, judge in series)), rows)
    return chart(
        f"{title}: {about}", table, charts.curves, drawn, "guidance scale", measure, title, **options
    )


def pareto_chart(run: Run) -> Chart | None:
    """Bias against likeness over the adapter's strength, with baselines of the same images as points."""
    named = {label: reports for label, reports in run.strength["reports"].items() if reports}
    if not named:
        return None
    first = next(iter(named.values()))[0]
    points = {}
    for label, reports in named.items():
        pairs = sorted(zip(run.strength["values"], reports, strict=True), key=lambda pair: pair[0])
        points[label] = [(bare(f"{value:g}"), report) for value, report in pairs]
    if BEFORE in points:
        points[BEFORE] = [("the original", {**named[BEFORE][0], "clip_i": 1.0})]
    others = {
        name: report
        for name, of in (run.baselines or {}).items()
        for report in of.values()
        if _is_comparable(report, first)
    }
    points |= {short(name): [(short(name), report)] for name, report in others.items()}
    return _scatter(points, first, [short(name) for name in run.baselines or {} if name not in others])


def _is_comparable(report, first):
    return (
        report["attribute"] == first["attribute"]
        and size(report) == size(first)
        and same_noise(report, first)
    )


def _scatter(points, first, left_out):
    """Label -> (name, report) as a chart and a table."""
    name, judge = first["attribute"], next(iter(first["judges"]), "")
    known = {
        label: [(of, r["clip_i"], of_judge(r, name, judge)) for of, r in pairs if r.get("clip_i") is not None]
        for label, pairs in points.items()
    }
    known = {label: [of for of in rows if of[2] is not None] for label, rows in known.items()}
    measure, gap = gaps([found for rows in known.values() for *_, found in rows])
    series: dict[str, list[tuple[str, Interval, Interval]]] = {
        label: [
            (of, (alike, None, None), gap(found)) for of, alike, found in rows if gap(found)[0] is not None
        ]
        for label, rows in known.items()
    }
    series = {label: rows for label, rows in series.items() if rows}
    if not series:
        return None
    rows = [
        (
            label if label == of else f"{label}, {of}",
            likeness(alike),
            spread(bias(found)),
            interval(rms_gap(found)),
        )
        for label, of_label in known.items()
        for of, alike, found in of_label
    ]
    caption = (
        f"{sentence(measure)} against CLIP-I over the adapter's strength, which stands beside each point."
        f" {sentence(attribute_words(name))} by the {judge}, {_words(first, 'strength')}; {_says(measure)}"
    )
    if left_out:
        caption += f" Left out, being of other prompts, noise or numbers of images: {', '.join(left_out)}."
    table = Table("Strength, likeness and bias", ("model, strength", "CLIP-I", "bias ± std", "rms gap"), rows)
    options = {"holds": ((0.95, 1), charts.BIASES), "marked": _floor(first, measure)}
    words = ("CLIP-I with the original", measure, "What fairness costs")
    return chart(caption, table, charts.scatter, series, *words, **options)
