"""D_F from a folder of photographs: whose face, what is left out, what users get wrong."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data

from fairref.bundle.judges import load_detector, load_embedder
from fairref.commands.cli import run
from fairref.commands.faces import main
from fairref.errors import UserError
from fairref.fairness.faces import align_crops, find
from fairref.judges.sfnet import SFNet, SFNetConfig
from fairref.tools import faces as faces_tool
from fairref.tools.faces import load, photographs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A bundle's folder with the committed detector and an untrained embedder."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "embedder").mkdir()
    torch.manual_seed(0)
    save_file(
        SFNet(SFNetConfig(4, (4, 4, 8, 8), features=6)).state_dict(),
        folder / "embedder" / "model.safetensors",
    )
    manifest = {"detector": str(ROOT / "weights" / "mtcnn"), "embedder": "embedder"}
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two photographs with a face, one of them turned by its camera's mark; one without; one that is no image."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "below").mkdir()
    astronaut = Image.fromarray(data.astronaut())
    astronaut.save(folder / "a.png")
    mark = Image.Exif()
    mark[0x0112] = 6  # shown turned by 90 degrees clockwise
    astronaut.transpose(Image.Transpose.ROTATE_90).save(folder / "below" / "b.png", exif=mark)
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(folder / "plain.jpg")
    (folder / "z.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    return folder


def test_a_folder_becomes_unit_embeddings_of_its_faces(weights, images, tmp_path, capsys):
    out = tmp_path / "faces.safetensors"
    assert main(["--images", str(images), "--weights", str(weights), "--out", str(out)]) == 0
    found = load_file(out)["embeddings"]
    said = capsys.readouterr()
    assert "2 faces of 4 photographs" in said.out
    assert "left out 1, unreadable, such as" in said.err and "z.jpg" in said.err
    assert "left out 1, no face, such as" in said.err and "plain.jpg" in said.err
    assert found.shape == (2, 6) and found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))

    x = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1)[None] / 127.5 - 1
    face = align_crops(x, find(load_detector(ROOT / "weights" / "mtcnn"), x))
    net = load_embedder(weights / "embedder")
    with torch.no_grad():
        wanted = F.normalize(net(face) + net(face.flip(3)), dim=1)[0]
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], wanted, rtol=0, atol=1e-5)  # turned back before it was looked at


def test_large_photographs_are_reduced_and_small_ones_left(tmp_path):
    Image.new("L", (90, 60), 128).save(tmp_path / "a.png")
    assert load(tmp_path / "a.png", 45).shape == (1, 3, 30, 45)
    assert load(tmp_path / "a.png", 100).shape == (1, 3, 60, 90)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": "nowhere"}, "nowhere: no such folder"),
        ({"images": "empty"}, "found no image in it or below"),
        ({"images": "faceless"}, "found no face in 1 images"),
        ({"images": "broken", "strict": True}, "GIF file, or leave --strict out"),
        ({"out": "there.safetensors"}, "is there already"),
        ({"out": "faces.npz"}, "expected a .safetensors file"),
        ({"out": "nowhere/faces.safetensors"}, "in a folder that is there"),
        ({"weights": "bare"}, "bundle.json: names no detector"),
        ({"weights": "half"}, "bundle.json: names no embedder"),
    ],
)
def test_what_users_get_wrong(weights, tmp_path, capsys, change, said):
    for name in ("empty", "faceless", "broken", "bare", "half"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "faceless" / "a.png")
    (tmp_path / "broken" / "z.jpg").write_bytes(b"no image")
    (tmp_path / "there.safetensors").touch()
    (tmp_path / "half" / "bundle.json").write_text('{"detector": "detector"}')
    options = {"images": "faceless", "out": "faces.safetensors", **change}
    argv = [f"--{key}={tmp_path / options[key]}" for key in ("images", "out")]
    argv += [f"--weights={tmp_path / options['weights'] if 'weights' in options else weights}"]
    argv += ["--strict"] if options.get("strict") else []
    assert run(main, argv) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "faces.safetensors").exists()


def test_a_limit_spreads_over_the_folder(weights, images, tmp_path, capsys):
    out = tmp_path / "faces.safetensors"
    main(["--images", str(images), "--weights", str(weights), "--out", str(out), "--limit", "2"])
    assert "1 faces of 2 photographs" in capsys.readouterr().out  # a.png and plain.jpg
    with pytest.raises(UserError, match="whole number from 1"):
        main(["--images", str(images), "--weights", str(weights), "--out", str(out), "--limit", "0"])


def test_linked_folders_are_followed_once_and_pipes_left_out(tmp_path):
    for name in ("a/one.jpg", "a/b/two.PNG", "elsewhere/three.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")  # round and round
    (tmp_path / "a" / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "a" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "d").symlink_to(tmp_path / "elsewhere")  # the second way there
    (tmp_path / "a" / "null.jpg").symlink_to("/dev/null")
    (tmp_path / "a" / "gone.jpg").symlink_to("nowhere")  # will be reported, for somebody wanted it
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    (tmp_path / "a" / "folder.jpg").mkdir()
    found = [str(p.relative_to(tmp_path / "a")) for p in photographs(tmp_path / "a")]
    assert found == ["b/two.PNG", "c/three.gif", "gone.jpg", "one.jpg", "self.jpg"]


def test_a_folder_that_can_not_be_listed_is_named(tmp_path, monkeypatch):
    """As the system says it, since root may list anything."""
    (tmp_path / "a.jpg").touch()
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def closed(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="closed"):
        photographs(tmp_path)


def read_only(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system")


def test_an_output_that_can_not_be_written_is_refused_before_the_work(weights, images, tmp_path, monkeypatch):
    monkeypatch.setattr(faces_tool, "photographs", lambda folder: pytest.fail("the work has begun"))
    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(UserError, match=r"out\.safetensors: can't be written \(Read-only"):
        main(["--images", str(images), "--weights", str(weights), "--out", str(tmp_path / "out.safetensors")])
