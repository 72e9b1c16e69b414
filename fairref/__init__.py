"""Fairness finetuning of text-to-image diffusion models, from scratch.

The core in reading order: diffusion/schedule, diffusion/solver, diffusion/sampler, diffusion/gradient,
fairness/transport, fairness/losses, finetune/trainer; beside it nets/unet, nets/vae, nets/clip.
"""

__version__ = "0.1.0"

__all__ = ["UserError", "__version__", "load_bundle"]


def __getattr__(name):
    # torch and the networks are imported when something needs them, not by `import fairref`
    if name == "load_bundle":
        from fairref.bundle import load_bundle

        return load_bundle
    if name == "UserError":
        from fairref.errors import UserError

        return UserError
    raise AttributeError(f"module 'fairref' has no attribute {name!r}")
