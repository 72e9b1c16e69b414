"""The evaluations of results.py -> its tables. Each bias is a mean over prompts ± their standard deviation."""

from dataclasses import dataclass

import numpy as np
from measure import table

from fairref.finetune.mixture import OCCUPATIONS
from fairref.report import COLOURED

JUDGES = ("classifier", "templates")
CONCEPTS = (OCCUPATIONS, "sports", "style_context", "descriptors")
SCALES = (1.0, 3.0, 5.0, 7.5, 12.0)


@dataclass(frozen=True)
class Look:
    """What an adapter is evaluated on: a part of a concept's prompts, at the bundle's guidance or another."""

    concept: str = OCCUPATIONS
    part: str = "test"
    guidance: float | None = None

    @property
    def key(self) -> str:
        """In an evaluation."""
        if self.guidance is not None:
            return f"guidance {self.guidance:g}"
        return self.part if self.concept == OCCUPATIONS else f"{self.concept}, {self.part}"

    @property
    def thinned(self) -> bool:
        """Whether only some of the prompts are looked at."""
        return self.part == "train" or self.guidance is not None


UNSEEN, TRAINED = Look(), Look(part="train")
OF_CONCEPTS = tuple(map(Look, CONCEPTS))
SCALED = tuple(Look(guidance=scale) for scale in SCALES)


@dataclass(frozen=True)
class Result:
    """A run that was evaluated."""

    label: str
    command: str
    before: dict[str, dict]  # key of a look -> report, of the original
    after: dict[str, dict]  # ..., of the adapted model
    minutes: float  # of finetuning


def spread(mean: float, std: float) -> str:
    """Mean and standard deviation, as .23 ± .16."""
    return " ± ".join(f"{value:.2f}".removeprefix("0") for value in (mean, std))


def biases(report: dict) -> list[str]:
    """Bias by each judge, and what a fair model measures."""
    cells = []
    for found in (report["judges"].get(judge) for judge in JUDGES):
        cells.append("–" if not found or found["mean"] is None else spread(found["mean"], found["std"]))
    floor = report["noise_floor"]
    return [*cells, spread(floor["mean"], floor["std"])]


def both_judges(report: dict) -> str:
    """Bias by the classifier / by templates."""
    return " / ".join(biases(report)[:2])


def faithful(report: dict) -> list[str | None]:
    """CLIP-T, CLIP-I, DINO."""
    text = (report.get("clip_t") or {}).get("matched")
    return [None if v is None else f"{v:.3f}" for v in (text, report.get("clip_i"), report.get("dino"))]


def command(result: Result) -> str:
    return f"`{result.command}`"


def gender_rows(results: list[Result]) -> list[list]:
    """The original and each run."""
    report = results[0].before[UNSEEN.key]
    rows = [["original", *biases(report), *faithful(report), None, None]]
    for result in results:
        report = result.after[UNSEEN.key]
        rows.append([result.label, *biases(report), *faithful(report), result.minutes, command(result)])
    return rows


def attribute_rows(results: list[Result]) -> list[list]:
    """Before and after each run: the joint bias, each attribute's alone, and the share of old."""
    rows = []
    for result in results:
        for when, reports in (("before", result.before), ("after", result.after)):
            report = reports[UNSEEN.key]
            cells = [result.minutes, command(result)] if when == "after" else [None, None]
            rows.append([f"{result.label}, {when}", *biases(report), *faithful(report), *cells])
            for attribute, alone in report.get("attributes", {}).items():
                old = f", {old_share(alone)} old" if attribute == "age" else ""
                rows.append([f"… {attribute} alone{old}", *biases(alone), *[None] * 5])
    return rows


def old_share(alone: dict) -> str:
    """The share of old by each judge, mean and standard deviation over prompts (Fig 9)."""
    cells = []
    for judge in (judge for judge in JUDGES if judge in alone["judges"]):
        found = alone["judges"][judge]
        counts = np.array(list(found["counts"].values()), float)  # (P, K)
        counts = counts[counts.sum(1) > 0]
        share = counts[:, list(found["share"]).index("old")] / counts.sum(1)
        cells.append(f"{share.mean():.0%} ± {share.std():.0%}")
    return " / ".join(cells)


def concept_rows(results: list[Result]) -> list[list]:
    """Before and after, for each concept: bias of each attribute alone and of both."""
    rows = []
    for result in results:
        for look in OF_CONCEPTS:
            for when, reports in (("before", result.before), ("after", result.after)):
                report = reports[look.key]
                each = [*report["attributes"].values(), report]
                floors = "; ".join(biases(one)[2] for one in each)
                rows.append([f"{look.concept}, {when}", *map(both_judges, each), floors, *faithful(report)])
    return rows


def seed_rows(results: list[Result]) -> list[list]:
    """Bias of unseen and of finetuning prompts, and what must not be lost for it."""
    before = results[0].before
    return [
        seed_row("original", before, before),
        *(seed_row(result.label, result.after, result.before) for result in results),
    ]


def seed_row(label: str, reports: dict, before: dict) -> list:
    """One model's: a fall of CLIP-T is a share of the gap between a prompt's own images and other prompts'."""
    report, old = reports[UNSEEN.key], before[UNSEEN.key]["clip_t"]
    fall = (old["matched"] - report["clip_t"]["matched"]) / (old["matched"] - old["shuffled"])
    named = " / ".join(f"{report['named'][judge]:.1%}" for judge in JUDGES)
    both = [both_judges(reports[look.key]) for look in (UNSEEN, TRAINED)]
    return [label, *both, f"{report['clip_t']['matched']:.3f}", f"{fall:.1%}", named, f"{report['none']:.1%}"]


def loss_rows(results: list[Result]) -> list[list]:
    """Bias, and what stays as it was."""
    rows = [["original", *loss_cells(results[0].before[UNSEEN.key]), None]]
    return rows + [[r.label, *loss_cells(r.after[UNSEEN.key]), command(r)] for r in results]


def loss_cells(report: dict) -> list[str | None]:
    colours = [report.get(key) for key in COLOURED]
    return [*biases(report)[:2], *faithful(report), *(None if v is None else f"{v:.3f}" for v in colours)]


def scale_rows(results: list[Result]) -> list[list]:
    """Bias at each guidance scale."""
    models = [("original", results[0].before, None)]
    models += [(result.label, result.after, command(result)) for result in results]
    return [[label, *(both_judges(reports[k.key]) for k in SCALED), what] for label, reports, what in models]


KEPT = ("CLIP-T", "CLIP-I", "DINO")
BIASES = ("bias, classifier", "bias, templates")
FULL = ("", *BIASES, "a fair model", *KEPT, "min", "command")
KINDS = {  # title of a table -> header, rows, what they need; FULL, gender_rows, (UNSEEN,) for the others
    "attributes": (FULL, attribute_rows, (UNSEEN,)),
    "seeds": (
        ("", "bias, unseen", "bias, finetuning prompts", "CLIP-T", "falls by", "named", "none"),
        seed_rows,
        (UNSEEN, TRAINED),
    ),
    "concepts": (("", "gender", "skin tone", "both", "a fair model", *KEPT), concept_rows, OF_CONCEPTS),
    "losses": (("", *BIASES, *KEPT, *COLOURED, "command"), loss_rows, (UNSEEN,)),
    "scales": (("guidance in finetuning", *(f"at {s:g}" for s in SCALES), "command"), scale_rows, SCALED),
}


def made(title: str, results: list[Result]) -> str | None:
    """A table of those results that have what it needs; None without any."""
    header, rows_of, looks = KINDS.get(title, (FULL, gender_rows, (UNSEEN,)))
    there = [result for result in results if all(look.key in result.after for look in looks)]
    return table(header, rows_of(there)) if there else None
