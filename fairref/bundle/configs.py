"""config.json of diffusers or transformers -> a network's settings, strictly."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TypeVar

from fairref.errors import UserError
from fairref.nets import require
from fairref.nets.clip import ACTIVATIONS, ClipConfig, ClipTextConfig, ClipVisionConfig
from fairref.nets.unet import UNetConfig
from fairref.nets.vae import VAEConfig

Config = TypeVar("Config")  # a settings dataclass
NOT_IMPLEMENTED = "nothing else is implemented, use a checkpoint of Stable Diffusion 1.5's kind"

# fmt: off
NEVER_TRUE = ("center_input_sample", "only_cross_attention", "dual_cross_attention", "resnet_skip_time_act",
              "mid_block_only_cross_attention", "class_embeddings_concat")
NEVER_SET = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type",
             "num_attention_heads", "reverse_transformer_layers_per_block", "time_embedding_dim", "time_cond_proj_dim",
             "time_embedding_act_fn", "timestep_post_act", "cross_attention_norm")
# fmt: on

UNET = {  # config keys with a closed set of implemented values
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "act_fn": ("silu",),
    "time_embedding_type": ("positional",),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "resnet_time_scale_shift": ("default",),
    "attention_type": ("default",),
    "transformer_layers_per_block": (1,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "resnet_out_scale_factor": (1,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "dropout": (0,),
    **dict.fromkeys(NEVER_TRUE, (False, None)),
    **dict.fromkeys(NEVER_SET, (None,)),
}

VAE = {  # config keys with one implemented value
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "act_fn": ("silu",),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None, 0),
    "latents_mean": (None,),
    "latents_std": (None,),
}

TOWER = {  # config keys with a closed set of implemented values
    "hidden_act": tuple(ACTIVATIONS),
    "attention_dropout": (0,),
}

IMPLEMENTED: dict[type, Mapping[str, tuple[object, ...]]] = {  # config key -> the values that are implemented
    UNetConfig: UNET,
    VAEConfig: VAE,
    ClipTextConfig: TOWER,
    ClipVisionConfig: TOWER,
    ClipConfig: {},
}


def read_config(cls: type[Config], d: Mapping[str, object], source: str = "config.json") -> Config:
    """Build the settings dataclass `cls`, a key of IMPLEMENTED, from a config.json dict `d`. Raises UserError.

    Keys of `d` that are fields of `cls` are taken: lists become tuples, a field without default is required. A value
    that is not implemented is refused (each item of a list counts by itself). All other keys are ignored. `source`
    names the file in messages.
    """
    try:
        require(isinstance(d, dict), type(d).__name__, "the object of a config.json")
        if cls is ClipConfig:
            d = {
                **d,
                "text": _tower(d, "text", ClipTextConfig),
                "vision": _tower(d, "vision", ClipVisionConfig),
            }
        return cls(**_values(cls, d))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _tower(d, name, cls):
    """A tower of a CLIPModel; the legacy key wins."""
    of_tower = d.get(f"{name}_config_dict") or d.get(f"{name}_config") or {}
    require(isinstance(of_tower, dict), f"{name}_config = {of_tower!r}", "an object")
    return cls(**_values(cls, of_tower))


def _values(cls, d):
    """The keys of `d` that are fields of `cls`. Raises UserError."""
    for key, allowed in IMPLEMENTED[cls].items():
        value = d.get(key, allowed[0])
        items = value if isinstance(value, list | tuple) else [value]
        is_implemented = all(item in allowed for item in items)
        require(is_implemented, f"{key} = {value!r}", " or ".join(map(repr, allowed)), NOT_IMPLEMENTED)
    values = {}
    for field in fields(cls):
        if field.name in d:
            value = d[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
        else:
            require(field.default is not MISSING, f"no key {field.name!r}", "it to be set")
    return values
