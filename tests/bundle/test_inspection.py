"""fairref bundle check: what is there, what is not, what is broken, and how large the parts should be."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from waiting import done

from fairref.__main__ import main as console
from fairref.bundle.inspection import inspect_bundle, lines, uses
from fairref.bundle.registry import OPTIONAL, PARTS
from fairref.commands.bundle import main
from fairref.judges.dino import Dino, DinoConfig
from fairref.judges.mobilenet import MobileNetConfig, MobileNetV3
from fairref.judges.sfnet import SFNet, SFNetConfig
from fairref.nets.clip import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tiny_faces_folder, tmp_path):
    return shutil.copytree(tiny_faces_folder, tmp_path / "tiny")


def state(folder):
    return {f.part.key: f.state for f in inspect_bundle(folder)}


def test_a_whole_bundle_is_good_for_everything(folder, capsys):
    assert set(state(folder).values()) == {"ok"}
    assert main(["check", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "8 of 8 parts are there and load" in said and "finetune on faces" in said
    size = sum(p.stat().st_size for p in (folder / "dino").iterdir())
    assert {f.part.key: f.size for f in inspect_bundle(folder)}["dino"] == size


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
    assert "fairref faces on CelebA" in said and "licence: CreativeML" not in said
    assert "broken    prompts.json" in said and "prompts.json: expected {" in said
    # what the manifest names must be there and whole, or the bundle doesn't load, and so draws nothing
    assert uses(inspect_bundle(folder)) == ["draw", "finetune"]
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
    found = inspect_bundle(tmp_path)
    assert uses(found) == []
    text = "\n".join(lines(tmp_path, found))
    for item in PARTS:
        told = item.needed != OPTIONAL  # a part that no use asks for is told where it is named
        assert (item.source in text) == told and (item.licence in text or not told)
    assert "found no unet/ in it" in text  # of the folder itself, which is there


def test_sizes_are_those_of_the_networks():
    with torch.device("meta"):
        text = ClipTextConfig(1024, 4096, 16, 24, "gelu")
        vision = ClipVisionConfig(1280, 5120, 16, 32, "gelu", projection_dim=1024, patch_size=14)
        networks = {
            "clip": Clip(ClipConfig(text, vision, 1024)),
            "dino": Dino(DinoConfig()),
            "embedder": SFNet(SFNetConfig()),
            "classifiers.finetune": MobileNetV3(MobileNetConfig(num_logits=80)),
            "classifiers.evaluate": MobileNetV3(MobileNetConfig(num_logits=2)),
        }
    said = {item.key: item.megabytes for item in PARTS}
    for key, network in networks.items():
        assert said[key] == round(sum(p.numel() for p in network.parameters()) * 4 / 1e6)
    assert said["face_features"] == round(100_000 * 512 * 4 / 1e6)


def test_the_command(folder, capsys):
    checked = done([sys.executable, "-m", "fairref", "bundle", "check", str(folder)], cwd=ROOT)
    assert checked.returncode == 0 and "8 of 8" in checked.stdout and "Traceback" not in checked.stderr
    assert console(["bundle", "check", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("nowhere: no such weights")


def test_a_recipe_that_no_run_can_take_is_told(folder, capsys):
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["recipe"]["iteratons"] = 2
    (folder / "bundle.json").write_text(json.dumps(manifest))
    assert main(["check", str(folder)]) == 1
    assert "unknown key 'iteratons'" in capsys.readouterr().out
