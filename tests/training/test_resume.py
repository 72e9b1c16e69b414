"""A run knows what it was made from, and goes on from what is whole of it."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_run import make_setup

from fairref.bundle.loading import Bundle, load_bundle
from fairref.commands import cli, evaluate, sample, train
from fairref.errors import UserError
from fairref.files.weights import read_info, write
from fairref.generation.adapters import FORMAT, load_adapter, save_adapter
from fairref.generation.lora import adapt
from fairref.settings import Recipe
from fairref.training import checkpoints
from fairref.training.loop import finetune, new_state, update
from fairref.training.stored import differences, refuse_another

PROMPT = "a photo of the face of a pilot, a person"
PARTS = {  # key -> its file in the tiny bundle with all judges
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "clip": "clip/model.safetensors",
    "classifiers.finetune": "finetune/model.safetensors",
    "classifiers.evaluate": "evaluate/model.safetensors",
    "detector": "detector/model.safetensors",
    "embedder": "embedder/model.safetensors",
    "face_features": "D_F.safetensors",
    "dino": "dino/model.safetensors",
}


@pytest.fixture(scope="module")
def run_folder(tiny_faces_folder, tmp_path_factory):
    """A run of one iteration, with all judges."""
    out = tmp_path_factory.mktemp("runs") / "first"
    options = ["--attr", "gender", "--weights", str(tiny_faces_folder), "--evaluate", "none"]
    assert cli.run(train.main, [*options, "--iterations", "1", "--out", str(out)]) == 0
    return out


def resume(folder, *options):
    return cli.run(train.main, ["--resume", str(folder), *options])


# what it was made from


def test_settings_have_each_part_s_fingerprint_and_the_absolute_path(
    run_folder, tiny_faces_folder, loaded_tiny_faces
):
    settings = checkpoints.read_settings(run_folder)
    assert set(settings["fingerprints"]) == {*PARTS, "tokenizer", "clip_tokenizer"}
    assert len(set(settings["fingerprints"].values())) == len(settings["fingerprints"])
    assert settings["fingerprints"] == load_bundle(tiny_faces_folder).all_fingerprints
    assert settings["weights"] == str(tiny_faces_folder) and Path(settings["weights"]).is_absolute()
    adapter = read_info(run_folder / "adapter.safetensors")
    assert adapter["base"] == {key: settings["fingerprints"][key] for key in adapter["base"]}
    assert set(adapter["base"]) == {"unet", "vae", "text_encoder"}


def test_templates_and_a_prefix_are_parts(loaded_emoji):
    assert {"templates", "detector", "dino"} < set(loaded_emoji.all_fingerprints)
    prefixed = adapt(loaded_emoji, "prefix")[0]
    assert set(prefixed.all_fingerprints) - set(loaded_emoji.all_fingerprints) == {"soft"}


def test_what_is_shown_has_no_absolute_path(tiny_folder, tmp_path, capsys):
    """Neither an adapter, nor an evaluation, nor a picture's text."""
    out, options = tmp_path / "run", ["--weights", str(tiny_folder)]
    run = ["--attr", "gender", "--iterations", "1", "--out", str(out)]
    assert cli.run(train.main, [*options, *run]) == 0
    assert cli.run(sample.main, [PROMPT, "-n", "1", *options, "--out", str(tmp_path / "drawn")]) == 0
    capsys.readouterr()
    assert cli.run(evaluate.main, ["-n", "1", "--explicit-images", "0", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    text = Image.open(tmp_path / "drawn" / "seed0-000.png").text["settings"]
    adapter = read_info(out / "adapter.safetensors")
    assert report["weights"] == json.loads(text)["weights"] == adapter["weights"] == tiny_folder.name
    shown = [json.dumps(report), text, (out / "evaluation.json").read_text()]
    shown += [path.read_bytes().decode("latin1") for path in out.glob("*.safetensors")]
    assert not any(str(tiny_folder) in one or str(tmp_path) in one for one in shown)
    assert str(tiny_folder) in (out / "settings.json").read_text()


def changed(folder, out, key):
    """A copy of a bundle with one number of a part's file moved."""
    shutil.copytree(folder, out)
    tensors = load_file(out / PARTS[key])
    name = next(name for name, tensor in sorted(tensors.items()) if tensor.is_floating_point())
    # a norm stays what it is
    tensors[name].view(-1)[:2] = tensors[name].view(-1)[:2].flip(0) + (key != "face_features") * 0.25
    save_file(tensors, out / PARTS[key])
    return out


@pytest.mark.parametrize("key", PARTS)
def test_a_run_goes_on_with_no_other_part(run_folder, tiny_faces_folder, tmp_path, key):
    bundle = load_bundle(changed(tiny_faces_folder, tmp_path / "other", key))
    with pytest.raises(UserError, match=rf"other: {key} is not what the run was made from \(a bfloat16 copy"):
        refuse_another(checkpoints.read_settings(run_folder), bundle)


def test_neither_with_one_part_less_nor_with_one_more(loaded_tiny_faces):
    less = replace(loaded_tiny_faces, dino=None, clip_tokenizer=None)
    for began, now in ((loaded_tiny_faces, less), (less, loaded_tiny_faces)):
        with pytest.raises(UserError, match="clip_tokenizer, dino are not what the run was made from"):
            refuse_another({"fingerprints": began.all_fingerprints}, now)
    refuse_another({"fingerprints": less.all_fingerprints}, less)
    for damaged in ([], 1, None):
        with pytest.raises(UserError, match="unet"):
            refuse_another({"fingerprints": {**less.all_fingerprints, "unet": damaged}}, less)


def test_a_tokenizer_s_fingerprint_is_of_its_ids(tiny_folder, tmp_path):
    """The last two merges change places, and so do their tokens' ids."""
    tokenizer = shutil.copytree(tiny_folder, tmp_path / "other") / "tokenizer"
    *lines, a, b = (tokenizer / "merges.txt").read_text(encoding="utf-8").splitlines()
    (tokenizer / "merges.txt").write_text("\n".join([*lines, b, a]) + "\n", encoding="utf-8")
    ids = json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8"))
    a, b = (merge.replace(" ", "") for merge in (a, b))
    ids[a], ids[b] = ids[b], ids[a]
    (tokenizer / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    one, other = (load_bundle(folder).all_fingerprints for folder in (tiny_folder, tmp_path / "other"))
    assert {key for key in one if one[key] != other[key]} == {"tokenizer"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_run_in_another_number_format_has_its_files_fingerprints(
    tiny_faces_folder, loaded_tiny_faces, dtype
):
    assert load_bundle(tiny_faces_folder, dtype=dtype).all_fingerprints == loaded_tiny_faces.all_fingerprints


@pytest.mark.parametrize("dtype, same", [(torch.float16, True), (torch.bfloat16, False)])
def test_of_copies_in_half_precision_only_float16_counts_as_the_same(
    run_folder, tiny_faces_folder, tmp_path, capsys, dtype, same
):
    out, weights = shutil.copytree(run_folder, tmp_path / "run"), tmp_path / "copy"
    shutil.copytree(tiny_faces_folder, weights)
    for key in ("unet", "vae", "text_encoder"):
        tensors = load_file(weights / PARTS[key])
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, weights / PARTS[key])
    assert resume(out, "--weights", str(weights)) == (0 if same else 2)
    said = capsys.readouterr().err
    assert same or "text_encoder, unet, vae are not what the run was made from (a bfloat16 copy" in said


def test_moved_weights_are_taken_and_remembered(run_folder, tiny_faces_folder, tmp_path, capsys):
    out, moved = shutil.copytree(run_folder, tmp_path / "run"), tmp_path / "moved"
    shutil.copytree(tiny_faces_folder, moved)
    settings = checkpoints.read_settings(out) | {"weights": str(tmp_path / "gone")}
    (out / "settings.json").write_text(json.dumps(settings))
    assert resume(out) == 2 and "gone: no such weights" in capsys.readouterr().err
    assert resume(out, "--weights", str(moved)) == 0
    assert checkpoints.read_settings(out) == settings | {"weights": str(moved)}
    other = changed(tiny_faces_folder, tmp_path / "other", "unet")
    capsys.readouterr()
    assert resume(out, "--weights", str(other)) == 2
    assert "other: unet is not what the run was made from" in capsys.readouterr().err
    assert resume(out) == 0  # with those that moved


def test_settings_of_an_older_version_do_not_know_their_weights(run_folder, tmp_path, capsys):
    out = shutil.copytree(run_folder, tmp_path / "run")
    settings = checkpoints.read_settings(out)
    del settings["fingerprints"]
    (out / "settings.json").write_text(json.dumps(settings))
    assert resume(out) == 0
    assert "whether the weights are the same is unknown" in capsys.readouterr().out
    assert checkpoints.read_settings(out) == settings
    (out / "settings.json").write_text(json.dumps(settings | {"fingerprints": []}))
    assert resume(out) == 2 and "not the settings of a run" in capsys.readouterr().err


# what is whole of it


def older(path):
    """The file as an older version wrote it: its metadata are `info` alone."""
    save_file(load_file(path), path, metadata={"fairref": json.dumps(read_info(path))})


def test_an_adapter_without_a_digest_loads(loaded_tiny, tmp_path, capsys):
    path = tmp_path / "adapter.safetensors"
    tensors = dict(adapt(loaded_tiny, "text_encoder", 2)[1].named_parameters())
    save_adapter(path, tensors, {"classes": {"gender": ["woman", "man"]}})
    older(path)
    capsys.readouterr()
    loaded = load_adapter(loaded_tiny, path)
    layer = loaded.text_encoder.text_model.encoder.layers[0].mlp.fc1
    name = "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_down.weight"
    assert isinstance(loaded, Bundle) and torch.equal(layer.lora_down.weight, tensors[name])
    assert read_info(path) == {"classes": {"gender": ["woman", "man"]}, "format": FORMAT}
    assert "its base is unknown" in capsys.readouterr().err


@pytest.fixture(scope="module")
def states(loaded_tiny, tmp_path_factory):
    """A setup and a folder with the checkpoints of two iterations."""
    setup, folder = make_setup(loaded_tiny, rank=1), tmp_path_factory.mktemp("states")
    _, state = new_state(setup)
    for _ in range(2):
        update(setup.recipe, state, [torch.ones_like(p) for p in state.adapter.parameters()])
        checkpoints.save(folder, state)
    return setup, folder


def flipped(data, bit):
    data = bytearray(data)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def flips(data, count):
    """Bits of a file, half of them in its header."""
    draw = random.Random(0)
    header = 8 + int.from_bytes(data[:8], "little")
    return [draw.randrange(8 * (header if n % 2 else len(data))) for n in range(count)]


@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_no_flipped_bit_of_300_goes_unnoticed(loaded_tiny, states, tmp_path, kind):
    setup, folder = states
    _, state = new_state(setup)
    if kind == "checkpoint":
        path = tmp_path / checkpoints.saved(folder)[-1].name
        shutil.copy(folder / path.name, path)
    else:
        path = tmp_path / "adapter.safetensors"
        save_adapter(path, state.parameters(), {"base": loaded_tiny.fingerprints, "target": [0.5, 1e-5]})
    whole = path.read_bytes()

    def load():
        return (
            checkpoints.restore(tmp_path, state) if kind == "checkpoint" else load_adapter(loaded_tiny, path)
        )

    load()
    # and one that makes 1E-05 of 1e-05, the same number
    for bit in flips(whole, 300) + ([8 * whole.index(b"1e-05") + 13] if kind == "adapter" else []):
        path.write_bytes(flipped(whole, bit))
        with pytest.raises(UserError, match=path.name):
            load()
            pytest.fail(f"bit {bit} of {len(whole) * 8} makes no difference")


def test_a_rewritten_digest_does_not_hide_another_info(tmp_path):
    """All that stands in the file is in its digest, a name and a kind too."""
    path, x = tmp_path / "x.safetensors", torch.tensor([1.5, 2.0])
    digests = set()
    for name, tensor, info in (
        ("a", x, {}),
        ("b", x, {}),
        ("a", x.half(), {}),
        ("a", x.view(torch.int32), {}),
        ("a", x[:, None], {}),
        ("a", x, {"n": 1}),
        ("a", x.bfloat16(), {}),
    ):
        write(path, {name: tensor}, info)
        digests.add(path.read_bytes().split(b'sha256\\": \\"')[1][:64])
    assert len(digests) == 7


DAMAGES = {
    "a bit": lambda data: flipped(data, 8 * len(data) - 300),
    "half a file": lambda data: data[: len(data) // 2],
    "nothing in it": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_newest_checkpoint_gives_way_to_the_one_before_it(states, tmp_path, damage):
    setup, folder = states
    shutil.copytree(folder, tmp_path / "run")
    first, second = checkpoints.saved(tmp_path / "run")
    second.write_bytes(DAMAGES[damage](second.read_bytes()))
    _, state = new_state(setup)
    broken, taken = checkpoints.restore(tmp_path / "run", state).splitlines()
    assert state.iteration == 1 and broken.startswith(f"{second}: ")
    assert taken == f"{first}: is taken instead; iterations that are repeated: 2"
    first.write_bytes(DAMAGES[damage](first.read_bytes()))
    _, state = new_state(setup)
    with pytest.raises(
        UserError, match=rf"{second.name}: .*No checkpoint before it is whole: start a new run"
    ):
        checkpoints.restore(tmp_path / "run", state)


def test_a_run_resumed_after_a_broken_checkpoint_is_an_uninterrupted_one(
    loaded_tiny, tmp_path, monkeypatch, capsys
):
    setup = make_setup(loaded_tiny, iterations=5, checkpoint_every=1, lr=0.05)
    folders = [tmp_path / "whole", tmp_path / "broken"]
    for folder in folders:
        folder.mkdir()
    finetune(setup, folders[0], {})
    real = checkpoints.append_metrics

    def stop_in_the_fifth(folder, metrics):
        real(folder, metrics)
        if metrics["iteration"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "append_metrics", stop_in_the_fifth)
        with pytest.raises(KeyboardInterrupt):
            finetune(setup, folders[1], {})
    before, newest = checkpoints.saved(folders[1])
    assert (before.stem, newest.stem) == ("checkpoint-000003", "checkpoint-000004") and Recipe.keep == 2
    newest.write_bytes(DAMAGES["a bit"](newest.read_bytes()))
    capsys.readouterr()
    finetune(setup, folders[1], {})
    said = capsys.readouterr().err
    assert f"{newest}: damaged" in said and f"{before}: is taken instead" in said and "repeated: 4\n" in said
    names = sorted(path.name for path in folders[0].glob("*.safetensors"))
    assert names == sorted(path.name for path in folders[1].glob("*.safetensors")) and len(names) == 4
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names)
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    for line in (*lines[0], *lines[1]):
        del line["seconds"]
    assert lines[0] == lines[1]


def test_what_is_broken_and_newer_goes_with_the_next_checkpoint(states, tmp_path):
    """Else it would be the newest again."""
    setup, folder = states
    for path in checkpoints.saved(folder):
        shutil.copy(path, tmp_path / path.name.replace("000002", "000009"))
    (tmp_path / "checkpoint-000009.safetensors").write_bytes(b"")
    _, state = new_state(setup)
    checkpoints.restore(tmp_path, state)
    state.iteration = 3
    checkpoints.save(tmp_path, state)
    assert [path.stem for path in checkpoints.saved(tmp_path)] == ["checkpoint-000001", "checkpoint-000003"]


# metrics.jsonl


def line(i, **rest):
    return json.dumps({"iteration": i, **rest}).encode() + b"\n"


@pytest.mark.parametrize(
    "found, kept, lost",
    [
        (line(0) + line(1) + line(2), [0, 1, 2], ""),
        (line(0) + line(1) + line(2) + line(3) + line(4), [0, 1, 2], ""),
        (line(2) + line(0) + line(1), [0, 1, 2], ""),
        (line(0) + line(1) + line(2)[:9], [0, 1], "2"),
        (line(0) + line(1)[:9] + line(2) + line(3), [0], "1 to 2"),
        (line(0) + b'{"iteration": 1, "prompt": "\xff"}\n' + line(2), [0, 2], "1"),
        (line(0, prompt="a\u2028b") + bytes(40) + b"\n" + line(2), [0, 2], "1"),
        (line(1), [1], "0, 2"),
        (b"[]\n1\n{}\n" + b"[" * 100_000 + b"\n" + b'{"iteration": []}\n\n' + line(0), [0], "1 to 2"),
        (b"", [], "0 to 2"),
        (None, [], "0 to 2"),
    ],
)
def test_metrics_are_kept_by_their_iteration_and_missing_ones_named(tmp_path, found, kept, lost):
    path = tmp_path / "metrics.jsonl"
    if found is not None:
        path.write_bytes(found)
    said = checkpoints.cut_metrics(tmp_path, 3)
    assert said == (
        lost and f'{path}: the lines of "iteration" {lost} are lost; the run goes on without them'
    )
    if found is not None:
        assert [json.loads(one)["iteration"] for one in path.read_bytes().splitlines()] == kept
        anew = (
            kept
            and f"{tmp_path}: has no checkpoint, so the run begins anew; {len(kept)} iterations are repeated"
        )
        assert checkpoints.cut_metrics(tmp_path, 0) == (anew or "") and path.read_bytes() == b""
    assert not list(tmp_path.glob("*.part"))


def test_a_run_goes_on_without_lost_lines_and_says_so(loaded_tiny, tmp_path, capsys):
    setup = make_setup(loaded_tiny, iterations=2)
    finetune(setup, tmp_path, {})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    finetune(replace(setup, recipe=replace(setup.recipe, iterations=3)), tmp_path, {})
    assert [json.loads(one)["iteration"] for one in path.read_text().splitlines()] == [0, 2]
    assert 'the lines of "iteration" 1 are lost' in capsys.readouterr().err


def test_the_first_words_of_a_resumed_run(loaded_tiny):
    setup = make_setup(loaded_tiny)
    known = {"processes": 1, "device": "cpu", "versions": {"torch": torch.__version__}, "fingerprints": {}}
    assert differences(known, setup.processes, torch.device("cpu")) == []
    del known["fingerprints"]
    (said,) = differences(known, setup.processes, torch.device("cpu"))
    assert "unknown" in said
