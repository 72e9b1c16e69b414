"""A model's images as the judges see them (docs/method.md §8).

P prompts, n images of each, K classes. The evaluation classifier, whose gradient no finetuning has seen (a run's
validations ask it which adapter is best), and the nearest-template judge, through which no gradient can flow. Noise
depends on (seed, prompt, image), so two models are measured on the same noise, whatever else is measured with it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.errors import UserError
from fairref.evaluation.confusion import Confusions
from fairref.evaluation.kept import KeptJudgements, judges_of, model_of
from fairref.evaluation.statistics import JudgedImages
from fairref.fairness.attributes import JointTarget
from fairref.fairness.faces import Faces
from fairref.files.weights import finite
from fairref.generation.drawing import Drawing, fixed_images, fixed_images_of, group_size
from fairref.generation.views import classify, faces_of, require_attributes, scatter_to_images
from fairref.processes import Processes
from fairref.progress import Progress

SEED = 1_000_000  # of evaluation noise, far from the seeds of finetuning


@dataclass(frozen=True)
class EvaluationSettings:
    """What stays the same in an evaluation. Raises UserError."""

    bundle: Bundle  # whose judges look; the model that draws may be an adapted one
    target: JointTarget  # what is counted
    drawing: Drawing
    seed: int = SEED
    processes: Processes = Processes()  # prompts are shared out among them
    kept: Path | None = None  # folder of judgements, which are not made again; None: none are kept
    confusions: Confusions = field(default_factory=dict)  # of the judges, on labelled pictures

    def __post_init__(self):
        if "evaluate" not in self.bundle.classifiers:
            raise UserError(
                f"{self.bundle.path}: has no classifier for evaluation; use a bundle that names one."
            )
        require_attributes(self.bundle, "evaluate", self.target)

    @property
    def judged_by(self) -> dict[str, dict[str, str]]:
        """Judge -> attribute of the target -> what judges it, as bundle.json or --judge names it."""
        named, names = self.bundle.named("classifiers.evaluate"), self.target.classes
        found = {
            judge: {name: named[place] for place, mine in places.items() for name in mine if name in names}
            for judge, places in turns(self.bundle).items()
            if max(places) < len(named)  # classifiers of a program may have no name
        }
        if self.bundle.templates is not None:
            (file,) = self.bundle.named("templates") or ("templates",)
            found["templates"] = {name: file for name in names if name in self.bundle.templates.attributes}
        return {judge: attributes for judge, attributes in found.items() if attributes}


@dataclass(frozen=True)
class ImageSource:
    """What makes the images that are judged: a model, or anything else."""

    label: str  # as reports and rows name it
    draw: Callable[[str, range], Tensor]  # prompt, which of its images -> (n, 3, H, W) in [-1, 1]
    # all that its images follow from beside their prompt and number, for JSON; None: their judgements are not kept
    made_of: Mapping[str, object] | None = None
    adapters: tuple[tuple[str, float], ...] = ()  # with which a bundle draws
    # several prompts, which of the images of each -> (P n, 3, H, W), where that is faster than one by one
    draw_together: Callable[[Sequence[str], range], Tensor] | None = None


def drawn_by(settings: EvaluationSettings, model: Bundle, label: str) -> ImageSource:
    """The images of a bundle, adapted or not."""

    def draw(prompt, images):
        return draw_images(settings, model, prompt, images.stop, images.start)

    def draw_together(prompts, images):
        drawn = fixed_images_of(model, settings.seed, prompts, images, settings.drawing)
        for prompt, x in zip(prompts, drawn.split(len(images)), strict=True):
            _check_numbers(x, prompt, settings)
        return drawn

    made_of = model_of(model, settings.drawing, settings.seed) if settings.kept else None
    together = draw_together if settings.drawing.padding == "full" else None
    return ImageSource(label, draw, made_of, model.adapters, together)


def draw_images(settings: EvaluationSettings, model: Bundle, prompt: str, n: int, first: int = 0) -> Tensor:
    """Images first .. n - 1 of one prompt, (n - first, 3, H, W); the noise follows from (seed, prompt, image).

    Raises UserError.
    """
    x = fixed_images(model, settings.seed, prompt, range(first, n), settings.drawing)
    _check_numbers(x, prompt, settings)
    return x


def _check_numbers(x, prompt, settings):
    if not finite(x):
        raise UserError(
            f"Images of {prompt!r} at guidance {settings.drawing.guidance} are no numbers; measure with `fairref"
            " evaluate` at a lower --guidance, or in float32."
        )


def turns(bundle: Bundle) -> dict[str, dict[int, list[str]]]:
    """Judge -> the place of a classifier in the bundle's list -> the attributes that it judges for this judge.

    "classifier" judges each attribute by the first that knows it, "classifier 2" by the second, and so on.
    """
    judges: dict[str, dict[int, list[str]]] = {}
    classifiers = bundle.classifiers.get("evaluate", ())
    for name in dict.fromkeys(name for classifier in classifiers for name in classifier.classes):
        knowing = [place for place, classifier in enumerate(classifiers) if name in classifier.classes]
        for turn, place in enumerate(knowing, 1):
            of_judge = judges.setdefault("classifier" if turn == 1 else f"classifier {turn}", {})
            of_judge.setdefault(place, []).append(name)
    return judges


def logits_of(bundle: Bundle, judge: str, x: Tensor, faces: Faces | None) -> dict[str, Tensor]:
    """Attribute -> logits (M, K_a) of a judge that is classifiers, on the M faces in n images."""
    logits = {}
    for place, names in turns(bundle)[judge].items():
        logits |= classify([bundle.classifiers["evaluate"][place]], names, x, faces)
    return logits


def judge(settings: EvaluationSettings, x: Tensor) -> JudgedImages:
    """All judges, CLIP and DINO on n images, by the target's attributes."""
    return judge_all(settings.bundle, x).of(settings.target.classes)


@torch.no_grad()
def judge_all(bundle: Bundle, x: Tensor) -> JudgedImages:
    """The same, by every attribute that a judge can tell: what is kept serves other targets, too."""
    faces = faces_of(bundle, x)
    has_face = None if faces is None else faces.has_face
    classes, probabilities, features, colours = {}, {}, {}, {}
    for name in turns(bundle):
        logits = logits_of(bundle, name, x, faces)
        classes[name] = {a: scatter_to_images(v.argmax(1), has_face, -1) for a, v in logits.items()}
        probabilities[name] = {
            a: scatter_to_images(v.softmax(1).float(), has_face, torch.nan) for a, v in logits.items()
        }
    if bundle.templates is not None:
        verdict = bundle.templates(x)
        classes["templates"] = {
            a: verdict[a].where(verdict[f"{a}_known"], -1) for a in bundle.templates.attributes
        }
        colours = bundle.templates.colours(x, verdict)
    if bundle.clip is not None:
        features["clip"] = bundle.clip.encode_image(x).float()
    if bundle.dino is not None:
        features["dino"] = F.normalize(bundle.dino(x).float(), dim=1)
    boxes = None if faces is None else scatter_to_images(faces.boxes.float(), has_face, torch.nan)
    judged = JudgedImages(classes, probabilities, boxes, features, colours)
    return JudgedImages.from_tensors({name: rows.cpu() for name, rows in judged.tensors().items()})


def judge_prompts(
    settings: EvaluationSettings, source: ImageSource, prompts: Sequence[str], n: int, about: str = ""
) -> list[JudgedImages]:
    """n images of each of P prompts, judged on the target's attributes; every process gets all P results.

    What is kept is not drawn again, and what is drawn is kept, at once. `about` is shown beside the progress.
    """
    processes, kept = settings.processes, _kept(settings, source)
    judged = [kept.read(prompt) if kept else None for prompt in prompts]
    there = processes.least(
        [0 if s is None else min(len(s), n) for s in judged]
    )  # images that all processes have
    missing = [p for p, count in enumerate(there) if count < n]
    mine = [missing[i] for i in processes.part(len(missing))]
    with Progress(len(mine), f"{source.label}{about and ', '}{about}", processes.first) as progress:
        for p, drawn in _drawn(settings, source, mine, prompts, [n - count for count in there], n):
            judged[p] = drawn if there[p] == 0 else judged[p].first(there[p]).followed_by(drawn)
            if kept:
                kept.write(prompts[p], judged[p])
            progress.step(prompts[p][-40:])
    if processes.world > 1 and missing:
        for p, of_prompt in zip(
            missing, _gathered(settings, [judged[p] for p in mine], len(missing), n), strict=True
        ):
            judged[p] = of_prompt
    return [of_prompt.first(n).of(settings.target.classes) for of_prompt in judged]


def _drawn(settings, source, mine, prompts, lacking, n):
    """The images that prompts `mine` lack of n, judged, as (p, images): several prompts at once where each lacks few.

    The last group is filled up. For rounding hangs on how many images are drawn at once, and that must not hang on how
    many processes share the prompts, nor on which of them an interrupted evaluation has left.
    """
    for few, some in groupby(mine, key=lambda p: lacking[p]):
        of_some, images = list(some), range(n - few, n)
        size = min(group_size(settings.bundle) // few, len(prompts)) if source.draw_together else 1
        for start in range(0, len(of_some), max(size, 1)):
            group = of_some[start : start + max(size, 1)]
            texts = [prompts[p] for p in group]
            if size > 1:
                x = source.draw_together(texts + texts[:1] * (size - len(texts)), images)
            else:
                x = source.draw(*texts, images)
            yield from zip(group, judge_all(settings.bundle, x).split(few), strict=False)


def _kept(settings, source):
    """The judgements of the source's images that are kept; None where none are."""
    judges = judges_of(settings.bundle) if settings.kept and source.made_of else None
    return KeptJudgements(settings.kept, source.made_of, judges) if judges else None


def _gathered(settings, judged, P, n):
    """This process's results of its prompts -> those of all P."""
    if judged:
        rows = [s.tensors() for s in judged]
        here = {name: torch.stack([r[name] for r in rows]) for name in rows[0]}  # (P_here, n, ...)
    else:  # more processes than prompts: one black image says what there is of each image
        side = settings.bundle.resolution
        x = torch.full((1, 3, side, side), -1.0, device=settings.bundle.device)
        here = {
            name: one.expand(n, *one.shape[1:])[None][:0]
            for name, one in judge_all(settings.bundle, x).tensors().items()
        }
    gathered = {name: settings.processes.gather(rows, P) for name, rows in here.items()}
    return [JudgedImages.from_tensors({name: rows[p] for name, rows in gathered.items()}) for p in range(P)]
