"""What a run says of itself: the progress bar, metrics.jsonl, TensorBoard."""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from fairref.errors import UserError
from fairref.progress import Progress
from fairref.settings import Recipe
from fairref.training import checkpoints
from fairref.training.checkpoints import State
from fairref.training.setup import Setup
from fairref.training.terms import terms_of
from fairref.training.validation import goal

RUNNING = 20  # iterations that the shown bias is a mean of
FACELESS = 20  # iterations in a row without a face, after which a run says so
ALSO_SHOWN = ("cost", "faces", "confident", "blended")  # beside the loss's terms


class Board(Protocol):
    """What is asked of a writer for TensorBoard."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """One point of a curve."""

    def close(self) -> None:
        """Writes what is left."""


class Log:
    """`with Log(setup, folder, state) as log: ... log.add(metrics, state)`; only the first process writes."""

    def __init__(self, setup: Setup, folder: Path, state: State):
        self.first, self.folder, self.recent = setup.processes.first, folder, []
        self.start, self.began = state.iteration, time.monotonic()
        self.shown, self.goal = (*terms_of(setup), *ALSO_SHOWN), goal(setup)
        self.progress = Progress(setup.recipe.iterations, "finetuning", self.first, state.iteration)
        self.board, self.faceless = None, 0
        if self.first:
            if said := checkpoints.cut_metrics(folder, state.iteration):
                print(said, file=sys.stderr)
            if setup.recipe.tensorboard:
                self.board = board(folder / "tensorboard", state.iteration)

    def __enter__(self):
        self.progress.__enter__()
        return self

    def __exit__(self, *error):
        self.progress.__exit__(*error)
        if self.board:
            self.board.close()

    def summary(self, recipe: Recipe, state: State, best: Path) -> list[str]:
        """What a run says at its end; `best` is the file of its best adapter."""
        done, minutes = state.iteration - self.start, (time.monotonic() - self.began) / 60
        lines = [f"iterations {self.start + 1} to {state.iteration} took {minutes:.1f} min"] if done else []
        if state.iteration > state.updates:
            lines += [
                f"{state.iteration - state.updates} were skipped, because their gradients were not finite"
            ]
        if state.iteration < recipe.iterations:
            lines += [f"{state.streak} validations in a row were at most until_bias: the run ends here"]
        if state.best:
            least, at = state.best[self.goal], state.best["iteration"]
            least = f"{least:.2f}" if self.goal == "bias" else f"{least:.3g}"
            lines += [
                f"of the validated adapters {best} has the least {self.goal}, {least} after iteration {at}"
            ]
        return lines

    def add(self, metrics: Mapping[str, object], state: State) -> None:
        """One more iteration, which `state` has behind it."""
        if "bias" in metrics:
            self.recent = [*self.recent, metrics["bias"]][-RUNNING:]
        if self.first:
            checkpoints.append_metrics(self.folder, metrics)
        if self.board:
            for name, value in flat(metrics).items():
                self.board.add_scalar(name, value, state.iteration)
        self.faceless = self.faceless + 1 if metrics.get("faces") == 0 else 0
        if self.first and self.faceless == FACELESS:
            print(
                f"\nno image of the last {FACELESS} iterations shows a face, so nothing is aligned; look at --guidance,"
                " --lr, and the bundle's detector",
                file=sys.stderr,
            )
        skipped = state.iteration - state.updates
        parts = [f"{name} {metrics[name]:.3f}" for name in self.shown if name in metrics]
        parts += [f"bias {np.mean(self.recent):.2f}"] if self.recent else []
        if state.best:
            best = f"{state.best[self.goal]:.2f}" if self.goal == "bias" else f"{state.best[self.goal]:.3g}"
            parts += [f"best {best} at {state.best['iteration']}"]
        self.progress.step("  ".join(parts + ([f"skipped {skipped}"] if skipped else [])))


def flat(metrics: Mapping[str, object], before: str = "") -> dict[str, float]:
    """The numbers of nested metrics, by their path."""
    found = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{name}/")
        elif isinstance(value, int | float):
            found[f"{before}{name}"] = value
    return found


def need_tensorboard() -> Callable[..., Board]:
    """TensorBoard's class of writers. Raises UserError."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            '--tensorboard needs TensorBoard; install it with pip install -e ".[log]", or leave the option out.'
        ) from None
    return SummaryWriter


def board(folder: Path, iteration: int) -> Board:
    """TensorBoard's writer; what a resumed run does again is dropped there. Raises UserError."""
    return need_tensorboard()(folder, purge_step=iteration + 1)
