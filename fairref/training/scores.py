"""What pulled: how long each image's part of the gradient is (`--scores`; docs/derivation.md, "Single images").

The pull of an image is the norm of its row of the gradient matrix, from the path that the iteration has stored. It is
recorded at every so many iterations, beside thumbnails and what the losses saw. N images of one prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairref.bundle.loading import Bundle
from fairref.diffusion.model import network_dtype, scaled_vjp
from fairref.errors import UserError
from fairref.fairness.losses import confident_targets
from fairref.files.images import save_png
from fairref.files.scores import FOLDER, FORMAT, SHEET, by_pull, read_scores, score_sheet
from fairref.files.weights import write
from fairref.generation.rollout import embed
from fairref.generation.views import scatter_to_images
from fairref.progress import note
from fairref.training.setup import Setup, Task
from fairref.training.step import Rollout, Watch, sampling_gradient, term_weights
from fairref.training.terms import ImagePair

SIDE = 64  # pixels of a thumbnail, at most
# of the rows' sum from the batch's gradient: both sum the same products in another order and other batches, with
# mantissas of 10 bits (TF32), 7 and 10
MOST_APART = {torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Recorder:
    """Records a run's scores in its folder."""

    setup: Setup
    model: Bundle  # the adapted one
    folder: Path

    def watch(self, parameters: Sequence[nn.Parameter], i: int) -> Watch | None:
        """What iteration i shows its parts to; None where its scores are not due."""
        every = self.setup.recipe.scores
        if i == 0 and every >= self.setup.recipe.iterations:
            note(
                f"--scores {every} records iteration 0 alone, before the adapter has changed anything; give less."
            )
        return partial(self._record, parameters, i) if every and i % every == 0 else None

    def _record(self, parameters, i, task, drawn, pair, q, g, gradient):
        setup, N = self.setup, self.setup.recipe.batch
        if setup.recipe.grad_steps:  # of all terms: one that was not drawn pulled, too
            drawn = drawn._replace(w=term_weights(setup, drawn.table, i))
            gradient = sampling_gradient(setup, drawn, g, embed(self.model, task.prompt), parameters)
        batch = torch.cat([part.flatten() for part in gradient])
        rest, pull = batch.clone(), []
        for row in gradient_rows(setup, self.model, parameters, task, drawn, g):
            rest -= row.to(rest)
            pull.append(torch.linalg.vector_norm(row))
        apart = float(torch.linalg.vector_norm(rest) / torch.linalg.vector_norm(batch).clamp(min=1e-30))
        if apart > MOST_APART.get(network_dtype(drawn.model.unet, g), 1e-6) and torch.isfinite(batch).all():
            note(
                f"iteration {i}: the images' gradients miss the batch's by {apart:.2g} of it: its scores are unsure."
            )
        columns = {"pull": torch.stack(pull) if pull else batch[:0], "pictures": thumbnails(pair.x)}
        columns |= seen_by_losses(setup, pair, q)
        whole = {name: setup.processes.gather(column, N).cpu() for name, column in columns.items()}
        if setup.processes.first:
            about = {"iteration": i, "prompt": task.prompt, "explicit": task.explicit, "apart": apart}
            path = self.folder / FOLDER / f"{i:06d}.safetensors"
            path.parent.mkdir(exist_ok=True)
            write(
                path,
                whole,
                {**about, "classes": setup.target.classes if setup.target else {}, "format": FORMAT},
            )

    def write_sheet(self) -> None:
        """Writes what has been recorded as a picture; the first process alone. A damaged file costs the picture."""
        if not self.setup.processes.first:
            return
        try:
            images = by_pull(read_scores(self.folder))
        except UserError as error:
            note(f"{SHEET} is not drawn: {error}")
            return
        if images:
            text = {"scores": f"{len(images)} images; the bar below one is its pull, of the largest"}
            save_png(score_sheet(images), self.folder / SHEET, text)


def gradient_rows(
    setup: Setup,
    model: Bundle,
    parameters: Sequence[nn.Parameter],
    task: Task,
    drawn: Rollout,
    g: Tensor,
) -> Iterator[Tensor]:
    """n rows (P,), one at a time: each image's part of dL/dparameters, by the run's gradient mode, from the path.

    Row n is what `sampling_gradient` makes of image n alone; the rows sum to the batch's gradient. Where the U-Net is
    not trained, each image gets a text leaf of its own, so that the U-Net sees all of them at once: in one step, for
    drawn terms are of several.
    """
    n = len(g)
    if not n:
        return
    w = drawn.w.view(len(drawn.w), -1).expand(-1, n)
    if drawn.w.dim() == 1 and not drawn.model.parameters and not setup.recipe.micro_batch:
        text = embed(model, task.prompt).detach()
        leaf = text.repeat_interleave(n, 0).requires_grad_(True)  # (2n, T, d)
        own = replace(drawn.model, c=leaf[:n], c_empty=leaf[n:])
        (cotangents,) = sampling_gradient(setup, drawn._replace(model=own), g, leaf, [leaf])
        of_images = (
            scaled_vjp(embed(model, task.prompt), parameters, cotangents[k::n].to(text.dtype))
            for k in range(n)
        )
    else:
        of_images = (
            sampling_gradient(
                setup,
                drawn._replace(path=[step._replace(z=step.z[k : k + 1]) for step in drawn.path], w=w[:, k]),
                g[k : k + 1],
                embed(model, task.prompt),  # its graph serves once
                parameters,
            )
            for k in range(n)
        )
    for row in of_images:
        yield torch.cat([part.flatten() for part in row])


def thumbnails(x: Tensor) -> Tensor:
    """Images (n, 3, H, W) in [-1, 1] -> (n, h, w, 3) uint8, SIDE pixels at most."""
    scale = min(1.0, SIDE / max(x.shape[-2:]))
    small = F.interpolate(x.float(), scale_factor=scale, mode="area") if scale < 1 else x.float()
    return ((small.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def seen_by_losses(setup: Setup, pair: ImagePair, q: dict[str, Tensor]) -> dict[str, Tensor]:
    """ "shown NAME", "target NAME" and "confidence NAME" (n,) of each attribute, as `Score` has them."""
    has_face = None if pair.faces is None else pair.faces.has_face
    columns = {}
    with torch.no_grad():
        logits = setup.classify(pair.x, pair.faces) if q else {}
    for name, of_attribute in q.items():
        shown = scatter_to_images(logits[name].argmax(1) + 1, has_face) - 1
        y, confident = confident_targets(
            of_attribute, 0 if setup.recipe.targets == "soft" else setup.recipe.C
        )
        columns[f"shown {name}"] = shown.cpu()
        columns[f"target {name}"] = torch.where(confident, y, -1).cpu()
        columns[f"confidence {name}"] = of_attribute.max(1).values.cpu()
    return columns
