"""A model's images as two judges see them (docs/method.md §8).

P prompts, n images of each, K classes. The evaluation classifier, whose gradient no finetuning has seen (a run's
validations ask it which adapter is best), and the nearest-template judge, through which no gradient can flow. Noise
depends on (seed, prompt, image), so two models are measured on the same noise, whatever else is measured with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.errors import UserError
from fairref.evaluation.statistics import JudgedImages
from fairref.fairness.attributes import JointTarget
from fairref.files.weights import finite
from fairref.generation.drawing import Drawing, fixed_images
from fairref.generation.views import classify, faces_of, require_attributes, scatter_to_images
from fairref.judges.templates import Templates
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

    def __post_init__(self):
        if "evaluate" not in self.bundle.classifiers:
            raise UserError(
                f"{self.bundle.path}: has no classifier for evaluation; use a bundle that names one."
            )
        require_attributes(self.bundle, "evaluate", self.target)

    @cached_property
    def turns(self) -> dict[str, dict[int, list[str]]]:
        """Judge -> the place of a classifier in the bundle's list -> the attributes that it judges for this judge.

        "classifier" judges each attribute by the first that knows it, "classifier 2" by the second, and so on.
        """
        judges: dict[str, dict[int, list[str]]] = {}
        for name in self.target.classes:
            classifiers = enumerate(self.bundle.classifiers["evaluate"])
            for turn, place in enumerate([i for i, c in classifiers if name in c.classes], 1):
                of_judge = judges.setdefault("classifier" if turn == 1 else f"classifier {turn}", {})
                of_judge.setdefault(place, []).append(name)
        return judges

    @property
    def judged_by(self) -> dict[str, dict[str, str]]:
        """Judge -> attribute -> what judges it, as bundle.json or --judge names it."""
        named = self.bundle.named("classifiers.evaluate")
        found = {
            judge: {name: named[place] for place, mine in places.items() for name in mine}
            for judge, places in self.turns.items()
            if max(places) < len(named)  # classifiers of a program may have no name
        }
        if self.templates is not None:
            found["templates"] = dict.fromkeys(self.target.classes, *self.bundle.named("templates"))
        return found

    @property
    def templates(self) -> Templates | None:
        """The nearest-template judge, if the bundle has it and it knows all of the attributes."""
        judge = self.bundle.templates
        return judge if judge is not None and set(self.target.classes) <= set(judge.attributes) else None


def draw_images(settings: EvaluationSettings, model: Bundle, prompt: str, n: int) -> Tensor:
    """(n, 3, H, W) of one prompt; the noise follows from (seed, prompt, image). Raises UserError."""
    x = fixed_images(model, settings.seed, prompt, range(n), settings.drawing)
    if not finite(x):
        raise UserError(
            f"Images of {prompt!r} at guidance {settings.drawing.guidance} are no numbers; measure with `fairref"
            " evaluate` at a lower --guidance, or in float32."
        )
    return x


@torch.no_grad()
def judge(settings: EvaluationSettings, x: Tensor) -> JudgedImages:
    """All judges, CLIP and DINO on n images."""
    bundle, names = settings.bundle, tuple(settings.target.classes)
    faces = faces_of(bundle, x)
    has_face = None if faces is None else faces.has_face
    classes, probabilities, features, colours = {}, {}, {}, {}
    for name, places in settings.turns.items():
        logits = {}  # attribute -> (M, K_a)
        for place, mine in places.items():
            logits |= classify([bundle.classifiers["evaluate"][place]], mine, x, faces)
        logits = {a: logits[a] for a in names if a in logits}
        classes[name] = {a: scatter_to_images(v.argmax(1), has_face, -1) for a, v in logits.items()}
        probabilities[name] = {
            a: scatter_to_images(v.softmax(1).float(), has_face, torch.nan) for a, v in logits.items()
        }
    if settings.templates is not None:
        verdict = settings.templates(x)
        classes["templates"] = {a: verdict[a].where(verdict[f"{a}_known"], -1) for a in names}
        colours = settings.templates.colours(x, verdict)
    if bundle.clip is not None:
        features["clip"] = bundle.clip.encode_image(x).float()
    if bundle.dino is not None:
        features["dino"] = F.normalize(bundle.dino(x).float(), dim=1)
    boxes = None if faces is None else scatter_to_images(faces.boxes.float(), has_face, torch.nan)
    judged = JudgedImages(classes, probabilities, boxes, features, colours)
    return JudgedImages.from_tensors({name: rows.cpu() for name, rows in judged.tensors().items()})


def judge_prompts(
    settings: EvaluationSettings, model: Bundle, prompts: Sequence[str], n: int, label: str
) -> list[JudgedImages]:
    """n images of each of P prompts, judged; every process gets all P results."""
    mine = settings.processes.part(len(prompts))
    judged = []
    with Progress(len(mine), label, settings.processes.first) as progress:
        for p in mine:
            judged.append(judge(settings, draw_images(settings, model, prompts[p], n)))
            progress.step(prompts[p][-40:])
    return judged if settings.processes.world == 1 else _gathered(settings, judged, len(prompts), n)


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
            for name, one in judge(settings, x).tensors().items()
        }
    gathered = {name: settings.processes.gather(rows, P) for name, rows in here.items()}
    return [JudgedImages.from_tensors({name: rows[p] for name, rows in gathered.items()}) for p in range(P)]
