"""config.json of diffusers or transformers -> a network's settings, strictly."""

from collections.abc import Mapping

from torch import Tensor

from fairref.bundle.typed import Config, read_dataclass, read_values, shown
from fairref.errors import UserError
from fairref.files.names import check_count
from fairref.judges.dino import DinoConfig
from fairref.nets.clip import ACTIVATIONS, ClipConfig, ClipTextConfig, ClipVisionConfig
from fairref.nets.unet import UNetConfig
from fairref.nets.vae import VAEConfig

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
    ClipTextConfig: {**TOWER, "use_attention_mask": (None, False)},
    ClipVisionConfig: TOWER,
}
LAYERS: dict[type, Mapping[str, str]] = {  # setting that counts layers -> how tensors number them
    UNetConfig: {
        "block_out_channels": r"down_blocks\.(\d+)\.",
        "layers_per_block": r"down_blocks\.0\.resnets\.(\d+)\.",
    },
    VAEConfig: {
        "block_out_channels": r"encoder\.down_blocks\.(\d+)\.",
        "layers_per_block": r"encoder\.down_blocks\.0\.resnets\.(\d+)\.",
    },
    ClipTextConfig: {"num_hidden_layers": r"text_model\.encoder\.layers\.(\d+)\."},
    ClipVisionConfig: {"num_hidden_layers": r"vision_model\.encoder\.layers\.(\d+)\."},
    DinoConfig: {"depth": r"blocks\.(\d+)\."},
}
TOWERS = {"text": ClipTextConfig, "vision": ClipVisionConfig}  # of a CLIPModel


def read_config(cls: type[Config], d: Mapping[str, object], source: str = "config.json") -> Config:
    """Build the settings dataclass `cls`, a key of IMPLEMENTED or ClipConfig, from a config.json dict `d`.

    Keys of `d` that are fields of `cls` are taken, by the fields' types; a field without default is required. A value
    that is not implemented is refused. All other keys are ignored. `source` names the file. Raises UserError.
    """
    if not isinstance(d, dict):
        raise UserError(
            f"{source}: found a {type(d).__name__}, expected the object of a config.json; correct it."
        )
    if cls is ClipConfig:
        width = read_values({"projection_dim": int}, d, source)
        towers = {name: _tower(d, name, cls, source) for name, cls in TOWERS.items()}
        try:
            return ClipConfig(**towers, **width)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
    _refuse_others(d, IMPLEMENTED[cls], source)
    return read_dataclass(cls, d, source)


def check_counts(config: object, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise a UserError unless the tensors have as many layers as the settings say, before anything is built.

    `config`: settings of a class in LAYERS, or a ClipConfig; `source` names the tensors' file.
    """
    for name in TOWERS if isinstance(config, ClipConfig) else ():
        check_counts(getattr(config, name), tensors, source)
    for setting, pattern in LAYERS.get(type(config), {}).items():
        value = getattr(config, setting)
        check_count(tensors, pattern, len(value) if isinstance(value, tuple) else value, setting, source)


def _tower(d, name, cls, source):
    """A tower of a CLIPModel; the legacy key wins."""
    of_tower = d.get(f"{name}_config_dict") or d.get(f"{name}_config") or {}
    return read_config(cls, of_tower, f"{source}: {name}_config")


def _refuse_others(d, implemented, source):
    """Raise a UserError for a value that is not implemented; each item of a list counts by itself."""
    for key, allowed in implemented.items():
        value = d.get(key, allowed[0])
        for item in value if isinstance(value, list | tuple) and value else [value]:
            if not any(item == a and isinstance(item, bool) == isinstance(a, bool) for a in allowed):
                words = " or ".join(map(repr, allowed))
                raise UserError(
                    f"{source}: found {key} = {shown(value)}, expected {words}; {NOT_IMPLEMENTED}."
                )
