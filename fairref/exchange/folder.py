"""Files as other tools read them: safetensors with their own headers, and the folders of diffusers' layout."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.bundle.manifest import MANIFEST
from fairref.bundle.recipe import resolve
from fairref.bundle.stable_diffusion import tokenizer_folder
from fairref.files.paths import read_json, write_json
from fairref.files.vocabulary import BOS, EOS

LIBRARIES = {  # folder -> (library, class), as model_index.json has it
    "scheduler": ("diffusers", "DPMSolverMultistepScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
ABSENT = ("feature_extractor", "image_encoder", "safety_checker")
SOLVER = {  # fairref's own sampling, in the words of diffusers' DPMSolverMultistepScheduler
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "solver_order": 2,
    "lower_order_final": True,
    "timestep_spacing": "linspace",
    "steps_offset": 1,  # of no effect here; diffusers warns of any other
}
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a safetensors file with this header. Equal contents make equal bytes."""
    data = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata=header
    )
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])  # the library writes the header's keys in any order
    entries["__metadata__"] = dict(sorted(header.items()))
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data[:8] + text)
        file.write(memoryview(data)[8 + length :])


def write_configs(bundle: Bundle, folder: Path, weights: str = ".") -> None:
    """Write all of a diffusers folder but the weights: the networks' sizes, the tokenizer, the scheduler, an index.

    bundle.json says how fairref draws with it; `weights` is the single file in the folder, or the folder itself.
    """
    for name, config in _configs(bundle, weights).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, config)
    _write_tokenizer(bundle, folder / "tokenizer")


def _configs(bundle, weights):
    """File -> its content."""
    unet, vae, text, schedule = (
        bundle.unet.config,
        bundle.vae.config,
        bundle.text_encoder.config,
        bundle.schedule,
    )
    factor = 2 ** (len(vae.block_out_channels) - 1)
    tokenizer, recipe = bundle.tokenizer, resolve((), bundle.recipe, {}, bundle.path, bundle.attributes)
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": text.eos_token_id, "pad_token_id": tokenizer.pad}
    levels = len(vae.block_out_channels)
    vae_blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    return {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            **{name: list(of) for name, of in LIBRARIES.items()},
            **{name: [None, None] for name in ABSENT},
            "requires_safety_checker": False,
        },
        "unet/config.json": {
            "_class_name": LIBRARIES["unet"][1],
            **asdict(unet),
            "sample_size": bundle.resolution // factor,
        },
        "vae/config.json": {
            "_class_name": LIBRARIES["vae"][1],
            **asdict(vae),
            **vae_blocks,
            "sample_size": bundle.resolution,
        },
        "text_encoder/config.json": {
            "architectures": [LIBRARIES["text_encoder"][1]],
            "model_type": "clip_text_model",
            **asdict(text),
            **ids,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": LIBRARIES["scheduler"][1],
            "num_train_timesteps": schedule.T,
            "beta_start": schedule.beta_start,
            "beta_end": schedule.beta_end,
            "beta_schedule": schedule.kind,
            "prediction_type": "epsilon",
            **SOLVER,
            "final_sigmas_type": recipe.end,
        },
        MANIFEST: {
            "stable_diffusion": weights,
            "resolution": bundle.resolution,
            "recipe": {
                "eval_steps": recipe.eval_steps,
                "eval_guidance": recipe.eval_guidance,
                "end": recipe.end,
            },
        },
    }


def _write_tokenizer(bundle, folder):
    """The base's own tokenizer files; written anew where it has none."""
    place = tokenizer_folder(bundle.path / bundle.manifest.get("stable_diffusion", "."))
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES if place else ():
        if (place / name).is_file():
            shutil.copyfile(place / name, folder / name)
    if not place:
        bundle.tokenizer.save(folder)
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        write_json(
            config,
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": bundle.tokenizer.length,
                "bos_token": BOS,
                "eos_token": EOS,
                "unk_token": EOS,
                "pad_token": bundle.tokenizer.pad_token,
            },
        )
    else:
        write_json(config, {k: v for k, v in read_json(config).items() if k != "name_or_path"})
