"""What a report says of other ways to a fairer model."""

from collections.abc import Sequence

from fairref.reporting.evaluated import (
    BEFORE,
    Part,
    Report,
    bias,
    made_words,
    of_judge,
    prompts_name,
    rms_gap,
    same_noise,
    size,
    view,
)
from fairref.reporting.run_files import Run
from fairref.reporting.tables import (
    SLASH,
    Table,
    attribute_words,
    interval,
    likeness,
    number,
    percent,
    short,
    spread,
)


def tables(run: Run, evaluated: Sequence[Part]) -> list[Table]:
    """One for baselines of the same images, with the run's own models first, where it was evaluated on these."""
    groups: dict[tuple[str, ...], list[tuple[str, Report]]] = {}
    for name, of in (run.baselines or {}).items():
        for report in of.values():
            how = (report["attribute"], prompts_name(report), size(report), made_words({BEFORE: report}))
            groups.setdefault(how, []).append((short(name), report))
    return [_table(how, named, evaluated) for how, named in groups.items()]


def _table(how, named, evaluated):
    attribute, report = how[0], named[0][1]
    same = (part for part in evaluated if attribute in part.views and part.size == size(report))
    part = next((part for part in same if all(same_noise(part.first, of) for _, of in named)), None)
    models = part.reports.items() if part else ()
    named = [(f"fairref, {k}" if k != BEFORE else "the original", r) for k, r in models] + named
    judges = list(dict.fromkeys(judge for _, of in named for judge in of["judges"]))
    by = " / ".join(judges)
    head = (
        "way",
        f"bias ({by})",
        "corrected rms gap",
        "needless flips",
        "CLIP-T",
        "CLIP-I",
        "DINO",
        "explicit prompts",
    )
    alone = "" if part else "; the run itself was not evaluated on these images"
    about = f"{attribute_words(attribute)}, {', '.join(how[1:])}"
    caption = f"Ways to a fairer model on the same noise: {about}{alone}; two numbers are those of {by}"
    return Table(caption, head, [(name, *_way(of, attribute, judges)) for name, of in named])


def _way(report: Report, attribute: str, judges: Sequence[str]) -> list[str]:
    """A row of the table. Explicit prompts of a report on more attributes are not of this one alone."""
    found = [of_judge(report, attribute, judge) for judge in judges]
    flips = (view(report, attribute) or {}).get("flips", {})
    asked = report.get("explicit", {}) if report["attribute"] == attribute else {}
    return [
        SLASH.join(spread(bias(of)) for of in found),
        SLASH.join(interval(rms_gap(of, corrected=True)) for of in found),
        SLASH.join(percent((flips.get(judge) or {}).get("needless")) for judge in judges),
        number((report.get("clip_t") or {}).get("matched"), 3),
        *(likeness(report.get(key)) for key in ("clip_i", "dino")),
        SLASH.join(percent(asked.get(judge)) for judge in judges),
    ]
