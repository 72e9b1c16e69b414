"""Figures 8 and 9: images and shares before and after, on the same noise."""

from collections.abc import Iterator, Mapping, Sequence

from fairref.errors import UserError
from fairref.evaluation.evaluation import AFTER, Evaluation
from fairref.evaluation.judging import draw_images, drawn_by
from fairref.evaluation.parts import how_made
from fairref.evaluation.tiles import seen_in
from fairref.fairness.attributes import JointTarget
from fairref.files.images import to_image
from fairref.files.paths import read_json
from fairref.files.weights import fingerprint
from fairref.progress import note
from fairref.prompts.sets import evenly
from fairref.reporting.evaluated import AFTER as LABELS
from fairref.reporting.evaluated import BEFORE, Report, made, size
from fairref.reporting.figures import Figure
from fairref.reporting.gallery import Picture, gallery
from fairref.reporting.run_files import FILES, OWN
from fairref.reporting.shares import shares_of
from fairref.reporting.tables import sentence

PROMPTS, IMAGES = 4, 6  # of figure 8: prompts, images of each


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


def read_evaluation(evaluation: Evaluation) -> list[dict[str, Report]]:
    """Return the reports before and after on each unseen concept, from the evaluation of the run that made the adapter.

    On those for finetuning where there are no others; [] without an evaluation of this very adapter and base on the
    noise that is asked for. Where there is another one, that is said. Raises UserError.
    """
    ((adapter, _),) = evaluation.adapters
    path, label = adapter.file.parent / FILES[OWN], LABELS.get(adapter.file.name)
    if label is None or not path.is_file():
        return []
    results, settings = read_json(path), evaluation.settings
    asked = how_made(settings, drawn_by(settings, evaluation.models[AFTER], AFTER), "")
    asked = {**asked, "prompts": None, "adapter": fingerprint(adapter.tensors)}
    try:
        pairs = [
            {BEFORE: results[BEFORE][key], AFTER: after}
            for key, after in results.get(label, {}).items()
            if key in results[BEFORE]
        ]
        differing = {key for pair in pairs for key in _differing(asked, pair[AFTER])}
        pairs = [pair for pair in pairs if pair[AFTER]["part"] == "test"] or pairs
    except (AttributeError, LookupError, TypeError):
        raise UserError(
            f"{path}: not what an evaluation of fairref wrote; evaluate again, or move it."
        ) from None
    if differing:
        note(f"{path} differs in {', '.join(sorted(differing))}, so figure 9 does not show it")
    return [] if differing else pairs


def _differing(asked, report):
    """In what a report is known to be of other images than those that are asked for."""
    said = {**made(report), "adapter": report.get("fingerprint")}
    return [key for key, value in asked.items() if None not in (value, said.get(key)) and value != said[key]]


def measured(evaluation: Evaluation) -> list[dict[str, Report]]:
    """Return each concept's reports by model: the images are drawn and judged, as far as that is not kept."""
    sizes = " and ".join(f"{len(part.prompts)} prompts × {part.images} images" for part in evaluation.parts)
    note(f"figure 9 draws {sizes}, by {' and by '.join(evaluation.models)}")
    return [
        {label: evaluated.report for label, evaluated in evaluation.of_part(part)}
        for part in evaluation.parts
    ]


def figures_9(target: JointTarget, reports: Sequence[Mapping[str, Report]]) -> Iterator[Figure]:
    """Yield the share of a class by prompt, before and after, of each concept and attribute.

    `reports`: of each concept, label of a model -> its report. Of two classes the one that shall be rarer is drawn, of
    more classes each.
    """
    for of_concept in reports:
        first = next(iter(of_concept.values()))
        for attribute, names in target.classes.items():
            targets = dict(zip(names, target.marginal(attribute).target, strict=True))
            for shares in shares_of(of_concept, attribute, targets):
                about = f"{size(first)}, 95% intervals (Wilson)"
                parts = [
                    "fig9",
                    *([first["concept"]] if len(reports) > 1 else []),
                    *([attribute] if len(target.classes) > 1 else []),
                    *([shares.name] if len(names) > 2 else []),
                ]
                title = f"{sentence(shares.words)} in the images of each prompt"
                svg = shares.draw(shares.rows, title, about)
                yield Figure("-".join(parts), svg, [_numbers(row, shares) for row in shares.rows])


def _numbers(row, shares):
    prompt, *intervals = row
    held = {"prompt": prompt, "class": shares.name, "judge": shares.judge, "target": shares.target}
    for label, interval in zip(shares.labels, intervals, strict=False):
        held |= {f"{label}{end}": value for end, value in zip(("", " low", " high"), interval, strict=True)}
    return held
