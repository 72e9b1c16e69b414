"""An adapter's file, and the bundle that draws with one adapter or several.

A file holds, in float32, what an adapter changes, and `info`, what it was made from:

    prefix, suffix (P, D), deep (L, P, D), generated.*    a soft prompt, as in soft.py
    <network>.<layer>.lora_down.weight, .lora_up.weight   of each layer with LoRA, linear or a convolution
    <network>.<layer>.weight                              a whole matrix in the place of the layer's own

Training writes the first two, of all the layers that it adapts (FORMAT); what else came from elsewhere
(IMPORTED). A run's adapter.safetensors is the moving average (`average`: "ema"), its adapter_raw.safetensors the last
value ("raw").
"""

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fairref.bundle.loading import Bundle
from fairref.errors import UserError
from fairref.files.names import some
from fairref.files.paths import expanded
from fairref.files.weights import fingerprint, fingerprint_of, load_strict, read, read_info, write
from fairref.generation.lora import (
    COMPONENTS,
    LAYERS,
    Adapter,
    LoRALayer,
    first_tokens,
    is_layer,
    put_layer,
    put_lora,
    shared_copy,
    trained_layers,
)
from fairref.generation.soft import SOFT_PROMPTS

FORMAT, IMPORTED = "fairref-adapter-1", "fairref-adapter-2"
FILE = "adapter.safetensors"
OWN = "adapters"  # a bundle's folder of adapters that come with it
DOWN, UP, WHOLE = ".lora_down.weight", ".lora_up.weight", ".weight"
STRONGEST = 1.5  # the largest strength
NOT_OURS = (
    f"found other tensors than a soft prompt, or lora_down.weight and lora_up.weight, of {', '.join(LAYERS)} alone;"
    " use a file that train.py or `fairref import` wrote."
)


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter's file holds; a layer's name is `<network>.<layer>`."""

    file: Path
    info: dict[str, object]  # what it was made from
    component: str  # of COMPONENTS
    soft: dict[str, Tensor]  # of a soft prompt, {} without one
    pairs: dict[
        str, tuple[Tensor, Tensor]
    ]  # layer -> down, up; of a convolution (r, in, k, k), (out, r, 1, 1)
    matrices: dict[str, Tensor]  # layer -> its new weight, whole

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of them under the file's names."""
        downs = {name + DOWN: down for name, (down, _) in self.pairs.items()}
        ups = {name + UP: up for name, (_, up) in self.pairs.items()}
        return self.soft | downs | ups | {name + WHOLE: tensor for name, tensor in self.matrices.items()}

    @property
    def soft_tokens(self) -> int:
        """How many tokens of a prompt its soft prompt takes."""
        return self.soft[SOFT_PROMPTS[self.component].named].shape[-2] if self.soft else 0

    @property
    def leaves_empty(self) -> bool:
        """Whether the empty or negative prompt goes through the base's text encoder."""
        return self.info.get("empty_prompt") == "frozen"

    def other_parts(self, bundle: Bundle) -> list[str] | None:
        """The networks that are not those it was made from; None where that is unknown."""
        base = self.info.get("base")
        if not isinstance(base, dict):
            return None
        return [name for name, found in bundle.fingerprints.items() if base.get(name) != found]


def save_adapter(
    path: str | Path, tensors: Mapping[str, Tensor], info: Mapping[str, object], kind: str = FORMAT
) -> None:
    """Writes an adapter's tensors under their names; `info` says what they were made from. Raises UserError."""
    tensors = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in tensors.items()}
    write(path, tensors, {**info, "format": kind})


def adapter_file(path: str | Path) -> Path:
    """The adapter's file: the path itself, or adapter.safetensors in a run's folder. Raises UserError."""
    path = expanded(path)
    if not path.exists():
        raise UserError(f"{path}: no such adapter; give a run's folder or its {FILE}.")
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{path}: no {FILE} in it (yet); give the folder of a finished run, or what `fairref import` makes of"
            " another tool's file."
        )
    return file


def own_adapters(bundle: Bundle) -> list[Path]:
    """The files of adapters that come with a bundle."""
    return sorted((bundle.path / OWN).glob("*.safetensors"))


def read_adapter(path: str | Path) -> AdapterFile:
    """What the adapter of a file or a run's folder holds. Raises UserError."""
    file = adapter_file(path)
    tensors, info = read(file), read_info(file)
    found = info.get("format", "another format")
    if found not in (FORMAT, IMPORTED):
        raise UserError(
            f"{file}: found {found}, expected an adapter that train.py wrote ({FORMAT}) or that `fairref import` made"
            f" of another tool's ({IMPORTED}); import it first."
        )
    parts = {name.split(".")[0] for name in tensors}
    component = next((name for name, of in COMPONENTS.items() if set(of) == parts), None)
    held: dict[str, dict[str, Tensor]] = {DOWN: {}, UP: {}, WHOLE: {}}  # end of the name -> layer -> tensor
    soft = tensors if component in SOFT_PROMPTS else {}
    strangers = []
    for name in sorted(set(tensors) - set(soft)):
        end = next((end for end in held if name.endswith(end)), None)
        if end:
            held[end][name.removesuffix(end)] = tensors[name]
        else:
            strangers.append(name)
    downs, ups, matrices = held.values()
    _check_names(file, component, strangers, downs, ups)
    flat = [name for name, tensor in tensors.items() if tensor.dim() < 2 and not name.endswith(".bias")]
    named = SOFT_PROMPTS[component].named if soft else None
    if flat or named not in (None, *soft) or (matrices and found == FORMAT):
        raise UserError(f"{file}: {NOT_OURS}")
    if any(0 in t.shape for t in tensors.values()):
        raise UserError(f"{file}: its matrices have rank 0; use a file that was trained.")
    pairs = {name: (down, ups[name]) for name, down in downs.items()}
    return AdapterFile(file, info, component, soft, pairs, matrices)


def _check_names(file, component, strangers, downs, ups):
    """Refuses names that no adapter has, and one half of a pair."""
    if component is None:
        raise UserError(f"{file}: {NOT_OURS}")
    missing = [name + UP for name in downs if name not in ups]
    missing += [name + DOWN for name in ups if name not in downs]
    for names, what in ((missing, "tensors missing"), (strangers, "unknown tensors")):
        if names:
            raise UserError(f"{file}: {len(names)} {what} ({some(names)}); use the file as it was written.")


def load_adapter(bundle: Bundle, path: str | Path, strength: float = 1.0, any_base: bool = False) -> Bundle:
    """The bundle with the adapter of a file or a run's folder, frozen. Raises UserError.

    The change that LoRA and whole matrices make is multiplied by `strength` (0 to 1.5); a soft prompt is there (1)
    or not (0). With `any_base` the adapter may be of another base, which is then said.
    """
    return load_adapters(bundle, [(path, strength)], any_base)


def load_adapters(
    bundle: Bundle, adapters: Sequence[tuple[str | Path | AdapterFile, float]], any_base: bool = False
) -> Bundle:
    """The bundle with several adapters, whose changes add up; each as in `load_adapter`. Raises UserError.

    All must be of this bundle's base; at most one is a soft prompt, and a layer has at most one whole matrix.
    """
    opened = [(a if isinstance(a, AdapterFile) else read_adapter(a), strength) for a, strength in adapters]
    _check_together(bundle, opened)
    for adapter, strength in opened:
        check_strength(adapter, strength)
        _check_base(adapter, bundle, any_base)
    if bundle.empty_encoder is None and any(adapter.leaves_empty for adapter, _ in opened):
        bundle = replace(bundle, empty_encoder=bundle.text_encoder)
    for adapter, strength in sorted(opened, key=lambda pair: not pair[0].matrices):  # LoRA goes around them
        bundle = _with_adapter(bundle, adapter, strength)
        made_of = (fingerprint(adapter.tensors), float(strength))
        bundle = replace(bundle, adapters=(*bundle.adapters, made_of))
    return bundle


def _check_together(bundle, adapters):
    """Refuses two soft prompts, two whole matrices for one layer, and two that differ about the empty prompt."""
    left = {adapter.leaves_empty for adapter, _ in adapters}
    if len(left | ({bundle.empty_encoder is not None} if bundle.adapters else set())) > 1:
        raise UserError(
            f"{adapters[0][0].file}: of the adapters here, some leave the empty prompt as it was (--empty-prompt"
            " frozen) and some don't; use either kind without the other."
        )
    soft = [adapter.file for adapter, _ in adapters if adapter.soft]
    if len(soft) + (bundle.soft is not None) > 1:
        raise UserError(f"{soft[-1]}: a second soft prompt, but a prompt has room for one; leave one out.")
    owner = {}
    for adapter, _ in adapters:
        for name in adapter.matrices:
            if name in owner:
                raise UserError(
                    f"{adapter.file}: replaces {name}, as {owner[name]} does; leave one of them out."
                )
            owner[name] = adapter.file


def check_strength(adapter: AdapterFile, strength: float) -> None:
    """Refuses a strength that the adapter can't have. Raises UserError."""
    if not 0 <= strength <= STRONGEST:
        raise UserError(f"{adapter.file}: its strength is {strength}; expected 0 to {STRONGEST}.")
    if adapter.soft and strength not in (0, 1):
        raise UserError(
            f"{adapter.file}: its strength is {strength}, but a soft prompt is there or not; expected 1 or 0."
        )


def _check_base(adapter, bundle, any_base):
    """Refuses an adapter of another base, or says so where `any_base`; a VAE of its own is said only."""
    others = adapter.other_parts(bundle)
    if others is None:
        print(
            f"{adapter.file}: its base is unknown (an older version or an import wrote it); {bundle.path} is taken.",
            file=sys.stderr,
        )
        return
    if set(others) - {"vae"} and not any_base:
        raise UserError(
            f"{adapter.file}: made from another {' and '.join(others)} than those of {bundle.path} (a bfloat16 copy"
            " counts as another one); give its own --weights, or --any-base to go on."
        )
    if others:
        print(
            f"{adapter.file}: made from another {' and '.join(others)} than those of {bundle.path}",
            file=sys.stderr,
        )


@torch.no_grad()
def _with_adapter(bundle, adapter, strength):
    """The bundle with one adapter, whose tensors must fit its layers."""
    held, changed, put = Adapter(), {}, []
    try:
        for part in COMPONENTS[adapter.component]:
            if part in SOFT_PROMPTS:
                start = first_tokens(bundle, adapter.soft_tokens, torch.Generator())  # to be overwritten
                changed["soft"] = held = SOFT_PROMPTS[part](start, bundle, torch.Generator())
            else:
                changed[part] = shared_copy(getattr(bundle, part)).eval()
                changed[part].fingerprint = fingerprint_of(getattr(bundle, part))  # its base's
                put += _put_layers(changed[part], part, adapter, held)
        load_strict(held, adapter.tensors, "the adapter")
    except UserError as error:
        raise UserError(
            f"{adapter.file}: {error} An adapter fits only the weights it was made from."
        ) from None
    for layer, base in put:
        if isinstance(layer, LoRALayer):
            layer.lora_up.weight.mul_(strength)
        else:
            whole = torch.lerp(base.weight.to(layer.weight.dtype), layer.weight, strength)  # exact at 0 and 1
            layer.weight = nn.Parameter(whole.to(base.weight.dtype))
    for module in (held, *(layer for layer, _ in put)):
        module.requires_grad_(False)
    return bundle if adapter.soft and strength == 0 else replace(bundle, **changed)


def _put_layers(network, part, adapter, held):
    """Puts the adapter's layers into the network and, named as in the file, into `held`: (layer, what it replaced).

    What names no layer is left to the check of `held`.
    """
    replaced, modules = [], dict(network.named_modules())
    layers = {name for name, module in modules.items() if is_layer(module)}
    for name in layers & {key.removeprefix(f"{part}.") for key in adapter.matrices}:
        base, path = modules[name], name
        while isinstance(base, LoRALayer):
            base, path = base.base, f"{path}.base"
        layer = copy.deepcopy(base, {id(tensor): tensor for tensor in base.parameters()})
        layer.weight = _empty(base.weight, *base.weight.shape)
        put_layer(network, path, layer)
        held.put(f"{part}.{name}", {"weight": layer.weight})
        replaced.append((layer, base))
    of_part = {key.removeprefix(f"{part}."): len(down) for key, (down, _) in adapter.pairs.items()}
    ranks = {name: rank for name, rank in of_part.items() if name in layers}
    if adapter.info.get("format") == FORMAT:  # which has all of them
        ranks = dict.fromkeys(trained_layers(part, network), next(iter(of_part.values()), 1)) | ranks
    for name, layer in put_lora(network, ranks).items():
        held.put(f"{part}.{name}", {"lora_down": layer.lora_down, "lora_up": layer.lora_up})
        replaced.append((layer, layer.base))
    return replaced


def _empty(like, *shape):
    """A parameter of this shape, in at least float32, where `like` is."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=like.device))
