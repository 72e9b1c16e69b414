"""What stays the same in a run, and what one iteration draws."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fairref.bundle import Bundle
from fairref.errors import UserError
from fairref.fairness.attributes import JointTarget
from fairref.fairness.faces import Faces
from fairref.finetune.distributed import Processes
from fairref.finetune.looking import classify
from fairref.finetune.recipes import Recipe


@dataclass(frozen=True)
class Setup:
    """What stays the same in a run."""

    bundle: Bundle  # the frozen model, with clip and classifiers["finetune"]
    recipe: Recipe
    target: JointTarget  # what is made fair, and the shares of it
    prompts: tuple[tuple[str, ...], ...]  # of finetuning, all neutral: those of each concept
    processes: Processes = Processes()
    named: tuple[tuple[str, str, int], ...] = ()  # prompts that name a class, its attribute, and its index
    validation: tuple[str, ...] = ()  # V prompts by which adapters are compared; none: they are not

    def __post_init__(self):
        for found, what in (
            (self.bundle.classifiers.get("finetune"), "classifier for finetuning"),
            (self.bundle.clip, "CLIP image tower"),
        ):
            if found is None:
                raise UserError(
                    f"{self.bundle.path}: has no {what}, which finetuning needs; use a bundle that names one."
                )
        knows_all(self.bundle, "finetune", self.target)
        if not self.prompts or not all(self.prompts):
            raise UserError("--prompts names a concept without a prompt for finetuning; give another one.")
        if self.recipe.batch < self.processes.world:
            raise UserError(
                f"--batch is {self.recipe.batch} for {self.processes.world} processes; give each an image."
            )

    @property
    def features(self) -> list[Callable]:
        """What L_img compares pictures by: CLIP, and DINO where the bundle has it."""
        return [f for f in (self.bundle.clip.encode_image, self.bundle.dino) if f is not None]

    def classify(self, x: Tensor, faces: Faces | None) -> dict[str, Tensor]:
        """Logits of each attribute by the classifier for finetuning: `classify`."""
        classifier = self.bundle.classifiers["finetune"]
        return classify(classifier, tuple(self.target.classes), x, faces, self.recipe.micro_batch)

    @property
    def judges_faces(self) -> bool:
        """Whether there is an L_face."""
        return self.bundle.embedder is not None and self.recipe.lambda_face > 0


def knows_all(bundle: Bundle, role: str, target: JointTarget) -> None:
    """Refuses a target with an attribute that the bundle's classifier of this role doesn't know. Raises UserError."""
    known = bundle.classifiers[role].attributes
    unknown = [name for name in target.classes if name not in known]
    if unknown:
        raise UserError(
            f"{bundle.path}: the classifier {role!r} doesn't know {unknown[0]}, only {', '.join(known)}; use one"
            " that does."
        )


class Task(NamedTuple):
    """What one iteration draws."""

    prompt: str
    target: JointTarget
    named: bool  # whether the prompt names a class
    S: int
    guidance: float
