"""What goes out beside the weights: README.md, the model card, and check.py, which proves that they load right."""

import json
import re
import shutil
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from fairref.bundle.loading import Bundle, load_bundle
from fairref.bundle.stable_diffusion import NETWORKS
from fairref.exchange.exported import Export
from fairref.files.paths import read_json
from fairref.generation.adapters import FILE
from fairref.generation.rollout import embed
from fairref.nets.unet import SD15

TEMPLATES = Path(__file__).with_name("templates")
PROMPT = "a photo of the face of a pilot, a person"
T = 500  # the time step at which the check runs the U-Net
PROBES = 8  # values of each network that the check compares
SHARE = 0.1  # of the largest change: how far a value may be off
ROUNDING = 1e-4  # of the largest value: what other hardware may differ by
AVERAGES = {FILE: "ema", "adapter_raw.safetensors": "raw", "adapter_best.safetensors": "best"}
JUDGES = {"classifier": "a classifier", "templates": "the nearest of all possible pictures"}
LICENCES = {"emoji": "mit"}  # name of a bundle -> its licence
EXPLAINED = {  # format -> (what it is, library's tag, how the hub calls what it is to its base)
    "diffusers": ("LoRA", "lora", "adapter"),
    "kohya": ("LoRA", "lora", "adapter"),
    "embedding": ("prefix of soft tokens", "textual_inversion", "adapter"),
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


def write_card(export: Export, after: Bundle) -> None:
    """Writes README.md, check.py and, where the run has one, the grid. `after` is the base with the adapter."""
    import jinja2  # the report and the cards alone need it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    run, facts = export.adapter.file.parent, _facts(export)
    facts["grid"] = facts["is_first"] and (run / "before_after.png").is_file()
    if facts["grid"]:
        shutil.copyfile(run / "before_after.png", export.folder / "before_after.png")
    facts["recorded"] = _compact(json.dumps(_recorded(export, after), indent=1))
    for name in ("README.md", "check.py"):
        text = environment.get_template(f"{name}.jinja").render(facts)
        (export.folder / name).write_text(text, encoding="utf-8")


def _facts(export):
    """All that the templates say."""
    adapter, bundle, info = export.adapter, export.bundle, export.adapter.info
    settings = adapter.file.parent / "settings.json"
    settings = read_json(settings) if adapter.file.name in AVERAGES and settings.is_file() else {}
    name = str(info.get("weights") or bundle.manifest.get("name") or bundle.path.name)
    what, tag, relation = EXPLAINED[export.to]
    classes = info.get("classes") or {}
    rows, is_first = _measured(adapter.file)
    is_sd15 = bundle.unet.config == SD15
    return {
        "to": export.to, "what": what, "tag": tag, "relation": relation, "name": export.name, "token": export.token,
        "base": Path(name).name, "loaded": bundle.path.name,
        "licence": LICENCES.get(name, "creativeml-openrail-m" if is_sd15 else "other"), "is_sd15": is_sd15,
        "attributes": list(classes), "target": _target(classes, info.get("target")),
        "rows": rows, "is_first": is_first, "recipe": settings.get("recipe", {}), "info": info,
        "networks": [part for part in NETWORKS if any(layer.startswith(f"{part}.") for layer in
                     (*adapter.pairs, *adapter.matrices))],
        "ranks": sorted({len(down) for down, _ in adapter.pairs.values()}), "tokens": _length(adapter),
        "fingerprints": info.get("base") if isinstance(info.get("base"), dict) else {},
        "used": bundle.fingerprints, "resolution": bundle.resolution, "prompt": PROMPT, "half": export.half,
        "read": READ,
    }  # fmt: skip


def _length(adapter):
    return 0 if adapter.prefix is None else len(adapter.prefix)


def _target(classes, table):
    """The shares that were aimed at: (joint class, share) rows; [] where they are all the same, None if unknown."""
    if not classes or table is None:
        return None
    shares = torch.tensor(table).flatten().tolist()
    names = [", ".join(names) for names in product(*classes.values())]
    return [] if len(set(shares)) == 1 else list(zip(names, shares, strict=True))


def _measured(file):
    """Rows of the bias before and after, and whether this adapter is the one in the run's grid."""
    path = file.parent / "evaluation.json"
    results = read_json(path) if file.name in AVERAGES and path.is_file() else {}
    label = f"after ({AVERAGES.get(file.name)})"
    if "before" not in results or label not in results:
        return [], False
    rows = [
        {
            "part": "that finetuning never saw" if before["part"] == "test" else "of finetuning",
            "concept": before["concept"], "judge": JUDGES[judge], "attribute": before["attribute"],
            "prompts": before["prompts"], "images": before["images"],
            "before": _spread(before["judges"][judge]),
            "after": _spread(after["judges"][judge]), "floor": _spread(before["noise_floor"]),
            "steps": before["steps"], "guidance": before["guidance"],
        }
        for key, before in results["before"].items()
        if (after := results[label].get(key))
        for judge in before["judges"]
    ]  # fmt: skip
    return rows, list(results)[1] == label


def _spread(v):
    """A mean and a standard deviation, as .83 ± .17."""
    if v["mean"] is None:
        return "none"
    return " ± ".join(f"{v[key]:.2f}".removeprefix("0") for key in ("mean", "std"))


@torch.no_grad()
def _recorded(export, after):
    """What check.py compares."""
    whole = export.to in ("merged", "single-file")
    if whole:
        place = export.folder if export.to == "merged" else export.folder / f"{export.name}.safetensors"
        after = load_bundle(place)
    layers = {
        part: sum(layer.startswith(f"{part}.") for layer in export.adapter.pairs)
        for part in ("text_encoder", "unet")
    }
    values = {}
    for key, bundle in (("before", export.bundle), ("after", after)):
        c = embed(bundle, PROMPT)[:1]
        z = torch.sin(torch.arange(bundle.unet.config.in_channels * 64.0)).view(1, -1, 8, 8)
        values[key] = {"text": c.flatten(), "unet": bundle.unet(z, T, c).flatten()}
    return {
        "prompt": f"{export.token} {PROMPT}" if export.to == "embedding" else PROMPT,
        "before_prompt": PROMPT,
        "t": T,
        "layers": {part: 0 if whole else count for part, count in layers.items()},
        "tokens": _length(export.adapter),
        "weights": after.fingerprints if whole else export.bundle.fingerprints,
        **{name: _probes(values["before"][name], values["after"][name]) for name in ("text", "unet")},
    }


def _compact(text):
    """JSON with each list in one line."""
    return re.sub(r"\[[^][]*\]", lambda found: " ".join(found[0].split()), text)


def _probes(before: Tensor, after: Tensor):
    """The places where the adapter changes most, both values there, and how far they may be off."""
    change = (after - before).abs()
    places = change.topk(PROBES).indices if change.any() else torch.arange(PROBES) * (len(change) // PROBES)
    tolerance = max(SHARE * float(change.max()), ROUNDING * float(after.abs().max()))
    return {
        "places": places.tolist(),
        "before": [float(f"{v:.6g}") for v in before[places]],
        "after": [float(f"{v:.6g}") for v in after[places]],
        "tolerance": float(f"{tolerance:.2g}"),
    }
