"""Stable Diffusion itself: a folder in diffusers' layout, or a single-file LDM checkpoint -> ready networks.

Diffusers' layout: `unet/`, `vae/`, `text_encoder/` with `config.json` and safetensors each, `tokenizer/`, and
`scheduler/scheduler_config.json`. A single file needs nothing beside it. What stands beside it counts: a tokenizer in
its folder or in `tokenizer/`, config files at the places of diffusers' layout, NAME.yaml, NAME.vae.safetensors, and
`vae/` for a file without a VAE. Without config files the shapes are SD-1.5's.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from fairref.bundle.configs import check_counts, read_config
from fairref.bundle.scheduler import read_schedule
from fairref.bundle.single_file import read_single, say_ignored
from fairref.bundle.typed import shown
from fairref.diffusion.schedule import Schedule
from fairref.errors import UserError
from fairref.files.ldm import INPAINTING, check_kind, ldm_unet_names, text_encoder_names, vae_names
from fairref.files.paths import read_json, refuse_mistyped
from fairref.files.tokenizer import Tokenizer, check_rows
from fairref.files.tokenizer_files import has_tokenizer, read_vocabulary
from fairref.files.vocabulary import clip_vocabulary
from fairref.files.weights import find, load_strict, read, ready
from fairref.nets.clip import ClipText, ClipTextConfig
from fairref.nets.unet import SD15, UNet, UNetConfig
from fairref.nets.vae import VAE, VAEConfig


@dataclass(frozen=True)
class Network:
    """One network of Stable Diffusion, which is also the name of its folder."""

    config: type  # settings dataclass, a key of configs.IMPLEMENTED
    network: type  # built from the settings
    file: str  # weights inside the folder, without `.safetensors`
    sd15: object  # settings where no config.json says them
    peer: list[str]  # its library and class in model_index.json


NETWORKS: dict[str, Network] = {
    "unet": Network(UNetConfig, UNet, "diffusion_pytorch_model", SD15, ["diffusers", "UNet2DConditionModel"]),
    "vae": Network(
        VAEConfig,
        VAE,
        "diffusion_pytorch_model",
        VAEConfig((128, 256, 512, 512), 2),
        ["diffusers", "AutoencoderKL"],
    ),
    "text_encoder": Network(
        ClipTextConfig,
        ClipText,
        "model",
        ClipTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
        ["transformers", "CLIPTextModel"],
    ),
}
SD_2 = 1024  # cross_attention_dim of its U-Nets
SD15_SAMPLE_SIZE = 64  # height and width of z
MAX_SIDE = 1024  # of z
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")  # of model_index.json


@dataclass(frozen=True)
class StableDiffusion:
    """Ready networks of one model, which fit each other."""

    tokenizer: Tokenizer
    text_encoder: ClipText
    unet: UNet
    vae: VAE
    schedule: Schedule
    sample_size: int  # height and width of the latents that the model was trained on


def load_stable_diffusion(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> StableDiffusion:
    """The networks of a folder in diffusers' layout or of a single-file checkpoint. Raises UserError."""
    single = path.is_file()
    folder = path.parent if single else path
    sampler = None if single else _check_pipeline(path)
    said = {}
    for name in NETWORKS:
        place = folder / name / "config.json"
        if place.is_file() or not single:
            said[name] = read_json(place)
    configs = {
        name: _config(name, said[name], folder / name / "config.json") if name in said else network.sd15
        for name, network in NETWORKS.items()
    }
    networks = {}
    for name, (tensors, source) in _weights(path, single, configs).items():
        check_counts(configs[name], tensors, source)
        with torch.device("meta"):  # random initial values would take longer than loading
            networks[name] = NETWORKS[name].network(configs[name])
        load_strict(networks[name], tensors, source)
    tokenizer = _tokenizer(path, single, configs["text_encoder"])
    _check_sizes(configs, path)
    return StableDiffusion(
        tokenizer=tokenizer,
        schedule=_schedule(folder, single, sampler),
        sample_size=_side(
            said.get("unet", {}).get("sample_size", SD15_SAMPLE_SIZE), folder / "unet/config.json"
        ),
        **{name: ready(network, device, dtype) for name, network in networks.items()},
    )


def _check_pipeline(path):
    """The scheduler's class in model_index.json, if there is one. Raises UserError for a folder of another kind."""
    index = path / "model_index.json"
    d = read_json(index) if index.is_file() else {}
    kind = d.get("_class_name", PIPELINES[0])
    if kind not in PIPELINES:
        raise UserError(
            f"{index}: _class_name is {shown(kind)}; expected {PIPELINES[0]}: use a model of Stable Diffusion 1.x."
        )
    if not (path / "unet").is_dir():
        remake = " fairref emoji build makes it." if path.parts[-2:] == ("weights", "emoji") else ""
        raise UserError(
            f"{path}: found no unet/ in it; expected a folder with bundle.json, a diffusers-layout folder, "
            f"or a single *.safetensors file.{remake}"
        )
    for name, network in NETWORKS.items():
        if d.get(name, network.peer) != network.peer:
            raise UserError(
                f"{index}: {name} is {shown(d[name])}; expected {network.peer}: get the file again."
            )
    sampler = d.get("scheduler", [None, None])
    if not (isinstance(sampler, list) and len(sampler) == 2 and isinstance(sampler[1], str | None)):
        raise UserError(
            f"{index}: scheduler is {shown(sampler)}; expected a library and a class: get it again."
        )
    return sampler[1]


def _config(name, d, path):
    """The settings of a network's config.json."""
    if name == "unet":
        channels, kind = d.get("in_channels"), None
        if channels in INPAINTING:
            kind = f"an inpainting or edit model, whose U-Net takes {channels} channels"
        if d.get("addition_embed_type") == "text_time":
            kind = "SDXL"
        if d.get("cross_attention_dim") == SD_2:
            kind = "SD-2"
        if kind:
            raise UserError(f"{path}: is of {kind}; use a model of Stable Diffusion 1.x.")
        refuse_mistyped(("sample_size",), d, str(path))
    if (
        name == "text_encoder" and d.get("model_type") == "clip"
    ):  # of a whole CLIPModel, as transformers takes it
        d = d.get("text_config") or {}
    return read_config(NETWORKS[name].config, d, str(path))


def _side(sample_size, path):
    """Height and width of z: a number, as diffusers has it, or two that are equal; SD-1.5's where it isn't said."""
    sides = sample_size if isinstance(sample_size, list) else [sample_size]
    if (
        not all(type(side) is int and side == sides[0] and 0 < side <= MAX_SIDE for side in sides)
        or not sides
    ):
        raise UserError(
            f"{path}: the U-Net's sample_size is {shown(sample_size)}; expected a whole number up to {MAX_SIDE}, or a"
            " square's two."
        )
    return sides[0]


def _weights(path, single, configs):
    """Part -> (tensors with present names, file for messages)."""
    shapes = {
        name: (len(configs[name].block_out_channels), configs[name].layers_per_block)
        for name in ("unet", "vae")
    }
    if single:
        parts, sources = read_single(path)
    else:
        files = {name: find(path / name, part.file) for name, part in NETWORKS.items()}
        parts = {name: read(file) for name, file in files.items()}
        sources = {name: str(file) for name, file in files.items()}
        check_kind({k: v for k, v in parts["unet"].items() if k == "conv_in.weight"}, sources["unet"])
    text, outside = text_encoder_names(parts["text_encoder"])
    say_ignored(sources["text_encoder"], outside)
    unet = ldm_unet_names(parts["unet"], shapes["unet"], sources["unet"]) if single else parts["unet"]
    vae = vae_names(parts["vae"], shapes["vae"], sources["vae"])
    return {
        name: (part, sources[name]) for name, part in (("unet", unet), ("vae", vae), ("text_encoder", text))
    }


def _schedule(folder, single, sampler):
    path = folder / "scheduler" / "scheduler_config.json"
    if single and not path.is_file():
        return Schedule()
    return read_schedule(read_json(path, finite=False), str(path), sampler)  # lambda_min_clipped is -Infinity


def tokenizer_folder(path: Path) -> Path | None:
    """Where the tokenizer of a folder or a single file is; None where there is none."""
    places = [path.parent, path.parent / "tokenizer"] if path.is_file() else [path / "tokenizer"]
    return next((place for place in places if has_tokenizer(place)), None)


def _tokenizer(path, single, text):
    """The tokenizer beside it, or CLIP's own for a single file that has none; its ids must be rows of the embedding."""
    place = tokenizer_folder(path)
    if place is None and not single:
        raise UserError(
            f"{path}: no tokenizer with it; put CLIP's vocab.json and merges.txt into {path / 'tokenizer'}."
        )
    vocabulary = clip_vocabulary() if place is None else read_vocabulary(place)
    tokenizer = Tokenizer(vocabulary, text.max_position_embeddings)
    check_rows(tokenizer, text.vocab_size, str(path))
    return tokenizer


def _check_sizes(configs, path):
    """The parts must fit each other, which no single one can tell."""
    text, unet, vae = (configs[name] for name in ("text_encoder", "unet", "vae"))
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
