"""CLIP: the text tower that conditions the U-Net, the image tower, and both together.

Parameter names are those of transformers' CLIPTextModel, CLIPVisionModelWithProjection and CLIPModel, with
the `text_model.` and `vision_model.` prefixes. B batch, T tokens, D width, P width of the shared space.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairref.errors import require, require_numbers
from fairref.nets import Linear, attention

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1], the same for every CLIP
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
LEGACY_EOS = 2  # configs before transformers 4.31 say 2 and mean "the largest id of the sequence"
INIT_STD = 0.02  # of embeddings that are trained from scratch

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": lambda x: F.gelu(x, approximate="none"),
}


@dataclass(frozen=True)
class TowerConfig:
    """Shape of the transformer in either tower, with the names of transformers' config.json."""

    hidden_size: int  # D
    intermediate_size: int  # width of the MLP
    num_attention_heads: int  # heads of each layer
    num_hidden_layers: int = 12  # transformer layers
    hidden_act: str = "quick_gelu"  # activation of the MLP, quick_gelu or gelu
    layer_norm_eps: float = 1e-5  # eps of every LayerNorm

    def __post_init__(self):
        require_numbers(self)
        width, heads, act = self.hidden_size, self.num_attention_heads, self.hidden_act
        require(width % heads == 0, f"hidden_size = {width}", f"a multiple of num_attention_heads = {heads}")
        require(act in ACTIVATIONS, f"hidden_act = {act!r}", " or ".join(ACTIVATIONS))


@dataclass(frozen=True)
class ClipTextConfig(TowerConfig):
    """Shape of the text tower, with transformers' defaults."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    vocab_size: int = 49408  # rows of the token embedding
    max_position_embeddings: int = 77  # longest T
    eos_token_id: int = 49407  # where the text is pooled; 2 means the largest id


@dataclass(frozen=True)
class ClipVisionConfig(TowerConfig):
    """Shape of the image tower, with transformers' defaults."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    projection_dim: int = 512  # P
    num_channels: int = 3  # of the picture
    image_size: int = 224  # height and width of the picture in pixels
    patch_size: int = 32  # height and width of a patch in pixels

    def __post_init__(self):
        super().__post_init__()
        size, patch = self.image_size, self.patch_size
        require(size >= patch, f"image_size = {size}", f"at least patch_size = {patch}")


@dataclass(frozen=True)
class ClipConfig:
    """Shape of both towers and of the space they share."""

    text: ClipTextConfig  # the text tower
    vision: ClipVisionConfig  # the image tower
    projection_dim: int = 512  # P, which overrides the towers' own
    logit_scale_init_value: float = 2.6592  # log of the first inverse temperature, ln(1 / 0.07)

    def __post_init__(self):
        require_numbers(self)


class Attention(nn.Module):
    """x (B, T, D) -> (B, T, D): softmax(Q K^T / sqrt(D/heads)) V and a linear layer, causal for text."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, self.causal)  # (B, T, D)
        return self.out_proj(h)


class MLP(nn.Module):
    """x (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """One pre-norm transformer layer, x (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TowerConfig, causal: bool):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config.hidden_size, config.num_attention_heads, causal)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """A stack of layers, x (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TowerConfig, causal: bool):
        super().__init__()
        self.layers = nn.Sequential(*(Layer(config, causal) for _ in range(config.num_hidden_layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TextEmbeddings(nn.Module):
    """The token and the position table."""

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        nn.init.normal_(self.token_embedding.weight, std=INIT_STD)
        nn.init.normal_(self.position_embedding.weight, std=INIT_STD)


class TextTower(nn.Module):
    """Token embeddings (B, T, D) -> hidden states (B, T, D) after the final LayerNorm, causal."""

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, embeddings: Tensor) -> Tensor:
        positions = self.embeddings.position_embedding.weight[: embeddings.shape[1]]  # (T, D)
        return self.final_layer_norm(self.encoder(embeddings + positions))


class VisionEmbeddings(nn.Module):
    """Normalised pixels (B, 3, H, W) -> (B, 1 + patches, D): class token first, positions added."""

    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(1 + (config.image_size // patch) ** 2, width)
        nn.init.normal_(self.class_embedding, std=INIT_STD)
        nn.init.normal_(self.position_embedding.weight, std=INIT_STD)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, hw, D)
        first = self.class_embedding.expand(len(pixels), 1, -1)  # (B, 1, D)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionTower(nn.Module):
    """Normalised pixels (B, 3, H, W) -> the class token's last state after LayerNorm, (B, D)."""

    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # spelt so
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        h = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.post_layernorm(h[:, 0])


class ClipText(nn.Module):
    """The text encoder of Stable Diffusion."""

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTower(config)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> token embeddings (B, T, D), without positions: where a soft prompt is put in."""
        return self.text_model.embeddings.token_embedding(ids)

    def forward(self, ids: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        """ids (B, T), or token embeddings (B, T, D) in their place -> hidden states (B, T, D), T up to 77."""
        return self.text_model(self.embed(ids) if embeddings is None else embeddings)


def clip_pixels(x: Tensor, size: int) -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> (B, 3, size, size) as CLIP's image tower expects: bicubic, normalised."""
    x = F.interpolate((x + 1) / 2, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return (x - x.new_tensor(PIXEL_MEAN)[:, None, None]) / x.new_tensor(PIXEL_STD)[:, None, None]


class ClipImage(nn.Module):
    """The image tower with its projection, as transformers' CLIPVisionModelWithProjection."""

    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        self.vision_config = config
        self.vision_model = VisionTower(config)
        self.visual_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    def encode_image(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> (B, P) of unit norm, differentiable."""
        pixels = clip_pixels(x, self.vision_config.image_size).to(self.visual_projection.weight.dtype)
        pooled = self.vision_model(pixels)
        return F.normalize(self.visual_projection(pooled), dim=-1)


class Clip(ClipImage):
    """Both towers, as transformers' CLIPModel; an image and a text are as similar as their dot product."""

    def __init__(self, config: ClipConfig):
        super().__init__(replace(config.vision, projection_dim=config.projection_dim))
        self.config = config
        self.text_model = TextTower(config.text)
        self.text_projection = Linear(config.text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, P) of unit norm, read at each text's end (`end_positions`)."""
        h = self.text_model(self.text_model.embeddings.token_embedding(ids))  # (B, T, D)
        ends = end_positions(ids, self.config.text.eos_token_id)  # (B,)
        pooled = h[torch.arange(len(ids), device=ids.device), ends]  # (B, D)
        return F.normalize(self.text_projection(pooled), dim=-1)


def end_positions(ids: Tensor, eos: int) -> Tensor:
    """ids (B, T) -> (B,): index of the first `eos`, or of the first largest id if `eos` is LEGACY_EOS."""
    is_end = ids == (ids.amax(dim=1, keepdim=True) if eos == LEGACY_EOS else eos)
    return is_end.int().argmax(dim=1)
