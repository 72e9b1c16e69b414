"""CLIP gives what transformers' CLIP gives: values, gradients, names, shapes."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from fairref.bundle.configs import read_config
from fairref.errors import UserError
from fairref.nets.clip import (
    Clip,
    ClipConfig,
    ClipImage,
    ClipText,
    ClipTextConfig,
    ClipVisionConfig,
    clip_pixels,
    end_positions,
)

TEXT = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "bos_token_id": 48,
    "eos_token_id": 49,
    "pad_token_id": 49,
}
VISION = {
    "hidden_size": 20,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "image_size": 30,
    "patch_size": 7,
}  # 30 is no multiple of 7: the last two pixels are not seen
CONFIGS = {
    "quick_gelu": {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16},
    "gelu": {
        "text_config": {**TEXT, "hidden_act": "gelu", "layer_norm_eps": 1e-3, "eos_token_id": 2},
        "vision_config": {**VISION, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
        "projection_dim": 16,
    },
}
VIT_L = {  # openai/clip-vit-large-patch14, whose text tower is SD-1.5's
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
}
VIT_H = {  # laion/CLIP-ViT-H-14-laion2B-s32B-b79K
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 16,
    "num_hidden_layers": 32,
    "patch_size": 14,
    "hidden_act": "gelu",
    "projection_dim": 1024,
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
ACTS = pytest.mark.parametrize("act", CONFIGS)


def relative(found, expected, floor=0.0):
    """|found - expected| / max(|expected|, floor) in the Euclidean norm."""
    return ((found - expected).norm() / expected.norm().clamp(min=floor)).item()


def shapes(net):
    """Name -> shape of everything in a state dict."""
    return {name: tensor.shape for name, tensor in net.state_dict().items()}


def prefixed(peer, prefix):
    """The state dict of a transformers model, `prefix` put before its tower's names if it isn't there."""
    tower = "embeddings.", "encoder.", "final_layer_norm.", "pre_layrnorm.", "post_layernorm."
    return {prefix + k if k.startswith(tower) else k: v for k, v in peer.state_dict().items()}


def build(cls, config, dtype):
    """A random transformers model; in float32 its attention is written out, which knows no other softmax."""
    torch.manual_seed(0)
    config._attn_implementation = "eager" if dtype == torch.float32 else "sdpa"
    peer = cls(config)
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(0.1 * torch.randn_like(p))  # moves the norms and the biases too
    return peer.eval().to(dtype)


def pair(act, dtype):
    """Our Clip and transformers' with the same random weights."""
    peer = build(CLIPModel, CLIPConfig(**CONFIGS[act]), dtype)
    ours = Clip(read_config(ClipConfig, CONFIGS[act]))
    ours.load_state_dict(peer.state_dict(), strict=True)
    return ours.to(dtype), peer


def token_ids():
    """Four texts of 12 tokens: one to three times EOS (49) at the end, in one also padded by other ids."""
    torch.manual_seed(1)
    ids = torch.randint(3, 48, (4, 12))
    ids[:, 0] = 48
    ids[0, 11] = 49
    ids[1, 9:] = 49
    ids[2, 4], ids[2, 5:] = 49, 0
    ids[3, 1:] = 49
    return ids


def check_gradients(ours_out, peer_out, ours_leaves, peer_leaves, tolerance):
    """Values, and gradients of a random projection of them to the leaves (name -> tensor)."""
    assert relative(ours_out, peer_out) <= tolerance
    g = torch.randn_like(peer_out)
    ours_grads = torch.autograd.grad(ours_out, [ours_leaves[name] for name in peer_leaves], g)
    peer_grads = torch.autograd.grad(peer_out, list(peer_leaves.values()), g)
    largest = max(p.norm() for p in peer_grads)
    for name, a, b in zip(peer_leaves, ours_grads, peer_grads, strict=True):
        is_zero = name.endswith("k_proj.bias")  # its gradient is zero but for rounding
        assert relative(a, b, floor=largest if is_zero else 0.0) <= tolerance, name


@ACTS
@DTYPES
def test_text_encoder_is_transformers(act, dtype):
    config = CLIPConfig(**CONFIGS[act]).text_config
    peer = build(CLIPTextModel, config, dtype)
    ours = ClipText(read_config(ClipTextConfig, config.to_dict()))
    ours.load_state_dict(prefixed(peer, "text_model."), strict=True)
    ours = ours.to(dtype)
    ids = token_ids()
    parameters = dict(zip(prefixed(peer, "text_model."), peer.parameters(), strict=True))
    expected = peer(input_ids=ids).last_hidden_state
    check_gradients(ours(ids), expected, dict(ours.named_parameters()), parameters, TOLERANCE[dtype])


@ACTS
@DTYPES
def test_text_encoding_is_transformers(act, dtype):
    ours, peer = pair(act, dtype)
    ids = token_ids()
    expected = F.normalize(peer.get_text_features(input_ids=ids).pooler_output, dim=-1)
    used = {n: p for n, p in peer.named_parameters() if n.startswith("text_")}
    check_gradients(ours.encode_text(ids), expected, dict(ours.named_parameters()), used, TOLERANCE[dtype])


@ACTS
@DTYPES
def test_image_encoding_is_transformers(act, dtype):
    ours, peer = pair(act, dtype)
    x = torch.rand(3, 3, 30, 30, dtype=dtype) * 2 - 1  # already of the tower's size
    x_ours, x_peer = x.clone().requires_grad_(), x.clone().requires_grad_()
    mean, std = (torch.tensor(v, dtype=dtype)[:, None, None] for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    features = peer.get_image_features(pixel_values=((x_peer + 1) / 2 - mean) / std).pooler_output
    expected = F.normalize(features, dim=-1)
    used = {n: p for n, p in peer.named_parameters() if n.startswith("vis")}
    check_gradients(
        ours.encode_image(x_ours),
        expected,
        {"x": x_ours, **dict(ours.named_parameters())},
        {"x": x_peer, **used},
        TOLERANCE[dtype],
    )
    assert torch.equal(x_ours, x)


def test_image_towers_alone():
    config = CLIPConfig(**CONFIGS["gelu"]).vision_config
    peer = build(CLIPVisionModelWithProjection, config, torch.float64)
    ours = ClipImage(read_config(ClipVisionConfig, config.to_dict()))
    ours.load_state_dict(peer.state_dict(), strict=True)
    ours = ours.double()
    x = torch.rand(2, 3, 41, 41).double() * 2 - 1
    pixels = clip_pixels(x, 30)
    expected = peer(pixel_values=pixels).image_embeds
    assert relative(ours.encode_image(x), F.normalize(expected, dim=-1)) <= 1e-12
    assert relative(ours.vision_model(pixels) @ peer.visual_projection.weight.T, expected) <= 1e-12


def test_token_embeddings_in_place_of_ids():
    ours = ClipText(read_config(ClipTextConfig, TEXT))
    ids = token_ids()
    embeddings = ours.embed(ids).detach().requires_grad_()
    found = ours(embeddings=embeddings)
    assert torch.equal(found, ours(ids))
    (gradient,) = torch.autograd.grad(found[:, 5], embeddings, torch.randn(4, 24))
    assert (gradient[:, :6].abs().sum(-1) > 0).all() and (gradient[:, 6:] == 0).all()  # causal


def test_short_texts_are_prefixes():
    ours = ClipText(read_config(ClipTextConfig, TEXT)).double()
    ids = token_ids()
    assert relative(ours(ids[:, :5]), ours(ids)[:, :5]) <= 1e-12


def test_end_of_text():
    ids = torch.tensor([[48, 7, 49, 49], [48, 49, 0, 0], [48, 9, 8, 49]])
    assert end_positions(ids, 49).tolist() == [2, 1, 3]
    assert end_positions(ids, 2).tolist() == [2, 1, 3]
    added = torch.tensor([[48, 60, 49, 49]])  # a token added after EOS
    assert end_positions(added, 49).tolist() == [2]
    assert end_positions(added, 2).tolist() == [1]


@pytest.mark.parametrize("size", [96, 31, 16])
def test_resize_is_pillows(size):
    torch.manual_seed(0)
    x = torch.rand(1, 3, size, size) * 2 - 1
    found = clip_pixels(x, 30)[0]
    for channel in range(3):
        image = Image.fromarray(((x[0, channel] + 1) / 2).numpy(), mode="F").resize((30, 30), Image.BICUBIC)
        expected = (torch.from_numpy(np.array(image)) - OPENAI_CLIP_MEAN[channel]) / OPENAI_CLIP_STD[channel]
        torch.testing.assert_close(found[channel], expected, rtol=0, atol=1e-5)


def test_channels_last_changes_nothing():
    ours, _ = pair("gelu", torch.float64)
    x = torch.rand(2, 3, 48, 48).double() * 2 - 1
    expected = ours.encode_image(x)
    ours = ours.to(memory_format=torch.channels_last)
    assert relative(ours.encode_image(x.contiguous(memory_format=torch.channels_last)), expected) <= 1e-12


def test_vit_l_has_transformers_names_and_shapes():
    with torch.device("meta"):
        ours, peer = Clip(read_config(ClipConfig, VIT_L)), CLIPModel(CLIPConfig(**VIT_L))
        text = ClipText(read_config(ClipTextConfig, VIT_L["text_config"]))
    assert shapes(ours) == shapes(peer)
    assert sum(p.numel() for p in ours.parameters()) == 427_616_513
    assert sum(p.numel() for p in text.parameters()) == 123_060_480


@ACTS
@pytest.mark.parametrize("use_diff", [True, False])
def test_what_transformers_saves_is_read(act, use_diff):
    saved = json.loads(CLIPConfig(**CONFIGS[act]).to_json_string(use_diff=use_diff))
    assert read_config(ClipConfig, saved) == read_config(ClipConfig, CONFIGS[act])


def test_the_legacy_key_wins():
    config = read_config(
        ClipConfig, {**CONFIGS["gelu"], "text_config_dict": TEXT, "vision_config_dict": None}
    )
    assert config.text.hidden_act == "quick_gelu" and config.vision.hidden_act == "gelu"


@pytest.mark.parametrize(
    ("cls", "key", "value"),
    [
        (ClipTextConfig, "hidden_act", "gelu_new"),
        (ClipTextConfig, "attention_dropout", 0.1),
        (ClipTextConfig, "hidden_size", 30),
        (ClipTextConfig, "eos_token_id", [1, 2]),
        (ClipTextConfig, "vocab_size", -1),
        (ClipTextConfig, "layer_norm_eps", None),
        (ClipVisionConfig, "hidden_act", "relu"),
        (ClipVisionConfig, "image_size", [224, 224]),
        (ClipVisionConfig, "image_size", 8),
        (ClipConfig, "projection_dim", None),
    ],
)
def test_what_is_not_implemented_is_refused(cls, key, value):
    with pytest.raises(UserError, match=key):
        read_config(cls, {key: value})


@pytest.mark.slow
def test_vit_l_size_is_transformers():
    torch.manual_seed(0)
    peer = CLIPModel(CLIPConfig(**VIT_L)).eval()
    ours = Clip(read_config(ClipConfig, VIT_L))
    ours.load_state_dict(peer.state_dict(), strict=True)
    ids = torch.randint(0, 49406, (2, 77))
    ids[0, 20:], ids[1, 76] = 49407, 49407
    x = torch.rand(2, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        text = F.normalize(peer.get_text_features(input_ids=ids).pooler_output, dim=-1)
        image = F.normalize(peer.get_image_features(pixel_values=clip_pixels(x, 224)).pooler_output, dim=-1)
        assert relative(ours.encode_text(ids), text) <= 1e-5
        assert relative(ours.encode_image(x), image) <= 1e-5


@pytest.mark.slow
def test_vit_h_size_is_transformers():
    torch.manual_seed(0)
    peer = CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT_H)).eval()
    ours = ClipImage(read_config(ClipVisionConfig, VIT_H))
    ours.load_state_dict(peer.state_dict(), strict=True)
    assert sum(p.numel() for p in ours.parameters()) == 632_076_800
    x = torch.rand(1, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        image = F.normalize(peer(pixel_values=clip_pixels(x, 224)).image_embeds, dim=-1)
        assert relative(ours.encode_image(x), image) <= 1e-5
