"""fairref figures: each figure's files say what was measured, whoever measured it; nothing is drawn twice in vain."""

import base64
import csv
import io
import json
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from tiny_run import make_setup, moved

from fairref.bundle.loading import load_bundle
from fairref.commands import cli
from fairref.commands import figures as command
from fairref.evaluation.evaluation import EvaluationOptions, prepare
from fairref.evaluation.judging import EvaluationSettings, draw_images, judge
from fairref.fairness.attributes import JointTarget, parse_targets
from fairref.files.images import to_image
from fairref.files.weights import fingerprint, read
from fairref.generation.adapters import save_adapter
from fairref.generation.drawing import Drawing
from fairref.reporting import comparison, figures
from fairref.reporting.gallery import Picture, gallery

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def run_folder(loaded_tiny, tmp_path_factory):
    """A run's folder with an adapter that draws other images than the bundle, made for 30 % women."""
    folder = tmp_path_factory.mktemp("runs") / "gender"
    folder.mkdir()
    setup = make_setup(load_bundle(loaded_tiny.path), rank=2)
    info = {"base": setup.bundle.fingerprints, "classes": {"gender": ["woman", "man"]}, "target": [0.3, 0.7]}
    save_adapter(folder / "adapter.safetensors", dict(moved(setup)[1].adapter.named_parameters()), info)
    return folder


def run(*argv):
    return cli.run(command.main, list(map(str, argv)))


def table(path):
    return list(csv.DictReader(path.open(newline="", encoding="utf-8")))


def svg(path):
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


CLASSES = {"gender": ("woman", "man"), "tone": ("light", "medium", "dark")}


def reports(shape, seed=0):
    """Reports before and after on five prompts, of counts of each joint class."""
    rng = np.random.default_rng(seed)
    counts = {f"prompt {p}": rng.integers(0, 9, shape) for p in range(5)}
    counts["prompt 4"][:] = 0  # all of its images are faceless
    for label in ("before", "after (ema)"):
        flat = {name: table.ravel().tolist() for name, table in counts.items()}
        report = {"attribute": "gender,tone", "concept": "jobs", "part": "test", "prompts": 5, "images": 60}
        report["judges"] = {"classifier": {"counts": flat}}
        report["attributes"] = {
            name: {
                "judges": {
                    "classifier": {
                        "share": dict.fromkeys(CLASSES[name]),
                        "counts": {p: t.sum(1 - a).tolist() for p, t in counts.items()},
                    }
                }
            }
            for a, name in enumerate(CLASSES)
        }
        yield label, report, counts
        counts = {name: table[..., ::-1] for name, table in counts.items()}


def test_figure_9_has_a_chart_for_each_class_that_says_something_new():
    made = list(reports((2, 3)))
    classes, target = CLASSES, JointTarget(CLASSES, np.outer([0.6, 0.4], [0.5, 0.25, 0.25]))
    drawn = list(comparison.figures_9(target, [{label: report for label, report, _ in made}]))
    assert [figure.stem for figure in drawn] == ["fig9-gender", *(f"fig9-tone-{k}" for k in classes["tone"])]
    assert [figure.rows[0]["class"] for figure in drawn] == ["man", *classes["tone"]]  # the rarer of two
    assert [figure.rows[0]["target"] for figure in drawn] == pytest.approx([0.4, 0.5, 0.25, 0.25])
    rows = {row["prompt"]: row for row in drawn[3].rows}
    for label, _, counts in made:
        for prompt, of_prompt in counts.items():
            wanted = None if prompt == "prompt 4" else of_prompt.sum(0)[2] / of_prompt.sum()
            assert rows[prompt][label] == wanted
    before = [row["before"] for row in drawn[3].rows]
    assert all(
        row["before low"] < row["before"] + 1e-9 < row["before high"] + 2e-9 for row in drawn[3].rows[:-1]
    )
    assert before[-1] is None and before[:-1] == sorted(before[:-1])


def test_figure_9_says_what_the_evaluation_of_the_run_counted(
    run_folder, tmp_path, loaded_tiny, monkeypatch, caplog
):
    """Read from the run's evaluation, or drawn again: one table. Another adapter's evaluation is not believed."""
    few = ("--weights", loaded_tiny.path, "--adapter", run_folder, "-n", 3, "--steps", 2)
    assert run("9", *few, "--out", tmp_path / "drawn") == 0
    assert "figure 9 draws" in caplog.text
    drawn = table(tmp_path / "drawn" / "fig9.csv")
    options = {"adapter": run_folder, "images": 3, "explicit_images": 0, "steps": 2}
    this_one = prepare(loaded_tiny, EvaluationOptions(**options))
    ((_, before), (_, after)) = this_one.of_part(*this_one.parts)  # whose judgements are kept
    evaluation = {"before": {"test": before.report}, "after (ema)": {"test": after.report}}
    made = evaluation["after (ema)"]["test"]
    made["fingerprint"] = fingerprint(read(run_folder / "adapter.safetensors"))
    (run_folder / "evaluation.json").write_text(json.dumps(evaluation))
    monkeypatch.setattr(command, "measured", None)
    asked = ("9", *few[:4], "--steps", 2, "--out", tmp_path / "read")
    assert run(*asked) == 0
    kept = table(tmp_path / "read" / "fig9.csv")
    assert [list(row.values()) for row in drawn] == [list(row.values()) for row in kept]
    assert {row["target"] for row in drawn} == {"0.3"} and {row["class"] for row in drawn} == {"woman"}
    counts = made["judges"]["classifier"]["counts"]
    counts.update({prompt: [1 + p, 2 - p] for p, prompt in enumerate(counts)})
    (run_folder / "evaluation.json").write_text(json.dumps(evaluation))
    assert run(*asked) == 0
    read_again = {row["prompt"]: float(row["after"]) for row in table(tmp_path / "read" / "fig9.csv")}
    assert read_again == pytest.approx({prompt: (1 + p) / 3 for p, prompt in enumerate(counts)})
    svg_text = (tmp_path / "read" / "fig9.svg").read_text(encoding="utf-8")
    assert "Share of “woman” (apparent gender) by the classifier" in svg_text
    assert len(comparison.read_evaluation(this_one)) == 1
    for name, other in {"seed": 1, "steps": 3, "guidance": 9.0, "padding": "own", "strength": 0.5}.items():
        assert (
            comparison.read_evaluation(prepare(loaded_tiny, EvaluationOptions(**options | {name: other})))
            == []
        )
        assert f"differs in {name}, so" in caplog.text
    for place, name, said in ((made, "fingerprint", "adapter"), (made["made"], "weights", "weights")):
        kept = place[name]
        place[name] = "another"
        (run_folder / "evaluation.json").write_text(json.dumps(evaluation))
        assert comparison.read_evaluation(this_one) == [] and f"differs in {said}, so" in caplog.text
        place[name] = kept
    (run_folder / "evaluation.json").write_text('{"before": 1, "after (ema)": [2]}')
    with pytest.raises(figures.UserError, match=r"evaluation\.json: not what an evaluation"):
        comparison.read_evaluation(this_one)
    (run_folder / "evaluation.json").unlink()


def test_figure_8_shows_each_image_with_what_the_classifier_sees(tmp_path, loaded_tiny):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a nurse\n")
    few = ("--weights", loaded_tiny.path, "--prompts", prompts, "-n", 2, "--steps", 2, "--seed", 7)
    assert run("8", *few, "--attr", "gender,skin_tone", "--guidance", 3, "--out", tmp_path / "out") == 0
    target = parse_targets(["gender", "skin_tone"], loaded_tiny.attributes)
    settings = EvaluationSettings(loaded_tiny, target, Drawing(2, 3.0), 7)
    x = draw_images(settings, loaded_tiny, "a photo of a nurse", 2)
    judged = judge(settings, x)
    embedded = [
        Image.open(io.BytesIO(base64.b64decode(e.get("href").split(",")[1])))
        for e in svg(tmp_path / "out" / "fig8.svg").iter(f"{SVG}image")
    ]
    assert len(embedded) == 2
    assert all(np.array_equal(a, to_image(b)) for a, b in zip(embedded, x, strict=True))
    rows = table(tmp_path / "out" / "fig8.csv")
    assert [(row["image"], row["attribute"]) for row in rows] == [
        (str(i), name) for i in range(2) for name in target.classes
    ]
    for row in rows:
        i, names = int(row["image"]), target.classes[row["attribute"]]
        k = int(judged.classes["classifier"][row["attribute"]][i])
        probabilities = judged.probabilities["classifier"][row["attribute"]]
        assert row["class"] == names[k]
        assert float(row["probability"]) == pytest.approx(float(probabilities[i, k]), abs=6e-5)


def test_a_gallery_places_boxes_and_bars_by_their_numbers():
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(4)]
    seen = [{"a": ("x", 0.9), "b": ("v", 1.0)}, {"a": ("y", 0.25)}, {}, {"a": ("x", 0.5), "b": ("u", 0.4)}]
    box = (0.25, -0.125, 0.75, 0.5)
    pictures = [Picture(image, box, of) for image, of in zip(images, seen, strict=True)]
    root = ElementTree.fromstring(
        gallery(
            {"p & q": {"before": pictures[:2], "after": pictures[2:]}}, {"a": "xy", "b": "uv"}, "T", "note"
        )
    )
    cells = [g for g in root.iter(f"{SVG}g") if g.find(f"{SVG}image") is not None]
    assert len(cells) == 4
    for cell, of in zip(cells, seen, strict=True):
        left, top, side = (float(cell.find(f"{SVG}image").get(key)) for key in ("x", "y", "width"))
        for e in cell.findall(f"{SVG}rect"):
            x, y, w, h = (float(e.get(key)) for key in ("x", "y", "width", "height"))
            wanted = (
                left + side / 4,
                top,
                left + 0.75 * side,
                top + side / 2,
            )  # what is outside the image is cut
            np.testing.assert_allclose((x, y, x + w, y + h), wanted, atol=0.03)
        bars = [e for g in cell.findall(f"{SVG}g") if g.get("class") != "ink" for e in g]
        lengths = [float(bar.get("width")) / side for bar in bars]
        np.testing.assert_allclose(lengths, [p for _, p in of.values()], atol=1e-3)
        said = "".join(cell.itertext())
        assert all(name in said and f"{p:.0%}" in said for name, p in of.values())
    titles = [cell.find(f"{SVG}title").text for cell in cells]
    assert (
        titles[0] == "p & q, image 1, before: x 90%, v 100%." and titles[2] == "p & q, image 1, after: none."
    )


def test_the_gradients_figures_hold_their_numbers(tmp_path, tiny_folder, monkeypatch):
    scales, descent = figures.scales, figures.descent
    monkeypatch.setattr(figures, "scales", lambda *a, **k: scales(*a, S=2, R=2, **k))
    monkeypatch.setattr(figures, "descent", lambda *a: descent(*a, iterations=2, seeds=1, N=1, S=2))
    wanted = ("6b", "fig6a", "7", "--modes", "none,exact", "--over", "text_encoder", "--guidance", 5)
    assert run(*wanted, "--weights", tiny_folder, "--out", tmp_path / "a" / "b") == 0
    names = {path.name for path in (tmp_path / "a" / "b").iterdir()}
    stem = "fig6b-text_encoder-5"
    assert names == {"fig6a.csv", "fig6a.svg", f"{stem}.csv", f"{stem}.svg", "fig7.svg"}
    rows = table(tmp_path / "a" / "b" / "fig6a.csv")
    assert [(row["curve"], row["iteration"]) for row in rows] == [
        (mode, str(i)) for mode in ("none", "exact") for i in range(2)
    ]
    about = svg(tmp_path / "a" / "b" / "fig6a.svg").find(f"{SVG}desc").text
    assert (
        "none: {:.3g} to {:.3g}.".format(*(float(row["mean"]) for row in rows[:2])).replace("0.", ".")
        in about
    )


def test_a_png_has_two_pixels_for_one(tmp_path):
    pytest.importorskip("resvg_py")
    assert run("7", "--png", "--out", tmp_path) == 0
    width, height = (float(svg(tmp_path / "fig7.svg").get(key)) for key in ("width", "height"))
    image = Image.open(tmp_path / "fig7.png").convert("RGB")
    assert image.size == (round(2 * width), round(2 * height))
    assert image.getpixel((0, 0)) == (255, 255, 255) and np.asarray(image).min() < 100


def test_mistakes_are_said_before_the_work(tmp_path, tiny_folder, run_folder, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    shutil.copytree(tiny_folder, tmp_path / "blind")
    manifest = json.loads((tmp_path / "blind" / "bundle.json").read_text())
    (tmp_path / "blind" / "bundle.json").write_text(
        json.dumps({k: v for k, v in manifest.items() if k != "clip"})
    )
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    for argv, said in (
        (["10"], "is 10, expected some of 6a, 6b, 7, 8, 9"),
        (["6b", "--png"], 'pip install -e ".[figures]"'),
        (["6b", "--out", tmp_path / "file" / "x"], "can't be made"),
        (["7"], "--weights is for 6a, 6b, 8, 9 and has no effect on 7"),
        (["6a", "6b", "--attr", "nonsense"], "--attr is for 8, 9 and has no effect on 6a and 6b"),
        (["8", "--seed", 1, "--modes", "paper"], "--modes is for 6a"),
        ([], "required: figures"),
        (["6a", "--modes", "paper,wrong"], "the gradient is 'wrong'"),
        (["6a", "--modes", "paper,last:11"], "whole runs with 10 sampling steps"),
        (["6a", "--modes", "drtune:2"], "whole runs with 10 sampling steps"),
        (["8", "--weights", "nowhere"], "no such weights"),
        (["6a", "--weights", tmp_path / "blind"], "has no CLIP, which figure 6a needs"),
        (["8", "--adapter", tmp_path / "none"], "no such adapter"),
        (["9", "--prompts", "occupations", "--part", "test", "--attr", "hair"], "hair"),
        (["6b", "--strength", "0.5"], "--strength is of an --adapter"),
    ):
        capsys.readouterr()
        assert run("--weights", tiny_folder, *argv) == 2, argv
        captured = capsys.readouterr()
        assert said in captured.err and captured.err.count("\n") == 1 and not captured.out, captured.err
