"""The evaluations of results.py -> its tables. Each bias is a mean over prompts ± their standard deviation, and from
the target's shares where these are not equal."""

from dataclasses import dataclass

import numpy as np
from measure import table
from scipy.stats import linregress

from fairref.evaluation.gaps import rms_gap
from fairref.evaluation.statistics import COLOURED
from fairref.prompts.sets import OCCUPATIONS

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


def both_judges(report: dict) -> str:
    """Bias by the classifier / by templates."""
    found = [report["judges"].get(judge) for judge in JUDGES]
    if "target_floor" in report:  # an uneven target
        found = [of_one["from_target"] if of_one else None for of_one in found]
    return " / ".join(map(spread, found))


def floor(report: dict) -> str:
    """What a fair model measures."""
    return spread(report.get("target_floor", report["noise_floor"]))


def gap(report: dict, judge: str = JUDGES[0]) -> str:
    """The rms gap without the images' noise and its 95 % interval, as .23 [.17, .28]; none from an uneven target."""
    if "target_floor" in report:
        return "–"
    counts = np.array(list(report["judges"][judge]["counts"].values()))
    found = rms_gap(counts, np.full(counts.shape[1], 1 / counts.shape[1]))
    value, low, high = (f"{found[key]:.2f}".removeprefix("0") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def biases(report: dict) -> list[str]:
    """Bias by both judges, what a fair model measures, and the gap without noise by the classifier."""
    return [both_judges(report), floor(report), gap(report)]


def faithful(report: dict) -> list[str | None]:
    """CLIP-T; CLIP-I / DINO."""
    text = (report.get("clip_t") or {}).get("matched")
    text, *alike = [
        None if v is None else f"{v:.3f}" for v in (text, report.get("clip_i"), report.get("dino"))
    ]
    return [text, " / ".join(alike) if all(alike) else None]


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
                rows.append(
                    [
                        f"{result.label}, {when}: {attribute.replace('_', ' ')} alone",
                        *biases(alone),
                        *[None] * 4,
                    ]
                )
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
                floors = "; ".join(map(floor, each))
                rows.append([f"{look.concept}, {when}", *map(both_judges, each), floors, *faithful(report)])
    return rows


def summary_rows(results: list[Result]) -> list[list]:
    """Bias by the classifier before and after each run, what a fair model measures, and the gap that is left."""
    return [
        [
            result.label,
            *(spread(reports[UNSEEN.key]["judges"][JUDGES[0]]) for reports in (result.before, result.after)),
            floor(result.after[UNSEEN.key]),
            gap(result.after[UNSEEN.key]),
            command(result),
        ]
        for result in results
    ]


def lean_rows(results: list[Result]) -> list[list]:
    """How much of each prompt's lean is left after each run, by the classifier."""
    return [[result.label, *(f"{v:.2f}" for v in lean(result)), command(result)] for result in results]


def lean(result: Result, judge: str = JUDGES[0]) -> tuple[float, float, float]:
    """(slope, intercept, r) of the line through each prompt's log-odds of the first class, after against before."""
    before, after = (
        log_odds(reports[UNSEEN.key]["judges"][judge]) for reports in (result.before, result.after)
    )
    line = linregress(before, after)
    return line.slope, line.intercept, line.rvalue


def log_odds(found: dict) -> np.ndarray:
    """Of the first of two classes, (P,); half an image is added to each count, or 0 of 60 would be infinite."""
    counts = np.array(list(found["counts"].values())) + 0.5  # (P, 2)
    return np.log(counts[:, 0] / counts[:, 1])


def drift_rows(results: list[Result]) -> list[list]:
    """The mean share of the first class over prompts, at each guidance scale."""
    models = [("original", results[0].before)] + [(result.label, result.after) for result in results]
    return [[label, *(both_shares(reports[look.key]) for look in SCALED)] for label, reports in models]


def both_shares(report: dict) -> str:
    """Mean share of the first class over prompts: by the classifier / by templates."""
    return " / ".join(f"{first_shares(report, judge).mean():.2f}".removeprefix("0") for judge in JUDGES)


def first_shares(report: dict, judge: str) -> np.ndarray:
    """The share of the first class in each prompt's images, (P,)."""
    counts = np.array(list(report["judges"][judge]["counts"].values()), float)  # (P, K)
    return counts[:, 0] / counts.sum(1)


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
    obeyed = " / ".join(f"{report['explicit'][judge]:.1%}" for judge in JUDGES)
    both = [both_judges(reports[look.key]) for look in (UNSEEN, TRAINED)]
    kept = [f"{report['clip_t']['matched']:.3f} ({fall:.1%})", f"{obeyed}; {report['none']:.1%}"]
    return [label, *both, floor(report), gap(report), *kept, what]


def loss_rows(results: list[Result]) -> list[list]:
    """Bias, and what stays as it was."""
    rows = [["original", *loss_cells(results[0].before[UNSEEN.key]), None]]
    return rows + [[r.label, *loss_cells(r.after[UNSEEN.key]), command(r)] for r in results]


def loss_cells(report: dict) -> list[str | None]:
    colours = ["–" if report.get(key) is None else f"{report[key]:.3f}" for key in COLOURED]
    return [*biases(report), *faithful(report), " / ".join(colours)]


def scale_rows(results: list[Result]) -> list[list]:
    """Bias at each guidance scale."""
    models = [("original", results[0].before, None)]
    models += [(result.label, result.after, command(result)) for result in results]
    fair = floor(results[0].before[SCALED[0].key])
    return [
        [label, *(both_judges(reports[k.key]) for k in SCALED), fair, what] for label, reports, what in models
    ]


KEPT = ("CLIP-T", "CLIP-I / DINO")
BIAS, FAIR = "bias, classifier / templates", "a fair model"
GAP = "rms gap [95 %]"
FULL = (BIAS, FAIR, GAP, *KEPT, "min", "command")
AT_SCALES = tuple(f"at {scale:g}" for scale in SCALES)
SEEDS = (
    (
        "model",
        "bias, unseen",
        "bias, finetuning",
        FAIR,
        GAP,
        "CLIP-T (its fall)",
        "explicit; none",
        "command",
    ),
    seed_rows,
    (UNSEEN, TRAINED),
)
KINDS = {  # title of a table -> header, rows, what they need
    "summary": (
        ("run", "bias before", "bias after", FAIR, f"after: {GAP}", "command"),
        summary_rows,
        (UNSEEN,),
    ),
    "components": (("what is trained", *FULL), gender_rows, (UNSEEN,)),
    "leans": (("what is trained", "slope", "intercept", "r", "command"), lean_rows, (UNSEEN,)),
    "gradients": (("`--gradient`", *FULL), gender_rows, (UNSEEN,)),
    "attributes": (("run", *FULL), attribute_rows, (UNSEEN,)),
    "seeds": SEEDS,
    "concepts": (("concept", "gender", "skin tone", "both", FAIR, *KEPT), concept_rows, OF_CONCEPTS),
    "old": (("share of old", "before", "after", "command"), old_rows, (UNSEEN,)),
    "losses": (("losses", BIAS, FAIR, GAP, *KEPT, " / ".join(COLOURED), "command"), loss_rows, (UNSEEN,)),
    "scales": (("guidance in finetuning", *AT_SCALES, FAIR, "command"), scale_rows, SCALED),
    "drift": (("guidance in finetuning", *AT_SCALES), drift_rows, SCALED),
}


def made(title: str, results: list[Result]) -> str | None:
    """A table of those results that have what it needs; None without any."""
    header, rows_of, looks = KINDS[title]
    there = [result for result in results if all(look.key in result.after for look in looks)]
    return table(header, rows_of(there)) if there else None
