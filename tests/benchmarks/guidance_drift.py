"""Why an adapted model's bias changes with the guidance scale: c and the empty prompt's c_empty moved one at a time.

    python tests/benchmarks/guidance_drift.py RUN [RUN ...] [--images 60] [--scales 1 2.5 5 7.5 12]
        [--folder runs/drift] [--report docs/results/drift.json]

To first order (docs/guidance.md) the lean at scale s is that at s_0 plus (s - s_0) times what the guidance direction
leans: a line in s for each occupation, whose slope the changes of c and of c_empty make together. Each run is a text
encoder's adapter, drawn with in four ways: c and c_empty changed, c alone, c_empty alone, and c_empty by half. The 12
validation occupations are judged by the classifier, and what is judged is kept in --folder. Each scale has noise of its
own, the same for all ways, so that the points of a line are independent. About 20 core minutes a run.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))
from measure import ROOT, table

from fairref.bundle.loading import DEFAULT, Bundle, load_bundle
from fairref.evaluation.judging import SEED, EvaluationSettings, drawn_by, judge_prompts
from fairref.evaluation.statistics import counts_by_judge
from fairref.fairness.attributes import parse_attributes, product_target
from fairref.files.paths import read_json, write_json
from fairref.generation.adapters import load_adapter
from fairref.generation.drawing import Drawing
from fairref.prompts.sets import OCCUPATIONS, read_prompts

JUDGE, STEPS = "classifier", 12
ORIGINAL = "original"


def ways(bundle: Bundle, run: Path) -> dict[str, Bundle]:
    """Name -> the bundle whose c, c_empty or both an adapter changes."""
    whole, half = load_adapter(bundle, run), load_adapter(bundle, run, 0.5)
    made = {
        "both": whole,
        "c alone": replace(whole, empty_encoder=bundle.text_encoder),
        "c_empty alone": replace(bundle, empty_encoder=whole.text_encoder),
        "c, and half of c_empty": replace(whole, empty_encoder=half.text_encoder),
    }
    # what is kept knows a model by its adapters
    return {way: replace(model, adapters=(*whole.adapters, (way, 1.0))) for way, model in made.items()}


def log_odds(counts: np.ndarray) -> np.ndarray:
    """Of counts (..., 2)."""
    k, rest = np.moveaxis(counts + 0.5, -1, 0)
    return np.log(k / rest)


def lines(scales: Sequence[float], counts: np.ndarray) -> dict[str, float]:
    """Straight lines in s through each occupation's log-odds, counts (S, P, 2), by least squares weighed by noise.

    slope: the mean over occupations, its standard error, and the standard deviation over occupations, from which
    noise is taken (0: they are alike). misfit: Pearson's statistic of the lines over its degrees of freedom, 1 where
    noise alone is left; and that of one line through the mean log-odds, which sees a bend that all share.
    """
    y, n = log_odds(counts), counts.sum(-1)
    shares = (counts[..., 0] + 0.5) / (n + 1)
    weights = n * shares * (1 - shares)  # 1 / variance of log-odds
    s = np.asarray(scales)[:, None]
    centre = (weights * s).sum(0) / weights.sum(0)
    level = (weights * y).sum(0) / weights.sum(0)
    spread = (weights * (s - centre) ** 2).sum(0)
    slopes = (weights * (s - centre) * y).sum(0) / spread  # (P,)
    left = y - level - slopes * (s - centre)
    free = left.size - 2 * len(slopes)
    noise = float(np.mean(1 / spread))
    mean, weight = y.mean(1), y.shape[1] ** 2 / (1 / weights).sum(1)  # (S,)
    of_mean = np.polynomial.Polynomial.fit(scales, mean, 1, w=np.sqrt(weight))
    bend = (weight * (mean - of_mean(np.asarray(scales))) ** 2).sum() / (len(scales) - 2)
    return {
        "slope": float(slopes.mean()),
        "error": float(np.sqrt(noise / len(slopes))),
        "sd": float(np.sqrt(max(slopes.var(ddof=1) - noise, 0))),
        "misfit": float((weights * left**2).sum() / free),
        "bend": float(bend),
    }


def rows(report: dict) -> list[list]:
    """Those of the table: a run's way, log-odds at each scale, their lines, the bias at each scale."""
    found = []
    for key, of_scales in report["counts"].items():
        counts = np.array([of_scales[str(scale)] for scale in report["scales"]])  # (S, P, 2)
        shares = counts / counts.sum(-1, keepdims=True)
        line = lines(report["scales"], counts)
        odds = " ".join(f"{v:+.2f}" for v in log_odds(counts).mean(1))
        gaps = [f"{abs(of_s[:, 0] - of_s[:, 1]).mean():.2f}".removeprefix("0") for of_s in shares]
        slopes = [f"{line['slope']:.2f} ± {line['error']:.2f}".replace("0.", ".")]
        slopes += [f"{line[key]:.2f}" for key in ("sd", "misfit", "bend")]
        found.append([key, odds, *slopes, " ".join(gaps)])
    return found


def lines_of(report: dict) -> str:
    """The table."""
    scales = " ".join(f"{scale:g}" for scale in report["scales"])
    columns = ("slope", "sd", "misfit", "of the mean", "bias at each")
    return table(["model", f"log-odds at {scales}", *columns], rows(report))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0, 2.5, 5.0, 7.5, 12.0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "drift")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "results" / "drift.json")
    options = parser.parse_args()
    bundle = load_bundle(DEFAULT)
    target = product_target(parse_attributes("gender", bundle.attributes))
    (concept,) = read_prompts(OCCUPATIONS, None, bundle.path, ["gender"])
    models = {ORIGINAL: bundle}
    for run in options.runs:
        models |= {f"{run.name}, {way}": model for way, model in ways(bundle, run).items()}
    settings = {"scales": options.scales, "images": options.images}
    report = (
        read_json(options.report) if options.report.exists() else {**settings, "adapters": {}, "counts": {}}
    )
    made_of = {key: [of for of, _ in model.adapters][:1] for key, model in models.items()}
    if any(report[key] != value for key, value in settings.items()) or any(
        of != made_of[key] for key, of in report["adapters"].items() if key in made_of
    ):
        parser.error(f"{options.report}: is of other scales, images or adapters; give another --report")
    report["adapters"] |= made_of
    for key, model in models.items():
        of_scales = report["counts"].setdefault(key, {})
        for place, scale in enumerate(options.scales):
            if str(scale) not in of_scales:
                seed = SEED + place
                how = EvaluationSettings(bundle, target, Drawing(STEPS, scale), seed, kept=options.folder)
                source = drawn_by(how, model, f"{key} at {scale:g}")
                judged = judge_prompts(how, source, concept.validation, options.images)
                counts = counts_by_judge(judged, target.classes)[JUDGE]
                of_scales[str(scale)] = counts.reshape(len(judged), -1).tolist()
                write_json(options.report, report)
    print(lines_of(report))


if __name__ == "__main__":
    main()
