"""An adapter, in a folder, as other tools take it: `fairref export`.

Before anything is written, the adapter must fit the base's own layers, name by name. What was written is read back and
must be the same bit for bit: LoRA by `fairref import`, whole models by the loader of bundles. The folder appears at the
end, whole.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.bundle.stable_diffusion import NETWORKS, load_stable_diffusion
from fairref.errors import UserError
from fairref.exchange.card import write_card
from fairref.exchange.exported import SPACE, WHOLE, Export
from fairref.exchange.folder import write_configs, write_tensors
from fairref.exchange.importing import read_foreign
from fairref.exchange.layouts import Pairs, to_kohya, to_ldm, to_peft
from fairref.exchange.space import ADAPTER, to_space
from fairref.files.names import some
from fairref.files.paths import expanded
from fairref.files.weights import finite, read
from fairref.generation.adapters import AdapterFile, load_adapters, read_adapter

PEFT_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
EMBEDDING_FILE = "learned_embeds.safetensors"  # the same, of textual inversion
HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
PYTORCH = {"format": "pt"}  # the header without which transformers refuses a file
KOHYA_HEADER = {
    "ss_network_module": "networks.lora",
    "ss_base_model_version": "sd_v1",
    "modelspec.architecture": "stable-diffusion-v1/lora",
}


def to_diffusers(export: Export) -> None:
    """Writes LoRA as diffusers and PEFT have it."""
    path, pairs = export.folder / PEFT_FILE, of_one_rank(export.adapter.pairs)
    write_tensors(path, to_peft(pairs), PYTORCH)
    _compare_lora(path, export, pairs)


def to_web_uis(export: Export) -> None:
    """Writes LoRA as kohya's scripts have it."""
    path, pairs = export.folder / f"{export.name}.safetensors", of_one_rank(export.adapter.pairs)
    rank = str(len(next(iter(pairs.values()))[0]))
    header = {**PYTORCH, **KOHYA_HEADER, "ss_network_dim": rank, "ss_network_alpha": rank}
    write_tensors(path, to_kohya(pairs), header)
    _compare_lora(path, export, pairs)


def to_embedding(export: Export) -> None:
    """Writes a prefix or suffix twice: as web UIs have it, and as diffusers has textual inversion."""
    (tokens,) = export.adapter.soft.values()
    for name, key in ((f"{export.name}.safetensors", "emb_params"), (EMBEDDING_FILE, export.token)):
        path = export.folder / name
        write_tensors(path, {key: tokens}, PYTORCH)
        _compare(path, read(path), {key: tokens})


def to_merged(export: Export) -> None:
    """Writes all networks, changed, as a folder in diffusers' layout."""
    states = merged(export)
    write_configs(export.bundle, export.folder)
    for name, network in NETWORKS.items():
        write_tensors(export.folder / name / f"{network.file}.safetensors", states[name], PYTORCH)
    _compare_networks(export.folder, states)


def to_single_file(export: Export) -> None:
    """Writes all networks, changed, as one LDM checkpoint, and beside it what says their sizes."""
    states, bundle = merged(export), export.bundle
    path = export.folder / f"{export.name}.safetensors"
    write_configs(bundle, export.folder, path.name)
    write_tensors(path, to_ldm(states, bundle.unet.config, bundle.vae.config), PYTORCH)
    _compare_networks(path, states)


def to_page(export: Export) -> None:
    """Writes a Space, the page of `fairref serve` with the adapter."""
    to_space(export)
    path = export.folder / ADAPTER
    _compare(path, read(path), export.adapter.tensors)


@dataclass(frozen=True)
class Format:
    """A way out: what of an adapter it can hold."""

    write: Callable[[Export], None]
    holds: tuple[str, ...]  # of KINDS
    otherwise: str  # why it can't hold the others


KINDS = {  # field of AdapterFile, or which soft prompt -> in words
    "pairs": "LoRA",
    "matrices": "whole matrices",
    "prefix": "a prefix",
    "suffix": "a suffix",
    "deep": "tokens in each layer",
    "generated": "tokens that a network makes from the prompt",
}
LORA_ONLY = "holds products of two small matrices (LoRA) only"
WEIGHTS_ONLY = "holds weights, and soft tokens are none"
FORMATS = {
    "diffusers": Format(to_diffusers, ("pairs",), LORA_ONLY),
    "kohya": Format(to_web_uis, ("pairs",), LORA_ONLY),
    "embedding": Format(
        to_embedding, ("prefix", "suffix"), "holds tokens that a prompt can have as words only"
    ),
    "merged": Format(to_merged, ("pairs", "matrices"), WEIGHTS_ONLY),
    "single-file": Format(to_single_file, ("pairs", "matrices"), WEIGHTS_ONLY),
    SPACE: Format(to_page, tuple(KINDS), ""),
}


def export_adapter(
    bundle: Bundle,
    path: str | Path,
    to: str,
    out: str | Path,
    half: bool = False,
    any_base: bool = False,
    hub_id: str = "",
) -> Path:
    """Exports the adapter of a file or a run's folder -> the folder `out`, with a card and a check. Raises UserError.

    `to`: of FORMATS. `half`: merged and single-file in float16. `any_base`: as in `load_adapter`. `hub_id`: of the
    base that a Space fetches ("": Stable Diffusion 1.5's).
    """
    adapter, out = read_adapter(path), Path(os.path.realpath(expanded(out)))
    check_format(adapter, to, half)
    if hub_id and to != SPACE:
        raise UserError(f"--hub-id is for --to space; leave it out with --to {to}.")
    if hub_id and not HUB_ID.fullmatch(hub_id):
        raise UserError(f"--hub-id is {hub_id!r}; expected OWNER/NAME of a model on the hub.")
    if adapter.leaves_empty and to != SPACE:
        raise UserError(
            f"{adapter.file}: was trained with --empty-prompt frozen, but in other tools an adapter of the text encoder"
            " changes the empty prompt, too; train one with --empty-prompt unread."
        )
    check_trained(adapter)
    if out == Path.cwd():
        raise UserError(f"--out is {out}, the folder that you are in; give a new one.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out is {out}, which is there and not an empty folder; give a new one.")
    part = out.with_name(f"{out.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        # refuses names, shapes and numbers that don't fit the base's layers
        after = load_adapters(bundle, [(adapter, 1.0)], any_base)
        export = Export(bundle, adapter, to, part, _name(adapter), half, any_base, hub_id)
        FORMATS[to].write(export)
        if to != SPACE:  # which has a card of its own
            write_card(export, after)
        os.replace(part, out)
    except OSError as error:
        raise UserError(f"--out is {out}, which can't be written ({error.strerror}); give another.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def check_format(adapter: AdapterFile, to: str, half: bool) -> None:
    """Raises UserError where the format can't hold what the adapter has."""
    has = [adapter.component] if adapter.soft else [kind for kind in KINDS if getattr(adapter, kind, None)]
    if strangers := [field for field in has if field not in FORMATS[to].holds]:
        fitting = [name for name, other in FORMATS.items() if set(has) <= set(other.holds)]
        raise UserError(
            f"{adapter.file}: has {KINDS[strangers[0]]}, but --to {to} {FORMATS[to].otherwise};"
            f" give --to {' or '.join(fitting)}."
        )
    if half and to not in WHOLE:
        raise UserError(f"--half is for --to merged and single-file; leave it out with --to {to}.")


def check_trained(adapter: AdapterFile) -> None:
    """Raises UserError where a layer has LoRA that changes nothing, so that no tool shows whether it was loaded."""
    if zero := [layer for layer, (_, up) in adapter.pairs.items() if not up.any()]:
        raise UserError(
            f"{adapter.file}: lora_up is all zero in {len(zero)} of {len(adapter.pairs)} layers ({some(zero)});"
            " export an adapter that was trained."
        )


@torch.no_grad()
def merged(export: Export) -> dict[str, dict[str, Tensor]]:
    """Network -> its tensors with the adapter in them, in float32, or float16 where `half`. Raises UserError."""
    states = {name: dict(getattr(export.bundle, name).state_dict()) for name in NETWORKS}
    for layer, weight in export.adapter.matrices.items():
        network, _, name = layer.partition(".")
        states[network][f"{name}.weight"] = weight
    for layer, (down, up) in export.adapter.pairs.items():
        network, _, name = layer.partition(".")
        weight = states[network][f"{name}.weight"]
        product = (up.double().flatten(1) @ down.double().flatten(1)).view(weight.shape)
        states[network][f"{name}.weight"] = (weight.double() + product).float()
    dtype = torch.float16 if export.half else torch.float32
    states = {
        network: {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
        for network, state in states.items()
    }
    broken = [f"{n}.{name}" for n, state in states.items() for name, t in state.items() if not finite(t)]
    if broken:
        raise UserError(
            f"{export.adapter.file}: with it, {some(broken)} is no number in {dtype}; leave out --half."
        )
    return states


def of_one_rank(pairs: Pairs) -> dict[str, tuple[Tensor, Tensor]]:
    """Return LoRA with zeros up to its largest rank: diffusers scales the layers of other ranks wrongly."""
    rank = max(len(down) for down, _ in pairs.values())
    grown = {}
    for layer, (down, up) in pairs.items():
        down_, up_ = down.new_zeros(rank, *down.shape[1:]), up.new_zeros(len(up), rank, *up.shape[2:])
        down_[: len(down)], up_[:, : len(down)] = down, up
        grown[layer] = down_, up_
    return grown


def _compare_lora(path, export, pairs):
    """Reads LoRA as `fairref import` does, and compares."""
    back = read_foreign(path, export.bundle).tensors
    _compare(path, back, replace(export.adapter, pairs=pairs).tensors)


def _compare_networks(path, states):
    """Reads a model as fairref's own loader does, and compares."""
    back = load_stable_diffusion(path)
    for name, state in states.items():
        found, wide = getattr(back, name).state_dict(), {key: tensor.float() for key, tensor in state.items()}
        _compare(path, found, wide)


def _compare(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises UserError unless both are the same bit for bit."""
    same = found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )
    if not same:
        raise UserError(
            f"{path}: what was written reads back as something else; nothing is exported, try again."
        )


def _name(adapter):
    """The file's name, which is a soft prompt's word too: what the adapter is for."""
    info, file = adapter.info, adapter.file
    words = list(info["classes"]) if isinstance(info.get("classes"), dict) else []
    words = words or [Path(str(info.get("imported_from") or file.parent.name)).stem]
    name = re.sub(r"[^a-z0-9]+", "-", "-".join(map(str, words)).lower()).strip("-")
    return f"fairref-{name.removeprefix('fairref-')}"
