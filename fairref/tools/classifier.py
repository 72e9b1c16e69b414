"""Train an attribute classifier, MobileNetV3, on CelebA or FairFace.

    fairref classifier --data fairface --root DIR --attr gender+race --out weights/sd15/classifier

A bundle needs two of them: one for finetuning, and one for evaluation with another --data or --seed. Images are
resized, mirrored and turned a little. Light, contrast and colour are changed too, unless the label depends on them.
The folder gets config.json and model.safetensors for a bundle, and report.json and confusion.png. The report has the
accuracy, that of each class and within each class of the other attributes, and the confusions.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from fairref.bundle.judges import save_classifier
from fairref.errors import UserError
from fairref.files.datasets import Photographs, Row
from fairref.files.images import read_image, save_png
from fairref.files.paths import write_json
from fairref.files.weights import load_strict, read
from fairref.judges.mobilenet import Classifier, MobileNetConfig, MobileNetV3
from fairref.progress import Progress

TURN = 10.0  # degrees, at most, either way
JITTER = 0.2  # of brightness, contrast and saturation, at most, either way
NO_JITTER = {"race"}  # attributes whose label depends on light and colour
STATISTICS = 200  # batches for BatchNorm's final averages
THREADS = 4  # that decode images
ORDER, CHANGES = 0, 1  # purpose of a draw, part of its key


@dataclass(frozen=True)
class Settings:
    """The settings of the training."""

    epochs: int = 10  # times through the data
    batch: int = 64  # images a step
    lr: float = 1e-3  # of AdamW, at the start
    seed: int = 0  # of order, changes and weights


def load(file: Path, side: int) -> Tensor:
    """Return the image (3, side, side) in [-1, 1]. Raises UserError."""
    pixels = np.asarray(read_image(file).resize((side, side), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1


def try_load(file: Path, side: int) -> Tensor | str:
    """Return the image as `load` does, or why it can't be read."""
    try:
        return load(file, side)
    except UserError as error:
        return str(error)


def load_batch(rows: list[Row], side: int, pool: ThreadPoolExecutor) -> tuple[Tensor, Tensor, list[str]]:
    """Return images (B, 3, side, side), labels (B, attributes), and why the others can't be read."""
    images = list(pool.map(lambda row: try_load(row.file, side), rows))
    read = [i for i, x in enumerate(images) if isinstance(x, Tensor)]
    x = torch.stack([images[i] for i in read]) if read else torch.zeros(0, 3, side, side)
    y = torch.tensor([rows[i].labels for i in read], dtype=torch.long).view(len(read), len(rows[0].labels))
    return x, y, [reason for reason in images if isinstance(reason, str)]


def changed(x: Tensor, jitter: bool, rng: np.random.Generator) -> Tensor:
    """Return each of x (B, 3, H, W) in [-1, 1] turned and perhaps mirrored; `jitter` changes light and colour too."""
    B = len(x)
    mirror = torch.from_numpy(np.where(rng.random(B) < 0.5, -1.0, 1.0))
    angle = torch.from_numpy(np.radians(rng.uniform(-TURN, TURN, B)))
    zero = torch.zeros(B, dtype=torch.float64)
    rows = [mirror * angle.cos(), -angle.sin(), zero, mirror * angle.sin(), angle.cos(), zero]
    grid = F.affine_grid(torch.stack(rows, 1).view(B, 2, 3), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid.to(x), padding_mode="reflection", align_corners=False)
    if jitter:
        contrast, light, colour = (
            torch.from_numpy(rng.uniform(-JITTER, JITTER, (B, 1, 1, 1))).to(x) for _ in range(3)
        )
        x = x + colour * (x - x.mean(1, keepdim=True))
        x = (x * (1 + contrast) + light).clamp(-1, 1)
    return x


def new_classifier(
    photographs: Photographs, config: MobileNetConfig, init: str | None, seed: int
) -> Classifier:
    """Return a new classifier of the attributes; all layers but the last start as in the file `init`, if given."""
    torch.manual_seed(seed)
    network = MobileNetV3(config)
    if init is not None:
        last = f"classifier.{len(network.classifier) - 1}."
        tensors, own = read(init), network.state_dict()
        shared = {k: v for k, v in tensors.items() if not k.startswith(last)}
        wrong = sorted(
            k for k in own if not k.startswith(last) and (k not in shared or shared[k].shape != own[k].shape)
        )
        if wrong:
            raise UserError(
                f"{init}: does not fit MobileNetV3-{config.kind} ({wrong[0]}); give torchvision's weights."
            )
        load_strict(network, shared | {k: v for k, v in own.items() if k.startswith(last)}, init)
    return Classifier(network, photographs.attributes)


def check_readable(
    readable: dict[str, set[int]], attributes: dict[str, tuple[str, ...]], unread: list[str]
) -> None:
    """Raise UserError if of some attribute's class no image was read. `unread`: why others could not be."""
    for name, classes in attributes.items():
        for k in sorted(set(range(len(classes))) - readable[name]):
            raise UserError(
                f"No training image of {name} {classes[k]!r} can be read, so nothing was learnt of it;"
                f" {describe_unread(unread)}"
            )


def train(
    classifier: Classifier, photographs: Photographs, settings: Settings, device: torch.device
) -> list[str]:
    """Train with AdamW on the sum of the attributes' cross-entropies; return why files can't be read.

    The learning rate falls along a cosine. Raises UserError if nothing can be learnt.
    """
    rows, names = photographs.parts["train"], list(photographs.attributes)
    side, jitter = classifier.network.config.input_size, not NO_JITTER & set(names)
    per_epoch = math.ceil(len(rows) / settings.batch)
    total, unread, updates = settings.epochs * per_epoch, set(), 0
    readable = {name: set() for name in names}  # classes of which an image was read
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=settings.lr)
    classifier.to(device).train()
    with Progress(total, "training") as progress, ThreadPoolExecutor(THREADS) as pool:
        for step in range(total):
            epoch, place = divmod(step, per_epoch)
            order = np.random.default_rng((settings.seed, ORDER, epoch)).permutation(len(rows))
            chosen = order[place * settings.batch : (place + 1) * settings.batch]
            x, y, failed = load_batch([rows[i] for i in chosen], side, pool)
            unread.update(failed)
            for a, name in enumerate(names):
                readable[name].update(y[:, a].tolist())
            if step + 1 == per_epoch:
                check_readable(readable, classifier.classes, sorted(unread))
            if len(x) < 2:  # BatchNorm needs two
                progress.step("too few readable images")
                continue
            x = changed(x, jitter, np.random.default_rng((settings.seed, CHANGES, step))).to(device)
            logits = classifier(x)
            loss = sum(F.cross_entropy(logits[name], y[:, a].to(device)) for a, name in enumerate(names))
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * (0.5 + 0.5 * math.cos(math.pi * step / total))
            if not loss.isfinite():
                raise UserError(
                    f"The loss is {loss.item()} at step {step + 1}; take a lower --lr than {settings.lr}."
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
            progress.step(f"loss {loss.item():.3f}")
    if not updates:
        raise UserError(
            "Fewer than two training images of a batch can be read: nothing was learnt; mend them."
        )
    settle(classifier, rows, settings.batch, device)
    return sorted(unread)


@torch.no_grad()
def settle(classifier: Classifier, rows: list[Row], batch: int, device: torch.device) -> None:
    """Set BatchNorm's averages to those of unchanged images: the running ones lag behind in a short run."""
    norms = [m for m in classifier.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, min(len(rows), STATISTICS * batch), batch):
            x, _, _ = load_batch(rows[start : start + batch], classifier.network.config.input_size, pool)
            if len(x) > 1:
                classifier(x.to(device))
    for norm, m in zip(norms, momentum, strict=True):
        norm.momentum = m


@torch.no_grad()
def answers(
    classifier: Classifier, rows: list[Row], batch: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return labels and predictions (n, attributes) of the n images that can be read, and why the others can't."""
    classifier.to(device).eval()
    side, labels, predicted, unread = classifier.network.config.input_size, [], [], []
    with Progress(math.ceil(len(rows) / batch), "testing") as progress, ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(rows), batch):
            x, y, failed = load_batch(rows[start : start + batch], side, pool)
            unread += failed
            if len(x):
                labels.append(y)
                predicted.append(
                    torch.stack([z.argmax(1).cpu() for z in classifier(x.to(device)).values()], 1)
                )
            progress.step()
    empty = [torch.zeros(0, len(classifier.classes), dtype=torch.long)]
    return torch.cat(labels or empty).numpy(), torch.cat(predicted or empty).numpy(), unread


def confusions(
    labels: np.ndarray, predicted: np.ndarray, attributes: dict[str, tuple[str, ...]]
) -> dict[str, np.ndarray]:
    """Return (K, K) counts for each attribute: rows are labels, columns predictions."""
    counts = {name: np.zeros((len(classes),) * 2, int) for name, classes in attributes.items()}
    for a, matrix in enumerate(counts.values()):
        np.add.at(matrix, (labels[:, a], predicted[:, a]), 1)
    return counts


def report(
    labels: np.ndarray, predicted: np.ndarray, attributes: dict[str, tuple[str, ...]]
) -> dict[str, dict[str, object]]:
    """Return the numbers of each attribute: images, accuracy, confusions.

    Accuracy is that of all images, of each class, and within each class of the other attributes.
    """
    correct, numbers = labels == predicted, {}

    def share(values: np.ndarray) -> float | None:
        return float(values.mean()) if len(values) else None

    for a, (name, counts) in enumerate(confusions(labels, predicted, attributes).items()):
        by = {
            other: {c: share(correct[labels[:, b] == k, a]) for k, c in enumerate(classes)}
            for b, (other, classes) in enumerate(attributes.items())
        }
        numbers[name] = {
            "images": len(labels),
            "accuracy": share(correct[:, a]),
            "of_class": by.pop(name),
            "within": by,
            "confusion": counts.tolist(),
        }
    return numbers


def confusion_figure(counts: dict[str, np.ndarray], attributes: dict[str, tuple[str, ...]]) -> Image.Image:
    """Return one matrix for each attribute, one below the other: rows are labels, columns answers, in % of the row."""
    cell, margin, head = 64, 110, 48
    widest = max(len(c) for c in attributes.values())
    height = sum(head + cell * len(c) + 16 for c in attributes.values())
    figure = Image.new("RGB", (margin + cell * widest + 16, height), "white")
    pen, top = ImageDraw.Draw(figure), 0
    for name, classes in attributes.items():
        pen.text((8, top + 8), f"{name}: label down, answer across, %", fill="black")
        for j, c in enumerate(classes):
            pen.text((margin + (j + 0.5) * cell, top + head - 6), c, fill="black", anchor="ms")
        for i, c in enumerate(classes):
            y, total = top + head + i * cell, max(counts[name][i].sum(), 1)
            pen.text((margin - 8, y + cell / 2), c, fill="black", anchor="rm")
            for j in range(len(classes)):
                share, x = counts[name][i, j] / total, margin + j * cell
                shade = tuple(round(255 - share * (255 - full)) for full in (31, 78, 140))
                pen.rectangle((x, y, x + cell - 2, y + cell - 2), fill=shade)
                ink = "white" if share > 0.5 else "black"
                pen.text((x + cell / 2, y + cell / 2), f"{100 * share:.1f}", fill=ink, anchor="mm")
        top += head + cell * len(classes) + 16
    return figure


def unreadable(photographs: Photographs, side: int) -> list[str]:
    """Return for each image that can't be read why."""
    files = [row.file for part in photographs.parts.values() for row in part]
    with ThreadPoolExecutor(THREADS) as pool:
        return [x for x in pool.map(lambda file: try_load(file, side), files) if isinstance(x, str)]


def describe_unread(reasons: list[str]) -> str:
    """Return how many images can't be read, and why the first can't."""
    return f"{len(reasons)} image{'s' * (len(reasons) > 1)} can't be read; the first is {reasons[0]}"


@dataclass(frozen=True)
class Trained:
    """The outcome of `make_classifier`."""

    part: str  # that was measured: "test", else "validation", else "train"
    measured: dict[str, dict[str, object]]  # attribute -> its numbers
    unread: list[str]  # why images can't be read


def make_classifier(
    photographs: Photographs,
    config: MobileNetConfig,
    settings: Settings,
    out: Path,
    init: str | None = None,
    device: torch.device | str = "cpu",
) -> Trained:
    """Train and measure a classifier, and write the folder `out`. `init`: file of first weights. Raises UserError."""
    classifier = new_classifier(photographs, config, init, settings.seed)
    unread = train(classifier, photographs, settings, device)
    part = next((p for p in ("test", "validation") if photographs.parts.get(p)), "train")
    labels, predicted, more = answers(classifier, photographs.parts[part], settings.batch, device)
    unread = sorted({*unread, *more})
    save_classifier(classifier.cpu().eval(), out)
    measured = report(labels, predicted, photographs.attributes)
    summary = {"part": part, "bad_rows": len(photographs.bad), "unreadable": len(unread)}
    write_json(out / "report.json", {**summary, **measured})
    counts = confusions(labels, predicted, photographs.attributes)
    save_png(confusion_figure(counts, photographs.attributes), out / "confusion.png", {})
    return Trained(part, measured, unread)
