"""What a report says of the course of finetuning: the loss and its terms, the transport cost, the bias."""

from collections.abc import Mapping, Sequence

import numpy as np

from fairref.reporting import charts
from fairref.reporting.run_files import LARGEST_NUMBER, Run
from fairref.reporting.tables import Chart, Table, chart, interval, number, short

BINS = 40  # points of a curve, at most
TERMS = {"align": "L_align", "image": "L_img", "face": "L_face", "text": "L_text"}
NAMING = "loss (named)"
Metrics = Sequence[Mapping[str, object]]


def curves(run: Run) -> list[Chart]:
    """The loss and its terms, the transport cost, and the bias, by iteration; of prompts that name a class apart."""
    own = [own["name"] for own in run.settings.get("loss", []) if isinstance(own.get("name"), str)]
    terms = {"loss": "loss", **TERMS, **{name: short(name) for name in own}}
    width = max(1, -(-len(run.metrics) // BINS))
    neutral = [row for row in run.metrics if not names_a_class(row)]
    naming = [row for row in run.metrics if names_a_class(row)]
    said = (
        f"Each point is the mean of {width} iterations; bands: their 5th to 95th percentile."
        if width > 1
        else ""
    )
    if naming:
        said += f" {len(naming)} of {len(run.metrics)} iterations, whose prompt names a class, are left out"
    apart = ", but for “loss (named)”, which is theirs." if naming else ""
    out = "." if naming else ""
    validations = [
        {"iteration": row["iteration"], "bias": row["validation"].get("bias")}
        for row in run.metrics
        if row.get("validation")
    ]
    found = [
        (
            "Loss and its terms",
            "mean over the batch; the terms without their weights",
            {name: binned(neutral, key, width) for key, name in terms.items()}
            | {NAMING: binned(naming, "loss", width)},
            said + apart,
            (0,),
        ),
        (
            "Transport cost",
            "how far the batch is from the target",
            {"cost": binned(neutral, "cost", width)},
            said + out,
            (0,),
        ),
        (
            "Bias while it learns",
            "bias of each batch, and of validations",
            {"batches": binned(neutral, "bias", width), "validations": binned(validations, "bias", 1)},
            said + out,
            charts.BIASES,
        ),
    ]
    return [_chart(*of) for of in found if any(of[2].values())]


def names_a_class(row: Mapping[str, object]) -> bool:
    """Whether the iteration's prompt did: then its images have counts, but there is no bias to speak of."""
    return bool(row.get("counts")) and np.any(row["counts"]) and "bias" not in row


def _chart(title, what, series, said, holds):
    series = {name: rows for name, rows in series.items() if rows}
    cells = {
        x: [next((_cell(row) for row in rows if row["x"] == x), "–") for rows in series.values()]
        for x in sorted({row["x"] for rows in series.values() for row in rows})
    }
    rows = [(str(round(x)), *of) for x, of in cells.items()]
    table = Table(f"{title}, by iteration", ("iteration", *series), rows)
    caption = f"{title}: {what}. {said}".strip()
    return chart(caption, table, charts.curves, series, "iteration", what, title, holds=holds, under="loss")


def binned(metrics: Metrics, key: str, width: int) -> list[dict[str, float | None]]:
    """A metric's points {"x", "mean", "low", "high"}, each of the iterations in a stretch of `width` around x."""
    bins = {}
    for row in metrics:
        value = row.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST_NUMBER:
            bins.setdefault(row["iteration"] // width, []).append(float(value))
    rows = []
    for i, v in bins.items():
        low, high = np.quantile(v, (0.05, 0.95)) if width > 1 else (None, None)
        rows.append({"x": i * width + (width - 1) / 2, "mean": float(np.mean(v)), "low": low, "high": high})
    return rows


def _cell(row):
    return interval((row["mean"], row["low"], row["high"]), lambda v: number(v, 3))
