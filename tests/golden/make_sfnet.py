"""Makes tests/golden/sfnet.safetensors: opensphere's SFNet-20 on weights that a formula gives, in its three versions.

    python tests/golden/make_sfnet.py CLONE      where CLONE is a clone of github.com/ydwen/opensphere

Run it where torch is installed; nothing of fairref is used. Narrow, and at full size, in float64: features, and of the
gradient of their weighted sum by the picture every eighth pixel. The metadata has the keys and shapes of opensphere's
state_dict.
"""

import json
import subprocess
import sys
from pathlib import Path

from make_mobilenet import formula_weights, uniform

FILE = Path(__file__).with_name("sfnet.safetensors")
BACKBONES = "model/backbone"
NARROW = {"channels": [4, 6, 8, 10], "out_channel": 12}
VERSIONS = {  # name here -> commit, file, function, its options
    "sfnet": ("ff00cf3", f"{BACKBONES}/sfnet.py", "sfnet20", NARROW),
    "deprecated": ("ff00cf3", f"{BACKBONES}/sfnet_deprecated.py", "sfnet20_deprecated", NARROW),
    "deprecated, renamed": ("4d17308", f"{BACKBONES}/sfnet_deprecated.py", "sfnet20_deprecated", NARROW),
    "deprecated, full": ("ff00cf3", f"{BACKBONES}/sfnet_deprecated.py", "sfnet20_deprecated", {}),
}
SHAPE, EVERY = (2, 3, 112, 112), 8


def main(clone):
    import torch
    from safetensors.torch import save_file

    tensors, about = {}, {"torch": torch.__version__}
    for version, (commit, path, function, options) in VERSIONS.items():
        source = subprocess.run(
            ["git", "-C", clone, "show", f"{commit}:{path}"], capture_output=True, text=True, check=True
        ).stdout
        module = {"__name__": "sfnet"}
        exec(source, module)
        net = module[function](**options)
        shapes = {key: list(value.shape) for key, value in net.state_dict().items()}
        net.load_state_dict({key: torch.from_numpy(value) for key, value in formula_weights(shapes).items()})
        x = torch.from_numpy(uniform("x", SHAPE)).double().requires_grad_()
        features = net.double().eval()(x)
        (features * torch.from_numpy(uniform("g", tuple(features.shape)))).sum().backward()
        about[version] = json.dumps(shapes)
        tensors[f"{version}.features"] = features.detach()
        tensors[f"{version}.gradient"] = x.grad[:, :, ::EVERY, ::EVERY].contiguous()
        print(version, features.abs().max(), x.grad.abs().max())
    save_file(tensors, FILE, metadata=about)


if __name__ == "__main__":
    main(*sys.argv[1:])
