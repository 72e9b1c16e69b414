"""Folders of images by prompt, labelled pictures, and tables of labels, read and refused."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fairref.commands import cli, evaluate
from fairref.emoji.labelled import write_labelled
from fairref.emoji.pictures import draw
from fairref.emoji.stages import ATTRIBUTES, balanced_scene, generator_for, labels
from fairref.errors import UserError
from fairref.evaluation.folders import evaluate_folder, folder_report, judge_files, read_folder
from fairref.evaluation.judging import EvaluationSettings, draw_images, judge
from fairref.evaluation.labels import read_labels
from fairref.evaluation.parts import clip_t
from fairref.evaluation.statistics import bias_report
from fairref.fairness.attributes import parse_targets
from fairref.files.datasets import read_labelled
from fairref.files.images import read_square, to_image
from fairref.generation.drawing import Drawing
from fairref.processes import Processes
from fairref.prompts import occupation_prompt

CLASSES = {"gender": ("woman", "man"), "glasses": ("with", "without")}


def picture(path, size=(4, 4), colour="white"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two prompts of three and one images, and files that are none."""
    for name in (
        "a pilot/2.png",
        "a pilot/1.JPG",
        "a pilot/3.webp",
        "nurse/x.jpeg",
        ".hidden/x.png",
        "nurse/seed7-grid.png",
    ):
        picture(tmp_path / name)
    for name in ("a pilot/1.bmp", "a pilot/._1.png", "notes.md"):
        (tmp_path / name).write_text("no image")
    return tmp_path


def test_a_folder_has_a_subfolder_of_images_for_each_prompt(folder, caplog):
    found = read_folder(folder)
    assert "left out 1 files that are no .png, .jpg, .jpeg, .webp images, such as 1.bmp" in caplog.text
    assert {prompt: [file.name for file in files] for prompt, files in found.files.items()} == {
        "a pilot": ["1.JPG", "2.png", "3.webp"],
        "nurse": ["x.jpeg"],
    }
    (folder / "prompts.json").write_text('{"nurse": "a photo of a nurse"}')
    found = read_folder(folder)
    assert list(found.files) == ["a pilot", "a photo of a nurse"]
    assert found.names == {"a pilot": "a pilot", "a photo of a nurse": "nurse"}


@pytest.mark.parametrize(
    "prompts, words",
    [
        ({"nurses": "a nurse"}, "prompts.json: found 'nurses'"),
        ({"nurse": 3}, "prompts.json: found 'nurse': 3"),
        ({"nurse": " "}, "prompts.json: found 'nurse': ' '"),
        ({"nurse": "a pilot"}, "a pilot and nurse have one prompt, 'a pilot'"),
    ],
)
def test_prompts_of_no_subfolder_are_refused(folder, prompts, words):
    (folder / "prompts.json").write_text(json.dumps(prompts))
    with pytest.raises(UserError) as caught:
        read_folder(folder)
    assert words in str(caught.value)


def test_folders_without_images_are_refused(folder):
    (folder / "empty").mkdir()
    for path, words in (
        ("nowhere", "no such folder"),
        ("nurse", "has no subfolder"),
        (".", "empty: has no image"),
    ):
        with pytest.raises(UserError, match=words):
            read_folder(folder / path)


def test_an_image_becomes_a_square_of_the_bundles_size(tmp_path):
    x = torch.randint(256, (3, 8, 8), generator=torch.Generator().manual_seed(0))
    Image.fromarray(x.permute(1, 2, 0).byte().numpy()).save(tmp_path / "a.png")
    torch.testing.assert_close(read_square(tmp_path / "a.png", 8), x / 127.5 - 1)
    assert read_square(tmp_path / "a.png", 4).shape == (3, 4, 4)
    wide = read_square(picture(tmp_path / "wide.png", (8, 4)), 8)
    assert (wide[:, 2:6] == 1).all() and (wide[:, :2] == -1).all() and (wide[:, 6:] == -1).all()
    tall = read_square(picture(tmp_path / "tall.png", (4, 8)), 8)
    assert torch.equal(tall, wide.transpose(1, 2))


def test_the_small_worlds_labelled_pictures(tmp_path):
    write_labelled(tmp_path / "new", 6)
    read = read_labelled(tmp_path / "new", ATTRIBUTES)
    scene = balanced_scene(6, generator_for(0, "labelled", 0), portraits=True)
    truth, rows = labels(scene), read.parts["test"]
    assert [row.labels for row in rows] == list(zip(*(truth[a].tolist() for a in ATTRIBUTES), strict=True))
    x = torch.stack([read_square(row.file, 64) for row in rows])
    assert (x - draw(scene)).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "file,gender\na.png,woman\nb.png,lady\n",
            "line 3: gender is 'lady'; expected woman, man, or nothing",
        ),
        ("file,gender\nno.png,woman\n", "no.png is no file"),
        ("file,age\na.png,old\n", "no column gender or glasses"),
        ("file,gender\n", "has no row"),
        ("gender\nwoman\n", "no column 'file'"),
    ],
)
def test_wrong_tables_of_labelled_pictures_are_refused(tmp_path, text, words):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_labelled(tmp_path, CLASSES)


def test_fairfaces_validation_part_is_labelled(tmp_path):
    """In the order of the classes that are asked for; an attribute of other classes is left out."""
    columns = "file,age,gender,race,service_test\n"
    rows = [
        f"{{part}}/{i}.jpg,20-29,{gender},Black,True\n" for i, gender in enumerate(("Male", "Female", "Male"))
    ]
    for part in ("train", "val"):
        for i in range(3):
            picture(tmp_path / part / f"{i}.jpg")
        text = columns + "".join(rows).format(part=part)
        (tmp_path / f"fairface_label_{part}.csv").write_text(text)
    asked = {"gender": ("man", "woman"), "race": ("Black", "White")}
    found = read_labelled(tmp_path, asked)
    assert found.attributes == {"gender": ("man", "woman")}
    assert [(row.file.parent.name, row.labels) for row in found.parts["test"]] == [
        ("val", (0,)),
        ("val", (1,)),
        ("val", (0,)),
    ]
    with pytest.raises(
        UserError, match="fairface labels gender, race, age, none of them with the classes of hat"
    ):
        read_labelled(tmp_path, {"hat": ("a", "b")})
    with pytest.raises(UserError, match=r"holds neither labels\.csv nor CelebA nor FairFace"):
        read_labelled(tmp_path / "train", asked)


def test_labels_of_some_images(tmp_path):
    path, images = tmp_path / "l.csv", [["0", "1", "2"], ["0", "1"]]
    prompts = [("pilot", "a photo of a pilot"), ("nurse",)]
    path.write_text(
        "prompt,image,gender,glasses\npilot,2,man,\na photo of a pilot,0,woman,with\nnurse,1,,without\n"
    )
    found = read_labels(path, CLASSES, prompts, images, ["before", "after"])["after"]  # the last model's
    assert [row.tolist() for row in found["gender"]] == [[0, -1, 1], [-1, -1]]
    assert [row.tolist() for row in found["glasses"]] == [[0, -1, -1], [-1, 1]]
    path.write_text("model,prompt,image,gender\nafter,nurse,1,man\nbefore,nurse,1,woman\n")
    by_model = read_labels(path, CLASSES, prompts, images, ["before", "after"])
    assert {model: rows["gender"][1].tolist() for model, rows in by_model.items()} == {
        "after": [-1, 1],
        "before": [-1, 0],
    }
    for text, words in (
        (
            "model,prompt,image,gender\nraw,nurse,1,man\n",
            "line 2: image '1' of 'nurse' by 'raw' is not judged",
        ),
        ("prompt,image,gender\ncook,0,man\n", "line 2: prompt 'cook' is not judged here"),
        ("prompt,image,gender\nnurse,2,man\n", "line 2: image '2' of 'nurse' is not judged here"),
        ("prompt,image,gender\nnurse,1,man\nnurse,1,woman\n", "line 3: the image is in the table twice"),
        ("prompt,image,gender\nnurse,1,boy\n", "line 2: gender is 'boy'"),
        ("prompt,image,age\nnurse,1,old\n", "no column gender or glasses"),
        ("prompt,gender\nnurse,man\n", "no column 'image'"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_labels(path, CLASSES, prompts, images)
    path.unlink()
    with pytest.raises(
        UserError, match="no such file of labels; write one with the columns prompt, image, gender"
    ):
        read_labels(path, CLASSES, prompts, images)


@pytest.fixture
def drawn(loaded_tiny, tmp_path):
    """Images that the tiny bundle drew, as files, and how its own evaluation judges them; none is near a boundary."""
    target = parse_targets(["gender", "skin_tone"], loaded_tiny.attributes)
    settings = EvaluationSettings(loaded_tiny, target, Drawing(2, 2.0))
    judged = []
    for name, n in (("singer", 12), ("farmer", 9)):
        x = draw_images(settings, loaded_tiny, occupation_prompt(name), n)
        p = judge(settings, x).probabilities["classifier"]
        margins = torch.stack([rows.topk(2, 1)[0].diff(dim=1).abs()[:, 0] for rows in p.values()])
        x = x[(margins > 0.02).all(0)]
        judged.append(judge(settings, x))
        (tmp_path / name).mkdir()
        for i, image in enumerate(x):
            to_image(image).save(tmp_path / name / f"{i:02}.png")
    prompts = {name: occupation_prompt(name) for name in ("singer", "farmer")}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    assert len(judged[0]) > len(judged[1]) > 3
    return settings, tmp_path, judged


def test_images_of_any_tool_are_judged_as_drawn_ones_are(drawn, tiny_folder, tmp_path, capsys):
    settings, folder, (singers, farmers) = drawn
    labels = tmp_path / "labels.csv"
    labels.write_text("prompt,image,gender\nsinger,00.png,man\nsinger,02.png,woman\nfarmer,01.png,man\n")
    options = ["--weights", str(tiny_folder), "--attr", "gender,skin_tone", "--images", str(folder)]
    more = ["--images-before", str(folder), "--labels", str(labels)]
    assert cli.run(evaluate.main, [*options, *more]) == 0
    found = json.loads(capsys.readouterr().out)
    classes = settings.target.classes
    expected = bias_report([farmers, singers], ["farmer", "singer"], classes)
    assert found["images"] == {"farmer": len(farmers), "singer": len(singers)} == expected["images"]
    corrected = found["attributes"]["gender"]["judges"]["classifier"].pop("corrected")
    for alone in found["attributes"].values():
        assert (
            alone.pop("paired")["classifier"]["difference"]
            == 0
            == alone.pop("flips")["classifier"]["changed"]
        )
    assert corrected["labelled"] == [1, 2] and "prediction-powered" in corrected["method"]
    for key in ("noise_floor", "attributes", "faceless"):
        assert found[key] == expected[key]
    counts = found["judges"]["classifier"]["counts"]
    assert counts == expected["judges"]["classifier"]["counts"] and len(set(map(tuple, counts.values()))) == 2
    of_drawn = clip_t(
        settings, [farmers, singers], [occupation_prompt(name) for name in ("farmer", "singer")]
    )
    assert found["clip_t"]["matched"] == pytest.approx(of_drawn["matched"], abs=1e-3)
    assert found["clip_i"] == pytest.approx(1, abs=1e-6) and found["pairs"] == len(singers) + len(farmers)
    truth = [(singers, 0, 1), (singers, 2, 0), (farmers, 1, 1)]
    matrix = [[0, 0], [0, 0]]
    for s, image, k in truth:
        matrix[k][int(s.classes["classifier"]["gender"][image])] += 1
    (known,) = found["confusion"]["classifier"]["gender"]
    assert known["counts"] == matrix and known["source"] == "labels of these images"


def test_each_process_judges_its_share_of_the_images(drawn):
    settings, folder, _ = drawn
    files = [file for of_prompt in read_folder(folder).files.values() for file in of_prompt]
    parts = []
    for rank in range(3):
        processes = SimpleNamespace(part=Processes(rank, 3).part, gather=lambda rows, N: rows, first=False)
        parts.append(judge_files(replace(settings, processes=processes), files[:2], ""))
    assert sorted(map(len, parts)) == [0, 1, 1]
    whole = judge_files(settings, files[:2], "")
    for name, rows in whole.tensors().items():
        torch.testing.assert_close(torch.cat([part.tensors()[name] for part in parts]), rows)


def test_likeness_is_of_images_with_the_same_prompt_and_name(drawn, tmp_path_factory):
    settings, folder, (singers, farmers) = drawn
    other = tmp_path_factory.mktemp("before")
    for name, file in (("singer", "01.png"), ("cook", "00.png")):
        (other / name).mkdir()
        shutil.copy(folder / "farmer" / "02.png", other / name / file)
    (other / "prompts.json").write_text(json.dumps({"singer": occupation_prompt("singer")}))
    report = evaluate_folder(settings, read_folder(folder), read_folder(other)).report
    a, b = singers.features["clip"][1], farmers.features["clip"][2]
    assert report["pairs"] == 1 and report["clip_i"] == pytest.approx(float(a @ b), abs=1e-3)
    (other / "singer" / "01.png").rename(other / "singer" / "1.png")
    with pytest.raises(UserError, match="has no image of the same prompt and name"):
        folder_report(settings.bundle, folder, before=other)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--images", ".", "--steps", "3"], "--steps has no effect with --images"),
        (["--images", ".", "--adapter", "x"], "--adapter has no effect with --images"),
        (["--images", ".", "-n", "3"], "--num-images has no effect with --images"),
        (["--images-before", "."], "--images-before has no effect without --images"),
        (["--sweep", "guidance=1,2", "--labels", "x"], "--labels has no effect with --sweep"),
    ],
)
def test_options_without_effect_are_refused(capsys, options, words):
    assert cli.run(evaluate.main, options) == 2
    assert words in capsys.readouterr().err
