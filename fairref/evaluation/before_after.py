"""A finetuned model beside the frozen one: reports of both, and images of the same noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.evaluation.comparison import Adapters, Evaluation, Results, adapted_models
from fairref.evaluation.judging import EvaluationSettings, draw_images, judge
from fairref.evaluation.parts import PromptPart
from fairref.evaluation.rows import NAME, write_rows
from fairref.evaluation.sentences import lines
from fairref.evaluation.tiles import GRID, TILES, save_tiles
from fairref.files.images import save_png, to_image
from fairref.files.paths import write_json
from fairref.files.sheets import Pair, enlarged, sheet
from fairref.generation.adapters import read_adapter
from fairref.prompts.sets import Prompts, evenly


@dataclass(frozen=True)
class ImageCounts:
    """How many images of each prompt are judged."""

    unseen: int  # of prompts that finetuning did not see
    seen: int  # of those that it did; 0: none


def before_after(
    settings: EvaluationSettings,
    adapters: Mapping[str, Path],
    concepts: Sequence[Prompts],
    images: ImageCounts,
    folder: Path,
) -> Results:
    """Evaluates the frozen model and each adapter on unseen and on finetuning prompts, prints it, and writes
    evaluation.json, judged.csv, before_after.png (same noise) and pictures.png into the folder."""
    adapted: dict[str, Adapters] = {
        f"after ({name})": ((read_adapter(file), 1.0),) for name, file in adapters.items()
    }
    models = adapted_models(settings.bundle, adapted)
    parts = []
    for prompts, part in product(concepts, ("test", "train")):
        # without unseen prompts, as in a text file, those of finetuning are all there is
        n = images.unseen if part == "test" or not prompts.test else images.seen
        wanted = PromptPart(prompts, part, n, None if part == "test" else 0)
        parts += [wanted] if n and wanted.prompts else []

    def say(label, report):
        if settings.processes.first:
            print("\n  ".join([f"{label}:", *lines(report)]))

    results, rows = Evaluation(settings, tuple(parts), models, adapted).run(say)
    if settings.processes.first:
        write_json(folder / "evaluation.json", results)
        write_rows(folder / NAME, rows)
        drawn = draw_before_after(settings, models, concepts, results, folder / "before_after.png")
        labels = tuple(models)[:2]
        made = next((report["made"] for report in results.get(labels[-1], {}).values()), None)
        save_tiles(settings, labels, drawn, made, folder / TILES)
    return results


def draw_before_after(
    settings: EvaluationSettings,
    models: Mapping[str, Bundle],
    concepts: Sequence[Prompts],
    results: Results,
    path: Path,
) -> dict[str, list[Tensor]]:
    """Draws some prompts: a row of the first model's images, below it the second's from the same noise, and bars.

    Returns each prompt's images (n, 3, H, W) by either model.

    `models` have the labels of `results`, which are those of evaluation.json. The bars show what the evaluation
    classifier counted in all images of a prompt; of one that `results` lack, in the images drawn here.
    """
    models = dict(list(models.items())[:2])
    concept_of = {prompt: prompts for prompts in concepts for prompt in (prompts.test or prompts.train)}
    drawn = evenly(tuple(concept_of), GRID[0])
    reports = {
        prompt: [_report_of(results.get(label, {}), settings, concept_of[prompt], prompt) for label in models]
        for prompt in drawn
    }
    evaluated = {report["images"] for of_prompt in reports.values() for report in of_prompt if report}
    pairs, images = [], {}
    for prompt in drawn:
        x = [draw_images(settings, model, prompt, GRID[1]) for model in models.values()]
        label = concept_of[prompt].short(prompt)
        images[label] = x
        if None in reports[prompt]:
            counts = [
                judge(settings, of_model).counts("classifier", settings.target.classes) for of_model in x
            ]
        else:
            counts = [report["judges"]["classifier"]["counts"][label] for report in reports[prompt]]
        if None in reports[prompt] and evaluated:
            label += f" (bars: {GRID[1]} images)"
        shares = tuple(_shares(np.reshape(of_model, settings.target.table.shape)) for of_model in counts)
        pairs.append(
            Pair(label, tuple([enlarged(to_image(one)) for one in of_model] for of_model in x), shares)
        )
    before, after = models
    seen = f"{' or '.join(map(str, sorted(evaluated) or GRID[1:]))} images"
    seen = seen if settings.bundle.detector is None else f"the faces in {seen}"
    notes = [
        f"Each prompt: {before} finetuning above, {after} below, from the same noise.",
        f"Bars: each class's share of {seen} of the prompt. Black line: where a class ends at the target.",
    ]
    targets = [settings.target.marginal(name).target for name in settings.target.classes]
    image, _ = sheet(pairs, notes, settings.target.classes, targets)
    text = {"prompts": "\n".join(drawn), "rows": f"{before} and {after} of each prompt, same noise"}
    save_png(image, path, {**text, "bars": notes[1], "seed": str(settings.seed)})
    return images


def _report_of(reports, settings, prompts, prompt):
    """The report that counted the classes of a prompt's images in this way, None without one."""
    drawing = settings.drawing
    wanted = {
        "concept": prompts.name,
        "steps": drawing.steps,
        "guidance": drawing.guidance,
        "seed": settings.seed,
    }
    for report in reports.values():
        known = prompts.short(prompt) in report["judges"]["classifier"]["counts"]
        if known and all(report[key] == value for key, value in wanted.items()):
            return report
    return None


def _shares(counts):
    """Counts (K_1, ..., K_A) -> of each attribute its K_a classes' shares, or none where nothing was counted."""
    axes = range(counts.ndim)
    alone = [counts.sum(tuple(b for b in axes if b != a)) for a in axes]
    return [(row / row.sum()).tolist() if row.any() else [] for row in alone]
