"""Figure 9: the share of a class in the images of each prompt, before and after; and the shares in all images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from fairref.reporting import charts
from fairref.reporting.evaluated import BEFORE, Part, Report, of_judge, share, target_shares, view
from fairref.reporting.run_files import Run
from fairref.reporting.tables import (
    NONE,
    Chart,
    Interval,
    Table,
    attribute_words,
    chart,
    interval,
    percent,
    sentence,
    short,
)

MOST_PROMPTS = 60  # rows of a chart of prompts; the table below it has the others
CHARTED_CLASSES = 4  # of an attribute, each with a chart of its own in a report
Row = tuple[str, Interval, Interval | None]  # prompt, share before, share after; None: one model alone


@dataclass(frozen=True)
class ClassShares:
    """The shares of one class in the images of each prompt, as a judge sees them; the smallest first."""

    attribute: str
    name: str  # of the class
    target: float
    judge: str
    labels: tuple[str, ...]  # of one model or two
    rows: Sequence[Row]

    @property
    def words(self) -> str:
        """Such as: share of “woman” (apparent gender) by the classifier."""
        return f"share of “{short(self.name)}” ({attribute_words(self.attribute)}) by the {short(self.judge)}"

    def draw(self, rows: Sequence[Row], title: str, x_label: str, width: float = charts.WIDTH) -> str:
        """Some of the rows as SVG, prompts without the words that all of them share."""
        names = short_names([prompt for prompt, *_ in self.rows])
        shown = [(short(names[prompt]), *shares) for prompt, *shares in rows]
        labels = (*map(short, self.labels), "")[:2]
        return charts.dumbbells(shown, self.target, x_label, title, names=labels, width=width)


def shares_of(
    reports: Mapping[str, Report], attribute: str, targets: Mapping[str, float], most: int | None = None
) -> list[ClassShares]:
    """The classes of an attribute by the first judge, of one report or of those before and after.

    Of two classes the one that shall be rarer says all, as "old" in the paper's figure 9. Of more each, or the first
    `most`.
    """
    first = next(iter(reports.values()))
    judge = next(iter(view(first, attribute)["judges"]), None)
    if judge is None:
        return []
    found = [of_judge(report, attribute, judge) for report in reports.values()]
    classes = list(found[0]["share"])
    chosen = classes[:most] if len(classes) > 2 else [min(classes, key=lambda c: targets.get(c, 1 / 2))]
    made = []
    for name in chosen:
        rows = [
            (prompt, *[*(share(of_model, prompt, name) for of_model in found), None][:2])
            for prompt in found[0]["counts"]
        ]
        rows.sort(key=lambda row: (row[1][0] is None, row[1][0], row[0]))
        made.append(
            ClassShares(attribute, name, targets.get(name, 1 / len(classes)), judge, tuple(reports), rows)
        )
    return made


def short_names(prompts: Sequence[str]) -> dict[str, str]:
    """Prompt -> what is left without the words with which all of them begin and end."""
    start = "".join(_common(prompts).rpartition(" ")[:2])
    ends = [prompt.removeprefix(start) for prompt in prompts]
    end = _common([text[::-1] for text in ends])[::-1]
    end = end[next((i for i, letter in enumerate(end) if not letter.isalnum()), len(end)) :]
    names = [text.removesuffix(end) for text in ends] if len(prompts) > 1 else []
    return dict(zip(prompts, names if names and all(names) else prompts, strict=True))


def _common(texts):
    """What all of them begin with."""
    return "".join(of[0] for of in takewhile(lambda of: len(set(of)) == 1, zip(*texts, strict=False)))


def share_charts(run: Run, part: Part) -> list[Chart]:
    """Figure 9: of each attribute the share of a class in the pictures of each prompt, before and after."""
    names = list(part.first.get("attributes", {})) or [part.first["attribute"]]
    models = {label: part.reports[label] for label in (BEFORE, part.after) if label in part.reports}
    return [
        _share_chart(part, models, shares)
        for name in names
        for shares in shares_of(models, name, target_shares(run, name), CHARTED_CLASSES)
    ]


def _share_chart(part, models, shares):
    rows, name = shares.rows, shares.attribute
    kept = (
        [rows[i * len(rows) // MOST_PROMPTS] for i in range(MOST_PROMPTS)]
        if len(rows) > MOST_PROMPTS
        else rows
    )
    judges = [shares.judge, *(judge for judge in part.judges if judge != shares.judge)]
    seen = {
        f"{judge}, {label}": (of_judge(r, name, judge)) for judge in judges for label, r in models.items()
    }
    cells = [
        [short(prompt), *(_counted(of, prompt, shares.name) for of in seen.values())] for prompt, *_ in rows
    ]
    caption = (
        f"{sentence(shares.words)} in the pictures of each prompt, sorted by the first; dashed: the target."
    )
    caption += f" {sentence(part.name)}, {part.size}. Pale lines: 95% intervals (Wilson)."
    if len(kept) < len(rows):
        caption += f" {MOST_PROMPTS} of {len(rows)} prompts, evenly chosen from the sorted list."
    about = f"{shares.words}; in brackets the 95% interval; of n images that the judge could tell"
    table = Table(sentence(about), ("prompt", *seen), cells)
    title = f"Share of “{short(shares.name)}” ({attribute_words(name)})"
    return chart(caption, table, shares.draw, kept, title, f"share of “{short(shares.name)}”")


def _counted(found, prompt, wanted):
    """A share in words: 23% [14%, 35%], n = 60."""
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
