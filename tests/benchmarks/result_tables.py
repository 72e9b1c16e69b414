"""The evaluations of results.py -> its tables. Each bias is a mean over prompts ± their standard deviation, and from
the target's shares where these are not equal."""

from dataclasses import dataclass

import numpy as np
from measure import table

from fairref.finetune.mixture import OCCUPATIONS
from fairref.report import COLOURED, JUDGES

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
    device: str = "cpu"  # of finetuning

    @property
    def took(self) -> float | str:
        """Minutes on a CPU; those on a GPU, which runs share, say nothing."""
        return self.minutes if self.device == "cpu" else self.device


def spread(found: dict | None) -> str:
    """Mean and standard deviation, as .23 ± .16."""
    if not found or found["mean"] is None:
        return "–"
    return " ± ".join(f"{found[key]:.2f}".removeprefix("0") for key in ("mean", "std"))


def biases(report: dict) -> list[str]:
    """Bias by each judge, and what a fair model measures."""
    uneven = "target_floor" in report
    found = [report["judges"].get(judge) for judge in JUDGES]
    found = [of_one["from_target"] if of_one and uneven else of_one for of_one in found]
    return [*map(spread, found), spread(report["target_floor" if uneven else "noise_floor"])]


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
        rows.append([result.label, *biases(report), *faithful(report), result.took, command(result)])
    return rows


def attribute_rows(results: list[Result]) -> list[list]:
    """Before and after each run: the joint bias, each attribute's alone."""
    rows = []
    for result in results:
        for when, reports in (("before", result.before), ("after", result.after)):
            report = reports[UNSEEN.key]
            cells = [result.took, command(result)] if when == "after" else [None, None]
            rows.append([f"{result.label}, {when}", *biases(report), *faithful(report), *cells])
            for attribute, alone in report.get("attributes", {}).items():
                rows.append([f"… {attribute} alone", *biases(alone), *[None] * 5])
    return rows


def old_rows(results: list[Result]) -> list[list]:
    """The share of old in each occupation (Fig 9), and its mean and standard deviation over occupations."""
    rows = []
    for result in results:
        shares = [old_shares(reports[UNSEEN.key]) for reports in (result.before, result.after)]
        every = [[f"{np.nanmean(s):.0%} ± {np.nanstd(s):.0%}" for s in of_one.values()] for of_one in shares]
        rows.append([f"all, {result.label}", *(" / ".join(cells) for cells in every), command(result)])
        for n, name in enumerate(
            result.before[UNSEEN.key]["attributes"]["age"]["judges"][JUDGES[0]]["counts"]
        ):
            cells = [" / ".join(f"{s[n]:.0%}" for s in of_one.values()) for of_one in shares]
            rows.append([name, *cells, None])
    return rows


def old_shares(report: dict) -> dict[str, np.ndarray]:
    """Judge -> the share of old in each occupation (P,), NaN where it knows nobody."""
    shares = {}
    for judge, found in report["attributes"]["age"]["judges"].items():
        counts = np.array(list(found["counts"].values()), float)  # (P, K)
        some = np.where(counts.sum(1) > 0, counts.sum(1), np.nan)
        shares[judge] = counts[:, list(found["share"]).index("old")] / some
    return shares


def concept_rows(results: list[Result]) -> list[list]:
    """Before and after, for each concept: bias of each attribute alone and of both."""
    rows = []
    for result in results:
        for look in OF_CONCEPTS:
            for when, reports in (("before", result.before), ("after", result.after)):
                report = reports[look.key]
                each = [*report["attributes"].values(), report]
                floors = "; ".join(biases(one)[2] for one in each)
                what = command(result) if when == "after" else None
                rows.append(
                    [f"{look.concept}, {when}", *map(both_judges, each), floors, *faithful(report), what]
                )
    return rows


def seed_rows(results: list[Result]) -> list[list]:
    """Bias of unseen and of finetuning prompts, and what must not be lost for it."""
    before = results[0].before
    return [
        seed_row("original", before, before, None),
        *(seed_row(result.label, result.after, result.before, command(result)) for result in results),
    ]


def seed_row(label: str, reports: dict, before: dict, what: str | None) -> list:
    """One model's: a fall of CLIP-T is a share of the gap between a prompt's own images and other prompts'."""
    report, old = reports[UNSEEN.key], before[UNSEEN.key]["clip_t"]
    fall = (old["matched"] - report["clip_t"]["matched"]) / (old["matched"] - old["shuffled"])
    named = " / ".join(f"{report['named'][judge]:.1%}" for judge in JUDGES)
    both = [both_judges(reports[look.key]) for look in (UNSEEN, TRAINED)]
    kept = [f"{report['clip_t']['matched']:.3f}", f"{fall:.1%}", named, f"{report['none']:.1%}"]
    return [label, *both, biases(report)[2], *kept, what]


def loss_rows(results: list[Result]) -> list[list]:
    """Bias, and what stays as it was."""
    rows = [["original", *loss_cells(results[0].before[UNSEEN.key]), None]]
    return rows + [[r.label, *loss_cells(r.after[UNSEEN.key]), command(r)] for r in results]


def loss_cells(report: dict) -> list[str | None]:
    colours = [report.get(key) for key in COLOURED]
    return [*biases(report), *faithful(report), *(None if v is None else f"{v:.3f}" for v in colours)]


def scale_rows(results: list[Result]) -> list[list]:
    """Bias at each guidance scale."""
    models = [("original", results[0].before, None)]
    models += [(result.label, result.after, command(result)) for result in results]
    floor = biases(results[0].before[SCALED[0].key])[2]
    return [
        [label, *(both_judges(reports[k.key]) for k in SCALED), floor, what]
        for label, reports, what in models
    ]


KEPT = ("CLIP-T", "CLIP-I", "DINO")
BIASES = ("bias, classifier", "bias, templates", "a fair model")
FULL = ("", *BIASES, *KEPT, "min", "command")
KINDS = {  # title of a table -> header, rows, what they need; FULL, gender_rows, (UNSEEN,) for the others
    "attributes": (FULL, attribute_rows, (UNSEEN,)),
    "seeds": (
        ("", "bias, unseen", "bias, finetuning", BIASES[2], "CLIP-T", "falls by", "named", "none", "command"),
        seed_rows,
        (UNSEEN, TRAINED),
    ),
    "concepts": (("", "gender", "skin tone", "both", BIASES[2], *KEPT, "command"), concept_rows, OF_CONCEPTS),
    "old": (("share of old", "before", "after", "command"), old_rows, (UNSEEN,)),
    "losses": (("", *BIASES, *KEPT, *COLOURED, "command"), loss_rows, (UNSEEN,)),
    "scales": (
        ("guidance in finetuning", *(f"at {s:g}" for s in SCALES), BIASES[2], "command"),
        scale_rows,
        SCALED,
    ),
}


def made(title: str, results: list[Result]) -> str | None:
    """A table of those results that have what it needs; None without any."""
    header, rows_of, looks = KINDS.get(title, (FULL, gender_rows, (UNSEEN,)))
    there = [result for result in results if all(look.key in result.after for look in looks)]
    return table(header, rows_of(there)) if there else None
