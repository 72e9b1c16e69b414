"""Makes tests/golden/open_clip.safetensors: a small CLIP of open_clip with random weights, and what it says.

Run it where open_clip_torch and torchvision are installed; nothing of fairref is used. The state_dict under
`weights/`, normalised `pixels` (3, 3, 32, 32) and `ids` (3, 12), and for each of two activations both towers' unit
features, `gelu/image` and so on.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file

FILE = Path(__file__).with_name("open_clip.safetensors")
VISION = CLIPVisionCfg(layers=2, width=32, head_width=16, mlp_ratio=2.0, patch_size=8, image_size=32)
TEXT = CLIPTextCfg(context_length=12, vocab_size=40, width=24, heads=3, layers=3)


def main():
    torch.manual_seed(0)
    clips = {
        name: CLIP(16, asdict(VISION), asdict(TEXT), quick_gelu=name == "quick_gelu").eval()
        for name in ("gelu", "quick_gelu")
    }
    with torch.no_grad():
        for parameter in clips["gelu"].parameters():  # biases and norms, too, are away from 0 and 1
            parameter.add_(0.05 * torch.randn_like(parameter))
    weights = clips["gelu"].state_dict()
    clips["quick_gelu"].load_state_dict(weights)
    pixels, ids = torch.randn(3, 3, 32, 32), torch.randint(39, (3, 12))
    ids[0, 4], ids[1, 11], ids[2, 0] = 39, 39, 39  # where a text ends: at the largest id
    tensors = {"pixels": pixels, "ids": ids, **{f"weights/{key}": value for key, value in weights.items()}}
    with torch.no_grad():
        for name, clip in clips.items():
            tensors[f"{name}/image"] = clip.encode_image(pixels, normalize=True)
            tensors[f"{name}/text"] = clip.encode_text(ids, normalize=True)
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, FILE)


if __name__ == "__main__":
    main()
