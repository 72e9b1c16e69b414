"""Measure how each term of the loss pulls on the lean that is left where a run has ended.

    fairref balance runs/gender

A batch is what an iteration of training after the run's last one would draw: a prompt, S, and the noise of N images. A
prompt leans to the class that the frozen model's images of it show more often than the target has it; it still leans
where the adapted model's do so, too. Let u be the gradient of the mean log-odds of that class, by the run's own
gradient mode, on average over the neutral batches that still lean, each class with the same weight. A term whose
gradient is g pulls with -<g, u>/‖u‖: so fast the log-odds change where the adapter follows this term. Below 0 the term
makes the lean smaller. A batch is held against the u of the others alone, or its noise would pull on itself.

B batches, n images, M of them with a face, K classes of an attribute, P parameters.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fairref.bundle.loading import Bundle
from fairref.diffusion.model import network_dtype
from fairref.errors import UserError
from fairref.files.weights import load_strict
from fairref.generation.adapters import read_adapter
from fairref.generation.rollout import embed
from fairref.generation.views import select_faces
from fairref.progress import Progress, note
from fairref.settings import Recipe
from fairref.training.loop import clip_scale, compiled, new_state
from fairref.training.scores import MOST_APART, seen_by_losses
from fairref.training.setup import Setup, Task
from fairref.training.step import Rollout, iteration_gradient, sampling_gradient, term_weights
from fairref.training.terms import ImagePair, Values, View, image_gradient, terms_of

SUM = "sum"  # of all terms
CLIPS = ("unclipped", "clipped")
Value = Callable[[View], Tensor]  # a number of a view's images, with graph


@dataclass(frozen=True)
class Point:
    """Where an adapter stands, in its run."""

    setup: Setup
    model: Bundle  # the adapted one
    parameters: list[nn.Parameter]


def point_of(setup: Setup, file: Path) -> Point:
    """The point of an adapter's file. Raises UserError."""
    if setup.target is None:
        raise UserError(f"{file}: its run has no --attr, so nothing that could lean; give another run.")
    model, state = new_state(setup)
    adapter = read_adapter(file)
    if others := adapter.other_parts(setup.bundle):
        raise UserError(f"{file}: made from another {' and '.join(others)}; give an adapter of this run.")
    load_strict(state.adapter, adapter.tensors, str(file))
    return Point(*compiled(setup, model), list(state.adapter.parameters()))


@dataclass(frozen=True)
class Batch:
    """The gradients of one batch."""

    iteration: int
    task: Task
    asked: int  # images that are asked to show another class
    terms: dict[str, Tensor]  # (P,) of each term, with its weight; they add up to the batch's gradient
    norm: float  # of the batch's gradient
    leans: dict[str, int]  # attribute -> the class that the frozen model's images lean to; none if explicit
    u: dict[str, Tensor]  # attribute -> (P,) of the log-odds of that class, if the prompt still leans to it


def measure(point: Point, i: int) -> Batch:
    """Iteration i's batch. Raises UserError."""
    setup, model, parameters = point.setup, point.model, point.parameters
    seen = []
    whole, _ = iteration_gradient(setup, model, parameters, i, lambda *parts: seen.append(parts))
    whole = _flat(whole)
    if not seen or not torch.isfinite(whole).all():
        raise UserError(f"the gradient of iteration {i} is not finite; give another --adapter.")
    task, drawn, pair, q, *_ = seen[0]

    def gradient(value: Value, drawn: Rollout = drawn) -> Tensor:
        # a term that asks nothing of some images may not depend on them
        g, _ = image_gradient(
            setup, task, pair, q, lambda view: (value(view) + 0 * view.x.sum(), view.x.new_zeros(()))
        )
        return _flat(sampling_gradient(setup, drawn, g, embed(model, task.prompt), parameters)).cpu()

    terms = {name: gradient(partial(_weighted, values)) for name, values in terms_of(setup).items()}
    rest = whole.cpu() - sum(terms.values())
    apart, norm = float(rest.norm() / whole.norm().clamp(min=1e-30)), float(whole.norm())
    if apart > MOST_APART.get(network_dtype(model.unet, pair.x), 1e-6):
        note(
            f"iteration {i}: the terms' gradients miss the batch's by {apart:.2g} of it: the balance is unsure."
        )
    columns = seen_by_losses(setup, pair, q)
    leans = {} if task.explicit else leanings(setup, pair, columns)
    all_terms = drawn._replace(w=term_weights(setup, drawn.table, i))  # those drawn were drawn for the loss
    u = {
        name: gradient(partial(_log_odds, name, k, int((columns[f"shown {name}"] >= 0).sum())), all_terms)
        for name, (k, still) in leans.items()
        if still
    }
    return Batch(
        i, task, int(asked_images(columns, q).sum()), terms, norm, {a: k for a, (k, _) in leans.items()}, u
    )


def asked_images(columns: dict[str, Tensor], attributes: Iterable[str]) -> Tensor:
    """(n,) bool, of the columns of `seen_by_losses`: which images are asked to show another class."""
    moves = [
        (columns[f"target {a}"] >= 0) & (columns[f"target {a}"] != columns[f"shown {a}"]) for a in attributes
    ]
    return torch.stack(moves).any(0)


def _weighted(values: Callable[[View], Values], view: View) -> Tensor:
    """A term's part of the loss."""
    of_images, weight = values(view)
    return (weight * of_images).sum()


def _log_odds(name: str, k: int, faces: int, view: View) -> Tensor:
    """A view's part of the mean of log p_k/(1 - p_k) over all images with a face."""
    logits = view.logits[name]  # (M, K)
    others = torch.arange(logits.shape[1], device=logits.device) != k
    return (logits[:, k] - logits[:, others].logsumexp(1)).sum() / faces


def _flat(gradient: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in gradient])


def leanings(setup: Setup, pair: ImagePair, columns: dict[str, Tensor]) -> dict[str, tuple[int, bool]]:
    """Attribute -> the class that the frozen model's images lean to, and whether the adapted model's still do.

    Only attributes in which they lean; `columns` are those of `seen_by_losses`.
    """
    o_has_face, leans = None if pair.o_faces is None else pair.o_faces.has_face, {}
    for a, name in enumerate(setup.target.classes):
        target = torch.tensor(setup.target.marginal(name).target, dtype=torch.float64)
        shown = columns[f"shown {name}"]
        before, after = (
            torch.bincount(classes.cpu(), minlength=len(target)) - len(classes) * target
            for classes in (select_faces(pair.o_class[:, a], o_has_face), shown[shown >= 0])
        )
        k = int(before.argmax())
        if before[k] > 1e-9:  # images too many, but for rounding
            leans[name] = k, bool(after[k] > 1e-9)
    return leans


def pulls(batches: Sequence[Batch], attribute: str) -> np.ndarray:
    """(B, terms + 1) float64: -<g, u>/‖u‖ of each batch's terms and of their sum, unclipped; u of the other batches.

    u is the mean over classes of the mean over the batches that still lean to the class; one with a single batch is
    left out. So what moves all prompts towards one class cancels out in u, whichever batch is left out. Raises
    UserError where there is no such u.
    """
    leaning: dict[int, list[Tensor]] = {}
    for batch in batches:
        if attribute in batch.u:
            leaning.setdefault(batch.leans[attribute], []).append(batch.u[attribute].double())
    totals = {k: (sum(of_class), len(of_class)) for k, of_class in leaning.items() if len(of_class) > 1}
    if not totals:
        raise UserError(
            f"no two of {len(batches)} batches still lean to one class of {attribute}, and a direction takes two; give"
            " more --batches."
        )
    rows = []
    for batch in batches:
        own = batch.leans[attribute] if attribute in batch.u else None
        u = sum(
            (total - batch.u[attribute].double()) / (n - 1) if k == own else total / n
            for k, (total, n) in totals.items()
        )
        row = [-float(g.double() @ u / u.norm()) for g in batch.terms.values()]
        rows.append([*row, sum(row)])
    return np.array(rows)


def balance(point: Point, batches: int) -> dict[str, object]:
    """The report of this many batches, those after the run's last iteration. Raises UserError."""
    recipe = point.setup.recipe
    with Progress(batches, "batches") as progress:
        measured = []
        for i in range(recipe.iterations, recipe.iterations + batches):
            measured.append(measure(point, i))
            progress.step(measured[-1].task.prompt)
    return report(recipe, point.setup.target.classes, measured)


def report(
    recipe: Recipe, classes: dict[str, tuple[str, ...]], batches: Sequence[Batch]
) -> dict[str, object]:
    """What balance.json says of these batches and of the attributes that have a direction. Raises UserError."""
    norms, asked = (np.array([getattr(batch, key) for batch in batches]) for key in ("norm", "asked"))
    scales = np.array([[1.0, clip_scale(recipe, norm)] for norm in norms])  # (B, 2) as CLIPS
    pulled, lacking = {}, []
    for name in classes:
        try:
            pulled[name] = pulls(batches, name)
        except UserError as error:
            lacking.append(error)
    for error in lacking if pulled else ():
        note(str(error))
    if not pulled:
        raise lacking[0]
    names = [*batches[0].terms, SUM]
    attributes = {}
    for name, of_batches in pulled.items():
        attributes[name] = {
            "leaned": _counts(name, classes[name], batches),
            "still_lean": _counts(name, classes[name], [batch for batch in batches if name in batch.u]),
            "pull": {
                clip: dict(zip(names, map(_mean, (scales[:, [c]] * of_batches).T), strict=True))
                for c, clip in enumerate(CLIPS)
            },
        }
    rows = [
        {
            "iteration": batch.iteration,
            "prompt": batch.task.prompt,
            "explicit": batch.task.explicit,
            "asked": batch.asked,
            "norm": batch.norm,
            "scale": float(scales[b, 1]),
            "leaned": {name: classes[name][k] for name, k in batch.leans.items()},
            "still_leans": list(batch.u),
            "pull": {name: dict(zip(names, of[b].tolist(), strict=True)) for name, of in pulled.items()},
        }
        for b, batch in enumerate(batches)
    ]
    return {
        "batches": len(batches),
        "neutral": sum(not batch.task.explicit for batch in batches),
        "clip": recipe.clip,
        "clipped": float((scales[:, 1] < 1).mean()),
        "norm": {"asked": _mean(norms[asked > 0]), "not_asked": _mean(norms[asked == 0])},
        "length": dict(zip(CLIPS, (scales * norms[:, None]).mean(0).tolist(), strict=True)),
        "attributes": attributes,
        "rows": rows,
    }


def _counts(attribute, classes, batches):
    """Class -> how many of the batches lean to it."""
    leans = [batch.leans.get(attribute) for batch in batches]
    return {of_class: leans.count(k) for k, of_class in enumerate(classes)}


def _mean(values):
    """Mean and standard error over batches, and how many these are; None where there are too few."""
    n = len(values)
    error = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return {"mean": float(values.mean()) if n else None, "error": error, "batches": n}
