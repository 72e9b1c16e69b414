"""Names and shapes of tensors in other tools' files, made from those here.

A name here is `<network>.<layer>.<matrix>.weight`. Each part between two dots is renamed as a whole: `down_blocks`
also holds "down".
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fairref.files.ldm import LDM_PARTS
from fairref.files.names import rename, unet_table, vae_table
from fairref.nets.unet import ATTENDS, UNetConfig
from fairref.nets.vae import VAEConfig

Pairs = Mapping[
    str, tuple[Tensor, Tensor]
]  # layer -> down (r, in) or (r, in, k, k), up (out, r) or (out, r, 1, 1)
States = Mapping[str, Mapping[str, Tensor]]  # network -> its tensors under their names here

KOHYA = {"text_encoder": "lora_te", "unet": "lora_unet"}  # network -> what a layer's name begins with
LDM_PREFIXES = {part: prefixes[0] for part, prefixes in LDM_PARTS.items()}
POSITIONS = "text_model.embeddings.position_ids"  # 0, 1, 2, ...: of no use, but in every LDM checkpoint


def to_peft(pairs: Pairs) -> dict[str, Tensor]:
    """Return LoRA under PEFT's names: A is down, B is up."""
    tensors = {}
    for layer, (down, up) in pairs.items():
        tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = down, up
    return tensors


def to_kohya(pairs: Pairs) -> dict[str, Tensor]:
    """Return LoRA under kohya's names, with alpha = rank, which means the scale 1."""
    tensors = {}
    for layer, (down, up) in pairs.items():
        network, *parts = layer.split(".")
        name = "_".join([KOHYA[network], *parts])
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
        tensors[f"{name}.alpha"] = torch.tensor(float(len(down)))
    return tensors


def to_ldm(states: States, unet: UNetConfig, vae: VAEConfig) -> dict[str, Tensor]:
    """Return all three networks as one LDM checkpoint has them."""
    attends = [ATTENDS[kind] for kind in unet.up_block_types]
    tables = {
        "unet": [row for row in unet_table(*_size(unet)) if _is_there(row, attends)],
        "vae": vae_table(*_size(vae)),
        "text_encoder": [],
    }
    tensors = {}
    for network, table in tables.items():
        back = [(here, there) for there, here in table]
        renamed = rename(dict(states[network]), back, network)
        tensors |= {LDM_PREFIXES[network] + name: tensor for name, tensor in renamed.items()}
    length = len(states["text_encoder"]["text_model.embeddings.position_embedding.weight"])
    tensors[LDM_PREFIXES["text_encoder"] + POSITIONS] = torch.arange(length)[None]
    return {name: _as_convolution(name, tensor) for name, tensor in tensors.items()}


def _size(config):
    """Levels, and layers of each."""
    return len(config.block_out_channels), config.layers_per_block


def _is_there(row, attends):
    """Whether a row of the table is of this U-Net: an upsampler stands behind the attention, if there is one."""
    there, here = row
    if ".upsamplers." not in here:
        return True
    return there.split(".")[2] == ("2" if attends[int(here.split(".")[1])] else "1")


def _as_convolution(name, tensor):
    """The VAE's attention as 1x1 convolutions."""
    is_attention = name.startswith("first_stage_model.") and ".attn_1." in name
    return tensor[:, :, None, None] if is_attention and tensor.dim() == 2 else tensor
