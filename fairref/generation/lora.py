"""What finetuning trains: LoRA on the text encoder or the U-Net, or a soft prompt (`soft.py`).

LoRA: W x becomes W x + up down x, with up (out, r) = 0 and down (r, in) ~ N(0, 1/r^2) at the start, scale 1, no
alpha, so the adapted network starts as the frozen one bit for bit. Soft prompts start as P embeddings of random tokens.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from fairref.bundle.loading import Bundle
from fairref.errors import UserError
from fairref.generation.soft import SOFT_PROMPTS

Network = TypeVar("Network", bound=nn.Module)
COMPONENTS = {  # name -> what of the bundle is adapted
    **{name: (name,) for name in SOFT_PROMPTS},
    "text_encoder": ("text_encoder",),
    "unet": ("unet",),
    "both": ("text_encoder", "unet"),
}
LAYERS = {  # network -> the ends of its trained layers' names: attention, and in the text encoder the MLP
    "text_encoder": (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2"),
    "unet": (".to_q", ".to_k", ".to_v", ".to_out.0"),
}
UNREAD = 6  # --empty-prompt unread takes one in so many of a layer's directions at most


class LoRALayer(nn.Module):
    """x -> base(x) + up(down(x)), the second term in at least float32; base is a linear layer or a convolution.

    Of a convolution, down (r, in, k, k) has its kernel, stride and padding, and up is (out, r, 1, 1).
    """

    def __init__(self, base: nn.Module, rank: int):
        super().__init__()
        inner = innermost(base)
        kind = {
            "dtype": torch.promote_types(inner.weight.dtype, torch.float32),
            "device": inner.weight.device,
        }
        self.base = base
        if isinstance(inner, nn.Conv2d):
            shape = (inner.kernel_size, inner.stride, inner.padding)
            self.lora_down = nn.Conv2d(inner.in_channels, rank, *shape, bias=False, **kind)
            self.lora_up = nn.Conv2d(rank, inner.out_channels, 1, bias=False, **kind)
        else:
            self.lora_down = nn.Linear(inner.in_features, rank, bias=False, **kind)
            self.lora_up = nn.Linear(rank, inner.out_features, bias=False, **kind)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lora_up(self.lora_down(x.to(self.lora_down.weight.dtype)))
        return self.base(x) + y.to(x.dtype)


class Adapter(nn.Module):
    """The parameters of an adapter that the adapted bundle uses, named as in its file."""

    def put(self, name: str, parameters: Mapping[str, nn.Module | nn.Parameter]) -> None:
        """Takes in what the layer with this name has of the adapter."""
        place = self
        for part in name.split("."):
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        for key, value in parameters.items():
            setattr(place, key, value)


def innermost(layer: nn.Module) -> nn.Module:
    """The layer itself under all its LoRA."""
    return innermost(layer.base) if isinstance(layer, LoRALayer) else layer


def is_layer(module: nn.Module) -> bool:
    """Whether an adapter may change it: a linear layer or a convolution, adapted or not."""
    return isinstance(innermost(module), nn.Linear | nn.Conv2d)


def trained_layers(part: str, network: nn.Module) -> list[str]:
    """Names of the layers that finetuning adapts in this network."""
    return [
        name
        for name, layer in network.named_modules()
        if name.endswith(LAYERS[part]) and isinstance(layer, nn.Linear)
    ]


def shared_copy(network: Network) -> Network:
    """A copy of the network with the same tensors, whose layers can be replaced."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, shared)


def put_layer(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts a layer in the place of the one with this name."""
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, layer)


def adapt(
    bundle: Bundle,
    component: str,
    rank: int = 50,
    tokens: int = 5,
    generator: torch.Generator | None = None,
) -> tuple[Bundle, nn.Module]:
    """An adapted bundle, which shares its frozen weights with the one given, and the adapter that is to be trained.

    The bundle given stays as it is. `rank` of LoRA, `tokens` of a soft prompt; `generator` (on the CPU) draws
    the start.
    """
    adapter, changed = Adapter(), {}
    for part in COMPONENTS[component]:
        if part in SOFT_PROMPTS:
            start = first_tokens(bundle, tokens, generator)
            changed["soft"] = adapter = SOFT_PROMPTS[part](start, bundle, generator)
            continue
        network = shared_copy(getattr(bundle, part))
        ranks = dict.fromkeys(trained_layers(part, network), rank)
        for name, layer in put_lora(network, ranks, generator).items():
            adapter.put(f"{part}.{name}", {"lora_down": layer.lora_down, "lora_up": layer.lora_up})
        changed[part] = network.eval()
    return replace(bundle, **changed), adapter


def put_lora(
    network: nn.Module, ranks: Mapping[str, int], generator: torch.Generator | None = None
) -> dict[str, LoRALayer]:
    """Puts LoRA of these ranks on the layers with these names; returns them by name."""
    layers = {}
    for name, rank in ranks.items():
        layers[name] = LoRALayer(network.get_submodule(name), rank)
        down = layers[name].lora_down.weight
        down.data.copy_(torch.randn(down.shape, generator=generator) / rank)
        put_layer(network, name, layers[name])
    return layers


@torch.no_grad()
def empty_directions(bundle: Bundle) -> dict[str, Tensor]:
    """Parameter of LoRA on the text encoder -> (k, in) orthonormal: most of what its layer sees of the empty prompt.

    The k largest directions of its T tokens: all T, or a layer's inputs / UNREAD if these are fewer. Where `down` has
    no part in any of T directions, c_empty stays as it was.
    """
    encoder, seen = bundle.text_encoder, {}
    layers = {name: encoder.get_submodule(name) for name in trained_layers("text_encoder", encoder)}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0][0]}))
        for name, layer in layers.items()
    ]
    encoder(bundle.tokenizer([""]).to(next(encoder.parameters()).device))
    for hook in hooks:
        hook.remove()
    return {
        f"text_encoder.{name}.lora_down.weight": torch.linalg.svd(x.cpu().double(), full_matrices=False)[2][
            : max(x.shape[1] // UNREAD, 1)
        ]
        for name, x in seen.items()
    }


def first_tokens(bundle: Bundle, tokens: int, generator: torch.Generator | None = None) -> Tensor:
    """The embeddings (tokens, D) of random tokens that are neither BOS nor EOS, in at least float32."""
    tokenizer, encoder = bundle.tokenizer, bundle.text_encoder
    check_length(bundle, tokens)
    ids = torch.tensor([i for i in range(tokenizer.vocab_size) if i not in (tokenizer.bos, tokenizer.eos)])
    ids = ids[torch.randint(len(ids), (tokens,), generator=generator)]
    rows = encoder.embed(ids.to(next(encoder.parameters()).device)).detach()
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def check_length(bundle: Bundle, tokens: int) -> None:
    """Raises UserError unless so many soft tokens leave room for BOS, one word and EOS."""
    most = bundle.tokenizer.length - 3
    if not 1 <= tokens <= most:
        raise UserError(f"The soft prompt has {tokens} tokens; expected 1 to {most}, which leave room.")
