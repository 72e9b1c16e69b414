"""The tables of results on the small bundle: which component, seed, attribute, concepts, loss and gradient reach what.

    python tests/benchmarks/results.py [--list] [--only NAME ...] [--reports docs/results]

Each run is a call of train.py and then an evaluation of its adapter, for which the original's pictures are looked at
once for all runs of an attribute. What is there is not made again and a run that was stopped goes on, so the queue can
be stopped and started at any time; a run that fails is left out and named at the end. Then the tables are printed, with
what is there. On two cores a run takes up to half an hour of finetuning and ten minutes or so of evaluation.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))
from measure import ROOT, table, write

from fairref import cli
from fairref.bundle import Bundle, load_bundle
from fairref.evaluate import NAMED_IMAGES, How, evaluate
from fairref.finetune.adapters import FILE, load_adapter
from fairref.finetune.checkpoints import METRICS, SETTINGS, read_settings
from fairref.finetune.mixture import read_prompts
from fairref.report import COLOURED, likeness, lines
from fairref.run import of_settings

JUDGES = ("classifier", "templates")
LONGEST = 30  # minutes of finetuning
IMAGES = 60  # of each prompt
EVERY = 5  # of the finetuning prompts so many are looked at once; odd, since neighbours lean opposite ways
CONCEPTS = ("occupations", "sports", "style_context", "descriptors")
GENDER = ("--attr", "gender")
BOTH = ("--attr", "gender,skin_tone")
WITH_AGE = ("--attr", "gender,skin_tone,age", "--target", "age=0.75,0.25")


@dataclass(frozen=True)
class Run:
    """One call of train.py."""

    label: str  # of its row
    options: tuple[str, ...]

    parts: tuple[str, ...] = ("test",)  # prompts on which it is evaluated

    @property
    def command(self) -> str:
        return " ".join(("python train.py", *self.options))


SEEDS = ("test", "train")  # the parts of the table of seeds
RUNS = {
    "gender": Run("text encoder", GENDER, SEEDS),
    "prefix": Run("prefix", (*GENDER, "--component", "prefix")),
    "unet": Run("U-Net", (*GENDER, "--component", "unet")),
    "both": Run("text encoder and U-Net", (*GENDER, "--component", "both")),
    "gender-1": Run("seed 1", (*GENDER, "--seed", "1"), SEEDS),
    "gender-2": Run("seed 2", (*GENDER, "--seed", "2"), SEEDS),
    "skin_tone": Run("skin tone", ("--attr", "skin_tone")),
    "gender-skin_tone": Run("gender × skin tone", BOTH),
    "gender-skin_tone-age": Run("gender × skin tone × age", WITH_AGE),
    "concepts": Run("four concepts at once", (*BOTH, "--prompts", ",".join(CONCEPTS))),
    "align": Run("align", (*GENDER, "--lambda-img", "0", "--lambda-face", "0")),
    "align-img": Run("align + img", (*GENDER, "--lambda-face", "0")),
    "solver": Run("solver", (*GENDER, "--gradient", "solver")),
    "none": Run("none", (*GENDER, "--gradient", "none")),
}
TABLES = {  # title -> its runs; a label in place of the run's own
    "components": {"prefix": None, "gender": None, "unet": None, "both": None},
    "seeds": {"gender": "seed 0", "gender-1": None, "gender-2": None},
    "attributes": {"skin_tone": None, "gender-skin_tone": None, "gender-skin_tone-age": None},
    "concepts": {"concepts": None},
    "losses": {"align": None, "align-img": None, "gender": "align + img + face"},
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


def finetune(name: str, folder: Path) -> bool:
    """Makes a run, or what is missing of it -> whether it is whole."""
    if (folder / FILE).exists():
        return True
    if (folder / SETTINGS).exists():
        return call("train.py", "--resume", folder) == 0
    return call("train.py", *RUNS[name].options, "--evaluate", "none", "--out", folder) == 0


@dataclass
class Evaluator:
    """Evaluates runs on the same noise; remembers what the original draws."""

    bundle: Bundle
    originals: dict = field(default_factory=dict)  # what was evaluated -> report, Seen

    def __call__(self, name: str, run: Path) -> dict:
        """A run's folder -> {"before", "after": {part: report}, "minutes"}."""
        settings = read_settings(run)
        target, recipe = of_settings(settings)
        how = How(self.bundle, target, recipe.eval_steps, recipe.eval_guidance, recipe.end)
        concepts = read_prompts(
            settings["prompts"], settings["prompt_template"], self.bundle, list(target.classes)
        )
        model = load_adapter(self.bundle, run / FILE)
        found = {"before": {}, "after": {}, "minutes": minutes(run)}
        for prompts in concepts:
            prompts = replace(prompts, train=prompts.train[::EVERY])
            for part in RUNS[name].parts:
                key = part if len(concepts) == 1 else f"{prompts.name}, {part}"
                which = (tuple(target.classes), target.table.tobytes(), prompts.name, part)
                named = NAMED_IMAGES if part == "test" else 0
                if which not in self.originals:
                    self.originals[which] = evaluate(
                        how, self.bundle, prompts, part, IMAGES, "original", named
                    )
                report, originals = self.originals[which]
                found["before"][key] = report
                report, seen = evaluate(how, model, prompts, part, IMAGES, name, named)
                found["after"][key] = report | likeness(seen, originals)
                print("\n  ".join([f"{name}:", *lines(found["after"][key])]), flush=True)
        return found


def minutes(run: Path) -> float:
    """Of finetuning."""
    rows = (run / METRICS).read_text(encoding="utf-8").splitlines()
    return sum(json.loads(row)["seconds"] for row in rows) / 60


def found_in(folder: Path) -> dict[str, dict]:
    """Run -> what its evaluation found, of those that were evaluated."""
    files = {name: folder / f"{name}.json" for name in RUNS}
    return {
        name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()
    }


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


def concept_rows(names: dict, found: dict) -> list[list]:
    """Before and after, for each concept: bias of each attribute and of both by the classifier / by templates."""
    rows = []
    for name in (name for name in names if name in found):
        for key in found[name]["before"]:
            for when in ("before", "after"):
                report = found[name][when][key]
                of = [*report["attributes"].values(), report]
                cells = [" / ".join(cell or "–" for cell in biases(one)[:2]) for one in of]
                floors = " ".join(biases(one)[2] + ";" for one in of).rstrip(";")
                rows.append([f"{key.removesuffix(', test')}, {when}", *cells, floors, *faithful(report)])
    return rows


def seed_rows(names: dict, found: dict) -> list[list]:
    """Bias of unseen and of finetuning prompts, and what must not be lost for it."""
    there = [name for name in names if name in found]
    rows = [seed_row("original", found[there[0]]["before"], found[there[0]]["before"])] if there else []
    return rows + [seed_row(names[n] or RUNS[n].label, found[n]["after"], found[n]["before"]) for n in there]


def seed_row(label: str, reports: dict, before: dict) -> list:
    """One model's: a fall of CLIP-T is a share of the gap between a prompt's own images and other prompts'."""
    test, old = reports["test"], before["test"]["clip_t"]
    fall = (old["matched"] - test["clip_t"]["matched"]) / (old["matched"] - old["shuffled"])
    named = " / ".join(f"{test['named'][judge]:.1%}" for judge in JUDGES)
    both = [" / ".join(biases(reports[part])[:2]) for part in SEEDS]
    return [label, *both, f"{test['clip_t']['matched']:.3f}", f"{fall:.1%}", named, f"{test['none']:.1%}"]


def loss_rows(names: dict, found: dict) -> list[list]:
    """Bias, and what stays as it was."""
    rows = []
    for name in (name for name in names if name in found):
        if not rows:
            rows.append(["original", *loss_cells(of_occupations(found[name]["before"])), None])
        cells = loss_cells(of_occupations(found[name]["after"]))
        rows.append([names[name] or RUNS[name].label, *cells, f"`{RUNS[name].command}`"])
    return rows


def loss_cells(report: dict) -> list[str | None]:
    colours = [report.get(key) for key in COLOURED]
    return [*biases(report)[:2], *faithful(report), *(None if v is None else f"{v:.3f}" for v in colours)]


def shown(found: dict) -> str:
    """All tables for which there is a run."""
    kept = ["CLIP-T", "CLIP-I", "DINO"]
    full = ["", "bias, classifier", "bias, templates", "a fair model", *kept, "min", "command"]
    kinds = {
        "seeds": (
            ["", "bias, unseen", "bias, finetuning prompts", "CLIP-T", "falls by", "named", "none"],
            seed_rows,
        ),
        "attributes": (full, attribute_rows),
        "concepts": (["", "gender", "skin tone", "both", "a fair model", *kept], concept_rows),
        "losses": (["", *full[1:3], *kept, *COLOURED, "command"], loss_rows),
    }
    texts = []
    for title, names in TABLES.items():
        header, rows_of = kinds.get(title, (full, gender_rows))
        rows = rows_of(names, found)
        if rows:
            texts.append(f"### {title}\n\n{table(header, rows)}")
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
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "results", help="of the runs")
    parser.add_argument(
        "--reports", type=Path, default=ROOT / "docs" / "results", help="folder of the evaluations"
    )
    options = parser.parse_args()
    folder, reports = options.folder.resolve(), options.reports.resolve()
    missing = [name for name in wanted(options.only) if not (reports / f"{name}.json").exists()]
    if options.list:
        for name in wanted(options.only):
            print(f"{name:22} {'to do' if name in missing else 'done':6} {RUNS[name].command}")
        return
    failed = []
    if missing and not options.tables:
        evaluator = Evaluator(load_bundle(cli.WEIGHTS))
        for name in missing:
            if finetune(name, folder / name):
                write(reports / f"{name}.json", evaluator(name, folder / name))
            else:
                failed.append(name)
    found = found_in(reports)
    print(shown(found))
    long = [name for name, run in found.items() if run["minutes"] > LONGEST]
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
