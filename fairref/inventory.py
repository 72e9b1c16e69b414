"""What a bundle has and lacks: `python -m fairref.bundle check weights/sd15`.

For each part: is it named and there, how large, does it load; and where one gets it for Stable Diffusion 1.5.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fairref import cli
from fairref.bundle import MANIFEST, bundle_path, load_bundle, load_stable_diffusion, read_manifest
from fairref.errors import UserError
from fairref.judge_files import (
    load_classifier,
    load_clip,
    load_detector,
    load_dino,
    load_embedder,
    load_face_features,
)
from fairref.prompts import read_own

USES = {  # what a bundle is good for -> the kinds of parts that it takes
    "draw": {"to draw"},
    "finetune": {"to draw", "to finetune"},
    "evaluate": {"to draw", "to evaluate"},
    "finetune on faces, as the method does": {"to draw", "to finetune", "for faces", "for L_img's DINO"},
}
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Item:
    """A part of a bundle, and facts about the one that belongs to Stable Diffusion 1.5."""

    key: str  # in bundle.json, KEY.NAME for one of several
    place: str  # where docs/sd15.md puts it, relative to the bundle
    needed: str  # a kind of part in USES
    megabytes: int  # of its weights in float32
    source: str
    licence: str
    load: Callable  # path -> anything; raises UserError


CLASSIFIER = (
    "python -m fairref.train_classifier (CelebA or FairFace), or MobileNetV3-Large of the source's data.zip, folder"
    " {folder}, with the config.json of docs/sd15.md"
)
FACES_LICENCE = "CelebA: non-commercial research; FairFace: CC BY 4.0"
ITEMS = (
    Item(
        "stable_diffusion",
        ".",
        "to draw",
        4265,
        "stable-diffusion-v1-5/stable-diffusion-v1-5 on the Hugging Face hub: unet, vae, text_encoder, tokenizer,"
        " scheduler; or one v1-5-pruned-emaonly.safetensors with vocab.json and merges.txt",
        "CreativeML Open RAIL-M",
        load_stable_diffusion,
    ),
    Item(
        "classifiers.finetune",
        "classifier_finetune",
        "to finetune",
        17,
        CLASSIFIER.format(folder="2-trained-classifiers"),
        FACES_LICENCE,
        load_classifier,
    ),
    Item(
        "clip",
        "clip",
        "to finetune",
        3944,
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K on the Hugging Face hub: config.json, model.safetensors, vocab.json,"
        " merges.txt",
        "MIT",
        load_clip,
    ),
    Item(
        "classifiers.evaluate",
        "classifier_evaluate",
        "to evaluate",
        17,
        CLASSIFIER.format(folder="5-trained-test-classifiers"),
        FACES_LICENCE,
        load_classifier,
    ),
    Item(
        "detector",
        "../mtcnn",
        "for faces",
        2,
        "weights/mtcnn of this repository",
        "MIT",
        load_detector,
    ),
    Item(
        "embedder",
        "embedder",
        "for faces",
        98,
        "SFNet-20 of opensphere: backbone_100000.pth of its 20220424_210641 checkpoints",
        "see opensphere",
        load_embedder,
    ),
    Item(
        "face_features",
        "faces.safetensors",
        "for faces",
        205,
        "python -m fairref.face_features on CelebA or FairFace (100,000 faces)",
        FACES_LICENCE,
        load_face_features,
    ),
    Item(
        "dino",
        "dino",
        "for L_img's DINO",
        346,
        "dinov2_vitb14_pretrain.pth of facebookresearch/dinov2",
        "Apache 2.0",
        load_dino,
    ),
)


@dataclass(frozen=True)
class Found:
    """What was found of an item."""

    item: Item
    path: Path | None  # None: not named and not at its place
    state: str  # "ok", "missing", "not named", or the sentence that loading ended with
    size: int = 0  # bytes of its files


def look(path: Path) -> list[Found]:
    """Each part of the bundle, loaded on the CPU one after the other. Raises UserError for a broken manifest."""
    manifest = read_manifest(path / MANIFEST) if (path / MANIFEST).is_file() else {}
    found = []
    for item in ITEMS:
        key, _, name = item.key.partition(".")
        named = manifest.get(key, {}).get(name) if name else manifest.get(key)
        if key == "stable_diffusion":
            named = named or "."
        place = (path / (named or item.place)) if path.is_dir() else path
        if not place.exists() or (path.is_file() and key != "stable_diffusion"):
            found.append(Found(item, None if named is None else place, "missing"))
        elif named is None:
            found.append(Found(item, place, "not named", _size(place)))
        else:
            found.append(Found(item, place, _loads(item, place), _size(place)))
    return found


def _loads(item, place):
    try:
        item.load(place)
    except UserError as error:
        return str(error)
    return "ok"


def _size(place):
    files = [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def lines(path: Path, found: list[Found]) -> list[str]:
    """The inventory as text."""
    text = [f"{path}: {sum(f.state == 'ok' for f in found)} of {len(found)} parts are there and load"]
    for f in found:
        size = f"{f.size / MEGABYTE:,.0f} MB" if f.size else ""
        state = f.state if f.state in ("ok", "missing", "not named") else "broken"
        text.append(f"  {state:10}{f.item.key:22}{str(f.path or f.item.place):40}{size}".rstrip())
        if state == "broken":
            text.append(f"      {f.state}")
        if state == "not named":
            key, _, name = f.item.key.partition(".")
            value = f'{{"{name}": "{f.item.place}"}}' if name else f'"{f.item.place}"'
            text.append(f'      add "{key}": {value} to {MANIFEST}')
        if state in ("missing", "broken"):
            text.append(f"      {f.item.needed}; about {f.item.megabytes:,} MB; {f.item.source}")
            text.append(f"      licence: {f.item.licence}")
    return text


def uses(found: list[Found]) -> list[str]:
    """What the bundle is good for."""
    lacking = {f.item.needed for f in found if f.state != "ok"}
    return [use for use, kinds in USES.items() if not kinds & lacking]


def main(argv=None) -> int:
    parser = cli.Parser(prog="python -m fairref.bundle", description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("check",), help="check: list the parts and load each")
    parser.add_argument(
        "weights", nargs="?", default=cli.WEIGHTS, help="bundle, diffusers-layout folder or file"
    )
    options = parser.parse_args(argv)
    path = bundle_path(options.weights)
    found = look(path)
    print("\n".join(lines(options.weights, found)))
    prompts = None  # what is wrong with them
    try:
        if read_own(path) is None:
            print("  prompts.json is not there: fairref's own prompts take its place")
    except UserError as error:
        prompts = str(error)
        print(f"  {'broken':10}{'prompts.json':22}\n      {error}")
    good = uses(found)
    try:
        if good:
            load_bundle(path)  # parts that load may yet not fit together
        print(f"good to {'; '.join(good)}" if good else "not good for anything yet")
    except UserError as error:
        print(f"not good for anything until this is mended: {error}")
        return 1
    broken = any(f.state not in ("ok", "missing", "not named") for f in found)
    return 0 if {"draw", "finetune", "evaluate"} <= set(good) and not prompts and not broken else 1
