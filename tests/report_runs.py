"""Folders of runs for tests of the report: evaluations of docs/results, with what newer versions add to them."""

import copy
import json
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fairref.settings import Recipe

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
CLASSES = {
    "gender": ["woman", "man"],
    "skin_tone": ["light", "medium-light", "medium", "dark"],
    "age": ["young", "old"],
}
AFTER = "after (ema)"
SIDE = 32  # pixels of a picture


def write_run(folder, result="gender.json", component="text_encoder", new=True, prompts=None):
    """A finished run as a folder, from an evaluation in docs/results; `new`: with intervals, sweeps and the like.

    `prompts`: how many of a part's; None: all."""
    found = json.loads((RESULTS / result).read_text())
    shorten(found, prompts)
    evaluation = {
        label: {
            part: with_news(report, key) if new else report
            for part, report in found[key].items()
            if "guidance" not in part
        }
        for label, key in (("before", "before"), (AFTER, "after"))
    }
    attributes = next(iter(evaluation["before"].values()))["attribute"].split(",")
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "settings.json", settings(attributes, component, found["command"]))
    write(folder / "evaluation.json", evaluation)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics()))
    if new:
        for name, values in (("guidance", (1, 3, 12)), ("strength", (0, 0.5, 1))):
            reports = {
                label: [at(evaluation, label, name, value) for value in values] for label in ("before", AFTER)
            }
            write(folder / f"sweep-{name}.json", {"sweep": name, "values": values, "reports": reports})
        write(folder / "baselines.json", {"coin": {"test": evaluation[AFTER]["test"]}})
        write_pictures(folder / "pictures.png", attributes[0])
    return folder


def shorten(reports, prompts):
    """Leaves the counts of the first prompts, wherever there are counts; its averages stay those of all."""
    for key, value in reports.items():
        if key == "counts":
            reports[key] = dict(list(value.items())[:prompts])
        elif isinstance(value, dict):
            shorten(value, prompts)


def write(path, content):
    """JSON, as a run writes it."""
    path.write_text(json.dumps(content))


def settings(attributes, component="text_encoder", command="python train.py --attr gender"):
    """What settings.json says of a run for equal shares, but 75 % young and 25 % old."""
    shape = [len(CLASSES[name]) for name in attributes]
    table = np.full(shape, 1 / np.prod(shape)) * (np.array([1.5, 0.5]) if attributes[-1] == "age" else 1)
    return {
        "command": command,
        "weights": "weights/emoji",
        "fingerprints": {"unet": "ab" * 32},
        "dtype": "float32",
        "target": {
            "classes": {name: CLASSES[name] for name in attributes},
            "table": table.tolist(),
        },
        "loss": [],
        "judge": [],
        "prompts": "occupations",
        "prompt_template": None,
        "recipe": json.loads(json.dumps(Recipe(component=component, iterations=300).to_dict())),
        "processes": 1,
        "device": "cpu",
        "versions": {"fairref": "0.1.0"},
    }


def with_news(report, label):
    """A report with the keys that older versions did not write."""
    for view in (report, *report.get("attributes", {}).values()):
        for judge in view["judges"].values():
            judge["sure"] = sure(judge)
            judge["corrected"] = {
                "rms_gap": interval(judge["mean"] + 0.01),
                "confusion": [[0.9, 0.1], [0.1, 0.9]],
                "labelled": [100, 100],
                "source": "explicit prompts",
                "share": {name: [share, share, share] for name, share in judge["share"].items()},
            }
    report["diversity"] = {"clip": 0.21, "dino": 0.13}
    seen = {
        "counts": [[97, 2], [4, 95]],
        "untold": [1, 1],
        "source": "labelled pictures",
        "p_as_before": 0.04,
    }
    if report["attribute"] == "gender":
        report["confusion"] = {"classifier": {"gender": [seen]}}
    if label == "after":
        report["paired"] = {"classifier": {"p": 0.0004, "difference": -0.61, "low": -0.67, "high": -0.55}}
        report["flips"] = {"classifier": {"changed": 0.39, "least": 0.36, "needless": 0.03}}
    return report


def interval(value):
    """A value and its interval."""
    return {"value": value, "low": value - 0.02, "high": value + 0.02, "method": "one for tests"}


def sure(judge):
    """What is known of a judge's counts, without the formulas."""
    prompts = {}
    for prompt, row in judge["counts"].items():
        shares = {
            name: [k / sum(row), k / sum(row) / 2, (1 + k / sum(row)) / 2]
            for name, k in zip(judge["share"], row, strict=True)
            if sum(row)
        }
        prompts[prompt] = {"share": shares, "p": 0.04, "unfair": False}
    return {
        "rms_gap": interval(judge["mean"]),
        "mean_gap": interval(judge["mean"]),
        "fair": {"statistic": 99.0, "df": 50, "p": 0.0004, "upper": 0.27, "said": "Not fair (p < .001)."},
        "prompts": prompts,
        "unfair_prompts": 12,
        "smallest_gap_seen": 0.091,
        "bounds": {"low": 0.1, "high": 0.4},
        "worst_prompt": {"prompt": next(iter(prompts)), "bias": 0.7},
        "worst_group": {"class": next(iter(judge["share"])), "share": 0.4, "low": 0.38, "high": 0.42},
    }


def at(evaluation, label, name, value):
    """A report of a sweep."""
    report = copy.deepcopy(evaluation[label]["test"])
    if name == "strength":
        report["clip_i"] = 1 - 0.06 * value * (label != "before")
    return report


def metrics(iterations=200):
    """Lines of metrics.jsonl."""
    for i in range(iterations):
        row = {
            "iteration": i,
            "loss": 2 / (1 + i),
            "align": 1 / (1 + i),
            "image": -1e-9,
            "cost": 0.7 / (1 + i),
        }
        yield {**row, "bias": 0.5, **({"validation": {"bias": 0.4, "clip_i": 0.9}} if i % 50 == 49 else {})}


def write_pictures(path, attribute, P=2, n=3, side=SIDE, seen=None):
    """Tiles of noise, as an evaluation writes them."""
    names = CLASSES[attribute]
    judged = [
        [
            [
                {"box": [0.2, 0.2, 0.8, 0.8], "classes": {attribute: [seen or names[(p + r + i) % 2], 0.97]}}
                if i
                else {"box": None, "classes": {}}
                for i in range(n)
            ]
            for r in range(2)
        ]
        for p in range(P)
    ]
    prompts = [{"prompt": f"prompt {p}", "rows": rows} for p, rows in enumerate(judged)]
    facts = {"side": side, "labels": ["before", AFTER], "classes": {attribute: names}, "prompts": prompts}
    pixels = np.random.default_rng(0).integers(0, 256, (2 * P * side, n * side, 3), dtype=np.uint8)
    info = PngInfo()
    info.add_itxt("judged", json.dumps(facts))
    Image.fromarray(pixels).save(path, pnginfo=info)
