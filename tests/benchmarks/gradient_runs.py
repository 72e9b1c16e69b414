"""Bias against minutes: the same finetuning of the small bundle by each gradient, several seeds of some.

    python tests/benchmarks/gradient_runs.py [--list] [--only MODE-SEED ...] [--folder runs/gradients]

Each run is a call of train.py with one thread, whose validation bias is the curve. Its minutes are those that the
method needs and not those that it took: iterations times the seconds of an iteration, which is measured on the same
iterations for all modes, taking turns, in CPU seconds of one thread. What is there is not made again and a run that
was stopped goes on, so this can be stopped and started at any time. A run takes about 25 minutes of a core, all of
them seven hours. Then docs/results/gradient_runs.json, docs/figures/minutes.svg and its table are written, with what
is there.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent))
from measure import ROOT, adapted, bundle_of, machine, setup_of, table, write
from results import call

from fairref.files.paths import read_json, write_json
from fairref.generation.adapters import FILE
from fairref.reporting import charts
from fairref.reporting.figures import Figure, by_curve
from fairref.training.checkpoints import METRICS, SETTINGS, read_settings
from fairref.training.step import iteration_gradient

SEEDS = {"paper": 3, "exact": 3, "last:1": 3, "couple:0.5": 3}  # in how many; one is enough for the others
SEEDS |= dict.fromkeys(("none", "solver", "random:6", "bernoulli", "drtune:2"), 1)
ITERATIONS, EVERY = 150, 15
OPTIONS = f"--attr gender --iterations {ITERATIONS} --validate-every {EVERY} --grid-every 0 --evaluate none"
OPTIONS += f" --checkpoint-every {EVERY} --keep 10"  # gradient_truth.py looks at the adapters on the way


def names() -> list[str]:
    """MODE-SEED of all runs: a seed of several modes, before the next seed of them."""
    return [f"{mode}-{seed}" for seed in range(max(SEEDS.values())) for mode, n in SEEDS.items() if seed < n]


def place(folder: Path, name: str) -> Path:
    """A run's own folder."""
    return folder / name.replace(":", "_")


def finetune(name: str, folder: Path) -> bool:
    """Makes a run, or what is missing of it -> whether it is whole."""
    if (folder / FILE).exists():
        return True
    if (folder / SETTINGS).exists():
        return call("train.py", "--resume", folder) == 0
    mode, seed = name.rsplit("-", 1)
    return call("train.py", *OPTIONS.split(), "--gradient", mode, "--seed", seed, "--out", folder) == 0


def seconds(path: Path, iterations: int) -> dict[str, list[float]]:
    """Mode -> CPU seconds of one thread of iterations 0, 1, ..., kept in a file as they come."""
    found = read_json(path) if path.exists() else {mode: [] for mode in SEEDS}
    setups = {mode: setup_of(bundle_of("emoji"), gradient=mode) for mode in SEEDS}
    models = {mode: adapted(setup) for mode, setup in setups.items()}
    while (i := len(found["drtune:2"])) < iterations:
        for mode, setup in setups.items():
            model, state = models[mode]
            for took in range(2 if i == 0 else 1):  # the first is a warm-up
                began = time.process_time()
                iteration_gradient(setup, model, list(state.adapter.parameters()), i)
                took = time.process_time() - began
            found[mode].append(round(took, 3))
        write_json(path, found)
        print(f"seconds of an iteration: {i + 1} of {iterations}", flush=True)
    return found


def course(folder: Path, key: str) -> list[float]:
    """What the validations after each EVERY iterations of a whole run found: "bias", or "clip_i"."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    return [line["validation"][key] for line in lines if line.get("validation")]


def clipped(folder: Path) -> float:
    """The share of a run's iterations whose gradient was shortened."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    clip = read_settings(folder)["recipe"]["clip"]
    return float(np.mean([line["norm"] > clip for line in lines]))


def report_of(folder: Path, found: dict[str, list[float]]) -> dict:
    """Mode -> {"seconds": of an iteration, "bias" and "clip_i": seed -> its course, "clipped": seed -> share}, of the
    whole runs."""
    report = {}
    for name in names():
        mode, seed = name.rsplit("-", 1)
        if (place(folder, name) / FILE).exists():
            empty = {"bias": {}, "clip_i": {}, "clipped": {}}
            row, run = (
                report.setdefault(mode, {"seconds": float(np.mean(found[mode])), **empty}),
                place(folder, name),
            )
            for key in ("bias", "clip_i"):
                row[key][seed] = course(run, key)
            row["clipped"][seed] = clipped(run)
    return report


def figure(report: dict) -> Figure:
    """Bias by minutes: mean, least and most of the seeds, a curve for each mode."""
    rows = []
    for mode, of in report.items():
        values = np.array(list(of["bias"].values()))  # (seeds, validations)
        curve = f"{mode} ({len(values)} seeds)" if len(values) > 1 else mode
        for n, column in enumerate(values.T, 1):
            minutes = round(n * EVERY * of["seconds"] / 60, 3)
            spread = {"mean": column.mean(), "low": column.min(), "high": column.max()}
            at = {"curve": curve, "minutes": minutes, "iteration": n * EVERY}
            rows.append(at | {key: round(float(value), 4) for key, value in spread.items()})
    about = "bias of validation prompts, mean and range of the seeds"
    svg = charts.curves(
        by_curve(rows, "minutes"), "minutes of one core", about, "Bias against minutes, by gradient"
    )
    return Figure("minutes", svg, rows)


def lines_of(report: dict) -> str:
    """The table: seconds of an iteration, and each seed's bias and CLIP-I at the middle and the last validation."""
    rows = []
    for mode, of in report.items():
        values = [np.array(list(of[key].values())) for key in ("bias", "clip_i")]  # each (seeds, validations)
        places = [(v, k) for k in (values[0].shape[1] // 2 - 1, -1) for v in values]
        share = f"{np.mean(list(of['clipped'].values())):.0%}"
        rows.append(
            [f"`{mode}`", of["seconds"], share, *(" ".join(short(x) for x in v[:, k]) for v, k in places)]
        )
    at = [f"{what} after {n}" for n in (ITERATIONS // 2, ITERATIONS) for what in ("bias", "CLIP-I")]
    return table(["`--gradient`", "s an iteration", "shortened", *at], rows)


def short(x: float) -> str:
    """Two digits, without the zero before the point."""
    return f"{x:.2f}".removeprefix("0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="the runs, and which are whole; makes nothing")
    parser.add_argument("--only", nargs="+", metavar="MODE-SEED", choices=names(), default=names())
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "gradients")
    parser.add_argument(
        "--timed", type=int, default=12, help="iterations of each mode that are timed; 0: no report"
    )
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.list:
        for name in names():
            print(f"{name:14} {'whole' if (place(folder, name) / FILE).exists() else 'to do'}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    failed = [name for name in options.only if not finetune(name, place(folder, name))]
    if options.timed:
        report = report_of(folder, seconds(folder / "seconds.json", options.timed))
        write(ROOT / "docs" / "results" / "gradient_runs.json", {"machine": machine(), "modes": report})
        figure(report).write(ROOT / "docs" / "figures")
        print(lines_of(report))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
