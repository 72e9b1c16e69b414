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
     "classifiers": {"finetune": "classifier_finetune",   folders: config.json, model.safetensors; or a list of
                     "evaluate": "classifier_evaluate"},  some, of which the first that knows an attribute judges it
     "templates": "templates.json",                       settings of the nearest-template judge
     "detector": "detector", "embedder": "embedder",      folders: MTCNN's and SFNet's weights; with a detector
                                                          classifiers see the largest face, else the whole image
     "face_features": "faces.safetensors",                D_F, made by `fairref faces`
     "dino": "dino",                                      folder: DINOv2's weights
     "recipe": {}}                                        finetuning settings that this size asks for
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from fairref.bundle.judges import load_templates, read_template_settings
from fairref.bundle.manifest import MANIFEST, Manifest, places_of, read_manifest
from fairref.bundle.own_judges import OwnClassifier, OwnFeatures, OwnSource, check_roles, load_own
from fairref.bundle.registry import PARTS
from fairref.bundle.stable_diffusion import NETWORKS
from fairref.bundle.zero_shot import PREFIX, load_zero_shot
from fairref.diffusion.schedule import Schedule
from fairref.errors import UserError, typed
from fairref.fairness.faces import Detector
from fairref.files.own_code import sha256_of
from fairref.files.paths import expanded
from fairref.files.tokenizer import Tokenizer
from fairref.files.weights import fingerprint_of
from fairref.judges import Embedder, Features, ImageClassifier
from fairref.judges.templates import Templates
from fairref.nets.clip import Clip, ClipText
from fairref.nets.unet import UNet
from fairref.nets.vae import VAE

ROLES = ("finetune", "evaluate")  # of classifiers
FIELDS = ("stable_diffusion", "clip", "detector", "embedder", "face_features", "dino", "templates")
DEFAULT = "weights/emoji"  # the bundle where none is named


@dataclass(frozen=True)
class Bundle:
    """Ready networks, in eval mode and without requires_grad."""

    path: Path  # the folder, or the single file
    manifest: Manifest  # bundle.json, {} without one
    tokenizer: Tokenizer  # texts -> ids (B, T)
    text_encoder: ClipText  # ids (B, T) -> c (B, T, D)
    unet: UNet  # z (B, 4, h, w), time step, c -> eps
    vae: VAE  # image in [-1, 1] <-> scaled latent
    schedule: Schedule  # beta_t and what follows from it
    resolution: int  # height and width of an image in pixels
    attributes: dict[str, tuple[str, ...]] = field(default_factory=dict)  # name -> classes in logit order
    recipe: dict[str, object] = field(default_factory=dict)  # finetuning settings of this size
    clip: Clip | None = None  # both towers of the image-text judge
    clip_tokenizer: Tokenizer | None = None  # its own vocabulary
    classifiers: dict[str, tuple[ImageClassifier, ...]] = field(
        default_factory=dict
    )  # "finetune", "evaluate"
    detector: Detector | None = None  # images -> faces; another one can be put here
    embedder: Embedder | None = None  # aligned faces -> features
    face_features: Tensor | None = None  # D_F (R, D), unit embeddings of external real faces, on the CPU
    dino: Features | None = None  # images -> features
    prefix: Tensor | None = None  # soft prompt (P, D) of an adapter
    empty_encoder: ClipText | None = None  # of the empty or negative prompt, where it is another one
    # fingerprint and strength of each adapter; at strength 0 it changes nothing
    adapters: tuple[tuple[str, float], ...] = ()
    own_judges: Mapping[str, Sequence[OwnSource]] = field(
        default_factory=dict
    )  # role -> what made the user's own
    others: Mapping[str, object] = field(
        default_factory=dict
    )  # key -> part, of rows of PARTS without a field here

    @property
    def device(self) -> torch.device:
        """Where its networks are."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> str:
        """What they compute in, as --dtype names it."""
        return str(next(self.unet.parameters()).dtype).removeprefix("torch.")

    def has(self, key: str) -> bool:
        """Whether it has the part with this key of the registry, as "classifiers.finetune" or "clip"."""
        group, _, role = key.rpartition(".")
        if group:
            return role in getattr(self, group, {})
        return getattr(self, role, self.others.get(role)) is not None

    def named(self, key: str) -> list[str]:
        """What each place of a part is called by --judge, or else by bundle.json."""
        own = self.own_judges.get(key.rpartition(".")[2], ())
        return [source.short for source in own] or places_of(self.manifest, key) or []

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of each network of Stable Diffusion: what tells two of one shape apart; takes seconds at SD-1.5's size."""
        return {name: fingerprint_of(getattr(self, name)) for name in NETWORKS}

    @cached_property
    def all_fingerprints(self) -> dict[str, str]:
        """Of each part by its key, of the prefix too; not of a user's own judges, whose files have their own hashes."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        parts |= {f"classifiers.{role}": judges for role, judges in parts.pop("classifiers").items()}
        parts |= parts.pop("others")
        own = {key for key in parts if key.rpartition(".")[2] in self.own_judges}
        found = {key: fingerprint_of(part) for key, part in parts.items() if key not in own}
        if "templates" in self.manifest:  # the file says it all, and the judge takes seconds to make
            found["templates"] = sha256_of(self.path / self.manifest["templates"])
        return {key: made for key, made in found.items() if made}

    @cached_property
    def templates(self) -> Templates | None:
        """The nearest-template judge, None if the manifest names none; made at its first use, which takes seconds."""
        if "templates" not in self.manifest:
            return None
        return load_templates(self.path / self.manifest["templates"], self.device)


def bundle_path(name_or_path: str | Path) -> Path:
    """Where a bundle is: the path itself, else `weights/NAME` beside the scripts, else inside the package.

    `weights/emoji` and `emoji` name the same one. Raises UserError where there is none.
    """
    path = expanded(name_or_path)
    package = Path(__file__).resolve().parents[1]
    name = path.relative_to("weights") if path.parts[:1] == ("weights",) else path
    places = [path, package.parent / "weights" / name, package / "weights" / name]
    for place in places:
        if place.exists():
            return place
    raise UserError(
        f"{path}: no such weights, neither here nor in {places[1].parent}; give a folder or file."
    )


@typed
def load_bundle(
    path: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    judges: Mapping[str, str | Sequence[str]] | None = None,
) -> Bundle:
    """The networks of a bundle on `device` in `dtype`; `path` as in `bundle_path`, None: DEFAULT. Raises UserError.

    `judges`: the role of a part in PARTS -> what takes its place, one or, of classifiers, some: "file.py:loader" of a
    user's own code (`own_judges`), or "clip:ATTRIBUTE=TEXT|TEXT" (`zero_shot`).
    """
    judges = {role: [own] if isinstance(own, str) else own for role, own in (judges or {}).items() if own}
    check_roles(judges)
    path = bundle_path(DEFAULT if path is None else path).absolute()
    manifest = read_manifest(path / MANIFEST) if (path / MANIFEST).is_file() else {}
    loaded: dict[str, tuple[object, ...]] = {}  # key of a part -> what its places hold
    for part in PARTS:
        places = places_of(manifest, part.key)
        if part.key == "stable_diffusion":
            places = [manifest.get("stable_diffusion", ".") if path.is_dir() else ""]
        if part.key == "templates" and places:
            read_template_settings(path / places[0])  # refused now, made at its first use
        elif places and part.role not in judges:
            loaded[part.key] = tuple(part.load(path / place, device, dtype) for place in places)
    resolution = _resolution(path, manifest, loaded["stable_diffusion"][0])
    (clip,) = loaded.get("clip", (None,))
    for part in PARTS:  # what takes a part's place comes last, for it may look through the bundle's CLIP
        if part.role in judges:
            loaded[part.key] = tuple(
                load_zero_shot(part, text, manifest, clip)
                if text.startswith(PREFIX)
                else load_own(part, text, manifest, resolution, device, dtype)
                for text in judges[part.role]
            )
    return _bundle(path, manifest, loaded)


def _bundle(path, manifest, loaded):
    """The parts put together. Raises UserError where they do not fit each other."""
    attributes = {name: tuple(classes) for name, classes in manifest.get("attributes", {}).items()}
    own = {
        key.rpartition(".")[2]: parts
        for key, parts in loaded.items()
        if isinstance(parts[0], OwnClassifier | OwnFeatures)
    }
    for judge in chain.from_iterable(own.values()):  # may bring new attributes
        attributes = {**getattr(judge, "classes", {}), **attributes}
    classifiers = {role: loaded[f"classifiers.{role}"] for role in ROLES if f"classifiers.{role}" in loaded}
    _check_classes(classifiers, attributes, path / MANIFEST, own)
    one = {key: parts[0] for key, parts in loaded.items()}
    _check_faces(path, one, own)
    stable_diffusion = one["stable_diffusion"]
    clip, clip_tokenizer = one.get("clip", (None, None))
    return Bundle(
        path=path,
        manifest=manifest,
        tokenizer=stable_diffusion.tokenizer,
        text_encoder=stable_diffusion.text_encoder,
        unet=stable_diffusion.unet,
        vae=stable_diffusion.vae,
        schedule=stable_diffusion.schedule,
        resolution=_resolution(path, manifest, stable_diffusion),
        attributes=attributes,
        recipe=manifest.get("recipe", {}),
        clip=clip,
        clip_tokenizer=clip_tokenizer,
        classifiers=classifiers,
        detector=one.get("detector"),
        embedder=one.get("embedder"),
        face_features=one.get("face_features"),
        dino=one.get("dino"),
        own_judges={role: [judge.source for judge in judges] for role, judges in own.items()},
        others={key: part for key, part in one.items() if "." not in key and key not in FIELDS},
    )


def _resolution(path, manifest, stable_diffusion):
    """Pixels of a side. Raises UserError."""
    factor = 2 ** (len(stable_diffusion.vae.config.block_out_channels) - 1)
    resolution = manifest.get("resolution", factor * stable_diffusion.sample_size)
    if resolution < 1 or resolution % factor:
        raise UserError(
            f"{path}: resolution is {resolution} pixels; expected a positive multiple of {factor}."
        )
    return resolution


def _check_faces(path, parts, own):
    """What L_face needs is of no use one without the other, and D_F must be of the embedder's width."""
    keys = [key for key in ("detector", "embedder", "face_features") if key in parts]
    if "embedder" not in keys and "face_features" not in keys:
        return
    if len(keys) < 3 and "embedder" in own:
        raise UserError(
            f"--judge embedder: {path} names no detector or no face_features, which L_face needs, too; leave it out."
        )
    if len(keys) < 3:
        raise UserError(
            f"{path / MANIFEST}: names {' and '.join(keys)} only; name detector, embedder and face_features, all"
            " of which L_face needs, or the detector alone."
        )
    width, wanted = parts["face_features"].shape[1], parts["embedder"].width
    if width != wanted:
        raise UserError(
            f"{path}: the face features have {width} numbers each and the embedder makes {wanted}; make them with"
            " `fairref faces` and this embedder."
        )


def _check_classes(classifiers, attributes, path, own):
    for role, of_role in classifiers.items():
        for classifier in of_role:
            for name, classes in attributes.items():
                known = tuple(classifier.classes.get(name, classes))
                if known != classes:
                    source = f"--judge {role}" if role in own else path
                    raise UserError(
                        f"{source}: classes of {name!r} are {classes}; expected {known} as in the {role} classifier."
                    )
