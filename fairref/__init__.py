"""Fairness finetuning of text-to-image diffusion models, from scratch.

The core in reading order: diffusion/schedule, diffusion/solver, diffusion/model, diffusion/sampler,
diffusion/gradient, fairness/transport, fairness/losses, training/terms, training/step; beside it nets/unet, nets/vae,
nets/clip. What this file offers is imported when it is asked for, not by `import fairref`, which imports no torch.
"""

from importlib import import_module

__version__ = "0.1.0"

OFFERED = {  # name -> where it is
    "UserError": "fairref.errors",
    "adjusted_gradient": "fairref.diffusion.gradient",  # Algorithm A.1, beside eq 9 as exact_gradient
    "evaluate": "fairref.evaluation.evaluation",
    "expected_ot": "fairref.fairness.transport",
    "load_bundle": "fairref.bundle.loading",
    "sample": "fairref.generation.sampling",
    "train": "fairref.training.run",
}
__all__ = ["__version__", *OFFERED]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name in OFFERED:
        return getattr(import_module(OFFERED[name]), name)
    raise AttributeError(f"module 'fairref' has no attribute {name!r}")
