"""The front doors, from the command line to the files; a user's mistake is one sentence and exit code 2."""

import errno
import io
import json
import os
import shutil
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor
from tiny_bundle import RECIPE

from fairref.bundle.recipe import resolve
from fairref.commands import cli, emoji, evaluate, sample, train
from fairref.errors import UserError
from fairref.evaluation import judging
from fairref.evaluation.judging import EvaluationSettings, draw_images
from fairref.fairness.attributes import parse_targets
from fairref.files.images import to_image
from fairref.files.sheets import COLOURS, SIDE, Layout, enlarged
from fairref.files.weights import fingerprint, read, read_info, write
from fairref.generation.adapters import load_adapter
from fairref.generation.drawing import Drawing
from fairref.settings import Recipe, RunOptions
from fairref.training import checkpoints

PROMPT = "a photo of the face of a pilot, a person"


@pytest.fixture(scope="module")
def weights(tiny_folder):
    return str(tiny_folder)


@pytest.fixture(scope="module")
def run_folder(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert (
        cli.run(train.main, ["--attr", "gender", "--weights", weights, "--out", str(folder), "--lr", "0.05"])
        == 0
    )
    return folder


def refused(capsys, main, *argv):
    """The one sentence of a refused command."""
    capsys.readouterr()
    assert cli.run(main, list(argv)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "Traceback" not in message
    return message


def refused_at_last(capsys, main, *argv):
    """The last sentence of a command that was refused in its course."""
    capsys.readouterr()
    assert cli.run(main, list(argv)) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message.strip().splitlines()[-1]


def test_train_leaves_what_the_documentation_says(run_folder, weights):
    names = {path.name for path in run_folder.iterdir()}
    assert names == {
        "settings.json",
        "metrics.jsonl",
        "adapter.safetensors",
        "adapter_raw.safetensors",
        "checkpoint-000001.safetensors",
        "checkpoint-000002.safetensors",
        "evaluation.json",
        "judged",
        "judged.csv",
        "before_after.png",
        "pictures.png",
        "report.html",
    }
    settings = json.loads((run_folder / "settings.json").read_text())
    assert settings["weights"] == weights and settings["target"]["table"] == [0.5, 0.5]
    shares = {"lambda_2": {"gender": 0.2}, "lambda_3": {"gender": 0.2}}
    resolved = Recipe(**{**RECIPE, **shares, "lr": 0.05})
    assert settings["recipe"] == json.loads(json.dumps(resolved.to_dict()))
    metrics = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2
    assert {
        "iteration",
        "prompt",
        "S",
        "loss",
        "align",
        "image",
        "cost",
        "bias",
        "norm",
        "lr",
        "seconds",
    } <= set(metrics[0])
    evaluation = json.loads((run_folder / "evaluation.json").read_text())
    assert set(evaluation) == {"before", "after (ema)", "after (raw)"}
    assert set(evaluation["before"]) == {"test", "train"}
    assert evaluation["after (raw)"]["test"]["clip_i"] < 1
    for name, file in (("ema", "adapter"), ("raw", "adapter_raw")):
        made = fingerprint(read(run_folder / f"{file}.safetensors"))
        assert evaluation[f"after ({name})"]["train"]["fingerprint"] == made


def test_the_last_picture_has_a_row_before_and_a_row_after_from_the_same_noise(run_folder, loaded_tiny):
    bundle = loaded_tiny
    target = parse_targets(["gender"], bundle.attributes)
    drawing = Drawing(RECIPE["eval_steps"], RECIPE["eval_guidance"])
    settings = EvaluationSettings(bundle, target, drawing)
    prompts = [f"a photo of the face of a {job}, a person" for job in ("singer", "farmer")]
    models = bundle, load_adapter(bundle, run_folder / "adapter.safetensors")
    rows = [draw_images(settings, model, prompt, 12) for prompt in prompts for model in models]
    assert not any(torch.equal(rows[i], rows[i + 1]) for i in (0, 2))
    with Image.open(run_folder / "before_after.png") as found:
        assert found.text["prompts"] == "\n".join(prompts) and "before and after (ema)" in found.text["rows"]
        layout = Layout((SIDE, SIDE), 12, 1)
        layout = replace(layout, head=found.height - layout.height(2))
        for i, (x, (p, r)) in enumerate(zip(rows, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True)):
            for n, image in enumerate(x):
                left, top = layout.image(p, r, n)
                drawn = found.crop((left, top, left + SIDE, top + SIDE))
                assert drawn.tobytes() == enlarged(to_image(image)).tobytes(), (i, n)
        # the bars show the counts of all evaluated images
        results = json.loads((run_folder / "evaluation.json").read_text())
        for r, label in enumerate(("before", "after (ema)")):
            counts = results[label]["test"]["judges"]["classifier"]["counts"]
            for p, job in enumerate(("singer", "farmer")):
                left, top, right, _ = layout.bar(p, r, 0)
                women = ImageColor.getrgb(COLOURS[0])
                shown = [found.getpixel((x, top)) == women for x in range(left, right)]
                share = counts[job][0] / sum(counts[job])
                # two columns at most are the target's line
                assert abs(sum(shown) - share * (right - left)) <= 2, (label, job)


def test_a_run_of_the_default_bundle_prints_what_two_judges_say(tmp_path, capsys):
    """Everything that the small world has: a detector, L_face, DINO, the template judge, validation and grids."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\na photo of the face of a nurse, a person\n")
    few = "--iterations 1 --batch 3 --steps 2 --eval-steps 3 --eval-images 2 --evaluate ema"
    few += " --validate-every 1 --validate-images 2 --grid-every 1"
    out = tmp_path / "run"
    assert (
        cli.run(train.main, ["--attr", "gender", *few.split(), "--prompts", str(prompts), "--out", str(out)])
        == 0
    )
    said = capsys.readouterr().out
    after = said[said.index("after (ema):") :]
    for text in (said[said.index("before:") : said.index("after (ema):")], after):
        assert "gender bias, 2 " in text and "classifier" in text and "templates" in text and "CLIP-T" in text
    assert "CLIP-I" in after and "DINO" in after
    line = json.loads((out / "metrics.jsonl").read_text())
    assert {"face", "faces", "validation"} <= set(line) and (out / "grids").is_dir()


def test_a_run_for_two_attributes_and_two_networks(weights, tmp_path, capsys):
    out = str(tmp_path / "run")
    options = ["--attr", "gender,skin_tone", "--target", "skin_tone=0.2,0.3,0.5", "--component", "both"]
    options += ["--guidance", "1:3", "--C", "0.5", "--eval-images-train", "0", "--evaluate", "ema"]
    assert cli.run(train.main, [*options, "--weights", weights, "--out", out]) == 0
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["target"]["table"] == [pytest.approx([0.1, 0.15, 0.25])] * 2
    assert settings["recipe"]["guidance"] == [1, 3] and settings["recipe"]["lambda_2"]["skin_tone"] == 0.6
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())["after (ema)"]["test"]
    assert report["classes"][4] == "man, medium" and len(report["judges"]["classifier"]["share"]) == 6
    assert set(report["attributes"]) == {"gender", "skin_tone"}
    joint, gender = (
        r["judges"]["classifier"]["counts"]["singer"] for r in (report, report["attributes"]["gender"])
    )
    assert [sum(joint[:3]), sum(joint[3:])] == gender and sum(gender) == 2
    capsys.readouterr()
    measured = ["--weights", weights, "--adapter", out, "--attr", "gender,skin_tone", "-n", "2"]
    assert cli.run(evaluate.main, measured) == 0
    shown = capsys.readouterr()
    evaluated = json.loads(shown.out)["judges"]
    for judge, of_judge in report["judges"].items():
        assert of_judge.pop("target_floor")
        assert 0 < of_judge.pop("from_target")["mean"] <= 1  # of the run; the command above names no target
        assert of_judge.pop("sure")["worst_prompt"] != evaluated[judge].pop("sure")["worst_prompt"]
    assert evaluated == report["judges"] and "skin_tone bias alone" in shown.err


def test_sample_writes_pictures_that_say_how_they_were_made(weights, run_folder, tmp_path, capsys):
    options = ["--weights", weights, "-n", "3", "--seed", "7", "--steps", "3", "--guidance", "1.5"]
    assert cli.run(sample.main, [PROMPT, *options, "--out", str(tmp_path / "plain")]) == 0
    assert str(tmp_path / "plain" / "seed7-grid.png") in capsys.readouterr().out
    assert (
        cli.run(
            sample.main, [PROMPT, *options, "--adapter", str(run_folder), "--out", str(tmp_path / "adapted")]
        )
        == 0
    )
    names = ["seed7-000.png", "seed7-001.png", "seed7-002.png", "seed7-grid.png"]
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == names
    picture, adapted = (Image.open(tmp_path / name / names[1]) for name in ("plain", "adapted"))
    assert picture.size == (32, 32)
    assert picture.text["prompt"] == PROMPT and picture.text["seed"] == "7" and picture.text["image"] == "1"
    settings = json.loads(picture.text["settings"])
    assert (settings["steps"], settings["guidance"], settings["adapters"]) == (3, 1.5, [])
    assert picture.tobytes() != adapted.tobytes()
    used = {"file": f"{run_folder.name}/adapter.safetensors", "strength": 1.0, "base": "this one"}
    assert json.loads(adapted.text["settings"])["adapters"] == [used]


def test_strengths_and_a_derived_model_from_the_command_line(weights, run_folder, tmp_path, capsys):
    """Strength 0 draws the base's pictures; a model with another U-Net is taken with --any-base, and reports say so."""
    options = ["--weights", weights, "-n", "1", "--adapter", str(run_folder), "--strength"]
    for strength, padding in (("0", "full"), ("1.5", "own")):
        folder = str(tmp_path / strength)
        argv = [PROMPT, *options, strength, "--padding", padding, "--out", folder]
        assert cli.run(sample.main, argv) == 0
    plain = [PROMPT, "--weights", weights, "-n", "1", "--out", str(tmp_path / "plain")]
    assert cli.run(sample.main, plain) == 0
    zero, strong, base = (Image.open(tmp_path / name / "seed0-000.png") for name in ("0", "1.5", "plain"))
    assert zero.tobytes() == base.tobytes() != strong.tobytes()
    settings = json.loads(strong.text["settings"])
    assert settings["adapters"][0]["strength"] == 1.5 and settings["padding"] == "own"
    derived = shutil.copytree(weights, tmp_path / "derived")
    file = derived / "unet" / "diffusion_pytorch_model.safetensors"
    write(file, {name: 1.01 * tensor for name, tensor in read(file).items()}, {})
    argv = ["--weights", str(derived), "--adapter", str(run_folder), "--strength", "0.5", "-n", "2"]
    assert cli.run(evaluate.main, argv) == 2
    assert "made from another unet" in capsys.readouterr().err
    assert cli.run(evaluate.main, [*argv, "--any-base"]) == 0
    (used,) = json.loads(capsys.readouterr().out)["adapters"]
    assert (used["strength"], used["base"]) == (0.5, "another unet")
    assert cli.run(sample.main, [PROMPT, *options[:4], "--strength", "1"]) == 2
    assert "--strength is of an --adapter" in capsys.readouterr().err


def test_an_image_is_the_same_alone_and_among_others(weights, tmp_path):
    for n in ("1", "4"):
        assert cli.run(sample.main, [PROMPT, "--weights", weights, "-n", n, "--out", str(tmp_path / n)]) == 0
    alone, among = (
        torch.frombuffer(bytearray(Image.open(tmp_path / n / "seed0-000.png").tobytes()), dtype=torch.uint8)
        for n in ("1", "4")
    )
    assert (alone.int() - among.int()).abs().max() <= 1  # rounding of differently sized batches


def test_a_negative_prompt_and_guidance_0_change_the_picture(weights, tmp_path):
    pictures = {}
    for name, options in {
        "plain": [],
        "negative": ["--negative-prompt", "a judge"],
        "zero": ["--guidance", "0"],
        "zero of another prompt": ["--guidance", "0"],
    }.items():
        prompt = "a baker" if "another" in name else PROMPT
        assert (
            cli.run(
                sample.main,
                [prompt, "--weights", weights, "-n", "1", "--out", str(tmp_path / name), *options],
            )
            == 0
        )
        pictures[name] = Image.open(tmp_path / name / "seed0-000.png").tobytes()
    assert pictures["zero"] == pictures["zero of another prompt"]  # the prompt has no weight
    assert len({pictures["plain"], pictures["negative"], pictures["zero"]}) == 3


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(weights, tmp_path, capsys):
    prompt = "a pilot " * 60 + "in a hat"
    assert cli.run(sample.main, [prompt, "--weights", weights, "-n", "1", "--out", str(tmp_path)]) == 0
    error = capsys.readouterr().err
    assert "too long" in error and "in a hat" in error


def test_prompts_that_are_too_long_are_named_before_a_run_and_an_evaluation(weights, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cook\n" + "a pilot " * 60 + "in a hat\n" + "a cook " * 70 + "\n")
    options = ["--weights", weights, "--prompts", str(tmp_path / "prompts.txt")]
    run = ["--attr", "gender", "--iterations", "1", "--evaluate", "none", "--out", str(tmp_path / "run")]
    assert cli.run(train.main, [*options, *run]) == 0
    captured = capsys.readouterr()
    assert "2 prompts are too long" in captured.err and "in a hat" in captured.err
    assert "name gender" not in captured.out
    measured = ["--part", "train", "--num-images", "1", "--target", "gender=0.3,0.7"]
    assert cli.run(evaluate.main, [*options, *measured]) == 0
    captured = capsys.readouterr()
    assert "2 prompts are too long" in captured.err
    report = json.loads(captured.out)
    assert "from_target" in report["judges"]["classifier"] and report["made"]["prompts"] == "prompts.txt"


def test_prompts_that_name_a_class_themselves_are_noticed(weights, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a pilot\na female cook\na tall man\n")
    run = ["--attr", "gender", "--iterations", "1", "--evaluate", "none", "--out", str(tmp_path / "run")]
    assert cli.run(train.main, ["--weights", weights, "--prompts", str(tmp_path / "prompts.txt"), *run]) == 0
    assert "2 of 3 prompts name gender themselves, as 'female' in 'a female cook'" in capsys.readouterr().out


def test_evaluate(weights, run_folder, tmp_path, capsys):
    out = tmp_path / "report.json"
    options = [
        "--weights",
        weights,
        "--adapter",
        str(run_folder),
        "--num-images",
        "3",
        "--part",
        "validation",
    ]
    assert cli.run(evaluate.main, [*options, "--out", str(out)]) == 0
    assert "gender bias, 1 validation occupations x 3 images" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert sum(report["judges"]["classifier"]["counts"]["cook"]) == 3
    assert cli.run(evaluate.main, options) == 0
    assert json.loads(capsys.readouterr().out)["judges"] == report["judges"]
    for out, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "report.json", "its folder doesn't exist"),
    ):
        assert words in refused(capsys, evaluate.main, *options, "--out", str(out))


def test_a_judge_that_nobody_trained_is_reported_with_what_is_known_of_its_errors(weights, tmp_path, capsys):
    """Its classes are no words for prompts, so none names them; labelled pictures say how often it errs."""
    judge = ["--judge", "evaluate=clip:glasses=a person with glasses|a person without"]
    options = ["--weights", weights, "-n", "2", *judge]
    assert cli.run(evaluate.main, options) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert report["classes"] == ["a person with glasses", "a person without"] and "explicit" not in report
    unknown = "not known how often it errs: classifier about glasses; give --labelled or --labels"
    assert unknown in shown.err and report["confusion"] == {}
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i,) * 3).save(tmp_path / f"{i}.png")
    rows = [f"{i}.png,a person {'with glasses' if i < 3 else 'without'}" for i in range(4)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,glasses", *rows]))
    explicit = ["--labelled", str(tmp_path), "--explicit-images", "1", "--part", "validation"]
    assert cli.run(evaluate.main, [*options, *explicit]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    (known,) = report["confusion"]["classifier"]["glasses"]
    assert [sum(row) for row in known["counts"]] == [3, 1] and known["source"].startswith("labelled pictures")
    assert unknown not in shown.err and report["explicit"]["images"] == 2


def test_baselines_are_measured_beside_the_original(weights, tmp_path, capsys):
    options = ["--weights", weights, "-n", "3", "--explicit-images", "1"]
    cache = ["--cache", str(tmp_path / "cache")]
    chosen = ["--baseline", "projection:0", "--baseline", "coin"]
    assert cli.run(evaluate.main, [*options, *cache, *chosen, "--out", str(tmp_path / "report.json")]) == 0
    assert "baseline coin:" in capsys.readouterr().err
    original = json.loads((tmp_path / "report.json").read_text())
    found = json.loads((tmp_path / "cache" / "baselines.json").read_text())
    assert {name: list(parts) for name, parts in found.items()} == {
        "projection:0": ["test"],
        "coin": ["test"],
    }
    same, coin = found["projection:0"]["test"], found["coin"]["test"]
    for key in ("judges", "explicit"):
        assert same[key] == original[key]
    assert same["clip_t"] == pytest.approx(original["clip_t"], abs=1e-5)  # of one prompt or several at once
    assert coin["clip_i"] < same["clip_i"] - 1e-6
    assert coin["explicit"] == original["explicit"] and coin["clip_t"] != original["clip_t"]
    rows = (tmp_path / "cache" / "judged.csv").read_text().splitlines()
    assert {row.split(",")[0] for row in rows[1:]} == {"before", "baseline projection:0", "baseline coin"}
    for extra, words in (
        ([], "give one as --adapter, or a folder as --cache"),
        ([*cache, "--sweep", "guidance=1,2"], "has no effect with --sweep"),
        ([*cache, "--attr", "gender,skin_tone"], "makes one attribute fair"),
        ([*cache, "--prompts", "sports"], "is no prompt of an occupation"),
    ):
        assert words in refused(capsys, evaluate.main, *options, "--baseline", "coin", *extra)


def test_evaluate_is_stopped_and_refuses_what_a_sweep_has_no_use_for(weights, run_folder, tmp_path, capsys):
    options = ["--weights", weights, "--cache", str(tmp_path / "kept"), "-n", "1", "--explicit-images", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "judge_all", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert cli.run(evaluate.main, options) == 130
    assert f"kept in {tmp_path / 'kept'}, the same command goes on with it" in capsys.readouterr().err
    with checkpoints.held(tmp_path / "kept"):
        assert "kept: a run or an evaluation is at work in it" in refused_at_last(
            capsys, evaluate.main, *options
        )
    for other, value in (("guidance", "3"), ("out", str(tmp_path / "x.json"))):
        message = refused(capsys, evaluate.main, *options, "--sweep", "guidance=1", f"--{other}", value)
        assert f"--{other} has no effect with --sweep guidance" in message
    adapter = ["--adapter", str(run_folder), "--strength", "1"]
    message = refused(capsys, evaluate.main, *options, *adapter, "--sweep", "strength=1")
    assert "--strength has no effect with --sweep strength" in message
    assert cli.run(evaluate.main, [*options, "--sweep", "guidance=1,2"]) == 0
    assert f"written: {tmp_path / 'kept' / 'sweep-guidance.json'}" in capsys.readouterr().out
    (tmp_path / "file").touch()
    assert "file: can't be made" in refused(
        capsys, evaluate.main, *options, "--cache", str(tmp_path / "file")
    )


def test_resume_goes_on_with_a_runs_own_settings(run_folder, weights, tmp_path, capsys):
    options = [
        "--attr",
        "gender",
        "--weights",
        weights,
        "--evaluate",
        "none",
        "--batch",
        "3",
        "--out",
        str(tmp_path / "run"),
    ]
    assert cli.run(train.main, options) == 0
    settings = (tmp_path / "run" / "settings.json").read_bytes()
    (tmp_path / "run" / "adapter.safetensors").unlink()  # as if stopped at the very end
    assert cli.run(train.main, ["--resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "adapter.safetensors").exists()
    assert (tmp_path / "run" / "settings.json").read_bytes() == settings
    assert "not to the same last digits" not in capsys.readouterr().out
    changed = json.loads(settings) | {"processes": 8}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(changed))
    assert cli.run(train.main, ["--resume", str(tmp_path / "run")]) == 0
    assert "processes was 8 and is 1: the run goes on, but not" in capsys.readouterr().out
    changed |= {"device": "abacus"}  # a run stays on its device, unless another is asked for
    (tmp_path / "run" / "settings.json").write_text(json.dumps(changed))
    assert "abacus" in refused(capsys, train.main, "--resume", str(tmp_path / "run"))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert "--lr" in refused(capsys, train.main, "--resume", str(run_folder), "--lr", "1")
    assert "no settings.json" in refused(capsys, train.main, "--resume", str(run_folder / "nowhere"))


def test_without_a_validation_the_average_stands_for_the_best(weights, tmp_path, capsys):
    options = ["--attr", "gender", "--weights", weights, "--iterations", "1", "--evaluate", "best"]
    options += ["--validate-every", "0", "--out", str(tmp_path)]
    assert cli.run(train.main, options) == 0
    assert "no validation chose a best adapter" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "evaluation.json").read_text())) == {"before", "after (ema)"}


def test_a_target_may_be_a_joint_table(weights, tmp_path, capsys):
    table = {"attributes": ["gender"], "shares": {"woman": 0.3, "man": 0.7}}
    (tmp_path / "target.json").write_text(json.dumps(table))
    options = [
        "--target",
        str(tmp_path / "target.json"),
        "--weights",
        weights,
        "--evaluate",
        "none",
        "--batch",
        "5",
    ]
    assert cli.run(train.main, [*options, "--iterations", "1", "--out", str(tmp_path / "run")]) == 0
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["target"] == {"classes": {"gender": ["woman", "man"]}, "table": [0.3, 0.7]}


def test_without_out_a_run_takes_the_first_free_folder(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert (
            cli.run(
                train.main,
                ["--attr", "gender", "--weights", weights, "--iterations", "1", "--evaluate", "none"],
            )
            == 0
        )
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["gender", "gender-2"]
    assert not (tmp_path / "runs" / "gender" / "evaluation.json").exists()
    assert cli.run(sample.main, ["A Pilot.", "--weights", weights, "-n", "1"]) == 0
    drawn = tmp_path / "samples" / "a-pilot" / "seed0-000.png"
    before = drawn.read_bytes()
    for adapter in ("runs/gender", "runs/gender/adapter_raw.safetensors"):
        assert cli.run(sample.main, ["A Pilot.", "--weights", weights, "-n", "1", "--adapter", adapter]) == 0
    assert drawn.read_bytes() == before, "an adapter's pictures do not take the place of those without it"
    names = ["a-pilot", "a-pilot-gender", "a-pilot-gender-adapter_raw"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == names


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--attr", "height"], 'names the attribute "height"'),
        (["--attr", "gender=0.7,0.7"], "the sum must be 1"),
        ([], "--attr is missing"),
        (["--attr", "gender=1,0", "--target", "gender=0.2,0.8"], "both give shares"),
        (["--target", "gender=1"], "has 1 numbers but there are 2 classes"),
        (["--target", "nowhere.json"], "nowhere.json: can't be read (no such file)"),
        (["--attr", "height", "--target", "gender=0.2,0.8"], 'names the attribute "height"'),
        (
            ["--attr", "skin_tone", "--target", "gender=0.2,0.8"],
            "--target is for gender; name it in --attr, too",
        ),
        (["--attr", "gender,gender"], "twice"),
        (
            ["--attr", "gender", "--batch", "2"],
            "no target is woman, which has 0.5 of gender, as surely as C = 0.8",
        ),
        (["--attr", "gender=0.7,0.3"], "no target is man, which has 0.3 of gender, as surely"),
        (["--attr", "gender", "--batch", "1000000000000"], "batch is 1000000000000; expected at most 65536"),
        (["--attr", "gender", "--rank", "100000"], "rank is 100000; expected at most 65536"),
        (["--attr", "gender", "--adam-eps", "0"], "adam_eps is 0"),
        (["--attr", "gender", "--steps", "100000000000000000000"], "expected 1 to 999 of 1000"),
        (["--attr", "gender", "--lambda-face", "1"], "--lambda-face needs a face embedder"),
        (["--attr", "gender", "--prompts", "nowhere.txt"], "nowhere.txt: can't be read"),
        (["--attr", "gender", "--prompts", "EMPTY"], "no prompt in it; write one a line"),
        (["--attr", "gender", "--prompts", __file__, "--prompt-template", "a {occupation}"], "leave one out"),
        (["--attr", "gender", "--iterations", "0"], "iterations is 0; expected at least 1"),
        (["--attr", "gender", "--iterations", "many"], "--iterations"),
        (["--attr", "gender", "--lr", "nan"], "lr is nan"),
        (["--attr", "gender", "--gradient", "both"], "expected one of paper, solver, none, exact"),
        (["--attr", "gender", "--gradient", "last"], "the gradient is 'last'"),
        (["--attr", "gender", "--gradient", "last:0"], "K and M from 1 up"),
        (["--attr", "gender", "--gradient", "random:x"], "K and M from 1 up"),
        (["--attr", "gender", "--gradient", "paper:2"], "the gradient is 'paper:2'"),
        (["--attr", "gender", "--gradient", "couple:2"], "ALPHA from 0 to 1"),
        (["--attr", "gender", "--gradient", "couple:nan"], "ALPHA from 0 to 1"),
        (["--attr", "gender", "--gradient", "drtune:99"], "a run may have"),
        (["--attr", "gender", "--gradient", "exact", "--grad-steps", "2"], "no effect with --gradient exact"),
        (["--attr", "gender", "--steps", "9:3"], "write 3:9"),
        (["--attr", "gender", "--steps", "2.5"], "a whole number from 1 up"),
        (["--attr", "gender", "--steps", "1:2:3"], "--steps"),
        (["--attr", "gender", "--guidance", "much"], "--guidance"),
        (["--attr", "gender", "--lambda-2", "race=0.5"], "lambda_2 names race; the run is for gender"),
        (["--attr", "gender", "--lambda-2", "gender=2"], "expected at most 1"),
        (
            ["--attr", "gender", "--component", "vae"],
            "expected one of prefix, suffix, deep, generated, text_encoder, unet, both",
        ),
        (["--attr", "gender", "--seed", "5000000000"], "seed is 5000000000"),
        (["--attr", "gender", "--beta-1", "1"], "beta_1 is 1.0; expected less than 1"),
        (["--attr", "gender", "--steps", "2000"], "2000"),
        (["--attr", "gender", "--eval-steps", "2000"], "2000"),
        (["--attr", "gender", "--component", "prefix", "--tokens", "80"], "has 80 tokens"),
        (["--attr", "gender", "--speed", "9"], "unrecognized arguments: --speed"),
        (["--attr", "gender", "--device", "abacus"], "--device is 'abacus'"),
        (["--attr", "gender", "--dtype", "int8"], "--dtype"),
    ],
)
def test_mistakes_of_train(weights, tmp_path, capsys, argv, words):
    (tmp_path / "empty.txt").write_text("\n# nothing but this\n")
    argv = [str(tmp_path / "empty.txt") if word == "EMPTY" else word for word in argv]
    message = refused(capsys, train.main, *argv, "--weights", weights, "--out", str(tmp_path / "run"))
    assert words in message
    assert not (tmp_path / "run").exists()


def test_what_a_bundle_lacks_is_said(weights, tmp_path, capsys):
    """A part that finetuning needs ends a run before its folder is made; one that makes the loss shorter is named."""
    lame = shutil.copytree(weights, tmp_path / "lame")
    options = ["--attr", "gender", "--iterations", "1", "--evaluate", "none", "--out", str(tmp_path / "run")]
    assert cli.run(train.main, [*options, "--weights", str(lame)]) == 0
    said = capsys.readouterr().out
    assert "has no face embedder: the loss has no L_face" in said and "has no face detector" in said
    shutil.rmtree(tmp_path / "run")
    manifest = json.loads((lame / "bundle.json").read_text())
    del manifest["classifiers"]["finetune"]
    (lame / "bundle.json").write_text(json.dumps(manifest))
    message = refused(capsys, train.main, *options, "--weights", str(lame))
    assert "has no classifiers.finetune, which the loss's term 'align' needs" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name",
    ["checkpoint-000020.safetensors", "adapter.safetensors", "metrics.jsonl", "evaluation.json", "grids"],
)
def test_a_folder_with_remains_of_a_run_is_refused(weights, tmp_path, capsys, name):
    (tmp_path / name).touch()
    assert cli.run(train.main, ["--attr", "gender", "--weights", weights, "--out", str(tmp_path)]) == 2
    assert f"holds {name} of another run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_two_runs_that_start_at_once_get_two_folders(tmp_path, monkeypatch):
    default = str(tmp_path / "runs" / "gender")
    assert checkpoints.new_folder(None, default) == Path(default)
    # the other process looks before this one has made it
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert checkpoints.new_folder(None, default) == Path(f"{default}-2")


def test_a_run_of_a_text_file_is_evaluated_on_it(weights, tmp_path, capsys):
    """All of its prompts are for finetuning, so they are what can be measured, whatever eval_images_train says."""
    (tmp_path / "prompts.txt").write_text("# mine\na cook\na pilot\n", encoding="utf-8-sig")
    options = ["--weights", weights, "--attr", "gender", "--prompts", str(tmp_path / "prompts.txt")]
    options += ["--iterations", "1", "--eval-images", "2", "--eval-images-train", "0", "--evaluate", "raw"]
    assert cli.run(train.main, [*options, "--out", str(tmp_path / "run")]) == 0
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {when: list(parts) for when, parts in evaluation.items()} == {
        "before": ["train"],
        "after (raw)": ["train"],
    }
    assert evaluation["before"]["train"]["images"] == 2 and evaluation["before"]["train"]["prompts"] == 2


def test_a_stop_in_the_evaluation_says_where_the_adapters_are(weights, tmp_path, capsys, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("fairref.training.run.before_after", stopped)
    options = ["--weights", weights, "--attr", "gender", "--iterations", "1", "--out", str(tmp_path / "run")]
    assert cli.run(train.main, options) == 130
    assert f"--resume {tmp_path / 'run'} goes on with it" in capsys.readouterr().err

    def terminated(*args):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the signal did not interrupt it")

    monkeypatch.setattr("fairref.training.run.before_after", terminated)
    assert cli.run(train.main, ["--resume", str(tmp_path / "run")]) == 130
    assert f"--resume {tmp_path / 'run'} goes on with it" in capsys.readouterr().err
    assert (tmp_path / "run" / "adapter.safetensors").exists()


def test_a_folder_that_holds_another_run_is_refused(run_folder, weights, capsys):
    before = (run_folder / "settings.json").read_bytes()
    message = refused(capsys, train.main, "--attr", "gender", "--weights", weights, "--out", str(run_folder))
    assert "holds another run" in message and "--resume" in message
    assert (run_folder / "settings.json").read_bytes() == before


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "required: prompt"),
        ([PROMPT, "-n", "0"], "expected a whole number from 1"),
        ([PROMPT, "--steps", "0"], "expected a whole number from 1"),
        ([PROMPT, "--seed", "-1"], "expected a whole number from 0"),
        ([PROMPT, "--guidance", "inf"], "--guidance"),
        ([PROMPT, "--adapter", "nowhere"], "nowhere: no such adapter"),
        ([PROMPT, "--out", __file__], "--out"),
        ([PROMPT, "--num", "3"], "unrecognized arguments: --num"),
    ],
)
def test_mistakes_of_sample(weights, tmp_path, capsys, argv, words):
    out = [] if "--out" in argv else ["--out", str(tmp_path / "out")]
    assert words in refused(capsys, sample.main, *argv, "--weights", weights, *out)


@pytest.mark.parametrize(
    "main, argv, words",
    [
        (sample.main, [PROMPT, "--adapter", ""], "--adapter is empty"),
        (sample.main, [PROMPT, "--out", ""], "--out is empty"),
        (evaluate.main, ["--adapter", ""], "--adapter is empty"),
        (train.main, ["--attr", "gender", "--resume", ""], "--resume is empty"),
        (train.main, ["--attr", "gender", "--weights", ""], "--weights is empty"),
        (train.main, ["--target", ""], "--target is empty"),
        (sample.main, [PROMPT, "--adapter", "~nobody-of-this-name/x"], "Write the path out"),
        (train.main, ["--resume", "~nobody-of-this-name/x"], "Write the path out"),
        (evaluate.main, ["--weights", "~nobody-of-this-name/x"], "Write the path out"),
        (sample.main, [PROMPT, "--weights", "x" * 300], "File name too long"),
        (train.main, ["--attr", "gender", "--iterations", "9" * 400], "iterations is"),
        (train.main, ["--attr", "gender", "--group", "9" * 20], "group is"),
    ],
)
def test_values_that_an_unset_variable_or_a_slip_leaves(capsys, tmp_path, monkeypatch, main, argv, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, main, *argv) and not any(tmp_path.iterdir())


def test_an_empty_negative_prompt_is_one(weights, tmp_path):
    argv = [PROMPT, "--negative-prompt", "", "-n", "1", "--weights", weights, "--out", str(tmp_path / "out")]
    assert cli.run(sample.main, argv) == 0


@pytest.mark.parametrize("main", [sample.main, evaluate.main])
def test_pictures_that_are_no_numbers_are_refused(weights, tmp_path, capsys, main):
    argv = [PROMPT, "-n", "1", "--out", str(tmp_path / "out")] if main is sample.main else ["-n", "1"]
    message = refused_at_last(capsys, main, *argv, "--guidance", "1e30", "--weights", weights)
    words = "a lower" if main is sample.main else "--guidance: is 1e30, expected a number from 0 to 1e+06"
    assert words in message and not any(tmp_path.glob("out/*"))


@pytest.mark.parametrize("rank", [0, None])
def test_an_adapter_of_rank_0_or_of_no_numbers_is_refused(run_folder, weights, tmp_path, capsys, rank):
    file = run_folder / "adapter.safetensors"
    tensors = {name: tensor.mul(float("nan")) for name, tensor in read(file).items()}
    if rank == 0:
        tensors = {name: t[:0] if "down" in name else t[:, :0] for name, t in tensors.items()}
    write(tmp_path / "a.safetensors", tensors, read_info(file))
    message = refused(
        capsys, sample.main, PROMPT, "--weights", weights, "--adapter", str(tmp_path / "a.safetensors")
    )
    assert ("its matrices have rank 0" if rank == 0 else "holds what is no number") in message


def test_prompts_that_begin_alike_or_in_other_letters_have_folders_of_their_own(
    weights, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for prompt in ("日本", "中国", "!", "?", PROMPT + " with a hat", PROMPT + " with a cat"):
        assert cli.run(sample.main, [prompt, "-n", "1", "--weights", weights]) == 0
    assert len(list((tmp_path / "samples").iterdir())) == 6


def test_a_terminal_that_can_not_show_a_name_ends_no_run(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert cli.run(lambda argv: print("café", flush=True)) == 0
    assert stdout.buffer.getvalue() == b"caf\\xe9\n"


OTHER = "not the settings of a run of this version"


@pytest.mark.parametrize(
    "damage, words",
    [
        ({"weights": 1}, OTHER),
        ({"dtype": "float8"}, OTHER),
        ({"device": None}, OTHER),
        ({"prompts": [1]}, OTHER),
        ({"loss": None}, OTHER),
        ({"loss": [{"name": "a"}]}, OTHER),
        ({"judge": [1]}, OTHER),
        ({"prompt_template": 1}, OTHER),
        ({"versions": []}, OTHER),
        ({"recipe": {}}, OTHER),
        ({"target": {}}, OTHER),
        (
            {"target": {"classes": {"gender": ["woman", "man"]}, "table": "x"}},
            "The joint target has the shape ()",
        ),
    ],
)
def test_damaged_settings_resume_no_run(run_folder, tmp_path, capsys, damage, words):
    settings = json.loads((run_folder / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps(settings | damage))
    for device in ((), ("--device", "cpu")):
        message = refused(capsys, train.main, "--resume", str(tmp_path), *device)
        assert f"settings.json: {words}" in message


@pytest.mark.parametrize(
    "damage",
    [
        {"iteration": "x"},
        {"iteration": -3},
        {"iteration": 2.5},
        {"updates": None},
        {"best": "x"},
        {"best": {}},
        {"streak": 9**9},
    ],
)
def test_a_damaged_checkpoint_resumes_no_run(run_folder, weights, tmp_path, capsys, damage):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    before, file = checkpoints.saved(folder)
    before.unlink()
    write(file, read(file), read_info(file) | damage)
    assert "start a new run" in refused_at_last(capsys, train.main, "--resume", str(folder))


def test_a_checkpoint_of_no_numbers_resumes_no_run(run_folder, tmp_path, capsys):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    before, file = checkpoints.saved(folder)
    before.unlink()
    write(file, {name: t * float("nan") for name, t in read(file).items()}, read_info(file))
    message = refused_at_last(capsys, train.main, "--resume", str(folder))
    assert file.name in message and "holds what is no number" in message


def test_an_evaluation_that_can_not_be_written_is_not_begun(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_bundle", lambda *options: pytest.fail("the work began"))
    message = refused(capsys, evaluate.main, "--weights", weights, "--out", "/proc/x.json")
    assert "/proc/x.json: can't be written" in message


def test_the_gates_need_every_judge(weights, capsys):
    assert "has no detector" in refused(capsys, emoji.main, "check", "--out", weights)


@pytest.mark.parametrize("when", ["before_after", "finetune"])
def test_a_disk_that_gets_full_says_how_to_go_on(weights, tmp_path, capsys, monkeypatch, when):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "run" / "grids" / "000002.png"))

    monkeypatch.setattr(f"fairref.training.run.{when}", full)
    options = ["--weights", weights, "--attr", "gender", "--iterations", "1", "--out", str(tmp_path / "run")]
    message = refused_at_last(capsys, train.main, *options)
    assert (
        "000002.png: can't be written (No space left on device); make room, then go on with --resume"
        in message
    )


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "can't be written (No space left on device); make room."),
        (
            errno.EACCES,
            "can't be read or written (Permission denied); change its permissions or choose another",
        ),
    ],
)
def test_a_disk_that_does_not_take_a_picture_is_one_sentence(
    weights, tmp_path, capsys, monkeypatch, number, words
):
    def refuses(image, path, texts):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("fairref.commands.sample.save_png", refuses)
    message = refused_at_last(capsys, sample.main, PROMPT, "--weights", weights, "--out", str(tmp_path))
    assert words in message and "seed0-000.png" in message


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory.\nTried"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_too_little_memory_is_one_sentence(capsys, error):
    def main(argv):
        raise error

    assert "not enough memory" in refused(capsys, main)


def test_weights_that_are_not_there(capsys):
    assert "no such weights" in refused(capsys, sample.main, PROMPT, "--weights", "nowhere")
    assert "no such weights" in refused(capsys, evaluate.main, "--weights", "nowhere")


def test_every_setting_has_an_explanation_and_an_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for f in (*fields(Recipe), *fields(RunOptions)):
        assert f"--{f.name.replace('_', '-')} " in shown and f.metadata["help"]


def test_the_defaults_are_the_methods():
    r = Recipe()
    assert (r.batch, r.C, r.lambda_img, r.lambda_2, r.rank, r.lr, r.iterations) == (
        24,
        0.8,
        8,
        0.2,
        50,
        5e-5,
        10_000,
    )
    assert (r.beta_1, r.beta_2, r.weight_decay, r.adam_eps, r.ema) == (0.9, 0.999, 1e-2, 1e-8, 0.996)
    assert (r.steps, r.guidance, r.eval_steps, r.eval_guidance) == (
        (19, 23, False),
        (7.5, 7.5, False),
        25,
        7.5,
    )
    assert (r.clip, r.checkpoint_every, r.component, r.tokens) == (100, 200, "text_encoder", 5)
    assert (r.gradient, r.end) == ("paper", "zero")


@pytest.mark.parametrize(
    "attributes, N, C, face, image, shares_2, shares_3, iterations, judged",  # the rows of docs/method.md §6, §8
    [
        (("gender",), 24, 0.8, 1, 8, (0.2,), (0.2,), 10_000, 60),
        (("race",), 32, 0.8, 0.1, 6, (0.6,), (0.3,), 12_000, 80),
        (("skin_tone",), 32, 0.8, 0.1, 6, (0.6,), (0.3,), 12_000, 80),
        (("gender", "race"), 32, 0.6, 0.1, 8, (0.2, 0.6), (0.2, 0.3), 14_000, 160),
        (("skin_tone", "gender"), 32, 0.6, 0.1, 8, (0.6, 0.2), (0.3, 0.2), 14_000, 160),
        (("gender", "race", "age"), 40, 0.8, 0.1, 8, (0.2, 0.6, 0.6), (0.2, 0.3, 0.3), 15_000, 160),
    ],
)
def test_the_methods_runs(attributes, N, C, face, image, shares_2, shares_3, iterations, judged):
    r = resolve(attributes, {}, {})
    assert (r.batch, r.C, r.lambda_face, r.lambda_img, r.iterations) == (N, C, face, image, iterations)
    assert r.eval_images == judged and resolve(attributes, {"eval_images": 30}, {}).eval_images == 30
    assert r.lambda_2 == dict(zip(attributes, shares_2, strict=True))
    assert r.lambda_3 == dict(zip(attributes, shares_3, strict=True))


def test_who_overrides_whom():
    bundle = {"batch": 8, "lr": 1, "race": {"lr": 2.0, "rank": 4}}
    assert resolve(("gender",), bundle, {}).lr == 1.0
    race = resolve(("race",), bundle, {"rank": 5})
    assert (race.batch, race.lambda_img, race.lr, race.rank) == (8, 6.0, 2.0, 5)
    both = {"lambda_2": {"gender": 0.5}, "race,gender": {"lambda_3": 0.9}, "race": {"lr": 9}}
    found = resolve(("gender", "race"), both, {"lambda_3": "race=0.4"})
    assert found.lambda_2 == {"gender": 0.5, "race": 0.6} and found.lambda_3 == {"gender": 0.9, "race": 0.4}
    assert found.lr == 5e-5


@pytest.mark.parametrize(
    "attribute, bundle, words",
    [
        ("gender", {"learning_rate": 1}, "unknown key 'learning_rate'"),
        ("race", {"race": {"learning_rate": 1}}, "recipe of race has the unknown key"),
        ("gender", {"batch": 2.5}, "batch is 2.5"),
        ("gender", {"batch": True}, "batch is True"),
        ("gender", {"lr": -1.0}, "lr is -1.0"),
        ("gender", {"ema": 1.5}, "ema is 1.5"),
        ("gender", {"steps": [3, 4, 5]}, "steps is .*; expected a number or two"),
        ("gender", {"guidance": True}, "guidance is True"),
        ("gender", {"lambda_2": "much"}, "lambda_2 is 'much'"),
        (
            "gender",
            {"gender,rase": {"lr": 1.0}},
            "unknown key 'rase'; expected a setting, or attributes .* gender, race",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(attribute, bundle, words):
    with pytest.raises(UserError, match=words):
        resolve((attribute,), bundle, {}, known_attributes=("gender", "race"))


def test_a_resumed_run_finds_its_bundle_from_another_folder(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    out = str(tmp_path / "run")
    options = ["--attr", "gender", "--weights", tiny_folder.name, "--out", out, "--evaluate", "none"]
    assert cli.run(train.main, options) == 0
    monkeypatch.chdir(tmp_path)
    assert cli.run(train.main, ["--resume", out]) == 0
