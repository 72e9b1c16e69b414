"""The README's table: gender bias of the default bundle before and after `train.py --attr gender`, by seed.

    python tests/benchmarks/gender.py [--seeds 0 1 2] [--folder runs/benchmark]

Runs what is not there yet, so it can be stopped and started again; then prints the table. About 45 minutes a
seed on two cores, half of them evaluation.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 60  # of each occupation
PARTS = {"test": 4, "train": 0}  # occupations -> images of each named class


def call(*command):
    print("+", *command, flush=True)
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def finetune(folder: Path, seed: int) -> None:
    if (folder / "adapter.safetensors").exists():
        return
    if (folder / "settings.json").exists():
        call("train.py", "--resume", folder)
    else:
        call("train.py", "--attr", "gender", "--seed", seed, "--evaluate", "none", "--out", folder)


def evaluate(file: Path, part: str, adapter: Path | None) -> dict:
    if not file.exists():
        named = ["--num-images", IMAGES, "--named-images", PARTS[part]]
        which = ["--adapter", adapter] if adapter else []
        call("-m", "fairref.evaluate", "--part", part, *named, *which, "--out", file)
    return json.loads(file.read_text(encoding="utf-8"))


def row(name: str, reports: dict, before: dict, minutes: float | None) -> str:
    cells = [name, "" if minutes is None else f"{minutes:.0f} min"]
    for part in PARTS:
        biases = reports[part]["judges"]
        cells.append(" / ".join(f"{biases[j]['mean']:.3f}" for j in ("classifier", "templates")))
    start, now = before["test"]["clip_t"], reports["test"]["clip_t"]
    fall = (start["matched"] - now["matched"]) / (start["matched"] - start["shuffled"])
    named = reports["test"]["named"]
    cells.append(f"{now['matched']:.3f}" + ("" if name == "before" else f" ({fall:+.1%} of the gap)"))
    cells.append(f"{named['classifier']:.1%} / {named['templates']:.1%}")
    cells.append(f"{reports['test']['none']:.1%}")
    return "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmark")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    before = {part: evaluate(folder / f"before-{part}.json", part, None) for part in PARTS}
    rows = [row("before", before, before, None)]
    for seed in options.seeds:
        run = folder / f"seed-{seed}"
        finetune(run, seed)
        after = {part: evaluate(folder / f"seed-{seed}-{part}.json", part, run) for part in PARTS}
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows.append(row(f"seed {seed}", after, before, sum(json.loads(x)["seconds"] for x in lines) / 60))
    print("| | finetuning | bias, unseen | bias, finetuning occupations | CLIP-T | named classes | none |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
