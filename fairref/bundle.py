"""One folder of weights -> ready networks.

A bundle is a folder with `bundle.json`, a folder in diffusers' layout, or a single-file LDM checkpoint. In
the last two cases everything but Stable Diffusion itself is absent. The manifest; every key is optional,
paths are relative to its folder:

    {"name": "emoji",
     "resolution": 64,                                    pixels; else the U-Net's sample_size * 8
     "attributes": {"gender": ["woman", "man"]},          what the classifiers know, classes in logit order
     "stable_diffusion": ".",                             diffusers-layout folder or single *.safetensors file
     "clip": "clip",                                      folder: config.json and model.safetensors of a
                                                          transformers CLIPModel, vocab.json, merges.txt
     "classifiers": {"finetune": "classifier_finetune",   folders: config.json, model.safetensors
                     "evaluate": "classifier_evaluate"},
     "templates": "templates.json",                       settings of the nearest-template judge
     "detector": "detector", "embedder": "embedder",      folders: MTCNN's and SFNet's weights; with a detector
                                                          classifiers see the largest face, else the whole picture
     "face_features": "faces.safetensors",                D_F, made by python -m fairref.face_features
     "dino": "dino",                                      folder: DINOv2's weights
     "recipe": {}}                                        finetuning settings that this size asks for

Diffusers' layout: `unet/`, `vae/`, `text_encoder/` with `config.json` and safetensors each, `tokenizer/` with
`vocab.json` and `merges.txt`, `scheduler/scheduler_config.json`. Beside a single file, `vocab.json` and
`merges.txt` must stand in its folder or in `tokenizer/`; config files at the places of diffusers' layout are
used where they stand beside it, and else the shapes are SD-1.5's.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from fairref import cli
from fairref.diffusion.schedule import Schedule
from fairref.errors import UserError
from fairref.judge_files import (
    load_classifier,
    load_clip,
    load_detector,
    load_dino,
    load_embedder,
    load_face_features,
)
from fairref.judges.dino import Dino
from fairref.judges.mobilenet import Classifier
from fairref.judges.sfnet import SFNet
from fairref.nets.clip import Clip, ClipText, ClipTextConfig
from fairref.nets.unet import SD15, UNet, UNetConfig
from fairref.nets.vae import VAE, VAEConfig
from fairref.tokenizer import Tokenizer
from fairref.weights_io import exists, expanded, load_strict, read, read_json
from fairref.weights_names import ldm_split, text_encoder_names, vae_names

MANIFEST = "bundle.json"
MANIFEST_KEYS = {  # key -> type of its value
    "name": str,
    "resolution": int,
    "attributes": dict,
    "stable_diffusion": str,
    "clip": str,
    "classifiers": dict,
    "templates": str,
    "detector": str,
    "embedder": str,
    "face_features": str,
    "dino": str,
    "recipe": dict,
}
CLASSIFIERS = ("finetune", "evaluate")


@dataclass(frozen=True)
class Part:
    """One network of Stable Diffusion, which is also the name of its folder."""

    config: type  # settings dataclass with from_dict
    network: type  # built from the settings
    file: str  # weights inside the folder, without `.safetensors`
    sd15: object  # settings where no config.json says them
    names: object  # (tensors, source) -> tensors with present names


PARTS = {
    "unet": Part(UNetConfig, UNet, "diffusion_pytorch_model", SD15, lambda tensors, source: tensors),
    "vae": Part(VAEConfig, VAE, "diffusion_pytorch_model", VAEConfig((128, 256, 512, 512), 2), vae_names),
    "text_encoder": Part(
        ClipTextConfig,
        ClipText,
        "model",
        ClipTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
        lambda tensors, source: text_encoder_names(tensors),
    ),
}
SD15_SAMPLE_SIZE = 64  # height and width of z


@dataclass(frozen=True)
class Bundle:
    """Ready networks, in eval mode and without requires_grad."""

    path: Path  # the folder, or the single file
    manifest: dict  # bundle.json, {} without one
    tokenizer: Tokenizer  # texts -> ids (B, T)
    text_encoder: ClipText  # ids (B, T) -> c (B, T, D)
    unet: UNet  # z (B, 4, h, w), time step, c -> eps
    vae: VAE  # image in [-1, 1] <-> scaled latent
    schedule: Schedule  # beta_t and what follows from it
    resolution: int  # height and width of a picture in pixels
    attributes: dict[str, tuple] = field(default_factory=dict)  # name -> class names in logit order
    recipe: dict = field(default_factory=dict)  # finetuning settings of this size
    clip: Clip | None = None  # both towers of the image-text judge
    clip_tokenizer: Tokenizer | None = None  # its own vocabulary
    classifiers: dict[str, Classifier] = field(default_factory=dict)  # "finetune", "evaluate"
    detector: Callable | None = None  # a fairness.faces.Detector; another one can be put here
    embedder: SFNet | None = None  # aligned faces -> features
    face_features: Tensor | None = None  # D_F (R, D), unit embeddings of external real faces, on the CPU
    dino: Dino | None = None  # pictures -> features
    prefix: Tensor | None = None  # soft prompt (P, D) of an adapter

    @cached_property
    def templates(self):
        """The nearest-template judge, None if the manifest names none; read at its first use."""
        if "templates" not in self.manifest:
            return None
        from fairref.emoji.templates import Templates  # only the small world has one

        device = next(self.vae.parameters()).device
        return Templates.from_file(self.path / self.manifest["templates"]).to(device)


def bundle_path(name_or_path: str | Path) -> Path:
    """Where a bundle is: the path itself, else `weights/NAME` beside the scripts, else inside the package.

    `weights/emoji` and `emoji` name the same one. Raises UserError where there is none.
    """
    path = expanded(name_or_path)
    package = Path(__file__).resolve().parent
    name = path.relative_to("weights") if path.parts[:1] == ("weights",) else path
    places = [path, package.parent / "weights" / name, package / "weights" / name]
    for place in places:
        if place.exists():
            return place
    raise UserError(
        f"{path}: no such weights, neither here nor in {places[1].parent}; give a folder or file."
    )


def load_bundle(path: str | Path, device="cpu", dtype=torch.float32) -> Bundle:
    """The networks of a bundle on `device` in `dtype`; `path` as in `bundle_path`. Raises UserError."""
    path = bundle_path(path).absolute()
    manifest = read_manifest(path / MANIFEST) if (path / MANIFEST).is_file() else {}
    stable_diffusion = path / manifest.get("stable_diffusion", ".") if path.is_dir() else path
    parts, unet = load_stable_diffusion(stable_diffusion)
    clip, clip_tokenizer = load_clip(path / manifest["clip"]) if "clip" in manifest else (None, None)
    folders = manifest.get("classifiers", {})
    classifiers = {name: load_classifier(path / folder) for name, folder in folders.items()}
    attributes = {name: tuple(classes) for name, classes in manifest.get("attributes", {}).items()}
    _check_classes(classifiers, attributes, path / MANIFEST)
    dino = load_dino(path / manifest["dino"]) if "dino" in manifest else None
    detector = load_detector(path / manifest["detector"], device, dtype) if "detector" in manifest else None
    embedder, face_features = _faces(path, manifest)
    if "templates" in manifest:  # made later, refused now
        from fairref.emoji.templates import read_settings

        read_settings(path / manifest["templates"])

    def ready(module: nn.Module) -> nn.Module:
        # channels last: a tenth to a quarter faster for convolutions, on CPUs as well
        module = module.to(device=device, dtype=dtype, memory_format=torch.channels_last)
        return module.eval().requires_grad_(False)

    factor = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    resolution = manifest.get("resolution")
    if resolution is None:
        resolution = factor * _side(unet.get("sample_size"), stable_diffusion)
    if resolution < 1 or resolution % factor:
        raise UserError(
            f"{path}: resolution is {resolution} pixels; expected a positive multiple of {factor}."
        )
    return Bundle(
        path=path,
        manifest=manifest,
        **{name: ready(part) if isinstance(part, nn.Module) else part for name, part in parts.items()},
        resolution=resolution,
        attributes=attributes,
        recipe=manifest.get("recipe", {}),
        clip=clip and ready(clip),
        clip_tokenizer=clip_tokenizer,
        classifiers={name: ready(classifier) for name, classifier in classifiers.items()},
        detector=detector,
        embedder=embedder and ready(embedder),
        face_features=face_features,
        dino=dino and ready(dino),
    )


def read_manifest(path: Path) -> dict:
    """bundle.json, checked: keys and types of values. Raises UserError."""
    manifest = read_json(path)
    for key, value in manifest.items():
        if key not in MANIFEST_KEYS:
            raise UserError(f"{path}: found key {key!r}; expected some of {', '.join(MANIFEST_KEYS)}.")
        kind = MANIFEST_KEYS[key]
        if type(value) is not kind:
            raise UserError(f"{path}: {key} is {value!r}; expected a value of type {kind.__name__}.")
    for name, classes in manifest.get("attributes", {}).items():
        if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(c, str) for c in classes):
            raise UserError(f"{path}: attribute {name!r} is {classes!r}; expected two or more class names.")
    for name, folder in manifest.get("classifiers", {}).items():
        if name not in CLASSIFIERS or not isinstance(folder, str):
            expected = " or ".join(CLASSIFIERS)
            raise UserError(f"{path}: classifier {name!r} is {folder!r}; expected the folder of {expected}.")
    return manifest


def load_stable_diffusion(path: Path) -> tuple[dict, dict]:
    """Diffusers-layout folder or single-file checkpoint -> (tokenizer, schedule and networks, the U-Net's config)."""
    single = path.is_file()
    folder = path.parent if single else path
    if not single and not (folder / "unet").is_dir():
        remake = " python -m fairref.emoji.build makes it." if path.parts[-2:] == ("weights", "emoji") else ""
        raise UserError(
            f"{path}: found no unet/ in it; expected a folder with {MANIFEST}, a diffusers-layout folder, "
            f"or a single *.safetensors file.{remake}"
        )
    texts = {name: folder / name / "config.json" for name in PARTS}
    found = {name: read_json(text) for name, text in texts.items() if text.is_file() or not single}
    configs = {
        name: part.config.from_dict(found[name], str(texts[name])) if name in found else part.sd15
        for name, part in PARTS.items()
    }
    networks = {}
    for name, (tensors, source) in _weights(path, single, configs).items():
        with torch.device("meta"):  # random initial values would take longer than loading
            networks[name] = PARTS[name].network(configs[name])
        load_strict(networks[name], tensors, source)
    length = configs["text_encoder"].max_position_embeddings
    tokenizer = _tokenizer(path, single, length)
    parts = {**networks, "schedule": _schedule(folder, single), "tokenizer": tokenizer}
    _check_sizes(parts, path)
    return parts, found.get("unet", {})


def _side(sample_size, path):
    """Height and width of z: a number, as diffusers has it, or two that are equal; SD-1.5's where it isn't said."""
    said = sample_size or SD15_SAMPLE_SIZE
    sides = said if isinstance(said, list) else [said]
    if not all(type(side) is int and side == sides[0] for side in sides):
        raise UserError(
            f"{path}: the U-Net's sample_size is {sample_size!r}; expected a whole number, or a square's two."
        )
    return sides[0]


def _faces(path, manifest):
    """What L_face needs, which is of no use one without the other: (embedder, D_F), or (None, None)."""
    keys = [key for key in ("detector", "embedder", "face_features") if key in manifest]
    if "embedder" not in keys and "face_features" not in keys:
        return None, None
    if len(keys) < 3:
        raise UserError(
            f"{path / MANIFEST}: names {' and '.join(keys)} only; name detector, embedder and face_features, all"
            " of which L_face needs, or the detector alone."
        )
    embedder = load_embedder(path / manifest["embedder"])
    width = embedder.config.features
    return embedder, load_face_features(path / manifest["face_features"], width)


def _weights(path, single, configs):
    """Part -> (tensors with present names, file for messages)."""
    if single:
        unet, vae = (
            (len(c.block_out_channels), c.layers_per_block) for c in (configs["unet"], configs["vae"])
        )
        split = ldm_split(read(path), str(path), unet, vae)
        return {name: (tensors, f"{path} ({name})") for name, tensors in split.items()}
    weights = {}
    for name, part in PARTS.items():
        full, half = (path / name / f"{part.file}{variant}.safetensors" for variant in ("", ".fp16"))
        file = full if exists(full) or not exists(half) else half
        weights[name] = part.names(read(file), str(file)), str(file)
    return weights


def _schedule(folder, single):
    path = folder / "scheduler" / "scheduler_config.json"
    return Schedule() if single and not path.is_file() else Schedule.from_dict(read_json(path))


def _tokenizer(path, single, length):
    places = [path.parent, path.parent / "tokenizer"] if single else [path / "tokenizer"]
    place = next((p for p in places if (p / "vocab.json").is_file()), None)
    if place is None:
        where = " or ".join(str(p) for p in places)
        raise UserError(f"{path}: no tokenizer with it; put CLIP's vocab.json and merges.txt into {where}.")
    return Tokenizer(place / "vocab.json", place / "merges.txt", length)


def _check_sizes(parts, path):
    """The parts must fit each other, which no single one can tell."""
    text, unet, vae = (parts[name].config for name in ("text_encoder", "unet", "vae"))
    for key, other, found, expected in (
        ("cross_attention_dim", "text encoder's hidden_size", unet.cross_attention_dim, text.hidden_size),
        ("in_channels", "VAE's latent_channels", unet.in_channels, vae.latent_channels),
        ("out_channels", "VAE's latent_channels", unet.out_channels, vae.latent_channels),
    ):
        if found != expected:
            raise UserError(
                f"{path}: the U-Net's {key} is {found}; expected {expected}, the {other}: "
                "use parts of one model."
            )
    tokens = parts["tokenizer"].vocab_size
    if tokens > text.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokens} tokens; expected at most {text.vocab_size}, as many as the "
            "text encoder: use this model's vocab.json and merges.txt."
        )


def _check_classes(classifiers, attributes, path):
    for key, classifier in classifiers.items():
        for name, classes in attributes.items():
            known = tuple(classifier.attributes.get(name, classes))
            if known != classes:
                raise UserError(
                    f"{path}: classes of {name!r} are {classes}; expected {known} as in the {key} classifier."
                )


def main(argv=None) -> int:
    """python -m fairref.bundle check WEIGHTS."""
    from fairref import inventory  # it stands on this file

    return inventory.main(argv)


if __name__ == "__main__":
    sys.exit(cli.run(main))
