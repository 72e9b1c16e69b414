"""The tensors of a folder in diffusers' layout under the names of a single-file LDM checkpoint."""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fairref.bundle.stable_diffusion import NETWORKS
from fairref.files.names import unet_table, vae_table

FILES = {name: f"{name}/{part.file}.safetensors" for name, part in NETWORKS.items()}


def to_ldm(folder: Path) -> dict[str, Tensor]:
    """Return all tensors, the VAE's attention as 1x1 convolutions."""
    unet, vae, text = (load_file(folder / FILES[name]) for name in FILES)
    configs = {name: json.loads((folder / name / "config.json").read_text()) for name in ("unet", "vae")}
    attention_up = [kind.startswith("Cross") for kind in reversed(configs["unet"]["down_block_types"])]
    shapes = {name: (len(d["block_out_channels"]), d["layers_per_block"]) for name, d in configs.items()}

    def back(tensors, table):
        # of the two places that an upsampler may have, the one after the attention where there is one
        rows = {}
        for there, here in table:
            if "upsamplers" in here and there.startswith("output"):
                place = 2 if attention_up[int(here.split(".")[1])] else 1
                if there.split(".")[2] != str(place):
                    continue
            rows[here] = there
        found = {}
        for key, value in tensors.items():
            here = max((h for h in rows if key.startswith(h)), key=len)
            found[rows[here] + key.removeprefix(here)] = value
        return found

    ldm = {f"model.diffusion_model.{k}": v for k, v in back(unet, unet_table(*shapes["unet"])).items()}
    for key, value in back(vae, vae_table(*shapes["vae"])).items():
        square = ".attn_1." in key and value.dim() == 2
        ldm[f"first_stage_model.{key}"] = value[:, :, None, None] if square else value
    for key, value in text.items():
        ldm[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    return ldm
