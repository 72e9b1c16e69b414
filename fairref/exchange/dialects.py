"""How other tools write an adapter: names of tensors, headers and settings beside them.

A tensor's name is the name of a layer and an end. SPELLINGS of a layer's name and ENDS of any tool may be combined, for
tools copy each other.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from fairref.errors import UserError
from fairref.files.paths import read_json
from fairref.files.weights import INFO, PICKLES, read, read_metadata, read_pickled
from fairref.generation.adapters import DOWN, UP, WHOLE
from fairref.generation.lora import LAYERS

PEFT = "base_model.model."  # how names begin in PEFT's own files
ALPHA = ".alpha"
ENDS = {  # end of a name, the longest first -> what it is of a layer
    ".lora_linear_layer.down.weight": DOWN,  # diffusers before PEFT, text encoder; the released code
    ".lora_linear_layer.up.weight": UP,
    ".lora_A.default.weight": DOWN,  # PEFT in memory
    ".lora_B.default.weight": UP,
    ".lora_down.weight": DOWN,  # kohya
    ".lora_up.weight": UP,
    ".lora.down.weight": DOWN,  # diffusers before PEFT, U-Net
    ".lora.up.weight": UP,
    ".lora_A.weight": DOWN,  # PEFT
    ".lora_B.weight": UP,
    ".lora.alpha": ALPHA,
    ".weight": WHOLE,
    ".alpha": ALPHA,
}
# the released code's U-Net, `to_out_lora` of to_out.0
PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.")
SPELLINGS = {  # network -> (how a layer's name begins, what joins its parts)
    "unet": (("unet.", "."), (PEFT, "."), ("lora_unet_", "_"), ("", ".")),
    "text_encoder": (("text_encoder.", "."), (PEFT, "."), ("lora_te_", "_"), ("", ".")),
}
# what else a name begins with, and whose it is
OTHERS = {
    "lora_te1_": "SDXL",
    "lora_te2_": "SDXL",
    "text_encoder_2.": "SDXL",
    "lora_unet_input_blocks_": "SDXL",
    "lora_unet_middle_block_": "SDXL",
    "lora_unet_output_blocks_": "SDXL",
    "lora_unet_double_blocks_": "Flux",
    "lora_unet_single_blocks_": "Flux",
    "lora_unet_joint_blocks_": "SD-3",
    "lora_transformer_": "SD-3 or Flux",
    "transformer.": "SD-3 or Flux",
}
# what a header says of a model that is no SD-1.x
OTHER_MODEL = re.compile(
    r"sd[-_ ]?v?[23]|diffusion[-_ ]?v?[23]|xl|flux|cascade|chroma|wan|qwen", re.IGNORECASE
)
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")  # PEFT's starts of LoRA that move the base's weights
# without these the rest of the layer means something else, so that they can't be left out
INSEPARABLE = ("dora_scale", "lora_magnitude_vector", "lora_mid.weight")
PEFT_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin")


def find_file(path: Path) -> Path:
    """The file itself, or the adapter's in a folder as PEFT and diffusers write it."""
    if path.is_dir():
        files = [path / name for name in PEFT_FILES if (path / name).is_file()]
        if not files:
            raise UserError(f"{path}: has no {' or '.join(PEFT_FILES)}; give the adapter's file itself.")
        path = files[0]
    if not path.is_file():
        raise UserError(f"{path}: no such file; give another tool's adapter.")
    return path


def read_file(source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and the header of a safetensors file. Raises UserError."""
    if source.suffix not in (".safetensors", *PICKLES):
        raise UserError(
            f"{source}: expected .safetensors, or {', '.join(PICKLES)}; a .ckpt is a pickle, which could run code:"
            " make it safetensors."
        )
    if source.suffix != ".safetensors":
        return read_pickled(source), {}
    tensors, header = read(source), read_metadata(source)
    if INFO in header:
        raise UserError(f"{source}: fairref wrote it; give it to --adapter as it is.")
    return tensors, header


def check_kind(source: Path, names: Iterable[str], header: Mapping[str, str]) -> None:
    """Refuses what is for another model than Stable Diffusion 1.x, or in a format that is no low-rank pair."""
    for key in ("modelspec.architecture", "ss_base_model_version"):
        if OTHER_MODEL.search(header.get(key, "")):
            raise UserError(
                f"{source}: its header says {header[key]}; expected an adapter for Stable Diffusion 1.x."
            )
    for name in sorted(names):
        start = next((start for start in OTHERS if name.startswith(start)), None)
        if start:
            raise UserError(
                f"{source}: {name} is {OTHERS[start]}'s; expected an adapter for Stable Diffusion 1.x."
            )
        if any(part in name for part in INSEPARABLE):
            raise UserError(
                f"{source}: {name} makes more of a layer than up and down; export it as plain LoRA."
            )


def spelled_layers(layers: Iterable[str]) -> dict[str, str]:
    """Each way to write a layer's name -> `<network>.<layer>`."""
    names = {}
    for layer in layers:
        part, _, name = layer.partition(".")
        for start, joint in SPELLINGS[part]:
            for text in (name, name.removeprefix("text_model.")):  # transformers 5.6 and later write none
                names[start + text.replace(".", joint)] = layer
    return names


def split_name(name: str) -> tuple[str, str | None]:
    """A tensor's name -> its layer's, as the file spells it, and what it is: DOWN, UP, ALPHA, WHOLE or None of them."""
    plain = PROCESSOR.sub(lambda m: f".to_{m[1]}{'.0' if m[1] == 'out' else ''}.lora.", name)
    end = next((end for end in ENDS if plain.endswith(end)), None)
    return (name, None) if end is None else (plain.removesuffix(end), ENDS[end])


def read_settings(
    source: Path, names: Iterable[str], header: Mapping[str, str]
) -> dict[str, dict[str, object]]:
    """Network -> PEFT's settings of its LoRA, which say alpha; {} for a file of another tool. Raises UserError."""
    if "lora_adapter_metadata" in header:
        flat = _json(source, header["lora_adapter_metadata"])
        settings = {
            part: {key.removeprefix(f"{part}."): value for key, value in flat.items()} for part in LAYERS
        }
    elif any(name.startswith(PEFT) for name in names):
        beside = source.with_name("adapter_config.json")
        if not beside.is_file():
            raise UserError(f"{source}: no adapter_config.json beside it, which says alpha; put it there.")
        settings = dict.fromkeys(LAYERS, read_json(beside))
    else:
        return {}
    for config in settings.values():
        start = str(config.get("init_lora_weights", "")).lower()
        if start.startswith(CHANGE_THE_BASE):
            raise UserError(
                f"{source}: PEFT's {start} changed the base, too; export the change as plain LoRA."
            )
        _check_alphas(source, config)
    return settings


def _check_alphas(source, config):
    """Refuses settings whose alphas are no numbers, or whose patterns are none."""
    patterns = config.get("alpha_pattern") or {}
    try:
        _ = [*map(re.compile, patterns), *map(float, [*patterns.values(), config.get("lora_alpha", 1)])]
    except (re.error, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{source}: PEFT's settings of alpha can't be read ({error}); correct them."
        ) from None


def _json(source, text):
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{source}: its lora_adapter_metadata is no JSON object; get the file again.")
    return content


def scale_of(
    layer: str, rank: int, alpha: Tensor | None, settings: Mapping[str, Mapping[str, object]]
) -> float:
    """alpha / rank of one layer; PEFT's settings count where the file has no alpha for it, and else it is 1."""
    part, _, name = layer.partition(".")
    config = settings.get(part) or {}
    if alpha is not None:
        return float(alpha) / rank
    patterns = config.get("alpha_pattern") or {}
    own = next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)), None)
    alpha = patterns.get(own, config.get("lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
