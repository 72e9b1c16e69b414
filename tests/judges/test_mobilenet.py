"""MobileNetV3 against torchvision's own values (tests/golden), and the classifier around it."""

import json
from pathlib import Path

import make_mobilenet as maker
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from fairref.bundle.judges import load_classifier, save_classifier
from fairref.errors import UserError
from fairref.files.weights import load_strict
from fairref.judges import IMAGENET_MEAN, IMAGENET_STD
from fairref.judges.mobilenet import (
    Classifier,
    MobileNetConfig,
    MobileNetV3,
    make_divisible,
)

GOLDEN = Path(__file__).parents[1] / "golden"
ATTRIBUTES = {"gender": ("woman", "man"), "skin_tone": ("light", "medium-light", "medium", "dark")}


def formula_network(kind, width=0.5, logits=maker.NUM_LOGITS):
    network = MobileNetV3(MobileNetConfig(kind, width, logits)).double().eval()
    weights = maker.formula_weights({key: tuple(value.shape) for key, value in network.state_dict().items()})
    load_strict(network, {key: torch.from_numpy(value) for key, value in weights.items()}, "the formula")
    return network


def classifier(input_size=32, attributes=ATTRIBUTES):
    torch.manual_seed(0)
    total = sum(map(len, attributes.values()))
    return Classifier(MobileNetV3(MobileNetConfig("small", 0.25, total, input_size)), attributes).eval()


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("kind", ["large", "small"])
def test_logits_and_input_gradient_are_torchvisions(kind):
    golden = load_file(GOLDEN / "mobilenet.safetensors")
    x = torch.from_numpy(maker.uniform("x", maker.INPUT_SHAPE)).double().requires_grad_()
    logits = formula_network(kind)(x)
    (logits * torch.from_numpy(maker.uniform("g", tuple(logits.shape)))).sum().backward()
    assert relative(logits, golden[f"{kind}.logits"]) < 1e-12
    assert relative(x.grad, golden[f"{kind}.gradient"]) < 1e-12


def test_the_full_size_with_the_released_head_is_torchvisions():
    golden = load_file(GOLDEN / "mobilenet.safetensors")
    x = torch.from_numpy(maker.uniform("x", maker.FULL_SHAPE)).double().requires_grad_()
    logits = formula_network("large", 1.0, maker.FULL_LOGITS)(x)
    (logits * torch.from_numpy(maker.uniform("g", tuple(logits.shape)))).sum().backward()
    assert relative(logits, golden["full.logits"]) < 1e-12
    assert relative(x.grad.flatten(1).norm(dim=1), golden["full.gradient_norms"]) < 1e-12


@pytest.mark.parametrize("kind", ["large", "small"])
@pytest.mark.parametrize("width", maker.WIDTHS)
def test_keys_and_shapes_are_torchvisions_in_its_order(kind, width):
    with safe_open(GOLDEN / "mobilenet.safetensors", "pt") as file:
        expected = json.loads(file.metadata()[f"{kind} {width}"])
    state = MobileNetV3(MobileNetConfig(kind, width, maker.NUM_LOGITS)).state_dict()
    assert [(key, list(value.shape)) for key, value in state.items()] == list(expected.items())


def test_parameter_counts_are_the_published_ones():
    for kind, count in (("large", 5_483_032), ("small", 2_542_856)):
        network = MobileNetV3(MobileNetConfig(kind))
        assert sum(p.numel() for p in network.parameters()) == count


def test_channels_are_multiples_of_8_and_never_more_than_a_tenth_down():
    for channels in (1, 4, 11.9, 12, 18.4, 44.0, 46, 60, 92.1):
        rounded = make_divisible(channels)
        assert rounded % 8 == 0 and rounded >= 0.9 * channels and rounded >= 8
    assert [make_divisible(c) for c in (12, 19, 20, 92)] == [16, 24, 24, 96]


def test_train_mode_drops_and_counts_as_torchvision_does():
    network = MobileNetV3(MobileNetConfig("small", 0.25, 6))
    assert network.classifier[2].p == 0.2
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 1e-2)}


def test_preprocessing_is_pillows_antialiased_bilinear_then_imagenets_statistics():
    h = classifier(input_size=20)
    x = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    channels = []
    for i in range(3):
        picture = Image.fromarray(((x[0, i] + 1) / 2).numpy(), mode="F")
        small = np.asarray(picture.resize((20, 20), Image.Resampling.BILINEAR))
        channels.append((small - IMAGENET_MEAN[i]) / IMAGENET_STD[i])
    assert np.abs(h.preprocess(x)[0].numpy() - np.stack(channels)).max() < 1e-5


def test_a_picture_of_the_right_size_is_not_resampled():
    h = classifier(input_size=32)
    x = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    assert torch.allclose(h.preprocess(x), ((x + 1) / 2 - mean) / std, atol=1e-6)


def test_the_classifier_splits_the_logits_by_attribute_and_passes_gradients():
    h = classifier()
    x = (torch.rand(3, 3, 48, 40) * 2 - 1).requires_grad_()
    logits = h(x)
    assert {name: tuple(value.shape) for name, value in logits.items()} == {
        "gender": (3, 2),
        "skin_tone": (3, 4),
    }
    together = h.network(h.preprocess(x))
    assert torch.equal(torch.cat(list(logits.values()), 1), together)
    logits["skin_tone"][1].sum().backward()
    assert x.grad[1].abs().max() > 0 and x.grad[0].abs().max() == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0), (torch.float16, 2e-3)])
def test_a_folder_gives_back_the_classifier(tmp_path, dtype, tolerance):
    h = classifier()
    h.network.load_state_dict(formula_like(h.network))
    save_classifier(h, tmp_path / "h", dtype)
    again = load_classifier(tmp_path / "h")
    assert not again.training and again.classes == ATTRIBUTES
    assert again.network.config == h.network.config
    assert all(p.dtype == torch.float32 for p in again.parameters())
    assert set(again.state_dict()) == {f"network.{key}" for key in again.network.state_dict()}
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    h = h.to(memory_format=torch.channels_last)  # as a loaded one is: another order of the same sums
    a, b = h(x)["gender"], again(x)["gender"]
    assert torch.equal(a, b) if tolerance == 0 else relative(a, b) < tolerance
    assert json.loads((tmp_path / "h/config.json").read_text()) == {
        "kind": "small",
        "width": 0.25,
        "input_size": 32,
        "dropout": 0.2,
        "pixels": "imagenet",
        "attributes": {name: list(classes) for name, classes in ATTRIBUTES.items()},
    }


def formula_like(network):
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    return {key: torch.from_numpy(value) for key, value in maker.formula_weights(shapes).items()}


def test_half_precision_keeps_the_statistics(tmp_path):
    h = classifier()
    with torch.no_grad():
        for buffer in h.network.buffers():
            if buffer.is_floating_point():
                buffer.fill_(1e-9)
    save_classifier(h, tmp_path, torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["features.0.0.weight"].dtype == torch.float16
    assert (stored["features.0.1.running_var"] == h.network.features[0][1].running_var).all()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "not JSON"),
        ("[]", "found a list, expected a JSON object"),
        ("{}", '"attributes" is None'),
        ('{"attributes": {"gender": ["woman"]}}', "two or more classes"),
        ('{"attributes": {"gender": ["a", "b"]}, "kind": "medium"}', "'medium'; choose one of large, small"),
        (
            '{"attributes": {"gender": ["a", "b"]}, "depth": 3}',
            "found key 'depth'; MobileNet has no such option",
        ),
        ('{"attributes": {"gender": ["a", "b"]}, "width": 0}', "must be positive"),
        ('{"attributes": {"gender": ["a", "b"]}, "width": "wide"}', "config.json"),
        ('{"attributes": {"gender": ["a", "b"]}, "width": 0.5}', "unknown tensors|expected"),
    ],
)
def test_a_wrong_folder_is_explained(tmp_path, config, said):
    save_classifier(classifier(attributes={"gender": ("a", "b")}), tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=said) as error:
        load_classifier(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_missing_folder_and_classes_that_do_not_fit_are_explained(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: can't be read"):
        load_classifier(tmp_path / "none")
    with pytest.raises(UserError, match="6 classes in all but its network has 5"):
        Classifier(MobileNetV3(MobileNetConfig("small", 0.25, 5)), ATTRIBUTES)


def test_a_config_goes_to_a_dict_and_back():
    config = MobileNetConfig("large", 0.75, 6, 96)
    assert MobileNetConfig.from_dict(config.to_dict()) == config
