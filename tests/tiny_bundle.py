"""A bundle of all parts, tiny and untrained, for tests of what stands on a bundle. Deterministic."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fairref.bundle.configs import read_config
from fairref.bundle.judges import save_classifier
from fairref.emoji.bpe import train_bpe
from fairref.judges.dino import Dino, DinoConfig
from fairref.judges.mobilenet import Classifier, MobileNetConfig, MobileNetV3
from fairref.judges.mtcnn import MTCNN
from fairref.judges.sfnet import SFNet, SFNetConfig
from fairref.nets.clip import Clip, ClipConfig, ClipText, ClipTextConfig
from fairref.nets.unet import UNet, UNetConfig
from fairref.nets.vae import VAE, VAEConfig

RESOLUTION = 32
OCCUPATIONS = {
    "train": ["pilot", "nurse", "baker", "judge"],
    "validation": ["cook"],
    "test": ["singer", "farmer"],
}
ATTRIBUTES = {"gender": ["woman", "man"], "skin_tone": ["light", "medium", "dark"]}
RECIPE = {
    "iterations": 2,
    "batch": 4,
    "rank": 3,
    "lr": 1e-3,
    "steps": "2:3",
    "guidance": 2.0,
    "eval_steps": 2,
    "eval_guidance": 2.0,
    "eval_images": 2,
    "eval_images_train": 1,
    "checkpoint_every": 1,
}
CLIP_CONFIG = {
    "projection_dim": 16,
    "text_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
}
DINO_CONFIG = {"width": 12, "depth": 1, "heads": 2, "patch": 4, "trained_size": 16, "input_size": 16}
FACE_SIDE = 32
TEXT_CONFIG = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
UNET_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": RESOLUTION // 4,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [8, 16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
CONTRAST = 8.0  # of the first layers, so that untrained networks tell their inputs apart


def write_tiny_bundle(folder: str | Path, faces: bool = False, **recipe) -> Path:
    """Writes the bundle, with judges of faces and DINO if `faces`; `recipe` overrides RECIPE."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = _stable_diffusion(folder)
        with torch.no_grad():
            _judges(folder, vae.decode(torch.randn(64, 4, RESOLUTION // 4, RESOLUTION // 4)).clamp(-1, 1))
        if faces:
            _face_judges(folder)
    manifest = {
        "name": "tiny",
        "resolution": RESOLUTION,
        "attributes": ATTRIBUTES,
        "stable_diffusion": ".",
        "clip": "clip",
        "classifiers": {"finetune": "finetune", "evaluate": "evaluate"},
        "recipe": {**RECIPE, **recipe},
    }
    if faces:
        manifest |= {
            "dino": "dino",
            "detector": "detector",
            "embedder": "embedder",
            "face_features": "D_F.safetensors",
        }
    _json(folder / "bundle.json", manifest)
    _json(folder / "prompts.json", {"occupations": OCCUPATIONS})
    return folder


def _stable_diffusion(folder):
    texts = [f"a photo of the face of a {name}, a person" for names in OCCUPATIONS.values() for name in names]
    size = train_bpe(texts, 560, folder / "tokenizer")
    tokens = {"vocab_size": size, "eos_token_id": size - 1}
    vae = VAE(read_config(VAEConfig, VAE_CONFIG))
    vae.post_quant_conv.weight.data *= CONTRAST
    for name, config, network, file in (
        ("unet", UNET_CONFIG, UNet(read_config(UNetConfig, UNET_CONFIG)), "diffusion_pytorch_model"),
        ("vae", VAE_CONFIG, vae, "diffusion_pytorch_model"),
        (
            "text_encoder",
            {**TEXT_CONFIG, **tokens},
            ClipText(read_config(ClipTextConfig, {**TEXT_CONFIG, **tokens})),
            "model",
        ),
    ):
        _network(folder / name, config, network, file)
    _json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    return vae


def _judges(folder, x):
    """Judges that spread over the pictures x (B, 3, H, W): logits of mean 0 and standard deviation 1."""
    size = train_bpe(["a photo of the face of a pilot, a person"], 540, folder / "clip")
    config = {
        **CLIP_CONFIG,
        "text_config": {**CLIP_CONFIG["text_config"], "vocab_size": size, "eos_token_id": size - 1},
    }
    clip = Clip(read_config(ClipConfig, config))
    clip.vision_model.embeddings.patch_embedding.weight.data *= CONTRAST
    _network(folder / "clip", config, clip, "model")
    for name in ("finetune", "evaluate"):
        network = MobileNetV3(MobileNetConfig("small", 0.25, sum(map(len, ATTRIBUTES.values())), RESOLUTION))
        classifier = Classifier(network, ATTRIBUTES).eval()
        spread(classifier, x)
        save_classifier(classifier, folder / name)


@torch.no_grad()
def spread(classifier, x):
    """Brings a classifier's logits of the pictures x (B, 3, H, W) to mean 0 and standard deviation 1."""
    logits, last = torch.cat([*classifier(x).values()], 1), classifier.network.classifier[3]  # (B, M)
    last.weight /= logits.std(0)[:, None]
    last.bias.copy_((last.bias - logits.mean(0)) / logits.std(0))


def _face_judges(folder):
    """An untrained MTCNN, which finds nothing: tests put their own detector in its place."""
    _network(folder / "dino", DINO_CONFIG, Dino(DinoConfig(**DINO_CONFIG)), "model")
    _network(folder / "detector", {"smallest": 12}, MTCNN(), "model")
    config = SFNetConfig(4, (4, 4, 8, 8), features=6, side=FACE_SIDE)
    _network(folder / "embedder", {"side": FACE_SIDE}, SFNet(config), "model")
    save_file({"embeddings": F.normalize(torch.randn(9, 6), dim=1)}, folder / "D_F.safetensors")


def _network(folder, config, network, file):
    folder.mkdir(parents=True, exist_ok=True)
    _json(folder / "config.json", config)
    save_file(
        {key: tensor.contiguous() for key, tensor in network.state_dict().items()},
        folder / f"{file}.safetensors",
    )


def _json(path, d):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(d))
