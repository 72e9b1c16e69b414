"""One iteration's gradient: a prompt, its images, their targets, dL/dparameters.

N images of one prompt over all processes, n of them here, K_a classes of an attribute, S sampling steps, T tokens,
d width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fairref.bundle.loading import Bundle
from fairref.diffusion.gradient import adjusted_gradient, exact_gradient, gradient_mode, subsample
from fairref.diffusion.model import GuidedModel, scaled_vjp, zeros_like
from fairref.diffusion.sampler import Step
from fairref.diffusion.solver import SolverTable, solver_table
from fairref.fairness.losses import leaving_targets
from fairref.fairness.metrics import bias, blends, joint_counts
from fairref.fairness.transport import joint_ot
from fairref.generation.rollout import decode, embed, first_noise, guided, rollout
from fairref.generation.views import map_batches, scatter_to_images
from fairref.training.setup import Setup, Task
from fairref.training.terms import ImagePair, image_gradient, judged_pair, sums_of

# what a draw is for: the order of prompts, S, the steps of the gradient, the order of explicit prompts, s,
# the class counts of the transport, where the run stops
ORDER, STEPS, GRAD_STEPS, EXPLICIT, GUIDANCE, TRANSPORT, STOP = 1, 2, 3, 4, 5, 6, 7
Metrics = dict[str, object]
# q (n, K_a) of this process's images for each attribute; what is said
Targets = tuple[dict[str, Tensor], Metrics]
Watch = Callable[..., None]  # of (task, drawn, pair, q, g, this process's gradient)


def iteration_gradient(
    setup: Setup, model: Bundle, parameters: Sequence[nn.Parameter], i: int, watch: Watch | None = None
) -> tuple[list[Tensor], Metrics]:
    """dL/dparameters of iteration i, summed over processes, and its metrics.

    `model` is the adapted bundle; grad mode must be on. Without finite logits the gradient is NaN and
    `watch` sees nothing.
    """
    task = draw_task(setup, i)
    text = embed(model, task.prompt)  # [c, c_empty] (2, T, d), with graph
    drawn = sample_path(setup, model, task, text, i)
    pair = draw_pair(setup, model, task, text, drawn)
    targets = transport_targets(setup, task, pair, i)
    about = {"prompt": task.prompt, "S": task.S, "guidance": task.guidance}
    if targets is None:
        return [torch.full_like(p, torch.nan) for p in parameters], about
    q, said = targets
    g, sums = image_gradient(setup, task, pair, q)  # (n, 4, h, w)
    drawn = draw_terms(setup, drawn, g, i)
    gradient = sampling_gradient(setup, drawn, g, text, parameters)
    if watch:
        watch(task, drawn, pair, q, g, gradient)
    *gradient, sums = setup.processes.total([*gradient, sums.to(gradient[0])])  # one message, all of one type
    means = dict(zip(sums_of(setup), sums.tolist(), strict=True))
    return gradient, {**about, **means, **said}


def draws(seed: int, stream: int, index: int) -> np.random.Generator:
    """The random numbers of a stream in its iteration or epoch `index`: the same in all processes.

    No two generators of a run are the same. numpy fills a short key with zeros, (1,) is (1, 0, 0); these have three
    numbers below 2^32 each, and a stream is not 0. The keys of `noise`, (seed, iteration, image), may have the
    same numbers, but they seed another algorithm: Philox, here PCG64. torch's, which starts the adapter, is a third.
    """
    return np.random.default_rng((seed, stream, index))


def draw_task(setup: Setup, iteration: int) -> Task:
    """What an iteration draws. Concepts take turns, and each goes through its prompts in its own epochs.

    Every `explicit_every`-th iteration takes a prompt that names a class, and its target has that class alone.
    """
    recipe = setup.recipe
    steps, scale = (draws(recipe.seed, stream, iteration) for stream in (STEPS, GUIDANCE))
    S = int(steps.integers(*recipe.steps[:2], endpoint=True))
    low, high, turns = recipe.guidance
    guidance = float(low if turns else scale.uniform(low, high))
    if turns and (draws(recipe.seed, GUIDANCE, iteration // 2).integers(2) + iteration) % 2:
        guidance = float(high)  # of two iterations each has one, in a drawn order
    every = recipe.explicit_every if setup.explicit else 0
    rounds, place = divmod(iteration, every) if every else (0, None)
    if place is not None and place == every - 1:
        prompt, name, k = setup.explicit[prompt_of(recipe.seed, rounds, len(setup.explicit), 1, EXPLICIT)]
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
    order = draws(seed, stream, epoch).permutation(len(groups))
    return int(torch.cat([groups[i] for i in order])[place])


class Rollout(NamedTuple):
    """One sampling run: the solver's table, the guided model, and the path z_1..z_S, z_0 without a graph."""

    table: SolverTable
    model: GuidedModel
    path: list[Step]
    w: Tensor  # (S,) or (S, n) w_i, or the factors kappa_i of a mode with coupling


def sample_path(setup: Setup, model: Bundle, task: Task, text: Tensor, i: int) -> Rollout:
    """This process's images of an iteration, on their way: noise of (seed, iteration, image) -> the path."""
    recipe = setup.recipe
    stop = gradient_mode(recipe.gradient).stop(task.S, draws(recipe.seed, STOP, i))
    table = solver_table(setup.bundle.schedule, task.S, recipe.end, stop=stop)
    w = term_weights(setup, table, i)
    z_T = first_noise(setup.bundle, recipe.seed, i, setup.processes.part(recipe.batch))  # (n, 4, h, w)
    from_text = guided(model, text, task.guidance, recipe.keep_graphs)
    return Rollout(table, from_text, rollout(from_text, table, z_T), w)


@torch.no_grad()
def draw_pair(setup: Setup, model: Bundle, task: Task, text: Tensor, drawn: Rollout) -> ImagePair:
    """The images at the end of the adapted model's path and the frozen model's of the same noise, judged."""
    bundle, micro_batch = setup.bundle, setup.recipe.micro_batch
    z_0 = drawn.path[-1].z
    x = map_batches(lambda part: decode(bundle, part), z_0, micro_batch)
    frozen = embed(bundle, task.prompt)
    if model.unet is bundle.unet and torch.equal(frozen, text):  # both models draw the same
        return judged_pair(setup, z_0, x, x)
    z_o = rollout(guided(bundle, frozen, task.guidance), drawn.table, drawn.path[0].z)[-1].z
    return judged_pair(setup, z_0, x, map_batches(lambda part: decode(bundle, part), z_o, micro_batch))


def transport_targets(setup: Setup, task: Task, pair: ImagePair, i: int) -> Targets | None:
    """Eqs 4, 5 on all N images, gathered from all processes, or drawn classes. None where a logit is not finite."""
    if task.target is None:
        return {}, {}
    logits, has_face = all_logits(setup, pair)
    if not all(torch.isfinite(of_attribute).all() for of_attribute in logits.values()):
        return None
    rng, cost = draws(setup.recipe.seed, TRANSPORT, i), {}
    if setup.recipe.targets == "random":
        drawn = task.target.drawn(len(has_face), rng)
        q = {name: torch.from_numpy(u).double() * has_face.cpu()[:, None] for name, u in drawn.items()}
    else:
        transports = joint_ot(logits, task.target.table, has_face, rng=rng)
        q = {name: transport.q for name, transport in transports.items()}
        cost = {"cost": next(iter(transports.values())).cost}
    if setup.recipe.threshold == "leave":
        own = {name: of_attribute.argmax(1).cpu() for name, of_attribute in logits.items()}
        q = {name: leaving_targets(of_all, own[name], setup.recipe.C) for name, of_all in q.items()}
    rows = setup.processes.part(setup.recipe.batch)
    q = {name: of_all[rows.start : rows.stop] for name, of_all in q.items()}
    shown = [of_attribute[has_face] for of_attribute in logits.values()]  # (M, K_a) of all images
    return q, {**cost, **_shares(setup, shown, task.explicit)}


def all_logits(setup: Setup, pair: ImagePair) -> tuple[dict[str, Tensor], Tensor]:
    """What the classifiers say of all N images, (N, K_a) each and zero without a face, and which show one (N,)."""
    N, faces = setup.recipe.batch, pair.faces
    has_face = torch.ones(len(pair.x), device=pair.x.device) if faces is None else faces.has_face
    with torch.no_grad():
        here = setup.classify(pair.x, faces)
    rows = scatter_to_images(torch.cat(list(here.values()), 1), None if faces is None else has_face)
    sizes = [logits.shape[1] for logits in here.values()]
    everywhere = setup.processes.gather(rows, N).split(sizes, 1)
    return dict(zip(here, everywhere, strict=True)), setup.processes.gather(has_face.float(), N) > 0


def term_weights(setup: Setup, table: SolverTable, i: int) -> Tensor:
    """(S,) w_i of the steps that the iteration's mode keeps, 0 of others; with coupling kappa_i."""
    mode = gradient_mode(setup.recipe.gradient)
    kept = mode.steps(table.S, draws(setup.recipe.seed, GRAD_STEPS, i)).double()
    return kept * (mode.coupling or mode.weights(setup.bundle.schedule, table))


def draw_terms(setup: Setup, drawn: Rollout, g: Tensor, i: int) -> Rollout:
    """The run with weights w (S, n) of which only some are not 0: `grad_steps` N terms of a step and one of all N
    images are drawn, with probability proportional to |w_i| ‖g_n‖."""
    (S,), N, M = drawn.w.shape, setup.recipe.batch, setup.recipe.grad_steps
    if not 0 < M < S or gradient_mode(setup.recipe.gradient).coupling:
        return drawn
    size = setup.processes.gather(g.double().flatten(1).norm(dim=1), N).cpu()  # (N,)
    u = draws(setup.recipe.seed, GRAD_STEPS, i).random()
    rows = setup.processes.part(N)
    terms = subsample(drawn.w.repeat(N), M * N, u, size.repeat_interleave(S)).view(N, S)
    return drawn._replace(w=terms[rows.start : rows.stop].T)


def sampling_gradient(
    setup: Setup, drawn: Rollout, g: Tensor, text: Tensor, parameters: Sequence[nn.Parameter]
) -> list[Tensor]:
    """dL/dparameters of this process's images: g = dL/dz_0 goes back along their path, then through the text."""
    recipe, model = setup.recipe, drawn.model
    if gradient_mode(recipe.gradient).coupling:
        parts = [zeros_like(leaf) for leaf in model.leaves]
        for rows in torch.arange(len(g)).split(recipe.micro_batch or max(len(g), 1)):
            path = [step._replace(z=step.z[rows]) for step in drawn.path]
            of_rows, _ = exact_gradient(model, drawn.table, path, g[rows], drawn.w)
            parts = [a + b for a, b in zip(parts, of_rows, strict=True)]
    else:
        at_once = 0 if recipe.keep_graphs else recipe.micro_batch
        parts = adjusted_gradient(model, drawn.table, drawn.w, drawn.path, g, at_once)
    dc, dc_empty, *of_unet = parts
    in_text = [torch.zeros_like(p) for p in parameters]
    if text.requires_grad:
        in_text = scaled_vjp(text, parameters, torch.cat([dc, dc_empty]))
    own = {id(p): grad for p, grad in zip(model.parameters, of_unet, strict=True)}
    return [x + own[id(p)] if id(p) in own else x for x, p in zip(in_text, parameters, strict=True)]


def _shares(setup, logits, explicit):
    """Joint counts of the images' classes, the share that blends them; and their bias from the target, unless the
    prompt named a class."""
    counts = joint_counts([of_attribute.argmax(1) for of_attribute in logits], setup.target.table.shape)
    shares = {"counts": counts.tolist(), "blended": blends(logits) / max(1, len(logits[0]))}
    if explicit or not counts.any():
        return shares
    return {**shares, "bias": float(bias(counts.reshape(-1), setup.target.table.reshape(-1)))}
