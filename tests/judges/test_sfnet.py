"""SFNet against opensphere's own values (tests/golden)."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from make_mobilenet import formula_weights, uniform
from make_sfnet import EVERY, SHAPE
from safetensors import safe_open
from safetensors.torch import load_file

from fairref.errors import UserError
from fairref.judges.sfnet import SFNet, SFNetConfig, config_of, embed_faces

GOLDEN = Path(__file__).parents[1] / "golden" / "sfnet.safetensors"
NARROW = (4, 6, 8, 10)


def network(older, depth=20):
    torch.manual_seed(0)
    net = SFNet(SFNetConfig(depth, NARROW, 12, 112, older, "conv" if older else "conv1")).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else (2 / p[0].numel()) ** 0.5))
    return net


@pytest.mark.parametrize(
    ("version", "before", "told"),
    [
        ("sfnet", False, False),
        ("deprecated", True, True),
        ("deprecated, renamed", True, None),
        pytest.param("deprecated, full", True, True, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_opensphere_s(version, before, told):
    golden = load_file(GOLDEN)
    with safe_open(GOLDEN, "pt") as file:
        shapes = json.loads(file.metadata()[version])
    tensors = {key: torch.from_numpy(value) for key, value in formula_weights(shapes).items()}
    config = config_of(tensors, relu_before_sum=told)
    assert config.relu_before_sum == before
    net = SFNet(config).double()
    net.load_state_dict(tensors, strict=True)
    x = torch.from_numpy(uniform("x", SHAPE)).double().requires_grad_()
    features = net(x)
    torch.testing.assert_close(features, golden[f"{version}.features"], rtol=1e-10, atol=1e-10)
    (features * torch.from_numpy(uniform("g", tuple(features.shape)))).sum().backward()
    found, expected = x.grad[:, :, ::EVERY, ::EVERY], golden[f"{version}.gradient"]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_checkpoint_that_could_be_of_either_kind_is_not_guessed():
    with pytest.raises(
        UserError, match=r'Write \{"relu_before_sum": true\} into config\.json for sfnet20_deprecated'
    ):
        config_of(network(False).state_dict())
    assert config_of(network(False, depth=4).state_dict()).depth == 4  # without blocks both are the same


def test_the_generations_differ():
    new, old = network(False), network(True)
    x = torch.rand(1, 3, 112, 112, dtype=torch.float64)
    assert not torch.allclose(new(x), old(x))


def test_an_embedding_is_of_unit_length_and_the_same_for_the_mirror_image():
    net, x = network(False), torch.rand(3, 3, 112, 112, dtype=torch.float64) * 2 - 1
    e = embed_faces(net, x)
    torch.testing.assert_close(e.norm(dim=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(embed_faces(net, x.flip(3)), e)
    mean = (net(x) + net(x.flip(3))) / 2
    torch.testing.assert_close(F.cosine_similarity(e, mean, dim=1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("depth", [4, 10, 20, 64])
def test_a_checkpoint_says_its_shape(older, depth):
    net = network(older, depth)
    tensors = net.state_dict()
    config = config_of(tensors, relu_before_sum=older)
    assert config == net.config
    again = SFNet(config).double()
    again.load_state_dict(tensors, strict=True)
    x = torch.rand(1, 3, 112, 112, dtype=torch.float64)
    assert torch.equal(again(x), net(x))


def test_sfnet_20_has_opensphere_s_names_and_shapes():
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in SFNet(SFNetConfig()).state_dict().items()}
    assert shapes["layer1.0.conv1.weight"] == (64, 3, 3, 3) and shapes["layer4.1.conv2.bias"] == (512,)
    assert shapes["fc.weight"] == (512, 512 * 7 * 7)
    convolutions = [key for key in shapes if key.endswith("weight") and key != "fc.weight"]
    assert len(convolutions) == 20


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "lacks layer1.0.conv1.weight"),
        (
            {f"layer{i}.{j}.conv1.weight": torch.zeros(4, 4, 3, 3) for i in range(1, 5) for j in range(3)},
            "fc.weight",
        ),
        (
            {
                "fc.weight": torch.zeros(2, 2),
                **{
                    f"layer{i}.{j}.conv1.weight": torch.zeros(4, 4, 3, 3)
                    for i in range(1, 5)
                    for j in range(3)
                },
            },
            "depth is 0",
        ),
    ],
)
def test_another_checkpoint_is_refused(tensors, said):
    with pytest.raises(UserError, match=said):
        config_of(tensors)


@pytest.mark.parametrize("wrong", [{"side": "112"}, {"features": 0}, {"depth": True}, {"relu_before_sum": 1}])
def test_sizes_that_are_none_are_refused(wrong):
    with pytest.raises(UserError, match=r"expected (a whole number from 1 up|true or false)"):
        SFNetConfig(**wrong)
