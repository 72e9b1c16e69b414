"""How fair, and how faithful, the images of a model are, one part of a concept at a time (docs/method.md §8).

P prompts, n images of each.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fairref.bundle.loading import Bundle
from fairref.evaluation.judging import EvaluationSettings, ImageSource, drawn_by, judge_prompts
from fairref.evaluation.statistics import JudgedImages, bias_report, joint_names, likeness
from fairref.prompts.sets import Prompts

EXPLICIT_IMAGES = 4  # of each occupation and class that the prompt names
Report = dict[str, object]


@dataclass(frozen=True)
class PromptPart:
    """Which prompts are evaluated, and how many images of each are drawn."""

    concept: Prompts
    part: str  # of PARTS
    images: int  # n of each prompt
    explicit_images: int = (
        EXPLICIT_IMAGES  # of each prompt that names a class, where the concept has some; 0: none
    )

    @property
    def prompts(self) -> list[str]:
        """The P prompts."""
        return list(getattr(self.concept, self.part))

    def explicit(self, classes: dict[str, tuple[str, ...]]) -> list[tuple[str, str, int]]:
        """Prompts that name a class: (prompt, attribute, class index)."""
        has_some = self.explicit_images and self.concept.occupations
        return self.concept.explicit(self.part, classes) if has_some else []


@dataclass(frozen=True)
class Evaluated:
    """A part of the prompts, as one source of images shows them."""

    report: Report  # ready for JSON
    judged: list[JudgedImages]  # of each prompt
    explicit: list[JudgedImages] = field(default_factory=list)  # of each prompt that names a class


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

    asked: (prompt, attribute, class index).
    """
    shares = {}
    for j in judged[0].classes:
        told = [(s, name, k) for s, (_, name, k) in zip(judged, asked, strict=True) if name in s.classes[j]]
        right = sum(int(((s.classes[j][name] == k) & s.known(j)).sum()) for s, name, k in told)
        shares[j] = right / sum(len(s) for s, *_ in told)
    return {"images": sum(map(len, judged)), **shares}


def evaluate_part(settings: EvaluationSettings, source: ImageSource, part: PromptPart) -> Evaluated:
    """Draws and judges the images of a part's prompts."""
    prompts, target, concept = part.prompts, settings.target, part.concept
    about = f"{part.part} {concept.name}"
    judged = judge_prompts(settings, source, prompts, part.images, about)
    report = {
        "attribute": ",".join(target.classes),
        "classes": joint_names(target.classes),
        "concept": concept.name,
        "part": part.part,
        "steps": settings.drawing.steps,
        "guidance": settings.drawing.guidance,
        "padding": settings.drawing.padding,
        "seed": settings.seed,
        "judged_by": settings.judged_by,
        **bias_report(judged, list(map(concept.short, prompts)), target.classes, part.images, target.table),
        "clip_t": clip_t(settings, judged, prompts),
    }
    asked = part.explicit(target.classes)
    if not asked:
        return Evaluated(report, judged)
    texts = [prompt for prompt, *_ in asked]
    explicit = judge_prompts(settings, source, texts, part.explicit_images, f"{about}, explicit prompts")
    return Evaluated({**report, "explicit": obedience(explicit, asked)}, judged, explicit)


def compare(
    settings: EvaluationSettings,
    models: Mapping[str, Bundle],
    part: PromptPart,
    others: Sequence[ImageSource] = (),
) -> Iterator[tuple[str, Evaluated]]:
    """Each model by its label, the original first, then the others; the reports on all but the original also say how
    like it they are, on the same noise."""
    original = None
    for source in (*(drawn_by(settings, model, label) for label, model in models.items()), *others):
        evaluated = evaluate_part(settings, source, part)
        if original is None:
            original = evaluated
        else:
            evaluated.report.update(likeness(evaluated.judged, original.judged))
        yield source.label, evaluated
