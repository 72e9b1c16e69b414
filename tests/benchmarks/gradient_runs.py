"""Bias against minutes: the same finetuning of the small bundle by each gradient, several seeds of some.

    python tests/benchmarks/gradient_runs.py [--list] [--only MODE-SEED ...] [--folder runs/gradients]

Each run is a call of train.py with one thread, whose validation bias is the curve. Its minutes are those that the
method needs and not those that it took: iterations times the seconds of an iteration, which is measured on the same
iterations for all modes, taking turns, in CPU seconds of one thread. A run that docs/results/gradient_runs.json tells
of is not made again and one that was stopped goes on, so this can be stopped and started at any time, and by several
processes with runs of their own. A run takes about 12 minutes of a core. With --timed, docs/figures/minutes.svg and the
table are written, with what is there.
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
from measure import FIRST_OPTIONS, FIRST_RECIPE, ROOT, adapted, bundle_of, machine, setup_of, table, write
from results import call

from fairref.files.paths import read_json
from fairref.generation.adapters import FILE
from fairref.reporting import charts
from fairref.reporting.figures import Figure, by_curve
from fairref.training.checkpoints import METRICS, SETTINGS, read_settings
from fairref.training.step import iteration_gradient

SEEDS = {"paper": 3, "exact": 3, "last:1": 3, "couple:0.5": 3}  # in how many; one is enough for the others
SEEDS |= dict.fromkeys(("none", "solver", "random:6", "bernoulli", "drtune:2"), 1)
ITERATIONS, EVERY = 100, 20
OPTIONS = f"--attr gender {FIRST_OPTIONS} --iterations {ITERATIONS} --validate-every {EVERY} --grid-every 0"
OPTIONS += f" --evaluate none --checkpoint-every {EVERY} --keep 10"  # gradient_truth.py looks at them


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


def time_iterations(iterations: int) -> dict[str, float]:
    """Mode -> mean CPU seconds of one thread of iterations 0, 1, ..."""
    took = {mode: [] for mode in SEEDS}
    setups = {mode: setup_of(bundle_of("emoji"), **FIRST_RECIPE, gradient=mode) for mode in SEEDS}
    models = {mode: adapted(setup) for mode, setup in setups.items()}
    for i in range(-1, iterations):  # the first is a warm-up
        for mode, setup in setups.items():
            model, state = models[mode]
            began = time.process_time()
            iteration_gradient(setup, model, list(state.adapter.parameters()), max(i, 0))
            took[mode].append(time.process_time() - began)
        print(f"seconds of an iteration: {i + 1} of {iterations}", flush=True)
    return {mode: round(float(np.mean(values[1:])), 3) for mode, values in took.items()}


def course(folder: Path, key: str) -> list[float]:
    """What the validations after each EVERY iterations of a whole run found: "bias", or "clip_i"."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    return [line["validation"][key] for line in lines if line.get("validation")]


def clipped(folder: Path) -> float:
    """The share of a run's iterations whose gradient was shortened."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    clip = read_settings(folder)["recipe"]["clip"]
    return float(np.mean([line["norm"] > clip for line in lines]))


def of_run(folder: Path) -> dict:
    """What the report says of a whole run: "bias" and "clip_i", its courses, and "clipped"."""
    return {"bias": course(folder, "bias"), "clip_i": course(folder, "clip_i"), "clipped": clipped(folder)}


def of_modes(found: dict) -> dict:
    """Mode -> {"seconds": of an iteration, "bias", "clip_i", "clipped": a list of what its runs have}."""
    modes = {}
    for name in names():
        if of := found["runs"].get(name):
            mode = name.rsplit("-", 1)[0]
            row = modes.setdefault(mode, {"seconds": found["seconds"][mode], **{key: [] for key in of}})
            for key, value in of.items():
                row[key].append(value)
    return modes


def figure(modes: dict) -> Figure:
    """Bias by minutes: mean, least and most of the seeds, a curve for each mode."""
    rows = []
    for mode, of in modes.items():
        values = np.array(of["bias"])  # (seeds, validations)
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


def lines_of(modes: dict) -> str:
    """The table: seconds of an iteration, and each seed's bias and CLIP-I at the middle and the last validation."""
    count = len(next(iter(modes.values()))["bias"][0])
    rows, ends = [], (count // 2, count)
    for mode, of in modes.items():
        values = [np.array(of[key]) for key in ("bias", "clip_i")]  # each (seeds, validations)
        places = [(v, n) for n in ends for v in values]
        share = f"{np.mean(of['clipped']):.0%}"
        rows.append(
            [f"`{mode}`", of["seconds"], share, *(" ".join(short(x) for x in v[:, n - 1]) for v, n in places)]
        )
    at = [f"{what} after {n * EVERY}" for n in ends for what in ("bias", "CLIP-I")]
    return table(["`--gradient`", "s an iteration", "shortened", *at], rows)


def short(x: float) -> str:
    """Two digits, without the zero before the point."""
    return f"{x:.2f}".removeprefix("0")


def known(report: Path) -> dict:
    """What a report has so far."""
    return read_json(report) if report.exists() else {"machine": machine(), "seconds": {}, "runs": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="the runs, and which are whole; makes nothing")
    parser.add_argument("--only", nargs="*", metavar="MODE-SEED", choices=names(), default=names())
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "gradients")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "results" / "gradient_runs.json")
    parser.add_argument(
        "--timed", type=int, default=0, help="iterations of each mode to time, on a quiet machine"
    )
    options = parser.parse_args()
    folder, failed = options.folder.resolve(), []
    if options.list:
        for name in names():
            print(f"{name:14} {'whole' if name in known(options.report)['runs'] else 'to do'}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in options.only:
        if name in known(options.report)["runs"]:
            continue
        if not finetune(name, place(folder, name)):
            failed.append(name)
            continue
        found = known(options.report)  # another process may write its runs, too
        found["runs"][name] = of_run(place(folder, name))
        write(options.report, found)
    if options.timed:
        seconds = time_iterations(options.timed)
        write(options.report, known(options.report) | {"seconds": seconds})
    if (found := known(options.report))["seconds"]:
        figure(of_modes(found)).write(ROOT / "docs" / "figures")
        print(lines_of(of_modes(found)))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
