"""Adapters of other tools -> our file: the released code's, PEFT's, kohya's, and whole matrices as UCE writes them.

A tensor's name is the name of a layer and an end. SPELLINGS of a layer's name and ENDS of any tool may be combined, for
tools copy each other. Alpha is multiplied into "up", scale = alpha / rank; without one the scale is 1.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.bundle.stable_diffusion import NETWORKS
from fairref.errors import UserError
from fairref.files.names import some
from fairref.files.paths import expanded, read_json
from fairref.files.weights import INFO, PICKLES, finite, read, read_pickled
from fairref.generation.adapters import DOWN, FILE, IMPORTED, UP, WHOLE, save_adapter
from fairref.generation.lora import LAYERS, is_layer

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
PROCESSOR = re.compile(
    r"\.processor\.to_(q|k|v|out)_lora\."
)  # the released code's U-Net, `to_out_lora` of to_out.0
SPELLINGS = {  # network -> how a layer's name begins, with "." or "_" between its parts
    "unet": (("unet.", "."), ("base_model.model.", "."), ("lora_unet_", "_"), ("", ".")),
    "text_encoder": (("text_encoder.", "."), ("base_model.model.", "."), ("lora_te_", "_"), ("", ".")),
}
PREFIX = "token_embedding.weight"  # the released code's: a row of zeros, then the soft tokens
POSITIONS = "position_embedding.weight"  # beside it, the base's
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
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")  # PEFT's starts of LoRA that move the base's weights
# without these the rest of the layer means something else, so that they can't be left out
INSEPARABLE = ("dora_scale", "lora_magnitude_vector", "lora_mid.weight")
PEFT_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin")


@dataclass
class Imported:
    """An adapter in our names, and what was not taken."""

    tensors: dict[str, Tensor]
    dropped: list[str] = field(default_factory=list)  # names that belong to no layer of the two networks
    equal: list[str] = field(default_factory=list)  # names of what is the base's own, value by value

    @property
    def summary(self) -> str:
        """What it changes, in words."""
        ranks = {len(tensor) for name, tensor in self.tensors.items() if name.endswith(DOWN)}
        loras = sum(name.endswith(DOWN) for name in self.tensors)
        matrices = sum(name.endswith(WHOLE) and not name.endswith((DOWN, UP)) for name in self.tensors)
        said = [f"LoRA of rank {'/'.join(map(str, sorted(ranks)))} on {loras} layers"] if loras else []
        said += [f"{matrices} whole matrices"] if matrices else []
        said += [f"a prefix of {len(self.tensors['prefix'])} tokens"] if "prefix" in self.tensors else []
        return ", ".join(said)


def import_adapter(
    path: str | Path, out: str | Path, bundle: Bundle | None = None, drop: bool = False
) -> tuple[Path, Imported]:
    """Writes the adapter of another tool's file or folder to `out`, a folder or a *.safetensors file; where, and what.

    With a `bundle` its layers are taken and it becomes the adapter's base; else the layers are SD-1.5's and the base is
    unknown. What belongs to no layer is refused unless `drop`. Raises UserError.
    """
    source, out = _file(expanded(path)), expanded(out)
    target = out if out.suffix == ".safetensors" else out / FILE
    if target.exists() and target.resolve() == source.resolve():
        raise UserError(f"--out is {target}, the file that is imported; give another.")
    imported = read_foreign(source, bundle, drop)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out is {out}, which can't be made ({error.strerror}); give another.") from None
    base = {} if bundle is None else {"base": bundle.fingerprints}
    save_adapter(target, imported.tensors, {**base, "imported_from": source.name}, IMPORTED)
    return target, imported


def read_foreign(source: Path, bundle: Bundle | None = None, drop: bool = False) -> Imported:
    """The adapter of another tool's file. Raises UserError."""
    if source.suffix not in (".safetensors", *PICKLES):
        raise UserError(
            f"{source}: expected a .safetensors file, or {', '.join(PICKLES)}; give one of these."
        )
    tensors, header = _read(source)
    _check_kind(source, tensors, header)
    weights = _weights(bundle)
    if PREFIX in tensors:
        imported = _prefix(source, tensors, weights, bundle)
    else:
        imported = _layers(source, tensors, weights, _settings(source, tensors, header), bundle)
    if imported.dropped and not drop:
        hint = "" if bundle else " --weights BASE leaves out what is the base's own;"
        raise UserError(
            f"{source}: {len(imported.dropped)} tensors belong to no linear layer or convolution of the text encoder or"
            f" the U-Net ({some(imported.dropped)});{hint} --drop leaves them out."
        )
    if not imported.tensors:
        raise UserError(f"{source}: nothing in it changes a layer of Stable Diffusion 1.x; give an adapter.")
    broken = [name for name, tensor in imported.tensors.items() if not finite(tensor)]
    if broken:
        raise UserError(f"{source}: {some(broken)} holds what is no number; get or train the adapter again.")
    return imported


def _file(path):
    """The file itself, or the adapter's in a folder as PEFT and diffusers write it."""
    if path.is_dir():
        path = next((path / name for name in PEFT_FILES if (path / name).is_file()), path / PEFT_FILES[0])
    if not path.is_file():
        raise UserError(f"{path}: no such file; give another tool's adapter.")
    return path


def _read(source):
    """Tensors, and the header of a safetensors file."""
    if source.suffix != ".safetensors":
        return read_pickled(source), {}
    tensors = read(source)
    with safe_open(source, "pt") as file:
        header = file.metadata() or {}
    if INFO in header:
        raise UserError(f"{source}: fairref wrote it; give it to --adapter as it is.")
    return tensors, header


def _check_kind(source, tensors, header):
    """Refuses what is for another model than Stable Diffusion 1.x, or in a format that is no low-rank pair."""
    model = header.get("modelspec.architecture") or header.get("ss_base_model_version")
    if model and not re.match(r"stable-diffusion-v1|sd_v1", model):
        raise UserError(f"{source}: its header says {model}; expected an adapter for Stable Diffusion 1.x.")
    for name in sorted(tensors):
        start = next((start for start in OTHERS if name.startswith(start)), None)
        if start:
            raise UserError(
                f"{source}: {name} is {OTHERS[start]}'s; expected an adapter for Stable Diffusion 1.x."
            )
        if any(part in name for part in INSEPARABLE):
            raise UserError(
                f"{source}: {name} makes more of a layer than up and down; export it as plain LoRA."
            )


def _weights(bundle):
    """Weight of each layer that an adapter may change, as `<network>.<layer>`; on the meta device without a bundle."""
    networks = {name: getattr(bundle, name, None) for name in LAYERS}
    with torch.device("meta"):
        networks = {
            name: net or NETWORKS[name].network(NETWORKS[name].sd15) for name, net in networks.items()
        }
    return {
        f"{part}.{name}": layer.weight
        for part, network in networks.items()
        for name, layer in network.named_modules()
        if is_layer(layer)
    }


def _spelled(weights):
    """Each way to write a layer's name -> `<network>.<layer>`."""
    names = {}
    for layer in weights:
        part, _, name = layer.partition(".")
        for start, joint in SPELLINGS[part]:
            for text in {
                name,
                name.removeprefix("text_model."),
            }:  # transformers 5.6 and later write no text_model
                names[start + text.replace(".", joint)] = layer
    return names


def _settings(source, tensors, header):
    """Network -> PEFT's settings of its LoRA, which say alpha; {} for a file of another tool."""
    if "lora_adapter_metadata" in header:
        flat = _json(source, header["lora_adapter_metadata"])
        settings = {
            part: {key.removeprefix(f"{part}."): value for key, value in flat.items()} for part in LAYERS
        }
    elif any(name.startswith("base_model.model.") for name in tensors):
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
    return settings


def _json(source, text):
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{source}: its lora_adapter_metadata is no JSON object; get the file again.")
    return content


def _scale(layer, rank, alpha, settings):
    """alpha / rank of one layer; PEFT's settings count where the file has no alpha for it."""
    part, _, name = layer.partition(".")
    config = settings.get(part) or {}
    if alpha is not None:
        return float(alpha) / rank
    patterns = config.get("alpha_pattern") or {}
    own = next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)), None)
    alpha = patterns.get(own, config.get("lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _layers(source, tensors, weights, settings, bundle):
    """LoRA and whole matrices by layer."""
    names, imported = _spelled(weights), Imported({})
    held: dict[str, dict[str, Tensor]] = {}  # layer -> DOWN, UP, ALPHA or WHOLE -> tensor
    for key in sorted(tensors):
        plain = PROCESSOR.sub(lambda m: f".to_{m[1]}{'.0' if m[1] == 'out' else ''}.lora.", key)
        end = next((end for end in ENDS if plain.endswith(end)), None)
        layer = names.get(plain.removesuffix(end or ""))
        if end is None or layer is None:
            own = _own(bundle, key, tensors[key])
            (imported.equal if own else imported.dropped).append(key)
        elif ENDS[end] in held.setdefault(layer, {}):
            raise UserError(
                f"{source}: two tensors for {layer}{ENDS[end]}, one of them {key}; use one adapter."
            )
        else:
            held[layer][ENDS[end]] = tensors[key]
    for layer, of_layer in held.items():
        _add_layer(source, layer, of_layer, weights[layer], settings, imported)
    return imported


def _add_layer(source, layer, held, weight, settings, imported):
    """One layer's pair, its alpha multiplied into up, or its whole matrix, in the shapes of the layer."""
    out, inner, *kernel = weight.shape
    if DOWN in held and UP in held and WHOLE not in held:
        rank = len(held[DOWN])
        down = _fitted(source, layer + DOWN, held[DOWN], (rank, inner, *kernel))
        up = _fitted(source, layer + UP, held[UP], (out, rank, *[1 for _ in kernel]))
        alpha = _fitted(source, layer + ALPHA, held[ALPHA], ()) if ALPHA in held else None
        scale = _scale(layer, rank, alpha, settings)
        imported.tensors |= {layer + DOWN: down.float(), layer + UP: (scale * up.double()).float()}
    elif set(held) == {WHOLE}:
        matrix = _fitted(source, layer + WHOLE, held[WHOLE], tuple(weight.shape))
        if not weight.is_meta and torch.equal(matrix.to(weight), weight.to(matrix.dtype).to(weight)):
            imported.equal.append(layer + WHOLE)
        else:
            imported.tensors[layer + WHOLE] = matrix.float()
    else:
        raise UserError(
            f"{source}: {layer} has {', '.join(sorted(end[1:] for end in held))}; expected lora_down and lora_up, or"
            " its whole weight: get the file again."
        )


def _fitted(source, name, tensor, shape):
    """The tensor in this shape, where only sides of length 1 may differ."""
    if not tensor.numel() or [n for n in tensor.shape if n > 1] != [n for n in shape if n > 1]:
        raise UserError(
            f"{source}: {name} is {list(tensor.shape)}, expected {list(shape)}; take an adapter for this model"
            " (without --weights: for SD-1.5)."
        )
    return tensor.reshape(shape)


def _own(bundle, key, tensor):
    """Whether a tensor without a layer is, value by value, the bundle's own."""
    if bundle is None:
        return False
    for part in LAYERS:
        own = getattr(bundle, part).state_dict().get(key.removeprefix(f"{part}."))
        if own is not None and own.shape == tensor.shape:
            return torch.equal(own.to(tensor.dtype), tensor.to(own.device))
    return False


def _prefix(source, tensors, weights, bundle):
    """The released code's soft prompt: the rows after the first, which stands for all other tokens."""
    table, places = tensors[PREFIX], tensors.get(POSITIONS)
    width = weights["text_encoder.text_model.encoder.layers.0.mlp.fc1"].shape[1]
    if table.dim() != 2 or len(table) < 2 or table.shape[1] != width:
        raise UserError(
            f"{source}: {PREFIX} is {list(table.shape)}; expected [1 + tokens, {width}], as the released code's."
        )
    if bundle is not None and places is not None:
        own = bundle.text_encoder.text_model.embeddings.position_embedding.weight
        if own.shape != places.shape or not torch.equal(own.half(), places.half()):
            raise UserError(
                f"{source}: {POSITIONS} is not {bundle.path}'s; give the --weights it was made from."
            )
    others = sorted(set(tensors) - {PREFIX, POSITIONS, "position_ids"})
    return Imported({"prefix": table[1:].float()}, others)
