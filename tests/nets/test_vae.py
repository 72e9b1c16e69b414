"""The autoencoder gives what diffusers' AutoencoderKL gives: values, gradients, names, shapes."""

import dataclasses

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor

from fairref.bundle.configs import read_config
from fairref.errors import UserError
from fairref.nets.vae import VAE, VAEConfig

SD15 = {  # vae/config.json of SD-1.5
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
FOUR_LEVELS = {**SD15, "block_out_channels": [8, 16, 32, 24], "norm_num_groups": 4}
THREE_LEVELS = {
    **SD15,
    "block_out_channels": [8, 12, 16],
    "norm_num_groups": 2,
    "layers_per_block": 1,
    "latent_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def relative(found, expected, floor=0.0):
    """|found - expected| / max(|expected|, floor) in the Euclidean norm."""
    return ((found - expected).norm() / expected.norm().clamp(min=floor)).item()


def shapes(net):
    """Name -> shape of everything in a state dict."""
    return {name: tensor.shape for name, tensor in net.state_dict().items()}


def build_peer(d):
    """diffusers' autoencoder from a config.json dict."""
    return AutoencoderKL(**{key: value for key, value in d.items() if not key.startswith("_")})


def pair(d, dtype):
    """Our VAE and diffusers' with the same random weights, norms and biases included.

    In float32 the peer's attention is written out; that form takes its softmax in float32 whatever the dtype.
    """
    torch.manual_seed(0)
    peer = build_peer(d)
    if dtype == torch.float32:
        peer.set_attn_processor(AttnProcessor())
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = VAE(read_config(VAEConfig, d))
    ours.load_state_dict(peer.state_dict(), strict=True)
    return ours.to(dtype), peer.to(dtype)


def check_parity(ours, peer, ours_out, peer_out, ours_in, peer_in, parameters, tolerance):
    """Values, and gradients of a random projection of them to the input and to the `parameters` by name."""
    assert relative(ours_out, peer_out) <= tolerance
    g = torch.randn_like(ours_out)
    ours_named, peer_named = dict(ours.named_parameters()), dict(peer.named_parameters())
    ours_grads = torch.autograd.grad(ours_out, [ours_in, *(ours_named[n] for n in parameters)], g)
    peer_grads = torch.autograd.grad(peer_out, [peer_in, *(peer_named[n] for n in parameters)], g)
    largest, size = (
        max(p.norm() for p in peer_grads),
        dict(zip(["input", *parameters], map(torch.norm, peer_grads), strict=True)),
    )
    for name, a, b in zip(["input", *parameters], ours_grads, peer_grads, strict=True):
        floor = 0.0
        if name.endswith("to_k.bias"):  # its gradient is zero but for rounding
            floor = largest
        elif name.endswith("conv1.bias") and b.dtype == torch.float32:
            # GroupNorm takes most of this bias away again, so its gradient is a small difference of large sums over
            # all pixels, those that make up the gradient of its weight; float64 holds it to its own size
            floor = size[name.replace("bias", "weight")]
        assert relative(a, b, floor) <= tolerance, name


@pytest.mark.parametrize("d", [FOUR_LEVELS, THREE_LEVELS], ids=["four", "three"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_encoder_is_diffusers(d, dtype):
    ours, peer = pair(d, dtype)
    x = torch.randn(2, 3, 32, 48, dtype=dtype)
    x_ours, x_peer = x.clone().requires_grad_(), x.clone().requires_grad_()
    posterior = peer.encode(x_peer).latent_dist
    names = [n for n, _ in ours.named_parameters() if n.startswith(("encoder.", "quant_conv."))]
    check_parity(
        ours,
        peer,
        torch.cat(ours.moments(x_ours)),
        torch.cat([posterior.mean, posterior.logvar]),
        x_ours,
        x_peer,
        names,
        TOLERANCE[dtype],
    )
    assert torch.equal(x_ours, x)


@pytest.mark.parametrize("d", [FOUR_LEVELS, THREE_LEVELS], ids=["four", "three"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_decoder_is_diffusers(d, dtype):
    ours, peer = pair(d, dtype)
    z = torch.randn(2, d["latent_channels"], 4, 6, dtype=dtype)
    z_ours, z_peer = z.clone().requires_grad_(), z.clone().requires_grad_()
    names = [n for n, _ in ours.named_parameters() if n.startswith(("decoder.", "post_quant_conv."))]
    image = peer.decode(z_peer / peer.config.scaling_factor).sample
    check_parity(ours, peer, ours.decode(z_ours), image, z_ours, z_peer, names, TOLERANCE[dtype])
    assert torch.equal(z_ours, z)


def test_latents_are_scaled_by_the_config_and_logvar_is_clamped():
    ours, _ = pair({**FOUR_LEVELS, "scaling_factor": 0.5}, torch.float32)
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), 0.5 * ours.moments(x)[0], rtol=0, atol=0)
        ours.quant_conv.bias += torch.tensor([0.0] * 4 + [-100.0, -100.0, 100.0, 100.0])
        _, logvar = ours.moments(x)
    assert (logvar[:, :2] == -30).all() and (logvar[:, 2:] == 20).all()


def test_channels_last_changes_nothing():
    ours, _ = pair(FOUR_LEVELS, torch.float64)
    x, z = torch.randn(2, 3, 32, 32).double(), torch.randn(2, 4, 4, 4).double()
    expected = ours.encode(x), ours.decode(z)
    ours = ours.to(memory_format=torch.channels_last)
    found = (
        ours.encode(x.contiguous(memory_format=torch.channels_last)),
        ours.decode(z.contiguous(memory_format=torch.channels_last)),
    )
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) <= 1e-12


def test_sd15_has_diffusers_names_and_shapes():
    with torch.device("meta"):
        ours = VAE(read_config(VAEConfig, SD15))
        peer = build_peer(SD15)
    assert shapes(ours) == shapes(peer)
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863
    assert ours.config == VAEConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2)


def test_what_diffusers_saves_is_read():
    ours, peer = pair(THREE_LEVELS, torch.float32)
    assert read_config(VAEConfig, dict(peer.config)) == ours.config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "relu"),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        ("shift_factor", 0.1),
        ("use_quant_conv", False),
        ("mid_block_add_attention", False),
        ("latents_mean", [0.0] * 4),
        ("block_out_channels", [128, 250, 512, 512]),
        ("block_out_channels", 128),
        ("layers_per_block", "2"),
        ("scaling_factor", None),
        ("norm_num_groups", 0),
    ],
)
def test_what_is_not_implemented_is_refused(key, value):
    with pytest.raises(UserError, match=key):
        read_config(VAEConfig, {**SD15, key: value})


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match=r"some/file.*block_out_channels"):
        read_config(VAEConfig, {k: v for k, v in SD15.items() if k != "block_out_channels"}, "some/file")
    with pytest.raises(UserError, match="list"):
        read_config(VAEConfig, [])


def test_the_file_of_a_wrong_value_is_named():
    with pytest.raises(
        UserError, match=r"^some/file: found norm_num_groups = 0, expected a positive whole number;"
    ):
        read_config(VAEConfig, {**SD15, "norm_num_groups": 0}, "some/file")


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_config(VAEConfig, SD15).scaling_factor = 1.0


@pytest.mark.slow
def test_sd15_size_is_diffusers():
    ours, peer = pair(SD15, torch.float32)
    x = torch.rand(1, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        assert relative(ours.moments(x)[0], peer.encode(x).latent_dist.mean) <= 1e-5
        z = torch.randn(1, 4, 16, 16)
        assert relative(ours.decode(z), peer.decode(z / 0.18215).sample) <= 1e-5
