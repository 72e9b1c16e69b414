"""Finetuning: one iteration as in DESIGN.md's "way of the data", and the loop around it.

N images of one prompt over all processes, n of them here, K_a classes of an attribute, S sampling steps, T tokens,
d width.
"""

import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fairref.bundle import Bundle
from fairref.diffusion.gradient import adjusted_gradient, exact_gradient, pull, step_weights, subsample
from fairref.diffusion.solver import SolverTable, solver_table
from fairref.errors import UserError
from fairref.fairness.metrics import bias, blends, joint_counts
from fairref.fairness.transport import joint_ot
from fairref.finetune import checkpoints
from fairref.finetune.adapters import FILE, adapt, save_adapter
from fairref.finetune.checkpoints import State
from fairref.finetune.grids import draw_grid
from fairref.finetune.logs import Log
from fairref.finetune.objective import (
    SUMS,
    Pictures,
    Setup,
    Task,
    look,
    picture_gradient,
    spread,
)
from fairref.finetune.recipes import Recipe
from fairref.finetune.rollout import embed, first_noise, rollout
from fairref.finetune.signals import StopRequest
from fairref.finetune.validation import Validation, aligned, note
from fairref.nets.unet import recomputed

RAW_FILE, BEST_FILE = "adapter_raw.safetensors", "adapter_best.safetensors"
# what a draw is for: the order of prompts, S, the steps of the gradient, the order of prompts that name a class, s
ORDER, STEPS, GRAD_STEPS, NAMED, GUIDANCE = 1, 2, 3, 4, 5
HOPELESS = 20  # gradients in a row that are not finite, after which a run ends


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


def learning_rate(recipe: Recipe, iteration: int) -> float:
    """lr: linear rise over `warmup` iterations, times a cosine from 1 to lr_end."""
    rise = min(1.0, (iteration + 1) / recipe.warmup) if recipe.warmup else 1.0
    cosine = 0.5 + 0.5 * np.cos(np.pi * iteration / recipe.iterations)
    return float(recipe.lr * rise * (recipe.lr_end + (1 - recipe.lr_end) * cosine))


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
    *gradient, sums = processes.total([*gradient, sums])
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
        size = max(1, recipe.micro_batch // 2) if recipe.micro_batch else len(g)  # a picture has two branches
        for rows in torch.arange(len(g)).split(size):
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
    """Joint counts of the images' classes, the share that blends them; and the bias, unless the prompt named a class."""
    counts = joint_counts([of_one.argmax(1) for of_one in logits], setup.target.table.shape)
    found = {"counts": counts.tolist(), "blended": blends(logits) / max(1, len(logits[0]))}
    if named or not counts.any():
        return found
    return {**found, "bias": float(bias(counts.reshape(-1)))}


def new_state(setup: Setup) -> tuple[Bundle, State]:
    """The adapted bundle and the state before the first iteration."""
    recipe = setup.recipe
    generator = torch.Generator().manual_seed(recipe.seed)
    model, adapter = adapt(setup.bundle, recipe.component, recipe.rank, recipe.tokens, generator)
    optimizer = torch.optim.AdamW(
        adapter.parameters(),
        lr=recipe.lr,
        betas=(recipe.beta_1, recipe.beta_2),
        eps=recipe.adam_eps,
        weight_decay=recipe.weight_decay,
    )
    ema = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    return model, State(adapter, ema, optimizer)


def update(recipe: Recipe, state: State, gradient: list[Tensor]) -> tuple[float, bool]:
    """One clipped AdamW step and the moving average, in `state` -> (norm before clipping, whether taken).

    A gradient that isn't finite, which all processes see alike, is skipped.
    """
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradient]))
    finite = bool(torch.isfinite(norm))
    if finite:
        scale = min(1.0, recipe.clip / (float(norm) + 1e-12)) if recipe.clip else 1.0
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, state.iteration)
        for parameter, g in zip(state.adapter.parameters(), gradient):
            parameter.grad = g * scale
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.updates += 1
        decay = min(recipe.ema, (1 + state.updates) / (10 + state.updates))
        for name, parameter in state.adapter.named_parameters():
            state.ema[name] = torch.lerp(parameter.detach(), state.ema[name], decay)
    state.iteration += 1
    return float(norm), finite


def train(setup: Setup, folder: Path, info: dict) -> dict[str, Path]:
    """The run in `folder`, from its checkpoint if it has one -> the adapters' files: "ema", "raw", perhaps "best".

    Asked to stop, it writes a checkpoint and raises KeyboardInterrupt.
    """
    recipe, processes = setup.recipe, setup.processes
    model, state = new_state(setup)
    checkpoints.restore(folder, state)
    setup, model = prepared(setup, model)
    chooser = Chooser(setup, folder, info)
    with Log(setup, folder, state) as log, StopRequest() as stop:
        while state.iteration < recipe.iterations and not aligned(recipe, state):
            log.add(iterate(setup, model, state) | chooser.look(model, state), state)
            stopping = processes.any(stop.asked)
            if processes.first and (stopping or state.iteration % recipe.checkpoint_every == 0):
                checkpoints.save(folder, state, recipe.keep)
            if stopping:
                raise KeyboardInterrupt(
                    f"stopped after iteration {state.iteration}; go on with --resume {folder}"
                )
    files = {"ema": folder / FILE, "raw": folder / RAW_FILE}
    if processes.first:
        checkpoints.save(folder, state, recipe.keep)
        info = {**info, "iterations": state.iteration}
        save_adapter(files["ema"], state.ema, {**info, "average": "ema"})
        save_adapter(files["raw"], state.parameters(), {**info, "average": "raw"})
    processes.wait()
    return {**files, "best": folder / BEST_FILE} if state.best else files


def iterate(setup: Setup, model: Bundle, state: State) -> dict:
    """One iteration, in `state` -> its metrics. Raises UserError where gradients stay useless."""
    began = time.monotonic()
    metrics = {"iteration": state.iteration, "lr": learning_rate(setup.recipe, state.iteration)}
    parameters = list(state.adapter.parameters())
    with torch.enable_grad():
        gradient, found = iteration_gradient(setup, model, parameters, state.iteration)
    norm, finite = update(setup.recipe, state, gradient)
    state.unusable = 0 if finite else state.unusable + 1
    if state.unusable == HOPELESS:
        raise UserError(
            f"{HOPELESS} gradients in a row were not finite, the last at iteration {state.iteration}; try --dtype"
            " float32 or a smaller --lr."
        )
    seconds = round(time.monotonic() - began, 3)
    skipped = state.iteration - state.updates
    return {**metrics, **found, "norm": norm if finite else None, "skipped": skipped, "seconds": seconds}


class Chooser:
    """Validations, the best adapter's file, and sample grids, at the iterations that are due."""

    def __init__(self, setup: Setup, folder: Path, info: dict):
        self.setup, self.folder, self.info, self.validation = setup, folder, info, None

    def look(self, model: Bundle, state: State) -> dict:
        """What is due after the state's iterations -> {"validation": ...} if one was made. It looks at the average."""
        setup, recipe, i = self.setup, self.setup.recipe, state.iteration
        validate, draw = (every and i % every == 0 for every in (recipe.validate_every, recipe.grid_every))
        if not setup.validation or not (validate or draw):
            return {}
        with averaged(state):
            if draw and setup.processes.first:
                draw_grid(setup, model, self.folder / "grids" / f"{i:06d}.png", i)
            if not validate:
                return {}
            self.validation = self.validation or Validation.start(setup)
            found = self.validation.measure(model)
        if note(setup, state, found) and setup.processes.first:
            info = {**self.info, "iterations": i, "average": "ema", "validation": found}
            save_adapter(self.folder / BEST_FILE, state.ema, info)
        return {"validation": found}


@contextmanager
def averaged(state: State):
    """The adapter with its moving average in it."""
    raw = {name: p.data for name, p in state.parameters().items()}
    try:
        for name, p in state.parameters().items():
            p.data = state.ema[name]
        yield
    finally:
        for name, p in state.parameters().items():
            p.data = raw[name]


def prepared(setup: Setup, model: Bundle) -> tuple[Setup, Bundle]:
    """Both models' U-Nets compiled and with recomputed blocks, where the recipe asks for it."""
    unets = {}
    for bundle in (setup.bundle, model):
        unet = recomputed(bundle.unet) if setup.recipe.recompute else bundle.unet
        unets.setdefault(id(bundle.unet), torch.compile(unet) if setup.recipe.compile else unet)
    frozen, adapted = (replace(bundle, unet=unets[id(bundle.unet)]) for bundle in (setup.bundle, model))
    return replace(setup, bundle=frozen), adapted
