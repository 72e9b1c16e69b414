"""What goes out beside the weights: README.md, the model card, and check.py, which proves that they load right."""

import shutil
from pathlib import Path

import torch

from fairref.bundle.loading import Bundle
from fairref.errors import UserError
from fairref.evaluation.statistics import joint_names
from fairref.exchange.canary import PROMPT, recorded
from fairref.exchange.exported import Export
from fairref.files.paths import read_json
from fairref.files.weights import fingerprint
from fairref.generation.adapters import FILE, FORMAT
from fairref.nets.unet import SD15
from fairref.settings import read_range

TEMPLATES = Path(__file__).with_name("templates")
GRID = "before_after.png"
WORDS = {"text_encoder": "the text encoder", "unet": "the U-Net"}
AVERAGES = {FILE: "ema", "adapter_raw.safetensors": "raw", "adapter_best.safetensors": "best"}
JUDGES = {"classifier": "a classifier", "templates": "the nearest of all possible pictures"}
LICENCES = {"emoji": "mit"}  # name of a bundle -> its licence
EXPLAINED = {  # format -> (what it is, library's tag, how the hub calls what it is to its base)
    "diffusers": ("LoRA", "lora", "adapter"),
    "kohya": ("LoRA", "lora", "adapter"),
    "embedding": ("row of soft tokens", "textual_inversion", "adapter"),
    "merged": ("whole model", "stable-diffusion-diffusers", "finetune"),
    "single-file": ("whole model", "single-file", "finetune"),
}
READ = (  # what the names were compared with: tool, repository, file, commit
    ("ComfyUI", "Comfy-Org/ComfyUI", "comfy/lora.py", "ec93dcacb96b922f7cb1417b3ba22bccb082df32"),
    (
        "AUTOMATIC1111",
        "AUTOMATIC1111/stable-diffusion-webui",
        "extensions-builtin/Lora/networks.py",
        "873edba44bedf0086d52343f282552b3601baeb8",
    ),
)


def environment() -> object:
    """Jinja's environment of the templates."""
    import jinja2  # the report and the cards alone need it

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def write_card(export: Export, after: Bundle) -> None:
    """Writes README.md, check.py and, where the run has one, the grid. `after` is the base with the adapter."""
    templates = environment()
    facts = {**_facts(export), "recorded": recorded(export, after)}
    if facts["grid"]:
        shutil.copyfile(export.adapter.file.parent / GRID, export.folder / GRID)
    for name in ("README.md", "check.py"):
        text = templates.get_template(f"{name}.jinja").render(facts)
        (export.folder / name).write_text(text, encoding="utf-8")


def _facts(export):
    """All that the templates say."""
    adapter, bundle = export.adapter, export.bundle
    info, is_sd15 = adapter.info, bundle.unet.config == SD15
    name = str(info.get("weights") or bundle.manifest.get("name") or bundle.path.name)
    what, tag, relation = EXPLAINED[export.to]
    classes = _classes(info)
    derived = bool(
        set(adapter.other_parts(bundle) or ()) - {"vae"}
    )  # its numbers and pictures are of another base
    rows = [] if derived else _measured(_run_of(adapter), adapter)
    layers = [*adapter.pairs, *adapter.matrices]
    return {
        "export": export,
        "what": what,
        "tag": tag,
        "relation": relation,
        "whole": export.is_whole,
        "base": Path(name).name,
        "used": bundle.path.name,
        "derived": derived,
        "fingerprints": info["base"] if isinstance(info.get("base"), dict) else {},
        "is_sd15": is_sd15,
        "licence": LICENCES.get(name, "creativeml-openrail-m" if is_sd15 else "other"),
        "classes": classes,
        "target": _target(classes, info.get("target")),
        "imported": info.get("imported_from"),
        "iterations": info.get("iterations"),
        "rows": rows,
        "grid": bool(rows) and rows[0]["is_first"] and (adapter.file.parent / GRID).is_file(),
        "recipe": _recipe(_settings(_run_of(adapter))),
        "own_judges": _own_judges(_settings(_run_of(adapter))),
        "networks": [WORDS[part] for part in WORDS if any(layer.startswith(f"{part}.") for layer in layers)],
        "ranks": sorted({len(down) for down, _ in adapter.pairs.values()}),
        "prompt": PROMPT,
        "read": READ,
    }


def _classes(info):
    """Attribute -> its classes, as far as the adapter's file says so."""
    classes = info.get("classes")
    return classes if isinstance(classes, dict) and all(isinstance(c, list) for c in classes.values()) else {}


def _run_of(adapter):
    """The folder of the run that wrote the adapter; None for another one's."""
    is_own = adapter.file.name in AVERAGES and adapter.info.get("format") == FORMAT
    return adapter.file.parent if is_own else None


def _settings(run):
    """The settings.json of a run; {} without one."""
    return read_json(run / "settings.json") if run and (run / "settings.json").is_file() else {}


def _recipe(settings):
    """The recipe in a run's settings, its ranges in words; {} without one, or where they are none."""
    recipe = settings.get("recipe")
    wanted = ("steps", "guidance", "eval_steps", "eval_guidance")
    if not isinstance(recipe, dict) or not all(key in recipe for key in wanted):
        return {}
    try:
        return recipe | {key: _in_words(read_range(recipe[key])) for key in ("steps", "guidance")}
    except (TypeError, ValueError):
        return {}


def _in_words(drawn):
    """A Range."""
    ends = f"{drawn.low} and {drawn.high} by turns" if drawn.turns else f"{drawn.low} to {drawn.high}"
    return str(drawn.low) if drawn.low == drawn.high else ends


def _own_judges(settings):
    """What took the place of the bundle's classifiers in a run's evaluation, in words."""
    rows = settings.get("judge")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [
        f"`clip:{' '.join(str(row['clip']).split())}`, which is CLIP without training"
        if "clip" in row
        else f"`{Path(str(row.get('path'))).name}:{row.get('name')}`"
        for row in rows
        if row.get("role") == "evaluate"
    ]


def _target(classes, table):
    """The shares that were aimed at: (joint class, share) rows; [] where they are all the same, None if unknown."""
    if not classes or table is None:
        return None
    shares = torch.tensor(table).flatten().tolist()
    return [] if len(set(shares)) == 1 else list(zip(joint_names(classes), shares, strict=True))


def _measured(run, adapter):
    """Rows of the bias before and after, from the evaluation of a run, of this very adapter. Raises UserError."""
    file, made = adapter.file, fingerprint(adapter.tensors)
    path = file.parent / "evaluation.json"
    results = read_json(path) if run and path.is_file() else {}
    label = f"after ({AVERAGES.get(file.name)})"
    try:
        return [
            {**_row(before, results[label][key], judge), "is_first": list(results)[1] == label}
            for key, before in results.get("before", {}).items()
            if key in results.get(label, {})
            and results[label][key].get("fingerprint", made) == made  # older evaluations have none
            for judge in before["judges"]
        ]
    except (AttributeError, LookupError, TypeError):
        raise UserError(
            f"{path}: not what an evaluation of fairref wrote; evaluate again, or move it."
        ) from None


def _row(before, after, judge):
    """A part of the evaluation by one judge; from the target, where that is not equal shares."""
    unequal = "target_floor" in before
    values = [report["judges"][judge] for report in (before, after)]
    was, now = (value["from_target"] if unequal else value for value in values)
    floor = before["target_floor" if unequal else "noise_floor"]
    return {
        "part": "that finetuning never saw" if before["part"] == "test" else "of finetuning",
        "judge": JUDGES.get(judge, judge),
        "before": _spread(was),
        "after": _spread(now),
        "floor": _spread(floor),
        "unequal": unequal,
        "most": f"{2 / len(before['classes']):.2g}",  # the bias of one class alone
        **{key: before[key] for key in ("concept", "attribute", "prompts", "images", "steps", "guidance")},
    }


def _spread(v):
    """A mean and a standard deviation, as .83 ± .17."""
    if v["mean"] is None:
        return "none"
    return " ± ".join(f"{v[key]:.2f}".removeprefix("0") for key in ("mean", "std"))
