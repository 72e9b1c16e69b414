"""Stable Diffusion itself: a folder in diffusers' layout, or a single-file LDM checkpoint -> ready networks.

Diffusers' layout: `unet/`, `vae/`, `text_encoder/` with `config.json` and safetensors each, `tokenizer/` with
`vocab.json` and `merges.txt`, `scheduler/scheduler_config.json`. Beside a single file, `vocab.json` and
`merges.txt` must stand in its folder or in `tokenizer/`; config files at the places of diffusers' layout are
used where they stand beside it, and else the shapes are SD-1.5's.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from fairref.bundle.configs import read_config
from fairref.diffusion.schedule import Schedule
from fairref.errors import UserError
from fairref.files.names import ldm_split, text_encoder_names, vae_names
from fairref.files.paths import read_json
from fairref.files.tokenizer import Tokenizer
from fairref.files.vocabulary import read_vocabulary
from fairref.files.weights import exists, load_strict, read, ready
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
    names: object  # (tensors, source) -> tensors with present names


NETWORKS: dict[str, Network] = {
    "unet": Network(UNetConfig, UNet, "diffusion_pytorch_model", SD15, lambda tensors, source: tensors),
    "vae": Network(VAEConfig, VAE, "diffusion_pytorch_model", VAEConfig((128, 256, 512, 512), 2), vae_names),
    "text_encoder": Network(
        ClipTextConfig,
        ClipText,
        "model",
        ClipTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
        lambda tensors, source: text_encoder_names(tensors),
    ),
}
SD15_SAMPLE_SIZE = 64  # height and width of z


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
    if not single and not (folder / "unet").is_dir():
        remake = " fairref emoji build makes it." if path.parts[-2:] == ("weights", "emoji") else ""
        raise UserError(
            f"{path}: found no unet/ in it; expected a folder with bundle.json, a diffusers-layout folder, "
            f"or a single *.safetensors file.{remake}"
        )
    texts = {name: folder / name / "config.json" for name in NETWORKS}
    said = {name: read_json(text) for name, text in texts.items() if text.is_file() or not single}
    configs = {
        name: read_config(network.config, said[name], str(texts[name])) if name in said else network.sd15
        for name, network in NETWORKS.items()
    }
    networks = {}
    for name, (tensors, source) in _weights(path, single, configs).items():
        with torch.device("meta"):  # random initial values would take longer than loading
            networks[name] = NETWORKS[name].network(configs[name])
        load_strict(networks[name], tensors, source)
    tokenizer = _tokenizer(path, single, configs["text_encoder"].max_position_embeddings)
    _check_sizes(configs, tokenizer, path)
    return StableDiffusion(
        tokenizer=tokenizer,
        schedule=_schedule(folder, single),
        sample_size=_side(said.get("unet", {}).get("sample_size"), path),
        **{name: ready(network, device, dtype) for name, network in networks.items()},
    )


def _side(sample_size, path):
    """Height and width of z: a number, as diffusers has it, or two that are equal; SD-1.5's where it isn't said."""
    said = sample_size or SD15_SAMPLE_SIZE
    sides = said if isinstance(said, list) else [said]
    if not all(type(side) is int and side == sides[0] for side in sides):
        raise UserError(
            f"{path}: the U-Net's sample_size is {sample_size!r}; expected a whole number, or a square's two."
        )
    return sides[0]


def _weights(path, single, configs):
    """Part -> (tensors with present names, file for messages)."""
    if single:
        unet, vae = (
            (len(c.block_out_channels), c.layers_per_block) for c in (configs["unet"], configs["vae"])
        )
        split = ldm_split(read(path), str(path), unet, vae)
        return {name: (tensors, f"{path} ({name})") for name, tensors in split.items()}
    weights = {}
    for name, part in NETWORKS.items():
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
    return Tokenizer(read_vocabulary(place), length)


def _check_sizes(configs, tokenizer, path):
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
    tokens = tokenizer.vocab_size
    if tokens > text.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokens} tokens; expected at most {text.vocab_size}, as many as the "
            "text encoder: use this model's vocab.json and merges.txt."
        )
