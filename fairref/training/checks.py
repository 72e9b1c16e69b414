"""What is said before a run's folder is made, and not in the middle of the run."""

import torch

from fairref.bundle.own_judges import OwnClassifier, OwnFeatures
from fairref.diffusion.gradient import gradient_mode
from fairref.diffusion.solver import solver_table
from fairref.errors import UserError
from fairref.fairness.threshold import quiet_counts
from fairref.generation.lora import first_tokens
from fairref.settings import SOFT
from fairref.training.logs import need_tensorboard
from fairref.training.setup import Setup
from fairref.training.terms import TERMS, terms_of


def check(setup: Setup) -> None:
    """Refuses what would only show in the middle of a run. Raises UserError."""
    bundle, recipe = setup.bundle, setup.recipe
    require_parts(setup)
    mode = gradient_mode(recipe.gradient)
    for S in recipe.steps[:2]:
        solver_table(bundle.schedule, S, recipe.end)
    if mode.takes > recipe.steps.low:
        raise UserError(
            f"recipe: gradient is '{recipe.gradient}', but a run may have {recipe.steps.low} sampling steps only; take"
            " fewer of them, or raise --steps."
        )
    solver_table(bundle.schedule, recipe.eval_steps, recipe.end)
    for own in setup.own_losses:
        own.check(bundle, setup.prompts[0][0])
    require_gradients(setup)
    if recipe.component in SOFT:
        first_tokens(bundle, recipe.tokens)
    if recipe.tensorboard:
        need_tensorboard()
    # whether targets can be confident at all: an image's is a class, or leaves it, at most as surely as one of N draws
    by_C, leave = setup.target and recipe.targets == "transport", recipe.threshold == "leave"
    for name, classes in setup.target.classes.items() if by_C else ():
        for of_class, share in zip(classes, setup.target.marginal(name).target, strict=True):
            wanted, told = (1 - share, f"other than {of_class}") if leave else (share, of_class)
            if wanted > 0 and 1 - (1 - wanted) ** recipe.batch < recipe.C:
                raise UserError(
                    f"--batch is {recipe.batch}: of so few images no target is {told}, which has {wanted:.2g} of"
                    f" {name}, as surely as C = {recipe.C:g}; raise the batch or lower --C."
                )


def require_parts(setup: Setup) -> None:
    """Refuses a bundle without a part that a term of the run needs, or a run without any term. Raises UserError."""
    if not terms_of(setup):
        raise UserError("The loss has no term; give --attr, --loss or --lambda-text.")
    for name, term in TERMS.items():
        for part in term.needs if term.in_run(setup) else ():
            if not setup.bundle.has(part):
                raise UserError(
                    f"{setup.bundle.path}: has no {part}, which the loss's term {name!r} needs; name one in"
                    " bundle.json."
                )


def require_gradients(setup: Setup) -> None:
    """Refuses a user's own judge in the loss that has no gradient: finetuning would not see it. Raises UserError."""
    bundle, names = setup.bundle, setup.target.classes if setup.target else ()
    judges = [
        *bundle.classifiers.get("finetune", ()),
        bundle.dino,
        bundle.embedder if setup.judges_faces else None,
    ]
    for judge in judges if names else ():
        if not isinstance(judge, OwnClassifier | OwnFeatures):
            continue
        side = judge.input_size if isinstance(judge, OwnClassifier) else judge.side
        if (
            judge is bundle.dino
            or side is None
            or (bundle.detector is None and isinstance(judge, OwnClassifier))
        ):
            side = bundle.resolution  # it sees whole images
        with torch.enable_grad():
            seen = judge(torch.zeros(1, 3, side, side, device=bundle.device, requires_grad=True))
        answers = [seen[name] for name in names if name in seen] if isinstance(seen, dict) else [seen]
        if not all(answer.requires_grad for answer in answers):
            raise UserError(
                f"--judge {judge.source.place}: what it gives has no gradient, so finetuning would not follow it; leave"
                " torch.no_grad and detach out."
            )


def quiet_batches(setup: Setup) -> list[str]:
    """Which counts of a batch ask no image to change, a line for each attribute by itself; none without a threshold."""
    recipe, lines = setup.recipe, []
    attributes = setup.target.classes if setup.target and recipe.targets == "transport" else {}
    for name, classes in attributes.items():
        target = torch.as_tensor(setup.target.marginal(name).target, dtype=torch.float64)
        even, about = bool((target == target[0]).all()), "about " if len(classes) > 2 else ""
        ranges = []
        for k, of_class in enumerate(classes[:1] if even else classes):
            found = quiet_counts(k, recipe.batch, target, recipe.C, recipe.threshold == "leave")
            ranges += [f"{about}{found[0]} to {found[1]} {'of each' if even else of_class}"] if found else []
        asked = f"with {', '.join(ranges)}, nobody is" if ranges else "somebody is always"
        lines.append(f"{name}: of {recipe.batch} images, {asked} asked to change (C = {recipe.C:g})")
    return lines


def lacking(setup: Setup) -> list[str]:
    """What the run's terms say of parts that they go without, where these would have a weight."""
    weights = {"dino": setup.recipe.lambda_img, "embedder": setup.recipe.lambda_face}
    parts = [row for term in TERMS.values() for row in term.without] if setup.target else []
    return [said for part, said in parts if weights.get(part, 1) and not setup.bundle.has(part)]
