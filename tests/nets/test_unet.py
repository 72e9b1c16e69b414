"""The U-Net gives what diffusers' UNet2DConditionModel gives: values, gradients, names, shapes."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from fairref.bundle.configs import read_config
from fairref.errors import UserError
from fairref.nets.unet import (
    SD15,
    Conv3x3,
    Level,
    UNet,
    UNetConfig,
    channel_table,
    time_features,
)

SD15_JSON = {  # unet/config.json of SD-1.5
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
FOUR_LEVELS = {
    **SD15_JSON,
    "block_out_channels": [16, 24, 32, 32],
    "norm_num_groups": 4,
    "cross_attention_dim": 20,
    "attention_head_dim": 4,
}
THREE_LEVELS = {
    **FOUR_LEVELS,
    "block_out_channels": [8, 16, 24],
    "attention_head_dim": [2, 4, 3],
    "norm_eps": 1e-4,
    "layers_per_block": 1,
    "use_linear_projection": True,
    "in_channels": 3,
    "out_channels": 5,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
}
BOTH = pytest.mark.parametrize("d", [FOUR_LEVELS, THREE_LEVELS], ids=["four", "three"])
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def relative(found, expected):
    """|found - expected| / |expected| in the Euclidean norm."""
    return ((found - expected).norm() / expected.norm()).item()


def shapes(net):
    """Name -> shape of everything in a state dict."""
    return {name: tensor.shape for name, tensor in net.state_dict().items()}


def build_peer(d):
    """diffusers' U-Net from a config.json dict."""
    return UNet2DConditionModel(**{key: value for key, value in d.items() if not key.startswith("_")})


def pair(d, dtype):
    """Our U-Net and diffusers' (attention written out) with the same weights, all of them random."""
    torch.manual_seed(0)
    peer = build_peer(d)
    peer.set_attn_processor(AttnProcessor())
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = UNet(read_config(UNetConfig, d))
    ours.load_state_dict(peer.state_dict(), strict=True)
    return ours.to(dtype), peer.to(dtype)


def inputs(d, dtype, height=16, width=8):
    """Random z, two times, and random text embeddings of five tokens."""
    return (
        torch.randn(2, d["in_channels"], height, width, dtype=dtype),
        torch.tensor([999, 37]),
        torch.randn(2, 5, d["cross_attention_dim"], dtype=dtype),
    )


@BOTH
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_and_gradients_are_diffusers(d, dtype):
    ours, peer = pair(d, dtype)
    z, t, c = inputs(d, dtype)
    g = torch.randn(2, d["out_channels"], *z.shape[2:], dtype=dtype)
    names = [name for name, _ in ours.named_parameters()]
    results = []
    for net in (ours, peer):
        leaves = z.clone().requires_grad_(), c.clone().requires_grad_()
        eps = net(leaves[0], t, leaves[1])
        eps = eps if net is ours else eps.sample
        parameters = dict(net.named_parameters())
        results.append([eps, *torch.autograd.grad(eps, [*leaves, *(parameters[name] for name in names)], g)])
        assert torch.equal(leaves[0], z) and torch.equal(leaves[1], c)
    for name, a, b in zip(["eps", "z", "c", *names], *results, strict=True):
        assert relative(a, b) <= TOLERANCE[dtype], name


@BOTH
def test_odd_latent_sizes_are_diffusers(d):
    ours, peer = pair(d, torch.float64)
    z, t, c = inputs(d, torch.float64, height=13, width=10)
    assert relative(ours(z, t, c), peer(z, t, c).sample) <= 1e-12


def test_time_is_a_number_or_a_scalar_or_one_per_latent():
    ours, _ = pair(THREE_LEVELS, torch.float64)
    z, _, c = inputs(THREE_LEVELS, torch.float64)
    expected = ours(z, torch.tensor([500, 500]), c)
    for t in (500, 500.0, torch.tensor(500), torch.tensor([500]), torch.tensor([500.0, 500.0])):
        assert torch.equal(ours(z, t, c), expected)
    apart = [ours(z[i : i + 1], t, c[i : i + 1]) for i, t in enumerate((3, 998))]
    assert relative(ours(z, torch.tensor([3, 998]), c), torch.cat(apart)) <= 1e-12


def test_time_features_are_cosines_then_sines():
    found = time_features(torch.tensor([7]), 4)[0].double()
    angle = torch.tensor([7.0, 7.0 / 100.0], dtype=torch.float64)  # 10000^(-2/4) = 1/100
    torch.testing.assert_close(found, torch.cat([angle.cos(), angle.sin()]), rtol=0, atol=1e-6)


@BOTH
def test_channels_last_changes_nothing(d):
    ours, _ = pair(d, torch.float64)
    z, t, c = inputs(d, torch.float64)
    expected = ours(z, t, c)
    ours = ours.to(memory_format=torch.channels_last)
    for z_in in (z, z.contiguous(memory_format=torch.channels_last)):
        assert relative(ours(z_in, t, c), expected) <= 1e-12


def test_vector_jacobian_product_agrees_with_finite_differences():
    ours, _ = pair(THREE_LEVELS, torch.float64)
    z, t, c = inputs(THREE_LEVELS, torch.float64)
    g, dz, dc = torch.randn(2, 5, 16, 8).double(), torch.randn_like(z), torch.randn_like(c)
    z_leaf, c_leaf = z.clone().requires_grad_(), c.clone().requires_grad_()
    vz, vc = torch.autograd.grad(ours(z_leaf, t, c_leaf), (z_leaf, c_leaf), g)
    h = 1e-5
    with torch.no_grad():
        slope = ((ours(z + h * dz, t, c + h * dc) - ours(z - h * dz, t, c - h * dc)) * g).sum() / (2 * h)
    assert relative((vz * dz).sum() + (vc * dc).sum(), slope) <= 1e-7


def test_sd15_channels_per_level():
    assert channel_table(SD15) == (
        Level(320, (320, 320), ((640, 320), (320, 320), (320, 320)), 8, True, True),
        Level(640, (320, 640), ((1280, 640), (640, 640), (640, 320)), 8, True, True),
        Level(1280, (640, 1280), ((1280, 1280), (1280, 1280), (1280, 640)), 8, True, True),
        Level(1280, (1280, 1280), ((1280, 1280), (1280, 1280), (1280, 1280)), 8, False, False),
    )
    assert read_config(UNetConfig, SD15_JSON) == SD15


def test_sd15_has_diffusers_names_and_shapes():
    with torch.device("meta"):
        ours = UNet(SD15)
        peer = build_peer(SD15_JSON)
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964
    assert shapes(ours) == shapes(peer)


@BOTH
def test_what_diffusers_saves_is_read(d):
    ours, peer = pair(d, torch.float32)
    assert read_config(UNetConfig, dict(peer.config)) == ours.config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "gelu"),
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 10),
        ("addition_embed_type", "text"),
        ("down_block_types", ["AttnDownBlock2D"] * 4),
        ("up_block_types", ["SimpleCrossAttnUpBlock2D"] * 4),
        ("mid_block_type", "UNetMidBlock2D"),
        ("flip_sin_to_cos", False),
        ("freq_shift", 1),
        ("time_embedding_type", "fourier"),
        ("resnet_time_scale_shift", "scale_shift"),
        ("transformer_layers_per_block", [1, 2, 10, 10]),
        ("only_cross_attention", True),
        ("num_attention_heads", 8),
        ("conv_in_kernel", 1),
        ("encoder_hid_dim", 4096),
        ("layers_per_block", [2, 2, 2, 2]),
        ("cross_attention_dim", None),
        ("block_out_channels", [320]),
        ("up_block_types", ["UpBlock2D"] * 3),
        ("attention_head_dim", [8, 8, 8]),
        ("attention_head_dim", 0),
        ("norm_num_groups", 7),
        ("norm_eps", -1e-5),
    ],
)
def test_what_is_not_implemented_is_refused(key, value):
    with pytest.raises(UserError, match=key):
        read_config(UNetConfig, {**SD15_JSON, key: value})


@pytest.mark.slow
def test_sd15_size_is_diffusers():
    with torch.device("meta"):
        ours = UNet(SD15)
    torch.manual_seed(0)
    peer = build_peer(SD15_JSON)
    ours.load_state_dict(peer.state_dict(), strict=True, assign=True)  # both nets on one copy of the weights
    results = []
    for net in (ours, peer):
        net.requires_grad_(False)
        torch.manual_seed(1)
        z, c = torch.randn(1, 4, 32, 32, requires_grad=True), torch.randn(1, 77, 768, requires_grad=True)
        eps = net(z, torch.tensor([501]), c)
        eps = eps if net is ours else eps.sample
        results.append([eps.detach(), *torch.autograd.grad(eps, (z, c), torch.randn(1, 4, 32, 32))])
    for a, b in zip(*results, strict=True):
        assert relative(a, b) <= 1e-5


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("B, h, w, whole", [(1, 1, 1, True), (2, 3, 4, True), (1, 5, 5, False)])
def test_a_convolution_of_few_pixels_is_one_matrix_product(monkeypatch, memory_format, B, h, w, whole):
    torch.manual_seed(0)
    conv = Conv3x3(5, 96).double().to(memory_format=memory_format)
    assert (4 * B * h * w <= 96) == whole
    x, g = torch.randn(B, 5, h, w, dtype=torch.float64), torch.randn(B, 96, h, w, dtype=torch.float64)

    def outcome(function):
        inputs = [x.clone().requires_grad_(), *conv.parameters()]
        y = function(inputs[0])
        return [y, *torch.autograd.grad((y * g).sum(), inputs)]

    for ours, plain in zip(
        outcome(conv), outcome(lambda x: F.conv2d(x, conv.weight, conv.bias, padding=1)), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    calls = []
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: calls.append(x))
    conv(x)
    assert len(calls) == (not whole)
