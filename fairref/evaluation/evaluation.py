"""How fair, and how faithful, the images of a model are (docs/method.md §8).

P prompts, n images of each, K classes.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from fairref.bundle.loading import Bundle
from fairref.bundle.recipe import resolve
from fairref.errors import UserError, typed
from fairref.evaluation.judging import SEED, EvaluationSettings, judge_prompts
from fairref.evaluation.statistics import JudgedImages, bias_report, joint_names
from fairref.fairness.attributes import wanted_target
from fairref.generation.adapters import load_adapters
from fairref.generation.drawing import Drawing
from fairref.generation.strengths import choose_adapters, describe_adapters
from fairref.prompts import PARTS
from fairref.prompts.sets import OCCUPATIONS, Prompts, read_prompts, warn_of_cut

EXPLICIT_IMAGES = 4  # of each occupation and class that the prompt names
Report = dict[str, object]


def clip_t(
    settings: EvaluationSettings, judged: Sequence[JudgedImages], prompts: Sequence[str]
) -> dict[str, float] | None:
    """CLIP-T: mean cosine of images and their own prompt, and of images and all other prompts."""
    bundle = settings.bundle
    if bundle.clip is None or len(prompts) < 2:
        return None
    with torch.no_grad():
        ids = bundle.clip_tokenizer(list(prompts)).to(bundle.device)
        texts = bundle.clip.encode_text(ids).float().cpu()  # (P, D)
    # all are of unit norm, so the mean cosine with a text is the product with the mean feature
    cosines = torch.stack([s.features["clip"].mean(0) for s in judged]) @ texts.T  # (P, P)
    P = len(prompts)
    matched = cosines.diagonal().mean()
    return {"matched": float(matched), "shuffled": float((cosines.sum() - cosines.trace()) / (P * (P - 1)))}


def obedience(judged: Sequence[JudgedImages], asked: Sequence[tuple[str, str, int]]) -> dict[str, float]:
    """The share of images that show the class their prompt names, by each judge (one it can't tell is a miss).

    `asked`: of each prompt that names a class the prompt, the attribute and the class index.
    """
    n, shares = len(next(iter(judged[0].classes["classifier"].values()))), {}
    for j in judged[0].classes:
        told = [(s, name, k) for s, (_, name, k) in zip(judged, asked, strict=True) if name in s.classes[j]]
        right = sum(int(((s.classes[j][name] == k) & s.known(j)).sum()) for s, name, k in told)
        shares[j] = right / (n * len(told))
    return {"images": n * len(asked), **shares}


def evaluate_part(
    settings: EvaluationSettings,
    model: Bundle,
    prompts: Prompts,
    part: str,
    n: int,
    label: str = "evaluating",
    explicit_images: int = EXPLICIT_IMAGES,
) -> tuple[Report, list[JudgedImages]]:
    """The report on one part of a concept's prompts, ready for JSON, and what it was made from.

    Prompts that name a class are drawn, too, where `explicit_images` > 0 and the concept can name one.
    """
    texts = list(getattr(prompts, part))
    label = f"{label}, {part} {prompts.name}"
    judged = judge_prompts(settings, model, texts, n, label)
    target = settings.target
    report = {
        "attribute": ",".join(target.classes),
        "classes": joint_names(target.classes),
        "concept": prompts.name,
        "part": part,
        "steps": settings.drawing.steps,
        "guidance": settings.drawing.guidance,
        "padding": settings.drawing.padding,
        "seed": settings.seed,
        "judged_by": settings.judged_by,
        **bias_report(judged, list(map(prompts.short, texts)), target.classes, n, target.table),
        "clip_t": clip_t(settings, judged, texts),
    }
    if explicit_images and prompts.occupations:
        asked = prompts.explicit(part, target.classes)
        shown = judge_prompts(
            settings, model, [prompt for prompt, *_ in asked], explicit_images, f"{label}, explicit prompts"
        )
        report["explicit"] = obedience(shown, asked)
    return report, judged


@typed
def evaluate(
    bundle: Bundle,
    adapter: str | Path | Sequence[str | Path] | None = None,
    attr: str | None = "gender",
    images: int | None = None,
    *,
    strength: float | Sequence[float] | None = None,
    any_base: bool = False,
    target: str | Sequence[str] | None = None,
    prompts: str | Sequence[str] = OCCUPATIONS,
    part: str = "test",
    steps: int | None = None,
    guidance: float | None = None,
    padding: str = "full",
    explicit_images: int = EXPLICIT_IMAGES,
    seed: int = SEED,
) -> Report:
    """How fair the bundle is, with adapters (a run's folder or a file each) or without: the report, ready for JSON.

    `strength` of each adapter, or of all LoRAs (None: 1); `any_base` as in `load_adapter`, to learn how fair a
    derived model is. `attr`, `target` and `prompts` as in train.py; `images` of each prompt. None: what the
    bundle's recipe says. Of several concepts the reports stand under the concepts' names. Raises UserError.
    """
    if part not in PARTS:
        raise UserError(f"The part is {part!r}; expected one of {', '.join(PARTS)}.")
    wanted = wanted_target(attr, target, bundle.attributes, str(bundle.path))
    given = {"eval_steps": steps, "eval_guidance": guidance, "eval_images": images}
    given = {key: value for key, value in given.items() if value is not None}
    recipe = resolve(tuple(wanted.classes), bundle.recipe, given, bundle.path, bundle.attributes)
    concepts = read_prompts(prompts, None, bundle.path, list(wanted.classes))
    for concept in concepts:
        if not getattr(concept, part):
            raise UserError(f"--part is {part}, of which {concept.name} has no prompt; give another part.")
    adapters = choose_adapters(adapter, strength)
    model = load_adapters(bundle, adapters, any_base)
    texts = [text for concept in concepts for text in getattr(concept, part)]
    warn_of_cut(bundle.tokenizer, texts, 0 if model.prefix is None else len(model.prefix))
    drawing = Drawing(recipe.eval_steps, recipe.eval_guidance, recipe.end, padding)
    settings = EvaluationSettings(bundle, wanted, drawing, seed)
    used = describe_adapters(bundle, adapters)
    reports = {}
    for concept in concepts:
        report, _ = evaluate_part(
            settings, model, concept, part, recipe.eval_images, explicit_images=explicit_images
        )
        reports[concept.name] = {"adapters": used, **report}
    return reports if len(reports) > 1 else next(iter(reports.values()))
