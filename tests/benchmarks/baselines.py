"""The table of baselines on the small bundle: other ways to a fairer model beside the original, on the same noise.

    python tests/benchmarks/baselines.py [--list] [--tables] [--adapter LABEL=RUN ...] [--folder runs/baselines]

First each baseline that has a number is measured at each of NUMBERS on the validation occupations, and its best number
is taken: the least bias by the classifier among those that keep people in their pictures, and CLIP-T within 5 %. Then
the original, the baselines and the runs of --adapter are measured on the unseen occupations. What is there is not made
again: fits and judgements are kept in --folder, so it can be stopped and started at any time. Minutes are CPU time of
one core: give OMP_NUM_THREADS=1. About six hours of a core, of which the fits of uce take half. Runs are made before,
as

    python train.py --attr gender --targets random --evaluate none --out runs/random

and named, as --adapter finetuned=runs/gender --adapter "random targets=runs/random".
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
from measure import ROOT, adapted, machine, setup_of, table
from result_tables import JUDGES, both_judges, faithful, floor, spread

from fairref.baselines.fitting import fit_baselines
from fairref.baselines.registry import BASELINES, parse_baselines
from fairref.bundle.loading import DEFAULT, load_bundle
from fairref.evaluation.evaluation import Evaluation, EvaluationOptions, prepare
from fairref.files.paths import read_json, write_json
from fairref.generation.adapters import load_adapter
from fairref.processes import choose_device
from fairref.training.checkpoints import SETTINGS
from fairref.training.step import iteration_gradient

NUMBERS = {
    "projection": (100, 500, 2_000, 10_000, 50_000),
    "uce": (0.5, 2, 8, 32),
    "fair_pca": (0.36, 1, 2, 4),
}
IMAGES = 60  # of each prompt
TIMED = 3  # iterations of a run whose CPU time is measured
LEAST_CLIP_T = 0.95  # of the original's
MOST_NONE = 0.05  # how many more pictures than the original's may show nobody, or a class that can't be told
HEADER = (
    "method",
    "bias, classifier / templates",
    "corrected",
    "needless flips",
    "CLIP-T",
    "CLIP-I / DINO",
    "explicit, classifier / templates",
    "min of a core",
)


@dataclass
class Bench:
    """What is measured, into a report {"machine", "validation", "minutes", "reports"} that is saved at each step."""

    bundle: object
    folder: Path
    images: int
    found: dict
    save: Callable

    def evaluation(self, part: str) -> Evaluation:
        """Of the bundle's occupations; on validation prompts none that name a class are drawn."""
        more = {} if part == "test" else {"explicit_images": 0}
        options = EvaluationOptions(part=part, images=self.images, cache=self.folder, **more)
        return prepare(self.bundle, options)

    def measure(self, name: str, part: str) -> dict:
        """The report on a baseline, "projection:500", or on the original."""
        evaluation = self.evaluation(part)
        if name != "original":
            (chosen,) = parse_baselines([name])
            began = time.process_time()
            try:
                (source,) = fit_baselines([chosen], evaluation.settings, (), self.folder / "fits")
            finally:  # of a fit that was stopped, too
                taken = self.found["minutes"].get(name, 0) + (time.process_time() - began) / 60
                self.found["minutes"][name] = taken
                self.save()
            evaluation = replace(evaluation, others=(source,))
        return last_report(evaluation)

    def measure_run(self, run: Path) -> dict:
        """The report on a finished run."""
        evaluation = self.evaluation("test")
        evaluation.models["after"] = load_adapter(self.bundle, run)
        return last_report(evaluation)


def core_minutes(bundle, run: Path) -> float:
    """What a run takes of a core: its iterations times the CPU time of an iteration of its settings."""
    settings = read_json(run / SETTINGS)["recipe"]
    setup = setup_of(bundle, **{name: settings[name] for name in ("targets", "gradient")})
    model, state = adapted(setup)
    took = []
    for i in range(TIMED + 1):  # the first is a warm-up
        began = time.process_time()
        iteration_gradient(setup, model, list(state.adapter.parameters()), i)
        took.append(time.process_time() - began)
    return settings["iterations"] * sum(took[1:]) / TIMED / 60


def last_report(evaluation: Evaluation) -> dict:
    """The report on what is beside the original, or on itself."""
    (part,) = evaluation.parts
    *_, (_, evaluated) = evaluation.of_part(part)
    return evaluated.report


def best(reports: dict[str, dict], original: dict) -> str:
    """The name of the least biased, by the classifier, among those whose images show about as many people as the
    original's and about as well what the prompt says."""
    kept = {
        name: report
        for name, report in reports.items()
        if report.get("none", 0) <= original.get("none", 0) + MOST_NONE
        and report["clip_t"]["matched"] >= LEAST_CLIP_T * original["clip_t"]["matched"]
    }
    return min(kept or reports, key=lambda name: (kept or reports)[name]["judges"]["classifier"]["mean"])


def candidates(name: str) -> list[str]:
    """What --baseline takes of a baseline at each of its numbers."""
    return [f"{name}:{number:g}" for number in NUMBERS[name]] if name in NUMBERS else [name]


def run(bench: Bench, adapters: dict[str, Path], only: Sequence[str] = tuple(BASELINES)) -> None:
    """Measures what is missing of the baselines `only`."""
    validation, reports = bench.found["validation"], bench.found["reports"]
    wanted = ["original", *(text for name in only if name in NUMBERS for text in candidates(name))]
    for name in wanted:
        if name not in validation:
            validation[name] = bench.measure(name, "validation")
            bench.save()
    for name in only:
        tried = candidates(name)
        if len(tried) > 1:
            tried = [best({text: validation[text] for text in tried}, validation["original"])]
        bench.found["chosen"][name] = tried[0]
    for name in ("original", *bench.found["chosen"].values()):
        if name not in reports:
            reports[name] = bench.measure(name, "test")
            bench.save()
    for label, folder in adapters.items():
        if label not in reports:
            bench.found["minutes"][label] = core_minutes(bench.bundle, folder)
            reports[label] = bench.measure_run(folder)
            bench.save()


def rows(found: dict) -> list[list]:
    """One a method, at the number that was chosen."""
    shown = {
        name: report
        for name, report in found["reports"].items()
        if name.partition(":")[0] not in NUMBERS or name in found["chosen"].values()
    }
    return [row(name, report, found["minutes"].get(name)) for name, report in shown.items()]


def row(name: str, report: dict, took: float | None) -> list:
    """What it reaches, what it costs, and what it loses."""
    corrected = (report["judges"][JUDGES[0]].get("corrected") or {}).get("mean_gap")
    flips = report.get("flips", {}).get(JUDGES[0])
    explicit = report.get("explicit", {})
    return [
        name,
        both_judges(report),
        f"{corrected['value']:.2f}".removeprefix("0") if corrected else None,
        f"{flips['needless']:.1%}" if flips else None,
        *faithful(report),
        " / ".join(f"{explicit[judge]:.1%}" if judge in explicit else "–" for judge in JUDGES),
        None if took is None else f"{took:.1f}",
    ]


def validation_rows(found: dict) -> list[list]:
    """One a number."""
    rows = []
    for name, report in found["validation"].items():
        kept = row(name, report, None)[4:6]
        rows.append([name, spread(report["judges"][JUDGES[0]]), f"{report.get('none', 0):.1%}", *kept])
    return rows


def shown(found: dict) -> str:
    """The tables of what is there."""
    texts = []
    if found["reports"]:
        fair = floor(next(iter(found["reports"].values())))
        texts += [f"A fair model measures {fair}.", table(HEADER, rows(found))]
    if found["validation"]:
        texts += [
            table(
                ("validation", "bias, classifier", "none", "CLIP-T", "CLIP-I / DINO"), validation_rows(found)
            )
        ]
    return "\n\n".join(texts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="what is made; makes nothing")
    parser.add_argument(
        "--tables", action="store_true", help="print the tables of what is made; makes nothing"
    )
    parser.add_argument("--only", nargs="+", choices=list(BASELINES), default=list(BASELINES))
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="LABEL=RUN", help="a finished run to measure, too"
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs" / "baselines", help="of fits and judgements"
    )
    parser.add_argument(
        "--report",
        type=Path,
        default=ROOT / "docs" / "results" / "baselines.json",
        help="JSON of all results",
    )
    parser.add_argument("--images", type=int, default=IMAGES, help="of each prompt")
    parser.add_argument("--weights", default=DEFAULT, help="bundle")
    parser.add_argument("--device", default="cpu", help="as train.py's")
    options = parser.parse_args()
    found = {"machine": machine(), "chosen": {}, "validation": {}, "minutes": {}, "reports": {}}
    if options.report.exists():
        found = json.loads(options.report.read_text(encoding="utf-8"))
    if options.list:
        for kind in ("validation", "reports"):
            print(f"{kind}: {', '.join(found[kind]) or 'none'}")
        return
    if not options.tables:
        adapters = dict(text.split("=", 1) for text in options.adapter)
        options.folder.mkdir(parents=True, exist_ok=True)
        bundle = load_bundle(options.weights, choose_device(options.device))
        save = partial(write_json, options.report, found)
        bench = Bench(bundle, options.folder.resolve(), options.images, found, save)
        run(bench, {label: Path(folder) for label, folder in adapters.items()}, options.only)
    print(shown(found))


if __name__ == "__main__":
    main()
