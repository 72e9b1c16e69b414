"""What a report says of the course of finetuning, of sweeps and of baselines."""

from collections.abc import Mapping, Sequence

import numpy as np

from fairref.reporting import charts
from fairref.reporting.evaluated import (
    BEFORE,
    Part,
    Report,
    bias,
    floor,
    mean_gap,
    of_judge,
    prompts_name,
    rms_gap,
    size,
    sure,
    view,
)
from fairref.reporting.run_files import Run
from fairref.reporting.tables import (
    SLASH,
    Chart,
    Table,
    attribute_words,
    chart,
    interval,
    number,
    percent,
    sentence,
    short,
    spread,
)

BINS = 40  # points of a curve, at most
TERMS = {"align": "L_align", "image": "L_img", "face": "L_face", "text": "L_text"}


def curves(run: Run) -> list[Chart]:
    """The loss and its terms, the transport cost, and the bias, by iteration."""
    own = [own["name"] for own in run.settings.get("loss", []) if isinstance(own.get("name"), str)]
    terms = {"loss": "loss", **TERMS, **{name: short(name) for name in own}}
    found = [
        _curve_chart(
            run, terms, "Loss and its terms", "mean over the batch; the terms without their weights"
        ),
        _curve_chart(run, {"cost": "cost"}, "Transport cost", "how far the batch is from the target"),
        _curve_chart(
            run,
            {"bias": "batches", "validation": "validations"},
            "Bias while it learns",
            "bias of each batch, and of validations",
        ),
    ]
    return [made for made in found if made]


def _curve_chart(run, keys, title, what):
    series = {name: _binned(run.metrics, key) for key, name in keys.items()}
    series = {name: rows for name, rows in series.items() if rows}
    if not series:
        return None
    cells = {
        x: [next((_cell(row) for row in rows if row["x"] == x), "–") for rows in series.values()]
        for x in sorted({row["x"] for rows in series.values() for row in rows})
    }
    table = Table(
        f"{title}, by iteration", ("iteration", *series), [(str(round(x)), *of) for x, of in cells.items()]
    )
    count = max(1, -(-len(run.metrics) // BINS))
    of = (
        f"Each point is the mean of {count} iterations; bands: their 5th to 95th percentile."
        if count > 1
        else "Each iteration."
    )
    return chart(f"{title}: {what}. {of}", table, charts.curves, series, "iteration", what, title)


def _binned(metrics: Sequence[Mapping[str, object]], key: str) -> list[dict[str, float | None]]:
    """A metric's points: {"x", "mean", "low", "high"}; of "validation" its bias, each alone."""
    values = [(row["iteration"], row.get(key)) for row in metrics]
    if key == "validation":
        values = [(i, of.get("bias")) for i, of in values if of]
    values = [
        (i, v) for i, v in values if isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e12
    ]
    count = 1 if key == "validation" else max(1, -(-len(metrics) // BINS))
    bins = {}
    for i, v in values:
        bins.setdefault(i // count, []).append((i, v))
    rows = []
    for of in bins.values():
        x, v = np.array(of, dtype=float).T
        low, high = np.quantile(v, (0.05, 0.95)) if count > 1 else (None, None)
        rows.append({"x": float(x.mean()), "mean": float(v.mean()), "low": low, "high": high})
    return rows


def _is_shown(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12


def _cell(row):
    return interval((row["mean"], row["low"], row["high"]), lambda v: number(v, 3))


def guidance_charts(run: Run) -> list[Chart]:
    """Bias, and the share of a class, at each guidance scale."""
    sweep = run.guidance
    judged = _judged(sweep)
    if not judged:
        return []
    known = all(rms_gap(of)[0] is not None for rows in judged.values() for of in rows)
    measure = "rms gap" if known else "bias"
    gaps = {name: [rms_gap(of) if known else mean_gap(of) for of in rows] for name, rows in judged.items()}
    (_, judge), first = next(iter(judged)), next(iter(next(iter(judged.values()))[0]["share"]))
    shares = {name: [(of["share"].get(first), None, None) for of in rows] for name, rows in judged.items()}
    report = next(iter(sweep["reports"].values()))[0]
    about = f"{attribute_words(report['attribute'])} by the {judge}, {prompts_name(report)}, {size(report)}"
    level = number(floor(view(report, report["attribute"]))["mean"])
    says = "with 95% intervals; a fair model has 0 on average" if known else f"a fair model measures {level}"
    return [
        _sweep_chart(
            sweep["values"], gaps, measure, f"{sentence(measure)} at each guidance scale", f"{about}; {says}."
        ),
        _sweep_chart(
            sweep["values"],
            shares,
            f"share of {short(first)}",
            f"Share of {short(first)} at each guidance scale",
            f"{about}; in all pictures.",
            percent,
        ),
    ]


def _judged(sweep):
    """Label and judge -> what it says at each value of a sweep."""
    found = {}
    for label, reports in sweep["reports"].items():
        for judge in reports[0]["judges"] if reports else ():
            rows = [of_judge(report, report["attribute"], judge) for report in reports]
            if all(rows):
                found[label, judge] = rows
    return found


def _sweep_chart(values, series, measure, title, about, said=lambda v: number(v, 3)):
    """The first judge's curves, and all judges' numbers."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    (_, first), *_ = series
    drawn = {
        label: [dict(zip(("x", "mean", "low", "high"), (values[i], *rows[i]), strict=True)) for i in order]
        for (label, judge), rows in series.items()
        if judge == first
    }
    rows = [(f"{values[i]:g}", *(interval(of[i], said) for of in series.values())) for i in order]
    table = Table(title, ("guidance", *(f"{judge}, {label}" for label, judge in series)), rows)
    return chart(f"{title}: {about}", table, charts.curves, drawn, "guidance scale", measure, title)


def pareto_chart(run: Run) -> Chart | None:
    """Bias against likeness to the original, over the adapter's strength, and the baselines as points."""
    series, rows = {}, []
    for label, reports in run.strength["reports"].items():
        if label == BEFORE and reports:
            _add_points(series, rows, label, [("the original", {"clip_i": 1.0, **reports[0]})])
            continue
        named = [
            (f"{value:g}", report) for value, report in zip(run.strength["values"], reports, strict=True)
        ]
        named = sorted(named, key=lambda pair: float(pair[0]))
        _add_points(series, rows, label, named)
    for name, of in (run.baselines or {}).items():
        _add_points(series, rows, short(name), [(short(name), report) for report in list(of.values())[:1]])
    if not series:
        return None
    known = all(point[2][1] is not None for points in series.values() for point in points)
    measure = "rms gap" if known else "bias"
    report = next(iter(run.strength["reports"].values()))[0]
    about = f"{attribute_words(report['attribute'])} by the {next(iter(report['judges']))}, {size(report)}"
    caption = f"{sentence(measure)} against CLIP-I over the adapter's strength (beside each point). {sentence(about)}."
    table = Table("Strength, likeness and bias", ("model, strength", "CLIP-I", "bias ± std", "rms gap"), rows)
    return chart(
        caption, table, charts.scatter, series, "CLIP-I with the original", measure, "What fairness costs"
    )


def _add_points(series, rows, label, named):
    points = []
    for name, report in named:
        judge = next(iter(report["judges"]), None)
        found = of_judge(report, report["attribute"], judge)
        gap = rms_gap(found) if sure(found) else mean_gap(found)
        likeness = report.get("clip_i")
        if likeness is not None and gap[0] is not None:
            points.append((name, (likeness, None, None), gap))
            rows.append(
                (
                    label if label == name else f"{label}, {name}",
                    number(likeness, 3),
                    spread(bias(found)),
                    interval(rms_gap(found)),
                )
            )
    if points:
        series[label] = points


def baselines_table(run: Run, part: Part | None) -> Table | None:
    """Every way to a fairer model on the same noise; before and after finetuning stand first."""
    if not run.baselines:
        return None
    named = (
        []
        if part is None
        else [(f"fairref, {k}" if k != BEFORE else "the original", r) for k, r in part.reports.items()]
    )
    for name, of in run.baselines.items():
        named += [(short(name), report) for key, report in of.items() if part is None or key == part.key]
    if not named:
        return None
    judges = list(dict.fromkeys(judge for _, report in named for judge in report["judges"]))
    rows = [
        (f"{name}, {report['prompts']} × {report['images']}", *_way(report, judges)) for name, report in named
    ]
    by = " / ".join(judges)
    head = (
        "way, n",
        f"bias ({by})",
        "corrected rms gap",
        "needless flips",
        "CLIP-T",
        "CLIP-I",
        "DINO",
        "explicit prompts",
    )
    return Table(f"Ways to a fairer model on the same noise; two numbers are those of {by}", head, rows)


def _way(report: Report, judges: Sequence[str]) -> list[str]:
    """A row of the baselines' table."""
    found = [of_judge(report, report["attribute"], judge) for judge in judges]
    flips, asked = report.get("flips", {}), report.get("explicit", {})
    return [
        SLASH.join(spread(bias(of)) for of in found),
        SLASH.join(interval(rms_gap(of, corrected=True)) for of in found),
        SLASH.join(percent((flips.get(judge) or {}).get("needless")) for judge in judges),
        number((report.get("clip_t") or {}).get("matched"), 3),
        *(number(report.get(key), 3) for key in ("clip_i", "dino")),
        SLASH.join(percent(asked.get(judge)) for judge in judges),
    ]
