"""Makes tests/golden/mobilenet.safetensors: torchvision's MobileNetV3 on weights that a formula gives.

Run it where torch and torchvision are installed; nothing of fairref is used.
For large and small at width 0.5: logits and the gradient of their weighted sum by the input, in eval mode and float64.
For large at its full size, with the 80 logits of the released CelebA head: logits and the gradient's norm of each
picture. The file's metadata has the keys and shapes of torchvision's state_dict at widths 0.5 and 1.0.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("mobilenet.safetensors")
WIDTHS, NUM_LOGITS = (0.5, 1.0), 6
INPUT_SHAPE = (2, 3, 64, 48)
FULL_LOGITS, FULL_SHAPE = 80, (2, 3, 224, 224)


def uniform(name, shape):
    """Numbers in [-1, 1), float32, the same everywhere: splitmix64 of (CRC-32 of the name, index)."""
    z = np.arange(1, math.prod(shape) + 1, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32)
    z = z * np.uint64(0x9E3779B97F4A7C15)  # wraps modulo 2^64, as it should
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(40)).astype(np.float32) / 2**23 - 1).reshape(shape)


def formula_weights(shapes):
    """{key: shape} -> {key: array}: weights of variance 2/fan_in, BatchNorm near 1 but never trivial."""
    weights = {}
    for key, shape in shapes.items():
        u = uniform(key, shape)
        if key.endswith("num_batches_tracked"):
            weights[key] = np.zeros(shape, np.int64)
        elif key.endswith("running_var"):
            weights[key] = 1 + u / 2
        elif len(shape) == 1:
            weights[key] = (1 if key.endswith(".weight") else 0) + u / 4
        else:
            weights[key] = u * np.float32(math.sqrt(6 / math.prod(shape[1:])))
    return weights


def main():
    import torch
    import torchvision
    from safetensors.torch import save_file

    def outcome(model, shape):
        """Logits and the input's gradient, in float64."""
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        weights = formula_weights(shapes)
        model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
        x = torch.from_numpy(uniform("x", shape)).double().requires_grad_()
        logits = model.double().eval()(x)
        (logits * torch.from_numpy(uniform("g", tuple(logits.shape)))).sum().backward()
        return logits.detach(), x.grad

    tensors = {}
    about = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    for kind in ("large", "small"):
        make = getattr(torchvision.models, f"mobilenet_v3_{kind}")
        for width in WIDTHS:
            model = make(num_classes=NUM_LOGITS, width_mult=width)
            shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
            about[f"{kind} {width}"] = json.dumps(shapes)
            if width == WIDTHS[0]:
                tensors[f"{kind}.logits"], tensors[f"{kind}.gradient"] = outcome(model, INPUT_SHAPE)
                print(kind, tensors[f"{kind}.logits"], tensors[f"{kind}.gradient"].abs().max())
    logits, gradient = outcome(torchvision.models.mobilenet_v3_large(num_classes=FULL_LOGITS), FULL_SHAPE)
    tensors["full.logits"], tensors["full.gradient_norms"] = logits, gradient.flatten(1).norm(dim=1)
    print("full", logits.abs().max(), tensors["full.gradient_norms"])
    save_file(tensors, FILE, metadata=about)


if __name__ == "__main__":
    main()
