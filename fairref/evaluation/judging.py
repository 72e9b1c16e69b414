"""A model's images as two judges see them (docs/method.md §8).

P prompts, n images of each, K classes. The evaluation classifier, whose gradient no finetuning has seen (a run's
validations ask it which adapter is best), and the nearest-template judge, through which no gradient can flow. Noise
depends on (seed, prompt, image), so two models are measured on the same noise, whatever else is measured with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.errors import UserError
from fairref.evaluation.statistics import COLOURED, JUDGES, JudgedImages
from fairref.fairness.attributes import JointTarget
from fairref.fairness.metrics import blends, joint_counts
from fairref.files.weights import finite
from fairref.generation.drawing import Drawing, fixed_images
from fairref.generation.views import classify, faces_of, require_attributes
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
    """Both judges, CLIP and DINO on images of one prompt."""
    bundle, names, shape = settings.bundle, tuple(settings.target.classes), settings.target.table.shape
    counts, none, features, colours = {}, 0, {}, {}
    faces = faces_of(bundle, x)
    logits = list(classify(bundle.classifiers["evaluate"], names, x, faces).values())  # (M, K_a) each
    counts["classifier"] = joint_counts([of_attribute.argmax(1) for of_attribute in logits], shape)
    if settings.templates is not None:
        verdict = settings.templates(x)
        known = torch.stack([verdict[f"{name}_known"] for name in names]).all(0)
        counts["templates"] = joint_counts([verdict[name][known] for name in names], shape)
        none = int((~known).sum())
        colours = settings.templates.colours(x, verdict)
    if bundle.clip is not None:
        features["clip"] = bundle.clip.encode_image(x).float()
    if bundle.dino is not None:
        features["dino"] = F.normalize(bundle.dino(x).float(), dim=1)
    return JudgedImages(counts, none, len(x) - len(logits[0]), blends(logits), features, colours)


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
    bundle, shape, processes = settings.bundle, settings.target.table.shape, settings.processes
    judges = [j for j in JUDGES if j == "classifier" or settings.templates is not None]
    K = int(np.prod(shape))
    numbers = torch.zeros(len(judged), K * len(judges) + 3, dtype=torch.float64)
    for row, s in zip(numbers, judged, strict=True):
        counts = np.concatenate([s.counts[j].reshape(-1) for j in judges])
        row[:] = torch.tensor([*counts, s.none, s.faceless, s.blended])
    numbers = processes.gather(numbers, P).long().numpy()
    widths = {} if bundle.clip is None else {"clip": bundle.clip.config.projection_dim}
    widths |= {} if bundle.dino is None else {"dino": bundle.dino.width}
    colours = {} if settings.templates is None else dict.fromkeys(COLOURED, 3)
    gathered = {}
    for name, D in {**widths, **colours}.items():
        rows = [{**s.features, **s.colours}[name].float() for s in judged]
        here = torch.stack(rows) if rows else torch.zeros(0, n, D, device=processes.device)
        gathered[name] = processes.gather(here, P)  # (P, n, D)
    return [
        JudgedImages(
            {j: row[k * K : (k + 1) * K].reshape(shape) for k, j in enumerate(judges)},
            *map(int, row[-3:]),
            *({name: gathered[name][p] for name in kind} for kind in (widths, colours)),
        )
        for p, row in enumerate(numbers)
    ]
