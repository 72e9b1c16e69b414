"""A report in a few lines of text."""

import numpy as np

from fairref.evaluation.confusion import TEMPLATES
from fairref.evaluation.statistics import COLOURED
from fairref.fairness.attributes import apparent
from fairref.fairness.metrics import BLEND


def lines(report: dict[str, object]) -> list[str]:
    """A report in a few lines of text."""
    n = report["images"]
    n = f"{min(n.values())} to {max(n.values())}" if isinstance(n, dict) else n
    kind = "prompts of" if report["part"] == "images" else report["part"]
    about = f"{report['prompts']} {kind} {report['concept']} x {n} images"
    text = [f"{apparent(report['attribute'])} bias, {about}: {_said(report)}"]
    text += [
        f"{apparent(name)} bias alone: {_said(alone)}" for name, alone in report.get("attributes", {}).items()
    ]
    views = {report["attribute"]: report, **report.get("attributes", {})}
    text += [line for name, view in views.items() for line in _said_of_rms(name, view["judges"])]
    if report.get("none") is not None:
        text.append(f"left out by the template judge: {report['none']:.1%}")
    if report["faceless"]:
        text.append(f"without a face: {report['faceless']:.1%}")
    text.append(f"largest class probability below {BLEND}: {report['blended']:.1%}")
    if report["clip_t"]:
        text.append(
            f"CLIP-T: {', '.join(f'{k} {v:.4f}' for k, v in report['clip_t'].items() if v is not None)}"
        )
    for key, what in (
        ("clip_i", "CLIP-I"),
        ("dino", "DINO"),
        *((name, f"colour of the {name}") for name in COLOURED),
    ):
        if report.get(key) is not None:
            text.append(f"{what} with the original images: {report[key]:.4f}")
    if report.get("flips"):
        shares = [f"{v['needless']:.1%} of {v['changed']:.1%} ({j})" for j, v in report["flips"].items()]
        text.append(f"changed class needlessly: {', '.join(shares)}")
    for judge, line in report.get("leans", {}).items():
        (slope, *of_slope), (shift, *of_shift) = line["slope"], line["intercept"]
        intervals = [f"({low:.2f} to {high:.2f})" for low, high in (of_slope, of_shift)]
        text.append(
            f"log-odds after: {slope:.2f} {intervals[0]} x before {shift:+.2f} {intervals[1]} ({judge})"
        )
    if "explicit" in report:
        shares = [f"{share:.1%} ({j})" for j, share in report["explicit"].items() if j != "images"]
        text.append(f"explicit prompts drawn as asked: {', '.join(shares)}")
    for judge, of_judge in report.get("confusion", {}).items():
        for attribute, (known, *_) in of_judge.items():
            right, images = np.trace(known["counts"]), np.sum(known["counts"])
            text.append(f"{judge} right about {apparent(attribute)}: {right} of {images}, {known['source']}")
    unknown = [
        f"{judge} about {apparent(name)}"
        for name, view in (report.get("attributes") or views).items()
        for judge in view["judges"]
        if judge != TEMPLATES and name not in report.get("confusion", {}).get(judge, {})
    ]
    if unknown:
        text.append(f"not known how often it errs: {', '.join(unknown)}; give --labelled or --labels")
    return text


def _said(biases):
    """Each judge's bias, and what a fair model measures."""
    found = [
        f"{_spread(values)} ({name})" if values["mean"] is not None else f"none ({name})"
        for name, values in biases["judges"].items()
    ]
    text = f"{', '.join(found)}; a fair model measures {_spread(biases['noise_floor'])}"
    if "target_floor" not in biases:
        return text
    far = {name: v["from_target"] for name, v in biases["judges"].items()}
    said = [f"{_spread(v) if v['mean'] is not None else 'none'} ({name})" for name, v in far.items()]
    floor = _spread(biases["target_floor"])
    return f"{text}; from the target: {', '.join(said)}; a model that meets it measures {floor}"


def _said_of_rms(name, judges):
    """The gap without the images' noise and its upper bound, raw and corrected, by each judge."""
    found = []
    for judge, values in judges.items():
        sure, fixed = values.get("sure"), values.get("corrected")
        if sure and sure["rms_gap"]:
            said = _with_bound(sure["rms_gap"], sure["fair"]["upper"])
            if fixed and fixed["rms_gap"]:
                said += f", corrected {_with_bound(fixed['rms_gap'], fixed['upper'])}"
            elif fixed and fixed["method"].startswith("no"):  # and why
                said += f", corrected: {fixed['method']}"
            found.append(f"{said} ({judge})")
    of = "of other images of these prompts, as this judge sees them"
    return [f"{apparent(name)} rms gap without the images' noise, {of}: {', '.join(found)}"] if found else []


def _with_bound(gap, upper):
    return _interval(gap) + ("" if upper is None else f", upper 95% bound {upper:.3f}")


def _interval(v):
    return f"{v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]"


def _spread(v):
    return f"{v['mean']:.3f} ± {v['std']:.3f}"
