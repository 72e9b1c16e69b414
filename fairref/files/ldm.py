"""Single-file LDM checkpoints: their parts, what tells that one is another kind of model, and names of each part."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from fairref.errors import UserError
from fairref.files.names import (
    IGNORED_PREFIXES,
    VAE_LEGACY,
    check_count,
    rename,
    squeeze_vae_attention,
    unet_table,
    vae_table,
)

# The parts of a single-file LDM checkpoint -> prefixes there, of which the first that it has counts.
LDM_PARTS = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": (
        "cond_stage_model.transformer.",
        "cond_stage_model.clip_l.transformer.",
        "text_encoders.clip_l.transformer.",
        "clip_l.transformer.",
    ),
}
WRAPPER = "state_dict."  # before every name in a file that was a training checkpoint
# Of other kinds of models: the beginning of a name, after `model.diffusion_model.` is taken off -> the kind.
OTHER_KINDS = {
    "conditioner.embedders.": "SDXL",
    "label_emb.": "SDXL",
    "joint_blocks.": "SD-3",
    "double_blocks.": "Flux",
    "single_blocks.": "Flux",
    "single_transformer_blocks.": "Flux",
    "cond_stage_model.model.": "SD-2",
    "control_model.": "a ControlNet",
    "lora_unet_": "a LoRA",
    "lora_te": "a LoRA",
    "unet.": "a LoRA or a U-Net in diffusers' names",
    "down_blocks.": "a U-Net alone, in diffusers' names",
    "emb_params": "an embedding",
    "string_to_param": "an embedding",
}
V_PREDICTION = "a model that predicts v, not the noise"
MARKERS = {  # tensors that say something of the whole model -> what
    "v_pred": V_PREDICTION,
    "ztsnr": "a model of a schedule that ends in pure noise",
    "edm_mean": "a model of EDM's kind",
    "edm_vpred.sigma_max": V_PREDICTION,
}
INPAINTING = (8, 9)  # channels into the U-Net of models that edit or fill in an image


def check_kind(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise a UserError for the tensors of a model that is no Stable Diffusion 1.x, by its kind."""
    for key, tensor in tensors.items():
        name = key.removeprefix(LDM_PARTS["unet"][0])
        kind = MARKERS.get(key) or next(
            (kind for start, kind in OTHER_KINDS.items() if name.startswith(start)), None
        )
        is_first = name in ("input_blocks.0.0.weight", "conv_in.weight")
        if is_first and tensor.dim() == 4 and tensor.shape[1] in INPAINTING:
            kind = f"an inpainting or edit model, whose U-Net takes {tensor.shape[1]} channels"
        if kind is not None:
            raise UserError(f"{source}: is {kind} ({key}); use a checkpoint of Stable Diffusion 1.x.")


def ldm_split(tensors: dict[str, Tensor], source: str) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return the parts of a single-file LDM checkpoint without their prefixes, and the names that belong to none.

    Raises UserError for a checkpoint of another kind; a part that is absent is empty.
    """
    tensors = rename(tensors, [(WRAPPER, "")], source)
    check_kind(tensors, source)
    parts, rest = {}, dict(tensors)
    for part, prefixes in LDM_PARTS.items():
        prefix = next((p for p in prefixes if any(key.startswith(p) for key in rest)), prefixes[0])
        names = [key for key in rest if key.startswith(prefix) and not key.startswith(IGNORED_PREFIXES)]
        parts[part] = {key.removeprefix(prefix): rest.pop(key) for key in names}
    return parts, [key for key in rest if key.split(".")[-1] != "position_ids"]


def ldm_unet_names(tensors: dict[str, Tensor], shape: tuple[int, int], source: str) -> dict[str, Tensor]:
    """Return the tensors of LDM's U-Net of (levels, layers per block) under diffusers' names. Raises UserError."""
    levels, layers = shape
    setting = f"block_out_channels, with layers_per_block = {layers},"
    check_count(tensors, r"input_blocks\.(\d+)\.", levels * (layers + 1), setting, source)
    return rename(tensors, unet_table(*shape), source)


def is_ldm_vae(tensors: Iterable[str]) -> bool:
    """Return whether a VAE's tensors have LDM's names."""
    return any(key.startswith("encoder.down.") for key in tensors)


def ldm_vae_names(tensors: dict[str, Tensor], shape: tuple[int, int], source: str) -> dict[str, Tensor]:
    """Return the tensors of LDM's VAE of (levels, layers per block) under diffusers' names. Raises UserError."""
    levels, layers = shape
    check_count(tensors, r"encoder\.down\.(\d+)\.", levels, "block_out_channels", source)
    check_count(tensors, r"encoder\.down\.0\.block\.(\d+)\.", layers, "layers_per_block", source)
    return squeeze_vae_attention(rename(tensors, vae_table(*shape), source))


def vae_names(tensors: dict[str, Tensor], shape: tuple[int, int], source: str) -> dict[str, Tensor]:
    """Return the tensors of a VAE file of any layout, with present names and shapes. Raises UserError.

    The layouts are diffusers' of any version and LDM's, of which `shape` is (levels, layers per block).
    """
    tensors = rename(tensors, [(prefix, "") for prefix in LDM_PARTS["vae"]], source)
    if is_ldm_vae(tensors):
        return ldm_vae_names(tensors, shape, source)
    return squeeze_vae_attention(rename(tensors, VAE_LEGACY, source))


def text_encoder_names(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return a text tower's tensors with `text_model.` in front, and the names of what belongs to a CLIPModel alone.

    transformers 5.6 and later write no `text_model.`.
    """
    bare = not any(key.startswith("text_model.") for key in tensors)
    named = {
        f"text_model.{key}" if bare and not _of_clip(key) else key: tensor for key, tensor in tensors.items()
    }
    inside = {key: tensor for key, tensor in named.items() if key.startswith("text_model.")}
    return inside, [key for key in named if key not in inside]


def _of_clip(key):
    """Whether a tensor belongs to a CLIPModel, outside its text tower."""
    return key == "logit_scale" or key.startswith(("text_projection", "visual_projection", "vision_model."))
