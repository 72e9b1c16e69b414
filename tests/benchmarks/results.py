"""The tables of results on the small bundle: which component, seed, attribute, concepts and gradient reach what.

    python tests/benchmarks/results.py [--list] [--only NAME ...] [--folder runs/results]

Each run is a call of train.py, which also evaluates. A run that is there is not made again and one that was stopped
goes on, so the queue can be stopped and started at any time; one that fails is left out and named at the end. Then the
tables are printed, with what is there. Half an hour of finetuning a run on two cores, and its evaluation.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))
from measure import ROOT, table

JUDGES = ("classifier", "templates")
LONGEST = 30  # minutes of finetuning
CONCEPTS = ("occupations", "sports", "style_context", "descriptors")
GENDER = ("--attr", "gender")
BOTH = ("--attr", "gender,skin_tone")
WITH_AGE = ("--attr", "gender,skin_tone,age", "--target", "age=0.75,0.25")


@dataclass(frozen=True)
class Run:
    """One call of train.py."""

    label: str  # of its row
    options: tuple[str, ...]

    @property
    def command(self) -> str:
        return " ".join(("python train.py", *self.options))


RUNS = {
    "gender": Run("text encoder", GENDER),
    "prefix": Run("prefix", (*GENDER, "--component", "prefix")),
    "unet": Run("U-Net", (*GENDER, "--component", "unet")),
    "both": Run("text encoder and U-Net", (*GENDER, "--component", "both")),
    "gender-1": Run("seed 1", (*GENDER, "--seed", "1")),
    "gender-2": Run("seed 2", (*GENDER, "--seed", "2")),
    "skin_tone": Run("skin tone", ("--attr", "skin_tone")),
    "gender-skin_tone": Run("gender × skin tone", BOTH),
    "gender-skin_tone-age": Run("gender × skin tone × age", WITH_AGE),
    "concepts": Run("four concepts at once", (*BOTH, "--prompts", ",".join(CONCEPTS))),
    "solver": Run("solver", (*GENDER, "--gradient", "solver")),
    "none": Run("none", (*GENDER, "--gradient", "none")),
}
TABLES = {  # title -> its runs; a label in place of the run's own
    "components": {"prefix": None, "gender": None, "unet": None, "both": None},
    "seeds": {"gender": "seed 0", "gender-1": None, "gender-2": None},
    "attributes": {"skin_tone": None, "gender-skin_tone": None, "gender-skin_tone-age": None},
    "concepts": {"concepts": None},
    "gradients": {"gender": "paper", "solver": None, "none": None},
}


def wanted(only: list[str] | None) -> list[str]:
    """The runs of --only, which names runs or, as a word that is both, the table."""
    names = [name for one in only or RUNS for name in TABLES.get(one, [one])]
    return list(dict.fromkeys(names))


def call(*command) -> int:
    """The exit code; a Ctrl-C is left to the run, which then writes its checkpoint."""
    print("+", *command, flush=True)
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def make(name: str, folder: Path, options: argparse.Namespace) -> bool:
    """Makes a run, or what is missing of it -> whether it is whole."""
    run = folder / name
    if (run / "evaluation.json").exists():
        return True
    if (run / "settings.json").exists():
        return call("train.py", "--resume", run) == 0
    # the tables are of unseen prompts
    common = ("--evaluate", options.adapter, "--eval-images-train", 0, *options.train_options)
    return call("train.py", *RUNS[name].options, *common, "--out", run) == 0


def minutes(run: Path) -> float | None:
    """Of finetuning."""
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return sum(json.loads(line)["seconds"] for line in lines) / 60 if lines else None


def found_in(folder: Path) -> dict[str, dict]:
    """Run -> {"before", "after": {part: report}, "minutes"} of those that were evaluated."""
    found = {}
    for name in RUNS:
        file = folder / name / "evaluation.json"
        if file.exists():
            before, after = list(json.loads(file.read_text(encoding="utf-8")).values())[:2]
            found[name] = {"before": before, "after": after, "minutes": minutes(folder / name)}
    return found


def of_occupations(reports: dict) -> dict:
    """The report on unseen occupations."""
    return reports["test"] if "test" in reports else reports["occupations, test"]


def biases(report: dict) -> list[str | None]:
    """Bias by each judge, mean and standard deviation over prompts, and what a fair model measures."""
    cells = []
    for found in (report["judges"].get(judge) for judge in JUDGES):
        cells.append(None if not found or found["mean"] is None else spread(found["mean"], found["std"]))
    floor = report["noise_floor"]
    return [*cells, spread(floor["mean"], floor["std"])]


def spread(mean: float, std: float) -> str:
    """Mean and standard deviation, as .23 ± .16."""
    return " ± ".join(f"{value:.2f}".removeprefix("0") for value in (mean, std))


def faithful(report: dict) -> list[str | None]:
    """CLIP-T, CLIP-I, DINO."""
    text = (report.get("clip_t") or {}).get("matched")
    return [None if v is None else f"{v:.3f}" for v in (text, report.get("clip_i"), report.get("dino"))]


HEADER = [
    "",
    "bias, classifier",
    "bias, templates",
    "a fair model",
    "CLIP-T",
    "CLIP-I",
    "DINO",
    "min",
    "command",
]


def gender_rows(names: dict, found: dict) -> list[list]:
    """The original and each run."""
    there = [name for name in names if name in found]
    rows = []
    for name in there:
        run = found[name]
        if not rows:
            report = of_occupations(run["before"])
            rows.append(["original", *biases(report), *faithful(report), None, None])
        report, about = of_occupations(run["after"]), RUNS[name]
        cells = [*biases(report), *faithful(report), run["minutes"], f"`{about.command}`"]
        rows.append([names[name] or about.label, *cells])
    return rows


def attribute_rows(names: dict, found: dict) -> list[list]:
    """Before and after each run: the joint bias, each attribute's alone, and the share of old."""
    rows = []
    for name in (name for name in names if name in found):
        for when in ("before", "after"):
            report, last = of_occupations(found[name][when]), when == "after"
            cells = [found[name]["minutes"], f"`{RUNS[name].command}`"] if last else [None, None]
            rows.append([f"{RUNS[name].label}, {when}", *biases(report), *faithful(report), *cells])
            for attribute, alone in report.get("attributes", {}).items():
                old = f", {old_share(alone)} old" if attribute == "age" else ""
                rows.append([f"… {attribute} alone{old}", *biases(alone), *[None] * 5])
    return rows


def old_share(alone: dict) -> str:
    """The share of old by each judge, mean and standard deviation over prompts (Fig 9)."""
    cells = []
    for judge in JUDGES:
        if judge in alone["judges"]:
            counts = np.array(list(alone["judges"][judge]["counts"].values()), float)  # (P, K)
            counts = counts[counts.sum(1) > 0]
            share = counts[:, list(alone["judges"][judge]["share"]).index("old")] / counts.sum(1)
            cells.append(f"{share.mean():.0%} ± {share.std():.0%}")
    return " / ".join(cells)


def concept_rows(found: dict) -> list[list]:
    """Before and after, for each concept: bias of each attribute and of both by the classifier / by templates."""
    rows = []
    if "concepts" in found:
        for key in found["concepts"]["before"]:
            for when in ("before", "after"):
                report = found["concepts"][when][key]
                of = [*report["attributes"].values(), report]
                cells = [" / ".join(cell or "–" for cell in biases(one)[:2]) for one in of]
                floors = " ".join(biases(one)[2] + ";" for one in of).rstrip(";")
                rows.append([f"{key.removesuffix(', test')}, {when}", *cells, floors, *faithful(report)])
    return rows


def shown(found: dict) -> str:
    """All tables for which there is a run."""
    texts = []
    for title, names in TABLES.items():
        if title == "concepts":
            header = ["", "gender", "skin tone", "both", "a fair model", "CLIP-T", "CLIP-I", "DINO"]
            rows, about = concept_rows(found), f"\n\n`{RUNS['concepts'].command}`"
        else:
            make_rows = attribute_rows if title == "attributes" else gender_rows
            header, rows, about = HEADER, make_rows(names, found), ""
        if rows:
            texts.append(f"### {title}\n\n{table(header, rows)}{about}")
    return "\n\n".join(texts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [*RUNS, *(name for name in TABLES if name not in RUNS)]
    parser.add_argument("--only", nargs="*", metavar="NAME", choices=names, help="runs or tables")
    parser.add_argument(
        "--list", action="store_true", help="what there is to make, and what is made; makes nothing"
    )
    parser.add_argument(
        "--tables", action="store_true", help="print the tables of what is made; makes nothing"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "results")
    parser.add_argument(
        "--adapter", default="best", choices=["best", "ema", "raw"], help="which is evaluated"
    )
    parser.add_argument(
        "--train-options", nargs=argparse.REMAINDER, default=[], help="for a trial: all that follows"
    )
    options = parser.parse_args()
    folder = Path(os.path.abspath(options.folder))
    if options.list:
        for name in wanted(options.only):
            state = "done" if (folder / name / "evaluation.json").exists() else "to do"
            print(f"{name:22} {state:6} {RUNS[name].command}")
        return
    failed = []
    for name in [] if options.tables else wanted(options.only):
        if not make(name, folder, options):
            failed.append(name)
    found = found_in(folder)
    print(shown(found))
    long = [name for name, run in found.items() if (run["minutes"] or 0) > LONGEST]
    for which, what in (
        (failed, "failed, see their messages above"),
        (long, f"took more than {LONGEST} minutes"),
    ):
        if which:
            print(f"\n{', '.join(which)}: {what}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
