"""python -m fairref.bundle check: what is there, what is not, what is broken, and how large the parts should be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_bundle import write_tiny_bundle

from fairref.inventory import ITEMS, lines, look, main, uses
from fairref.judges.dino import Dino, DinoConfig
from fairref.judges.mobilenet import MobileNetConfig, MobileNetV3
from fairref.judges.sfnet import SFNet, SFNetConfig
from fairref.nets.clip import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    return write_tiny_bundle(tmp_path / "tiny", faces=True)


def state(folder):
    return {f.item.key: f.state for f in look(folder)}


def test_a_whole_bundle_is_good_for_everything(folder, capsys):
    assert set(state(folder).values()) == {"ok"}
    assert main(["check", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "8 of 8 parts are there and load" in said and "finetune on faces" in said
    size = sum(p.stat().st_size for p in (folder / "dino").iterdir())
    assert {f.item.key: f.size for f in look(folder)}["dino"] == size


def test_what_is_missing_broken_or_not_named_is_said(folder, capsys):
    manifest = json.loads((folder / "bundle.json").read_text())
    del manifest["dino"], manifest["classifiers"]["evaluate"]
    (folder / "bundle.json").write_text(json.dumps(manifest))
    (folder / "embedder" / "model.safetensors").write_bytes(b"broken")
    (folder / "D_F.safetensors").unlink()
    (folder / "prompts.json").write_text("{}")
    found = state(folder)
    assert (
        found["dino"] == "not named" and found["face_features"] == found["classifiers.evaluate"] == "missing"
    )
    assert "not a safetensors file (6 bytes)" in found["embedder"]
    assert main(["check", str(folder)]) == 1
    said = capsys.readouterr().out
    assert 'add "dino": "dino" to bundle.json' in said
    assert "python -m fairref.face_features on CelebA" in said and "licence: CreativeML" not in said
    assert "broken    prompts.json" in said and "prompts.json: expected {" in said
    # what the manifest names must be there and whole, or the bundle doesn't load, and so draws nothing
    assert uses(look(folder)) == ["draw", "finetune"]
    said = said.rstrip().splitlines()[-1]
    assert said.startswith("not good for anything until this is mended: ") and "embedder" in said
    del manifest["embedder"], manifest["face_features"]
    (folder / "bundle.json").write_text(json.dumps(manifest))
    assert main(["check", str(folder)]) == 1
    assert capsys.readouterr().out.rstrip().endswith("good to draw; finetune")


def test_prompts_are_optional(folder, capsys):
    (folder / "prompts.json").unlink()
    assert main(["check", str(folder)]) == 0
    assert "prompts.json is not there: fairref's own prompts take its place" in capsys.readouterr().out


def test_an_empty_folder_lists_everything(tmp_path):
    found = look(tmp_path)
    assert uses(found) == []
    text = "\n".join(lines(tmp_path, found))
    for item in ITEMS:
        if item.key not in ("stable_diffusion", "detector"):
            assert item.source in text and item.licence in text
    assert "found no unet/ in it" in text  # of the folder itself, which is there


def test_sizes_are_those_of_the_networks():
    with torch.device("meta"):
        text = ClipTextConfig(49408, 1024, 4096, 24, 16, 77, "gelu")
        vision = ClipVisionConfig(1280, 5120, 1024, 32, 16, patch_size=14, hidden_act="gelu")
        networks = {
            "clip": Clip(ClipConfig(text, vision, 1024)),
            "dino": Dino(DinoConfig()),
            "embedder": SFNet(SFNetConfig()),
            "classifiers.finetune": MobileNetV3(MobileNetConfig(num_logits=80)),
            "classifiers.evaluate": MobileNetV3(MobileNetConfig(num_logits=2)),
        }
    said = {item.key: item.megabytes for item in ITEMS}
    for key, network in networks.items():
        assert said[key] == round(sum(p.numel() for p in network.parameters()) * 4 / 1e6)
    assert said["face_features"] == round(100_000 * 512 * 4 / 1e6)


def test_the_command(folder):
    done = subprocess.run(
        [sys.executable, "-m", "fairref.bundle", "check", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "8 of 8" in done.stdout and "Traceback" not in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "fairref.bundle", "check", "nowhere"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("nowhere: no such weights")
