"""Makes tests/golden/baselines.safetensors from the published code of three baselines.

    python tests/golden/make_baselines.py DEBIAS_VL UNIFIED_CONCEPT_EDITING FAIRIMAGEN

Run it where these three repositories are cloned (chingyaoc/debias_vl at adccbe6, rohitgandikota/unified-concept-editing
at 28c81ed, fuzihaofzh/FairImagen at e2ef1c1), and diffusers, transformers and scikit-learn are installed; nothing of
fairref is used. Inputs are random numbers of numpy. K classes of X texts, E concepts, d width.

    z (2, X, d), projection (d, d)                                      of lambda = 500
    c (E, d), a (2, d), ratios (rounds, E, 2), W (out, d), edited (out, d)     the weight after these rounds
    x (K, X, d), projector (d, d), directions (K or 1, d)               under fair2/ and fair3/, of 2 and 3 classes
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

FILE = Path(__file__).with_name("baselines.safetensors")
STRENGTH, LAMB, KEPT = 500, 0.5, 5


def projection(rng, repository):
    """P of random unit states."""
    sys.path.insert(0, str(repository / "generative"))
    from main import get_M

    z = rng.normal(size=(2, 7, 6))
    z /= np.linalg.norm(z, axis=2, keepdims=True)
    rows = z.transpose(1, 0, 2).reshape(-1, 6)  # a pair's two texts stand together
    M = get_M(rows, [[2 * i, 2 * i + 1] for i in range(7)])
    P = np.linalg.inv(STRENGTH * M + np.eye(6))
    return {"z": z, "projection": P}


class Pipe:
    """What the script asks of a pipeline: a U-Net with one layer of cross-attention, and texts of one state each."""

    def __init__(self, W, texts):
        self.unet, layer = nn.Module(), nn.Linear(W.shape[1], W.shape[0], bias=False)
        self.unet.attn2, self.texts = nn.Module(), texts
        layer.weight.data.copy_(torch.tensor(W))
        self.unet.attn2.to_k = layer

    def encode_prompt(self, prompt, **options):
        return (torch.tensor(self.texts[prompt])[None, None].float(),)

    def tokenizer(self, *arguments, **options):
        return {"attention_mask": torch.ones(1, 2, dtype=torch.long)}  # the last word is the first state

    tokenizer.model_max_length = 2

    def to(self, dtype):
        return self


def concept_editing(rng, repository):
    """The weight after rounds of given ratios."""
    sys.path.insert(0, str(repository / "trainscripts"))
    import uce_sd_debias as published

    c, a, W = rng.normal(size=(3, 6)), rng.normal(size=(2, 6)), rng.normal(size=(4, 6)).astype(np.float32)
    ratios = rng.uniform(-0.5, 0.5, size=(2, 3, 2))
    told = iter([*ratios, np.zeros((3, 2))])  # then it stops
    published.get_ratios = lambda **options: next(told)
    published.device, published.torch_dtype, published.desired_ratios = "cpu", torch.float32, [0.5, 0.5]
    published.max_iterations = len(ratios) + 1
    concepts, classes = [f"concept {e}" for e in range(3)], ["class 0", "class 1"]
    pipe = Pipe(W, dict(zip(concepts + classes, [*c, *a], strict=True)))
    with TemporaryDirectory() as folder:
        published.UCE(pipe, None, concepts, classes, [], 1, 1, LAMB, folder, "w", 0.05, 0.1, 10, 20, 7.5)
        (edited,) = load_file(Path(folder) / "w.safetensors").values()
    return {"c": c, "a": a, "ratios": ratios, "W": W, "edited": edited.numpy()}


def fair_pca(rng, repository, K):
    """U U^T and the class directions of random states."""
    sys.path.insert(0, str(repository / "src"))
    from fair_PCA import FairPCA

    x = rng.normal(size=(K, 8, 9)) + rng.normal(size=(K, 1, 9))
    classes = np.repeat(np.arange(K), 8)
    model = FairPCA(target_dim=KEPT, standardize=False, tradeoff_param=0.4)
    if K == 2:
        model.fit(x.reshape(-1, 9), classes)
    else:
        model.fit_mg(x.reshape(-1, 9), np.eye(K)[classes])
    found = {"x": x, "projector": model.UUT, "directions": model.nzTXT}
    return {f"fair{K}/{name}": values for name, values in found.items()}


def main():
    rng, (debias_vl, editing, fairimagen) = np.random.default_rng(0), map(Path, sys.argv[1:])
    made = {
        **projection(rng, debias_vl),
        **concept_editing(rng, editing),
        **fair_pca(rng, fairimagen, 2),
        **fair_pca(rng, fairimagen, 3),
    }
    save_file({name: torch.tensor(np.ascontiguousarray(values)) for name, values in made.items()}, FILE)


if __name__ == "__main__":
    main()
