"""Folders of runs for tests of the report: evaluations of docs/results, with what newer versions add to them."""

import copy
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from fairref.evaluation.certainty import certainty
from fairref.evaluation.judge_errors import corrected
from fairref.evaluation.paired import paired
from fairref.files.weights import write as save_tensors
from fairref.settings import Recipe

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
CLASSES = {
    "gender": ["woman", "man"],
    "skin_tone": ["light", "medium-light", "medium", "dark"],
    "age": ["young", "old"],
}
AFTER = "after (ema)"
NEWER = {"padding", "made", "judged_by", "diversity", "confusion", "paired", "flips", "leans"}
NEWER |= {"sure", "floor", "corrected"}  # of a judge
SIDE = 32  # pixels of a picture
RIGHT = 0.97  # how often a judge of a confusion is right


def write_run(
    folder, result="gender.json", component="text_encoder", new=True, prompts=None, parts=("test", "train")
):
    """A finished run as a folder, from an evaluation in docs/results; `new`: with intervals, sweeps and the like.

    `prompts`: how many of a part's; None: all. `parts`: those that are left of an evaluation on one concept."""
    evaluation = evaluation_of(result, new, prompts, parts)
    attributes = next(iter(evaluation["before"].values()))["attribute"].split(",")
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "settings.json", settings(attributes, component))
    write(folder / "evaluation.json", evaluation)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics()))
    finish(folder)
    if new:
        for name, values in (("guidance", (1, 3, 12)), ("strength", (0, 0.5, 1))):
            reports = {
                label: [at(evaluation, label, name, value) for value in values] for label in ("before", AFTER)
            }
            write(folder / f"sweep-{name}.json", {"sweep": name, "values": values, "reports": reports})
        write(folder / "baselines.json", {"coin": {"test": evaluation[AFTER]["test"]}})
        write_pictures(folder / "pictures.png", attributes[0])
        write_scores(folder, attributes)
    return folder


PULL = ((3.0, 1.0, 0.0, 0.0), (0.5, 0.5, 0.5, 0.5), (0.0, 0.0, 2.0, 6.0))  # of the images of three iterations


def write_scores(folder, attributes=("gender",), prompts=("prompt a", "prompt b", "prompt a")):
    """What --scores leaves: of four images the classes 0, 0, 1, none, of which the first is told to change."""
    told = {"shown": [0, 0, 1, -1], "target": [1, 0, -1, -1], "confidence": [0.9, 0.95, 0.6, 0.5]}
    for i, (prompt, pull) in enumerate(zip(prompts, PULL, strict=True)):
        tensors = {
            "pull": torch.tensor(pull),
            "pictures": torch.full((4, 8, 8, 3), 40 * i, dtype=torch.uint8),
        }
        tensors |= {f"{kind} {name}": torch.tensor(of) for name in attributes for kind, of in told.items()}
        classes = {name: [f"{name} 0", f"{name} 1"] for name in attributes}
        about = {"iteration": 10 * i, "prompt": prompt, "explicit": False, "apart": 0.0, "classes": classes}
        (folder / "scores").mkdir(exist_ok=True)
        save_tensors(
            folder / "scores" / f"{i:06d}.safetensors", tensors, {**about, "format": "fairref-scores-1"}
        )


def finish(folder):
    """An adapter, as at a run's end."""
    save_file({"prefix": np.ones((2, 3), np.float32)}, folder / "adapter.safetensors")


def evaluation_of(result="gender.json", new=True, prompts=None, parts=("test", "train")):
    """An evaluation in docs/results as evaluation.json has it."""
    return json.loads(_evaluation_of(result, new, prompts, parts))


@cache
def _evaluation_of(result, new, prompts, parts):
    found = older(json.loads((RESULTS / result).read_text()))
    shorten(found, prompts)
    evaluation = {
        label: {part: report for part, report in found[key].items() if "," in part or part in parts}
        for label, key in (("before", "before"), (AFTER, "after"))
    }
    if new:
        for label, parts in evaluation.items():
            for part, report in parts.items():
                add_news(report, evaluation["before"][part] if label == AFTER else None)
    return json.dumps(evaluation)


def older(reports):
    """Without what evaluations have had only since they have intervals."""
    if not isinstance(reports, dict):
        return reports
    return {key: older(value) for key, value in reports.items() if key not in NEWER}


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
    recipe = Recipe(component=component, iterations=300, evaluate="ema", eval_steps=12, eval_guidance=2.5)
    return {
        "command": command,
        "weights": "weights/emoji",
        "fingerprints": {"unet": "ab" * 32},
        "dtype": "float32",
        "target": {
            "classes": {name: CLASSES[name] for name in attributes},
            "table": table_of(attributes).tolist(),
        },
        "loss": [],
        "judge": [],
        "prompts": "occupations",
        "prompt_template": None,
        "recipe": json.loads(json.dumps(recipe.to_dict())),
        "processes": 1,
        "device": "cpu",
        "versions": {"fairref": "0.1.0"},
    }


def table_of(attributes):
    """The joint target of some attributes."""
    shape = [len(CLASSES[name]) for name in attributes]
    return np.full(shape, 1 / np.prod(shape)) * (np.array([1.5, 0.5]) if attributes[-1] == "age" else 1)


def add_news(report, before):
    """The keys that older versions did not write, from the counts of the report and, of an adapter, of those before."""
    attributes = report["attribute"].split(",")
    table = table_of(attributes)
    targets = {report["attribute"]: table.reshape(-1)}
    for axis, name in enumerate(attributes):
        targets[name] = table.sum(tuple(a for a in range(table.ndim) if a != axis))
    for name, view in {report["attribute"]: report, **report.get("attributes", {})}.items():
        for judge in view["judges"].values():
            add_certainty(judge, report["images"], targets[name], alone="," not in name)
    report["made"] = {key: report[key] for key in ("seed", "steps", "guidance")}
    report["made"] |= {"end": "zero", "padding": "full", "strength": None, "prompts": report["part"]}
    report["judged_by"] = {"classifier": dict.fromkeys(attributes, "classifier_evaluate")}
    report["diversity"] = {"clip": 0.21, "dino": 0.13}
    if attributes == ["gender"]:
        seen = {
            "counts": [[97, 2], [4, 95]],
            "untold": [1, 1],
            "source": "labelled pictures",
            "p_as_before": 0.04,
        }
        report["confusion"] = {"classifier": {"gender": [seen]}}
    if before is not None:
        report["made"]["strength"] = 1.0
        for name, target in targets.items():
            pair = [of.get("attributes", {}).get(name, of) for of in (before, report)]
            counts = [table_of_counts(of["judges"]["classifier"]) for of in pair]
            pair[1]["paired"] = {"classifier": paired(*counts, target)}
            pair[1]["flips"] = {"classifier": {"changed": 0.39, "least": 0.36, "needless": 0.03}}


def add_certainty(judge, n, target, alone):
    """How sure a judge's counts of n images a prompt are; of an attribute alone, without its errors, too."""
    counts, classes, prompts = table_of_counts(judge), list(judge["share"]), list(judge["counts"])
    judge["sure"] = certainty(counts, n - counts.sum(1), prompts, classes, target)
    if alone:
        K = len(classes)
        labelled = np.round(100 * ((1 - RIGHT) / (K - 1) + np.eye(K) * (RIGHT - (1 - RIGHT) / (K - 1))))
        judge["corrected"] = corrected(counts, labelled.astype(int), "explicit prompts", classes, target)


def table_of_counts(judge):
    """A judge's counts (P, K)."""
    return np.array(list(judge["counts"].values()))


def at(evaluation, label, name, value):
    """A report of a sweep."""
    report = copy.deepcopy(evaluation[label]["test"])
    if name == "strength" and label != "before":
        report["clip_i"] = 1 - 0.06 * value
        report["made"]["strength"] = value
    if name == "guidance":
        report["guidance"] = report["made"]["guidance"] = value
    return report


def metrics(iterations=200):
    """Lines of metrics.jsonl; each third prompt names a class."""
    for i in range(iterations):
        row = {
            "iteration": i,
            "loss": 2 / (1 + i),
            "align": 1 / (1 + i),
            "image": 1e-9,
            "cost": 0.7 / (1 + i),
            "counts": [3, 1],
        }
        if i % 3 == 2:
            yield {**row, "counts": [4, 0], "loss": 9, "cost": 9}
        else:
            validation = {"validation": {"bias": 0.4, "clip_i": 0.9}} if i % 50 == 49 else {}
            yield {**row, "bias": 0.5, **validation}


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
