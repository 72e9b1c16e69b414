"""What stays the same in a run, and what one iteration draws."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.errors import UserError
from fairref.fairness.attributes import JointTarget
from fairref.fairness.faces import Faces
from fairref.generation.views import classify, require_attributes
from fairref.processes import Processes
from fairref.settings import Recipe
from fairref.training.own_losses import OwnLoss


@dataclass(frozen=True)
class Setup:
    """What stays the same in a run. Raises UserError."""

    bundle: Bundle  # the frozen model
    recipe: Recipe
    target: JointTarget | None  # what is made fair, and the shares of it; None: the user's own losses alone
    prompts: tuple[tuple[str, ...], ...]  # of finetuning, all neutral: those of each concept
    processes: Processes = Processes()
    explicit: tuple[tuple[str, str, int], ...] = ()  # prompts that name a class, its attribute, and its index
    validation: tuple[str, ...] = ()  # V prompts by which adapters are compared; none: they are not
    own_losses: tuple[OwnLoss, ...] = ()

    def __post_init__(self):
        if self.target is not None and self.bundle.classifiers.get("finetune"):
            require_attributes(self.bundle, "finetune", self.target)
        if not self.prompts or not all(self.prompts):
            raise UserError("--prompts names a concept without a prompt for finetuning; give another one.")
        if self.recipe.batch < self.processes.world:
            raise UserError(
                f"--batch is {self.recipe.batch} for {self.processes.world} processes; give each an image."
            )

    @property
    def features(self) -> list[Callable[[Tensor], Tensor]]:
        """What L_img compares images by: CLIP, and DINO where the bundle has it."""
        return [f for f in (self.bundle.clip.encode_image, self.bundle.dino) if f is not None]

    def classify(self, x: Tensor, faces: Faces | None) -> dict[str, Tensor]:
        """Logits of each attribute by the classifiers for finetuning: `views.classify`."""
        classifiers = self.bundle.classifiers["finetune"]
        return classify(classifiers, tuple(self.target.classes), x, faces, self.recipe.micro_batch)

    @property
    def judges_faces(self) -> bool:
        """Whether there is an L_face."""
        return self.bundle.embedder is not None and self.recipe.lambda_face > 0


class Task(NamedTuple):
    """What one iteration draws."""

    prompt: str
    target: JointTarget | None
    explicit: bool  # whether the prompt names a class
    S: int
    guidance: float
