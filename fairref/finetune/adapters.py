"""LoRA on the text encoder, and its file.

W x becomes W x + up down x, with up (out, r) = 0 and down (r, in) ~ N(0, 1/r^2) at the start, scale 1, no
alpha: the first adapted embedding is the frozen one bit for bit. A file holds the two matrices of each
adapted layer in float32, as `text_encoder.<name of the layer>.lora_down.weight` and `.lora_up.weight`, and,
as metadata, what it was made from. A run's adapter.safetensors is the moving average (`average`: "ema"), its
adapter_raw.safetensors the last value ("raw").
"""

import copy
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fairref.errors import UserError
from fairref.weights_io import load_strict, read

ADAPTED = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
FORMAT = "fairref-lora-1"
FILE = "adapter.safetensors"
PREFIX = "text_encoder."


class LoRALinear(nn.Module):
    """x (..., in) -> base(x) + up(down(x)) (..., out), the second term in at least float32."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        kind = {"dtype": torch.promote_types(base.weight.dtype, torch.float32), "device": base.weight.device}
        self.base = base
        self.lora_down = nn.Linear(base.in_features, rank, bias=False, **kind)
        self.lora_up = nn.Linear(rank, base.out_features, bias=False, **kind)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x):
        y = self.lora_up(self.lora_down(x.to(self.lora_down.weight.dtype)))
        return self.base(x) + y.to(x.dtype)


class Adapter(nn.Module):
    """The matrices of all adapted layers, the parameters that the text encoder uses, named as in the file."""

    def __init__(self, layers: dict[str, LoRALinear]):
        super().__init__()
        for name, layer in layers.items():
            place = self
            for part in f"{PREFIX}{name}".split("."):
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.lora_down, place.lora_up = layer.lora_down, layer.lora_up


def adapt(
    text_encoder: nn.Module, rank: int, generator: torch.Generator | None = None
) -> tuple[nn.Module, Adapter]:
    """A text encoder with LoRA and its adapter, whose parameters require grad; the frozen weights are shared.

    The encoder given stays as it is. `generator` (on the CPU) draws down.
    """
    shared = {id(tensor): tensor for tensor in (*text_encoder.parameters(), *text_encoder.buffers())}
    adapted = copy.deepcopy(text_encoder, shared)
    targets = [
        name
        for name, m in adapted.named_modules()
        if name.split(".")[-1] in ADAPTED and isinstance(m, nn.Linear)
    ]
    layers = {}
    for name in targets:
        parent = adapted.get_submodule(name.rpartition(".")[0])
        layers[name] = LoRALinear(adapted.get_submodule(name), rank)
        down = layers[name].lora_down.weight
        values = torch.randn(down.shape, generator=generator) / rank
        down.data.copy_(values)
        setattr(parent, name.rpartition(".")[2], layers[name])
    return adapted.eval(), Adapter(layers)


def save_adapter(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes adapter tensors under the names of the file, by way of a temporary name."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()
    }
    rank = next(tensor.shape[0] for name, tensor in tensors.items() if "lora_down" in name)
    save_file(tensors, temporary, metadata={**metadata, "format": FORMAT, "rank": str(rank), "scale": "1"})
    os.replace(temporary, path)


def adapter_file(path: str | Path) -> Path:
    """The adapter's file: the path itself, or adapter.safetensors in a run's folder. Raises UserError."""
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such adapter; give a run's folder or its {FILE}.")
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path}: no {FILE} in it (yet); give the folder of a finished run.")
    return file


def load_adapter(text_encoder: nn.Module, path: str | Path) -> nn.Module:
    """The text encoder with the adapter of a file or a run's folder, frozen. Raises UserError."""
    file = adapter_file(path)
    tensors = read(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    if metadata.get("format") != FORMAT or metadata.get("scale") != "1":
        found = metadata.get("format", "another format")
        raise UserError(f"{file}: found {found}, expected an adapter that train.py wrote ({FORMAT}).")
    down = next((tensor for name, tensor in tensors.items() if name.endswith(".lora_down.weight")), None)
    if down is None or down.dim() != 2:
        raise UserError(f"{file}: no matrix lora_down.weight in it; use a file that train.py wrote.")
    adapted, adapter = adapt(text_encoder, down.shape[0])
    try:
        load_strict(adapter, tensors, str(file))
    except UserError as error:
        raise UserError(f"{error} An adapter fits only the weights it was made from.") from None
    return adapted.requires_grad_(False)
