"""A single-file LDM checkpoint, with what stands beside it and in its header -> tensors of the three networks."""

import re
from pathlib import Path

from torch import Tensor

from fairref.errors import UserError
from fairref.files.ldm import LDM_PARTS, ldm_split
from fairref.files.names import some_kinds
from fairref.files.paths import read_text
from fairref.files.weights import find, read, read_metadata
from fairref.progress import note

VAE_FILE = "diffusion_pytorch_model"  # of a folder vae/ beside it, without `.safetensors`
EPSILON, ARCHITECTURE = ("epsilon", "eps"), "stable-diffusion-v1"  # of modelspec, in the header
YAML = {  # key of LDM's configuration -> what it says of SD-1.5, as a text or a number
    "parameterization": ("eps",),
    "linear_start": (0.00085,),
    "linear_end": (0.012,),
    "timesteps": (1000,),
    "scale_factor": (0.18215,),
    "layer": ("last",),
    "zero_terminal_snr": ("false",),
    "rescale_betas_zero_snr": ("false",),
}


def read_single(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Return the tensors of "unet", "vae" and "text_encoder" in LDM's names, and for each the file for messages.

    NAME.vae.safetensors beside NAME.safetensors takes the place of its VAE; the VAE of a folder `vae/` beside it is
    read where it has none. Raises UserError for a model that is no Stable Diffusion 1.x.
    """
    tensors = read(path)
    _check_metadata(path)
    for beside in path.parent.iterdir():
        if beside.stem == path.stem and beside.suffix.lower() in (".yaml", ".yml"):
            _check_yaml(beside)
        if beside.name in (f"{path.stem}.vae.pt", f"{path.stem}.vae.ckpt"):
            note(
                f"{beside}: is not read, for it is a pickle; web UIs draw with it in the place of the file's VAE."
            )
    parts, outside = ldm_split(tensors, str(path))
    say_ignored(path, outside)
    sources = {name: f"{path} ({name})" for name in parts}
    own, beside = path.with_suffix(".vae.safetensors"), find(path.parent / "vae", VAE_FILE)
    if own.is_file():
        note(f"{own}: takes the place of the VAE in {path.name}, as its name says.")
        parts["vae"], sources["vae"] = read(own), str(own)
    elif beside.is_file() and parts["vae"]:
        note(f"{beside}: is not read, for {path.name} has its own VAE.")
    elif beside.is_file():
        parts["vae"], sources["vae"] = read(beside), str(beside)
    for name, part in parts.items():
        if not part:
            put = f" put it beside the file as {own.name}, or" if name == "vae" else ""
            raise UserError(
                f"{path}: found no {LDM_PARTS[name][0]}* in it, the {name};{put} use a whole single-file checkpoint of"
                " Stable Diffusion 1.x."
            )
    return parts, sources


def say_ignored(source: str | Path, names: list[str]) -> None:
    """Say in one line which tensors of a file are left out, if any."""
    if names:
        note(
            f"{source}: ignored {len(names)} tensors that belong to none of its networks: {some_kinds(names)}."
        )


def _check_metadata(path):
    """Raise a UserError for a file whose own header says that it is of another kind."""
    said = read_metadata(path)
    prediction = said.get("modelspec.prediction_type", said.get("modelspec.predict_key", EPSILON[0]))
    architecture = said.get("modelspec.architecture", ARCHITECTURE)
    if prediction not in EPSILON or not architecture.startswith(ARCHITECTURE):
        raise UserError(
            f"{path}: its header says modelspec.architecture = {architecture!r} and prediction_type = {prediction!r};"
            f" expected {ARCHITECTURE} and {EPSILON[0]}: use a checkpoint of Stable Diffusion 1.x."
        )


def _check_yaml(path):
    """Raise a UserError for an LDM configuration that says another model than SD-1.5 of the single file."""
    for key, value in re.findall(
        r"(\w+)[\"']?[ \t]*:[ \t]*[\"']?([^\s\"'#,{}]+)", re.sub("#.*", "", read_text(path))
    ):
        allowed = YAML.get(key)
        if allowed is None:
            continue
        try:
            fits = any(float(value) == number for number in allowed)
        except (ValueError, TypeError):
            fits = value.lower() in allowed
        if not fits:
            raise UserError(
                f"{path}: {key} is {value}; expected {' or '.join(map(str, allowed))}, as of Stable Diffusion 1.x: use"
                " such a model, or take the file away if it belongs to another."
            )
