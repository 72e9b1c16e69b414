"""Files of weights -> named tensors -> networks, strictly; and the renaming of other layouts.

The names inside fairref are those of diffusers (U-Net, VAE) and transformers (CLIP). Other layouts of the
same weights are brought to them here: `rename` applies a table of (prefix there, prefix here).
"""

import json
import os
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fairref.errors import UserError

PICKLES = (".pth", ".pt", ".bin")
INFO = (
    "fairref"  # the one key of our files' metadata: several would come in an order of their own at each run
)
SHOWN = 3  # differing keys that an error message names

# The parts of a single-file LDM checkpoint: prefix there -> part.
LDM_PARTS = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.transformer.": "text_encoder",
}
# What a checkpoint holds beside its networks (and `position_ids` in any place): the moving average of
# training, the autoencoder's discriminator, the schedule's tables.
IGNORED_PREFIXES = ("model_ema.", "first_stage_model.loss.")
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
    """(LDM prefix, diffusers prefix) of the U-Net's parameters; SD-1.5 has 4 levels of 2 layers.

    LDM numbers the blocks of each half through: 0 is conv_in, then each level has `layers` blocks and, but
    for the last, a downsampler; going up, `layers` + 1 blocks, of which the last holds the upsampler.
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
    return table + _crossed(resnets, UNET_RESNET)


def vae_table(levels: int, layers: int) -> list[tuple[str, str]]:
    """(LDM prefix, diffusers prefix) of the VAE's parameters; LDM's decoder counts from the finest level."""
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
    return table + _crossed(resnets, VAE_RESNET) + _crossed(attentions, VAE_ATTENTION)


def _crossed(blocks, inner):
    return [(there + a, here + b) for there, here in blocks for a, b in inner]


def rename(tensors: dict[str, Tensor], table, source: str) -> dict[str, Tensor]:
    """The same tensors under new names: the longest prefix in the table counts, other names stay.

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
    """The VAE's attention weights as (C, C), where a file has them as 1x1 convolutions (C, C, 1, 1)."""
    return {
        key: tensor[:, :, 0, 0] if ".attentions." in key and tensor.shape[2:] == (1, 1) else tensor
        for key, tensor in tensors.items()
    }


def vae_names(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """A diffusers VAE file of any age -> present names and shapes."""
    return squeeze_vae_attention(rename(tensors, VAE_LEGACY, source))


def text_encoder_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformers CLIPTextModel file -> names with `text_model.` (5.6 and later write them without)."""
    if any(key.startswith("text_model.") for key in tensors):
        return tensors
    return {f"text_model.{key}": tensor for key, tensor in tensors.items()}


def open_clip_table(text_layers: int, vision_layers: int) -> list[tuple[str, str]]:
    """(open_clip prefix, transformers prefix) of CLIP's parameters, both towers."""
    towers = (("", "text_model.", text_layers), ("visual.", "vision_model.", vision_layers))
    layers = [
        (f"{there}transformer.resblocks.{i}.", f"{here}encoder.layers.{i}.")
        for there, here, count in towers
        for i in range(count)
    ]
    return _crossed(layers, OPEN_CLIP_LAYER) + [
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
    """A CLIP file of open_clip -> names and shapes of transformers; `layers` of the text and the image tower.

    There queries, keys and values are one matrix of three blocks, and projections are multiplied from the right.
    """
    apart = {}
    for key, tensor in tensors.items():
        if ".attn.in_proj_" in key:
            start, end = key.split("in_proj_")
            apart |= {f"{start}{x}_proj.{end}": part for x, part in zip("qkv", tensor.chunk(3))}
        elif key in ("text_projection", "visual.proj"):
            apart[key] = tensor.T.contiguous()
        else:
            apart[key] = tensor
    return rename(apart, open_clip_table(*layers), source)


def ignored(key: str) -> bool:
    """Whether a checkpoint's tensor belongs to no network."""
    return key.startswith(IGNORED_PREFIXES) or key in IGNORED_NAMES or key.split(".")[-1] == "position_ids"


def ldm_split(tensors: dict[str, Tensor], source: str, unet=(4, 2), vae=(4, 2)) -> dict[str, dict]:
    """Single-file LDM checkpoint -> {"unet", "vae", "text_encoder"}, names of diffusers and transformers.

    `unet` and `vae` are (levels, layers per block). Raises UserError for a tensor of none of the three.
    """
    parts = {part: {} for part in LDM_PARTS.values()}
    strangers = []
    for key, tensor in tensors.items():
        if ignored(key):
            continue
        prefix = next((p for p in LDM_PARTS if key.startswith(p)), None)
        if prefix is None:
            strangers.append(key)
        else:
            parts[LDM_PARTS[prefix]][key.removeprefix(prefix)] = tensor
    empty = [p for p, part in LDM_PARTS.items() if not parts[part]]
    if strangers or empty:
        found = f"found {_some(strangers)}" if strangers else f"found no {empty[0]}*"
        raise UserError(
            f"{source}: {found}, expected {', '.join(p + '*' for p in LDM_PARTS)}; "
            "use a whole single-file checkpoint of Stable Diffusion 1.x."
        )
    return {
        "unet": rename(parts["unet"], unet_table(*unet), source),
        "vae": squeeze_vae_attention(rename(parts["vae"], vae_table(*vae), source)),
        "text_encoder": text_encoder_names(parts["text_encoder"]),
    }


def read_json(path: str | Path) -> dict:
    """The object of a JSON file. Raises UserError."""
    path = Path(path)
    try:
        d = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); put the file there.") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); get or write the file again.") from error
    if not isinstance(d, dict):
        raise UserError(f"{path}: found a {type(d).__name__}, expected a JSON object; correct the file.")
    return d


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises UserError; never unpickles.

    Where the file is split, `PATH.index.json` stands in its place and names the files that hold each tensor.
    """
    path = Path(path)
    index = path.with_name(f"{path.name}.index.json")
    if not path.is_file() and index.is_file():
        return _read_split(index)
    if not path.is_file():
        pickles = sorted(p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".ckpt", ".pt"))
        beside = f" ({pickles[0]} is a pickle, which could run code and isn't read)" if pickles else ""
        raise UserError(f"{path}: no such file{beside}; put the safetensors file there or correct the path.")
    _check_header(path)
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged safetensors file ({error}); get it again.") from error


def write(path: str | Path, tensors: dict[str, Tensor], info: dict) -> None:
    """A safetensors file with `info` as its metadata, by way of a temporary name. Raises UserError.

    Equal contents make equal bytes.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with temporary.open("wb") as file:  # not save_file, whose files no other user may read
            file.write(save(tensors, metadata={INFO: json.dumps(info, sort_keys=True)}))
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name with nothing in it
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: can't be written ({error}); make room there or choose another folder."
        ) from None


def read_info(path: str | Path) -> dict:
    """What `write` was given as `info`; {} for another's file."""
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(INFO, "{}")
    try:
        info = json.loads(text)
    except ValueError:
        return {}
    return info if isinstance(info, dict) else {}


def write_json(path: Path, content: dict | list) -> None:
    """A JSON file, in a folder that is made if need be, by way of a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_judge(folder: str | Path, name: str = "model") -> tuple[dict[str, Tensor], str]:
    """The tensors of NAME.safetensors in a judge's folder, else of the one .pth, .pt or .bin file there, and its path.

    Names lose the `module.` that data-parallel training puts before them. Raises UserError.
    """
    folder = Path(folder)
    path = folder / f"{name}.safetensors"
    others = sorted(p for p in folder.glob("*") if p.suffix in PICKLES)
    if path.is_file() or not others:
        return read(path), str(path)
    if len(others) > 1:
        found = ", ".join(p.name for p in others)
        raise UserError(f"{folder}: found {found}; expected {path.name} or one such file: leave one there.")
    tensors = read_pickled(others[0])
    return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}, str(others[0])


def read_pickled(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote, by torch's reader that builds tensors and runs no code.

    A training checkpoint's "state_dict" or "model" counts. Raises UserError for a file that needs more than that.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: holds more than tensors, which could run code and isn't read; where you trust it, write its"
            ' tensors anew: safetensors.torch.save_file(network.state_dict(), "model.safetensors").'
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: can't be read ({reason}); get the file again.") from None
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"{path}: found no map of names to tensors in it; save the network's state_dict().")
    return found


def _read_split(index):
    """The tensors that an index's "weight_map" finds in its neighbours: exactly those, from exactly there."""
    place = read_json(index).get("weight_map")
    files = place.values() if isinstance(place, dict) else [None]
    if not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise UserError(f'{index}: "weight_map" is not a map of tensors to files beside it; get it again.')
    tensors = {}
    for name in sorted(set(place.values())):
        part, expected = read(index.with_name(name)), {key for key, file in place.items() if file == name}
        if set(part) != expected:
            raise UserError(
                f"{index.with_name(name)}: its tensors are not those that {index.name} lists, for one"
                f" {min(set(part) ^ expected)}; get all files of one download."
            )
        tensors |= part
    return tensors


def _check_header(path):
    """Says what a file is that isn't whole safetensors: 8 bytes with the length of JSON, JSON, data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        file.seek(8)
        header = file.read(length) if start[8:9] == b"{" and 8 + length <= size else b""
    if start[8:9] != b"{":  # first, for a length may begin with the same bytes as a pickle
        if start.startswith((b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))):
            raise UserError(f"{path}: a pickle, which could run code and isn't read; make it safetensors.")
        if start.startswith(b"version https://git-lfs"):
            raise UserError(f"{path}: a Git LFS pointer instead of the weights; run `git lfs pull` there.")
        raise UserError(f"{path}: not a safetensors file ({size} bytes); get or convert the file again.")
    expected = 8 + length + _data_bytes(header)
    if size < expected:
        raise UserError(f"{path}: truncated: {size} bytes, expected {expected}; get the file again.")


def _data_bytes(header):
    try:
        entries = json.loads(header or "{}")
        return max((e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        return 0  # damaged in another way, which the library reports


def load_strict(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copies the tensors into the module's parameters and buffers; `source` names the file in errors.

    Keys must be the same both ways, and so must each shape and each kind (floating or not); else UserError.
    A module on the meta device, which has no memory yet, gets its own on the CPU.
    """
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in tensors]
    unknown = [key for key in tensors if key not in wanted and not ignored(key)]
    if missing or unknown:
        found = " and ".join(
            f"{len(keys)} {what} ({_some(keys)})"
            for keys, what in ((missing, "tensors missing"), (unknown, "unknown tensors"))
            if keys
        )
        raise UserError(f"{source}: found {found}; use the configuration and weights that belong together.")
    wrong = [
        f"{key} is {_kind(tensors[key])}, expected {_kind(wanted[key])}"
        for key in wanted
        if _kind(tensors[key]) != _kind(wanted[key])
    ]
    if wrong:
        raise UserError(f"{source}: {_some(wrong)}; use the configuration and weights that belong together.")
    # copies, for what safetensors reads is backed by the file
    copies = {key: tensors[key].to(value.dtype, copy=True) for key, value in wanted.items()}
    module.load_state_dict(copies, strict=True, assign=any(value.is_meta for value in wanted.values()))


def _kind(tensor):
    kind = "float" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)}"


def _some(items):
    return ", ".join(items[:SHOWN]) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")
