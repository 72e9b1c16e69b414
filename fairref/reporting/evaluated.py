"""Evaluations as a report needs them: parts of the prompts, views of the classes, judges' numbers.

A part is, as in evaluation.json, the prompts of one concept that finetuning did or did not see. A view is the classes
of one attribute, or the joint classes of several.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np
from scipy.stats import binomtest

from fairref.reporting.run_files import FILES, OWN, Run
from fairref.reporting.tables import Interval, short, triple

Report = Mapping[str, object]
View = Mapping[str, object]
Item = TypeVar("Item")
PARTS = {  # what finetuning knows of its prompts
    "test": "unseen",
    "validation": "validation",
    "train": "finetuning",
    "images": "images of",
}
BEFORE, BASELINE = "before", "baseline "  # a label, and how one begins
AFTER = {  # an adapter's file in a run's folder -> its label in the run's own evaluation
    "adapter.safetensors": "after (ema)",
    "adapter_raw.safetensors": "after (raw)",
    "adapter_best.safetensors": "after (best)",
}
NOISE = ("seed", "steps", "guidance", "end", "padding", "weights")  # that two reports on the same noise share


@dataclass(frozen=True)
class Part:
    """The reports on one part of the prompts, by the model's label; the model before finetuning is the first."""

    key: str
    reports: Mapping[str, Report]
    file: str = ""  # that they are from
    is_second: bool = False  # beside the run's own evaluation

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
        return self.reports.get(BEFORE), self.reports.get(self.after)

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


def has_intervals(part: Part) -> bool:
    """Whether some judge's numbers have some."""
    return any(judge.get("sure") for report in part.reports.values() for judge in report["judges"].values())


def prompts_name(report: Report) -> str:
    """Such as: unseen occupations."""
    concept, file = short(report["concept"]).replace("_", " "), made(report).get("prompts") or ""
    if concept == "prompts" and report["part"] in PARTS and file not in PARTS:
        return f"prompts of {short(file) or 'a text file'}"  # which finetuning may not know
    return f"{PARTS.get(report['part'], short(report['part']))} {concept}"


def size(report: Report) -> str:
    """Such as: 50 prompts × 60 images."""
    P, n = report["prompts"], report["images"]
    if isinstance(n, Mapping):
        n = f"{min(n.values(), default=0)} to {max(n.values(), default=0)}"
    return f"{P} prompt{'s' * (P != 1)} × {n} images"


def made(report: Report) -> Mapping[str, object]:
    """How a report's images were made, as far as it says so."""
    adapters = report.get("adapters", [])
    alone = {"strength": adapters[0]["strength"]} if len(adapters) == 1 else {}
    return {**{key: report.get(key) for key in NOISE}, **alone, **(report.get("made") or {})}


def same_noise(one: Report, other: Report) -> bool:
    """Whether two reports' images are of the same prompts, noise and base, as far as they say so."""
    return made_alike(one, other) and _prompts(one) == _prompts(other)


def made_alike(one: Report, other: Report) -> bool:
    """Whether two reports' images were made in the same way, strength aside, as far as they say so."""
    a, b = made(one), made(other)
    return all(None in (a.get(key), b.get(key)) or a[key] == b[key] for key in NOISE)


def grouped(items: Iterable[Item], is_alike: Callable[[Item, Item], bool]) -> list[list[Item]]:
    """Items in groups of those that are alike."""
    groups = []
    for item in items:
        group = next((group for group in groups if is_alike(group[0], item)), None)
        groups.append([item]) if group is None else group.append(item)
    return groups


def _prompts(report):
    return {prompt for judge in report["judges"].values() for prompt in judge["counts"]}


def made_words(reports: Mapping[str, Report]) -> str:
    """Such as: 12 steps, guidance 2.5, seed 1000000, padding full, adapter's strength 1."""
    how = made(next(iter(reports.values())))
    said = [f"{how['steps']:g} steps"] if how.get("steps") is not None else []
    said += [f"{key} {how[key]:.10g}" for key in ("guidance", "seed") if how.get(key) is not None]
    said += [
        f"{what} {short(how[key])}"
        for key, what in (("padding", "padding"), ("end", "solver’s end"))
        if how.get(key)
    ]
    strengths = {label: made(report).get("strength") for label, report in reports.items() if label != BEFORE}
    said += [
        f"strength {', '.join(f'{one:g}' for one in (s if isinstance(s, Sequence) else [s]))} ({short(label)})"
        for label, s in strengths.items()
        if s is not None
    ]
    return ", ".join(said) or "how the images were made is not known"


def judges_words(report: Report) -> str:
    """Such as: classifier (classifier_evaluate), templates (templates.json)."""
    named = {
        judge: ", ".join(map(short, dict.fromkeys(of.values())))
        for judge, of in report.get("judged_by", {}).items()
    }
    said = [
        f"{short(judge)} ({named[judge]})" if named.get(judge) else short(judge) for judge in report["judges"]
    ]
    return ", ".join(said)


def parts(run: Run) -> list[Part]:
    """The parts of the run's evaluations, its own first; a run without a target has none.

    One of `fairref evaluate` takes the place of the run's own where it lacks nothing of that: it is of the same
    prompts, noise and adapter, and of as many images. Else it stands beside it. Baselines have a table of their own.
    """
    by_file = {file: list(_parts(file, evaluation)) for file, evaluation in run.evaluations.items()}
    own = by_file.pop(FILES[OWN], [])
    found, others = list(own), [part for of in by_file.values() for part in of]
    for other in others:
        place = next((i for i, part in enumerate(found) if _replaces(run, other, part)), None)
        if place is None:
            found.append(replace(other, is_second=bool(own)))
        else:
            label = found[place].after
            reports = {
                label if name == other.after else name: report for name, report in other.reports.items()
            }
            found[place] = Part(found[place].key, reports, other.file)
    return found


def _parts(file, evaluation):
    by_key = {}
    for label in sorted(evaluation, key=lambda label: label != BEFORE):
        for key, report in evaluation[label].items():
            if "terms" not in report and not label.startswith(BASELINE):
                by_key.setdefault(key, {})[label] = report
    return (Part(key, reports, file) for key, reports in by_key.items())


def _replaces(run, other, part):
    """Whether a part of `fairref evaluate` has all that a part of the run's own evaluation has."""
    (before, after), (own_before, own_after) = other.pair, part.pair
    if (
        part.is_second
        or None in (before, after, own_before, own_after)
        or len(other.reports) != len(part.reports)
    ):
        return False
    files = [Path(adapter["file"]).name for adapter in after.get("adapters", [])]
    n = [report["images"] if isinstance(report["images"], int) else 0 for report in (own_after, after)]
    return (
        [AFTER.get(file) for file in files] == [part.after]
        and made(after).get("strength") == 1
        and after["attribute"] == own_after["attribute"]
        and n[0] <= n[1]
        and same_noise(after, own_after)
        and len({after.get("fingerprint"), own_after.get("fingerprint")} - {None}) < 2
        and not of_another_adapter(run, part)
    )


def of_another_adapter(run: Run, part: Part) -> str | None:
    """The label of a report on another adapter than that which lies in the run's folder now; None without one."""
    for file, label in AFTER.items():
        said = part.reports.get(label, {}).get("fingerprint")
        if said and (run.path / file).is_file() and said != _fingerprint(run.path / file):
            return label
    return None


@cache
def _fingerprint(path):
    """That of files/weights.py, without torch; "" where the file is none of tensors."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    try:
        for name, tensor in sorted(load_file(path).items()):
            with np.errstate(over="ignore"):
                half = tensor.astype(np.float16)
            digest.update(f"{name} {list(half.shape)} torch.float16\n".encode())
            digest.update(half.tobytes())
    except (SafetensorError, OSError, TypeError, ValueError):
        return ""
    return digest.hexdigest()


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
    """The share of a class in a prompt's images, with Wilson's interval."""
    counts = (found or {"counts": {}})["counts"].get(prompt)
    return wilson(counts[list(found["share"]).index(name)], sum(counts)) if counts else (None, None, None)


@cache
def wilson(count: int, n: int) -> Interval:
    """A share of n images with its 95 % interval, as `evaluation.certainty.share`, without torch; None without one."""
    if n == 0:
        return (None, None, None)
    low, high = binomtest(count, n).proportion_ci(0.95, "wilson")
    return (count / n, float(low), float(high))


def target_shares(run: Run, name: str) -> dict[str, float]:
    """The shares that were aimed at, of one attribute's classes or of all joint ones; {} where unknown."""
    table = _table(run)
    if table is None:
        return {}
    classes = run.settings["target"]["classes"]
    if name == ",".join(classes):
        return dict(zip(map(", ".join, product(*classes.values())), table.reshape(-1).tolist(), strict=True))
    if name not in classes:
        return {}
    return dict(zip(classes[name], _marginals(table)[list(classes).index(name)].tolist(), strict=True))


def is_product(run: Run) -> bool:
    """Whether each attribute's shares are the same in every group of the others."""
    table = _table(run)
    if table is None:
        return True
    together = np.ones(())
    for alone in _marginals(table):
        together = np.multiply.outer(together, alone)
    return bool(np.abs(together - table).max() < 1e-6)


def _table(run):
    """The joint target's table; None where there is none that fits the classes."""
    target = run.settings["target"]
    try:
        table = np.array(target["table"], dtype=float)
    except (TypeError, ValueError, OverflowError):
        return None
    return table if list(table.shape) == list(map(len, target["classes"].values())) else None


def _marginals(table):
    axes = range(table.ndim)
    return [table.sum(tuple(a for a in axes if a != axis)) for axis in axes]
