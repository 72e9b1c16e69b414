"""Make the emoji bundle, stage by stage: `fairref emoji build` trains the stages that are missing in build/emoji.

An interrupted stage goes on from its last file. Delete build/emoji to start anew.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from fairref.bundle.judges import (
    FACE_FEATURES,
    load_embedder,
    load_sprites,
    save_classifier,
)
from fairref.emoji import judging, stages
from fairref.emoji.captions import (
    SPLITS,
    Concept,
    Occupation,
    concepts,
    occupations,
    prompt_of,
)
from fairref.emoji.pictures import AGES, COLOURLESS, draw
from fairref.files.paths import write_json
from fairref.files.weights import index_of
from fairref.judges.sprites import LOOKS, RESOLUTION
from fairref.judges.templates import Templates
from fairref.nets.vae import VAE

TEMPLATE_IMAGES = 2048  # for the settings of the template judge
LARGEST_FILE = 16 * 2**20  # bytes of weights in one file
RECIPE = {
    "iterations": 180,
    "group": 2,
    "lr": 2e-3,
    "lr_end": 0.2,
    "warmup": 5,
    "ema": 0.97,
    "steps": "4:5",
    "grad_steps": 1,
    "guidance": 2.5,
    "eval_steps": 12,
    "eval_guidance": 2.5,
    "eval_images": 30,
    "eval_images_train": 0,
    "evaluate": "ema",
    "checkpoint_every": 20,
    "validate_every": 0,
    "validate_prompts": 12,
    "grid_every": 60,
    "clip": 0.1,
    "C": 0.7,
    "lambda_img": 1.0,
    "lambda_face": 0.1,
    "explicit_every": 3,
    "gender,skin_tone": {"lr": 1e-3, "lambda_img": 2.5},
    "gender,skin_tone,age": {"lr": 1e-3, "lambda_img": 2.5},
}
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": "0.30.0",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "solver_order": 2,
    "lower_order_final": True,
    "euler_at_final": False,
    "thresholding": False,
    "use_karras_sigmas": False,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "final_sigmas_type": "zero",
}
TOKENIZER = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": stages.TOKENS,
    "do_lower_case": True,
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "add_prefix_space": False,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
EXPLICIT = {
    "gender": {
        name: f"a photo of the face of a {name} {{occupation}}, a person"
        for name in stages.ATTRIBUTES["gender"]
    },
    "skin_tone": {
        name: f"a photo of the face of a {name}-skinned {{occupation}}, a person"
        for name in stages.ATTRIBUTES["skin_tone"]
    },
    "age": {name: f"a photo of the face of a {name} {{occupation}}, a person" for name in AGES},
}


def train(folder: Path) -> dict[str, nn.Module]:
    """Return every network, from the stage files in `folder` or trained now."""
    folder.mkdir(parents=True, exist_ok=True)
    vae = stages.scaled(stages.train_vae(folder))
    clip = stages.train_clip(folder)
    painter = stages.polish_unet(folder, vae, stages.train_unet(folder, vae, clip))
    judges = {role: judging.train_classifier(folder, role, vae) for role in judging.CLASSIFIER_CONFIG}
    judges |= {
        "detector": judging.train_detector(folder, vae),
        "embedder": judging.train_embedder(folder, vae),
        "dino": judging.train_dino(folder),
    }
    return {"vae": vae, "clip": clip, "unet": painter.unet, "text_encoder": painter.text_encoder, **judges}


def save_half(network: nn.Module, path: Path, limit: int = LARGEST_FILE) -> None:
    """Write safetensors in float16 (scalars keep their dtype), split like diffusers' into files of `limit` bytes."""
    for old in path.parent.glob(f"{path.stem}*"):  # an earlier build may have split it otherwise
        old.unlink()
    tensors = {k: (v.half() if v.dim() else v).contiguous() for k, v in network.state_dict().items()}
    parts, size = [{}], 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > limit and parts[-1]:
            parts, size = [*parts, {}], 0
        parts[-1][name], size = tensor, size + tensor.nbytes
    if len(parts) == 1:
        save_file(tensors, path, metadata={"format": "pt"})
        return
    place = {}
    for n, part in enumerate(parts, 1):
        file = path.with_stem(f"{path.stem}-{n:05}-of-{len(parts):05}")
        save_file(part, file, metadata={"format": "pt"})
        place |= dict.fromkeys(part, file.name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(index_of(path), {"metadata": {"total_size": total}, "weight_map": place})


def write_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's two files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((source / name).read_bytes())


def opposed(split: str) -> list[str]:
    """Return the occupations of a part in pairs: the most female and the most male one, then the next two."""
    jobs = sorted((job for job in occupations() if job.split == split), key=lambda job: -job.share_women)
    pairs = zip(jobs, reversed(jobs), strict=True)
    return [job.name for pair in pairs for job in pair][: len(jobs)]


KINDS_OF = {"sports": ("activity",), "style_context": ("context", "style"), "descriptors": ("descriptor",)}


def concept_rows(name: str) -> list[tuple[Concept, Occupation | None, str]]:
    """Return the rows of a concept (docs/method.md §7): phrase, occupation if any, and prompt.

    The occupations of a part take turns.
    """
    jobs = {split: [job for job in occupations() if job.split == split] for split in SPLITS}
    rows = []
    for n, c in enumerate(c for kind in KINDS_OF[name] for c in concepts(kind)):
        job = jobs[c.split][7 * n % len(jobs[c.split])] if name == "style_context" else None
        rows.append((c, job, prompt_of(c, job.name if job else "")))
    return rows


def concept_prompts() -> dict[str, dict[str, list[str]]]:
    """Return the prompts of each concept, by part."""
    parts = ("train", "test")
    return {
        name: {part: [text for c, _, text in concept_rows(name) if c.split == part] for part in parts}
        for name in KINDS_OF
    }


def hiding() -> dict[str, list[str]]:
    """Return, for each attribute, the occupations and prompts whose pictures do not show it.

    Age is hidden where a hat covers the hair, age and skin tone where a style has no colours.
    """
    hatted = [job for job in occupations() if not load_sprites().aged[LOOKS.index(job.look)]]
    grey, under_hats = [], []
    for c, job, text in (row for name in KINDS_OF for row in concept_rows(name)):
        if c.kind == "style" and c.thing in COLOURLESS:
            grey.append(text)
        elif job in hatted:
            under_hats.append(text)
    return {"age": [*(job.name for job in hatted), *under_hats, *grey], "skin_tone": grey}


def prompts() -> dict[str, object]:
    """Return the bundle's prompts.json."""
    return {
        "occupations": {split: opposed(split) for split in SPLITS},
        "concepts": concept_prompts(),
        "explicit": EXPLICIT,
        "hiding": hiding(),
    }


@torch.no_grad()
def template_settings(vae: VAE) -> dict[str, object]:
    """Return the template judge's settings, measured on real pictures behind the VAE.

    threshold: the error of the 99.9 % quantile, times 1.05. shares: the mean share of each look.
    """
    judge = Templates(load_sprites(), float("inf"))
    scenes = stages.balanced_scene(TEMPLATE_IMAGES, stages.generator_for(0, "threshold", 0), portraits=True)
    parts = [scenes[part] for part in torch.arange(len(scenes)).split(128)]
    verdicts = [judge(stages.reconstructed(vae, draw(part))) for part in parts]
    error, share = (torch.cat([verdict[name] for verdict in verdicts]) for name in ("error", "share"))
    shares = {name: share[scenes.person.look == k].mean().item() for k, name in enumerate(LOOKS)}
    return {
        "threshold": round(1.05 * error.quantile(0.999).item(), 4),
        "shares": {name: round(value, 3) for name, value in shares.items()},
    }


def export(networks: dict[str, nn.Module], folder: Path, out: Path) -> None:
    """Write the bundle: diffusers' layout, the judges beside it, and the manifest."""
    out.mkdir(parents=True, exist_ok=True)
    parts = {
        "vae": (
            {**stages.VAE_CONFIG, "scaling_factor": networks["vae"].config.scaling_factor},
            "diffusion_pytorch_model",
        ),
        "unet": (stages.UNET_CONFIG, "diffusion_pytorch_model"),
        "text_encoder": (stages.TEXT_CONFIG, "model"),
        "clip": (stages.CLIP_CONFIG, "model"),
    }
    for name, (config, file) in parts.items():
        (out / name).mkdir(exist_ok=True)
        write_json(out / name / "config.json", config)
        save_half(networks[name], out / name / f"{file}.safetensors")
    for role in judging.CLASSIFIER_CONFIG:
        save_classifier(networks[role], out / f"classifier_{role}", torch.float16)
    judges = {
        "detector": judging.DETECTOR_CONFIG,
        "embedder": {"side": judging.EMBEDDER_CONFIG["side"]},
        "dino": judging.DINO_CONFIG,
    }
    for name, config in judges.items():
        (out / name).mkdir(exist_ok=True)
        write_json(out / name / "config.json", config)
        save_half(networks[name], out / name / "model.safetensors")
    features = judging.face_features(load_embedder(out / "embedder"))  # of the weights as they are saved
    save_file({FACE_FEATURES: features.half()}, out / "face_features.safetensors")
    write_tokenizer(folder / "tokenizer", out / "tokenizer")
    write_json(out / "tokenizer" / "tokenizer_config.json", TOKENIZER)
    write_tokenizer(folder / "tokenizer", out / "clip")
    (out / "scheduler").mkdir(exist_ok=True)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(out / "model_index.json", MODEL_INDEX)
    write_json(out / "templates.json", template_settings(networks["vae"]))
    write_json(out / "prompts.json", prompts())
    write_json(
        out / "bundle.json",
        {
            "name": "emoji",
            "resolution": RESOLUTION,
            "attributes": {name: list(classes) for name, classes in stages.ATTRIBUTES.items()},
            "stable_diffusion": ".",
            "clip": "clip",
            "classifiers": {role: f"classifier_{role}" for role in judging.CLASSIFIER_CONFIG},
            "detector": "detector",
            "embedder": "embedder",
            "face_features": "face_features.safetensors",
            "dino": "dino",
            "templates": "templates.json",
            "recipe": RECIPE,
        },
    )
