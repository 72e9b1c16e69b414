"""What a report says of all that finetuning should keep, and of several concepts."""

from collections.abc import Mapping, Sequence

from fairref.reporting.evaluated import Part, Report, bias, floor, of_judge, prompts_name, size, view
from fairref.reporting.tables import (
    NONE,
    SLASH,
    Table,
    attribute_words,
    likeness,
    number,
    percent,
    short,
    spread,
)

MEASURES = (  # key of a report, what it is called, what it says
    ("clip_i", "CLIP-I", "likeness to the original's picture of the same noise; 1 is the same picture"),
    ("dino", "DINO", "the same by another network"),
    (
        "background",
        "background's colour",
        "how much of the original's is kept; 0: no more than another picture has of it",
    ),
    ("clothes", "clothes' colour", "the same for the clothes"),
)


def kept_table(part: Part) -> Table:
    """What else the pictures are: likeness, fit to the prompt, and what no judge could tell."""
    reports = part.reports.values()
    rows = []
    for key, name, what in (
        ("matched", "CLIP-T", "fit to the own prompt"),
        ("shuffled", "CLIP-T of others", "fit to other prompts"),
    ):
        rows.append((f"{name}: {what}", *(number((r.get("clip_t") or {}).get(key), 3) for r in reports)))
    rows += [(f"{name}: {what}", *(likeness(r.get(key)) for r in reports)) for key, name, what in MEASURES]
    for kind in dict.fromkeys(kind for r in reports for kind in r.get("diversity", {})):
        what = f"diversity within a class ({short(kind)}): mean distance of two pictures"
        rows.append((what, *(number(r.get("diversity", {}).get(kind), 3) for r in reports)))
    for key, what in (
        ("faceless", "no face found"),
        ("none", "left out by the template judge: nobody, or a blend"),
        ("blended", "largest class probability below .8"),
    ):
        rows.append((what, *(percent(r.get(key)) for r in reports)))
    rows = [row for row in rows if set(row[1:]) != {NONE}]
    return Table(f"What else the pictures are, {part.name}, {part.size}", ("measure", *part.reports), rows)


def explicit_table(evaluated: Sequence[Part]) -> Table | None:
    """The share of pictures that show the class that their prompt names."""
    asked = [
        (part, {label: report["explicit"] for label, report in part.reports.items() if "explicit" in report})
        for part in evaluated
    ]
    labels = list(dict.fromkeys(label for _, of in asked for label in of))
    rows = [
        (
            f"{judge}, {part.name}, {part.file}",
            number(next(iter(of.values())).get("images"), 0),
            *(percent(of.get(label, {}).get(judge)) for label in labels),
        )
        for part, of in asked
        for judge in dict.fromkeys(judge for shares in of.values() for judge in shares if judge != "images")
    ]
    head = ("judge, prompts, file", "n images", *labels)
    return Table("Prompts that name a class: pictures that show it", head, rows) if rows else None


def terms_table(evaluation: Mapping[str, Mapping[str, Report]] | None) -> Table | None:
    """Of a run without a target: each term of its loss, before and after."""
    found = {
        (label, key): report
        for label, of in (evaluation or {}).items()
        for key, report in of.items()
        if "terms" in report
    }
    if not found:
        return None
    names = dict.fromkeys(name for report in found.values() for name in report["terms"])
    rows = [
        (short(name), *(number(report["terms"].get(name), 4) for report in found.values())) for name in names
    ]
    head = ("term", *(f"{label}, {prompts_name(report)}" for (label, _), report in found.items()))
    return Table(f"Mean of each term of the loss, {size(next(iter(found.values())))}", head, rows)


def concepts_table(evaluated: Sequence[Part]) -> Table | None:
    """Table 2: the bias on several concepts, before and after."""
    unseen = [part for part in evaluated if part.first["part"] == "test"]
    if len({part.first["concept"] for part in unseen}) < 2:
        return None
    rows = []
    for part in unseen:
        for label, report in part.reports.items():
            biases = [
                SLASH.join(spread(bias(of_judge(report, name, judge))) for judge in report["judges"])
                for name in part.views
            ]
            floors = "; ".join(spread(floor(view(report, name))) for name in part.views)
            clip = [
                number((report.get("clip_t") or {}).get("matched"), 3),
                *(likeness(report.get(k)) for k in ("clip_i", "dino")),
            ]
            rows.append((f"{part.name}, {label}, {part.size}", *biases, floors, *clip))
    views = [attribute_words(name) for name in unseen[0].views]
    head = ("prompts, model, n", *views, "a fair model", "CLIP-T", "CLIP-I", "DINO")
    judges = " / ".join(unseen[0].judges)
    return Table(
        f"Table 2. Several concepts at once: bias by {judges}, mean ± standard deviation over prompts",
        head,
        rows,
    )
