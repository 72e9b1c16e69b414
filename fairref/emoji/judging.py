"""Train the networks that judge images: classifiers, face detector, face embedder, DINO.

The places of faces are known from `pictures.face_points`. Every stage is a function of the folder of stage files, as
in stages.py. B images, M windows.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairref.emoji.fit import fit, generator_for
from fairref.emoji.pictures import VIEWS, Scene, draw, face_points
from fairref.emoji.stages import ATTRIBUTES, balanced_scene, labels, reconstructed
from fairref.fairness.faces import (
    Faces,
    align_crops,
    area,
    crops,
    square_around,
    to_bytes,
)
from fairref.judges import mtcnn
from fairref.judges.dino import Dino, DinoConfig
from fairref.judges.mobilenet import Classifier, MobileNetConfig, MobileNetV3
from fairref.judges.mtcnn import MTCNN
from fairref.judges.sfnet import SFNet, SFNetConfig, embed_faces
from fairref.judges.sprites import GENDERS, LOOKS, RESOLUTION, TONES
from fairref.nets.vae import VAE

CLASSIFIER_CONFIG = {
    "finetune": {"kind": "small", "width": 0.75, "input_size": 96},
    "evaluate": {"kind": "small", "width": 1.0, "input_size": 80},
}
CLASSIFIER_STEPS = {"finetune": 1100, "evaluate": 900}
DETECTOR_CONFIG = {"smallest": 10, "thresholds": [0.4, 0.5, 0.95]}
# shares of VIEWS; more of nobody than for the other judges, because things look like faces to a detector
DETECTOR_VIEWS = (0.5, 0.12, 0.13, 0.25)
EMBEDDER_CONFIG = {"depth": 4, "channels": (16, 32, 64, 96), "features": 64, "side": 48}
DINO_CONFIG = {
    "width": 96,
    "depth": 4,
    "heads": 3,
    "patch": 8,
    "trained_size": RESOLUTION,
    "input_size": RESOLUTION,
    "offset": 0.0,
}
FACES = 1024  # rows of D_F
# overlap of a window and a face: below the first it shows none, from the second a part, from the third a face
NEGATIVE, PART, POSITIVE = 0.3, 0.4, 0.65
HARDEST = 0.7  # share of the windows that count for the detector's cross-entropy


def held_out(look: Tensor, tone: Tensor) -> Tensor:
    """Return (B,) boolean: the quarter of all pairs of look and tone that classifiers are tested on and never see."""
    return (look + tone) % len(TONES) == 0


@torch.no_grad()
def half_through(vae: VAE, x: Tensor) -> Tensor:
    """Return images with the first half encoded and decoded, so that a judge learns both kinds."""
    half = len(x) // 2
    return torch.cat([reconstructed(vae, x[:half]), x[half:]])


def true_faces(scene: Scene, generator: torch.Generator | None = None, jitter: float = 0.0) -> Faces:
    """Return the faces of the people who are shown; `jitter` moves boxes and landmarks by a share of their side."""
    boxes, landmarks = face_points(scene.person[scene.shown])
    if jitter:
        side = (boxes[:, 2:] - boxes[:, :2]).mean(1)[:, None]
        moved = jitter * torch.randn(len(boxes), 4, generator=generator).clamp(-2, 2) * side
        boxes = boxes + moved
        landmarks = landmarks + moved[:, None, :2] * 0.5
    return Faces(scene.shown, square_around(boxes), landmarks)


def veiled(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return each image behind a pane of random colour, size, place and opacity, like goggles."""
    side = torch.linspace(-1, 1, x.shape[-1])
    cx, cy, w, h, alpha = torch.rand(5, len(x), 1, generator=generator)
    colour = torch.rand(len(x), 3, 1, 1, generator=generator)
    inside_x = (side - (1.6 * cx - 0.8)).abs() < 0.1 + 0.4 * w  # (B, W)
    inside_y = (side - (1.6 * cy - 0.8)).abs() < 0.1 + 0.3 * h  # (B, H)
    pane = (inside_y[:, :, None] & inside_x[:, None]) * (0.3 + 0.7 * alpha[:, :, None])  # (B, H, W)
    return torch.lerp(x, (2 * colour - 1).expand_as(x), pane[:, None].expand_as(x))


def noisy(x: Tensor, generator: torch.Generator, max_strength: float = 0.1) -> Tensor:
    """Return images with noise, each of its own strength."""
    strength = max_strength * torch.rand(len(x), 1, 1, 1, generator=generator)
    return x + strength * torch.randn(x.shape, generator=generator)


def closer(faces: Faces, generator: torch.Generator, near: Tensor) -> Faces:
    """Return the faces, of which those with near (M,) have a smaller box inside: it shows skin, not who it is."""
    left, top, right, bottom = faces.boxes.unbind(1)
    size = (right - left) * (0.25 + 0.3 * torch.rand(len(near), generator=generator))
    place = 0.25 + 0.5 * torch.rand(2, len(near), generator=generator)
    x, y = left + place[0] * (right - left), top + place[1] * (bottom - top)
    small = torch.stack([x - size / 2, y - size / 2, x + size / 2, y + size / 2], 1)
    return Faces(faces.has_face, small.where(near[:, None], faces.boxes), faces.landmarks)


def train_classifier(folder: Path, role: str, vae: VAE, batch: int = 64) -> Classifier:
    """Train a classifier with smoothed cross-entropy on faces of balanced scenes, half of them behind the VAE.

    A third of the faces are closer, and then only their tone is asked for. Some are partly covered. So a tone is learnt
    from the skin, not from the looks that it was shown with.
    """
    size = CLASSIFIER_CONFIG[role]["input_size"]

    def loss_of(classifier: Classifier, generator: torch.Generator) -> Tensor:
        scene = balanced_scene(2 * batch, generator)
        seen = scene.shown & ~held_out(scene.person.look, scene.person.tone)
        scene = scene[seen.nonzero()[:batch, 0]]
        x = half_through(vae, draw(scene))
        near = torch.rand(len(x), generator=generator) < 0.35
        faces = closer(true_faces(scene, generator, 0.04), generator, near)
        x = crops(x, faces, size)
        covered = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.4
        x = noisy(torch.where(covered, veiled(x, generator), x), generator)
        logits, truth = classifier(x), labels(scene)
        targets = {name: truth[name].where(~near | (name == "skin_tone"), -1) for name in logits}
        return sum(
            F.cross_entropy(logits[name], targets[name], label_smoothing=0.05, ignore_index=-1)
            for name in logits
        )

    seed = 2 + list(CLASSIFIER_CONFIG).index(role)
    torch.manual_seed(seed)
    config = MobileNetConfig(**CLASSIFIER_CONFIG[role], num_logits=sum(map(len, ATTRIBUTES.values())))
    classifier = Classifier(MobileNetV3(config), ATTRIBUTES)
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.05  # the usual 0.01 is for runs a hundred times longer
    steps = CLASSIFIER_STEPS[role]
    return fit(
        f"classifier_{role}", classifier, loss_of, steps=steps, lr=2e-3, folder=folder, seed=seed, ema=0.99
    )


def all_faces(scene: Scene) -> list[tuple[Tensor, Tensor]]:
    """Return all faces of each picture: boxes (F, 4) with MTCNN's count from one, and landmarks (F, 5, 2), indices."""
    shift = torch.tensor([1.0, 1.0, 0.0, 0.0])
    pair = scene.view == VIEWS.index("pair")
    people = []
    for who, there in ((scene.person, scene.shown), (scene.friend, pair)):
        boxes, landmarks = face_points(who)
        people.append((boxes + shift, landmarks - 0.5, there))
    rows = []
    for b in range(len(scene)):
        here = [(boxes[b], landmarks[b]) for boxes, landmarks, there in people if there[b]]
        rows.append(
            (torch.stack([box for box, _ in here]), torch.stack([points for _, points in here]))
            if here
            else (torch.zeros(0, 4), torch.zeros(0, 5, 2))
        )
    return rows


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Return intersection over union (M, F) of boxes (M, 4) and (F, 4)."""
    low, high = torch.maximum(a[:, None, :2], b[:, :2]), torch.minimum(a[:, None, 2:], b[:, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    return shared / (area(a)[:, None] + area(b) - shared).clamp(min=1e-6)


def some_windows(truth: Tensor, generator: torch.Generator, each: int = 8) -> Tensor:
    """Return squares (M, 4): around the faces (F, 4), some of them near misses, and anywhere."""
    M = each * max(1, len(truth))
    anywhere = torch.rand(M, 3, generator=generator)
    side = 8 + (RESOLUTION - 8) * anywhere[:, 2:] ** 2
    corner = anywhere[:, :2] * (RESOLUTION - side) + 1
    squares = [torch.cat([corner, corner + side], 1)]
    if len(truth):
        near = truth.repeat_interleave(2 * each, 0)
        size = (near[:, 2:] - near[:, :2]).amax(1, keepdim=True)
        scale = torch.exp(0.25 * torch.randn(len(near), 1, generator=generator).clamp(-2, 2))
        centre = (near[:, :2] + near[:, 2:]) / 2
        centre = centre + 0.18 * size * torch.randn(len(near), 2, generator=generator)
        squares.append(torch.cat([centre - size * scale / 2, centre + size * scale / 2], 1))
    return torch.cat(squares)


def detector_loss(
    network: nn.Module, x: Tensor, boxes: Tensor, truth: tuple[Tensor, Tensor], share: Tensor
) -> Tensor:
    """Return the loss of windows x (M, 3, s, s) at boxes (M, 4).

    truth: box (M, 4) and landmarks (M, 5, 2) of each window's face. share (M,): overlap of window and face. The loss
    sums three terms: face or none of clear windows, the sides of a face or part, the landmarks of a clear face. Only
    the third network has the last term.
    """
    moves, *points, probability = network(x)
    moves, probability = moves.flatten(1), probability.flatten()
    target, landmarks = truth
    size = boxes[:, 2:] - boxes[:, :2] + 1
    clear = (share >= POSITIVE) | (share < NEGATIVE)
    errors = F.binary_cross_entropy(
        probability[clear].clamp(1e-6, 1 - 1e-6), (share[clear] >= POSITIVE).float(), reduction="none"
    )
    loss = errors.topk(max(1, int(HARDEST * len(errors))))[0].mean()
    partial, positive = share >= PART, share >= POSITIVE
    if partial.any():
        loss = loss + 4 * F.mse_loss(moves[partial], ((target - boxes) / size.repeat(1, 2))[partial])
    if points and positive.any():
        # five x, five y
        wanted = ((landmarks + 1 - boxes[:, None, :2]) / size[:, None]).transpose(1, 2).flatten(1)
        loss = loss + 4 * F.mse_loss(points[0][positive], wanted[positive])
    return loss


Proposal = tuple[Tensor, Tensor | None]  # boxes (M, 4) in an image, and their image (M,)


def windows_loss(
    vae: VAE, batch: int, side: int, propose: Callable[[Tensor], Proposal]
) -> Callable[[nn.Module, torch.Generator], Tensor]:
    """Return the loss of one network of the detector on windows of `side` pixels.

    Some windows are those that the networks before it `propose`.
    """

    def loss_of(network: nn.Module, generator: torch.Generator) -> Tensor:
        scene = balanced_scene(batch, generator, views=DETECTOR_VIEWS)
        x = to_bytes(noisy(half_through(vae, draw(scene)), generator, 0.05)).float()
        pixels, seen, targets, landmarks, shares = [], [], [], [], []
        for image, (truth, points) in zip(x.split(1), all_faces(scene), strict=True):
            with torch.no_grad():
                passed = propose(image)[0][:16]
            boxes = torch.cat([some_windows(truth, generator), passed])
            shown, boxes, _ = mtcnn.crops(image, boxes, torch.zeros(len(boxes), dtype=torch.long), side)
            share = overlap(boxes, truth) if len(truth) else boxes.new_zeros(len(boxes), 1)
            share, which = share.max(1)
            pixels.append(shown)
            seen.append(boxes)
            shares.append(share)
            targets.append(truth[which] if len(truth) else boxes)
            landmarks.append(points[which] if len(truth) else boxes.new_zeros(len(boxes), 5, 2))
        truths = torch.cat(targets), torch.cat(landmarks)
        return detector_loss(network, torch.cat(pixels), torch.cat(seen), truths, torch.cat(shares))

    return loss_of


def train_detector(folder: Path, vae: VAE, steps: int = 700, batch: int = 12) -> MTCNN:
    """Train the three networks one after the other; each also learns from the windows that those before it pass."""
    torch.manual_seed(4)
    detector = MTCNN(DETECTOR_CONFIG["smallest"]).eval()  # it learns with the usual thresholds
    stages_of = (
        ("pnet", mtcnn.WINDOW, lambda image: (image.new_zeros(0, 4), None)),
        ("rnet", 24, detector.propose),
        ("onet", 48, lambda image: detector.refine(image, *detector.propose(image))),
    )
    for name, side, propose in stages_of:
        network, loss_of = getattr(detector, name), windows_loss(vae, batch, side, propose)
        fit(f"detector_{name}", network, loss_of, steps=steps, lr=2e-3, folder=folder, seed=4, ema=0.99)
    return detector


class Identities(nn.Module):
    """SFNet and, for its training, one direction in the space of features for each person of the sheet."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder = SFNet(SFNetConfig(**EMBEDDER_CONFIG))
        people = len(LOOKS) * len(GENDERS) * len(TONES)
        self.directions = nn.Parameter(torch.randn(people, EMBEDDER_CONFIG["features"]))


def train_embedder(
    folder: Path, vae: VAE, steps: int = 900, batch: int = 64, scale: float = 16.0, margin: float = 0.2
) -> SFNet:
    """Train SFNet with CosFace: softmax over people of the cosines, less a margin for the right person."""

    def loss_of(identities: Identities, generator: torch.Generator) -> Tensor:
        scene = balanced_scene(batch, generator)
        scene = scene[scene.shown.nonzero()[:, 0]]
        faces = true_faces(scene, generator, 0.03)
        x = noisy(align_crops(half_through(vae, draw(scene)), faces, EMBEDDER_CONFIG["side"]), generator)
        cosine = embed_faces(identities.embedder, x) @ F.normalize(identities.directions, dim=1).T
        p = scene.person
        who = (p.look * len(GENDERS) + p.gender) * len(TONES) + p.tone
        cosine = cosine - margin * F.one_hot(who, cosine.shape[1])
        return F.cross_entropy(scale * cosine, who)

    torch.manual_seed(5)
    return fit(
        "embedder", Identities(), loss_of, steps=steps, lr=1e-3, folder=folder, seed=5, ema=0.99
    ).embedder


@torch.no_grad()
def face_features(embedder: SFNet, seed: int = 0) -> Tensor:
    """Return D_F (FACES, D): unit embeddings of the real faces of the small world."""
    scene = balanced_scene(FACES, generator_for(seed, "faces", 0), portraits=True)
    rows = torch.arange(FACES).split(128)
    side = embedder.config.side
    return torch.cat(
        [
            embed_faces(embedder, align_crops(draw(scene[part]), true_faces(scene[part]), side))
            for part in rows
        ]
    )


class SelfDistillation(nn.Module):
    """DINO's student and teacher with their heads, and the centre of the teacher's outputs."""

    def __init__(self, prototypes: int = 512, bottleneck: int = 64) -> None:
        super().__init__()
        width = DINO_CONFIG["width"]

        def tower() -> nn.ModuleDict:
            head = nn.Sequential(nn.Linear(width, 192), nn.GELU(), nn.Linear(192, bottleneck))
            return nn.ModuleDict({"dino": Dino(DinoConfig(**DINO_CONFIG)), "head": head})

        self.student, self.teacher = tower(), tower()
        for embedding in (self.student["dino"].cls_token, self.student["dino"].pos_embed):
            nn.init.normal_(embedding, std=0.1)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.directions = nn.Parameter(torch.randn(prototypes, bottleneck))
        self.register_buffer("centre", torch.zeros(prototypes))

    def logits(self, tower: nn.ModuleDict, x: Tensor) -> Tensor:
        """Return cosines (B, prototypes) of images, or of windows of them."""
        features = tower["dino"].tokens(x)[:, 0]
        return F.normalize(tower["head"](features), dim=1) @ F.normalize(self.directions, dim=1).T


def window(x: Tensor, generator: torch.Generator, low: float, high: float, side: int) -> Tensor:
    """Return a window of each image, `low` to `high` of its side, at `side` pixels, in slightly changed colours."""
    B = len(x)
    size = low + (high - low) * torch.rand(B, 1, generator=generator)
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = size[:, 0]
    theta[:, :, 2] = (1 - size) * (2 * torch.rand(B, 2, generator=generator) - 1)
    grid = F.affine_grid(theta, [B, 3, side, side], align_corners=False)
    colour = 0.1 * torch.randn(B, 3, 1, 1, generator=generator)
    return F.grid_sample(x, grid, align_corners=False, padding_mode="border") + colour


def train_dino(folder: Path, steps: int = 900, batch: int = 48, momentum: float = 0.99) -> Dino:
    """Train DINO by self-distillation (Caron et al. 2021).

    The teacher sees two large windows of an image. The student must predict each output of the teacher from the other
    large window and from two small ones.
    """

    def loss_of(pair: SelfDistillation, generator: torch.Generator) -> Tensor:
        scene = balanced_scene(batch, generator)
        x = pair.student["dino"].preprocess(draw(scene))
        large = [window(x, generator, 0.6, 1.0, RESOLUTION) for _ in range(2)]
        small = [window(x, generator, 0.3, 0.6, RESOLUTION // 2) for _ in range(2)]
        with torch.no_grad():
            for old, new in zip(pair.teacher.parameters(), pair.student.parameters(), strict=True):
                old.lerp_(new, 1 - momentum)
            teacher_logits = [pair.logits(pair.teacher, view) for view in large]
            wanted = [((logits - pair.centre) / 0.05).softmax(1) for logits in teacher_logits]
            pair.centre.lerp_(torch.cat(teacher_logits).mean(0), 0.1)
        given = [(pair.logits(pair.student, view) / 0.1).log_softmax(1) for view in (*large, *small)]
        losses = [
            -(target * log_p).sum(1).mean()
            for i, target in enumerate(wanted)
            for j, log_p in enumerate(given)
            if i != j
        ]
        return sum(losses) / len(losses)

    torch.manual_seed(6)
    pair = fit("dino", SelfDistillation(), loss_of, steps=steps, lr=1e-3, folder=folder, seed=6)
    return pair.teacher["dino"]
