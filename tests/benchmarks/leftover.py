"""What is left of each prompt's lean, beside the line of after over before: is it its own, the run's, or the pictures'?

    python tests/benchmarks/leftover.py RUN RUN [RUN ...] [--part test] [--noises 2]
        [--report docs/results/leftover.json]

Of each run's adapter, 60 images of each occupation of a part are judged on several noises; what is judged is kept
beside the runs. Log-odds after are fitted by a line in log-odds before, for each run and noise apart. Of what remains,
the variance over prompts is parted by who shares it: all runs on all noises (it is the prompt's own), one run on all
noises, one noise in all runs, or nobody. 60 images tell a share of one half with an error of .26 in log-odds.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
from scipy.stats import linregress

sys.path.append(str(Path(__file__).resolve().parent))
from measure import ROOT, table

from fairref.bundle.loading import load_bundle
from fairref.evaluation.judging import SEED, EvaluationSettings, drawn_by, judge_prompts
from fairref.evaluation.kept import KEPT
from fairref.files.paths import write_json
from fairref.generation.adapters import FILE, load_adapter
from fairref.generation.drawing import Drawing
from fairref.prompts.sets import OCCUPATIONS, read_prompts
from fairref.training.checkpoints import read_settings
from fairref.training.stored import of_settings

IMAGES = 60
SHARED = ("the prompt's own", "the run's", "the noise's", "nobody's")


def leftover(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Log-odds (P,) before and after -> what remains of the latter beside the line."""
    fit = linregress(before, after)
    return after - fit.slope * before - fit.intercept


def parted(left: np.ndarray) -> dict[str, float]:
    """What remains, (R runs, M noises, P prompts) with R, M >= 2 -> the variance over prompts by who shares it."""
    R, M, P = left.shape
    products = np.einsum("rmp,snp->rmsn", left, left) / (P - 2)  # of a line's remainders
    same_run = np.eye(R, dtype=bool)[:, None, :, None]
    same_noise = np.eye(M, dtype=bool)[None, :, None, :]

    def mean(run, noise):
        return float(
            products[np.broadcast_to((same_run == run) & (same_noise == noise), products.shape)].mean()
        )

    own, run, noise, all_ = mean(False, False), mean(True, False), mean(False, True), mean(True, True)
    return dict(zip(SHARED, (own, run - own, noise - own, all_ - run - noise + own), strict=True))


def log_odds(settings: EvaluationSettings, model, prompts: list[str], about: str) -> np.ndarray:
    """Of a woman, by the classifier, for each prompt (P,)."""
    judged = judge_prompts(settings, drawn_by(settings, model, about), prompts, IMAGES)
    classes = [of_prompt.classes["classifier"]["gender"] for of_prompt in judged]
    women, men = (np.array([int((k == c).sum()) for k in classes]) for c in (0, 1))
    return np.log((women + 0.5) / (men + 0.5))


def look(runs: list[Path], part: str, noises: int) -> dict:
    """The log-odds of all, and the variance by who shares it."""
    settings = [read_settings(run) for run in runs]
    target, recipe = of_settings(settings[0])
    bundle = load_bundle(settings[0]["weights"])
    (prompts,) = read_prompts(OCCUPATIONS, None, bundle.path, list(target.classes))
    texts = list(getattr(prompts, part))
    drawing = Drawing(recipe.eval_steps, recipe.eval_guidance, recipe.end)
    models = {"before": bundle, **{run.name: load_adapter(bundle, run / FILE) for run in runs}}
    found = {name: [] for name in models}
    for noise, (name, model) in itertools.product(range(noises), models.items()):
        how = EvaluationSettings(bundle, target, drawing, seed=SEED + noise, kept=runs[0].parent / KEPT)
        found[name].append(log_odds(how, model, texts, f"{name}, noise {noise}").tolist())
    before = found["before"]
    left = np.array(
        [
            [leftover(np.array(b), np.array(a)) for b, a in zip(before, found[run.name], strict=True)]
            for run in runs
        ]
    )
    return {"part": part, "prompts": texts, "log-odds": found, "variance": parted(left)}


def lines_of(found: dict) -> str:
    """The table."""
    variance = found["variance"]
    whole = sum(variance.values())
    rows = [[name, f"{value:.3f}", f"{value / whole:.0%}"] for name, value in variance.items()]
    return table(["shared by", "variance of log-odds", "share"], rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--part", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--noises", type=int, default=2)
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "results" / "leftover.json")
    options = parser.parse_args(argv)
    if len(options.runs) < 2 or options.noises < 2:
        parser.error("expected two runs and two noises at least")
    found = look([run.resolve() for run in options.runs], options.part, options.noises)
    write_json(options.report, found)
    print(lines_of(found))


if __name__ == "__main__":
    main()
