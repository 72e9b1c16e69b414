"""How near each gradient of the sampler comes to the true one: its direction, its noise, and loss gained a minute.

    python tests/benchmarks/gradient_truth.py start RUN/checkpoint-000075.safetensors RUN/adapter_raw.safetensors
        [--out runs/gradient_truth] [--report docs/results/gradient_truth.json] [--figure docs/figures]

A point is where the adapter stands: `start` is a fresh LoRA, whose up is 0, so that the loss has no gradient in down;
a file is an adapter or a checkpoint. A batch is what an iteration of training draws: a prompt, S, and the noise of N
images, and its targets q are those of its own images, held fixed. The region rule of L_img is left out (lambda_3 =
1): it changes the gradient and not the loss. Each stage has batches of its own:

truth     the mean of `exact` over --batches batches, its standard error, and the cosine of its two halves.
modes     each mode on --compared batches: cosine with the truth and with `exact` of the same batch, variance over
          batches, mean cosine between two batches, and CPU seconds of an iteration.
slopes    the loss's own fall along each mode's mean direction, on --tested batches: central differences over a
          distance of about one iteration of training. They need no truth that is free of noise.
confirm   derivatives along the truth and 5 random directions, on --confirmed batches: central differences over a
          small distance, in float64. All that training detaches (q, faces, the originals) stays that of the point.

What is done is kept in --out, batch by batch, so the script can be stopped and started again at any time. One thread,
for CPU seconds that mean something. At the default counts, on emoji, a point takes about an hour of one core.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent))
from measure import FIRST_RECIPE, bundle_of, machine, setup_of, table, write

from fairref.bundle.loading import Bundle, load_bundle
from fairref.diffusion.gradient import gradient_mode
from fairref.files import weights
from fairref.files.paths import read_json, write_json
from fairref.generation.rollout import decode, embed, guided, rollout
from fairref.reporting import charts
from fairref.reporting.figures import Figure
from fairref.training.loop import new_state
from fairref.training.setup import Setup, Task
from fairref.training.step import (
    STOP,
    Rollout,
    draw_pair,
    draw_task,
    draws,
    sample_path,
    sampling_gradient,
    term_weights,
    transport_targets,
)
from fairref.training.terms import ImagePair, View, image_gradient, loss_of

EXACT = "exact"
MODES = (EXACT, "couple:0.5", "none", "paper", "solver", "last:1", "random:6", "bernoulli", "drtune:2")
SEED = 1000  # of the batches: not that of a run whose adapters are looked at
DIRECTIONS = 5
# lengths of central differences. Training moves the adapter by .07 to .8 in an iteration
NEAR, FAR = 1e-4, 0.1


@dataclass
class Moments:
    """What is kept of the gradients (P,) of many batches, in the order of the batches."""

    halves: Tensor  # (2, P) float64: the sums over every second batch
    units: Tensor  # (P,) the sum of the gradients scaled to length 1
    squares: list[float] = field(default_factory=list)
    products: list[float] = field(default_factory=list)  # with the truth
    alike: list[float] = field(default_factory=list)  # cosines with `exact` of the same batch
    seconds: list[float] = field(default_factory=list)  # CPU seconds of the iteration

    @property
    def count(self) -> int:
        return len(self.squares)

    @property
    def mean(self) -> Tensor:
        return self.halves.sum(0) / self.count

    def add(
        self, gradient: Tensor, seconds: float, truth: Tensor | None = None, exact: Tensor | None = None
    ) -> None:
        """One more batch's."""
        gradient = gradient.double()
        self.halves[self.count % 2] += gradient
        self.units += gradient / gradient.norm()
        self.squares.append(float(gradient @ gradient))
        self.seconds.append(seconds)
        if truth is not None:
            self.products.append(float(gradient @ truth))
            self.alike.append(cosine(gradient, exact.double()))

    def square_of_mean(self) -> float:
        """|E g|^2 without bias: the mean of <g_a, g_b> over pairs of different batches. May be negative."""
        n = self.count
        return (n**2 * float(self.mean @ self.mean) - sum(self.squares)) / (n * (n - 1))

    def variance(self) -> float:
        """The trace of one batch's covariance, without bias."""
        n = self.count
        return (sum(self.squares) - n * float(self.mean @ self.mean)) / (n - 1)

    def length(self) -> float | None:
        """|E g|; None below the standard error of the mean, where nothing can be said of its direction."""
        square = self.square_of_mean()
        return float(np.sqrt(square)) if square > self.variance() / self.count else None

    def agreement(self) -> float:
        """The mean cosine between two batches' gradients."""
        n = self.count
        return (float(self.units @ self.units) - n) / (n * (n - 1))


LISTS = ("squares", "products", "alike", "seconds")


def save(path: Path, found: dict[str, Moments]) -> None:
    """All moments of a stage in one file, which is written whole or not at all."""
    tensors = {f"{name}/{key}": getattr(m, key) for name, m in found.items() for key in ("halves", "units")}
    weights.write(path, tensors, {name: {key: getattr(m, key) for key in LISTS} for name, m in found.items()})


def load(path: Path, names: tuple[str, ...], size: int) -> dict[str, Moments]:
    """Those of a file, or none yet."""
    if not path.exists():
        return {n: Moments(*(torch.zeros(*s, size, dtype=torch.float64) for s in ((2,), ()))) for n in names}
    tensors, info = weights.read(path), weights.read_info(path)
    return {n: Moments(tensors[f"{n}/halves"], tensors[f"{n}/units"], **info[n]) for n in names}


@dataclass(frozen=True)
class Point:
    """Where the adapter stands."""

    name: str
    setup: Setup
    model: Bundle
    parameters: list[torch.nn.Parameter]

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters)

    @torch.no_grad()
    def move(self, way: Tensor, h: float) -> None:
        """The parameters, h further along `way` (P,)."""
        for p, part in zip(self.parameters, way.split([p.numel() for p in self.parameters]), strict=True):
            p += h * part.view_as(p)


def point_of(name: str, setup: Setup) -> Point:
    """The point "start", or that of an adapter's or a checkpoint's file."""
    model, state = new_state(setup)
    if name != "start":
        tensors = {key.removeprefix("adapter."): x for key, x in weights.read(name).items()}
        with torch.no_grad():
            for key, p in state.adapter.named_parameters():
                p.copy_(tensors[key])
    return Point(name, setup, model, list(state.adapter.parameters()))


@dataclass(frozen=True)
class Batch:
    """What one iteration draws and what it is told; all of it stays when the adapter moves."""

    task: Task
    drawn: Rollout
    pair: ImagePair
    q: dict[str, Tensor]


def of_mode(setup: Setup, mode: str) -> Setup:
    """The setup with another gradient."""
    return replace(setup, recipe=replace(setup.recipe, gradient=mode))


def batch_of(point: Point, i: int, mode: str = EXACT) -> Batch:
    """Iteration i's, of a mode's run: that of drtune ends early."""
    setup = of_mode(point.setup, mode)
    task = draw_task(setup, i)
    text = embed(point.model, task.prompt)
    drawn = sample_path(setup, point.model, task, text, i)
    pair = draw_pair(setup, point.model, task, text, drawn)
    return Batch(task, drawn, pair, transport_targets(setup, task, pair, i)[0])


def gradient_of(point: Point, batch: Batch, i: int, mode: str = EXACT) -> Tensor:
    """dL/dparameters (P,) of iteration i, as training finds it."""
    text, setup = embed(point.model, batch.task.prompt), of_mode(point.setup, mode)
    drawn = batch.drawn._replace(w=term_weights(setup, batch.drawn.table, i))
    g, _ = image_gradient(setup, batch.task, batch.pair, batch.q)
    parts = sampling_gradient(setup, drawn, g, text, point.parameters)
    return torch.cat([part.flatten() for part in parts])


@torch.no_grad()
def held_loss(point: Point, batch: Batch) -> float:
    """L of the batch's noise where the parameters are now, with all that training detaches as it was."""
    text = embed(point.model, batch.task.prompt)
    model = guided(point.model, text, batch.task.guidance)
    z_0 = rollout(model, batch.drawn.table, batch.drawn.path[0].z)[-1].z
    pair = replace(batch.pair, z_0=z_0, x=decode(point.model, z_0))
    return float(loss_of(View(point.setup, batch.task, pair.x, pair, batch.q))[0])


def slope(point: Point, batch: Batch, way: Tensor, h: float) -> float:
    """The derivative of a batch's loss along `way` (P,): a central difference. The point is left where it was."""
    kept = [p.detach().clone() for p in point.parameters]
    losses = []
    for distance in (h, -h):
        point.move(way, distance)
        losses.append(held_loss(point, batch))
        for p, before in zip(point.parameters, kept, strict=True):
            p.data.copy_(before)
    return (losses[0] - losses[1]) / (2 * h)


def timed(f: Callable[..., Batch | Tensor], *args: object) -> tuple[Batch | Tensor, float]:
    """What f gives, and the CPU seconds that it took."""
    began = time.process_time()
    return f(*args), time.process_time() - began


def find_truth(point: Point, folder: Path, batches: int) -> Moments:
    """The mean of `exact` over batches 0, 1, ..."""
    path = folder / "truth.safetensors"
    found = load(path, (EXACT,), point.size)
    while (i := found[EXACT].count) < batches:
        batch, common = timed(batch_of, point, i)
        gradient, own = timed(gradient_of, point, batch, i)
        found[EXACT].add(gradient, common + own)
        save(path, found)
        print(f"{folder.name}: truth, batch {i + 1} of {batches}, {common + own:.1f} CPU s", flush=True)
    return found[EXACT]


def compare(
    point: Point, folder: Path, truth: Moments, modes: tuple[str, ...], compared: int
) -> dict[str, Moments]:
    """Each mode on the batches behind those of the truth, so that their noise is not the truth's."""
    path = folder / f"modes-after-{truth.count}.safetensors"
    found = load(path, modes, point.size)
    while (done := found[EXACT].count) < compared:
        i = truth.count + done
        shared, common = timed(batch_of, point, i)
        gradients = {}
        for mode in modes:
            batch, seconds = shared, common
            if gradient_mode(mode).stop(batch.task.S, draws(SEED, STOP, i)) is not None:
                batch, seconds = timed(batch_of, point, i, mode)
            gradients[mode], own = timed(gradient_of, point, batch, i, mode)
            found[mode].add(gradients[mode], seconds + own, truth.mean, gradients[EXACT])
        save(path, found)
        print(f"{folder.name}: modes, batch {done + 1} of {compared}", flush=True)
    return found


def find_slopes(
    point: Point, folder: Path, found: dict[str, Moments], first: int, tested: int
) -> dict[str, list[float]]:
    """The loss's fall along each mode's mean unit gradient, at batches `first`, ... -> its slopes, one a batch."""
    path = folder / f"slopes-from-{first}.json"
    slopes = read_json(path) if path.exists() else {mode: [] for mode in found}
    ways = {mode: (moments.units / moments.units.norm()).float() for mode, moments in found.items()}
    while (done := len(slopes[EXACT])) < tested:
        batch = batch_of(point, first + done)
        for mode, way in ways.items():
            slopes[mode].append(slope(point, batch, way, FAR))
        write_json(path, slopes)
        print(f"{folder.name}: slopes, batch {done + 1} of {tested}", flush=True)
    return slopes


def confirm(point: Point, truth: Tensor, batches: int) -> list[dict]:
    """Derivatives of some batches' mean loss along the truth (P,) and random directions, of length 1: by `exact`, and
    by differences. The point is one in float64."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(DIRECTIONS, len(truth), dtype=torch.float64, generator=generator)
    ways = {"the truth": truth, **{f"random {n + 1}": way for n, way in enumerate(random)}}
    ways = {name: way / way.norm() for name, way in ways.items()}
    rows = {name: {"direction": name, EXACT: 0.0, "difference": 0.0} for name in ways}
    for i in range(batches):
        batch = batch_of(point, i)
        gradient = gradient_of(point, batch, i)
        for name, way in ways.items():
            rows[name][EXACT] += float(gradient @ way) / batches
            rows[name]["difference"] += slope(point, batch, way, NEAR) / batches
        print(f"{point.name}: confirm, batch {i + 1} of {batches}", flush=True)
    return list(rows.values())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def error_of_mean(values: np.ndarray) -> float:
    """The standard error of a mean over batches. Neighbours, whose prompts lean opposite ways, count as one."""
    pairs = values[: len(values) // 2 * 2].reshape(-1, 2).mean(1)
    return float(pairs.std(ddof=1) / np.sqrt(len(pairs)))


def of_truth(truth: Moments) -> dict:
    """The truth's length, its standard error, and how much of it a few batches are."""
    squares = np.sort(truth.squares)[::-1]
    return {
        "batches": truth.count,
        "length": truth.length(),
        "standard_error": float(np.sqrt(truth.variance() / truth.count)),
        "cosine_of_halves": cosine(*truth.halves),
        "median_length": float(np.sqrt(np.median(squares))),
        "largest_tenth": float(
            squares[: -(-len(squares) // 10)].sum() / squares.sum()
        ),  # share of the sum of squares
    }


def of_gradients(moments: Moments, truth: Moments, slopes: np.ndarray) -> dict:
    """A mode's row. A cosine with a mean that drowns in noise is None."""
    length, own, n = truth.length(), moments.length(), moments.count
    minutes = float(np.median(moments.seconds)) / 60
    share = (
        float(moments.units.norm()) / n
    )  # the slopes are along the mean of unit gradients, made as long as one
    single = np.array(moments.products) / np.sqrt(
        moments.squares
    )  # slope of the truth along one batch's gradient
    return {
        "batches": n,
        "cosine_of_mean": float(np.mean(moments.products)) / (length * own) if length and own else None,
        "cosine_of_one": float(single.mean()) / length if length else None,
        "cosine_with_exact": float(np.mean(moments.alike)),
        "cosine_error": float(np.std(moments.alike, ddof=1) / np.sqrt(n)),
        "agreement": moments.agreement(),
        "variance": moments.variance() / own**2 if own else None,
        "seconds": 60 * minutes,
        "slope": float(slopes.mean()),
        "slope_error": error_of_mean(slopes),
        # what a step of length 1 along one batch's gradient gains, a CPU minute; no step, but its rate
        "gain": share * float(slopes.mean()) / minutes,
        "gain_error": share * error_of_mean(slopes) / minutes,
    }


def shown(name: str, report: dict) -> str:
    """A point's numbers as text and a table."""
    t = report["truth"]
    length = f"the length {t['length']:.3g}" if t["length"] else "a length below its noise"
    lines = [
        f"{name}: the mean of {t['batches']} exact gradients has {length} and the standard"
        f" error {t['standard_error']:.3g}; the cosine of its halves is {t['cosine_of_halves']:.3f}. The median batch"
        f" has the length {t['median_length']:.3g}, and a tenth of them hold {t['largest_tenth']:.0%} of all squares."
    ]
    for row in report["confirm"]:
        lines.append(f"  along {row['direction']}: {row[EXACT]:.6g}, by differences {row['difference']:.6g}")
    columns = {
        "cosine_of_mean": "cosine of the mean",
        "cosine_of_one": "of one batch",
        "cosine_with_exact": "cosine with `exact`",
        "agreement": "of two batches",
        "seconds": "s",
        "slope": "slope by differences",
        "gain": "gain a minute",
    }
    if not t["length"]:  # then nothing is known of its direction
        del columns["cosine_of_mean"], columns["cosine_of_one"]
    errors = {"cosine_with_exact": "cosine_error", "slope": "slope_error", "gain": "gain_error"}

    def cell(row: dict, key: str) -> object:
        return f"{row[key]:.3f} ± {row[errors[key]]:.3f}" if key in errors else row[key]

    rows = [[f"`{mode}`", *(cell(row, key) for key in columns)] for mode, row in report["modes"].items()]
    header = ["`--gradient`", *columns.values()]
    return "\n".join([*lines, "", table(header, rows), ""])


def study(name: str, make: Callable[[torch.dtype], Setup], folder: Path, counts: argparse.Namespace) -> dict:
    """All stages of a point. `make`: number format -> setup."""
    folder.mkdir(parents=True, exist_ok=True)
    point = point_of(name, make(torch.float32))
    truth = find_truth(point, folder, counts.batches)
    found = compare(point, folder, truth, counts.modes, counts.compared)
    slopes = find_slopes(point, folder, found, counts.batches + counts.compared, counts.tested)
    kept = folder / "confirm.json"
    if not kept.exists():
        at_64 = point_of(name, make(torch.float64))
        write_json(kept, {"directions": confirm(at_64, truth.mean, counts.confirmed)})
    rows = {mode: of_gradients(m, truth, np.array(slopes[mode])) for mode, m in found.items()}
    return {"truth": of_truth(truth), "confirm": read_json(kept)["directions"], "modes": rows}


def figure(points: dict[str, dict]) -> Figure:
    """Of each mode at each point: the mean cosine with `exact` of the same batch. All else is in the table only."""
    rows, groups = [], {}
    for name, report in points.items():
        for mode, row in report["modes"].items():
            value, error = row["cosine_with_exact"], 1.96 * row["cosine_error"]
            groups.setdefault(mode, {})[name] = (value, value - error, value + error)
            keys = (
                "cosine_with_exact",
                "cosine_error",
                "agreement",
                "slope",
                "slope_error",
                "seconds",
                "gain",
                "gain_error",
            )
            rows.append({"point": name, "mode": mode, **{key: round(row[key], 5) for key in keys}})
    about = "cosine with the exact gradient of the same batch, mean and 95 % interval"
    return Figure(
        "gradient_truth", charts.bars(groups, about, "How near each gradient is to the exact one"), rows
    )


def label(name: str) -> str:
    """A point's folder: "start", or RUN-FILE."""
    path = Path(name)
    return name if name == "start" else f"{path.parent.name}-{path.stem}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("points", nargs="+", help='"start", or the file of an adapter or a checkpoint')
    parser.add_argument("--weights", default="emoji", help="bundle")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gradient_truth"), help="folder of what is done"
    )
    parser.add_argument("--report", type=Path, help="JSON file of the numbers")
    parser.add_argument("--figure", type=Path, help="folder for the figure and its numbers")
    parser.add_argument("--batches", type=int, default=200, help="of the truth; at least 2, as all counts")
    parser.add_argument("--compared", type=int, default=20, help="batches of each mode")
    parser.add_argument("--tested", type=int, default=20, help="batches of the slopes; at least 4")
    parser.add_argument("--confirmed", type=int, default=2, help="batches of the differences in float64")
    parser.add_argument("--modes", nargs="+", default=MODES, help=f"{EXACT} and others")
    parser.add_argument("--images", type=int, help="N (default: the bundle's)")
    parser.add_argument("--steps", help="S (default: 6:7)")
    args = parser.parse_args(argv)
    args.modes = tuple(dict.fromkeys([EXACT, *args.modes]))
    torch.set_num_threads(1)
    options = {"batch": args.images, "steps": args.steps}
    options = {name: value for name, value in options.items() if value}

    def make(dtype: torch.dtype) -> Setup:
        bundle = bundle_of(args.weights) if dtype == torch.float32 else load_bundle(args.weights, dtype=dtype)
        return setup_of(bundle, seed=SEED, lambda_3=1.0, **FIRST_RECIPE | options)

    points = {label(name): study(name, make, args.out / label(name), args) for name in args.points}
    write(args.report, {"machine": machine(), "seed": SEED, "distance": FAR, "points": points})
    if args.figure:
        figure(points).write(args.figure)
    print(*(shown(name, report) for name, report in points.items()), sep="\n")


if __name__ == "__main__":
    main()
