"""Trains an attribute classifier, MobileNetV3, on CelebA or FairFace.

    python -m fairref.train_classifier --data fairface --root DIR --attr gender+race --out weights/sd15/classifier

Two of them make a bundle: one for finetuning and, trained apart (another --data or --seed), one for evaluation.
Pictures are resized, mirrored and turned a little and, where it leaves the label as it is, changed in light, contrast
and colour. Writes the folder that a bundle's manifest names: config.json and model.safetensors, and beside them the
accuracy of each class, and within each class of the other attributes, and the confusions, as report.json and
confusion.png.
"""

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from fairref import cli
from fairref.datasets import Photographs, Row, describe_bad, read_photographs
from fairref.errors import UserError
from fairref.images import UNREADABLE
from fairref.judge_files import save_classifier
from fairref.judges.mobilenet import Classifier, MobileNetConfig, MobileNetV3
from fairref.progress import Progress
from fairref.weights_io import load_strict, read, write_json

TURN = 10.0  # degrees, at most, either way
JITTER = 0.2  # of brightness, contrast and saturation, at most, either way
NO_JITTER = {"race"}  # attributes whose label light and colour are part of
STATISTICS = 200  # batches that BatchNorm's averages are taken from in the end
THREADS = 4  # that decode pictures
ORDER, CHANGES = 0, 1  # what a draw is for


@dataclass(frozen=True)
class Settings:
    """How long and how fast."""

    epochs: int = 10
    batch: int = 64
    lr: float = 1e-3
    seed: int = 0


def load(file: Path, side: int) -> Tensor | None:
    """The picture (3, side, side) in [-1, 1]; None where it can't be read."""
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))
    except UNREADABLE:
        return None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1


def load_batch(rows: list[Row], side: int, pool: ThreadPoolExecutor) -> tuple[Tensor, Tensor, list[str]]:
    """Pictures (B, 3, side, side), labels (B, attributes), and the names of files that can't be read."""
    pictures = list(pool.map(lambda row: load(row.file, side), rows))
    read = [i for i, x in enumerate(pictures) if x is not None]
    unread = [short_name(row.file) for row, x in zip(rows, pictures) if x is None]
    x = torch.stack([pictures[i] for i in read]) if read else torch.zeros(0, 3, side, side)
    y = torch.tensor([rows[i].labels for i in read], dtype=torch.long).view(len(read), len(rows[0].labels))
    return x, y, unread


def changed(x: Tensor, jitter: bool, rng: np.random.Generator) -> Tensor:
    """Each of x (B, 3, H, W) in [-1, 1] mirrored or not, turned and, with `jitter`, of other light, contrast and saturation."""
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


def new_classifier(found: Photographs, config: MobileNetConfig, init: str | None, seed: int) -> Classifier:
    """A classifier of the set's attributes, whose layers but the last start as those of the file `init`."""
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
    return Classifier(network, found.attributes)


def train(classifier: Classifier, found: Photographs, settings: Settings, device: torch.device) -> list[str]:
    """AdamW on the sum of the attributes' cross-entropies, rate falling along a cosine -> files that couldn't be read.

    Raises UserError where nothing can be learnt.
    """
    rows, names = found.parts["train"], list(found.attributes)
    side, jitter = classifier.network.config.input_size, not NO_JITTER & set(names)
    per_epoch = math.ceil(len(rows) / settings.batch)
    total, unread, updates = settings.epochs * per_epoch, set(), 0
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=settings.lr)
    classifier.to(device).train()
    with Progress(total, "training") as progress, ThreadPoolExecutor(THREADS) as pool:
        for step in range(total):
            epoch, place = divmod(step, per_epoch)
            order = np.random.default_rng((settings.seed, ORDER, epoch)).permutation(len(rows))
            chosen = order[place * settings.batch : (place + 1) * settings.batch]
            x, y, failed = load_batch([rows[i] for i in chosen], side, pool)
            unread.update(failed)
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
    """BatchNorm's averages anew, of pictures as they are: the running ones lag behind in a short run."""
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
    for norm, m in zip(norms, momentum):
        norm.momentum = m


@torch.no_grad()
def answers(
    classifier: Classifier, rows: list[Row], batch: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Classes (n, attributes), as labelled and as answered, of the n pictures that can be read; and the other files."""
    classifier.to(device).eval()
    side, labels, said, unread = classifier.network.config.input_size, [], [], []
    with Progress(math.ceil(len(rows) / batch), "testing") as progress, ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(rows), batch):
            x, y, failed = load_batch(rows[start : start + batch], side, pool)
            unread += failed
            if len(x):
                labels.append(y)
                said.append(torch.stack([z.argmax(1).cpu() for z in classifier(x.to(device)).values()], 1))
            progress.step()
    empty = [torch.zeros(0, len(classifier.attributes), dtype=torch.long)]
    return torch.cat(labels or empty).numpy(), torch.cat(said or empty).numpy(), unread


def confusions(labels: np.ndarray, said: np.ndarray, attributes: dict[str, tuple[str, ...]]) -> dict:
    """Attribute -> (K, K) counts, the row being the label and the column the answer."""
    counts = {name: np.zeros((len(classes),) * 2, int) for name, classes in attributes.items()}
    for a, matrix in enumerate(counts.values()):
        np.add.at(matrix, (labels[:, a], said[:, a]), 1)
    return counts


def report(labels: np.ndarray, said: np.ndarray, attributes: dict[str, tuple[str, ...]]) -> dict:
    """Each attribute's accuracy: in all, by its own class, within the classes of each other one; and its confusions."""
    right, found = labels == said, {}

    def share(of):
        return float(of.mean()) if len(of) else None

    for a, (name, counts) in enumerate(confusions(labels, said, attributes).items()):
        by = {
            other: {c: share(right[labels[:, b] == k, a]) for k, c in enumerate(classes)}
            for b, (other, classes) in enumerate(attributes.items())
        }
        found[name] = {
            "images": len(labels),
            "accuracy": share(right[:, a]),
            "of_class": by.pop(name),
            "within": by,
            "confusion": counts.tolist(),
        }
    return found


def confusion_figure(counts: dict[str, np.ndarray], attributes: dict[str, tuple[str, ...]]) -> Image.Image:
    """One matrix an attribute, below each other: rows are labels, columns answers, in per cent of the row."""
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


def options_of(argv):
    """The command line's options. Raises UserError."""
    parser = cli.Parser(prog="python -m fairref.train_classifier", description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, choices=("celeba", "fairface"), help="data set")
    parser.add_argument("--root", required=True, help="folder that it was unpacked to")
    parser.add_argument("--attr", required=True, help="gender, race or age; several joined by +")
    parser.add_argument("--out", required=True, type=cli.path, help="folder of the classifier, new or empty")
    parser.add_argument("--kind", default="large", choices=("large", "small"), help="of MobileNetV3")
    parser.add_argument(
        "--width", type=cli.positive, default=1.0, help="multiplies the channels of MobileNetV3"
    )
    parser.add_argument("--input-size", type=cli.whole(32, 4096), default=224, help="pixels a side")
    parser.add_argument(
        "--init", help="torchvision's weights as .safetensors, to start from; None: from scratch"
    )
    parser.add_argument("--epochs", type=cli.whole(1), default=Settings.epochs, help="times through the data")
    parser.add_argument("--batch", type=cli.whole(2), default=Settings.batch, help="images a step")
    parser.add_argument("--lr", type=cli.positive, default=Settings.lr, help="AdamW's rate at the start")
    parser.add_argument(
        "--seed", type=cli.whole(0), default=Settings.seed, help="of order, changes and weights"
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse bad rows and images instead of skipping them"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: cuda where there is one"
    )
    return parser.parse_args(argv)


def short_name(file: Path) -> str:
    """What a report calls a picture: with its folder, since FairFace gives its parts' pictures the same names."""
    return f"{file.parent.name}/{file.name}"


def unreadable(found: Photographs, side: int) -> list[str]:
    """The names of all pictures that can't be read."""
    rows = [row for part in found.parts.values() for row in part]
    with ThreadPoolExecutor(THREADS) as pool:
        return [
            short_name(row.file)
            for row, x in zip(rows, pool.map(lambda r: load(r.file, side), rows))
            if x is None
        ]


def main(argv=None) -> int:
    options = options_of(argv)
    device, names = cli.device(options.device), options.attr.split("+")
    if options.out.exists() and not (options.out.is_dir() and not any(options.out.iterdir())):
        raise UserError(f"{options.out}: is there already; give a new or an empty folder as --out.")
    found = read_photographs(options.data, options.root, names, options.strict)
    if found.bad:
        print(f"left out {describe_bad(found.bad)}", file=sys.stderr)
    logits = sum(map(len, found.attributes.values()))
    config = MobileNetConfig(options.kind, options.width, logits, options.input_size)
    if options.strict and (broken := unreadable(found, config.input_size)):
        raise UserError(f"{options.root}: {_unread(broken)}; mend them or leave --strict out.")
    classifier = new_classifier(found, config, options.init, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)  # better refused now than after the training
    settings = Settings(options.epochs, options.batch, options.lr, options.seed)
    unread = train(classifier, found, settings, device)
    part = next((p for p in ("test", "validation") if found.parts.get(p)), "train")
    labels, said, more = answers(classifier, found.parts[part], options.batch, device)
    unread = sorted({*unread, *more})
    if unread:
        print(_unread(unread), file=sys.stderr)
    save_classifier(classifier.cpu().eval(), options.out)
    measured = report(labels, said, found.attributes)
    summary = {"part": part, "bad_rows": len(found.bad), "unreadable": len(unread)}
    write_json(options.out / "report.json", {**summary, **measured})
    counts = confusions(labels, said, found.attributes)
    confusion_figure(counts, found.attributes).save(options.out / "confusion.png")
    for name, values in measured.items():
        print(f"{name}, {part}: {json.dumps({k: v for k, v in values.items() if k != 'confusion'})}")
    print(options.out)
    return 0


def _unread(names):
    return f"{len(names)} image{'s' * (len(names) > 1)} can't be read, such as {names[0]}"


if __name__ == "__main__":
    sys.exit(cli.run(main))
