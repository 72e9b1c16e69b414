"""The tables of results on a bundle: which component, seed, attribute, concepts, loss and gradient reach what.

    python tests/benchmarks/results.py [--list] [--only NAME ...] [--weights FOLDER] [--reports docs/results]
    python tests/benchmarks/results.py --picture runs/results/gender

Each run is a call of train.py and then an evaluation of its adapter, for which the original's pictures are looked at
once for all runs of an attribute. What is there is not made again and a run that was stopped goes on, so the queue can
be stopped and started at any time; a run that fails is left out and named at the end. Then the tables are printed,
with what is there. After a change of the bundle's recipe move runs and evaluations away: a run is known by its command
alone. On another bundle than the small one, only the runs are made whose attributes it knows. On two
cores a run takes up to half an hour of finetuning and ten minutes or so of evaluation, those of the table of scales
half an hour more.
"""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
from measure import ROOT
from result_tables import (
    CONCEPTS,
    OF_CONCEPTS,
    SCALED,
    TRAINED,
    UNSEEN,
    Look,
    Result,
    made,
)

from fairref.bundle.loading import DEFAULT, Bundle, bundle_path, load_bundle
from fairref.bundle.manifest import MANIFEST, read_manifest
from fairref.evaluation.before_after import draw_before_after
from fairref.evaluation.judging import EvaluationSettings
from fairref.evaluation.kept import KEPT
from fairref.evaluation.parts import EXPLICIT_IMAGES, PromptPart, compare
from fairref.evaluation.sentences import lines
from fairref.files.paths import write_json
from fairref.generation.adapters import FILE, load_adapter
from fairref.generation.drawing import Drawing
from fairref.processes import choose_device
from fairref.prompts.sets import read_prompts
from fairref.training.checkpoints import METRICS, SETTINGS, read_settings
from fairref.training.loop import BEST_FILE, RAW_FILE
from fairref.training.stored import of_settings

LONGEST = 30  # minutes of finetuning
IMAGES = 60  # of each prompt
# where a look is thinned, one of so many prompts is looked at; odd, for neighbours lean opposite ways
EVERY = 5
GENDER = ("--attr", "gender")
BOTH = ("--attr", "gender,skin_tone")
ON_BOTH = (*GENDER, "--component", "both", "--lr", "0.001")
AT_ALL_SCALES = (
    *(*GENDER, "--guidance", "1:12", "--empty-prompt", "unread", "--lr", "0.003"),
    *("--iterations", "1000"),
)
SEEDS = ("3", "4", "5")  # none of those that the recipe was chosen with
WITH_AGE = ("--attr", "gender,skin_tone,age", "--target", "age=0.75,0.25", "--C", "0.6")


@dataclass(frozen=True)
class Run:
    """One call of train.py."""

    label: str  # of its row
    options: tuple[str, ...]
    looks: tuple[Look, ...] = (UNSEEN,)

    @property
    def command(self) -> str:
        return " ".join(("python train.py", *self.options))

    def missing(self, found: dict | None) -> list[Look]:
        """Those that its evaluation has not; all, of an evaluation of another command."""
        there = found["after"] if found and found["command"] == self.command else {}
        return [look for look in self.looks if look.key not in there]


RUNS = {
    "gender": Run("text encoder", GENDER, (UNSEEN, TRAINED, *SCALED)),
    "prefix": Run("prefix", (*GENDER, "--component", "prefix", "--lr", "0.3")),
    "prefix-long": Run(
        "prefix, 1,000 iterations",
        (*GENDER, "--component", "prefix", "--lr", "0.3", "--iterations", "1000"),
    ),
    "unet": Run("U-Net", (*GENDER, "--component", "unet")),
    "both": Run("text encoder and U-Net", ON_BOTH),
    **{
        f"gender-{seed}": Run(f"text encoder, seed {seed}", (*GENDER, "--seed", seed), (UNSEEN, TRAINED))
        for seed in SEEDS
    },
    **{
        f"both-{seed}": Run(f"both, seed {seed}", (*ON_BOTH, "--seed", seed), (UNSEEN, TRAINED))
        for seed in SEEDS
    },
    **{
        f"{name}{'-leave' * bool(leave)}": Run(f"{label}{', leave' * bool(leave)}", (*options, *leave))
        for name, label, options in (
            ("skin_tone", "skin tone", ("--attr", "skin_tone")),
            ("gender-skin_tone", "gender × skin tone", BOTH),
            ("gender-skin_tone-age", "gender × skin tone × age", WITH_AGE),
        )
        for leave in ((), ("--threshold", "leave"))
    },
    "concepts": Run("four concepts at once", (*BOTH, "--prompts", ",".join(CONCEPTS)), OF_CONCEPTS),
    "align": Run("L_align alone", (*GENDER, "--lambda-img", "0", "--lambda-face", "0")),
    "align-img": Run("L_align + L_img", (*GENDER, "--lambda-face", "0")),
    "solver": Run("solver", (*GENDER, "--gradient", "solver")),
    "none": Run("none", (*GENDER, "--gradient", "none")),
    "unread": Run(
        "the bundle's, empty prompt unread",
        (*GENDER, "--empty-prompt", "unread", "--lr", "0.003"),
        (UNSEEN, *SCALED),
    ),
    "scales": Run("1 to 12", (*GENDER, "--guidance", "1:12"), (UNSEEN, *SCALED)),
    "turns": Run("1 and 12 by turns", (*GENDER, "--guidance", "1,12"), (UNSEEN, *SCALED)),
    "long": Run("1 to 12, unread, 1,000 iterations", AT_ALL_SCALES, (UNSEEN, *SCALED)),
    **{
        f"long-{seed}": Run(
            f"1 to 12, unread, 1,000 iterations, seed {seed}",
            (*AT_ALL_SCALES, "--seed", seed),
            (UNSEEN, *SCALED),
        )
        for seed in SEEDS[:2]
    },
}
TABLES = {  # title -> its runs; a label in place of the run's own
    "summary": {"gender": "gender", "skin_tone": None, "gender-skin_tone": None},
    "components": {"prefix": None, "prefix-long": None, "gender": None, "unet": None, "both": None},
    "leans": {"prefix": None, "prefix-long": None, "gender": None, "unet": None, "both": None},
    "seeds": {f"{name}-{seed}": None for name in ("gender", "both") for seed in SEEDS},
    "attributes": {
        f"{name}{leave}": None
        for name in ("skin_tone", "gender-skin_tone", "gender-skin_tone-age")
        for leave in ("", "-leave")
    },
    "old": {"gender-skin_tone-age": None},
    "concepts": {"concepts": None},
    "losses": {"align": None, "align-img": None, "gender": "L_align + L_img + L_face"},
    "gradients": {"gender": "paper", "solver": None, "none": None},
    **{
        title: {"gender": "the bundle's"}
        | dict.fromkeys(("unread", "scales", "turns", "long", *(f"long-{seed}" for seed in SEEDS[:2])))
        for title in ("scales", "drift")
    },
}


def turn_to(weights: str, attributes: Collection[str]) -> None:
    """Makes RUNS and TABLES those of another bundle: with its --weights, with race where it has no skin_tone, and
    without the runs of attributes that it lacks."""

    def own(text):
        return (
            text
            if "skin_tone" in attributes
            else text.replace("skin_tone", "race").replace("skin tone", "race")
        )

    runs = {}
    for name, run in RUNS.items():
        options = tuple(map(own, run.options))
        if set(options[options.index("--attr") + 1].split(",")) <= set(attributes):
            runs[own(name)] = Run(own(run.label), (*options, "--weights", weights), run.looks)
    tables = {
        title: {own(name): label for name, label in names.items() if own(name) in runs}
        for title, names in TABLES.items()
    }
    for kept, new in ((RUNS, runs), (TABLES, {title: names for title, names in tables.items() if names})):
        kept.clear()
        kept.update(new)


def wanted(only: list[str] | None) -> list[str]:
    """The runs of --only, which names runs or, as a word that is both, the table."""
    names = [name for one in only or RUNS for name in TABLES.get(one, [one])]
    return list(dict.fromkeys(names))


def call(*command) -> int:
    """The exit code; a Ctrl-C is left to the run, which then writes its checkpoint, and a SIGTERM passed on to it."""
    print("+", *command, flush=True)
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)

    def stop(number, frame):
        process.terminate()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def finetune(name: str, folder: Path, device: str) -> bool:
    """Makes a run on a device, or what is missing of it -> whether it is whole. One of another command is not."""
    beside = folder.with_name(f"{folder.name}.command")
    made = beside.read_text(encoding="utf-8") if beside.exists() else "an unknown command"
    if folder.exists() and made != RUNS[name].command:
        print(f"{folder} is a run of {made}; move it away", file=sys.stderr)
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(RUNS[name].command, encoding="utf-8")
    if (folder / FILE).exists():
        return True
    if (folder / SETTINGS).exists():
        return call("train.py", "--resume", folder) == 0
    options = (*RUNS[name].options, "--evaluate", "none", "--device", device)
    return call("train.py", *options, "--out", folder) == 0


def evaluate_run(bundle: Bundle, name: str, run: Path, found: dict, save: Callable) -> None:
    """Fills in what a run's evaluation {"command", "minutes", "device", "before", "after": {look: report}} lacks; saves
    it at each. What is judged is kept beside the runs, so the original's images are drawn once for all of them."""
    settings = read_settings(run)
    target, recipe = of_settings(settings)
    concepts = read_prompts(
        settings["prompts"], settings["prompt_template"], bundle.path, list(target.classes)
    )
    concepts = {concept.name: concept for concept in concepts}
    models = {"before": bundle, "after": load_adapter(bundle, run / FILE)}
    found |= {"minutes": minutes(run), "device": settings["device"]}
    for look in RUNS[name].missing(found):
        drawing = Drawing(recipe.eval_steps, look.guidance or recipe.eval_guidance, recipe.end)
        how = EvaluationSettings(bundle, target, drawing, kept=run.parent / KEPT)
        prompts = concepts[look.concept]
        if look.thinned:
            prompts = replace(prompts, **{look.part: getattr(prompts, look.part)[::EVERY]})
        part = PromptPart(prompts, look.part, IMAGES, EXPLICIT_IMAGES if look == UNSEEN else 0)
        for when, evaluated in compare(how, models, part):
            found[when][look.key] = short(evaluated.report)
        print("\n  ".join([f"{name}, {look.key}:", *lines(found["after"][look.key])]), flush=True)
        save(found)


def short(report):
    """A report without each prompt's own intervals, which its counts give again."""
    if not isinstance(report, dict):
        return report
    return {key: short(of) for key, of in report.items() if not (key == "prompts" and isinstance(of, dict))}


def draw_picture(run: Path, reports: Path, bundle: Bundle, picture: Path) -> None:
    """Draws the picture before and after of a finished run's folder, without evaluating it again."""
    own = run / "evaluation.json"
    evaluation = own if own.exists() else reports / f"{run.name}.json"
    if not evaluation.exists():
        sys.exit(f"{own}: there is none, and no {evaluation} either; evaluate the run first.")
    results = json.loads(evaluation.read_text(encoding="utf-8"))
    files = {"after": FILE, "after (ema)": FILE, "after (best)": BEST_FILE, "after (raw)": RAW_FILE}
    label = next(label for label in results if label in files)
    settings = read_settings(run)
    target, recipe = of_settings(settings)
    concepts = read_prompts(
        settings["prompts"], settings["prompt_template"], bundle.path, list(target.classes)
    )
    drawing = Drawing(recipe.eval_steps, recipe.eval_guidance, recipe.end)
    how = EvaluationSettings(bundle, target, drawing)
    models = {"before": bundle, label: load_adapter(bundle, run / files[label])}
    draw_before_after(how, models, concepts, results, picture)


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


def tables(found: dict) -> dict[str, str]:
    """Title -> table, of those for which there are runs: two at least, where there is something to compare."""
    results = {
        title: [
            Result(label or RUNS[n].label, **found[n])
            for n, label in names.items()
            if n in found and found[n]["command"] == RUNS[n].command
        ]
        for title, names in TABLES.items()
    }
    enough = {title: of_one for title, of_one in results.items() if len(of_one) >= min(2, len(TABLES[title]))}
    texts = {title: made(title, of_one) for title, of_one in enough.items()}
    return {title: text for title, text in texts.items() if text}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", metavar="NAME", help="runs or tables")
    parser.add_argument(
        "--list", action="store_true", help="what there is to make, and what is made; makes nothing"
    )
    parser.add_argument(
        "--tables", action="store_true", help="print the tables of what is made; makes nothing"
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="RUN",
        help="draw the picture of this run's folder, no more: docs/before_after.png, or in the folder with --weights",
    )
    parser.add_argument(
        "--weights", help="bundle of the runs (None: the small one, or that of --picture's run)"
    )
    parser.add_argument(
        "--folder", type=Path, help="of the runs (None: runs/results, or that and the bundle's name)"
    )
    parser.add_argument(
        "--reports",
        type=Path,
        help="folder of the evaluations (None: docs/results, or in --folder with --weights)",
    )
    parser.add_argument("--device", default="cpu", help="of the runs and of their evaluation, as train.py's")
    options = parser.parse_args()
    if options.picture:
        run = options.picture.resolve()
        bundle = load_bundle(options.weights or read_settings(run)["weights"], choose_device(options.device))
        picture = (run if options.weights else ROOT / "docs") / "before_after.png"
        draw_picture(run, options.reports or ROOT / "docs" / "results", bundle, picture)
        return
    folder, reports = ROOT / "runs" / "results", ROOT / "docs" / "results"
    if options.weights:
        weights = bundle_path(options.weights).resolve()
        turn_to(str(weights), read_manifest(weights / MANIFEST).get("attributes", {}))
        folder = folder.with_name(f"results-{weights.name}")
        reports = (options.folder or folder) / "reports"
    folder, reports = (options.folder or folder).resolve(), (options.reports or reports).resolve()
    unknown = {*(options.only or ())} - {*RUNS, *TABLES}
    if unknown:
        parser.error(f"--only names {min(unknown)}; expected some of {', '.join({**RUNS, **TABLES})}")
    found = found_in(reports)
    missing = [name for name in wanted(options.only) if RUNS[name].missing(found.get(name))]
    if options.list:
        for name in wanted(options.only):
            print(f"{name:22} {'to do' if name in missing else 'done':6} {RUNS[name].command}")
        return
    failed = []
    reports.mkdir(parents=True, exist_ok=True)
    if missing and not options.tables:
        bundle = load_bundle(options.weights or DEFAULT, choose_device(options.device))
        for name in missing:
            if finetune(name, folder / name, options.device):
                if RUNS[name].command != found.get(name, {}).get("command"):
                    found[name] = {"command": RUNS[name].command, "before": {}, "after": {}}
                save = partial(write_json, reports / f"{name}.json")
                evaluate_run(bundle, name, folder / name, found[name], save)
            else:
                failed.append(name)
    print("\n\n".join(f"### {title}\n\n{text}" for title, text in tables(found).items()))
    long = [n for n, run in found.items() if run.get("device", "cpu") == "cpu" and run["minutes"] > LONGEST]
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
