"""The README's ablation: what each term of the loss keeps, on the default bundle, one seed.

    python tests/benchmarks/ablation.py [--seed 0] [--folder runs/ablation]

Runs what is not there yet, so it can be stopped and started again; then prints the table.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {
    "align": ["--lambda-img", 0, "--lambda-face", 0],
    "align + img": ["--lambda-face", 0],
    "align + img + face": [],
}
KEPT = {"clip_i": "CLIP-I", "dino": "DINO", "background": "background", "clothes": "clothes"}


def finetune(folder: Path, options: list) -> dict:
    """The run in `folder`, made or gone on with -> its evaluation on unseen occupations."""
    if not (folder / "evaluation.json").exists():
        new = ["--attr", "gender", "--evaluate", "ema", "--eval-images-train", 0, "--out", folder, *options]
        given = ["--resume", folder] if (folder / "settings.json").exists() else new
        print("+", "train.py", *given, flush=True)
        subprocess.run([sys.executable, "train.py", *map(str, given)], cwd=ROOT, check=True)
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


def row(name: str, report: dict) -> str:
    biases = " / ".join(f"{report['judges'][judge]['mean']:.3f}" for judge in ("classifier", "templates"))
    kept = [f"{report[key]:.3f}" if key in report else "" for key in KEPT]
    return "| " + " | ".join([name, biases, f"{report['clip_t']['matched']:.3f}", *kept]) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "ablation")
    options = parser.parse_args()
    rows = []
    for name, given in VARIANTS.items():
        folder = options.folder.resolve() / name.replace(" + ", "-")
        results = finetune(folder, ["--seed", options.seed, *given])
        if not rows:
            rows.append(row("before", results["before"]["test"]))
        rows.append(row(name, results["after (ema)"]["test"]))
    print("| | bias, unseen | CLIP-T | " + " | ".join(KEPT.values()) + " |")
    print("|" + "---|" * (3 + len(KEPT)))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
