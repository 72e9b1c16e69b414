"""How fair, and how faithful, the images of a model are, one part of a concept at a time (docs/method.md §8).

P prompts, n images of each.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fairref.bundle.loading import Bundle
from fairref.evaluation.confusion import Confusions, difference, of_explicit
from fairref.evaluation.judge_errors import corrected, prediction_powered
from fairref.evaluation.judging import EvaluationSettings, ImageSource, drawn_by, judge_prompts
from fairref.evaluation.labels import BY_HAND, Labels, on_labels
from fairref.evaluation.paired import diversities, paired_by_judge
from fairref.evaluation.statistics import JudgedImages, bias_report, flips, joint_names, likeness
from fairref.fairness.attributes import JointTarget
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
    confusions: Confusions = field(default_factory=dict)  # of the judges on the latter


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


def report_on(
    settings: EvaluationSettings, judged: list[JudgedImages], about: Report, prompts: Mapping[str, str]
) -> Report:
    """The report on images of P prompts, which have a name each; `about` says what they are."""
    classes = settings.target.classes
    return {
        "attribute": ",".join(classes),
        "classes": joint_names(classes),
        **about,
        "judged_by": settings.judged_by,
        **bias_report(judged, list(prompts.values()), classes, settings.target.table),
        "clip_t": clip_t(settings, judged, list(prompts)),
        "diversity": diversities(judged, classes),
        "confusion": {},
    }


def with_confusions(report: Report, *known: Confusions) -> None:
    """Puts confusions into a report, judge -> attribute -> some; the first of them is the one that counts."""
    for confusions in known:
        for judge, of_judge in confusions.items():
            for name, found in of_judge.items():
                report["confusion"].setdefault(judge, {}).setdefault(name, []).append(found.to_dict())


def correct(report: Report, target: JointTarget) -> None:
    """Puts beside each judge's counts of an attribute what they are without its errors, where its confusion is known.

    Of images that are labelled by hand, the shares are prediction-powered: these labels are a sample of the images.
    """
    for name, classes in target.classes.items():
        view = report["attributes"][name] if len(target.classes) > 1 else report
        shares = np.array(target.marginal(name).target)
        for judge, of_judge in view["judges"].items():
            known, *_ = report["confusion"].get(judge, {}).get(name, [None])
            if known is None:
                continue
            counts, labelled = np.array(list(of_judge["counts"].values())), np.array(known["counts"])
            of_judge["corrected"] = corrected(counts, labelled, known["source"], classes, shares)
            if known["source"] == BY_HAND and of_judge["corrected"]:
                others = counts.sum(0) - labelled.sum(0)
                of_judge["corrected"] |= prediction_powered(others, labelled, classes)


def how_made(settings: EvaluationSettings, source: ImageSource, prompts: str) -> Report:
    """Whatever two reports must share to be of the same noise and base: how images were drawn, at which strength of the
    adapter (of several a list, of none None), by which weights, of which prompts: a part's name, or a text file's."""
    strengths = [strength for _, strength in source.adapters]
    said = json.dumps(settings.bundle.fingerprints, sort_keys=True)
    return {
        "seed": settings.seed,
        **settings.drawing._asdict(),
        "strength": strengths[0] if len(strengths) == 1 else strengths or None,
        "weights": hashlib.sha256(said.encode()).hexdigest(),
        "prompts": prompts,
    }


def evaluate_part(
    settings: EvaluationSettings, source: ImageSource, part: PromptPart, labels: Labels | None = None
) -> Evaluated:
    """Draws and judges the images of a part's prompts, of which some may have `labels`."""
    prompts, concept, drawing = part.prompts, part.concept, settings.drawing
    words = f"{part.part} {concept.name}"
    judged = judge_prompts(settings, source, prompts, part.images, words)
    about = {
        "concept": concept.name,
        "part": part.part,
        "steps": drawing.steps,
        "guidance": drawing.guidance,
        "padding": drawing.padding,
        "seed": settings.seed,
        "made": how_made(settings, source, concept.file or part.part),
    }
    report = report_on(settings, judged, about, {prompt: concept.short(prompt) for prompt in prompts})
    classes = settings.target.classes
    by_hand = on_labels(labels, judged, classes, BY_HAND) if labels else {}
    with_confusions(report, by_hand, settings.confusions)
    asked = part.explicit(classes)
    if not asked:
        correct(report, settings.target)
        return Evaluated(report, judged)
    texts = [prompt for prompt, *_ in asked]
    explicit = judge_prompts(settings, source, texts, part.explicit_images, f"{words}, explicit prompts")
    report["explicit"] = obedience(explicit, asked)
    seen = of_explicit(explicit, asked, classes)
    with_confusions(report, seen)
    correct(report, settings.target)
    return Evaluated(report, judged, explicit, seen)


def compare(
    settings: EvaluationSettings,
    models: Mapping[str, Bundle],
    part: PromptPart,
    others: Sequence[ImageSource] = (),
    labels: Labels | None = None,
) -> Iterator[tuple[str, Evaluated]]:
    """Each model by its label, the original first, then the others; the reports on all but the original also say how
    like it they are, on the same noise, and whether the judges err on their images as on its. `labels` are of the last
    model's images."""
    original, (*_, last) = None, models
    for source in (*(drawn_by(settings, model, label) for label, model in models.items()), *others):
        evaluated = evaluate_part(settings, source, part, labels if source.label == last else None)
        if original is None:
            original = evaluated
        else:
            evaluated.report.update(likeness(evaluated.judged, original.judged))
            evaluated.report["paired"] = paired_by_judge(evaluated.judged, original.judged, settings.target)
            evaluated.report["flips"] = flips(evaluated.judged, original.judged, settings.target.classes)
            for judge, of_judge in evaluated.confusions.items():
                for name, seen in of_judge.items():
                    p = difference(original.confusions[judge][name], seen)
                    evaluated.report["confusion"][judge][name][-1]["p_as_before"] = p
        yield source.label, evaluated
