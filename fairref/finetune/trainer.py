"""Finetuning: the loop around an iteration, with the optimizer, the moving average, checkpoints, and the best adapter."""

import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fairref.bundle import Bundle
from fairref.diffusion.solver import solver_table
from fairref.errors import UserError
from fairref.finetune import checkpoints
from fairref.finetune.adapters import FILE, adapt, first_tokens, save_adapter
from fairref.finetune.checkpoints import State
from fairref.finetune.grids import draw_grid
from fairref.finetune.iteration import iteration_gradient
from fairref.finetune.logs import Log, need_tensorboard
from fairref.finetune.recipes import Recipe
from fairref.finetune.setup import Setup
from fairref.finetune.signals import StopRequest
from fairref.finetune.validation import Validation, aligned, note
from fairref.nets.unet import recomputed

RAW_FILE, BEST_FILE = "adapter_raw.safetensors", "adapter_best.safetensors"
HOPELESS = 20  # gradients in a row that are not finite, after which a run ends


def check(setup: Setup) -> None:
    """What only shows in the middle of a run is said before its folder is made. Raises UserError."""
    bundle, target, recipe = setup.bundle, setup.target, setup.recipe
    for S in (*recipe.steps, recipe.eval_steps):
        solver_table(bundle.schedule, S, recipe.end)
    if recipe.component == "prefix":
        first_tokens(bundle, recipe.tokens, None)
    if recipe.tensorboard:
        need_tensorboard()
    # whether targets can be confident at all: an image's is a class at most as surely as one of N draws is
    for name, classes in target.classes.items():
        for of_one, share in zip(classes, target.marginal(name).target):
            if share > 0 and 1 - (1 - share) ** recipe.batch < recipe.C:
                raise UserError(
                    f"--batch is {recipe.batch}: of so few images no target is {of_one}, which has {share:.2g} of"
                    f" {name}, as surely as C = {recipe.C:g}; raise the batch or lower --C."
                )


def learning_rate(recipe: Recipe, iteration: int) -> float:
    """lr: linear rise over `warmup` iterations, times a cosine from 1 to lr_end."""
    rise = min(1.0, (iteration + 1) / recipe.warmup) if recipe.warmup else 1.0
    cosine = 0.5 + 0.5 * np.cos(np.pi * iteration / recipe.iterations)
    return float(recipe.lr * rise * (recipe.lr_end + (1 - recipe.lr_end) * cosine))


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
    if processes.first:
        print(*log.summary(recipe, state, folder / BEST_FILE), sep="\n")
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
