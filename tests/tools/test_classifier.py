"""CelebA and FairFace in miniature, in their exact formats, and the classifier that is trained on them."""

import errno
import json
import shutil
import struct
import tempfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fairref.bundle.judges import load_classifier
from fairref.commands import classifier as classifier_command
from fairref.commands.classifier import main
from fairref.commands.cli import run
from fairref.errors import UserError
from fairref.files import datasets
from fairref.files.datasets import CLASSES, FAIRFACE, read_photographs
from fairref.judges.mobilenet import MobileNetConfig
from fairref.tools import faces as face_features
from fairref.tools.classifier import (
    NO_JITTER,
    changed,
    confusion_figure,
    confusions,
    load,
    new_classifier,
    report,
    settle,
)

CELEBA_COLUMNS = [
    "5_o_Clock_Shadow",
    "Arched_Eyebrows",
    "Attractive",
    "Bags_Under_Eyes",
    "Bald",
    "Bangs",
    "Big_Lips",
    "Big_Nose",
    "Black_Hair",
    "Blond_Hair",
    "Blurry",
    "Brown_Hair",
    "Bushy_Eyebrows",
    "Chubby",
    "Double_Chin",
    "Eyeglasses",
    "Goatee",
    "Gray_Hair",
    "Heavy_Makeup",
    "High_Cheekbones",
    "Male",
    "Mouth_Slightly_Open",
    "Mustache",
    "Narrow_Eyes",
    "No_Beard",
    "Oval_Face",
    "Pale_Skin",
    "Pointy_Nose",
    "Receding_Hairline",
    "Rosy_Cheeks",
    "Sideburns",
    "Smiling",
    "Straight_Hair",
    "Wavy_Hair",
    "Wearing_Earrings",
    "Wearing_Hat",
    "Wearing_Lipstick",
    "Wearing_Necklace",
    "Wearing_Necktie",
    "Young",
]
MALE, YOUNG = CELEBA_COLUMNS.index("Male"), CELEBA_COLUMNS.index("Young")


def picture(file, bright, rng, size=(40, 48)):
    file.parent.mkdir(parents=True, exist_ok=True)
    low = 140 if bright else 0
    blots = Image.fromarray(rng.integers(low, low + 110, (4, 3, 3), dtype=np.uint8))
    blots.resize(size, Image.Resampling.BICUBIC).save(file, quality=90)


@pytest.fixture
def celeba(tmp_path):
    """24 images: men are bright; every third is not young; parts 0, 1, 2 of 16, 4 and 4 images."""
    rng, root = np.random.default_rng(0), tmp_path / "celeba"
    lines, parts = ["24", " ".join(CELEBA_COLUMNS) + " "], []
    for n in range(24):
        name, values = f"{n + 1:06}.jpg", [-1] * 40
        values[MALE], values[YOUNG] = 1 if n % 2 else -1, -1 if n % 3 == 0 else 1
        picture(root / "img_align_celeba" / name, bright=n % 2 == 1, rng=rng)
        lines.append(f"{name} " + " ".join(f"{v:2}" for v in values))
        parts.append(f"{name} {0 if n < 16 else 1 if n < 20 else 2}")
    (root / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    (root / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    return root


FACES = (
    ("50-59", "Male", "East Asian"),
    ("0-2", "Female", "Latino_Hispanic"),
    ("more than 70", "Female", "Black"),
    ("30-39", "Male", "Southeast Asian"),
    ("40-49", "Male", "Middle Eastern"),
    ("20-29", "Female", "Indian"),
    ("10-19", "Male", "White"),
    ("3-9", "Female", "Black"),
)


@pytest.fixture
def fairface(tmp_path):
    rng, root = np.random.default_rng(1), tmp_path / "fairface"
    for part in ("train", "val"):
        rows = ["file,age,gender,race,service_test"]
        for n, (age, gender, race) in enumerate(FACES, 1):
            picture(root / part / f"{n}.jpg", bright=gender == "Male", rng=rng)
            rows.append(f"{part}/{n}.jpg,{age},{gender},{race},{bool(n % 2)}")
        (root / f"fairface_label_{part}.csv").write_text("\n".join(rows) + "\n")
    return root


def test_celeba_is_read_by_column_and_part(celeba):
    found = read_photographs("celeba", celeba, ["gender", "age"])
    assert {part: len(rows) for part, rows in found.parts.items()} == {
        "train": 16,
        "validation": 4,
        "test": 4,
    }
    for part, first in (("train", 0), ("validation", 16), ("test", 20)):
        for n, row in enumerate(found.parts[part], first):
            assert row.file.name == f"{n + 1:06}.jpg" and row.file.is_file()
            assert CLASSES["gender"][row.labels[0]] == ("man" if n % 2 else "woman")
            assert CLASSES["age"][row.labels[1]] == ("old" if n % 3 == 0 else "young")
    assert found.bad == [] and found.attributes == {"gender": ("woman", "man"), "age": ("young", "old")}


def test_fairface_classes_are_those_of_the_method(fairface):
    found = read_photographs("fairface", fairface, ["race", "gender", "age"])
    wanted = [
        ("Asian", "man", "old"),
        ("WMELH", "woman", "young"),
        ("Black", "woman", "old"),
        ("Asian", "man", "young"),
        ("WMELH", "man", "old"),
        ("Indian", "woman", "young"),
        ("WMELH", "man", "young"),
        ("Black", "woman", "young"),
    ]
    for part in ("train", "validation"):
        names = [
            tuple(CLASSES[a][k] for a, k in zip(found.attributes, r.labels, strict=True))
            for r in found.parts[part]
        ]
        assert names == wanted
    assert len(FAIRFACE["race"]) == 7 and len(FAIRFACE["age"]) == 9


def as_kaggle(root):
    """Its archive: tables of commas, and a folder in a folder of the same name."""
    for name, names in (("list_attr_celeba", CELEBA_COLUMNS), ("list_eval_partition", ["partition"])):
        lines = (root / f"{name}.txt").read_text().splitlines()[2 if len(names) > 1 else 0 :]
        table = [",".join(["image_id", *names]), *(",".join(line.split()) for line in lines)]
        (root / f"{name}.csv").write_text("\r\n".join(table) + "\r\n")
        (root / f"{name}.txt").unlink()
    (root / "img_align_celeba").rename(root / "images")
    (root / "img_align_celeba").mkdir()
    (root / "images").rename(root / "img_align_celeba" / "img_align_celeba")


def as_distributed(root):
    """The distributor's folders, with a table's other file beside."""
    for folder, name in (
        ("Anno", "list_attr_celeba.txt"),
        ("Eval", "list_eval_partition.txt"),
        ("Img", "img_align_celeba"),
    ):
        (root / folder).mkdir()
        (root / name).rename(root / folder / name)
    (root / "Anno" / "list_bbox_celeba.txt").write_text("24\nx_1 y_1\n")


def as_torchvision(root):
    """Its root holds the folder celeba."""
    for path in list(root.iterdir()):
        (root / "celeba").mkdir(exist_ok=True)
        path.rename(root / "celeba" / path.name)


def with_zeros(root):
    path = root / "list_attr_celeba.txt"
    path.write_text(path.read_text().replace("-1", "0"))


def with_marks(root):
    """As some editors save: a byte order mark first."""
    for path in (*root.glob("*.txt"), *root.glob("*.csv")):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


@pytest.mark.parametrize(
    "changes",
    [
        (as_kaggle,),
        (as_distributed,),
        (as_torchvision,),
        (with_zeros,),
        (with_zeros, as_kaggle, with_marks),
        (with_marks,),
        (as_distributed, as_torchvision),
    ],
)
def test_celeba_is_read_as_people_have_it(celeba, changes):
    def content():
        photographs = read_photographs("celeba", celeba, ["gender", "age"])
        assert photographs.bad == []
        return {p: [(r.file.name, r.labels) for r in rows] for p, rows in photographs.parts.items()}

    before = content()
    assert sum(map(len, before.values())) == 24
    for change in changes:
        change(celeba)
    assert content() == before


def all_women(root):
    lines = (root / "list_attr_celeba.txt").read_text().splitlines()
    cells = [line.split() for line in lines[2:]]
    for cell in cells:
        cell[1 + MALE] = "-1"
    (root / "list_attr_celeba.txt").write_text("\n".join([*lines[:2], *(" ".join(c) for c in cells)]))


def one_zero(root):
    lines = (root / "list_attr_celeba.txt").read_text().splitlines()
    cells = lines[2].split()
    assert cells[1 + MALE] == "-1"
    cells[1 + MALE] = "0"
    (root / "list_attr_celeba.txt").write_text("\n".join([*lines[:2], " ".join(cells), *lines[3:]]))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (one_zero, "column Male has 0 as well as -1; expected -1 and 1, or 0 and 1"),
        (all_women, "the train part has no usable image of gender 'man'; check the labels"),
        (
            lambda root: shutil.copytree(root, root / "celeba"),
            r"list_attr_celeba\.txt and .*celeba.list_attr_celeba\.txt are both there; keep one",
        ),
        (
            lambda root: (root / "list_eval_partition.csv").write_text("image_id,partition\n"),
            r"list_eval_partition\.csv are both there",
        ),
    ],
)
def test_labels_that_say_two_things_are_refused(celeba, change, sentence):
    change(celeba)
    with pytest.raises(UserError, match=sentence):
        read_photographs("celeba", celeba, ["gender"])


def test_lines_of_kaggles_tables_are_named(celeba):
    as_kaggle(celeba)
    for name, line, bad in (("attr_celeba", 4, "000003.jpg,1"), ("eval_partition", 6, "000005.jpg,7")):
        lines = (celeba / f"list_{name}.csv").read_text().splitlines()
        lines[line - 1] = bad
        (celeba / f"list_{name}.csv").write_text("\n".join(lines))
    assert read_photographs("celeba", celeba, ["gender"]).bad == [
        "list_eval_partition.csv, line 6: no part that is known",
        "list_attr_celeba.csv, line 4: another number of values than columns",
        "list_attr_celeba.csv, line 6: 000005.jpg is in no part",
    ]


def test_fairface_with_a_byte_order_mark(fairface):
    before = read_photographs("fairface", fairface, ["race", "age"])
    with_marks(fairface)
    assert read_photographs("fairface", fairface, ["race", "age"]) == before


def test_bad_rows_are_counted_named_and_left_out(celeba, fairface):
    (celeba / "img_align_celeba" / "000002.jpg").unlink()
    labels = (celeba / "list_attr_celeba.txt").read_text().splitlines()
    labels[2 + 4] = "000005.jpg 1 -1"
    labels[2 + 6] = labels[2 + 6].replace("-1", " 2")
    labels.append("000099.jpg " + " ".join(["-1"] * 40))
    (celeba / "list_attr_celeba.txt").write_text("\n".join(labels))
    found = read_photographs("celeba", celeba, ["gender"])
    assert sum(map(len, found.parts.values())) == 21 and len(found.bad) == 4
    assert any("000002.jpg is missing" in b for b in found.bad) and any("line 7" in b for b in found.bad)
    assert any("000099.jpg is in no part" in b for b in found.bad)
    assert "and 1 more" in datasets.describe_bad(found.bad)
    with pytest.raises(UserError, match="4 bad rows"):
        read_photographs("celeba", celeba, ["gender"], strict=True)

    table = fairface / "fairface_label_train.csv"
    table.write_text(table.read_text().replace("Southeast Asian", "Martian") + "train/9.jpg,3-9,Male\n")
    found = read_photographs("fairface", fairface, ["race"])
    assert len(found.parts["train"]) == 7 and len(found.bad) == 2 and "line 5" in found.bad[0]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda root: shutil.rmtree(root), "no such folder"),
        (lambda root: (root / "list_attr_celeba.txt").unlink(), r"no list_attr_celeba\.txt or list_attr"),
        (lambda root: (root / "list_attr_celeba.txt").write_text("3\nFoo Bar\n"), "no column 'Male'"),
        (lambda root: (root / "list_attr_celeba.txt").write_bytes(b"\xff\xfe\x00"), "not text"),
        (lambda root: shutil.rmtree(root / "img_align_celeba"), "no img_align_celeba in it"),
        (lambda root: (root / "img_align_celeba" / "img_align_celeba").mkdir(), "no usable training image"),
    ],
)
def test_a_wrong_folder_is_one_sentence(celeba, change, sentence):
    change(celeba)
    with pytest.raises(UserError, match=sentence):
        read_photographs("celeba", celeba, ["gender"])


def test_what_a_set_does_not_label(celeba, fairface):
    with pytest.raises(UserError, match="celeba has no labels of 'race'; it has gender, age"):
        read_photographs("celeba", celeba, ["race"])
    with pytest.raises(UserError, match="expected celeba or fairface"):
        read_photographs("imagenet", fairface, ["gender"])
    (fairface / "fairface_label_val.csv").write_text("file,age\n")
    with pytest.raises(UserError, match="no column 'gender'"):
        read_photographs("fairface", fairface, ["gender"])


def train_on(root, out, *more, attr="gender", data="celeba"):
    return ["--data", data, "--root", str(root), "--attr", attr, "--out", str(out), "--kind", "small",
            "--width", "0.25", "--input-size", "32",
            "--epochs", "20", "--batch", "8", "--lr", "3e-3", *more]  # fmt: skip


def test_it_learns_what_the_pictures_show(celeba, tmp_path, capsys):
    """Men are the bright pictures, and gender leaves brightness nearly as it is."""
    out = tmp_path / "classifier"
    assert main(train_on(celeba, out)) == 0
    found = json.loads((out / "report.json").read_text())
    assert found["part"] == "test" and found["bad_rows"] == found["unreadable"] == 0
    assert found["gender"]["images"] == 4 and np.array(found["gender"]["confusion"]).sum() == 4
    classifier = load_classifier(out)
    assert not classifier.training and classifier.classes == {"gender": ("woman", "man")}
    rows = read_photographs("celeba", celeba, ["gender"]).parts["train"]
    with torch.no_grad():
        x = torch.stack([load(row.file, 32) for row in rows])
        right = classifier(x)["gender"].argmax(1) == torch.tensor([row.labels[0] for row in rows])
    assert right.float().mean() > 0.9
    assert Image.open(out / "confusion.png").size[0] > 100 and "gender, test" in capsys.readouterr().out
    with pytest.raises(UserError, match="is there already; give a new or an empty folder"):
        main(train_on(celeba, out))


def test_the_averages_of_BatchNorm_are_those_of_the_pictures(celeba):
    found = read_photographs("celeba", celeba, ["gender"])
    classifier = new_classifier(found, MobileNetConfig("small", 0.25, 2, 32), None, 0).train()
    settle(classifier, found.parts["train"], 4, torch.device("cpu"))
    convolution, norm = classifier.network.features[0][0], classifier.network.features[0][1]
    x = torch.stack([load(row.file, 32) for row in found.parts["train"]])
    y = convolution(classifier.preprocess(x))
    torch.testing.assert_close(norm.running_mean, y.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.01


def test_several_attributes_share_a_network(fairface, tmp_path):
    out = tmp_path / "classifier"
    main(train_on(fairface, out, "--epochs", "1", attr="gender+race", data="fairface"))
    classifier = load_classifier(out)
    assert classifier.classes == {"gender": CLASSES["gender"], "race": CLASSES["race"]}
    assert {k: v.shape for k, v in classifier(torch.zeros(2, 3, 40, 40)).items()} == {
        "gender": (2, 2),
        "race": (2, 4),
    }
    assert json.loads((out / "report.json").read_text())["part"] == "validation"


def test_the_same_seed_gives_the_same_classifier(celeba, tmp_path):
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        main(train_on(celeba, tmp_path / out, "--epochs", "1", "--seed", seed))
    a, b, c = ((tmp_path / out / "model.safetensors").read_bytes() for out in "abc")
    assert a == b != c


def test_unreadable_images_are_skipped_and_counted_or_refused(celeba, tmp_path, capsys):
    (celeba / "img_align_celeba" / "000003.jpg").write_bytes(b"not a picture")
    whole = (celeba / "img_align_celeba" / "000021.jpg").read_bytes()
    (celeba / "img_align_celeba" / "000021.jpg").write_bytes(whole[: len(whole) // 2])
    main(train_on(celeba, tmp_path / "out", "--epochs", "1"))
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["unreadable"] == 2 and found["gender"]["images"] == 3
    assert "2 images can't be read; the first is" in (said := capsys.readouterr().err)
    assert "img_align_celeba/000003.jpg: can't be read as an image (its content is of another kind)" in said
    assert run(main, train_on(celeba, tmp_path / "strict", "--strict")) == 2
    assert "2 images can't be read" in capsys.readouterr().err and not (tmp_path / "strict").exists()


def test_a_last_batch_without_a_readable_image_is_skipped(celeba, tmp_path, capsys):
    (celeba / "img_align_celeba" / "000020.jpg").write_bytes(b"not a picture")
    for n in (17, 18, 19, *range(21, 25)):
        (celeba / "img_align_celeba" / f"{n:06}.jpg").unlink()
    parts = (celeba / "list_eval_partition.txt").read_text()
    (celeba / "list_eval_partition.txt").write_text(parts.replace(" 1\n", " 0\n"))
    assert run(main, train_on(celeba, tmp_path / "out", "--epochs", "1", "--batch", "16")) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["unreadable"] == 1


def test_what_teaches_nothing_is_refused(celeba, tmp_path, capsys):
    with pytest.raises(UserError, match=r"The loss is .* at step .*; take a lower --lr than"):
        main(train_on(celeba, tmp_path / "a", "--lr", "1e30"))
    for file in (celeba / "img_align_celeba").iterdir():
        file.write_bytes(b"not a picture")
    with pytest.raises(UserError, match="nothing was learnt"):
        main(train_on(celeba, tmp_path / "b"))
    for option in ("--lr", "--width"):
        for value in ("inf", "nan", "-1", "0"):
            assert run(main, train_on(celeba, tmp_path / "c", f"{option}={value}")) == 2
            assert "expected a number above 0" in capsys.readouterr().err
    assert not any(tmp_path.glob("?/*"))


def test_a_class_whose_images_are_all_unreadable_is_refused(celeba, tmp_path):
    for n in range(1, 25, 2):
        (celeba / "img_align_celeba" / f"{n:06}.jpg").write_bytes(b"not a picture")
    with pytest.raises(
        UserError, match=r"No training image of gender 'woman' can be read.*8 images can't be read"
    ):
        main(train_on(celeba, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def read_only(**_):
    raise OSError(errno.EROFS, "Read-only file system")


def test_an_output_that_can_not_be_written_is_refused_before_the_work(celeba, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier_command, "read_photographs", lambda *_: pytest.fail("the work has begun"))
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(UserError, match=r"out: can't be made \(Read-only"):
        main(train_on(celeba, tmp_path / "out"))


def test_a_turned_photograph_is_learnt_from_upright(tmp_path):
    image, mark = Image.new("RGB", (32, 32), "white"), Image.Exif()
    image.paste("black", (0, 0, 32, 16))  # dark above
    mark[0x0112] = 6  # shown turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=mark)
    assert load(tmp_path / "a.png", 2)[0].mean(1).diff() > 1


def test_files_that_are_there_are_left_alone(celeba, tmp_path, capsys, monkeypatch):
    judge, file = tmp_path / "judge", tmp_path / "file"
    judge.mkdir()
    (judge / "model.pth").write_bytes(b"a judge as published")
    file.write_text("")
    monkeypatch.chdir(judge)
    for out, words in (
        (judge, "is there already"),
        (file, "is there already"),
        ("", "empty path"),
        (file / "x", "Not a directory"),
    ):
        assert run(main, train_on(celeba, out)) == 2
        assert words in capsys.readouterr().err
    assert [path.name for path in judge.iterdir()] == ["model.pth"]


@pytest.mark.parametrize("kind", [b"\0\1", b"\0\2", b"\0\4", b"\0\7"])
def test_a_photograph_with_broken_notes_of_its_camera_is_unreadable(tmp_path, kind):
    """Pillow turns it by them and writes them anew, which ends in a struct.error."""
    image, notes = Image.new("RGB", (32, 32)), Image.Exif()
    notes[0x0112], notes[0x0128] = (
        6,
        2,
    )  # turned; the unit of a resolution, which is no number when its type isn't
    notes = notes.tobytes()
    image.save(tmp_path / "whole.jpg", exif=notes)
    image.save(tmp_path / "broken.jpg", exif=notes.replace(b"\x01\x28\0\3", b"\x01\x28" + kind))
    assert face_features.load(tmp_path / "whole.jpg").shape == (1, 3, 32, 32)
    with pytest.raises(UserError, match=r"broken\.jpg: can't be read as an image"):
        face_features.load(tmp_path / "broken.jpg")


def test_a_cell_of_a_table_that_is_too_long_is_named(fairface, tmp_path, capsys):
    for line in (0, 1):
        lines = (fairface / "fairface_label_train.csv").read_text().splitlines()
        lines[line] = "x" * 200_000
        (fairface / "fairface_label_val.csv").write_text("\n".join(lines))
        with pytest.raises(UserError, match=r"fairface_label_val\.csv, line .*field larger than"):
            read_photographs("fairface", fairface, ["gender"])


def test_a_png_that_breaks_off_between_its_chunks_is_unreadable(tmp_path):
    """Pillow calls that a SyntaxError."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        tmp_path / "a.png"
    )
    whole = (tmp_path / "a.png").read_bytes()
    at = whole.index(b"IDAT")
    (size,) = struct.unpack(">I", whole[at - 4 : at])
    half = whole[at + 4 : at + 4 + size // 2]
    chunk = struct.pack(">I", len(half)) + b"IDAT" + half + struct.pack(">I", zlib.crc32(b"IDAT" + half))
    (tmp_path / "b.png").write_bytes(whole[: at - 4] + chunk + b"\0\0\0\4\1\2\3\4" + bytes(8))
    load(tmp_path / "a.png", 16)
    for read in (load, face_features.load):
        with pytest.raises(UserError, match=r"b\.png: can't be read as an image"):
            read(tmp_path / "b.png", 16)


def test_pictures_of_the_same_name_in_both_parts_are_two(fairface, tmp_path, capsys):
    for part in ("train", "val"):
        (fairface / part / "1.jpg").write_bytes(b"not a picture")
    main(train_on(fairface, tmp_path / "out", "--epochs", "1", data="fairface"))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["unreadable"] == 2
    assert "2 images can't be read; the first is" in capsys.readouterr().err


def test_the_head_is_new_and_the_rest_as_given(celeba, tmp_path):
    found = read_photographs("celeba", celeba, ["gender"])
    main(train_on(celeba, tmp_path / "out", "--epochs", "1"))
    config = load_classifier(tmp_path / "out").network.config
    file = str(tmp_path / "out" / "model.safetensors")
    new = new_classifier(found, config, file, seed=9).network.state_dict()
    old = load_classifier(tmp_path / "out").network.state_dict()
    assert all(
        torch.equal(new[k], old[k]) != k.startswith("classifier.3.weight")
        for k in old
        if k != "classifier.3.bias"
    )
    with pytest.raises(UserError, match="does not fit MobileNetV3-small"):
        new_classifier(found, replace(config, width=0.5), file, seed=9)
    broken = {k: v * float("nan") if v.is_floating_point() else v for k, v in old.items()}
    save_file({k: v.contiguous() for k, v in broken.items()}, file)
    with pytest.raises(UserError, match=r"model\.safetensors: .*holds what is no number"):
        new_classifier(found, config, file, seed=9)


def test_changes_keep_the_picture_and_its_light_where_the_label_is_in_it():
    x = torch.rand(64, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.3
    x[:, :, :, :12] += 0.4  # the left half is brighter
    turned = changed(x, False, np.random.default_rng(0))
    mirrored = turned[:, :, 8:16, 16:].mean((1, 2, 3)) > turned[:, :, 8:16, :8].mean((1, 2, 3))
    assert 16 < mirrored.sum() < 48
    torch.testing.assert_close(turned.mean((1, 2, 3)), x.mean((1, 2, 3)), rtol=0, atol=0.06)
    jittered = changed(x, True, np.random.default_rng(0))
    assert (jittered.mean((1, 2, 3)) - x.mean((1, 2, 3))).std() > 0.08 and jittered.abs().max() <= 1
    grey = changed(x.mean(1, keepdim=True).expand_as(x), True, np.random.default_rng(0))
    assert torch.allclose(grey, grey[:, :1].expand_as(grey), atol=1e-6)
    stretch = jittered.std(1).mean((1, 2)) / turned.std(1).mean((1, 2))  # of the colours
    lit = grey.std((2, 3))[:, 0] / turned.mean(1).std((1, 2))  # of the light: the contrast
    assert 0.08 < (stretch / lit).std() < 0.15 and abs((stretch / lit).mean() - 1) < 0.05
    assert {"race"} == NO_JITTER
    again = changed(x, True, np.random.default_rng(0))
    assert torch.equal(again, jittered)


def test_the_report_and_the_figure_are_the_counts():
    attributes = {name: CLASSES[name] for name in ("gender", "race")}
    pairs = [  # label and answer, of gender and of race
        *[((0, 0), (0, 0))] * 3, ((0, 0), (0, 1)), ((0, 1), (0, 0)), ((0, 1), (3, 3)),
        *[((1, 1), (2, 2))] * 2, ((1, 1), (3, 0)),
    ]  # fmt: skip
    labels, said = np.array(pairs).transpose(2, 0, 1)
    found = report(labels, said, attributes)
    assert found["gender"]["confusion"] == [[4, 2], [0, 3]] and found["gender"]["images"] == 9
    assert found["race"]["confusion"] == [[4, 1, 0, 0], [0] * 4, [0, 0, 2, 0], [1, 0, 0, 1]]
    assert found["gender"]["accuracy"] == pytest.approx(7 / 9)
    assert found["gender"]["of_class"] == {"woman": 4 / 6, "man": 1.0}
    assert found["gender"]["within"] == {"race": {"WMELH": 0.8, "Asian": None, "Black": 1.0, "Indian": 0.5}}
    assert found["race"]["of_class"] == {"WMELH": 0.8, "Asian": None, "Black": 1.0, "Indian": 0.5}
    assert found["race"]["within"] == {"gender": {"woman": 5 / 6, "man": 2 / 3}}
    nothing = np.zeros((0, 2), int)
    assert report(nothing, nothing, attributes)["race"]["accuracy"] is None
    figure = np.asarray(confusion_figure(confusions(labels, said, attributes), attributes))
    full = (np.abs(figure.astype(int) - (31, 78, 140)).sum(2) == 0).sum()
    assert 1.2 * 62 * 62 < full < 2 * 63 * 63  # two cells hold all of their row, less the ink


@pytest.mark.parametrize(
    "option", [["--attr", "height"], ["--batch", "1"], ["--epochs", "0"], ["--device", "tpu"]]
)
def test_wrong_options_are_one_sentence(celeba, tmp_path, option, capsys):
    assert run(main, [*train_on(celeba, tmp_path / "out"), *option]) == 2
    assert capsys.readouterr().err.count("\n") == 1
