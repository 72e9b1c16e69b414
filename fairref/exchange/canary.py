"""What check.py compares: values of the networks before and after, for one prompt, and what can be counted."""

import json
import re

import torch
from torch import Tensor

from fairref.bundle.loading import Bundle, load_bundle
from fairref.exchange.exported import Export
from fairref.generation.rollout import embed

PROMPT = "a photo of the face of a pilot, a person"
T = 500  # the time step at which the U-Net runs
PROBES = 8  # values of each network
SHARE = 0.1  # of the largest change: how far a value may be off
ROUNDING = 1e-4  # of the largest value: what other hardware may differ by


@torch.no_grad()
def recorded(export: Export, after: Bundle) -> str:
    """What check.py compares, as JSON. `after` is the base with the adapter."""
    whole = export.is_whole
    if whole:
        place = export.folder if export.to == "merged" else export.folder / f"{export.name}.safetensors"
        after = load_bundle(place)
    layers = {
        part: sum(layer.startswith(f"{part}.") for layer in export.adapter.pairs)
        for part in ("text_encoder", "unet")
    }
    values = {}
    for key, bundle in (("before", export.bundle), ("after", after)):
        c = embed(bundle, PROMPT)[:1]
        z = torch.sin(torch.arange(bundle.unet.config.in_channels * 64.0)).view(1, -1, 8, 8)
        values[key] = {"text": c.flatten(), "unet": bundle.unet(z, T, c).flatten()}
    return _compact(
        {
            "prompt": export.put(PROMPT) if export.to == "embedding" else PROMPT,
            "before_prompt": PROMPT,
            "t": T,
            "layers": {part: 0 if whole else count for part, count in layers.items()},
            "tokens": export.tokens,
            "weights": after.fingerprints if whole else export.bundle.fingerprints,
            **{name: _probes(values["before"][name], values["after"][name]) for name in ("text", "unet")},
        }
    )


def _compact(content):
    """JSON with each list in one line."""
    return re.sub(r"\[[^][]*\]", lambda found: " ".join(found[0].split()), json.dumps(content, indent=1))


def _probes(before: Tensor, after: Tensor):
    """The places where the adapter changes most, both values there, and how far they may be off."""
    change = (after - before).abs()
    places = change.topk(PROBES).indices if change.any() else torch.arange(PROBES) * (len(change) // PROBES)
    tolerance = max(SHARE * float(change.max()), ROUNDING * float(after.abs().max()))
    return {
        "places": places.tolist(),
        "before": [float(f"{v:.6g}") for v in before[places]],
        "after": [float(f"{v:.6g}") for v in after[places]],
        "tolerance": float(f"{tolerance:.2g}"),
    }
