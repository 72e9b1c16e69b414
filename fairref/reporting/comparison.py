"""Figures 8 and 9: images and shares before and after, on the same noise."""

from collections.abc import Iterator, Mapping, Sequence

from fairref.errors import UserError
from fairref.evaluation.certainty import share
from fairref.evaluation.evaluation import Evaluation
from fairref.evaluation.judging import draw_images
from fairref.evaluation.parts import Report
from fairref.evaluation.tiles import JUDGE, seen_in
from fairref.fairness.attributes import JointTarget
from fairref.files.images import to_image
from fairref.files.paths import read_json
from fairref.files.weights import fingerprint
from fairref.generation.adapters import AdapterFile
from fairref.prompts.sets import evenly
from fairref.reporting import charts
from fairref.reporting.figures import Figure
from fairref.reporting.gallery import Picture, gallery
from fairref.reporting.tables import attribute_words

PROMPTS, IMAGES = 4, 6  # of figure 8: prompts, images of each
EVALUATION = "evaluation.json"
BEFORE = "before"
AFTER = {  # an adapter's file in a run's folder -> its label in the evaluation there
    "adapter.safetensors": "after (ema)",
    "adapter_raw.safetensors": "after (raw)",
    "adapter_best.safetensors": "after (best)",
}


def figure_8(evaluation: Evaluation, n: int = IMAGES) -> Figure:
    """Return n images of some prompts by each model, from the same noise, with what the evaluation classifier sees."""
    settings, classes = evaluation.settings, evaluation.settings.target.classes
    names = {prompt: part.concept.short(prompt) for part in evaluation.parts for prompt in part.prompts}
    shown: dict[str, dict[str, list[Picture]]] = {}
    for prompt in evenly(tuple(names), PROMPTS):
        for label, model in evaluation.models.items():
            x = draw_images(settings, model, prompt, n)
            shown.setdefault(names[prompt], {})[label] = [
                Picture(to_image(image), seen["box"], seen["classes"])
                for image, seen in zip(x, seen_in(settings, x), strict=True)
            ]
    note = "Below an image: the class that the classifier sees; the bar is its probability."
    if settings.bundle.detector is not None:
        note = f"Box: the face that counts. {note}"
    title = " and ".join(evaluation.models).capitalize() + " finetuning, from the same noise"
    return Figure("fig8", gallery(shown, classes, title, note), list(_rows(shown, classes)))


def _rows(shown, classes):
    """The numbers of figure 8: a row for each image and attribute."""
    for prompt, models in shown.items():
        for label, pictures in models.items():
            for i, picture in enumerate(pictures):
                edges = dict(zip(("left", "top", "right", "bottom"), picture.box or [None] * 4, strict=True))
                for attribute in classes:
                    name, probability = picture.seen.get(attribute, (None, None))
                    row = {"prompt": prompt, "model": label, "image": i, "attribute": attribute}
                    yield {**row, "class": name, "probability": probability, **edges}


def measured(evaluation: Evaluation) -> list[dict[str, Report]]:
    """Return each concept's reports by model: the images are drawn and judged, as far as that is not kept."""
    return [
        {label: evaluated.report for label, evaluated in evaluation.of_part(part)}
        for part in evaluation.parts
    ]


def read_evaluation(adapter: AdapterFile) -> list[dict[str, Report]]:
    """Return the reports before and after on each unseen concept, from the evaluation of the run that made the adapter.

    On those for finetuning where there are no others; [] without an evaluation of this very adapter. Raises UserError.
    """
    path, label = adapter.file.parent / EVALUATION, AFTER.get(adapter.file.name)
    if label is None or not path.is_file():
        return []
    results, made = read_json(path), fingerprint(adapter.tensors)
    try:
        pairs = [
            {BEFORE: results[BEFORE][key], label: after}
            for key, after in results.get(label, {}).items()
            if after.get("fingerprint", made) == made and key in results[BEFORE]  # older ones have none
        ]
        return [pair for pair in pairs if pair[label]["part"] == "test"] or pairs
    except (AttributeError, LookupError, TypeError):
        raise UserError(
            f"{path}: not what an evaluation of fairref wrote; evaluate again, or move it."
        ) from None


def figures_9(target: JointTarget, reports: Sequence[Mapping[str, Report]]) -> Iterator[Figure]:
    """Yield the share of a class by prompt, before and after, of each concept and attribute.

    `reports`: of each concept, label of a model -> its report. Of two classes the one that shall be rarer is drawn, of
    more classes each.
    """
    for of_concept in reports:
        first = next(iter(of_concept.values()))
        for attribute, names in target.classes.items():
            shares = target.marginal(attribute).target
            counts = {label: _counts(report, attribute) for label, report in of_concept.items()}
            for k in [shares.index(min(shares))] if len(names) == 2 else range(len(names)):
                rows = sorted(_share_rows(counts, k), key=lambda row: (row[1][0] is None, row[1][0], row[0]))
                about = f"share of {names[k]}, {first['images']} images a prompt, 95% intervals (Wilson)"
                title = f"Share of {names[k]} ({attribute_words(attribute)}) in the images of each prompt"
                parts = [
                    "fig9",
                    *([first["concept"]] if len(reports) > 1 else []),
                    *([attribute] if len(target.classes) > 1 else []),
                    *([names[k]] if len(names) > 2 else []),
                ]
                svg = charts.dumbbells(rows, shares[k], about, title, (*counts, "")[:2])
                numbers = [_numbers(row, counts, names[k], shares[k]) for row in rows]
                yield Figure("-".join(parts), svg, numbers)


def _counts(report, attribute):
    """Prompt -> counts of the attribute's classes by the evaluation classifier."""
    of_attribute = report.get("attributes", {}).get(attribute, report)
    return of_attribute["judges"][JUDGE]["counts"]


def _share_rows(counts, k):
    """Of each prompt its name and the shares of class k by the first model and the second, None without one."""
    for prompt in next(iter(counts.values())):
        intervals = [share(of_model[prompt][k], sum(of_model[prompt])) for of_model in counts.values()]
        yield prompt, *[*intervals, None][:2]


def _numbers(row, labels, name, target):
    prompt, *intervals = row
    held = {"prompt": prompt, "class": name, "target": target}
    for label, interval in zip(labels, intervals, strict=False):
        held |= {f"{label}{end}": value for end, value in zip(("", " low", " high"), interval, strict=True)}
    return held
