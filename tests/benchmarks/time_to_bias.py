"""Unseen bias against minutes, for several recipes of the small bundle: mean and range of the seeds.

    python tests/benchmarks/time_to_bias.py --way "before=--clip 0.02 ..." --way "now=" [--seeds 3 4 5] [--list]
        [--folder runs/time_to_bias] [--report docs/results/time_to_bias.json] [--figure docs/figures]

A way is what it adds to `python train.py --attr gender`; a recipe keeps every checkpoint of its runs. The moving
average of every --every iterations is judged on the 50 unseen occupations, --images of each, on noise that is the same
for all. Minutes are iterations times the seconds of an iteration, as in gradient_runs.py: CPU seconds of one thread on
the same iterations of all ways, taking turns. What is there is not made again and a run that was stopped goes on. A run
of the bundle's recipe takes 9 core minutes, a look at 30 images of each occupation 2.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent))
from gradient_runs import short
from measure import ROOT, adapted, machine, table
from results import call

from fairref.bundle.loading import DEFAULT, Bundle, load_bundle
from fairref.evaluation.judging import EvaluationSettings
from fairref.evaluation.kept import KEPT
from fairref.evaluation.parts import PromptPart, compare
from fairref.files.paths import read_json, write_json
from fairref.files.weights import read
from fairref.generation.adapters import FILE, load_adapter, read_adapter, save_adapter
from fairref.generation.drawing import Drawing
from fairref.prompts.sets import OCCUPATIONS, read_prompts
from fairref.reporting import charts
from fairref.reporting.figures import Figure, by_curve
from fairref.training.checkpoints import SETTINGS, read_settings, saved
from fairref.training.run import setup_of_run
from fairref.training.step import iteration_gradient
from fairref.training.stored import of_settings

OPTIONS = "--attr gender --validate-every 0 --grid-every 0 --evaluate none --keep 1000"
EMA = "ema."


def finetune(options: str, seed: int, every: int, folder: Path) -> bool:
    """Makes a run, or what is missing of it -> whether it is whole."""
    if (folder / FILE).exists():
        return True
    if (folder / SETTINGS).exists():
        return call("train.py", "--resume", folder) == 0
    words = [*OPTIONS.split(), "--checkpoint-every", every, *shlex.split(options)]
    return call("train.py", *words, "--seed", seed, "--out", folder) == 0


def look(bundle: Bundle, run: Path, checkpoint: Path, images: int) -> dict:
    """The unseen bias of a checkpoint's moving average, by each judge, and CLIP-I."""
    target, recipe = of_settings(read_settings(run))
    adapter = run / "looked_at.safetensors"
    average = {name.removeprefix(EMA): of for name, of in read(checkpoint).items() if name.startswith(EMA)}
    save_adapter(adapter, average, read_adapter(run / FILE).info)
    (concept,) = read_prompts(OCCUPATIONS, None, bundle.path, list(target.classes))
    drawing = Drawing(recipe.eval_steps, recipe.eval_guidance, recipe.end)
    how = EvaluationSettings(bundle, target, drawing, kept=run.parent / KEPT)
    models = {"before": bundle, "after": load_adapter(bundle, adapter)}
    *_, (_, evaluated) = compare(how, models, PromptPart(concept, "test", images, 0))
    judges = evaluated.report["judges"].values()
    return {"bias": [judge["mean"] for judge in judges], "clip_i": evaluated.report["clip_i"]}


def timed(runs: dict[str, Path], iterations: int) -> dict[str, float]:
    """Way -> mean CPU seconds of one thread, of the same iterations of a run of each."""
    setups = {label: setup_of_run(run) for label, run in runs.items()}
    models, found = {label: adapted(setup) for label, setup in setups.items()}, {label: [] for label in runs}
    for i in range(-1, iterations):  # the first is a warm-up
        for label, setup in setups.items():
            model, state = models[label]
            began = time.process_time()
            iteration_gradient(setup, model, list(state.adapter.parameters()), max(i, 0))
            found[label].append(time.process_time() - began)
    return {label: float(np.mean(seconds[1:])) for label, seconds in found.items()}


def figure(report: dict, judge: int = 0) -> Figure:
    """Bias by minutes: mean, least and most of the seeds, a curve for each way."""
    rows = []
    for label, of in report["ways"].items():
        seeds = list(of["looks"].values())
        for n in sorted(set.intersection(*(set(map(int, seed)) for seed in seeds))):
            values = np.array([seed[str(n)]["bias"][judge] for seed in seeds])
            spread = {"mean": values.mean(), "low": values.min(), "high": values.max()}
            at = {"curve": label, "minutes": round(n * of["seconds"] / 60, 3), "iteration": n}
            rows.append(at | {key: round(float(value), 4) for key, value in spread.items()})
    about = "bias of unseen prompts, mean and range of the seeds"
    svg = charts.curves(by_curve(rows, "minutes"), "minutes of one core", about, "Bias against minutes")
    return Figure("time_to_bias", svg, rows)


def lines_of(report: dict) -> str:
    """The table: seconds of an iteration, and bias and CLIP-I at the end."""
    rows = []
    for label, of in report["ways"].items():
        last = [seed[max(seed, key=int)] for seed in of["looks"].values()]
        n = max(int(n) for seed in of["looks"].values() for n in seed)
        ends = (
            [" / ".join(map(short, seed["bias"])) for seed in last],
            [short(seed["clip_i"]) for seed in last],
        )
        rows.append(
            [
                *(label, of["seconds"], n * of["seconds"] / 60, *map(", ".join, ends)),
                f"`{of['options']}`" if of["options"] else "–",
            ]
        )
    header = ["way", "s an iteration", "min of a core", "bias at the end, by seed", "CLIP-I", "adds"]
    return table(header, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--way", action="append", required=True, metavar="LABEL=OPTIONS")
    parser.add_argument("--seeds", nargs="*", type=int, default=[3, 4, 5])
    parser.add_argument("--every", type=int, default=25, help="iterations between looks")
    parser.add_argument("--images", type=int, default=30, help="of each occupation")
    parser.add_argument("--timed", type=int, default=6, help="iterations that are timed")
    parser.add_argument("--list", action="store_true", help="what is whole; makes nothing")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "time_to_bias")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "results" / "time_to_bias.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures")
    options = parser.parse_args()
    if options.timed < 1:
        parser.error(f"--timed {options.timed}; expected at least 1")
    ways = dict(way.split("=", 1) for way in options.way)
    folder, bundle = options.folder.resolve(), None
    report = read_json(options.report) if options.report.exists() else {"ways": {}}
    for label, added in ways.items():
        of = report["ways"].setdefault(label, {"options": added, "looks": {}})
        if of["options"] != added:
            parser.error(f"{options.report}: {label} was {of['options']!r}; give another label")
    for seed in options.seeds:
        for label, added in ways.items():
            run = folder / f"{label.replace(' ', '_')}-{seed}"
            if options.list:
                print(f"{'whole' if (run / FILE).exists() else 'to do'} {run.name}")
                continue
            options.report.parent.mkdir(parents=True, exist_ok=True)
            if not finetune(added, seed, options.every, run):
                sys.exit(f"{run}: is not whole")
            looked = report["ways"][label]["looks"].setdefault(str(seed), {})
            for checkpoint in saved(run):
                n = str(int(checkpoint.stem.rpartition("-")[2]))
                if n not in looked:
                    bundle = bundle or load_bundle(DEFAULT)
                    looked[n] = look(bundle, run, checkpoint, options.images)
                    write_json(options.report, report)
    if options.list:
        return
    torch.set_num_threads(1)
    runs = {label: folder / f"{label.replace(' ', '_')}-{options.seeds[0]}" for label in ways}
    for label, seconds in timed(runs, options.timed).items():
        report["ways"][label]["seconds"] = seconds
    write_json(options.report, {"machine": machine(), **report})
    figure(report).write(options.figure)
    print(lines_of(report))


if __name__ == "__main__":
    main()
