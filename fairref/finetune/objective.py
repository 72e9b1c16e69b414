"""What the pictures of an iteration are held against, and the gradient of the loss at the end of their path.

N images of one prompt over all processes, n of them here, m of these in one micro-batch; A attributes, K_a classes
of each. With a face detector only faces count for L_align and L_face: M of the images show one. Without, the whole
picture does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairref.bundle import Bundle
from fairref.diffusion.gradient import loss_gradient, pull
from fairref.diffusion.sampler import network_dtype
from fairref.fairness import losses
from fairref.fairness.faces import Faces, aligned, scale_gradient, shared_boxes
from fairref.finetune.looking import at, faces_of, in_parts, spread
from fairref.finetune.rollout import decode, embed, rollout
from fairref.finetune.setup import Setup, Task
from fairref.judges.sfnet import embed_faces

SURE = 0.9  # probability of the original's class from which its own face may be the reference of L_face
SUMS = ("loss", "align", "image", "face", "confident", "faces")  # what `picture_gradient` adds up


@dataclass(frozen=True)
class Pictures:
    """The n pictures of this process in one iteration, and the frozen model's of the same noise and S."""

    z_0: Tensor  # (n, 4, h, w)
    x: Tensor  # (n, 3, H, W) decoded from z_0
    faces: Faces | None  # of x; None without a detector
    o: Tensor  # (n, 3, H, W) the frozen model's
    o_faces: Faces | None
    o_class: Tensor  # (n, A) of o; says nothing where o shows no face
    o_sure: Tensor  # (n,) bool: o shows a face, if faces count, each of whose classes has p >= SURE
    o_embedding: Tensor | None  # (n, D) of o's face, zero where there is none; None without L_face

    def part(self, rows: Tensor) -> "Pictures":
        """Those of some rows."""
        return Pictures(*(None if v is None else v[rows] for v in vars(self).values()))


def look(setup: Setup, model: Bundle, table, path: list, task: Task, both: Tensor) -> Pictures:
    """The pictures at the end of the adapted model's path, and the frozen model's; `both` is its [c, c_empty]."""
    bundle, recipe = setup.bundle, setup.recipe
    with torch.no_grad():
        z_0 = path[-1].z
        x = in_parts(lambda part: decode(bundle, part), z_0, recipe.micro_batch)
        frozen = embed(bundle, task.prompt)
        if model.unet is bundle.unet and torch.equal(frozen, both):  # both models draw the same
            o = x
        else:
            z_o = rollout(bundle, table, path[0].z, *frozen.split(1), task.guidance)[-1].z
            o = in_parts(lambda part: decode(bundle, part), z_o, recipe.micro_batch)
        return held_against(setup, z_0, x, o)


def held_against(setup: Setup, z_0: Tensor, x: Tensor, o: Tensor) -> Pictures:
    """What the losses must know of pictures x, decoded from z_0, and of the frozen model's pictures o."""
    faces, o_faces = faces_of(setup.bundle, x), faces_of(setup.bundle, o)
    o_logits = setup.classify(o, o_faces).values()
    o_p, o_class = (torch.stack(v, 1) for v in zip(*(logits.softmax(1).max(1) for logits in o_logits)))
    found = None if o_faces is None else o_faces.found
    o_embedding = spread(embeddings(setup, o, o_faces), found) if setup.judges_faces else None
    sure = (o_p >= SURE).all(1)
    return Pictures(z_0, x, faces, o, o_faces, spread(o_class, found), spread(sure, found), o_embedding)


def picture_gradient(setup: Setup, pictures: Pictures, q: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """g = dL/dz_0 (n, 4, h, w) of L = L_align + lambda_img L_img + lambda_face L_face, and its SUMS over images.

    `q` (n, K_a) are these images' rows of eq 5. L and its terms are already divided by N.
    """
    q = {name: rows.to(pictures.x.device) for name, rows in q.items()}
    g, sums = torch.zeros_like(pictures.z_0), pictures.x.new_zeros(len(SUMS), dtype=torch.float64)
    for rows in torch.arange(len(g)).split(setup.recipe.micro_batch or max(len(g), 1)):
        part = pictures.part(rows)
        x = part.x.requires_grad_(True)
        loss, values = loss_of(setup, x, part, {name: of_all[rows] for name, of_all in q.items()})
        dtype = network_dtype(setup.bundle.vae, x)
        dx = loss_gradient(loss, x, dtype)
        z_0 = part.z_0.requires_grad_(True)
        (g[rows],) = pull(decode(setup.bundle, z_0), [z_0], dx, dtype)
        sums += values
    return g, sums


def loss_of(setup: Setup, x: Tensor, p: Pictures, q: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss of images x = p.x with target rows q (m, K_a), summed, and the SUMS (docs/method.md §5)."""
    recipe, N = setup.recipe, setup.recipe.batch
    found, o_found = (None if f is None else f.found for f in (p.faces, p.o_faces))
    logits, align, sure, agrees = setup.classify(x, p.faces), 0, [], {}
    for a, (name, rows) in enumerate(q.items()):
        values, confident = losses.align_loss(logits[name], at(rows, found), recipe.C, N)  # (M,)
        align = align + values
        sure.append(spread(confident, found))  # (m,)
        agrees[name] = losses.agreement(rows.argmax(1), sure[-1], p.o_class[:, a])
    sure = torch.stack(sure)  # (A, m)

    lambda_2 = {name: recipe.lambda_img * share for name, share in recipe.lambda_2.items()}
    weights = losses.dynamic_weights(agrees, recipe.lambda_img, lambda_2, found, o_found)
    pixels = x
    if p.faces is not None:
        factors = losses.region_factors(agrees, recipe.lambda_3)
        pixels = scale_gradient(x, shared_boxes(p.faces, p.o_faces), factors)
    image = losses.image_loss(pixels, p.o, setup.features, N)  # (m,)

    face = face_part(setup, x, p, sure.any(0), torch.stack(list(agrees.values())).all(0))
    loss = losses.total_loss(align, image, face, weights.to(image), recipe.lambda_face)
    seen = len(x) if found is None else found.sum()
    parts = [loss, align.sum(), image.sum(), face.sum(), sure.double().mean(0).sum(), torch.as_tensor(seen)]
    return loss, torch.stack([part.detach().double().to(x.device) for part in parts])


def face_part(setup: Setup, x: Tensor, p: Pictures, confident: Tensor, agree: Tensor) -> Tensor:
    """L_face of the faces in x that have a confident (m,) target; `agree` (m,): the original has all of its classes."""
    if not setup.judges_faces:
        return x.new_zeros(0)
    judged = p.faces.only(confident)
    e = embeddings(setup, x, judged)  # (those judged, D)
    own = (agree & p.o_sure)[judged.found] & (setup.recipe.face_reference == "original")
    external = setup.bundle.face_features
    references = losses.face_references(e, p.o_embedding[judged.found], own, external)
    return losses.face_loss(e, references, setup.recipe.batch)


def embeddings(setup: Setup, x: Tensor, faces: Faces) -> Tensor:
    """Unit embeddings (M, D) of the faces in x, in at least float32."""
    embedder = setup.bundle.embedder
    cut = aligned(x, faces, embedder.config.side)
    e = in_parts(lambda part: embed_faces(embedder, part), cut, setup.recipe.micro_batch)
    return e.to(torch.promote_types(e.dtype, torch.float32))
