"""The loss as a table of terms (docs/method.md §3 to §5), and its gradient at the end of the images' path.

N images of one prompt over all processes, n of them here, m of these in one micro-batch; A attributes, K_a classes
of each. With a face detector only faces count for L_align and L_face: M of the m images show one. Without, the whole
image does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fairref.diffusion.model import network_dtype, scaled_vjp
from fairref.fairness import losses
from fairref.fairness.faces import Faces, align_crops, scale_gradient, shared_boxes
from fairref.generation.rollout import decode
from fairref.generation.views import faces_of, map_batches, scatter_to_images, select_faces
from fairref.judges.sfnet import embed_faces
from fairref.training.own_losses import OwnLoss
from fairref.training.setup import Setup, Task

Values = tuple[Tensor, Tensor | float]  # (m,) one an image, already divided by N; and its weight
Loss = Callable[["View"], tuple[Tensor, Tensor]]  # with graph; and what is added up of its images, without

MIN_ORIGINAL_CONFIDENCE = 0.9  # of each class of o, from which its own face may be the reference of L_face
LOSS_SCALES = (2.0**16, 2.0**8, 1.0)


@dataclass(frozen=True)
class ImagePair:
    """The n images of this process in one iteration, and the frozen model's of the same noise and S.

    What judges see of them is None where the run has no target, or the bundle no such judge.
    """

    z_0: Tensor  # (n, 4, h, w)
    x: Tensor  # (n, 3, H, W) decoded from z_0
    o: Tensor  # (n, 3, H, W) the frozen model's
    faces: Faces | None = None  # of x
    o_faces: Faces | None = None
    o_class: Tensor | None = None  # (n, A); says nothing where o shows no face
    original_confident: Tensor | None = None  # (n,) bool: o's classes have p >= MIN_ORIGINAL_CONFIDENCE
    o_embedding: Tensor | None = None  # (n, D) of o's face, zero where there is none

    def __getitem__(self, rows: Tensor) -> "ImagePair":
        """Those of some rows."""
        return ImagePair(*(None if v is None else v[rows] for v in vars(self).values()))


def judged_pair(setup: Setup, z_0: Tensor, x: Tensor, o: Tensor) -> ImagePair:
    """Images x, decoded from z_0, and the frozen model's images o, with what the losses must know of them."""
    if setup.target is None:
        return ImagePair(z_0, x, o)
    faces, o_faces = faces_of(setup.bundle, x), faces_of(setup.bundle, o)
    o_logits = setup.classify(o, o_faces).values()
    o_p, o_class = (
        torch.stack(v, 1) for v in zip(*(logits.softmax(1).max(1) for logits in o_logits), strict=True)
    )
    has_face = None if o_faces is None else o_faces.has_face
    o_embedding = scatter_to_images(embeddings(setup, o, o_faces), has_face) if setup.judges_faces else None
    confident = (o_p >= MIN_ORIGINAL_CONFIDENCE).all(1)
    o_class, confident = scatter_to_images(o_class, has_face), scatter_to_images(confident, has_face)
    return ImagePair(z_0, x, o, faces, o_faces, o_class, confident, o_embedding)


@dataclass(frozen=True)
class View:
    """The m images of a micro-batch as the terms see them."""

    setup: Setup
    task: Task
    x: Tensor  # (m, 3, H, W) in [-1, 1], with graph
    pair: ImagePair  # of the same images
    q: dict[str, Tensor]  # (m, K_a) eq 5 of each attribute

    @property
    def has_face(self) -> Tensor | None:
        """(m,) bool; None without a detector."""
        return None if self.pair.faces is None else self.pair.faces.has_face

    @cached_property
    def logits(self) -> dict[str, Tensor]:
        """(M, K_a) of the classifier for finetuning."""
        return self.setup.classify(self.x, self.pair.faces)

    @cached_property
    def confident(self) -> dict[str, Tensor]:
        """(m,) bool: where the image has a target of the attribute."""
        C, has_face = self.setup.recipe.C, self.has_face
        of_faces = {n: losses.confident_targets(select_faces(q, has_face), C)[1] for n, q in self.q.items()}
        return {name: scatter_to_images(mask, has_face) for name, mask in of_faces.items()}

    @cached_property
    def agrees(self) -> dict[str, Tensor]:
        """(m,) bool: where the target is the class of the original."""
        return {
            name: losses.agreement(q.argmax(1), self.confident[name], self.pair.o_class[:, a])
            for a, (name, q) in enumerate(self.q.items())
        }


def align(view: View) -> Values:
    """L_align (eq 6), summed over attributes."""
    recipe, parts = view.setup.recipe, []
    for name, q in view.q.items():
        of_faces, soft = select_faces(q, view.has_face), recipe.targets == "soft"
        values, _ = losses.align_loss(view.logits[name], of_faces, recipe.C, recipe.batch, soft)
        parts.append(values)  # (M,)
    return scatter_to_images(sum(parts), view.has_face), 1.0


def image(view: View) -> Values:
    """L_img (eq 7) with its dynamic weight; inside the face its gradient is smaller where the face may change."""
    setup, recipe, pair, pixels = view.setup, view.setup.recipe, view.pair, view.x
    o_has_face = None if pair.o_faces is None else pair.o_faces.has_face
    lambda_2 = {name: recipe.lambda_img * share for name, share in recipe.lambda_2.items()}
    weights = losses.dynamic_weights(view.agrees, recipe.lambda_img, lambda_2, view.has_face, o_has_face)
    if pair.faces is not None:
        factors = losses.region_factors(view.agrees, recipe.lambda_3)
        pixels = scale_gradient(view.x, shared_boxes(pair.faces, pair.o_faces), factors)
    values = losses.image_loss(pixels, pair.o, setup.features, recipe.batch)  # (m,)
    return values, weights.to(values)


def face(view: View) -> Values:
    """L_face of the faces that have a confident target."""
    setup, pair = view.setup, view.pair
    judged = pair.faces.only(torch.stack(list(view.confident.values())).any(0))
    agree = torch.stack(list(view.agrees.values())).all(0)
    e = embeddings(setup, view.x, judged)  # (those judged, D)
    own = (agree & pair.original_confident)[judged.has_face] & (setup.recipe.face_reference == "original")
    references = losses.face_references(e, pair.o_embedding[judged.has_face], own, setup.bundle.face_features)
    values = losses.face_loss(e, references, setup.recipe.batch)
    return scatter_to_images(values, judged.has_face), setup.recipe.lambda_face


def text(view: View) -> Values:
    """L_text = 1/N Σ_i (1 - cos(CLIP(x^(i)), CLIP-text(P)))."""
    setup, clip = view.setup, view.setup.bundle.clip
    with torch.no_grad():
        prompt = clip.encode_text(setup.bundle.clip_tokenizer([view.task.prompt]).to(view.x.device))  # (1, D)
    return losses.text_loss(clip.encode_image(view.x), prompt, setup.recipe.batch), setup.recipe.lambda_text


def own_term(own: OwnLoss) -> Callable[[View], Values]:
    """A user's own loss as a term; images outside its mask count as 0."""

    def values(view: View) -> Values:
        # a copy of o: other terms need it as it is
        of_images = own(view.x, view.pair.o.clone(), view.task.prompt, view.setup.bundle)  # (m,)
        return of_images / view.setup.recipe.batch, own.weight

    return values


@dataclass(frozen=True)
class Term:
    """A row of TERMS: one term of the loss, and what it takes."""

    values: Callable[[View], Values]
    in_run: Callable[[Setup], bool]  # whether a run has it
    needs: tuple[str, ...] = ()  # parts of a bundle without which a run is refused
    without: tuple[tuple[str, str], ...] = ()  # parts that it can do without, and what the run then says


def _has_target(setup: Setup) -> bool:
    return setup.target is not None


TERMS: dict[str, Term] = {
    "align": Term(
        align,
        _has_target,
        ("classifiers.finetune",),
        (("detector", "no face detector: its classifiers look at whole images"),),
    ),
    "image": Term(image, _has_target, ("clip",), (("dino", "no DINO: L_img compares images by CLIP alone"),)),
    "face": Term(
        face,
        lambda setup: _has_target(setup) and setup.judges_faces,
        without=(("embedder", "no face embedder: the loss has no L_face"),),
    ),
    "text": Term(text, lambda setup: setup.recipe.lambda_text > 0, ("clip",)),
}
# what else is counted of images, as a share of all: name -> (its sum over a view, whether a run has it)
STATISTICS: dict[str, tuple[Callable[[View], Tensor], Callable[[Setup], bool]]] = {
    "confident": (lambda view: torch.stack([*view.confident.values()]).double().mean(0).sum(), _has_target),
    "faces": (
        lambda view: view.has_face.double().sum(),
        lambda setup: _has_target(setup) and setup.bundle.has("detector"),
    ),
}


def terms_of(setup: Setup) -> dict[str, Callable[[View], Values]]:
    """Name -> function of each term of the run's loss: its rows of TERMS, then the user's own."""
    rows = {name: term.values for name, term in TERMS.items() if term.in_run(setup)}
    return rows | {own.name: own_term(own) for own in setup.own_losses}


def sums_of(setup: Setup) -> list[str]:
    """The names of what `image_gradient` adds up."""
    return ["loss", *terms_of(setup), *(name for name, (_, in_run) in STATISTICS.items() if in_run(setup))]


def loss_of(view: View) -> tuple[Tensor, Tensor]:
    """L = Σ_terms Σ_i weight_i value_i of a view's images, and the sums that `sums_of` names, without graph."""
    terms = [values(view) for values in terms_of(view.setup).values()]
    loss = sum((weight * values).sum() for values, weight in terms)
    N, counts = view.setup.recipe.batch, [of for of, in_run in STATISTICS.values() if in_run(view.setup)]
    counted = [count(view) / N for count in counts]
    sums = [loss, *(values.sum() for values, _ in terms), *counted]
    return loss, torch.stack([part.detach().double().to(view.x.device) for part in sums])


def image_gradient(
    setup: Setup, task: Task, pair: ImagePair, q: dict[str, Tensor], loss: Loss = loss_of
) -> tuple[Tensor, Tensor]:
    """g = dL/dz_0 (n, 4, h, w) of this process's images, and the sums over them that `loss` has beside L.

    `q` (n, K_a) are these images' rows of eq 5. L and its terms are already divided by N.
    """
    q = {name: rows.to(pair.x.device) for name, rows in q.items()}
    g, sums = torch.zeros_like(pair.z_0), pair.x.new_zeros(len(sums_of(setup)), dtype=torch.float64)
    for rows in torch.arange(len(g)).split(setup.recipe.micro_batch or max(len(g), 1)):
        part = pair[rows]
        x = part.x.requires_grad_(True)
        of_part, values = loss(View(setup, task, x, part, {name: of[rows] for name, of in q.items()}))
        dtype = network_dtype(setup.bundle.vae, x)
        dx = loss_gradient(of_part, x, dtype)
        for some in rows.split(1 if setup.recipe.recompute else len(rows)):  # the decoder takes most memory
            z_0 = pair.z_0[some].requires_grad_(True)
            (g[some],) = scaled_vjp(decode(setup.bundle, z_0), [z_0], dx[some - rows[0]], dtype)
        sums += values
    return g, sums


def loss_gradient(loss: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dloss/dx through networks that compute in `dtype`. In float16 the loss is scaled by a power of two that leaves
    the result finite, for what a pixel weighs lies below float16's smallest numbers; the result is scaled back."""
    for scale in LOSS_SCALES if dtype == torch.float16 else (1.0,):
        (g,) = torch.autograd.grad(loss * scale, x, retain_graph=scale > 1)
        if torch.isfinite(g).all():
            break
    return g / scale


def embeddings(setup: Setup, x: Tensor, faces: Faces) -> Tensor:
    """Unit embeddings (M, D) of the faces in x, in at least float32."""
    embedder = setup.bundle.embedder
    crops = align_crops(x, faces, embedder.side)
    e = map_batches(lambda part: embed_faces(embedder, part), crops, setup.recipe.micro_batch)
    return e.to(torch.promote_types(e.dtype, torch.float32))
