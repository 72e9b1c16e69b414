"""Translate names of weights to those inside fairref: diffusers' for U-Net and VAE, transformers' for CLIP.

A table has rows of (prefix in the other layout, prefix here); `rename` applies it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor

from fairref.errors import UserError

SHOWN = 3  # names in an error message

# Tensors of a checkpoint that belong to no network: the moving average of training, the autoencoder's
# discriminator, the schedule's tables. `position_ids` are ignored too, in any place.
IGNORED_PREFIXES = ("model_ema.", "first_stage_model.loss.", "loss.")
IGNORED_NAMES = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "logvar",
    "lvlb_weights",
    "scale_factor",
    "global_step",
}

# Inside one block: (LDM, diffusers). Names that are missing here are the same in both.
UNET_RESNET = (
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("emb_layers.1.", "time_emb_proj."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("skip_connection.", "conv_shortcut."),
)
VAE_RESNET = (
    ("norm1.", "norm1."),
    ("conv1.", "conv1."),
    ("norm2.", "norm2."),
    ("conv2.", "conv2."),
    ("nin_shortcut.", "conv_shortcut."),
)
VAE_ATTENTION = (
    ("norm.", "group_norm."),
    ("q.", "to_q."),
    ("k.", "to_k."),
    ("v.", "to_v."),
    ("proj_out.", "to_out.0."),
)
# One layer of either tower of open_clip's CLIP: (there, transformers).
OPEN_CLIP_LAYER = (
    ("ln_1.", "layer_norm1."),
    ("attn.q_proj.", "self_attn.q_proj."),
    ("attn.k_proj.", "self_attn.k_proj."),
    ("attn.v_proj.", "self_attn.v_proj."),
    ("attn.out_proj.", "self_attn.out_proj."),
    ("ln_2.", "layer_norm2."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
)
# The VAE's attention in files of diffusers before 0.18: (old, new).
VAE_LEGACY = tuple(
    (f"{half}.mid_block.attentions.0.{old}.", f"{half}.mid_block.attentions.0.{new}.")
    for half in ("encoder", "decoder")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
)


def unet_table(levels: int, layers: int) -> list[tuple[str, str]]:
    """Return (LDM prefix, diffusers prefix) of the U-Net's parameters; SD-1.5 has 4 levels of 2 layers.

    LDM numbers the blocks of a half from 0 on, over all levels. Going down, block 0 is conv_in. Each level has
    `layers` blocks and a downsampler, which the last level lacks. Going up, each level has `layers` + 1 blocks, and
    the last of them holds the upsampler.
    """
    table = [
        ("time_embed.0.", "time_embedding.linear_1."),
        ("time_embed.2.", "time_embedding.linear_2."),
        ("input_blocks.0.0.", "conv_in."),
        ("out.0.", "conv_norm_out."),
        ("out.2.", "conv_out."),
        ("middle_block.1.", "mid_block.attentions.0."),
    ]
    resnets = [("middle_block.0.", "mid_block.resnets.0."), ("middle_block.2.", "mid_block.resnets.1.")]
    for i in range(levels):
        for j in range(layers):
            n = i * (layers + 1) + j + 1
            resnets.append((f"input_blocks.{n}.0.", f"down_blocks.{i}.resnets.{j}."))
            table.append((f"input_blocks.{n}.1.", f"down_blocks.{i}.attentions.{j}."))
        table.append((f"input_blocks.{n + 1}.0.op.", f"down_blocks.{i}.downsamplers.0.conv."))
        for j in range(layers + 1):
            n = i * (layers + 1) + j
            resnets.append((f"output_blocks.{n}.0.", f"up_blocks.{i}.resnets.{j}."))
            table.append((f"output_blocks.{n}.1.", f"up_blocks.{i}.attentions.{j}."))
        for place in (1, 2):  # after the attention where the level has one
            table.append((f"output_blocks.{n}.{place}.conv.", f"up_blocks.{i}.upsamplers.0.conv."))
    return [*table, *_crossed(resnets, UNET_RESNET)]


def vae_table(levels: int, layers: int) -> list[tuple[str, str]]:
    """Return (LDM prefix, diffusers prefix) of the VAE's parameters; LDM's decoder counts from the finest level."""
    table, resnets, attentions = [], [], []
    for half in ("encoder", "decoder"):
        table += [(f"{half}.conv_in.", f"{half}.conv_in."), (f"{half}.conv_out.", f"{half}.conv_out.")]
        table.append((f"{half}.norm_out.", f"{half}.conv_norm_out."))
        resnets.append((f"{half}.mid.block_1.", f"{half}.mid_block.resnets.0."))
        resnets.append((f"{half}.mid.block_2.", f"{half}.mid_block.resnets.1."))
        attentions.append((f"{half}.mid.attn_1.", f"{half}.mid_block.attentions.0."))
    for i in range(levels):
        up = levels - 1 - i
        for j in range(layers):
            resnets.append((f"encoder.down.{i}.block.{j}.", f"encoder.down_blocks.{i}.resnets.{j}."))
        for j in range(layers + 1):
            resnets.append((f"decoder.up.{i}.block.{j}.", f"decoder.up_blocks.{up}.resnets.{j}."))
        table.append((f"encoder.down.{i}.downsample.", f"encoder.down_blocks.{i}.downsamplers.0."))
        table.append((f"decoder.up.{i}.upsample.", f"decoder.up_blocks.{up}.upsamplers.0."))
    table += [("quant_conv.", "quant_conv."), ("post_quant_conv.", "post_quant_conv.")]
    return [*table, *_crossed(resnets, VAE_RESNET), *_crossed(attentions, VAE_ATTENTION)]


def _crossed(blocks: Iterable[tuple[str, str]], inner: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the rows of `inner` under each row of `blocks`."""
    return [(there + a, here + b) for there, here in blocks for a, b in inner]


def rename(tensors: dict[str, Tensor], table: Iterable[tuple[str, str]], source: str) -> dict[str, Tensor]:
    """Return the tensors under new names: the longest prefix in the table counts, other names stay.

    Raises UserError for two tensors with one new name; `source` names the file.
    """
    longest_first = sorted(table, key=lambda row: -len(row[0]))
    renamed = {}
    for key, tensor in tensors.items():
        there, here = next(((a, b) for a, b in longest_first if key.startswith(a)), ("", ""))
        name = here + key[len(there) :]
        if name in renamed:
            raise UserError(f"{source}: two tensors for {name}, one of them {key}; use an intact checkpoint.")
        renamed[name] = tensor
    return renamed


def squeeze_vae_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the VAE's tensors with attention weights (C, C), where a file has 1x1 convolutions (C, C, 1, 1)."""
    return {
        key: tensor[:, :, 0, 0] if ".attentions." in key and tensor.shape[2:] == (1, 1) else tensor
        for key, tensor in tensors.items()
    }


def open_clip_table(text_layers: int, vision_layers: int) -> list[tuple[str, str]]:
    """Return (open_clip prefix, transformers prefix) of CLIP's parameters, both towers."""
    towers = (("", "text_model.", text_layers), ("visual.", "vision_model.", vision_layers))
    layers = [
        (f"{there}transformer.resblocks.{i}.", f"{here}encoder.layers.{i}.")
        for there, here, count in towers
        for i in range(count)
    ]
    return [
        *_crossed(layers, OPEN_CLIP_LAYER),
        ("token_embedding.", "text_model.embeddings.token_embedding."),
        ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        ("ln_final.", "text_model.final_layer_norm."),
        ("text_projection", "text_projection.weight"),
        ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
        ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
        ("visual.ln_pre.", "vision_model.pre_layrnorm."),
        ("visual.ln_post.", "vision_model.post_layernorm."),
        ("visual.proj", "visual_projection.weight"),
    ]


def open_clip_names(tensors: dict[str, Tensor], layers: tuple[int, int], source: str) -> dict[str, Tensor]:
    """Return the tensors of open_clip's CLIP with transformers' names and shapes.

    `layers`: of the text and the image tower. open_clip has queries, keys and values in one matrix of three blocks,
    and multiplies projections from the right.
    """
    text, vision = r"transformer\.resblocks\.(\d+)\.", r"visual\.transformer\.resblocks\.(\d+)\."
    check_count(tensors, text, layers[0], "text_cfg's layers", source)
    check_count(tensors, vision, layers[1], "vision_cfg's layers", source)
    apart = {}
    for key, tensor in tensors.items():
        if ".attn.in_proj_" in key:
            start, end = key.split("in_proj_")
            apart |= {f"{start}{x}_proj.{end}": part for x, part in zip("qkv", tensor.chunk(3), strict=True)}
        elif key in ("text_projection", "visual.proj"):
            apart[key] = tensor.T.contiguous()
        else:
            apart[key] = tensor
    return rename(apart, open_clip_table(*layers), source)


def ignored(key: str) -> bool:
    """Return whether a checkpoint's tensor belongs to no network."""
    return key.startswith(IGNORED_PREFIXES) or key in IGNORED_NAMES or key.split(".")[-1] == "position_ids"


def count(tensors: Iterable[str], pattern: str) -> int:
    """Return how many layers the names number: of a pattern with one group, how many values the group has."""
    matches = (re.match(pattern, name) for name in tensors)
    return len({match[1] for match in matches if match})


def check_count(tensors: Iterable[str], pattern: str, expected: int, setting: str, source: str) -> None:
    """Raise a UserError unless the names number as many layers as a setting says; before anything is built of it."""
    found = count(tensors, pattern)
    if found != expected:
        names = pattern.replace("\\", "").replace("(d+)", "N")
        raise UserError(
            f"{source}: has {found} of the layers {names}*, but {setting} asks for {expected}; use the configuration"
            " and weights that belong together."
        )


def some(names: list[str]) -> str:
    """Return the first few names, for a message."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def some_kinds(names: list[str]) -> str:
    """Return the first parts of names, each with how often it stands there, for a message."""
    kinds = Counter(name.split(".")[0] + ("." if "." in name else "") for name in names)
    return ", ".join(f"{kind}* ({n})" if kind.endswith(".") else kind for kind, n in sorted(kinds.items()))
