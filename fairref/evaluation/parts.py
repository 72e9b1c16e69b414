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
from fairref.evaluation.confusion import (
    EXPLICIT,
    Asked,
    Confusions,
    Told,
    difference,
    of_explicit,
    on_explicit,
)
from fairref.evaluation.judge_errors import FEW_POWERED, MIN_LABELLED, corrected, prediction_powered
from fairref.evaluation.judging import EvaluationSettings, ImageSource, drawn_by, judge_prompts
from fairref.evaluation.labels import BY_HAND, Labels, on_labels
from fairref.evaluation.paired import diversities, leans_by_judge, paired_by_judge
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
    # of each prompt that names a class, where the concept has some; None: EXPLICIT_IMAGES, or with so few images of the
    # others as many in all as of them
    explicit_images: int | None = None

    @property
    def prompts(self) -> list[str]:
        """The P prompts."""
        return list(getattr(self.concept, self.part))

    def explicit(self, classes: dict[str, tuple[str, ...]]) -> list[Asked]:
        """Prompts that name a class."""
        has_some = self.explicit_images != 0 and self.concept.occupations
        return self.concept.explicit(self.part, classes) if has_some else []

    def of_explicit(self, classes: dict[str, tuple[str, ...]]) -> int:
        """How many images of each of these are drawn."""
        if self.explicit_images is not None:
            return self.explicit_images
        return min(EXPLICIT_IMAGES, -(-self.images // sum(map(len, classes.values()))))


@dataclass(frozen=True)
class Evaluated:
    """A part of the prompts, as one source of images shows them."""

    report: Report  # ready for JSON
    judged: list[JudgedImages]  # of each prompt
    asked: list[Asked] = field(default_factory=list)  # prompts that name a class
    explicit: list[JudgedImages] = field(default_factory=list)  # of each of them
    told: Told = field(default_factory=dict)  # what judges say of the latter


def clip_t(
    settings: EvaluationSettings, judged: Sequence[JudgedImages], prompts: Sequence[str]
) -> dict[str, float | None] | None:
    """CLIP-T: mean cosine of images and their own prompt, and of images and all other prompts, None without others."""
    bundle, P = settings.bundle, len(prompts)
    if bundle.clip is None:
        return None
    with torch.no_grad():
        ids = bundle.clip_tokenizer(list(prompts)).to(bundle.device)
        texts = bundle.clip.encode_text(ids).float().cpu()  # (P, D)
    # all are of unit norm, so the sum of images' cosines with a text is the product with the sum of their features
    cosines = torch.stack([s.features["clip"].sum(0) for s in judged]) @ texts.T  # (P, P)
    n, matched = sum(map(len, judged)), cosines.trace()
    shuffled = float((cosines.sum() - matched) / (n * (P - 1))) if P > 1 else None
    return {"matched": float(matched / n), "shuffled": shuffled}


def obedience(judged: Sequence[JudgedImages], asked: Sequence[Asked]) -> dict[str, float]:
    """The share of images that show the class their prompt names, by each judge (one it can't tell is a miss)."""
    shares = {}
    for j in judged[0].classes:
        told = [(s, name, k) for s, (_, name, k) in zip(judged, asked, strict=True) if name in s.classes[j]]
        right = sum(int(((s.classes[j][name] == k) & s.known(j)).sum()) for s, name, k in told)
        if told:
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
    """Puts confusions into a report, judge -> attribute -> some; the first of them is the one that counts: of enough
    images of each class for an interval, or of some of each class, if there is such a one."""
    for confusions in known:
        for judge, of_judge in confusions.items():
            for name, found in of_judge.items():
                if not found.counts.any():
                    continue
                several = report["confusion"].setdefault(judge, {}).setdefault(name, [])
                several.append(found.to_dict())
                several.sort(key=_lacks)


def _lacks(confusion):
    """0 with enough labelled images of each class, 1 with some, 2 without."""
    fewest = min(map(sum, confusion["counts"]))
    return 0 if fewest >= MIN_LABELLED else 1 if fewest else 2


def correct(report: Report, target: JointTarget) -> None:
    """Puts beside each judge's counts, of an attribute or of joint classes, what they are without its errors, where its
    confusion is known.

    Of images that are labelled by hand, the shares are prediction-powered: these labels are a sample of the images.
    """
    for name, view, of in views(report, target):
        for judge, of_judge in view["judges"].items():
            several = report["confusion"].get(judge, {}).get(name)
            if not several:
                continue
            known, classes = several[0], list(of_judge["share"])
            counts = np.array(list(of_judge["counts"].values()))
            found = corrected(
                counts, np.array(known["counts"]), known["source"], classes, of.table.reshape(-1)
            )
            for by_hand in (one for one in several if one["source"] == BY_HAND):
                labelled = np.array(by_hand["counts"])
                powered = prediction_powered(counts.sum(0) - labelled.sum(0), labelled, classes)
                no_M = {**dict.fromkeys(("mean_gap", "rms_gap", "upper")), "method": "none without M"}
                if powered["method"] == FEW_POWERED and found and found["rms_gap"]:
                    continue  # M says more: it has intervals
                found = found or no_M
                of_gaps = f"M on {known['source']}" if found["rms_gap"] else found["method"]
                found |= {**powered, "source": f"{BY_HAND}; for the gaps: {of_gaps}"}
            of_judge["corrected"] = found


def views(report: Report, target: JointTarget) -> Iterator[tuple[str, Report, JointTarget]]:
    """The name, the numbers and the target of all classes of a report, and of each attribute of several."""
    yield report["attribute"], report, target
    for name, view in report.get("attributes", {}).items():
        yield name, view, JointTarget({name: target.classes[name]}, np.array(target.marginal(name).target))


def put_beside(
    report: Report, judged: list[JudgedImages], originals: list[JudgedImages], target: JointTarget
) -> None:
    """Puts into a report how like the original's images of the same noise its images are, and what has changed."""
    report.update(likeness(judged, originals))
    for _, view, of in views(report, target):
        view["paired"] = paired_by_judge(judged, originals, of)
        view["flips"] = flips(judged, originals, of.classes)
        if lines := leans_by_judge(judged, originals, of):
            view["leans"] = lines


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
    # whether a user's own judge calls its classes by words for prompts is not known
    named = {
        **settings.bundle.manifest.get("attributes", {}),
        **(concept.world.explicit if concept.world else {}),
    }
    asked = part.explicit({a: classes[a] for a in classes if a in named or part.explicit_images})
    if not asked:
        correct(report, settings.target)
        return Evaluated(report, judged)
    texts = [prompt for prompt, *_ in asked]
    explicit = judge_prompts(settings, source, texts, part.of_explicit(classes), f"{words}, explicit prompts")
    report["explicit"] = obedience(explicit, asked)
    told = on_explicit(explicit, asked)
    with_confusions(report, of_explicit(told, classes))
    correct(report, settings.target)
    return Evaluated(report, judged, asked, explicit, told)


def compare(
    settings: EvaluationSettings,
    models: Mapping[str, Bundle],
    part: PromptPart,
    others: Sequence[ImageSource] = (),
    labels: Mapping[str, Labels | None] | None = None,
) -> Iterator[tuple[str, Evaluated]]:
    """Each model by its label, the original first, then the others; the reports on all but the original also say how
    like it they are, on the same noise, and whether the judges err on their images as on its. `labels` are of a
    model's images."""
    original = None
    for source in (*(drawn_by(settings, model, label) for label, model in models.items()), *others):
        evaluated = evaluate_part(settings, source, part, (labels or {}).get(source.label))
        if original is None:
            original = evaluated
        else:
            put_beside(evaluated.report, evaluated.judged, original.judged, settings.target)
            for judge, of_judge in evaluated.told.items():
                for name, told in of_judge.items():
                    for known in evaluated.report["confusion"].get(judge, {}).get(name, []):
                        if known["source"] == EXPLICIT:
                            known["p_as_before"] = difference(original.told[judge][name], told)
        yield source.label, evaluated
