"""What a run's own batches say on the way: of the lean that is left, and of swings of all prompts at once.

    python tests/benchmarks/swings.py RUN [RUN ...] [--window 20]

The occupations of finetuning stand in pairs: one that the original draws as women, then one that it draws as men. Of a
window of iterations, "lean" is half the difference of the two groups' mean log-odds of a woman, and "common" is their
mean: a population that turns to one gender. Log-odds of k of n are those of (k + 1/2) / (n - k + 1/2). A window has few
prompts, so each number is unsure by about .2.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))
from measure import table

from fairref.bundle.loading import DEFAULT, load_bundle
from fairref.prompts.sets import OCCUPATIONS, read_prompts
from fairref.training.checkpoints import METRICS


def windows(rows: list[dict], place: dict[str, int], window: int) -> list[dict]:
    """The rows of metrics.jsonl, and each prompt's place in the list -> a row for each window."""
    found = []
    for start in range(0, len(rows), window):
        part = rows[start : start + window]
        groups: tuple[list, list] = ([], [])
        for row in part:
            if "bias" in row and row["prompt"] in place:  # else it names a gender
                women, men = row["counts"]
                groups[place[row["prompt"]] % 2].append(np.log((women + 0.5) / (men + 0.5)))
        of_women, of_men = (float(np.mean(of)) if of else float("nan") for of in groups)
        image = float(np.mean([row["image"] for row in part]))
        lean, common = (of_women - of_men) / 2, (of_women + of_men) / 2
        found.append({"iteration": start, "lean": lean, "common": common, "image": image})
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--window", type=int, default=20)
    args = parser.parse_args(argv)
    bundle = load_bundle(DEFAULT)
    (prompts,) = read_prompts(OCCUPATIONS, None, bundle.path, ["gender"])
    place = {prompt: n for n, prompt in enumerate(prompts.train)}
    for run in args.runs:
        rows = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
        lines = [
            [w["iteration"], *(f"{w[k]:+.2f}" for k in ("lean", "common")), f"{w['image']:.3f}"]
            for w in windows(rows, place, args.window)
        ]
        print(f"{run}\n\n{table(['from iteration', 'lean', 'common', 'L_img'], lines)}\n")


if __name__ == "__main__":
    main()
