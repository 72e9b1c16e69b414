"""Adapters of other tools -> our file: the released code's, PEFT's, kohya's, and whole matrices as UCE writes them.

Alpha is multiplied into "up": scale = alpha / rank.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.bundle.stable_diffusion import NETWORKS
from fairref.errors import UserError
from fairref.exchange.dialects import (
    ALPHA,
    check_kind,
    find_file,
    read_file,
    read_settings,
    scale_of,
    spelled_layers,
    split_name,
)
from fairref.files.names import some
from fairref.files.paths import expanded
from fairref.files.weights import finite
from fairref.generation.adapters import DOWN, FILE, IMPORTED, UP, WHOLE, save_adapter
from fairref.generation.lora import LAYERS, is_layer
from fairref.training.checkpoints import SETTINGS

PREFIX = "token_embedding.weight"  # the released code's: a row of zeros, then the soft tokens
POSITIONS = "position_embedding.weight"  # beside it, the base's


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
    source, out = find_file(expanded(path)), expanded(out)
    target = out if out.suffix == ".safetensors" else out / FILE
    if target.exists() or (out / SETTINGS).exists():
        what = f"{target} is there already" if target.exists() else "a run is in it"
        raise UserError(f"--out is {out}, but {what}; give another.")
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
    tensors, header = read_file(source)
    check_kind(source, tensors, header)
    weights = _weights(bundle)
    if PREFIX in tensors:
        imported = _prefix(source, tensors, weights, bundle)
    else:
        imported = _layers(source, tensors, weights, read_settings(source, tensors, header), bundle)
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


def _layers(source, tensors, weights, settings, bundle):
    """LoRA and whole matrices by layer."""
    names, imported = spelled_layers(weights), Imported({})
    held: dict[str, dict[str, Tensor]] = {}  # layer -> DOWN, UP, ALPHA or WHOLE -> tensor
    for key in sorted(tensors):
        spelled, end = split_name(key)
        layer = names.get(spelled)
        if end is None or layer is None:
            own = _own(bundle, key, tensors[key])
            (imported.equal if own else imported.dropped).append(key)
        elif end in held.setdefault(layer, {}):
            raise UserError(f"{source}: two tensors for {layer}{end}, one of them {key}; use one adapter.")
        else:
            held[layer][end] = tensors[key]
    for layer, of_layer in held.items():
        _add_layer(source, layer, of_layer, weights[layer], settings, imported)
    return imported


def _add_layer(source, layer, held, weight, settings, imported):
    """One layer's pair, its alpha multiplied into up, or its whole matrix, in the shapes of the layer."""
    out, inner, *kernel = weight.shape
    if DOWN in held and UP in held and WHOLE not in held:
        rank = held[DOWN].shape[0] if held[DOWN].dim() else 0
        down = _fitted(source, layer + DOWN, held[DOWN], (rank, inner, *kernel))
        up = _fitted(source, layer + UP, held[UP], (out, rank, *[1 for _ in kernel]))
        alpha = _fitted(source, layer + ALPHA, held[ALPHA], ()) if ALPHA in held else None
        scale = scale_of(layer, rank, alpha, settings)
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
    """The tensor in this shape, where only sides of length 1 may differ; a number (alpha) may be whole."""
    sides = [n for n in tensor.shape if n > 1] == [n for n in shape if n > 1]
    if not tensor.numel() or not sides or not (tensor.is_floating_point() or shape == ()):
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise UserError(
            f"{source}: {name} is {found}, expected float {list(shape)}; give the weights that it was made from as"
            " --weights (without: Stable Diffusion 1.5's layers)."
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
