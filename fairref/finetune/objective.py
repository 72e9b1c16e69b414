"""What the pictures of an iteration are held against, and the gradient of the loss at the end of their path.

N images of one prompt over all processes, n of them here, m of these in one micro-batch, K classes. With a face
detector only faces count for L_align and L_face: M of the images show one. Without, the whole picture does.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fairref.bundle import Bundle
from fairref.diffusion.gradient import pull
from fairref.errors import UserError
from fairref.fairness import losses
from fairref.fairness.attributes import Attribute
from fairref.fairness.faces import (
    Faces,
    aligned,
    crops,
    find,
    scale_gradient,
    shared_boxes,
)
from fairref.finetune.distributed import Processes
from fairref.finetune.recipes import Recipe
from fairref.finetune.rollout import decode, embed, rollout
from fairref.judges.mobilenet import Classifier
from fairref.judges.sfnet import embed_faces

SURE = 0.9  # probability of the original's class from which its own face may be the reference of L_face
SUMS = ("loss", "align", "image", "face", "confident", "faces")  # what `picture_gradient` adds up


@dataclass(frozen=True)
class Setup:
    """What stays the same in a run."""

    bundle: Bundle  # the frozen model, with clip and classifiers["finetune"]
    recipe: Recipe
    attribute: Attribute  # what is made fair, and its target
    prompts: tuple[str, ...]  # P of finetuning, all neutral
    processes: Processes = Processes()
    named: tuple[tuple[str, int], ...] = ()  # prompts that name a class, and its index

    def __post_init__(self):
        for found, what in (
            (self.bundle.classifiers.get("finetune"), "classifier for finetuning"),
            (self.bundle.clip, "CLIP image tower"),
        ):
            if found is None:
                raise UserError(
                    f"{self.bundle.path}: has no {what}, which finetuning needs; use a bundle that names one."
                )
        if self.recipe.batch < self.processes.world:
            raise UserError(
                f"--batch is {self.recipe.batch} for {self.processes.world} processes; give each an image."
            )

    @property
    def features(self) -> list[Callable]:
        """What L_img compares pictures by: CLIP, and DINO where the bundle has it."""
        return [f for f in (self.bundle.clip.encode_image, self.bundle.dino) if f is not None]

    def classify(self, x: Tensor, faces: Faces | None) -> Tensor:
        """Logits of the attribute by the classifier for finetuning: `classify`."""
        classifier = self.bundle.classifiers["finetune"]
        return classify(classifier, self.attribute.name, x, faces, self.recipe.micro_batch)

    @property
    def judges_faces(self) -> bool:
        """Whether there is an L_face."""
        return self.bundle.embedder is not None and self.recipe.lambda_face > 0


@dataclass(frozen=True)
class Pictures:
    """The n pictures of this process in one iteration, and the frozen model's of the same noise and S."""

    z_0: Tensor  # (n, 4, h, w)
    x: Tensor  # (n, 3, H, W) decoded from z_0
    faces: Faces | None  # of x; None without a detector
    o: Tensor  # (n, 3, H, W) the frozen model's
    o_faces: Faces | None
    o_class: Tensor  # (n,) of o; says nothing where o shows no face
    o_sure: Tensor  # (n,) bool: o shows a face, if faces count, whose class has p >= SURE
    o_embedding: Tensor | None  # (n, D) of o's face, zero where there is none; None without L_face

    def part(self, rows: Tensor) -> "Pictures":
        """Those of some rows."""
        return Pictures(*(None if v is None else v[rows] for v in vars(self).values()))


def look(setup: Setup, model: Bundle, table, z_T: Tensor, path: list, prompt: str, both: Tensor) -> Pictures:
    """The pictures at the end of the adapted model's path, and the frozen model's; `both` is its [c, c_empty]."""
    bundle, recipe = setup.bundle, setup.recipe
    with torch.no_grad():
        z_0 = path[-1].z
        x = in_parts(lambda part: decode(bundle, part), z_0, recipe.micro_batch)
        frozen = embed(bundle, prompt)
        if model.unet is bundle.unet and torch.equal(frozen, both):  # both models draw the same
            o = x
        else:
            c, c_empty = frozen.split(1)
            z_o = rollout(bundle, table, z_T, c, c_empty, recipe.guidance)[-1].z
            o = in_parts(lambda part: decode(bundle, part), z_o, recipe.micro_batch)
        faces, o_faces = faces_of(bundle, x), faces_of(bundle, o)
        o_p, o_class = setup.classify(o, o_faces).softmax(1).max(1)
        found = None if o_faces is None else o_faces.found
        o_embedding = spread(embeddings(setup, o, o_faces), found) if setup.judges_faces else None
        return Pictures(
            z_0, x, faces, o, o_faces, spread(o_class, found), spread(o_p >= SURE, found), o_embedding
        )


def picture_gradient(setup: Setup, pictures: Pictures, q: Tensor) -> tuple[Tensor, Tensor]:
    """g = dL/dz_0 (n, 4, h, w) of L = L_align + lambda_img L_img + lambda_face L_face, and its SUMS over images.

    `q` (n, K) are these images' rows of eq 5. L and its terms are already divided by N.
    """
    q = q.to(pictures.x.device)
    g, sums = torch.zeros_like(pictures.z_0), pictures.x.new_zeros(len(SUMS), dtype=torch.float64)
    for rows in torch.arange(len(q)).split(setup.recipe.micro_batch or max(len(q), 1)):
        part = pictures.part(rows)
        x = part.x.requires_grad_(True)
        loss, values = loss_of(setup, x, part, q[rows])
        (dx,) = torch.autograd.grad(loss, x)
        z_0 = part.z_0.requires_grad_(True)
        (g[rows],) = pull(decode(setup.bundle, z_0), [z_0], dx)
        sums += values
    return g, sums


def loss_of(setup: Setup, x: Tensor, p: Pictures, q: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of images x = p.x with target rows q (m, K), summed, and the SUMS (METHOD.md §5)."""
    recipe, name, N = setup.recipe, setup.attribute.name, setup.recipe.batch
    found, o_found = (None if f is None else f.found for f in (p.faces, p.o_faces))
    align, confident = losses.align_loss(setup.classify(x, p.faces), at(q, found), recipe.C, N)  # (M,)
    confident = spread(confident, found)  # (m,)
    agrees = {name: losses.agreement(q.argmax(1), confident, p.o_class)}

    weights = losses.dynamic_weights(
        agrees, recipe.lambda_img, {name: recipe.lambda_img * recipe.lambda_2}, found, o_found
    )
    pixels = x
    if p.faces is not None:
        factors = losses.region_factors(agrees, {name: recipe.lambda_3})
        pixels = scale_gradient(x, shared_boxes(p.faces, p.o_faces), factors)
    image = losses.image_loss(pixels, p.o, setup.features, N)  # (m,)

    face = x.new_zeros(0)
    if setup.judges_faces:
        judged = p.faces.only(confident)
        e = embeddings(setup, x, judged)  # (those judged, D)
        own_counts = (agrees[name] & p.o_sure) if recipe.face_reference == "original" else confident & False
        references = losses.face_references(
            e, p.o_embedding[judged.found], own_counts[judged.found], setup.bundle.face_features
        )
        face = losses.face_loss(e, references, N)
    loss = losses.total_loss(align, image, weights.to(image), recipe.lambda_face * face)
    seen = len(x) if found is None else found.sum()
    parts = [loss, align.sum(), image.sum(), face.sum(), confident.sum(), torch.as_tensor(seen)]
    return loss, torch.stack([part.detach().double().to(x.device) for part in parts])


def faces_of(bundle, x: Tensor) -> Faces | None:
    """The face that counts in each picture, None without a detector."""
    return None if bundle.detector is None else find(bundle.detector, x)


def classify(classifier: Classifier, name: str, x: Tensor, faces: Faces | None, most: int = 0) -> Tensor:
    """Logits of an attribute, in at least float32: of the faces (M, K), or of the whole pictures (n, K)."""
    rows = x if faces is None else crops(x, faces, classifier.network.config.input_size)
    logits = in_parts(lambda part: classifier(part)[name], rows, most)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def embeddings(setup: Setup, x: Tensor, faces: Faces) -> Tensor:
    """Unit embeddings (M, D) of the faces in x, in at least float32."""
    embedder = setup.bundle.embedder
    cut = aligned(x, faces, embedder.config.side)
    e = in_parts(lambda part: embed_faces(embedder, part), cut, setup.recipe.micro_batch)
    return e.to(torch.promote_types(e.dtype, torch.float32))


def at(rows: Tensor, found: Tensor | None) -> Tensor:
    """Those of (n, ...) rows that belong to a face -> (M, ...); all if there is no detector."""
    return rows if found is None else rows[found]


def spread(values: Tensor, found: Tensor | None) -> Tensor:
    """One value a face (M, ...) -> one an image (n, ...), zero or False where there is none."""
    if found is None:
        return values
    rows = values.new_zeros(len(found), *values.shape[1:])
    rows[found] = values
    return rows


def in_parts(function: Callable, rows: Tensor, most: int) -> Tensor:
    """function(rows), at most `most` rows at once; 0: all."""
    return (
        torch.cat([function(part) for part in rows.split(most)]) if 0 < most < len(rows) else function(rows)
    )
