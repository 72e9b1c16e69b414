"""Judges as their makers publish them: layouts, pickles that hold tensors only, heads with more logits than meant."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from fairref.bundle import judges
from fairref.bundle.judges import (
    load_classifier,
    load_clip,
    load_detector,
    load_dino,
    load_embedder,
    load_face_features,
    load_mtcnn,
    save_classifier,
)
from fairref.bundle.loading import load_bundle
from fairref.errors import UserError
from fairref.files.vocabulary import BOS, EOS, Vocabulary
from fairref.files.weights import read_judge, read_pickled
from fairref.judges.dino import Dino, DinoConfig
from fairref.judges.mobilenet import MobileNetConfig, MobileNetV3
from fairref.judges.sfnet import SFNet, SFNetConfig

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden" / "open_clip.safetensors"
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "mlp_ratio": 2.0,
        "patch_size": 8,
        "image_size": 32,
    },
    "text_cfg": {"context_length": 12, "vocab_size": 40, "width": 24, "heads": 3, "layers": 3},
}


def seeded(network, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return network.eval()


def open_clip_folder(folder, config, pickled=False):
    golden = load_file(GOLDEN)
    weights = {k.removeprefix("weights/"): v for k, v in golden.items() if k.startswith("weights/")}
    if pickled:
        torch.save(weights, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return golden


@pytest.fixture
def few_tokens(monkeypatch):
    """A vocabulary smaller than all bytes, as the golden model has."""
    ids = {token: i for i, token in enumerate(["a", "a</w>", BOS, EOS])}
    monkeypatch.setattr(judges, "read_vocabulary", lambda folder: Vocabulary(ids, []))


@pytest.mark.parametrize(("act", "pickled"), [("gelu", False), ("quick_gelu", False), ("gelu", True)])
def test_open_clips_layout_gives_open_clips_features(tmp_path, few_tokens, act, pickled):
    config = {**OPEN_CLIP, "quick_gelu": True} if act == "quick_gelu" else OPEN_CLIP
    golden = open_clip_folder(tmp_path, config, pickled)
    clip, tokenizer = load_clip(tmp_path)
    with torch.no_grad():
        image = F.normalize(clip.visual_projection(clip.vision_model(golden["pixels"])), dim=1)
        text = clip.encode_text(golden["ids"])
    torch.testing.assert_close(image, golden[f"{act}/image"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(text, golden[f"{act}/text"], rtol=1e-5, atol=1e-6)
    other = "quick_gelu" if act == "gelu" else "gelu"
    assert (image - golden[f"{other}/image"]).abs().max() > 1e-4  # the two differ enough to tell
    assert tokenizer(["a"]).shape == (1, 12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"custom_text": True}, "model_cfg has 'custom_text'"),
        ({"vision_cfg": {"timm_model_name": "vit"}}, "vision_cfg has 'timm_model_name'"),
        ({"text_cfg": None}, "text_cfg has 'text_cfg'"),
        ({"text_cfg": {"width": 24}}, "lacks 'vocab_size'"),
    ],
)
def test_another_open_clip_model_is_refused(tmp_path, change, said):
    open_clip_folder(tmp_path, {**OPEN_CLIP, **change})
    with pytest.raises(UserError, match=said):
        load_clip(tmp_path)


def test_tensors_are_read_from_pickles_under_their_plain_names(tmp_path):
    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    for name, found in (
        ("plain.pth", tensors),
        ("parallel.pt", {f"module.{key}": value for key, value in tensors.items()}),
        ("training.bin", {"epoch": 3, "state_dict": tensors}),
        ("other.pth", {"model": tensors, "optimizer": {"lr": 0.1}}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        torch.save(found, folder / name)
        read, source = read_judge(folder)
        assert source == str(folder / name)
        assert set(read) == set(tensors) and all(torch.equal(read[k], tensors[k]) for k in tensors)
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "plain.pth" / "model.safetensors")
    assert list(read_judge(tmp_path / "plain.pth")[0]) == ["a.weight"]  # safetensors first
    save_file({"module.a.weight": torch.zeros(1)}, tmp_path / "parallel.pt" / "model.safetensors")
    assert list(read_judge(tmp_path / "parallel.pt")[0]) == ["a.weight"]


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (
            lambda path: torch.save(nn.Linear(2, 2), path),
            "holds more than tensors.*safetensors.torch.save_file",
        ),
        (lambda path: torch.save({"a": Bomb()}, path), "holds more than tensors"),
        (lambda path: torch.save([torch.ones(1)], path), "found no map of names to tensors"),
        (lambda path: torch.save({}, path), "found no map of names to tensors"),
        (lambda path: torch.save({"epoch": 3, "lr": 0.1}, path), "found no map of names to tensors"),
        (lambda path: path.write_bytes(b""), "can't be read"),
        (lambda path: path.write_bytes(b"<html>no such file</html>"), "more than tensors|can't be read"),
        (
            lambda path: (
                torch.save({"a": torch.ones(999)}, path),
                path.write_bytes(path.read_bytes()[:900]),
            ),
            "can't be read",
        ),
    ],
)
def test_a_pickle_that_is_more_or_less_than_tensors_is_refused(tmp_path, write, said):
    path = tmp_path / "model.pth"
    write(path)
    with pytest.raises(UserError, match=said) as caught:
        read_pickled(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_two_files_are_one_too_many(tmp_path):
    for name in ("a.pt", "b.pth"):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(UserError, match=r"found a\.pt, b\.pth; expected model\.safetensors or one"):
        read_judge(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_judge(tmp_path / "nowhere")


def test_a_head_with_more_logits_says_which_are_meant(tmp_path):
    """The released CelebA head: 40 attributes of two logits each, of which the one of index 20 is Male."""
    network = seeded(MobileNetV3(MobileNetConfig("small", 0.25, 80, input_size=32, pixels="plain")))
    torch.save(network.state_dict(), tmp_path / "epoch=9.pt")
    config = {"kind": "small", "width": 0.25, "input_size": 32, "pixels": "plain"}
    attributes = {
        "attributes": {"gender": ["woman", "man"]},
        "num_logits": 80,
        "logits": {"gender": [40, 41]},
    }
    (tmp_path / "config.json").write_text(json.dumps({**config, **attributes}))
    h = load_classifier(tmp_path)
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = network(x).view(3, 40, 2)[:, 20]  # pixels as they are
        assert torch.allclose(h(x)["gender"], expected, atol=1e-5)
    assert not torch.allclose(expected[:, 0], expected[:, 1])
    save_classifier(h, tmp_path / "again")
    again = load_classifier(tmp_path / "again")
    assert torch.equal(again(x)["gender"], h(x)["gender"]) and again.logits == {"gender": (40, 41)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "4 logits; the two must be equal"),
        ({"logits": {"gender": [0, 4]}}, r"logits of 'gender' are \[0, 4\]; expected 2 places from 0 to 3"),
        ({"logits": {"gender": [0]}}, "expected 2 places"),
        ({"logits": {"age": [0, 1]}}, r"logits of 'gender' are \[\]"),
        ({"logits": [0, 1]}, '"logits" is .0, 1.; expected a list of places'),
        ({"pixels": "plane"}, '"pixels" is .plane.; choose one of imagenet, plain'),
    ],
)
def test_logits_that_are_not_there_are_refused(tmp_path, change, said):
    network = MobileNetV3(MobileNetConfig("small", 0.25, 4))
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = {"attributes": {"gender": ["woman", "man"]}, "kind": "small", "width": 0.25, "num_logits": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=said):
        load_classifier(tmp_path)


def test_judges_of_faces_and_dino_come_back_from_their_folders(tmp_path):
    shape = {"width": 12, "depth": 1, "heads": 2, "patch": 4, "trained_size": 16, "input_size": 16}
    dino = seeded(Dino(DinoConfig(**shape)))
    embedder = seeded(SFNet(SFNetConfig(4, (4, 4, 8, 8), 6, side=32, relu_before_sum=True)))
    for name, network, config in (("dino", dino, shape), ("embedder", embedder, {"side": 32})):
        (tmp_path / name).mkdir()
        torch.save(network.state_dict(), tmp_path / name / "published.pth")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(load_dino(tmp_path / "dino")(x), dino(x))
        assert torch.equal(load_embedder(tmp_path / "embedder")(x), embedder(x))
    (tmp_path / "dino" / "config.json").write_text(json.dumps({"depths": 1}))
    with pytest.raises(UserError, match="found key 'depths'"):
        load_dino(tmp_path / "dino")
    (tmp_path / "embedder" / "published.pth").unlink()
    save_file({"a": torch.ones(1)}, tmp_path / "embedder" / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: An SFNet checkpoint lacks"):
        load_embedder(tmp_path / "embedder")


def test_the_committed_detector_loads_and_its_config_is_heard(tmp_path):
    assert load_mtcnn(ROOT / "weights" / "mtcnn").smallest == 20
    (tmp_path / "model.safetensors").write_bytes(
        (ROOT / "weights" / "mtcnn" / "model.safetensors").read_bytes()
    )
    (tmp_path / "config.json").write_text('{"smallest": 40}')
    assert load_mtcnn(tmp_path).smallest == 40
    (found,) = load_detector(tmp_path)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert found.boxes.shape == (0, 4) and found.landmarks.shape == (0, 5, 2)


def test_face_features_must_be_unit_vectors(tmp_path):
    path = tmp_path / "D_F.safetensors"
    unit = torch.full((5, 6), 6**-0.5)
    save_file({"embeddings": unit.half()}, path)
    assert torch.equal(load_face_features(path), unit.half())
    for wrong, said in (
        (unit * 2, "norms from 2 to 2; expected 1"),
        (unit * torch.nan, "norms from nan to nan; expected 1"),
        (unit[0], r"embeddings is \[6\]; expected one tensor of \(faces, D\)"),
        (unit[:0], r"embeddings is \[0, 6\]; expected one tensor"),
    ):
        save_file({"embeddings": wrong}, path)
        with pytest.raises(UserError, match=said):
            load_face_features(path)
    save_file({"features": torch.ones(5, 6)}, path)
    with pytest.raises(UserError, match="embeddings is none"):
        load_face_features(path)


def test_face_features_must_fit_the_embedder(tiny_faces_folder, tmp_path):
    folder = shutil.copytree(tiny_faces_folder, tmp_path / "bundle")
    save_file({"embeddings": torch.eye(7)}, folder / "D_F.safetensors")
    with pytest.raises(UserError, match="face features have 7 numbers each and the embedder makes 6"):
        load_bundle(folder)
    manifest = json.loads((folder / "bundle.json").read_text())
    del manifest["face_features"]
    (folder / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="names detector and embedder only; name detector, embedder and face"):
        load_bundle(folder)
