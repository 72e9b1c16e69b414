"""Read exported LoRA back as the tools that it is for do: by other ways than those that wrote it."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from fairref.errors import UserError

Pairs = dict[str, tuple[Tensor, Tensor]]  # layer -> down, up


def from_peft(tensors: Mapping[str, Tensor]) -> Pairs:
    """Return LoRA by layer from PEFT's names. Raises UserError for another name, or one half alone."""
    halves = {"A": {}, "B": {}}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"((?:text_encoder|unet)\..+)\.lora_([AB])\.weight", name)
        if not found:
            raise UserError(f"{name} is no name of PEFT's.")
        halves[found[2]][found[1]] = tensor
    if odd := set(halves["A"]) ^ set(halves["B"]):
        raise UserError(f"{min(odd)} has one half alone.")
    return {layer: (down, halves["B"][layer]) for layer, down in halves["A"].items()}


def from_kohya(tensors: Mapping[str, Tensor], text_encoder: nn.Module, unet: nn.Module) -> Pairs:
    """Return LoRA by layer from kohya's names: each layer of the networks looks for its own.

    Raises UserError for a tensor that no layer takes, and for an alpha that is not the rank.
    """
    pairs, taken = {}, set()
    for prefix, network in {"lora_te_": text_encoder, "lora_unet_": unet}.items():
        for name, _ in network.named_modules():
            key = prefix + name.replace(".", "_")
            down, up, alpha = (
                tensors.get(f"{key}.{end}") for end in ("lora_down.weight", "lora_up.weight", "alpha")
            )
            if down is None or up is None or alpha is None:
                continue
            if alpha.item() != len(down):
                raise UserError(f"{key} has alpha {alpha.item()}, not its rank {len(down)}.")
            part = "text_encoder" if network is text_encoder else "unet"
            pairs[f"{part}.{name}"] = down, up
            taken |= {f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha"}
    if taken != set(tensors) or 3 * len(pairs) != len(tensors):
        raise UserError(f"{len(set(tensors) - taken)} tensors belong to no layer.")
    return pairs
