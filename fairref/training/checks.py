"""What is said before a run's folder is made, and not in the middle of the run."""

from fairref.diffusion.gradient import gradient_mode
from fairref.diffusion.solver import solver_table
from fairref.errors import UserError
from fairref.generation.lora import first_tokens
from fairref.training.logs import need_tensorboard
from fairref.training.setup import Setup
from fairref.training.terms import TERMS, terms_of


def check(setup: Setup) -> None:
    """Refuses what would only show in the middle of a run. Raises UserError."""
    bundle, recipe = setup.bundle, setup.recipe
    require_parts(setup)
    mode = gradient_mode(recipe.gradient)
    for S in recipe.steps:
        mode.table(bundle.schedule, S, recipe.end)
    solver_table(bundle.schedule, recipe.eval_steps, recipe.end)
    if mode.coupled and recipe.grad_steps:
        raise UserError(
            f"recipe: grad_steps draws steps of an adjusted gradient; {recipe.gradient} needs all: leave it out."
        )
    for own in setup.own_losses:
        own.check(bundle, setup.prompts[0][0])
    if recipe.component == "prefix":
        first_tokens(bundle, recipe.tokens, None)
    if recipe.tensorboard:
        need_tensorboard()
    # whether targets can be confident at all: an image's is a class at most as surely as one of N draws is
    for name, classes in setup.target.classes.items() if setup.target else ():
        for of_class, share in zip(classes, setup.target.marginal(name).target, strict=True):
            if share > 0 and 1 - (1 - share) ** recipe.batch < recipe.C:
                raise UserError(
                    f"--batch is {recipe.batch}: of so few images no target is {of_class}, which has {share:.2g} of"
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


def lacking(setup: Setup) -> list[str]:
    """What the run's terms say of parts that they go without."""
    return [sentence for term in TERMS.values() for sentence in term.lacks(setup)]
