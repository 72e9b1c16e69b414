"""What finetuning trains, and its file: LoRA on the text encoder or the U-Net, or soft tokens before the prompt.

LoRA: W x becomes W x + up down x, with up (out, r) = 0 and down (r, in) ~ N(0, 1/r^2) at the start, scale 1, no
alpha, so the adapted network starts as the frozen one bit for bit. Prefix: P token embeddings after BOS, each at
first the embedding of a random token (`rollout.embed` puts them in).

A file holds, in float32, `<network>.<layer>.lora_down.weight` and `.lora_up.weight` of each adapted layer, or
`prefix` (P, D), and what it was made from. A run's adapter.safetensors is the moving average (`average`: "ema"),
its adapter_raw.safetensors the last value ("raw").
"""

import copy
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fairref.bundle.loading import Bundle
from fairref.errors import UserError
from fairref.files.paths import expanded
from fairref.files.weights import load_strict, read, read_info, write

COMPONENTS = {  # name -> what of the bundle is adapted
    "prefix": ("prefix",),
    "text_encoder": ("text_encoder",),
    "unet": ("unet",),
    "both": ("text_encoder", "unet"),
}
LAYERS = {  # network -> the ends of its adapted layers' names: attention, and in the text encoder the MLP
    "text_encoder": (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2"),
    "unet": (".to_q", ".to_k", ".to_v", ".to_out.0"),
}
FORMAT = "fairref-adapter-1"
FILE = "adapter.safetensors"


class LoRALinear(nn.Module):
    """x (..., in) -> base(x) + up(down(x)) (..., out), the second term in at least float32."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        kind = {"dtype": torch.promote_types(base.weight.dtype, torch.float32), "device": base.weight.device}
        self.base = base
        self.lora_down = nn.Linear(base.in_features, rank, bias=False, **kind)
        self.lora_up = nn.Linear(rank, base.out_features, bias=False, **kind)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lora_up(self.lora_down(x.to(self.lora_down.weight.dtype)))
        return self.base(x) + y.to(x.dtype)


class Adapter(nn.Module):
    """All that is trained: the parameters that the adapted bundle uses, named as in the file."""

    def put(self, name: str, layer: LoRALinear) -> None:
        """Takes in the two matrices of the layer with this name."""
        place = self
        for part in name.split("."):
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.lora_down, place.lora_up = layer.lora_down, layer.lora_up


def adapt(
    bundle: Bundle,
    component: str,
    rank: int = 50,
    tokens: int = 5,
    generator: torch.Generator | None = None,
) -> tuple[Bundle, Adapter]:
    """An adapted bundle, which shares its frozen weights with the one given, and the adapter that is to be trained.

    The bundle given stays as it is. `rank` of LoRA, `tokens` of the prefix; `generator` (on the CPU) draws the start.
    """
    adapter, changed = Adapter(), {}
    for part in COMPONENTS[component]:
        if part == "prefix":
            adapter.prefix = nn.Parameter(first_tokens(bundle, tokens, generator))
            changed[part] = adapter.prefix
            continue
        changed[part], layers = with_lora(getattr(bundle, part), LAYERS[part], rank, generator)
        for name, layer in layers.items():
            adapter.put(f"{part}.{name}", layer)
    return replace(bundle, **changed), adapter


def with_lora(
    network: nn.Module, ends: tuple[str, ...], rank: int, generator: torch.Generator | None
) -> tuple[nn.Module, dict[str, LoRALinear]]:
    """The network with LoRA on the layers whose names have these ends, and those layers by name."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    adapted, layers = copy.deepcopy(network, shared), {}
    for name, layer in list(adapted.named_modules()):
        if name.endswith(ends) and isinstance(layer, nn.Linear):
            layers[name] = LoRALinear(layer, rank)
            down = layers[name].lora_down.weight
            down.data.copy_(torch.randn(down.shape, generator=generator) / rank)
            parent, _, last = name.rpartition(".")
            setattr(adapted.get_submodule(parent), last, layers[name])
    return adapted.eval(), layers


def first_tokens(bundle: Bundle, tokens: int, generator: torch.Generator | None) -> Tensor:
    """The embeddings (tokens, D) of random tokens that are neither BOS nor EOS, in at least float32."""
    tokenizer, encoder = bundle.tokenizer, bundle.text_encoder
    if not 1 <= tokens <= tokenizer.length - 3:
        raise UserError(
            f"The prefix has {tokens} tokens; expected 1 to {tokenizer.length - 3}, which leave room."
        )
    ids = torch.tensor([i for i in range(tokenizer.vocab_size) if i not in (tokenizer.bos, tokenizer.eos)])
    ids = ids[torch.randint(len(ids), (tokens,), generator=generator)]
    rows = encoder.embed(ids.to(next(encoder.parameters()).device)).detach()
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def save_adapter(path: str | Path, tensors: Mapping[str, Tensor], info: Mapping[str, object]) -> None:
    """Writes an adapter's tensors under their names; `info` says what they were made from. Raises UserError."""
    tensors = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in tensors.items()}
    write(path, tensors, {**info, "format": FORMAT})


def adapter_file(path: str | Path) -> Path:
    """The adapter's file: the path itself, or adapter.safetensors in a run's folder. Raises UserError."""
    path = expanded(path)
    if not path.exists():
        raise UserError(f"{path}: no such adapter; give a run's folder or its {FILE}.")
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path}: no {FILE} in it (yet); give the folder of a finished run.")
    return file


def load_adapter(bundle: Bundle, path: str | Path, any_base: bool = False) -> Bundle:
    """The bundle with the adapter of a file or a run's folder, frozen. Raises UserError.

    With `any_base` the adapter may be of another base, which is then said.
    """
    file = adapter_file(path)
    tensors, info = read(file), read_info(file)
    found = info.get("format", "another format")
    if found != FORMAT:
        raise UserError(f"{file}: found {found}, expected an adapter that train.py wrote ({FORMAT}).")
    _check_base(file, info.get("base"), bundle, any_base)
    component, size = _shape(file, tensors)
    try:
        adapted, adapter = adapt(bundle, component, size, size)
        load_strict(adapter, tensors, "the adapter")
    except UserError as error:
        raise UserError(f"{file}: {error} An adapter fits only the weights it was made from.") from None
    adapter.requires_grad_(False)
    return adapted


def _check_base(file, base, bundle, any_base):
    """Refuses an adapter of another base, or says so where `any_base`; a VAE of its own is said only."""
    if not isinstance(base, dict):
        print(
            f"{file}: its base is unknown, for an older version wrote it; {bundle.path} is taken.",
            file=sys.stderr,
        )
        return
    others = [name for name, found in bundle.fingerprints.items() if base.get(name) != found]
    if set(others) - {"vae"} and not any_base:
        raise UserError(
            f"{file}: made from another {' and '.join(others)} than those of {bundle.path} (a bfloat16 copy counts as"
            " another one); give its own --weights, or --any-base to go on."
        )
    if others:
        print(
            f"{file}: made from another {' and '.join(others)} than those of {bundle.path}", file=sys.stderr
        )


def _shape(file, tensors):
    """Component, and the rank or the number of tokens, of an adapter."""
    parts = {name.split(".")[0] for name in tensors}
    component = next((name for name, of in COMPONENTS.items() if set(of) == parts), None)
    sizes = [
        t.shape[0]
        for name, t in tensors.items()
        if name.endswith(("prefix", "lora_down.weight")) and t.dim() == 2
    ]
    if component is None or not sizes:
        known = ", ".join(LAYERS)
        raise UserError(
            f"{file}: found no prefix or lora_down.weight of {known} alone; use a file that train.py wrote."
        )
    if 0 in sizes:
        raise UserError(f"{file}: its matrices have rank 0; use a file that train.py wrote.")
    return component, sizes[0]
