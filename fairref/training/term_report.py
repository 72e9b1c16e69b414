"""The evaluation of a run without a target: each term's mean before and after."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import torch

from fairref.evaluation.before_after import GRID, ImageCounts
from fairref.evaluation.judging import SEED
from fairref.files.images import save_png, to_image
from fairref.files.paths import only_numbers, write_json
from fairref.files.sheets import Pair, enlarged, sheet
from fairref.generation.adapters import load_adapter
from fairref.generation.drawing import fixed_images
from fairref.progress import Progress
from fairref.prompts.sets import Prompts, evenly
from fairref.training.setup import Setup
from fairref.training.terms import sums_of
from fairref.training.validation import drawing_of, term_sums


def term_report(
    setup: Setup,
    adapters: Mapping[str, Path],
    concepts: Sequence[Prompts],
    images: ImageCounts,
    folder: Path,
) -> dict[str, dict[str, dict[str, object]]]:
    """Label of a model -> part of the prompts -> the means; printed, and written to evaluation.json.

    before_after.png shows both models' images of the same noise.
    """
    models = {"before": setup.bundle}
    models |= {f"after ({name})": load_adapter(setup.bundle, file) for name, file in adapters.items()}
    results = {}
    for prompts, part in product(concepts, ("test", "train")):
        n = images.unseen if part == "test" or not prompts.test else images.seen
        texts = getattr(prompts, part)
        for label, model in models.items() if n and texts else ():
            means = _means(setup, model, texts, n, f"{label}, {part} {prompts.name}")
            key = part if len(concepts) == 1 else f"{prompts.name}, {part}"
            report = {
                "concept": prompts.name,
                "part": part,
                "prompts": len(texts),
                "images": n,
                "terms": means,
            }
            results.setdefault(label, {})[key] = report
            if setup.processes.first:
                said = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
                print(f"{label}: {len(texts)} {part} {prompts.name} x {n} images: {said}")
    if setup.processes.first:
        write_json(folder / "evaluation.json", only_numbers(results))
        _draw(setup, models, concepts, folder / "before_after.png")
    return results


def _means(setup, model, prompts, n, label):
    """The mean over all images of each term, and of their weighted sum, "loss"."""
    how, mine = drawing_of(setup.recipe), setup.processes.part(len(prompts))
    sums = torch.zeros(len(sums_of(setup)), dtype=torch.float64)
    with Progress(len(mine), label, setup.processes.first) as progress:
        for p in mine:
            o = fixed_images(setup.bundle, SEED, prompts[p], range(n), how)
            x = o if model is setup.bundle else fixed_images(model, SEED, prompts[p], range(n), how)
            sums += term_sums(setup, prompts[p], x, o)
            progress.step(prompts[p][-40:])
    (sums,) = setup.processes.total([sums])
    return dict(zip(sums_of(setup), (sums / (n * len(prompts))).tolist(), strict=True))


def _draw(setup, models, concepts, path):
    """A row of the frozen model's images of each prompt, below it the first adapter's from the same noise."""
    short = {
        prompt: concept.short(prompt) for concept in concepts for prompt in concept.test or concept.train
    }
    drawn, before_after = evenly(tuple(short), GRID[0]), list(models.values())[:2]
    how, n = drawing_of(setup.recipe), range(GRID[1])
    pairs = [
        Pair(
            short[prompt],
            tuple(
                [enlarged(to_image(x)) for x in fixed_images(model, SEED, prompt, n, how)]
                for model in before_after
            ),
        )
        for prompt in drawn
    ]
    notes = ["Each prompt: before finetuning above, after below, from the same noise."]
    image, _ = sheet(pairs, notes, {})
    save_png(
        image, path, {"prompts": "\n".join(drawn), "rows": "before and after of each prompt, same noise"}
    )
