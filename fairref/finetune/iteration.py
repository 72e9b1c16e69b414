"""One iteration's gradient, as in DESIGN.md's "way of the data": a prompt, its pictures, their targets, dL/dparameters.

N images of one prompt over all processes, n of them here, K_a classes of an attribute, S sampling steps, T tokens,
d width.
"""

import numpy as np
import torch
from torch import Tensor

from fairref.bundle import Bundle
from fairref.diffusion.gradient import adjusted_gradient, exact_gradient, pull, step_weights, subsample
from fairref.diffusion.solver import SolverTable, solver_table
from fairref.fairness.metrics import bias, blends, joint_counts
from fairref.fairness.transport import joint_ot
from fairref.finetune.looking import spread
from fairref.finetune.objective import SUMS, Pictures, look, picture_gradient
from fairref.finetune.recipes import Recipe
from fairref.finetune.rollout import embed, first_noise, rollout
from fairref.finetune.setup import Setup, Task

# what a draw is for: the order of prompts, S, the steps of the gradient, the order of prompts that name a class, s
ORDER, STEPS, GRAD_STEPS, NAMED, GUIDANCE = 1, 2, 3, 4, 5


def task_of(setup: Setup, iteration: int) -> Task:
    """What an iteration draws. Concepts take turns, and each goes through its prompts in its own epochs.

    Every `named_every`-th iteration takes a prompt that names a class, and its target has that class alone.
    """
    recipe = setup.recipe
    steps, scale = (np.random.default_rng((recipe.seed, stream, iteration)) for stream in (STEPS, GUIDANCE))
    S, guidance = int(steps.integers(*recipe.steps, endpoint=True)), float(scale.uniform(*recipe.guidance))
    rounds, place = divmod(iteration, recipe.named_every) if recipe.named_every and setup.named else (0, None)
    if place is not None and place == recipe.named_every - 1:
        prompt, name, k = setup.named[prompt_of(recipe.seed, rounds, len(setup.named), 1, NAMED)]
        return Task(prompt, setup.target.given(name, k), True, S, guidance)
    turn, which = divmod(iteration - rounds, len(setup.prompts))
    prompts = setup.prompts[which]
    prompt = prompts[prompt_of(recipe.seed, turn, len(prompts), recipe.group)]
    return Task(prompt, setup.target, False, S, guidance)


def prompt_of(seed: int, iteration: int, count: int, group: int = 1, stream: int = ORDER) -> int:
    """Index of the iteration's prompt: each epoch goes once through all `count`, in an order of its own.

    The order is one of groups of `group` consecutive prompts (the last may be smaller), which stay together.
    """
    epoch, place = divmod(iteration, count)
    groups = torch.arange(count).split(group)
    order = np.random.default_rng((seed, stream, epoch)).permutation(len(groups))
    return int(torch.cat([groups[i] for i in order])[place])


def iteration_gradient(setup: Setup, model: Bundle, parameters: list, i: int) -> tuple[list[Tensor], dict]:
    """dL/dparameters of iteration i, summed over processes, and its metrics.

    `model` is the adapted bundle; grad mode must be on. Without finite logits the gradient is NaN.
    """
    bundle, recipe, processes = setup.bundle, setup.recipe, setup.processes
    task = task_of(setup, i)
    table = solver_table(bundle.schedule, task.S, recipe.end)
    z_T = first_noise(bundle, recipe.seed, i, processes.part(recipe.batch))  # (n, 4, h, w)
    both = embed(model, task.prompt)  # (2, T, d), with graph
    about = {"prompt": task.prompt, "S": task.S, "guidance": task.guidance}

    path = rollout(model, table, z_T, *both.split(1), task.guidance)
    pictures = look(setup, model, table, path, task, both)
    logits, found = all_logits(setup, pictures)
    if not all(torch.isfinite(of_one).all() for of_one in logits.values()):
        return [torch.full_like(p, torch.nan) for p in parameters], about
    ot = joint_ot(logits, task.target.table, found)
    rows = processes.part(recipe.batch)
    q = {name: of_one.q[rows.start : rows.stop] for name, of_one in ot.items()}
    g, sums = picture_gradient(setup, pictures, q)  # (n, 4, h, w)

    gradient = sampling_gradient(recipe, model, parameters, table, path, g, both, task.guidance, i)
    # one message, all of it in the gradient's type
    *gradient, sums = processes.total([*gradient, sums.to(gradient[0])])
    shown = [of_one[found] for of_one in logits.values()]  # (M, K_a) of all images
    cost = next(iter(ot.values())).cost
    return gradient, {**about, **_sums(setup, sums), "cost": cost, **_shares(setup, shown, task.named)}


def sampling_gradient(
    recipe: Recipe,
    model: Bundle,
    parameters: list,
    table: SolverTable,
    path: list,
    g: Tensor,
    both: Tensor,
    guidance: float,
    i: int,
) -> list[Tensor]:
    """dL/dparameters of this process's images: g = dL/dz_0 goes back along their path, `both` = [c, c_empty] has a graph."""
    c, c_empty = both.detach().split(1)  # (1, T, d) each
    common = (c, c_empty, guidance)
    if recipe.gradient == "exact":
        parts = torch.zeros_like(both, dtype=torch.promote_types(both.dtype, torch.float32))
        for rows in torch.arange(len(g)).split(recipe.micro_batch or max(len(g), 1)):
            part = [step._replace(z=step.z[rows]) for step in path]
            parts += torch.cat(exact_gradient(model.unet, table, part, g[rows], *common)[:2])
    else:
        w = step_weights(model.schedule, table, recipe.gradient)
        if 0 < recipe.grad_steps < table.S:
            w = subsample(w, recipe.grad_steps, np.random.default_rng((recipe.seed, GRAD_STEPS, i)).random())
        most = recipe.micro_batch or None
        parts = torch.cat(adjusted_gradient(model.unet, table, w, path, g, *common, most))
    in_text = pull(both, parameters, parts) if both.requires_grad else map(torch.zeros_like, parameters)
    # what the U-Net's own parameters get, adjusted_gradient and exact_gradient leave in .grad
    gradient = [x if p.grad is None else x + p.grad for x, p in zip(in_text, parameters)]
    for p in parameters:
        p.grad = None
    return gradient


def all_logits(setup: Setup, pictures: Pictures) -> tuple[dict[str, Tensor], Tensor]:
    """What the classifier says of all N pictures, (N, K_a) each and zero without a face, and which show one (N,)."""
    N, faces = setup.recipe.batch, pictures.faces
    found = torch.ones(len(pictures.x), device=pictures.x.device) if faces is None else faces.found
    with torch.no_grad():
        here = setup.classify(pictures.x, faces)
    rows = spread(torch.cat(list(here.values()), 1), None if faces is None else found)
    sizes = [logits.shape[1] for logits in here.values()]
    everywhere = setup.processes.gather(rows, N).split(sizes, 1)
    return dict(zip(here, everywhere)), setup.processes.gather(found.float(), N) > 0


def _sums(setup, sums):
    """The SUMS over images for the metrics, without those that the bundle has no judge for."""
    sums = dict(zip(SUMS, sums.tolist()))
    sums["confident"] /= setup.recipe.batch
    sums["faces"] /= setup.recipe.batch
    for name, there in (("face", setup.judges_faces), ("faces", setup.bundle.detector is not None)):
        if not there:
            del sums[name]
    return sums


def _shares(setup, logits, named):
    """Joint counts of the images' classes, the share that blends them; and their bias from the target, unless the
    prompt named a class."""
    counts = joint_counts([of_one.argmax(1) for of_one in logits], setup.target.table.shape)
    found = {"counts": counts.tolist(), "blended": blends(logits) / max(1, len(logits[0]))}
    if named or not counts.any():
        return found
    return {**found, "bias": float(bias(counts.reshape(-1), setup.target.table.reshape(-1)))}
