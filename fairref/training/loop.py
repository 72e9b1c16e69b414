"""The loop around an iteration, with the optimizer, the moving average, checkpoints, and the best adapter."""

import copy
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fairref.bundle.loading import Bundle
from fairref.errors import UserError
from fairref.evaluation.kept import KEPT
from fairref.generation.adapters import FILE, save_adapter
from fairref.generation.lora import adapt, empty_directions
from fairref.judges.dino import Block
from fairref.nets import clip, unet, vae
from fairref.settings import Recipe
from fairref.training import checkpoints
from fairref.training.checkpoints import State
from fairref.training.grids import draw_grid
from fairref.training.logs import Log
from fairref.training.scores import Recorder
from fairref.training.setup import Setup
from fairref.training.signals import StopRequest
from fairref.training.step import Metrics, iteration_gradient
from fairref.training.validation import (
    Validation,
    record_best,
    start_validation,
    target_reached,
)

RAW_FILE, BEST_FILE = "adapter_raw.safetensors", "adapter_best.safetensors"
RECOMPUTED = {  # part of a bundle -> what --recompute keeps the inputs of alone
    "unet": (unet.Resnet, unet.Transformer),
    "vae": (vae.Resnet, vae.Attention, vae.Upsample),
    "clip": (clip.Layer,),
    "dino": (Block,),
}
MAX_SKIPPED_STEPS = 20  # gradients in a row that are not finite, after which a run ends


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
    if recipe.empty_prompt == "frozen":
        model = replace(model, empty_encoder=setup.bundle.text_encoder)
    optimizer = torch.optim.AdamW(
        adapter.parameters(),
        lr=recipe.lr,
        betas=(recipe.beta_1, recipe.beta_2),
        eps=recipe.adam_eps,
        weight_decay=recipe.weight_decay,
    )
    if recipe.empty_prompt == "unread":
        names, found = zip(*empty_directions(setup.bundle).items(), strict=True)
        # the first process's for all: they must be the same to the bit
        found = setup.processes.total([of * setup.processes.first for of in found])
        keep_out(adapter, directions := dict(zip(names, found, strict=True)))
        optimizer.register_step_post_hook(lambda *_: keep_out(adapter, directions))
    ema = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    return model, State(adapter, ema, optimizer)


@torch.no_grad()
def keep_out(adapter: nn.Module, directions: dict[str, Tensor]) -> None:
    """Takes out of matrices (r, in), by name, their part in orthonormal directions (k, in)."""
    for name, of_matrix in directions.items():
        matrix = adapter.get_parameter(name)
        of_matrix = of_matrix.to(matrix)
        matrix -= matrix @ of_matrix.T @ of_matrix


def clip_scale(recipe: Recipe, norm: float) -> float:
    """What a gradient of this norm is multiplied by, so that it is no longer than `clip`."""
    return min(1.0, recipe.clip / (norm + 1e-12)) if recipe.clip else 1.0


def update(recipe: Recipe, state: State, gradient: Sequence[Tensor]) -> tuple[float, bool]:
    """One clipped AdamW step and the moving average, in `state` -> (norm before clipping, whether taken).

    A gradient that isn't finite, which all processes see alike, is skipped.
    """
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradient]))
    finite = bool(torch.isfinite(norm))
    if finite:
        scale = clip_scale(recipe, float(norm))
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, state.iteration)
        for parameter, g in zip(state.adapter.parameters(), gradient, strict=True):
            parameter.grad = g * scale
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.updates += 1
        decay = min(recipe.ema, (1 + state.updates) / (10 + state.updates))
        for name, parameter in state.adapter.named_parameters():
            state.ema[name] = torch.lerp(parameter.detach(), state.ema[name], decay)
    state.iteration += 1
    return float(norm), finite


def finetune(setup: Setup, folder: Path, info: dict[str, object]) -> dict[str, Path]:
    """The run in `folder`, from its checkpoint if it has one -> the adapters' files: "ema", "raw", perhaps "best".

    Asked to stop, it writes a checkpoint and raises KeyboardInterrupt.
    """
    recipe, processes = setup.recipe, setup.processes
    model, state = new_state(setup)
    if (said := checkpoints.restore(folder, state)) and processes.first:
        print(said, file=sys.stderr)
    least, most = processes.least([state.iteration, -state.iteration])
    if least != -most:
        raise UserError(
            f"{folder}: the processes found checkpoints of iterations from {least} to {-most}; all must see one folder."
        )
    setup, model = compiled(setup, model)
    validator, recorder = Validator(setup, folder, info), Recorder(setup, model, folder)
    with Log(setup, folder, state) as log, StopRequest() as stop:
        while state.iteration < recipe.iterations and not target_reached(recipe, state):
            log.add(iterate(setup, model, state, recorder) | validator.validate_if_due(model, state), state)
            stopping = processes.any(stop.asked)
            if processes.first and (stopping or state.iteration % recipe.checkpoint_every == 0):
                checkpoints.save(folder, state, recipe.keep)
            if stopping:
                recorder.write_sheet()
                processes.wait()  # torchrun kills all as soon as one has ended
                raise KeyboardInterrupt(
                    f"stopped after iteration {state.iteration}; go on with --resume {folder}"
                )
    if not state.updates:
        raise UserError(
            f"none of {state.iteration} gradients was finite, so nothing was trained; try --dtype float32 or a smaller"
            " --guidance."
        )
    files = {"ema": folder / FILE, "raw": folder / RAW_FILE}
    if processes.first:
        checkpoints.save(folder, state, recipe.keep)
        info = {**info, "iterations": state.iteration}
        save_adapter(files["ema"], state.ema, {**info, "average": "ema"})
        save_adapter(files["raw"], state.parameters(), {**info, "average": "raw"})
        recorder.write_sheet()
        print(*log.summary(recipe, state, folder / BEST_FILE), sep="\n")
    processes.wait()
    return {**files, "best": folder / BEST_FILE} if state.best else files


def iterate(setup: Setup, model: Bundle, state: State, recorder: Recorder | None = None) -> Metrics:
    """One iteration, in `state` -> its metrics. Raises UserError where gradients stay useless."""
    began = time.monotonic()
    metrics = {"iteration": state.iteration, "lr": learning_rate(setup.recipe, state.iteration)}
    parameters = list(state.adapter.parameters())
    with torch.enable_grad():
        watch = recorder and recorder.watch(parameters, state.iteration)
        gradient, of_iteration = iteration_gradient(setup, model, parameters, state.iteration, watch)
    norm, finite = update(setup.recipe, state, gradient)
    state.unusable = 0 if finite else state.unusable + 1
    if broken := state.not_finite():
        raise UserError(
            f"iteration {state.iteration} brought {broken} beyond all numbers, and is not saved; lower --lr,"
            " --weight-decay or --clip."
        )
    if state.unusable == MAX_SKIPPED_STEPS:
        raise UserError(
            f"{MAX_SKIPPED_STEPS} gradients in a row were not finite, the last at iteration {state.iteration}; try"
            " --dtype float32 or a smaller --lr."
        )
    seconds = round(time.monotonic() - began, 3)
    skipped = state.iteration - state.updates
    return {
        **metrics,
        **of_iteration,
        "norm": norm if finite else None,
        "skipped": skipped,
        "seconds": seconds,
    }


class Validator:
    """Validations, the best adapter's file, and sample grids, at the iterations that are due."""

    def __init__(self, setup: Setup, folder: Path, info: dict[str, object]):
        self.setup, self.folder, self.info = setup, folder, info
        self.validation: Validation | None = None

    def validate_if_due(self, model: Bundle, state: State) -> Metrics:
        """What is due after the state's iterations -> {"validation": ...} if one was made, of the moving average."""
        setup, recipe, i = self.setup, self.setup.recipe, state.iteration
        validate, draw = (every and i % every == 0 for every in (recipe.validate_every, recipe.grid_every))
        if not setup.validation or not (validate or draw):
            return {}
        with averaged(state):
            if draw and setup.processes.first:
                draw_grid(setup, model, self.folder / "grids" / f"{i:06d}.png", i)
            if not validate:
                return {}
            self.validation = self.validation or start_validation(setup, self.folder / KEPT)
            measured = self.validation.measure(model)
        if record_best(setup, state, measured) and setup.processes.first:
            info = {**self.info, "iterations": i, "average": "ema", "validation": measured}
            save_adapter(self.folder / BEST_FILE, state.ema, info)
        return {"validation": measured}


@contextmanager
def averaged(state: State) -> Iterator[None]:
    """The adapter with its moving average in it."""
    raw = {name: p.data for name, p in state.parameters().items()}
    try:
        for name, p in state.parameters().items():
            p.data = state.ema[name]
        yield
    finally:
        for name, p in state.parameters().items():
            p.data = raw[name]


def compiled(setup: Setup, model: Bundle) -> tuple[Setup, Bundle]:
    """Both models' U-Nets compiled, and what has a gradient with recomputed blocks, where the recipe asks for it."""
    made = {}  # both models may have the same network

    def lighter(bundle: Bundle) -> Bundle:
        for name, blocks in RECOMPUTED.items() if setup.recipe.recompute else ():
            network = getattr(bundle, name)
            if isinstance(network, nn.Module) and any(isinstance(m, blocks) for m in network.modules()):
                bundle = replace(bundle, **{name: made.setdefault(id(network), recomputed(network, blocks))})
        if setup.recipe.compile:
            bundle = replace(bundle, unet=made.setdefault(id(bundle.unet), torch.compile(bundle.unet)))
        return bundle

    return replace(setup, bundle=lighter(setup.bundle)), lighter(model)


def recomputed(network: nn.Module, blocks: tuple[type[nn.Module], ...]) -> nn.Module:
    """The same network and weights, whose `blocks` keep only their inputs for a gradient, and then compute the rest
    again."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    again = copy.deepcopy(network, shared)
    keep_inputs = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for module in again.modules():
        if isinstance(module, blocks):
            module.forward = partial(keep_inputs, module.forward)
    return again
