"""DINOv2 against transformers' Dinov2Model: values and gradients, and the position grid of the released models."""

import numpy as np
import pytest
import torch
from PIL import Image

from fairref.errors import UserError
from fairref.judges import IMAGENET_MEAN, IMAGENET_STD
from fairref.judges.dino import Dino, DinoConfig

transformers = pytest.importorskip("transformers")
SMALL = {"width": 48, "depth": 3, "heads": 4, "patch": 4, "trained_size": 36, "input_size": 24}


def renamed(state):
    """transformers' state dict under facebookresearch's names."""
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": "mask_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "encoder.layer.": "blocks.",
        "attention.o_proj": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "layernorm": "norm",
    }
    out = {}
    for key, value in state.items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        out[key] = value
    for key in [k for k in out if ".attention.q_proj." in k]:
        parts = [out.pop(key.replace("q_proj", name)) for name in ("q_proj", "k_proj", "v_proj")]
        out[key.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return out


def pair(dtype=torch.float64, **options):
    """Our encoder and transformers' with the same random weights."""
    d = {**SMALL, "offset": 0.0, **options}
    torch.manual_seed(0)
    peer = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=d["width"],
            num_hidden_layers=d["depth"],
            num_attention_heads=d["heads"],
            patch_size=d["patch"],
            image_size=d["trained_size"],
        )
    )
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = Dino(DinoConfig(**d))
    ours.load_state_dict(renamed(peer.state_dict()), strict=True)
    return ours.to(dtype).eval(), peer.to(dtype).eval()


@pytest.mark.parametrize("size", [(36, 36), (24, 24), (20, 32)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_values_and_gradients_are_those_of_transformers(size, dtype, tolerance):
    # both interpolate the positions in float32, so float64 agrees to that only where they are interpolated
    tolerance = 1e-12 if size == (36, 36) and dtype == torch.float64 else tolerance
    ours, peer = pair(dtype)
    x = torch.randn(2, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = ours.tokens(a), peer(b).last_hidden_state
    assert float((found - expected).detach().norm() / expected.detach().norm()) <= tolerance
    g = torch.randn(found.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    da, dw = torch.autograd.grad(found, [a, ours.blocks[0].mlp.fc1.weight], g)
    db, dv = torch.autograd.grad(expected, [b, peer.encoder.layer[0].mlp.fc1.weight], g)
    for mine, theirs in ((da, db), (dw, dv)):
        assert float((mine - theirs).norm() / theirs.norm()) <= 10 * tolerance


@pytest.mark.slow
def test_vit_b_14_is_transformers():
    ours, peer = pair(torch.float32, **{name: getattr(DinoConfig(), name) for name in SMALL})
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = ours.tokens(x), peer(x).last_hidden_state
    assert float((found - expected).norm() / expected.norm()) <= 1e-5


def test_pictures_are_resized_and_normalised():
    """Against Pillow's bicubic filter, which takes all pixels into account."""
    ours, _ = pair()
    x = torch.rand(2, 3, 50, 50, dtype=torch.float64) * 2 - 1
    for image, found in zip(x, ours.preprocess(x), strict=True):
        for c in range(3):
            resized = Image.fromarray(image[c].float().numpy()).resize((24, 24), Image.Resampling.BICUBIC)
            expected = ((torch.from_numpy(np.array(resized)) + 1) / 2 - IMAGENET_MEAN[c]) / IMAGENET_STD[c]
            torch.testing.assert_close(found[c], expected.double(), rtol=0, atol=1e-5)
    features = ours(x)
    assert features.shape == (2, 48) and torch.equal(features, ours.tokens(ours.preprocess(x))[:, 0])


def test_the_positions_of_the_released_models():
    """Patch r of n lies at (r + 1/2) 9 / (n + 0.1) - 1/2 of the trained grid, by cubic convolution."""
    torch.manual_seed(0)
    ours = Dino(DinoConfig(**SMALL)).double()
    ours.pos_embed.data = torch.randn_like(ours.pos_embed)
    side, n = 9, 6
    found = ours.positions(n, n)
    assert torch.equal(found[:, 0], ours.pos_embed[:, 0])

    def cubic(distance, a=-0.75):
        d = abs(distance)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    weights = torch.zeros(n, side, dtype=torch.float64)
    for r in range(n):
        place = (r + 0.5) * side / (n + 0.1) - 0.5
        for at in range(int(place // 1) - 1, int(place // 1) + 3):
            weights[r, min(max(at, 0), side - 1)] += cubic(place - at)
    grid = ours.pos_embed[0, 1:].view(side, side, -1)
    expected = torch.einsum("ri,cj,ijd->rcd", weights, weights, grid).flatten(0, 1)
    torch.testing.assert_close(found[0, 1:], expected, rtol=1e-5, atol=1e-5)


def test_vit_b_14_has_the_released_shapes():
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in Dino(DinoConfig()).state_dict().items()}
    assert shapes["pos_embed"] == (1, 1370, 768) and shapes["patch_embed.proj.weight"] == (768, 3, 14, 14)
    assert shapes["blocks.11.attn.qkv.weight"] == (2304, 768) and shapes["blocks.0.ls1.gamma"] == (768,)
    assert shapes["mask_token"] == (1, 768) and len(shapes) == 3 + 2 + 2 + 12 * 14
    parameters = sum(torch.Size(s).numel() for s in shapes.values())
    assert parameters == 86_580_480  # of dinov2_vitb14


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="expected each to divide"):
        DinoConfig(input_size=223)
    with pytest.raises(UserError, match="offset is 'x'; expected a number"):
        DinoConfig(offset="x")
    for wrong in ({"heads": 0}, {"patch": 0}, {"width": "12"}, {"depth": 1.5}, {"mlp_ratio": True}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} is .*; expected a whole number from 1 up"):
            DinoConfig(**wrong)
