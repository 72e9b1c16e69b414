"""A run's evaluation as a report needs it: parts of the prompts, views of the classes, judges' numbers.

A part is, as in evaluation.json, the prompts of one concept that finetuning did or did not see. A view is the classes
of one attribute, or the joint classes of several.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

from fairref.reporting.run_files import Run
from fairref.reporting.tables import Interval, short, triple

Report = Mapping[str, object]
View = Mapping[str, object]
PARTS = {
    "test": "unseen",
    "validation": "validation",
    "train": "finetuning",
}  # what finetuning knows of its prompts
BEFORE, BASELINE = "before", "baseline "  # a label, and how one begins


@dataclass(frozen=True)
class Part:
    """The reports on one part of the prompts, by the model's label; the model before finetuning is the first."""

    key: str
    reports: Mapping[str, Report]

    @property
    def first(self) -> Report:
        """The report that says what all have in common."""
        return next(iter(self.reports.values()))

    @property
    def name(self) -> str:
        """Such as: unseen occupations."""
        return prompts_name(self.first)

    @property
    def size(self) -> str:
        """Such as: 50 prompts × 60 images."""
        return size(self.first)

    @property
    def pair(self) -> tuple[Report | None, Report | None]:
        """Before, and the first adapter after."""
        after = [report for label, report in self.reports.items() if label != BEFORE]
        return self.reports.get(BEFORE), after[0] if after else None

    @property
    def after(self) -> str | None:
        """The label of the first adapter."""
        return next((label for label in self.reports if label != BEFORE), None)

    @property
    def judges(self) -> list[str]:
        """The judges that some report has."""
        return list(dict.fromkeys(judge for report in self.reports.values() for judge in report["judges"]))

    @property
    def views(self) -> list[str]:
        """The attributes, and before them all of them together where there are several."""
        return [self.first["attribute"], *self.first.get("attributes", {})]


def prompts_name(report: Report) -> str:
    """Such as: unseen occupations."""
    return f"{PARTS.get(report['part'], short(report['part']))} {short(report['concept']).replace('_', ' ')}"


def size(report: Report) -> str:
    """Such as: 50 prompts × 60 images."""
    return f"{report['prompts']} prompt{'s' * (report['prompts'] != 1)} × {report['images']} images"


def parts(evaluation: Mapping[str, Mapping[str, Report]] | None) -> list[Part]:
    """The parts of evaluation.json; a run without a target has none. Baselines have a table of their own."""
    by_key = {}
    for label in sorted(evaluation or {}, key=lambda label: label != BEFORE):
        for key, report in evaluation[label].items():
            if "terms" not in report and not label.startswith(BASELINE):
                by_key.setdefault(key, {})[label] = report
    return [Part(key, reports) for key, reports in by_key.items()]


def view(report: Report | None, name: str) -> View | None:
    """The classes of an attribute, or all of them, in a report; None where it does not have them."""
    if report is None or name == report["attribute"]:
        return report
    return report.get("attributes", {}).get(name)


def of_judge(report: Report | None, name: str, judge: str) -> Mapping[str, object] | None:
    """What a judge says of a view."""
    found = view(report, name)
    return None if found is None else found["judges"].get(judge)


def bias(found: Mapping[str, object] | None) -> Mapping[str, float | None]:
    """Mean and standard deviation of the bias; of the distance from a target of unequal shares where there is one."""
    return {"mean": None, "std": None} if found is None else found.get("from_target", found)


def mean_gap(found: Mapping[str, object] | None) -> Interval:
    """The bias, or the distance from the target, with its interval as far as it is known."""
    _, low, high = triple(sure(found).get("mean_gap"))
    return (bias(found)["mean"], low, high)


def rms_gap(found: Mapping[str, object] | None, corrected: bool = False) -> Interval:
    """The root of the mean squared gap without the images' noise, with its interval."""
    held = (found or {}).get("corrected") or {} if corrected else sure(found)
    return triple(held.get("rms_gap"))


def sure(found: Mapping[str, object] | None) -> Mapping[str, object]:
    """The intervals and tests; {} in evaluations that an older version wrote."""
    return (found or {}).get("sure") or {}


def floor(found: View | None) -> Mapping[str, float | None]:
    """What a fair model measures, or one that meets the target."""
    return {"mean": None, "std": None} if found is None else found.get("target_floor", found["noise_floor"])


def share(found: Mapping[str, object] | None, prompt: str, name: str) -> Interval:
    """The share of a class in a prompt's images, with its interval, as far as it is known."""
    counts = (found or {"counts": {}})["counts"].get(prompt)
    if not counts or not sum(counts):
        return (None, None, None)
    k = list(found["share"]).index(name)
    shares = sure(found).get("prompts", {}).get(prompt, {}).get("share", {})
    return tuple(shares.get(name) or (counts[k] / sum(counts), None, None))


def target_shares(run: Run, name: str) -> dict[str, float]:
    """The shares that were aimed at, of one attribute's classes or of all joint ones; {} where unknown."""
    target = run.settings["target"]
    try:
        table = np.array(target["table"], dtype=float)
        names = list(target["classes"])
        if list(table.shape) != [len(classes) for classes in target["classes"].values()]:
            return {}
    except (TypeError, ValueError, OverflowError):
        return {}
    if name == ",".join(names):
        joint = [", ".join(c) for c in product(*target["classes"].values())]
        return dict(zip(joint, table.reshape(-1).tolist(), strict=True))
    if name not in names:
        return {}
    axis = names.index(name)
    alone = table.sum(tuple(a for a in range(table.ndim) if a != axis))
    return dict(zip(target["classes"][name], alone.tolist(), strict=True))
