"""No image is drawn twice: its judgements are kept, and only what they follow from makes them anew."""

import copy
import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_bundle import OCCUPATIONS

from fairref.bundle.loading import load_bundle
from fairref.diffusion.schedule import Schedule
from fairref.errors import UserError
from fairref.evaluation import judging
from fairref.evaluation.evaluation import EvaluationOptions, evaluate, prepare
from fairref.evaluation.judging import SEED, EvaluationSettings, drawn_by, judge_prompts
from fairref.evaluation.kept import KeptJudgements, judges_of, model_of
from fairref.evaluation.sweeps import Sweep, run_sweep, sweep_file
from fairref.fairness.attributes import parse_targets
from fairref.generation.adapters import load_adapters, save_adapter
from fairref.generation.drawing import Drawing
from fairref.generation.lora import adapt
from fairref.progress import note

PROMPTS = ["a pilot", "a nurse", "a baker"]
RED = """
import torch
def loader(device, dtype):
    def judge(x):
        red = x[:, 0].mean((1, 2))
        return {"gender": torch.stack([-red, red], 1)}
    judge.classes = {"gender": ("woman", "man")}
    return judge
"""


@pytest.fixture(scope="module")
def adapter(loaded_tiny, tmp_path_factory):
    """The file of a LoRA that changes what is drawn."""
    _, adapter = adapt(loaded_tiny, "text_encoder", 2, generator=torch.Generator().manual_seed(0))
    tensors = {name: p + 0.5 * ("lora_up" in name) for name, p in adapter.named_parameters()}
    path = tmp_path_factory.mktemp("run") / "adapter.safetensors"
    save_adapter(path, tensors, {"base": loaded_tiny.fingerprints})
    return path


@pytest.fixture
def drawn(monkeypatch):
    """(prompt, image numbers) of every drawing."""
    calls, one, several = [], judging.fixed_images, judging.fixed_images_of

    def fixed_images(model, seed, prompt, images, how):
        calls.append((prompt, list(images)))
        return one(model, seed, prompt, images, how)

    def fixed_images_of(model, seed, prompts, images, how):
        calls.extend((prompt, list(images)) for prompt in prompts)
        return several(model, seed, prompts, images, how)

    monkeypatch.setattr(judging, "fixed_images", fixed_images)
    monkeypatch.setattr(judging, "fixed_images_of", fixed_images_of)
    return calls


def settings_of(bundle, kept, **changed):
    target = parse_targets(["gender"], bundle.attributes)
    return replace(EvaluationSettings(bundle, target, Drawing(2, 2.0), kept=kept), **changed)


def judged(settings, n=3, prompts=PROMPTS, model=None):
    rows = judge_prompts(settings, drawn_by(settings, model or settings.bundle, ""), prompts, n)
    return [of_prompt.tensors() for of_prompt in rows]


def assert_same(rows, others, **tolerance):
    for these, those in zip(rows, others, strict=True):
        assert these.keys() == those.keys()
        for name in these:
            torch.testing.assert_close(these[name], those[name], equal_nan=True, **tolerance)


def test_what_is_judged_is_not_drawn_again_and_more_images_are_added(loaded_tiny_faces, tmp_path, drawn):
    settings = settings_of(loaded_tiny_faces, tmp_path)
    first = judged(settings)
    assert drawn == [(prompt, [0, 1, 2]) for prompt in PROMPTS]
    assert len(list(tmp_path.iterdir())) == 3
    drawn.clear()
    exact = {"rtol": 0, "atol": 0}
    assert_same(judged(settings), first, **exact)
    assert_same(judged(settings, 2), [{k: v[:2] for k, v in rows.items()} for rows in first], **exact)
    both = replace(settings, target=parse_targets(["gender", "skin_tone"], loaded_tiny_faces.attributes))
    assert "classes/classifier/skin_tone" in judged(both)[0] and not drawn
    more = judged(settings, 5)
    assert drawn == [(prompt, [3, 4]) for prompt in PROMPTS]
    assert_same(more, judged(replace(settings, kept=None), 5))  # in groups of another size
    drawn.clear()
    assert_same(judged(settings, 5), more, **exact)
    assert not drawn


def test_what_is_kept_follows_from_all_that_draws_and_judges(loaded_tiny, adapter, tmp_path, drawn):
    settings, one = settings_of(loaded_tiny, tmp_path), (1, PROMPTS[:1])
    judged(settings, *one)
    judges = loaded_tiny.classifiers
    swapped = replace(
        loaded_tiny, classifiers={"evaluate": judges["finetune"], "finetune": judges["evaluate"]}
    )
    adapted = {s: load_adapters(loaded_tiny, [(adapter, s)]) for s in (0.0, 0.5, 1.0)}
    drawing = settings.drawing
    cases = {
        "nothing": {},
        "noise": {"seed": 1},
        **{k: {"drawing": drawing._replace(**{k: v})} for k, v in (("steps", 3), ("guidance", 2.5))},
        **{k: {"drawing": drawing._replace(**{k: v})} for k, v in (("end", "sigma_min"), ("padding", "own"))},
        "judge": {"bundle": swapped},
    }
    found = {}
    for name, changed in cases.items():
        found[name] = []
        for _again in range(2):
            drawn.clear()
            judged(replace(settings, **changed), *one)
            found[name].append(len(drawn))
    for strength, model in adapted.items():
        drawn.clear()
        judged(settings, *one, model)
        found[strength] = [len(drawn), 0]
    half = load_bundle(loaded_tiny.path, dtype=torch.bfloat16)
    drawn.clear()
    judged(replace(settings, bundle=half), *one)
    found["dtype"] = [len(drawn), 0]
    nothing = {"nothing": [0, 0], 0.0: [0, 0]}  # at strength 0 it is the original
    assert found == {name: nothing.get(name, [1, 0]) for name in found}


def with_config(part, name="config", **changed):
    """A copy of a network whose config says something else of the same tensors."""
    part = copy.copy(part)
    setattr(part, name, replace(getattr(part, name), **changed))
    return part


def with_tensor(network):
    """A copy of a network with another tensor."""
    network = copy.deepcopy(network)
    vars(network).pop("fingerprint", None)
    next(network.parameters()).data += 0.5
    return network


def changes(bundle):
    """What a bundle draws or judges with, each changed by itself."""
    (judge,) = bundle.classifiers["evaluate"]
    other, swapped, small = (copy.copy(judge) for _ in range(3))
    other.logits = {**dict.fromkeys(judge.classes, (0, 1)), "skin_tone": (1, 2, 3)}
    swapped.classes = dict(reversed(judge.classes.items()))
    small._modules = {**judge._modules, "network": with_config(judge.network, input_size=24)}
    strict = copy.copy(bundle.detector.network)
    strict.thresholds = (0.1, 0.2, 0.3)
    manifest = bundle.manifest | {"templates": "bundle.json"}
    resized = bundle.clip.vision_config.image_size // 2
    return {
        **{name: {name: with_tensor(getattr(bundle, name))} for name in ("text_encoder", "unet", "vae")},
        **{f"{n} config": {n: copy.copy(getattr(bundle, n))} for n in ("text_encoder", "unet", "vae")},
        "device": {"unet": copy.deepcopy(bundle.unet).to("meta")},
        "dtype": {"unet": copy.deepcopy(bundle.unet).half()},
        "tokenizer": {"tokenizer": SimpleNamespace(fingerprint="other")},
        "schedule": {"schedule": Schedule(beta_end=0.01)},
        "resolution": {"resolution": 16},
        "templates": {"manifest": manifest},
        "classes": {"classifiers": {"evaluate": (swapped,)}},
        "logits": {"classifiers": {"evaluate": (other,)}},
        "classifier": {"classifiers": {"evaluate": (with_tensor(judge),)}},
        "input size": {"classifiers": {"evaluate": (small,)}},
        "thresholds": {"detector": replace(bundle.detector, network=strict)},
        "clip": {"clip": with_tensor(bundle.clip)},
        "clip's size": {"clip": with_config(bundle.clip, "vision_config", image_size=resized)},
        "clip's tokenizer": {"clip_tokenizer": SimpleNamespace(fingerprint="other")},
        "dino": {"dino": with_tensor(bundle.dino)},
        "dino's size": {"dino": with_config(bundle.dino, input_size=8)},
        "none": {"detector": None},
    }


def test_the_key_has_all_that_images_and_judgements_follow_from(loaded_tiny_faces):
    bundle, drawing = loaded_tiny_faces, Drawing(2, 2.0)
    table = changes(bundle)
    for name in ("text_encoder", "unet", "vae"):
        table[f"{name} config"][name].config = SimpleNamespace(of="others")

    def key(**changed):
        model = replace(bundle, **changed)
        return json.dumps([model_of(model, drawing, 0), judges_of(model)], sort_keys=True)

    keys = {name: key(**changed) for name, changed in table.items()}
    assert len({key(), key(), *keys.values()}) == 1 + len(table)
    assert judges_of(replace(bundle, detector=lambda x: [])) is None  # nobody can tell it from another


def test_ones_own_judge_is_known_by_its_files_hash(tiny_folder, tmp_path, drawn):
    file = tmp_path / "own.py"
    counts = []
    for text in (RED, RED, RED.replace("x[:, 0]", "x[:, 1]")):
        file.write_text(text)
        drawn.clear()
        bundle = load_bundle(tiny_folder, judges={"evaluate": f"{file}:loader"})
        judged(settings_of(bundle, tmp_path / "kept"))
        counts.append(len(drawn))
    assert counts == [3, 0, 3]
    # what a program puts in has neither a hash nor a fingerprint
    judged(settings_of(replace(bundle, dino=lambda x: x.mean((2, 3))), tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_prompts_of_few_images_are_drawn_together_and_judged_as_alone(
    loaded_tiny, tmp_path, drawn, monkeypatch
):
    """Groups are of one size, so that rounding does not hang on who draws which prompts."""
    settings = settings_of(loaded_tiny, None)
    source = drawn_by(settings, loaded_tiny, "")
    alone = judge_prompts(settings, replace(source, draw_together=None), PROMPTS, 3)
    for most, expected in ((9, PROMPTS), (7, [*PROMPTS, PROMPTS[2]]), (5, PROMPTS)):
        drawn.clear()
        monkeypatch.setattr(judging, "group_size", lambda _, most=most: most)
        together = judge_prompts(settings, source, PROMPTS, 3)
        assert drawn == [(prompt, [0, 1, 2]) for prompt in expected]
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one.classes["classifier"]["gender"], other.classes["classifier"]["gender"])
            torch.testing.assert_close(one.features["clip"], other.features["clip"], rtol=0, atol=1e-5)
    own = replace(settings, drawing=settings.drawing._replace(padding="own"))
    assert drawn_by(own, loaded_tiny, "").draw_together is None  # c_empty is another one for each


@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize("left", [1, 2])
def test_an_interrupted_evaluation_goes_on(loaded_tiny, tmp_path, drawn, monkeypatch, together, left):
    """And ends with the same numbers, to the last bit: groups are of the size that they would have had."""
    settings, real = settings_of(loaded_tiny, tmp_path), KeptJudgements.write

    def write(kept, prompt, rows):
        if prompt == PROMPTS[3 - left]:
            raise KeyboardInterrupt
        real(kept, prompt, rows)

    monkeypatch.setattr(judging, "group_size", lambda _: 3 * together)
    monkeypatch.setattr(KeptJudgements, "write", write)
    with pytest.raises(KeyboardInterrupt):
        judged(settings)
    monkeypatch.setattr(KeptJudgements, "write", real)
    drawn.clear()
    rows = judged(settings)
    assert {prompt for prompt, _ in drawn} == set(PROMPTS[-left:])
    assert len(drawn) == -(-left // together) * together
    assert_same(rows, judged(replace(settings, kept=None)), rtol=0, atol=0)


@pytest.mark.parametrize("fault", ["bit", "cut", "empty", "other"])
def test_a_damaged_file_is_named_and_drawn_again(loaded_tiny, tmp_path, drawn, caplog, fault):
    settings = settings_of(loaded_tiny, tmp_path)
    rows = judged(settings)
    damaged, another, _ = sorted(tmp_path.iterdir())
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes({"bit": data, "cut": data[:-9], "empty": b"", "other": another.read_bytes()}[fault])
    drawn.clear()
    note.cache_clear()
    assert_same(judged(settings), rows, rtol=0, atol=0)
    assert len(set(map(str, drawn))) == 1 and len(caplog.messages) == 1
    assert damaged.name in caplog.text and caplog.messages[0].endswith(": its images are drawn again.")
    drawn.clear()
    judged(settings)
    assert not drawn


def test_a_run_is_evaluated_beside_its_original_and_leaves_its_rows(loaded_tiny, adapter, drawn):
    options = {"adapter": str(adapter.parent), "images": 2, "explicit_images": 1}
    report = evaluate(loaded_tiny, **options)
    pictures = 2 * 2  # rows of pictures.png, which are drawn where the run has none yet
    assert len(drawn) == 2 * (2 + 2 * 2) + pictures and 0 < report["clip_i"] < 0.9999
    assert report["adapters"][0]["strength"] == 1
    drawn.clear()
    assert evaluate(loaded_tiny, **options) == report and not drawn
    both = json.loads((adapter.parent / "judged.json").read_text())
    assert list(both) == ["before", "after"] and both["after"]["test"] == report
    with (adapter.parent / "judged.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["before"] * 8 + ["after"] * 8
    assert [(row["asked"], row["image"]) for row in rows[:8]] == [
        *[("", "0"), ("", "1")] * 2,
        *[("gender=woman", "0"), ("gender=man", "0")] * 2,
    ]
    singer = [row for row in rows[8:] if "singer" in row["prompt"] and not row["asked"]]
    counts = report["judges"]["classifier"]["counts"][OCCUPATIONS["test"][0]]
    assert [sum(row["classifier gender"] == name for row in singer) for name in ("woman", "man")] == counts
    for row in singer:
        p = [float(row[f"classifier gender {name}"]) for name in ("woman", "man")]
        assert row["classifier gender"] == ("woman", "man")[p[1] > p[0]] and sum(p) == pytest.approx(
            1, abs=1e-3
        )
    # its pictures are of the latest evaluation of the adapter as trained, but for those of the run's own end
    pictures = adapter.parent / "pictures.png"
    for changed, is_drawn in (({"strength": 0.5}, False), ({"seed": 1}, True), ({"seed": 2}, False)):
        was = pictures.read_bytes()
        if changed == {"seed": 2}:
            (adapter.parent / "evaluation.json").touch()
        evaluate(loaded_tiny, **{**options, **changed, "images": 1, "explicit_images": 0})
        assert (pictures.read_bytes() != was) == is_drawn
    (adapter.parent / "evaluation.json").unlink()
    # a file alone has no folder of its own
    one = adapter.parent.parent / f"{adapter.parent.name}-alone.safetensors"
    one.write_bytes(adapter.read_bytes())
    assert prepare(loaded_tiny, EvaluationOptions(adapter=str(one))).home is None


def test_an_evaluation_is_as_the_run_says_that_made_the_adapter(loaded_tiny, tmp_path, capsys):
    _, lora = adapt(loaded_tiny, "text_encoder", 2)
    aim = {"classes": {"skin_tone": ["light", "medium", "dark"]}, "target": [0.2, 0.3, 0.5]}
    run = tmp_path / "run"
    run.mkdir()
    save_adapter(
        run / "adapter.safetensors", dict(lora.named_parameters()), {"base": loaded_tiny.fingerprints, **aim}
    )
    recipe = {"eval_steps": 3, "eval_guidance": 4.0, "end": "sigma_min", "eval_images": 9, "lr": 1}
    (run / "settings.json").write_text(json.dumps({"recipe": recipe}))
    settings = prepare(loaded_tiny, EvaluationOptions(adapter=run)).settings
    assert settings.drawing == Drawing(3, 4.0, "sigma_min", "full")
    assert settings.target.table.tolist() == [0.2, 0.3, 0.5] and list(settings.target.classes) == [
        "skin_tone"
    ]
    asked = EvaluationOptions(adapter=run, attr="gender", steps=2, guidance=0.0, end="zero")
    settings = prepare(loaded_tiny, asked).settings
    assert settings.drawing == Drawing(2, 0.0, "zero", "full") and settings.target.table.tolist() == [
        0.5,
        0.5,
    ]
    alone = prepare(loaded_tiny, EvaluationOptions()).settings
    assert alone.drawing == Drawing(2, 2.0) and list(alone.target.classes) == ["gender"]


def test_nothing_is_made_where_an_evaluation_is_refused(loaded_tiny, tmp_path):
    (tmp_path / "run").mkdir()
    for wrong in ({"adapter": tmp_path / "run"}, {"labelled": tmp_path}, {"labels": tmp_path / "l.csv"}):
        with pytest.raises(UserError):
            prepare(loaded_tiny, EvaluationOptions(**{"cache": tmp_path / "cache", **wrong}))
    with pytest.raises(UserError):
        prepare(loaded_tiny, EvaluationOptions(adapter=tmp_path / "run"))
    assert [path.name for path in tmp_path.rglob("*")] == ["run"]


def test_sweeps(loaded_tiny, adapter, tmp_path, drawn, capsys):
    options = EvaluationOptions(
        adapter=[str(adapter)], images=2, explicit_images=0, cache=str(tmp_path / "kept")
    )
    evaluation = prepare(loaded_tiny, options)
    sweep = Sweep.parse("strength=0,0.5,1")
    path = sweep_file(evaluation, sweep)
    run_sweep(evaluation, sweep, path)
    assert path == tmp_path / "kept" / "sweep-strength.json"
    found = json.loads(path.read_text())
    assert (found["sweep"], found["values"]) == ("strength", [0, 0.5, 1])
    before, after = found["reports"]["before"], found["reports"]["after"]
    assert before[0] == before[2] and len(drawn) == 2 * 3  # the original is the adapter at 0
    assert after[0]["judges"] == before[0]["judges"] and after[0]["clip_i"] == pytest.approx(1)
    assert after[0]["clip_i"] > after[1]["clip_i"]
    assert (
        [r["adapters"][0]["strength"] for r in after] == [r["made"]["strength"] for r in after] == [0, 0.5, 1]
    )
    made = {"seed": SEED, "steps": 2, "guidance": 2.0, "end": "zero", "padding": "full", "prompts": "test"}
    made |= {"strength": None, "weights": before[0]["made"]["weights"]}
    assert before[2]["made"] == made and after[1]["made"] == {**made, "strength": 0.5}
    drawn.clear()
    sweep = Sweep.parse("guidance=2,7.5")
    reports = run_sweep(evaluation, sweep, sweep_file(evaluation, sweep))
    assert len(drawn) == 2 * 2  # that at 2 is there
    assert [r["guidance"] for r in reports["after"]] == [2, 7.5]
    assert reports["after"][0] == after[2]
    assert "guidance 7.5, after:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, words",
    [
        ("steps=1", "--sweep is 'steps=1'; expected guidance="),
        ("guidance", "--sweep is 'guidance'"),
        ("guidance=", "--sweep guidance: found ''; expected numbers from 0 to 1e"),
        ("guidance=1,nan", "--sweep guidance: found 'nan'"),
        ("strength=1.6", "--sweep strength: found '1.6'; expected numbers from 0 to 1.5"),
        ("strength=-0.5", "--sweep strength: found '-0.5'"),
        ("guidance=1,2,1.0", "--sweep guidance names 1 twice"),
    ],
)
def test_a_sweep_that_makes_no_sense(text, words):
    with pytest.raises(UserError) as error:
        Sweep.parse(text)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "options, text, words",
    [
        ({"prompts": "occupations,sports"}, "guidance=1", "--prompts names occupations, sports"),
        ({}, "strength=1", "--sweep strength is of one --adapter, found none"),
        ({"cache": None}, "guidance=1", "--sweep is written into a run's folder"),
    ],
)
def test_a_sweep_of_what_there_is_not(loaded_tiny, tmp_path, options, text, words):
    options = EvaluationOptions(**{"cache": str(tmp_path), **options})
    with pytest.raises(UserError) as error:
        sweep_file(prepare(loaded_tiny, options), Sweep.parse(text))
    assert words in str(error.value)
