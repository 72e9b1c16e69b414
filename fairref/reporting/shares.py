"""Figure 9 of a report, the share of a class in the pictures of each prompt; and the shares in all pictures."""

from fairref.reporting import charts
from fairref.reporting.evaluated import BEFORE, Part, of_judge, share, target_shares, view
from fairref.reporting.run_files import Run
from fairref.reporting.tables import (
    NONE,
    Chart,
    Table,
    attribute_words,
    chart,
    interval,
    percent,
    sentence,
    short,
)

MOST_PROMPTS = 60  # rows of a chart of prompts; the table below it has the others
CHARTED_CLASSES = 4  # of an attribute, each with a chart of its own


def share_charts(run: Run, part: Part) -> list[Chart]:
    """Figure 9: of each attribute the share of a class in the pictures of each prompt, before and after."""
    names = list(part.first.get("attributes", {})) or [part.first["attribute"]]
    return [made for name in names for made in _share_charts(run, part, name)]


def _share_charts(run, part, name):
    before, after = part.pair
    base = before or after
    judge = next(iter(view(base, name)["judges"]), None)
    if judge is None:
        return []
    classes = list(of_judge(base, name, judge)["share"])
    targets = target_shares(run, name)
    # of two classes, the one that shall be rarer says all, as "old" in the paper's figure 9
    chosen = (
        classes[:CHARTED_CLASSES] if len(classes) > 2 else [min(classes, key=lambda c: targets.get(c, 0.5))]
    )
    return [
        _share_chart(part, name, judge, wanted, targets.get(wanted, 1 / len(classes))) for wanted in chosen
    ]


def _share_chart(part, name, judge, wanted, target):
    before, after = part.pair
    one, two = (of_judge(report, name, judge) for report in (before or after, after if before else None))
    prompts = sorted(one["counts"], key=lambda prompt: share(one, prompt, wanted)[0] or 0)
    rows = [(short(p), share(one, p, wanted), share(two, p, wanted) if two else None) for p in prompts]
    others = [j for j in part.judges if j != judge]
    table = [
        [
            short(prompt),
            *(_counted(report, name, judge, prompt, wanted) for report in (before, after) if report),
            *(
                _counted(report, name, j, prompt, wanted)
                for j in others
                for report in (before, after)
                if report
            ),
        ]
        for prompt in prompts
    ]
    labels = [label for label, report in ((BEFORE, before), (part.after, after)) if report]
    head = (
        "prompt",
        *(f"{judge}, {label}" for label in labels),
        *(f"{j}, {label}" for j in others for label in labels),
    )
    words = f"share of {short(wanted)} ({attribute_words(name)})"
    some = (
        ""
        if len(rows) <= MOST_PROMPTS
        else f" {MOST_PROMPTS} of {len(rows)} prompts, evenly chosen from the sorted list."
    )
    kept = (
        rows
        if len(rows) <= MOST_PROMPTS
        else [rows[i * len(rows) // MOST_PROMPTS] for i in range(MOST_PROMPTS)]
    )
    has_interval = any(row[1][1] is not None for row in rows)
    caption = (
        f"{sentence(words)} in the pictures of each prompt by the {judge}, sorted by the first; dashed: the target."
        f" {sentence(part.name)}, {part.size}.{' Pale lines: 95% intervals (Wilson).' if has_interval else ''}{some}"
    )
    listed = Table(
        f"{words}; in brackets the 95% interval; of n images that the judge could tell", head, table
    )
    names = tuple(labels) if len(labels) == 2 else (labels[0], "")
    return chart(caption, listed, charts.dumbbells, kept, target, words, sentence(words), names=names)


def _counted(report, name, judge, prompt, wanted):
    """A share in words: 23% [14%, 35%], n = 60."""
    found = of_judge(report, name, judge)
    n = sum((found or {"counts": {}})["counts"].get(prompt) or [])
    return f"{interval(share(found, prompt, wanted), lambda v: f'{v:.0%}')}, n = {n}" if n else NONE


def joint_tables(run: Run, part: Part) -> list[Table]:
    """The share of each class in all pictures, beside the target."""
    tables = []
    for name in part.views:
        found = {
            (judge, label): of_judge(report, name, judge)
            for judge in part.judges
            for label, report in part.reports.items()
        }
        found = {key: value for key, value in found.items() if value}
        targets = target_shares(run, name)
        classes = list(dict.fromkeys(c for value in found.values() for c in value["share"]))
        rows = [
            (short(c), percent(targets.get(c)), *(_in_all(value, c) for value in found.values()))
            for c in classes
        ]
        head = ("class", "target", *(f"{judge}, {label}" for judge, label in found))
        tables.append(
            Table(
                f"{sentence(attribute_words(name))}: share of each class in all pictures, {part.name}",
                head,
                rows,
            )
        )
    return tables


def _in_all(found, name):
    """A class's share in all pictures, and what it is without the judge's errors, with its interval."""
    corrected = ((found.get("corrected") or {}).get("share") or {}).get(name)
    return percent(found["share"].get(name)) + (
        f"; corrected {interval(corrected, percent)}" if corrected else ""
    )
