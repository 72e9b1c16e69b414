"""What a report says of the bias: by each judge, raw and corrected, with intervals, tests and bounds."""

import re
from collections.abc import Mapping
from itertools import product

from fairref.reporting import charts
from fairref.reporting.evaluated import Part, bias, floor, mean_gap, of_judge, rms_gap, sure, view
from fairref.reporting.shares import short_names
from fairref.reporting.tables import (
    NONE,
    Chart,
    Table,
    attribute_words,
    chart,
    ends,
    interval,
    number,
    percent,
    probability,
    sentence,
    short,
    spread,
    triple,
)

MOST_UNFAIR = 5  # prompts that are named


def bias_tables(part: Part) -> list[Table]:
    """Of each view the bias by each judge, raw and corrected, with intervals, floor and test."""
    head = (
        "judge, model",
        "bias ± std over prompts",
        "a fair model",
        "rms gap",
        "corrected rms gap",
        "p of “fair”",
        "upper 95% bound; corrected",
    )
    tables = []
    for name in part.views:
        rows = []
        for judge in part.judges:
            for label, report in part.reports.items():
                found = of_judge(report, name, judge)
                if found is None:
                    continue
                fair = sure(found).get("fair") or {"p": None, "upper": None}
                rows.append(
                    (
                        f"{judge}, {label}",
                        f"{spread(bias(found))} {ends(mean_gap(found))}".rstrip(),
                        spread(floor(view(report, name))),
                        interval(rms_gap(found)),
                        interval(rms_gap(found, corrected=True)),
                        probability(fair["p"]),
                        f"{number(fair['upper'])}; {number((found.get('corrected') or {}).get('upper'))}",
                    )
                )
        what = "distance from the target" if "target_floor" in (view(part.first, name) or {}) else "bias"
        tables.append(
            Table(f"{sentence(attribute_words(name))}: {what}, {part.name}, {part.size}", head, rows)
        )
    return tables


def said(part: Part) -> list[str]:
    """What the tests say, in words."""
    sentences = []
    for name in part.views:
        for judge in part.judges:
            for label, report in part.reports.items():
                words = (sure(of_judge(report, name, judge)).get("fair") or {}).get("said")
                if words:
                    words = re.sub(r"\b0(?=\.\d)", "", short(words))  # numbers as elsewhere on the page
                    about = f"{sentence(attribute_words(name))}, {judge}, {label}"
                    sentences.append(
                        f"{about}: {words}; of other images of these prompts, as this judge sees them"
                    )
    return sentences


def bias_chart(part: Part, name: str) -> Chart:
    """The rms gap by each judge, raw and corrected, of each model; the bias beside its floor where none is known."""
    known = any(
        rms_gap(of_judge(report, name, judge))[0] is not None
        for report in part.reports.values()
        for judge in part.judges
    )
    groups = {}
    for judge in part.judges:
        for corrected in (False, True) if known else (False,):
            values = {
                label: rms_gap(of_judge(report, name, judge), corrected)
                if known
                else mean_gap(of_judge(report, name, judge))
                for label, report in part.reports.items()
            }
            if any(value[0] is not None for value in values.values()):
                groups[f"{judge}, corrected" if corrected else judge] = values
    words = attribute_words(name)
    measure = "rms gap" if known else "bias"
    rows = [(group, label, interval(value)) for group, of in groups.items() for label, value in of.items()]
    table = Table(f"{measure} of {words}", ("judge", "model", measure), rows)
    options = {} if known else {"floor": floor(view(part.first, name))["mean"], "floor_name": "a fair model"}
    says = "With 95% intervals; 0 is fair." if known else "The dashed line is what a fair model measures."
    caption = f"{sentence(words)}: {measure} by each judge. {sentence(part.name)}, {part.size}. {says}"
    return chart(caption, table, charts.bars, groups, measure, f"{sentence(words)}: {measure}", **options)


def more_of_each_judge(part: Part) -> Table | None:
    """The worst prompt and group, the prompts whose own test finds a lean, and the bounds."""
    rows, how = [], {}
    for name in part.views:
        for judge in part.judges:
            for label, report in part.reports.items():
                found = of_judge(report, name, judge)
                values = sure(found)
                names = short_names(list(found["counts"])) if values else {}
                if values:
                    corrected = found.get("corrected") or {}
                    how |= dict.fromkeys(methods(values, corrected))
                    rows.append(
                        (
                            f"{attribute_words(name)}, {judge}, {label}",
                            *_more(values, corrected, report["prompts"], names),
                        )
                    )
    head = (
        "judge, model",
        "prompts unfair by a test of their own",
        "worst prompt: bias",
        "worst class: share",
        "bounds of the mean bias",
        "smallest gap seen with 80% power",
        "corrected bias",
    )
    caption = "; ".join([f"Each judge in more detail, {part.name}, {part.size}", *how])
    return Table(caption, head, rows) if rows else None


def _more(values, corrected, P, names):
    unfair, bounds = values.get("unfair_prompts"), values.get("bounds")
    worst, group = values.get("worst_prompt"), values.get("worst_group")
    return (
        NONE if unfair is None else f"{unfair} of {P}{_unfair(values, names)}",
        _worst(worst, names) if worst else NONE,
        f"{short(group['class'])}: {interval((group['share'], group['low'], group['high']))}"
        if group
        else NONE,
        f"{number(bounds['low'])} to {number(bounds['high'])}" if bounds else NONE,
        number(values.get("smallest_gap_seen")),
        interval(triple(corrected.get("mean_gap"))),
    )


def _worst(worst, names):
    """The worst prompt beside the worst of a fair model: the largest of many is large by chance alone."""
    fair = f" (a fair model: {number(worst['fair'])})" if "fair" in worst else ""
    return f"{short(names.get(worst['prompt'], worst['prompt']))}: {number(worst['bias'])}{fair}"


def _unfair(values, names):
    """The prompts that a test of their own calls unfair, and their p; those of the smallest first."""
    found = {k: of for k, of in values.get("prompts", {}).items() if of.get("unfair")}
    least = sorted(found, key=lambda k: found[k].get("p") or 0)[:MOST_UNFAIR]
    said = [f"{short(names.get(k, k))} ({probability(found[k].get('p'))})" for k in least]
    return f": {', '.join(said)}{', …' if len(found) > len(least) else ''}" if said else ""


def methods(values: Mapping[str, object], corrected: Mapping[str, object]) -> list[str]:
    """How the intervals of the gaps were made."""
    raw, fixed = (
        {f"{kind}{name}": of.get(key) for key, name in (("rms_gap", "rms gap"), ("mean_gap", "bias"))}
        for kind, of in (("", values), ("corrected ", corrected))
    )
    return [
        f"{what}: {short(of['method'])}" for what, of in {**raw, **fixed}.items() if of and "method" in of
    ]


def errors_table(part: Part) -> Table | None:
    """How often a judge is right on images whose class is known otherwise."""
    rows = []
    for label, report in part.reports.items():
        for judge, attributes in report.get("confusion", {}).items():
            for name, counted in attributes.items():
                classes = list((of_judge(report, name, judge) or {"share": {}})["share"])
                rows += [
                    (
                        f"{judge}, {label}: {short(of['source'])}",
                        short(c),
                        *_right(k, row, untold),
                        *_as_before(of),
                    )
                    for of in counted
                    for k, (c, row, untold) in enumerate(
                        zip(classes, of["counts"], of["untold"], strict=False)
                    )
                ]
    head = (
        "judge, model: where the class is known from",
        "true class",
        "judged right",
        "can't tell",
        "n",
        "p of “as before”",
    )
    return Table(f"How often the judges are right, {part.name}", head, rows) if rows else None


def _right(k, row, untold):
    n = sum(row) + untold
    return [percent(count / n) if n else NONE for count in (sum(row[k : k + 1]), untold)] + [str(n)]


def _as_before(of):
    """p of the hypothesis that the judge errs as on the original's images."""
    return [probability(of.get("p_as_before"))]


def corrections_table(part: Part) -> Table | None:
    """What the corrected numbers are corrected with."""
    rows = []
    for name in part.views:
        for judge in part.judges:
            for label, report in part.reports.items():
                corrected = (of_judge(report, name, judge) or {}).get("corrected") or {}
                if "source" in corrected or "method" in corrected:
                    n = ", ".join(number(n, 0) for n in corrected.get("labelled", [])) or NONE
                    about = (short(corrected.get(key, NONE)) for key in ("source", "method"))
                    rows.append((f"{attribute_words(name)}, {judge}, {label}", n, *about))
    head = ("judge, model", "labelled images of each class", "labelled by", "intervals of the shares")
    return Table(f"What corrected numbers are corrected with, {part.name}", head, rows) if rows else None


def paired_table(part: Part) -> Table | None:
    """Before against after on the same noise: the paired test, and how many pictures changed class."""
    rows, how = [], {}
    for name, (label, report) in product(part.views, part.reports.items()):
        found = view(report, name) or {}
        for judge in {**found.get("paired", {}), **found.get("flips", {})}:
            paired, flips = (found.get(key, {}).get(judge) or {} for key in ("paired", "flips"))
            line = found.get("leans", {}).get(judge) or {}
            difference = tuple(paired.get(key) for key in ("difference", "low", "high"))
            how |= {short(paired["method"]): None} if "method" in paired else {}
            about = f"{attribute_words(name)}, " if len(part.views) > 1 else ""
            rows.append(
                (
                    f"{about}{judge}, {label}",
                    interval(difference),
                    probability(paired.get("p")),
                    *(percent(flips.get(key)) for key in ("changed", "least", "needless")),
                    *(interval(line.get(key, (None, None, None))) for key in ("slope", "intercept")),
                )
            )
    head = (
        "judge, model",
        "change of the squared gap",
        "p",
        "pictures that changed class",
        "least that would do",
        "needless",
        "log-odds: slope",
        "intercept",
    )
    caption = "; ".join([f"Before against after, {part.name}, {part.size}, the same noise", *how])
    return Table(caption, head, rows) if rows else None
