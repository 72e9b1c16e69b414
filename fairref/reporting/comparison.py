"""Figures 8 and 9: a model's images and shares before and after, on the same noise."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import binomtest
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.errors import UserError
from fairref.evaluation.judging import EvaluationSettings, draw_images, drawn_by, judge
from fairref.evaluation.parts import PromptPart, Report, evaluate_part
from fairref.evaluation.statistics import JudgedImages
from fairref.fairness.attributes import JointTarget
from fairref.files.images import to_image
from fairref.files.paths import read_json
from fairref.files.weights import fingerprint
from fairref.generation.adapters import AdapterFile
from fairref.prompts.sets import Prompts, evenly
from fairref.reporting import charts
from fairref.reporting.figures import Figure
from fairref.reporting.gallery import Picture, gallery

PROMPTS, IMAGES = 4, 6  # of figure 8: prompts, images of each
EVALUATION = "evaluation.json"
BEFORE = "before"
AFTER = {  # an adapter's file in a run's folder -> its label in the evaluation there
    "adapter.safetensors": "after (ema)",
    "adapter_raw.safetensors": "after (raw)",
    "adapter_best.safetensors": "after (best)",
}


@dataclass(frozen=True)
class Comparison:
    """What is drawn and judged: models by their label, and a part of each concept's prompts."""

    settings: EvaluationSettings
    models: Mapping[str, Bundle]
    concepts: Sequence[Prompts]
    part: str
    images: int  # that are counted of each prompt

    def reports(self) -> list[dict[str, Report]]:
        """Return each concept's reports by model."""
        sources = [drawn_by(self.settings, model, label) for label, model in self.models.items()]
        parts = [PromptPart(concept, self.part, self.images, explicit_images=0) for concept in self.concepts]
        return [{s.label: evaluate_part(self.settings, s, part).report for s in sources} for part in parts]


def evaluated(adapter: AdapterFile, part: str) -> list[dict[str, Report]]:
    """Return each concept's reports before and after from the evaluation of the run that made the adapter.

    Of another part if it has none of this one; [] without an evaluation of this very adapter. Raises UserError.
    """
    path, label = adapter.file.parent / EVALUATION, AFTER.get(adapter.file.name)
    if label is None or not path.is_file():
        return []
    results, made = read_json(path), fingerprint(adapter.tensors)
    try:
        pairs = [
            {BEFORE: results[BEFORE][key], label: after}
            for key, after in results.get(label, {}).items()
            if after.get("fingerprint", made) == made
            and key in results[BEFORE]  # older ones have no fingerprint
        ]
        return [pair for pair in pairs if pair[label]["part"] == part] or pairs
    except (AttributeError, LookupError, TypeError):
        raise UserError(
            f"{path}: not what an evaluation of fairref wrote; evaluate again, or move it."
        ) from None


def figure_8(comparison: Comparison, n: int = IMAGES) -> Figure:
    """Return n images of some prompts by each model, from the same noise, with what the evaluation classifier sees."""
    settings, classes = comparison.settings, comparison.settings.target.classes
    names = {
        p: concept.short(p) for concept in comparison.concepts for p in getattr(concept, comparison.part)
    }
    shown: dict[str, dict[str, list[Picture]]] = {}
    for prompt in evenly(tuple(names), PROMPTS):
        for label, model in comparison.models.items():
            x = draw_images(settings, model, prompt, n)
            shown.setdefault(names[prompt], {})[label] = pictures_of(x, judge(settings, x), classes)
    note = "Below an image: the class that the classifier sees; the bar is its probability."
    if settings.bundle.detector is not None:
        note = f"Box: the face that counts. {note}"
    title = " and ".join(comparison.models).capitalize() + " finetuning, from the same noise"
    return Figure("fig8", gallery(shown, classes, title, note), list(_judged(shown, classes)))


def pictures_of(x: Tensor, judged: JudgedImages, classes: Mapping[str, Sequence[str]]) -> list[Picture]:
    """Return images (n, 3, H, W) with what the evaluation classifier sees in them."""
    pictures = []
    for i, image in enumerate(x):
        box = None if judged.boxes is None or judged.boxes[i].isnan().any() else judged.boxes[i].tolist()
        seen = {}
        for name, names in classes.items():
            k = int(judged.classes["classifier"][name][i])
            if k >= 0:
                seen[name] = (names[k], float(judged.probabilities["classifier"][name][i, k]))
        pictures.append(Picture(to_image(image), box, seen))
    return pictures


def _judged(shown, classes):
    """The numbers of figure 8: a row for each image and attribute."""
    for prompt, rows in shown.items():
        for label, pictures in rows.items():
            for i, picture in enumerate(pictures):
                edges = dict(zip(("left", "top", "right", "bottom"), picture.box or [None] * 4, strict=True))
                for attribute in classes:
                    name, probability = picture.seen.get(attribute, (None, None))
                    row = {"prompt": prompt, "model": label, "image": i, "attribute": attribute}
                    yield {**row, "class": name, "probability": probability, **edges}


def figures_9(target: JointTarget, reports: Sequence[Mapping[str, Report]]) -> Iterator[Figure]:
    """Yield the share of a class by prompt, before and after, of each concept and attribute.

    `reports`: of each concept, label of a model -> its report. Of two classes the one that shall be rarer is drawn, of
    more classes each.
    """
    for of_concept in reports:
        first = next(iter(of_concept.values()))
        for attribute, names in target.classes.items():
            shares = target.marginal(attribute).target
            drawn = [shares.index(min(shares))] if len(names) == 2 else range(len(names))
            counts = {label: _counts(report, attribute) for label, report in of_concept.items()}
            for k in drawn:
                rows = sorted(_share_rows(counts, k), key=lambda row: (row[1][0] is None, row[1][0], row[0]))
                title = f"Share of {names[k]} in the images of each prompt"
                about = f"share of {names[k]}, {first['images']} images a prompt, 95% intervals (Wilson)"
                svg = charts.dumbbells(rows, shares[k], about, title, (*counts, "")[:2])
                parts = [
                    "fig9",
                    *([first["concept"]] if len(reports) > 1 else []),
                    *([attribute] if len(target.classes) > 1 else []),
                    *([names[k]] if len(names) > 2 else []),
                ]
                numbers = [_numbers(row, counts, names[k], shares[k]) for row in rows]
                yield Figure("-".join(parts), svg, numbers)


def _counts(report, attribute):
    """Prompt -> counts of the attribute's classes by the evaluation classifier."""
    of = report.get("attributes", {}).get(attribute, report)
    return of["judges"]["classifier"]["counts"]


def _share_rows(counts, k):
    """Of each prompt its name and the shares of class k by the first model and the second, None without one."""
    for prompt in next(iter(counts.values())):
        intervals = [share(of_model[prompt][k], sum(of_model[prompt])) for of_model in counts.values()]
        yield prompt, *[*intervals, None][:2]


def share(count: int, n: int) -> charts.Interval:
    """Return count / n with Wilson's 95 % interval, None's where n is 0."""
    if n == 0:
        return None, None, None
    interval = binomtest(count, n).proportion_ci(method="wilson")
    return count / n, float(interval.low), float(interval.high)


def _numbers(row, labels, name, target):
    prompt, *intervals = row
    held = {"prompt": prompt, "class": name, "target": target}
    for label, interval in zip(labels, intervals, strict=False):
        held |= {f"{label}{end}": value for end, value in zip(("", " low", " high"), interval, strict=True)}
    return held
