"""One change of the recipe at a time, screened: short runs of the small bundle, looked at on validation occupations.

    python tests/benchmarks/screen.py [--list] [--only GROUP or NAME ...] [--seeds 0 1 2] [--iterations 100]
        [--folder runs/screens] [--report docs/results/screens.json]

A screen runs its whole schedule in --iterations. Then 60 images of each of the 12 validation occupations are judged,
and the prompts that name a class, on the same noise for all; what is judged is kept beside the runs. What is there is
not made again, a run that was stopped goes on, and several processes may share the work. A run takes about 8 minutes of
a core, and its look 4. Then the table of each group is printed, with what is there.
"""

import argparse
import itertools
import json
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
from measure import FIRST_OPTIONS, ROOT, table
from results import call, minutes
from variants import leaning_world

from fairref.bundle.loading import DEFAULT, Bundle, load_bundle
from fairref.errors import UserError
from fairref.evaluation.judging import EvaluationSettings
from fairref.evaluation.kept import KEPT
from fairref.evaluation.parts import EXPLICIT_IMAGES, PromptPart, compare
from fairref.files.paths import read_json, write_json
from fairref.generation.adapters import FILE, load_adapter
from fairref.generation.drawing import Drawing
from fairref.prompts.sets import OCCUPATIONS, read_prompts
from fairref.training.checkpoints import METRICS, SETTINGS, held, read_settings
from fairref.training.stored import of_settings

IMAGES, CLASSIFIER, ORIGINAL = 60, "classifier", "original"
# the recipe of today, as changes of FIRST_RECIPE
QUICK = "--steps 4:5 --iterations 180 --grad-steps 1 --clip 0.1 --lambda-img 1 --C 0.7 --lr 0.002"
CLIPS, LAMBDAS, THRESHOLDS = (0.02, 0.1, 0.3, 1), (0.5, 1, 2), (0.8, 0.7, 0.55)
GROUPS = {  # group -> name of a row -> what it adds to FIRST_RECIPE, behind a way of variants.py
    "terms": {
        "all terms": "",
        **{f"{M} drawn": f"--grad-steps {M}" for M in (4, 3, 2, 1)},
    },
    "clip": {
        f"clip {clip:g}, lambda {image:g}, C {C:g}": f"--clip {clip:g} --lambda-img {image:g} --C {C:g}"
        for C in THRESHOLDS
        for clip in CLIPS
        for image in LAMBDAS
    },
    "weight": {  # what C does beside its weight
        "lambdas / 2.4, C .8": "--lambda-img 0.208 --lambda-face 0.042",
        "lambdas times 2.4, C .55": "--lambda-img 1.2 --lambda-face 0.24 --C 0.55",
    },
    "targets": {"soft": "--targets soft", "no threshold": "--C 0"},
    "length": {  # who is shortened: the bundle's clip is .02 of all
        "no clip": "--clip 0",
        "no clip, lambda 2": "--clip 0 --lambda-img 2",
        **{
            f"align {longest:g}, lambda {image:g}, C {C:g}": (
                f"align={longest:g} --clip 0 --lambda-img {image:g} --C {C:g}"
            )
            for longest, image, C in itertools.product((0.05, 0.15), (0.5, 1, 2), (0.8, 0.7))
        },
    },
    "rates": {
        "lr .0015": "--lr 0.0015",
        "lr .006": "--lr 0.006",
        "up 4, lr .0015": "up=4 --lr 0.0015",
        "up 16, lr .00075": "up=16 --lr 0.00075",
        "lr_end .02": "--lr-end 0.02",
        "constant rate": "--lr-end 1",
        "beta_1 .97": "--beta-1 0.97",
    },
    "average": {"ema .99": "--ema 0.99"},
    "images": {  # of about the same cost
        "N 16, 150 iterations": "--batch 16 --iterations 150",
        "N 36, 67 iterations": "--batch 36 --iterations 67",
        "4 to 5 steps, 130 iterations": "--steps 4:5 --iterations 130",
        "12 steps, 60 iterations": "--steps 12 --iterations 60",
    },
    "together": {  # what helped, at once; a row costs about as much as 100 iterations of today's
        name: f"--steps 4:5 --iterations 130 --clip 0.1 --lambda-img 1 --C 0.7 {options}"
        for name, options in {
            "short": "",
            "short, lambda 2": "--lambda-img 2",
            "short, clip 0.3": "--clip 0.3",
            "short, C 0.55, lambda 2": "--C 0.55 --lambda-img 2",
            "short, beta_1 .97": "--beta-1 0.97",
            "short, ema .985": "--ema 0.985 --lr-end 0.05",
            "short, lr .002": "--lr 0.002",
            "short, explicit 6": "--explicit-every 6",
            "short, 3 to 4 steps": "--steps 3:4 --iterations 160",
            "short, N 36": "--batch 36 --iterations 90",
            "short, guidance 1 and 7.5": "--guidance 1,7.5",
            "short, guidance 1 and 12": "--guidance 1,12",
            "short, guidance 1 to 12": "--guidance 1:12",
        }.items()
    },
    "longer": {  # twice as much as a row of "together" costs
        name: f"--steps 4:5 --iterations 260 --grad-steps 1 --clip 0.1 --lambda-img 1 --C 0.7 {options}"
        for name, options in {
            "long": "",
            "long, lr .002": "--lr 0.002",
            "long, warm-up 30": "--warmup 30",
            "long, N 16": "--batch 16 --iterations 390",
            "long, guidance 1 and 7.5": "--guidance 1,7.5",
            "long, lambda_2 .5": "--lambda-2 0.5",
            "long, explicit 6": "--explicit-every 6",
            "long, lambda .5": "--lambda-img 0.5",
            "long, clip .02, lambda .5": "--clip 0.02 --lambda-img 0.5",
        }.items()
    },
    "quick": {  # of about the same cost, that of 180 iterations of 24 images and 4 to 5 steps
        name: f"--grad-steps 1 --clip 0.1 --lambda-img 1 --C 0.7 {options}"
        for name, options in {
            "quick, N 24": "--steps 4:5 --iterations 180",
            "quick, N 24, lr .002": "--steps 4:5 --iterations 180 --lr 0.002",
            "quick, N 24, lr .0025": "--steps 4:5 --iterations 180 --lr 0.0025",
            "quick, N 24, warm-up 30": "--steps 4:5 --iterations 180 --warmup 30",
            "quick, N 24, steady": "--steps 4:5 --iterations 180 --warmup 30 --lr-end 0.6 --ema 0.98",
            "quick, N 24, explicit 6": "--steps 4:5 --iterations 180 --lr 0.002 --explicit-every 6",
            "quick, N 24, 3 to 4 steps": "--steps 3:4 --iterations 210 --lr 0.002",
            "quick, N 16": "--steps 4:5 --iterations 260 --batch 16",
            "quick, N 16, 3 to 4 steps": "--steps 3:4 --iterations 300 --batch 16",
            "quick, N 12, 3 to 4 steps": "--steps 3:4 --iterations 380 --batch 12",
            "quick, N 16, lambda .7": "--steps 4:5 --iterations 260 --batch 16 --lambda-img 0.7",
            "quick, N 16, lambda .7, lr .002": "--steps 4:5 --iterations 260 --batch 16 --lambda-img 0.7 --lr 0.002",
            "quick, N 16, explicit 6": "--steps 4:5 --iterations 260 --batch 16 --explicit-every 6",
            "quick, N 16, ema .985": "--steps 4:5 --iterations 260 --batch 16 --ema 0.985",
            "quick, N 16, warm-up 30": "--steps 4:5 --iterations 260 --batch 16 --warmup 30",
            "quick, N 12, C .6": (
                "--steps 4:5 --iterations 335 --batch 12 --lr 0.002 --C 0.6 --lambda-img 1.2 --ema 0.985"
            ),
            "quick, lambda .7": "--steps 4:5 --iterations 180 --lr 0.002 --lambda-img 0.7",
            "quick, lambda .5": "--steps 4:5 --iterations 180 --lr 0.002 --lambda-img 0.5",
            "quick, ema .985": "--steps 4:5 --iterations 180 --lr 0.002 --ema 0.985",
            "quick, constant rate": "--steps 4:5 --iterations 180 --lr 0.002 --lr-end 1",
            "quick, lr_end .05": "--steps 4:5 --iterations 180 --lr 0.002 --lr-end 0.05",
            "quick, clip .3": "--steps 4:5 --iterations 180 --lr 0.002 --clip 0.3",
            "quick, clip 1": "--steps 4:5 --iterations 180 --lr 0.002 --clip 1",
            "quick, C .55": "--steps 4:5 --iterations 180 --lr 0.002 --C 0.55",
            "quick, both": "--steps 4:5 --iterations 160 --component both --lr 0.0007",
            "quick, U-Net": "--steps 4:5 --iterations 160 --component unet --lr 0.0015",
        }.items()
    },
    "each image": {  # its own gradient shortened; of the cost of "quick"
        f"image {longest:g}{name}": (
            f"image={longest:g} --steps 4:5 --iterations 180 --grad-steps 1 --lambda-img 1 --C 0.7 --clip 0.1 {options}"
        )
        for name, options in {
            "": "",
            ", clip .3": "--clip 0.3",
            ", lambda .5": "--lambda-img 0.5",
            ", lambda 2": "--lambda-img 2",
            ", clip .03, lambda .5": "--clip 0.03 --lambda-img 0.5",
            ", clip .03, lambda .5, warm-up 30": "--clip 0.03 --lambda-img 0.5 --warmup 30",
            ", clip 1": "--clip 1 --warmup 30",
            ", clip 1, beta_1 .7": "--clip 1 --warmup 30 --beta-1 0.7",
            ", clip .03, lambda .2": "--clip 0.03 --lambda-img 0.2 --warmup 30",
            ", clip .03, lambda .2, lr .005": "--clip 0.03 --lambda-img 0.2 --warmup 30 --lr 0.005",
        }.items()
        for longest in (0.005, 0.01, 0.02, 0.05)
    },
    "by turns": {  # of the cost of "quick"
        name: f"{way} --grad-steps 1 --clip 0.1 --lambda-img 1 --C 0.7 --warmup 30 --steps 4:5 {options}"
        for name, (way, options) in {
            "quick, replay .5": ("replay=0.5", "--iterations 180"),
            "quick, 3 summed, lr .004": ("sum=3", "--iterations 180 --ema 0.9 --lr 0.004"),
            "quick, 3 summed, lr .006": ("sum=3", "--iterations 180 --ema 0.9 --lr 0.006"),
            "quick, 3 summed, lr .01": ("sum=3", "--iterations 180 --ema 0.9 --lr 0.01"),
            "quick, 3 summed, lr .006, beta_1 .7": (
                "sum=3",
                "--iterations 180 --ema 0.9 --lr 0.006 --beta-1 0.7",
            ),
            "quick, originals every 2": ("every=2", "--iterations 235"),
            "quick, originals every 3": ("every=3", "--iterations 260"),
        }.items()
    },
    "half an hour": {  # of two cores, with an evaluation
        name: f"--steps 4:5 --iterations 1000 --grad-steps 1 --clip 0.1 --lambda-img 1 --C 0.7 --lr 0.002 {options}"
        for name, options in {
            "1000 iterations": "",
            "1000 iterations, lr .001": "--lr 0.001",
            "1000 iterations, lr_end .02": "--lr-end 0.02",
            "1000 iterations, guidance 1 and 12": "--guidance 1,12",
            "1000 iterations, 1 to 12, unread, lr .003": "--guidance 1:12 --empty-prompt unread --lr 0.003",
        }.items()
    },
    "guidance": {  # of the cost of "quick"
        name: f"{way} {QUICK} {options}"
        for name, (way, options) in {
            "1 and 12 by turns": ("", "--guidance 1,12"),
            "2.5 and 12 by turns": ("", "--guidance 2.5,12"),
            "1 to 12": ("", "--guidance 1:12"),
            "empty prompt frozen": ("", "--empty-prompt frozen"),
            "empty prompt held": ("empty=1", ""),
            "empty prompt held more": ("empty=10", ""),
            "1 and 12 by turns, empty prompt held": ("empty=1", "--guidance 1,12"),
            "empty prompt unread": ("", "--empty-prompt unread"),
            "empty prompt unread, lr .004": ("", "--empty-prompt unread --lr 0.004"),
            "empty prompt unread, lr .003": ("", "--empty-prompt unread --lr 0.003"),
            "12 alone": ("", "--guidance 12"),
            "12 alone, empty prompt frozen": ("", "--guidance 12 --empty-prompt frozen"),
            "12 alone, unread, lr .004": ("", "--guidance 12 --empty-prompt unread --lr 0.004"),
            "7.5 alone, unread, lr .004": ("", "--guidance 7.5 --empty-prompt unread --lr 0.004"),
            "1 to 12, unread, lr .004": ("", "--guidance 1:12 --empty-prompt unread --lr 0.004"),
            "leaning world": ("leaning=0", ""),
            "leaning world, empty prompt frozen": ("leaning=0", "--empty-prompt frozen"),
            "leaning world, empty prompt unread": ("leaning=0", "--empty-prompt unread --lr 0.004"),
        }.items()
    },
    "prefix": {  # of the cost of "quick"
        name: f"{way} {QUICK} --component prefix --lr {rate:g} {options}"
        for name, (rate, way, options) in {
            **{f"prefix, lr {rate:g}": (rate, "", "") for rate in (0.03, 0.1, 0.3, 1)},
            "prefix, lr .1, warm-up 30": (0.1, "", "--warmup 30"),
            "prefix, lr .1, constant": (0.1, "", "--lr-end 1"),
            "prefix, lr .1, length 4.7": (0.1, "length=4.7", ""),
            "prefix, lr .1, of words": (0.1, "words=0", ""),
            "prefix, lr .1, of genders": (0.1, "words=1", ""),
            "prefix, lr .1, 16 tokens": (0.1, "", "--tokens 16"),
            "prefix, lr .03, 16 tokens": (0.03, "", "--tokens 16"),
            "prefix, lr .3, of genders": (0.3, "words=1", ""),
            "prefix, lr .3, 16 tokens": (0.3, "", "--tokens 16"),
            "prefix, lr .3, length 4.7": (0.3, "length=4.7", ""),
            "prefix, lr .3, 1000 iterations": (0.3, "", "--iterations 1000"),
        }.items()
    },
    "soft prompts": {
        f"{kind}, lr {rate:g}": f"{QUICK} --component {kind} --lr {rate:g}"
        for kind, rates in (
            ("suffix", (0.03, 0.1, 0.3)),
            ("deep", (0.01, 0.03, 0.1)),
            ("generated", (0.001, 0.003, 0.01)),
        )
        for rate in rates
    }
    | {"suffix, lr .1, 1000 iterations": f"{QUICK} --component suffix --lr 0.1 --iterations 1000"},
    "prompts": {
        "replay .5": "replay=0.5",
        "no explicit": "--explicit-every 0",
        "explicit 6": "--explicit-every 6",
    },
    "classes": {  # more than two of them
        f"{attr}, {name}": f"asked=1 --attr {attr} {options}"
        for attr in ("skin_tone", "gender,skin_tone")
        for name, options in {
            "reach": "",
            "leave": "--threshold leave",
            "soft": "--targets soft",
            "C .4": "--C 0.4",
        }.items()
    },
    "classes, quick": {
        f"quick, {attr}, {name}": (
            f"asked=1 --attr {attr} --steps 4:5 --iterations 120 --grad-steps 1 --clip 0.1 --C 0.7 {own} {options}"
        )
        for attr, own in (
            ("skin_tone", "--lr 0.002 --lambda-img 1"),
            ("gender,skin_tone", "--lr 0.001 --lambda-img 2.5"),
        )
        for name, options in {"reach": "", "leave": "--threshold leave", "soft": "--targets soft"}.items()
    },
}
GROUPS = {group: {name: words.strip() for name, words in of.items()} for group, of in GROUPS.items()}
for group in ("clip", "length", "rates", "images", "together"):  # screened after "terms"
    GROUPS[group] = {name: f"{words} --grad-steps 1" for name, words in GROUPS[group].items()}
OPTIONS = (
    f"--attr gender {FIRST_OPTIONS} --validate-every 0 --grid-every 0 --checkpoint-every 25 --evaluate none"
)
COLUMNS = ("run", "seeds", "bias", "slope", "intercept", "rms gap", "CLIP-T", "CLIP-I", "DINO")
COLUMNS += ("none", "blended", "explicit", "needless", "asked", "min")
SCALES = (1, None, 5, 12)  # of guidance
SHORT = ("run", "seeds", "bias", "slope", "intercept", "CLIP-T", "CLIP-I", "none")  # for a document


def place(folder: Path, name: str, seed: int, iterations: int) -> Path:
    """A run's own folder."""
    return folder / f"{name.replace(' ', '_').replace(',', '').replace('/', 'by')}-{iterations}-{seed}"


def finetune(options: str, seed: int, iterations: int, folder: Path) -> None:
    """Makes a run, or what is missing of it. Raises UserError where it can't be made, or was made with others."""
    beside = folder.with_name(f"{folder.name}.command")
    if (
        folder.exists()
        and (made := beside.read_text(encoding="utf-8").strip() if beside.exists() else "") != options
    ):
        raise UserError(f"{folder}: is a run of {made!r}, not of {options!r}; move it away.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(options, encoding="utf-8")
    if (folder / FILE).exists():
        return
    first, _, rest = options.partition(" ")
    if "=" in first:  # a row of variants.py
        program, options = ["tests/benchmarks/variants.py", first], rest
    else:
        program = ["train.py"]
    words = [*OPTIONS.split(), "--iterations", iterations, *options.split(), "--seed", seed, "--out", folder]
    if (folder / SETTINGS).exists():
        words = ["--resume", folder]
    if code := call(*program, *words):
        raise UserError(f"{folder}: its run ended with {code}.")


def look(bundle: Bundle, run: Path, options: str, strength: float, scale: float | None, part: str) -> dict:
    """What a part of the occupations shows of a run's adapter, beside the original; a scale of guidance, or its own."""
    target, recipe = of_settings(read_settings(run))
    (prompts,) = read_prompts(OCCUPATIONS, None, bundle.path, list(target.classes))
    drawing = Drawing(recipe.eval_steps, recipe.eval_guidance if scale is None else scale, recipe.end)
    how = EvaluationSettings(bundle, target, drawing, kept=run.parent / KEPT)
    models = {"before": bundle, "after": load_adapter(bundle, run / FILE, strength)}
    if options.startswith("leaning="):
        row = float(options.split()[0].partition("=")[2])
        models = {when: leaning_world(bundle, row, model) for when, model in models.items()}
    looked = compare(how, models, PromptPart(prompts, part, IMAGES, EXPLICIT_IMAGES))
    return {when: evaluated.report for when, evaluated in looked}


def row_of(report: dict) -> dict:
    """The numbers of a table's row, by the judges that have them."""
    judges = report["judges"]

    def of(values, judge=CLASSIFIER):
        return (values or {}).get(judge)

    lean = of(report.get("leans")) or {"slope": [None], "intercept": [None]}
    gap = judges[CLASSIFIER]["sure"]["rms_gap"] or {"value": None}
    return {
        "bias": [judges[judge]["mean"] for judge in judges],
        "slope": lean["slope"][0],
        "intercept": lean["intercept"][0],
        "rms gap": gap["value"],
        "interval": [gap.get("low"), gap.get("high")],
        "CLIP-T": report["clip_t"]["matched"],
        "CLIP-I": report.get("clip_i"),
        "DINO": report.get("dino"),
        "none": report.get("none"),
        "blended": report.get("blended"),
        "explicit": of(report.get("explicit")),
        "needless": (of(report.get("flips")) or {}).get("needless"),
    }


def of_run(run: Path) -> dict:
    """What a run's metrics say: minutes, and the share of batches of neutral prompts that asked anybody to change."""
    rows = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    asked = [row["asked"] > 0 for row in rows if "asked" in row and "bias" in row]
    return {"min": minutes(run), "asked": sum(asked) / len(asked) if asked else None}


def known(report: Path) -> dict[str, dict]:
    """What a report has so far."""
    return read_json(report) if report.exists() else {}


def mean(values: list) -> float | str | None:
    """Of the seeds; by two judges "a / b"."""
    if any(isinstance(v, list) for v in values):
        means = [mean(list(of_judge)) for of_judge in zip(*values, strict=True)]
        return " / ".join("–" if v is None else f"{v:.3f}" for v in means)
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def tables(found: dict[str, dict], iterations: int, columns: tuple[str, ...] = COLUMNS) -> str:
    """The table of each group that has rows, and that of the originals."""

    def row(name, seeds):
        return [name, len(seeds), *(mean([s.get(key) for s in seeds]) for key in columns[2:])]

    lines = [row(key, [of]) for key, of in found.items() if key.startswith(ORIGINAL)]
    texts = ["### originals\n\n" + table(list(columns), lines)] if lines else []
    for group, rows in GROUPS.items():
        lines = []
        for name in rows:
            shown: dict[str, list] = {}  # the row's name, with its strength and scale -> its seeds
            for key, of in found.items():
                label, _, of_key = key.rpartition("-")[0].rpartition("-")
                if re.split(" x | at |, unseen", label)[0] == name and of_key == str(iterations):
                    shown.setdefault(label, []).append(of)
            lines += [row(label, seeds) for label, seeds in shown.items()]
        if lines:
            texts.append(f"### {group}\n\n" + table(list(columns), lines))
    return "\n\n".join(texts)


def by_scale(found: dict[str, dict], iterations: int) -> str:
    """A table of seed 0 of the runs that were looked at with all SCALES: bias, and slope and intercept of its lean."""
    rows = []
    for name in (name for of_group in GROUPS.values() for name in of_group):
        keys = [f"{name}{f' at {scale:g}' if scale else ''}-{iterations}-0" for scale in SCALES]
        if all(key in found for key in keys):
            cells = [
                "{:.2f} ({:.2f}, {:+.2f})".format(r["bias"][0], r["slope"], r["intercept"])
                for r in map(found.get, keys)
            ]
            rows.append([name, *cells])
    heads = [f"at {scale:g}" if scale else "at the bundle's 2.5" for scale in SCALES]
    return table(["run", *heads], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", metavar="NAME", help="groups or rows")
    parser.add_argument("--list", action="store_true", help="what there is to make; makes nothing")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--unseen", action="store_true", help="looks at the 50 unseen occupations")
    parser.add_argument("--scales", nargs="*", type=float, help="of guidance, in place of the bundle's")
    parser.add_argument("--strengths", nargs="*", type=float, default=[1.0], help="of the adapters judged")
    parser.add_argument("--short", action="store_true", help="only prints the tables, of fewer columns")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "screens")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "results" / "screens.json")
    options = parser.parse_args()
    rows = {name: of for group in GROUPS.values() for name, of in group.items()}
    names = [n for one in options.only or GROUPS for n in GROUPS.get(one, [one])]
    if unknown := set(names) - set(rows):
        parser.error(f"--only names {min(unknown)}; expected some of {', '.join([*GROUPS, *rows])}")
    if options.short:
        found = known(options.report)
        print(tables(found, options.iterations, SHORT), by_scale(found, options.iterations), sep="\n\n")
        return
    bundle, failed = None, []
    for seed, name, strength, scale in itertools.product(
        options.seeds, names, options.strengths, options.scales or [None]
    ):
        at = ", unseen" * options.unseen + ("" if scale is None else f" at {scale:g}")
        key = f"{name if strength == 1 else f'{name} x {strength:g}'}{at}-{options.iterations}-{seed}"
        words, done = rows[name], known(options.report).get(key)
        if done and done["command"].strip() != words:
            parser.error(f"{options.report}: {key} was made with {done['command']!r}, not {words!r}")
        if options.list:
            print(f"{'done ' if done else 'to do'} {key}: {words}")
        if options.list or done:
            continue
        run = place(options.folder.resolve(), name, seed, options.iterations)
        try:
            finetune(words, seed, options.iterations, run)
            bundle = bundle or load_bundle(DEFAULT)
            with held(run):
                reports = look(
                    bundle, run, words, strength, scale, "test" if options.unseen else "validation"
                )
        except UserError as error:
            failed.append(f"{key}: {error}")
            continue
        world = ", leaning" if words.startswith("leaning=") else ""
        attr = ",".join(of_settings(read_settings(run))[0].classes)
        new = {
            f"{ORIGINAL}, {attr}{world}{at}": row_of(reports["before"]),
            key: {"command": words, **row_of(reports["after"]), **of_run(run)},
        }
        write_json(options.report, known(options.report) | new)  # another process may write its rows, too
        print(key, new[key], flush=True)
    print(tables(known(options.report), options.iterations))
    print(*failed, sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
