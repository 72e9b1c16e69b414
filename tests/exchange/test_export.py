"""What leaves for other tools: diffusers loads it with the same numbers and pictures, or it is refused."""

import configparser
import copy
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fairref
from fairref.bundle.loading import bundle_path, load_bundle
from fairref.bundle.stable_diffusion import NETWORKS
from fairref.commands import cli, export
from fairref.errors import UserError
from fairref.exchange import export as exporting
from fairref.exchange import space
from fairref.exchange.export import EMBEDDING_FILE, FORMATS, PEFT_FILE, export_adapter, merged
from fairref.exchange.exported import Export
from fairref.exchange.folder import write_configs, write_tensors
from fairref.exchange.layouts import to_kohya, to_ldm, to_peft
from fairref.exchange.space import SD15_ID, to_space
from fairref.files.weights import fingerprint
from fairref.generation.adapters import FILE, IMPORTED, load_adapter, read_adapter, save_adapter
from fairref.generation.lora import adapt, trained_layers
from fairref.generation.rollout import first_noise
from fairref.generation.sampling import SampleSettings, sample_tensor
from fairref.nets.unet import SD15
from fairref.settings import SOFT

PROMPT, NEGATIVE = "a photo of the face of a pilot, a person", "a man"
N, STEPS, GUIDANCE = 1, 3, 2.5
LORA = ("text_encoder", "unet", "both")
SLOW = [  # (component, format, float16)
    ("both", "diffusers", False),
    ("text_encoder", "kohya", False),
    ("unet", "diffusers", False),
    ("both", "merged", True),
    ("both", "single-file", False),
]
WAYS = [
    ("text_encoder", "diffusers", False),
    ("unet", "kohya", False),
    ("both", "kohya", False),
    ("prefix", "embedding", False),
    ("suffix", "embedding", False),
    ("both", "merged", False),
    ("both", "single-file", True),
    *(pytest.param(*way, marks=pytest.mark.slow) for way in SLOW),
]
WHOLE = ("merged", "single-file")
NAME = "fairref-gender"
BASE = bundle_path("weights/emoji")
ROOT = Path(__file__).resolve().parents[2]
CLASSES = {"gender": ["woman", "man"]}
KEYS = Path(__file__).with_name("sd15_lora_keys.tsv")
FIRST = "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_down.weight"


def generator(seed):
    return torch.Generator().manual_seed(seed)


def moved(bundle, component, scale=0.05):
    """An adapter's tensors, far from where they start."""
    _, adapter = adapt(bundle, component, 4, 3, generator(0))
    start = dict(adapter.named_parameters())
    return {
        name: t.detach() if "lora_down" in name else t + scale * torch.randn(t.shape, generator=generator(n))
        for n, (name, t) in enumerate(start.items())
    }


@pytest.fixture(scope="module")
def runs(loaded_emoji, tmp_path_factory):
    """component -> the folder of a run, as far as an export reads it."""
    folders = {"imported": tmp_path_factory.mktemp("runs") / "imported"}
    for component in (*LORA, *SOFT):
        folder = folders[component] = tmp_path_factory.mktemp("runs") / component
        folder.mkdir()
        info = {
            "weights": "emoji",
            "base": loaded_emoji.fingerprints,
            "classes": CLASSES,
            "target": [0.5, 0.5],
        }
        save_adapter(folder / FILE, moved(loaded_emoji, component), info)
    return folders


@pytest.fixture(scope="module")
def exported(loaded_emoji, runs, tmp_path_factory):
    """(component, format, half) -> the folder, made once."""
    made = {}

    def get(component, to, half=False):
        if (component, to, half) not in made:
            out = tmp_path_factory.mktemp("out") / "folder"
            made[component, to, half] = export_adapter(loaded_emoji, runs[component], to, out, half)
        return made[component, to, half]

    return get


@pytest.fixture(scope="module")
def base_pipeline():
    """diffusers' own pipeline of the base; nobody changes it."""
    return diffusers.StableDiffusionPipeline.from_pretrained(
        BASE, torch_dtype=torch.float32, local_files_only=True
    )


@pytest.fixture
def loaded(base_pipeline, exported):
    """(component, format, half) -> diffusers' pipeline with what was exported."""

    def get(component, to, half=False):
        folder, kind = exported(component, to, half), diffusers.StableDiffusionPipeline
        options = {"torch_dtype": torch.float32, "local_files_only": True}
        if to == "merged":
            return kind.from_pretrained(folder, **options)
        if to == "single-file":
            return kind.from_single_file(str(folder / f"{NAME}.safetensors"), config=str(folder), **options)
        parts = {**base_pipeline.components, "requires_safety_checker": False}
        parts |= {name: copy.deepcopy(parts[name]) for name in ("tokenizer", "text_encoder", "unet")}
        pipe = kind(**parts)
        if to == "embedding":
            pipe.load_textual_inversion(folder / EMBEDDING_FILE)
        else:
            pipe.load_lora_weights(
                folder, weight_name=PEFT_FILE if to == "diffusers" else f"{NAME}.safetensors"
            )
        return pipe

    return get


def theirs(pipe, bundle, prompt=PROMPT, **options):
    pipe.set_progress_bar_config(disable=True)
    options = {"negative_prompt": [NEGATIVE] * N, **options}
    z_T = first_noise(bundle, 0, 0, range(N))
    how = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "pt"}
    return 2 * pipe([prompt] * N, latents=z_T, **how, **options).images - 1


def ours(bundle):
    return sample_tensor(bundle, SampleSettings(PROMPT, N, 0, STEPS, GUIDANCE, NEGATIVE))


def apart(a, b):
    """Mean absolute difference of images in [-1, 1], in 255ths."""
    return float((a - b).abs().mean()) / 2 * 255


@pytest.mark.parametrize("component, to, half", WAYS)
def test_diffusers_draws_what_sample_draws(loaded_emoji, runs, exported, loaded, component, to, half):
    """Of a whole model, fairref draws it too, without an adapter."""
    wanted, near = ours(load_adapter(loaded_emoji, runs[component])), 0.05 if half else 0.01
    prompt = {"prefix": f"<{NAME}> {PROMPT}", "suffix": f"{PROMPT} <{NAME}>"}.get(component, PROMPT)
    assert apart(ours(loaded_emoji), wanted) > 2
    assert apart(theirs(loaded(component, to, half), loaded_emoji, prompt), wanted) < near
    if to in WHOLE:
        again = load_bundle(exported(component, to, half))
        assert apart(ours(again), wanted) < near and again.resolution == loaded_emoji.resolution


def test_the_negative_prompt_changes_as_well(loaded_emoji, runs, loaded, base_pipeline):
    """It goes through the same text encoder: with the base's in its place, the picture is another."""
    wanted = ours(load_adapter(loaded_emoji, runs["text_encoder"]))
    without = base_pipeline.encode_prompt(NEGATIVE, "cpu", 1, False)[0]
    pipe = loaded("text_encoder", "diffusers")
    assert apart(theirs(pipe, loaded_emoji), wanted) < 0.01
    of_base = theirs(
        pipe, loaded_emoji, negative_prompt=None, negative_prompt_embeds=without.expand(N, -1, -1)
    )
    assert apart(of_base, wanted) > 1


@pytest.mark.parametrize("place", ["behind the prompt", "in the negative prompt"])
def test_a_token_in_another_place_is_another_prompt(loaded_emoji, runs, loaded, place):
    wanted, pipe = ours(load_adapter(loaded_emoji, runs["prefix"])), loaded("prefix", "embedding")
    prompt, negative = (
        (f"{PROMPT} <{NAME}>", NEGATIVE) if "behind" in place else (PROMPT, f"<{NAME}> {NEGATIVE}")
    )
    assert apart(theirs(pipe, loaded_emoji, prompt, negative_prompt=[negative] * N), wanted) > 2


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_half_of_the_change_is_a_strength_of_a_half(loaded_emoji, runs, loaded, to):
    wanted, pipe = ours(load_adapter(loaded_emoji, runs["both"], 0.5)), loaded("both", to)
    assert apart(theirs(pipe, loaded_emoji, cross_attention_kwargs={"scale": 0.5}), wanted) < 0.01
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)
    assert apart(theirs(pipe, loaded_emoji), wanted) < 0.01
    assert apart(ours(load_adapter(loaded_emoji, runs["both"])), wanted) > 1


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_diffusers_holds_every_matrix_of_the_file_and_fuses_the_same_weights(loaded_emoji, runs, loaded, to):
    adapter, pipe = read_adapter(runs["both"]), loaded("both", to)
    assert lora_of(pipe) == {layer: 1 for layer in adapter.pairs}
    for layer, (down, up) in adapter.pairs.items():
        module = layer_of(pipe, layer)
        ((found_down,), (found_up,)) = module.lora_A.values(), module.lora_B.values()
        assert torch.equal(found_down.weight, down) and torch.equal(found_up.weight, up), layer
    fuse_and_compare(pipe, loaded_emoji, adapter)


def layer_of(pipe, layer):
    """transformers 5.6 and later have no `text_model.` in a text encoder's names."""
    part, _, name = layer.partition(".")
    network = getattr(pipe, part)
    return network.get_submodule(name if hasattr(network, "text_model") else name.removeprefix("text_model."))


def lora_of(pipe):
    """Layer with LoRA -> its scale."""
    scales = {}
    for part in ("text_encoder", "unet"):
        network = getattr(pipe, part)
        start = "" if part == "unet" or hasattr(network, "text_model") else "text_model."
        for name, module in network.named_modules():
            if hasattr(module, "lora_A"):
                (scales[f"{part}.{start}{name}"],) = module.scaling.values()
    return scales


def fuse_and_compare(pipe, bundle, adapter):
    """Fused by PEFT, each weight is the one that a merged model has."""
    pipe.fuse_lora()
    states = merged(Export(bundle, adapter, "", Path(), "", False))
    for layer in adapter.pairs:
        part, _, name = layer.partition(".")
        found, tensor = layer_of(pipe, layer).base_layer.weight, states[part][f"{name}.weight"]
        torch.testing.assert_close(found, tensor, rtol=0, atol=1e-6)
        assert (tensor - getattr(bundle, part).state_dict()[f"{name}.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_imported_lora_of_any_layers_and_ranks_leaves_too(loaded_emoji, loaded, exported, runs, tmp_path, to):
    """Linear layers and convolutions, each with its own rank."""
    layers = {
        "unet.conv_in": 2,
        "unet.down_blocks.0.resnets.0.conv1": 3,
        "unet.up_blocks.1.resnets.0.conv_shortcut": 2,
        "unet.down_blocks.0.attentions.0.proj_in": 2,
        "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2": 3,
        "unet.mid_block.resnets.0.time_emb_proj": 2,
        "text_encoder.text_model.encoder.layers.1.mlp.fc1": 4,
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj": 2,
    }
    tensors = {}
    for n, (layer, rank) in enumerate(layers.items()):
        part, _, name = layer.partition(".")
        out, *rest = getattr(loaded_emoji, part).get_submodule(name).weight.shape
        tensors[f"{layer}.lora_down.weight"] = 0.1 * torch.randn(rank, *rest, generator=generator(n))
        tensors[f"{layer}.lora_up.weight"] = 0.1 * torch.randn(
            out, rank, *[1 for _ in rest[1:]], generator=generator(99 + n)
        )
    runs["imported"].mkdir(exist_ok=True)
    save_adapter(
        runs["imported"] / FILE, tensors, {"base": loaded_emoji.fingerprints, "classes": CLASSES}, IMPORTED
    )
    pipe = loaded("imported", to)
    assert lora_of(pipe) == dict.fromkeys(layers, 1)
    fuse_and_compare(pipe, loaded_emoji, read_adapter(runs["imported"]))


@pytest.mark.parametrize("component, to, half", WAYS)
def test_the_check_notices_other_weights(exported, tmp_path, monkeypatch, component, to, half):
    folder = shutil.copytree(exported(component, to, half), tmp_path / "copy")
    files = {
        "diffusers": PEFT_FILE,
        "embedding": EMBEDDING_FILE,
        "merged": "unet/diffusion_pytorch_model.safetensors",
    }

    def check(base=BASE):
        monkeypatch.setattr(sys, "argv", ["check.py", *([] if to in WHOLE else [str(base)])])
        runpy.run_path(str(folder / "check.py"), run_name="__main__")

    check()
    change(folder / files.get(to, f"{NAME}.safetensors"), lambda name, tensor: tensor / 2)
    with pytest.raises(SystemExit, match=r"off after loading|not the weights"):
        check()


def test_the_check_notices_another_base_and_missing_layers(exported, tmp_path, monkeypatch):
    folder = shutil.copytree(exported("both", "kohya"), tmp_path / "copy")
    other = shutil.copytree(BASE, tmp_path / "other", ignore=shutil.ignore_patterns("clip", "classifier*"))
    change(other / "text_encoder/model.safetensors", lambda name, t: t + 0.01 if "final" in name else t)
    change(folder / f"{NAME}.safetensors", lambda name, t: None if "layers_0_mlp_fc1" in name else t)
    for base, message in (
        (other, "text_encoder: not the weights"),
        (BASE, "text_encoder: 17 layers have LoRA, expected 18"),
    ):
        monkeypatch.setattr(sys, "argv", ["check.py", str(base)])
        with pytest.raises(SystemExit, match=message):
            runpy.run_path(str(folder / "check.py"), run_name="__main__")


def change(path, by):
    """A file's tensors anew; None leaves one out."""
    tensors = {name: by(name, t) if t.is_floating_point() else t for name, t in load_file(path).items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, path, {"format": "pt"})


# the files themselves


def test_names_and_headers(loaded_emoji, exported):
    def opened(path):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return {name: list(file.get_tensor(name).shape) for name in names}, file.metadata()

    shapes, header = opened(exported("both", "diffusers") / "pytorch_lora_weights.safetensors")
    assert shapes["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] == [4, 96]
    assert shapes["text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight"] == [384, 4]
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight" in shapes
    assert "lora_adapter_metadata" not in header
    shapes, header = opened(exported("both", "kohya") / f"{NAME}.safetensors")
    assert shapes["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] == [4, 96]
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight" in shapes
    assert header == {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_base_model_version": "sd_v1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
    }
    alphas = [
        t
        for name, t in load_file(exported("both", "kohya") / f"{NAME}.safetensors").items()
        if "alpha" in name
    ]
    assert len(alphas) == len(shapes) // 3 and all(t.item() == 4 and t.dim() == 0 for t in alphas)
    assert opened(exported("prefix", "embedding") / f"{NAME}.safetensors")[0] == {"emb_params": [3, 96]}
    assert opened(exported("prefix", "embedding") / "learned_embeds.safetensors")[0] == {f"<{NAME}>": [3, 96]}
    shapes, _ = opened(exported("both", "single-file", True) / f"{NAME}.safetensors")
    assert shapes["first_stage_model.decoder.mid.attn_1.q.weight"] == [96, 96, 1, 1]
    assert "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight" in shapes
    assert {f"model.diffusion_model.output_blocks.{n}.conv.weight" for n in ("1.1", "3.2")} <= set(shapes)
    tensors = load_file(exported("both", "single-file", True) / f"{NAME}.safetensors")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}


def test_at_the_size_of_sd15_the_names_are_those_of_comfyui_and_a1111():
    """72 layers of the text encoder, 128 of the U-Net."""
    rows = [line.split("\t") for line in KEYS.read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    with torch.device("meta"):
        networks = {name: part.network(part.sd15) for name, part in NETWORKS.items()}
    empty = torch.empty(1, 1)
    layers = [
        f"{part}.{name}" for part in ("text_encoder", "unet") for name in trained_layers(part, networks[part])
    ]
    pairs = {layer: (empty, empty) for layer in layers}
    assert len(to_peft(pairs)) == 2 * (72 + 128)
    keys = [name.removesuffix(".alpha") for name in to_kohya(pairs) if name.endswith(".alpha")]
    # where each layer stands in a single file, which is how both tools have the model in memory
    marked = {name: {key: (name, key) for key in network.state_dict()} for name, network in networks.items()}
    states = {n: {key: torch.empty(1, 1, 1) for key in state} for n, state in marked.items()}
    states["text_encoder"]["text_model.embeddings.position_embedding.weight"] = torch.empty(77, 1)
    places = {id(t): (part, key) for part, state in states.items() for key, t in state.items()}
    ldm = {
        places[id(t)]: name
        for name, t in to_ldm(states, SD15, NETWORKS["vae"].sd15).items()
        if id(t) in places
    }
    found = {}
    for key, layer in zip(keys, layers, strict=True):
        part, _, name = layer.partition(".")
        found[key] = ldm[part, f"{name}.weight"]
    assert set(found) == {key for key, *_ in rows} and len(rows) == 200
    for key, comfy, a1111 in rows:
        place = found[key].removeprefix("model.").removeprefix("cond_stage_model.")
        assert comfy in (place, f"clip_l.{place}") and a1111 == place.removesuffix(".weight").replace(
            ".", "_"
        )


@pytest.mark.parametrize(
    "component, to, half",
    [("both", "kohya", False), ("suffix", "embedding", False), ("both", "merged", False)],
)
def test_the_same_export_is_the_same_bytes(loaded_emoji, runs, exported, tmp_path, component, to, half):
    again = export_adapter(loaded_emoji, runs[component], to, tmp_path / "again", half)
    first = exported(component, to, half)
    files = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    assert files and all((again / file).read_bytes() == (first / file).read_bytes() for file in files)


def test_the_tokenizer_of_a_whole_model_is_the_bases(loaded_emoji, exported, base_pipeline):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(exported("both", "merged"))
    texts = [PROMPT, "", "Ünïcode: a nurse's 12 chairs!", "word " * 99]
    how = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = pipe.tokenizer(texts, **how).input_ids
    assert torch.equal(ids, base_pipeline.tokenizer(texts, **how).input_ids)
    assert torch.equal(ids, loaded_emoji.tokenizer(texts))


@pytest.mark.slow
def test_at_the_size_of_sd15_diffusers_has_200_layers(loaded_emoji, tmp_path, monkeypatch):
    """Random weights, which float16 holds; check.py counts 72 and 128."""
    base, networks = tmp_path / "base", {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, part in NETWORKS.items():
            networks[name] = part.network(part.sd15).half().float().eval().requires_grad_(False)
            path = base / name / f"{part.file}.safetensors"
            path.parent.mkdir(parents=True)
            save_file(
                {key: t.half() for key, t in networks[name].state_dict().items()}, path, {"format": "pt"}
            )
    bundle = replace(loaded_emoji, path=base, manifest={}, resolution=512, **networks)
    write_configs(bundle, base)
    save_adapter(tmp_path / FILE, moved(bundle, "both"), {"base": bundle.fingerprints})
    for to in ("diffusers", "kohya"):
        folder = export_adapter(bundle, tmp_path / FILE, to, tmp_path / to)
        assert re.search('"text_encoder": 72,\\s*"unet": 128', (folder / "check.py").read_text())
        assert "creativeml-openrail-m" in (folder / "README.md").read_text()
        monkeypatch.setattr(sys, "argv", ["check.py", str(base)])
        runpy.run_path(str(folder / "check.py"), run_name="__main__")


# what is refused


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("missing", lambda key, t: None if key == FIRST else t, "1 tensors missing"),
        ("misshapen", lambda key, t: t[:, :-1] if key == FIRST else t, r"is float \[4, 95\], expected float \[4, 96\]"),
        ("not trained", lambda key, t: t * 0 if "fc2.lora_up" in key else t, "lora_up is all zero in 3 of 18"),
        ("no number", lambda key, t: t / 0 if key == FIRST else t, "holds what is no number"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(loaded_emoji, runs, tmp_path, name, spoil, message):
    tensors = {key: spoil(key, t) for key, t in read_adapter(runs["text_encoder"]).tensors.items()}
    info = {"base": loaded_emoji.fingerprints}
    save_adapter(tmp_path / FILE, {key: t for key, t in tensors.items() if t is not None}, info)
    for to in ("diffusers", "kohya", "merged", "single-file"):
        with pytest.raises(UserError, match=message) as error:
            export_adapter(loaded_emoji, tmp_path, to, tmp_path / "out")
        assert str(tmp_path / FILE) in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_an_adapter_that_leaves_the_empty_prompt_cannot_leave_for_other_tools(loaded_emoji, runs, tmp_path):
    adapter = read_adapter(runs["text_encoder"])
    save_adapter(tmp_path / FILE, adapter.tensors, {**adapter.info, "empty_prompt": "frozen"})
    for to in ("kohya", "diffusers", "merged"):
        with pytest.raises(UserError, match="--empty-prompt frozen"):
            export_adapter(loaded_emoji, tmp_path, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layer_that_the_base_lacks_is_refused(loaded_emoji, runs, tmp_path):
    layer = "text_encoder.text_model.encoder.layers.9.mlp.fc1"
    more = {f"{layer}.lora_down.weight": torch.ones(4, 96), f"{layer}.lora_up.weight": torch.ones(384, 4)}
    tensors = {**read_adapter(runs["text_encoder"]).tensors, **more}
    save_adapter(tmp_path / FILE, tensors, {"base": loaded_emoji.fingerprints})
    with pytest.raises(UserError, match="2 unknown tensors"):
        export_adapter(loaded_emoji, tmp_path, "kohya", tmp_path / "out")


@pytest.mark.parametrize(
    "component, to, half, message",
    [
        *(
            ("prefix", to, False, "has a prefix, but .*; give --to embedding or space")
            for to in FORMATS
            if to not in ("embedding", "space")
        ),
        ("suffix", "kohya", False, "has a suffix, but .*; give --to embedding or space"),
        ("deep", "embedding", False, "has tokens in each layer, but .* as words only; give --to space"),
        ("generated", "merged", False, "a network makes from the prompt, but .*; give --to space"),
        (
            "unet",
            "embedding",
            False,
            "has LoRA, but .*; give --to diffusers or kohya or merged or single-file",
        ),
        ("whole", "diffusers", False, "has whole matrices, but .*; give --to merged or single-file"),
        ("whole", "kohya", False, "has whole matrices, but .*; give --to merged or single-file"),
        ("unet", "kohya", True, "--half is for --to merged and single-file"),
    ],
)
def test_a_pair_that_makes_no_sense_is_refused_with_its_reason(
    loaded_emoji, runs, whole, tmp_path, component, to, half, message
):
    with pytest.raises(UserError, match=message):
        export_adapter(loaded_emoji, {**runs, "whole": whole}[component], to, tmp_path / "out", half)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def whole(loaded_emoji, tmp_path_factory):
    """An adapter of whole matrices."""
    layer = loaded_emoji.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    file = tmp_path_factory.mktemp("whole") / FILE
    save_adapter(
        file, {name: layer.weight * 3}, {"base": loaded_emoji.fingerprints, "classes": CLASSES}, IMPORTED
    )
    return file


def test_whole_matrices_leave_in_a_whole_model(loaded_emoji, whole, tmp_path):
    folder = export_adapter(loaded_emoji, whole, "merged", tmp_path / "out")
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    found, base = load_bundle(folder).unet.state_dict(), loaded_emoji.unet.state_dict()
    assert torch.equal(found[key], base[key] * 3)
    assert all(torch.equal(found[name], base[name]) for name in base if name != key)


def test_another_base_is_refused_unless_it_is_meant(loaded_emoji, runs, tmp_path, capsys):
    other = copy.deepcopy(loaded_emoji.unet)
    other.conv_in.weight.data += 1
    del other.fingerprint
    bundle = replace(loaded_emoji, unet=other)
    with pytest.raises(UserError, match="made from another unet"):
        export_adapter(bundle, runs["both"], "kohya", tmp_path / "out")
    card = export_adapter(bundle, runs["both"], "kohya", tmp_path / "out", any_base=True) / "README.md"
    assert (
        loaded_emoji.fingerprints["unet"] in card.read_text()
        and bundle.fingerprints["unet"] in card.read_text()
    )
    assert "another unet" in capsys.readouterr().err


def test_what_is_there_already_is_not_overwritten(loaded_emoji, runs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("mine")
    export_adapter(loaded_emoji, runs["unet"], "kohya", tmp_path / "out")
    for out in ("out", "file", "file/out"):
        with pytest.raises(UserError, match="--out is"):
            export_adapter(loaded_emoji, runs["unet"], "kohya", tmp_path / out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


@pytest.mark.parametrize("to", FORMATS)
def test_what_reads_back_as_something_else_is_not_exported(loaded_emoji, runs, tmp_path, monkeypatch, to):
    """One bit of one tensor."""

    def flawed(path, tensors, header):
        name = next(name for name in tensors if tensors[name].is_floating_point() and tensors[name].dim())
        tensors = {**tensors, name: tensors[name].clone(memory_format=torch.contiguous_format)}
        tensors[name].view(-1).view(torch.int32)[-1] ^= 1
        write_tensors(path, tensors, header)

    monkeypatch.setattr(exporting, "write_tensors", flawed)
    monkeypatch.setattr(space, "save_adapter", lambda path, tensors, *info: flawed(path, tensors, {}))
    component = "prefix" if to == "embedding" else "text_encoder"
    with pytest.raises(UserError, match="reads back as something else"):
        export_adapter(loaded_emoji, runs[component], to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# the card


@pytest.fixture(scope="module")
def evaluated(runs, tmp_path_factory):
    """The run of both networks with an evaluation, settings and a grid."""
    folder = shutil.copytree(runs["both"], tmp_path_factory.mktemp("evaluated") / "run")
    judged = lambda mean: {  # noqa: E731
        "test": {
            "attribute": "gender", "classes": ["woman", "man"], "concept": "occupations", "part": "test",
            "prompts": 50, "images": 60, "steps": 12, "guidance": 2.5, "noise_floor": {"mean": 0.1, "std": 0.08},
            "judges": {"classifier": {"mean": mean, "std": 0.17}, "templates": {"mean": None, "std": None}},
        }
    }  # fmt: skip
    results = {"before": judged(0.83), "after (ema)": judged(0.22), "after (raw)": judged(0.44)}
    (folder / "evaluation.json").write_text(json.dumps(results))
    recipe = {"steps": [6, 7], "guidance": [2.5, 2.5], "eval_steps": 12, "eval_guidance": 2.5}
    (folder / "settings.json").write_text(json.dumps({"weights": str(BASE.resolve()), "recipe": recipe}))
    (folder / "before_after.png").write_bytes(b"a grid")
    return folder


def test_the_card_says_what_was_measured_and_made(loaded_emoji, evaluated, tmp_path):
    folder = export_adapter(loaded_emoji, evaluated, "kohya", tmp_path / "out")
    text = (folder / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.base_model, data.library_name, data.license) == ("emoji", "diffusers", "mit")
    assert {"lora", "fairness", "text-to-image"} <= set(data.tags) and data.base_model_relation == "adapter"
    assert (
        "| 50 occupations that finetuning never saw | a classifier | .83 ± .17 | .22 ± .17 | .10 ± .08 |"
        in text
    )
    assert "woman and man in equal shares" in text and "6 to 7 steps, guidance 2.5" in text
    assert "about 12 steps, guidance 2.5" in text and "(before_after.png)" in text
    assert (folder / "before_after.png").read_bytes() == b"a grid"
    for word in (
        "`strength_clip` to 1",
        "clip skip to 1",
        f"<lora:{NAME}:1>",
        "not tried there",
        "0.41 or later",
    ):
        assert word in text, word
    for hash_ in loaded_emoji.fingerprints.values():
        assert hash_ in text


@pytest.mark.parametrize(
    ("guidance", "words"),
    [([1, 12, True], "1 and 12 by turns"), ([1, 7.5, False], "1 to 7.5"), (7.5, "7.5"), ([2, 3], "2 to 3")],
)
def test_the_card_says_how_guidance_was_drawn(loaded_emoji, evaluated, tmp_path, guidance, words):
    run = shutil.copytree(evaluated, tmp_path / "run")
    settings = json.loads((run / "settings.json").read_text())
    settings["recipe"]["guidance"] = guidance
    (run / "settings.json").write_text(json.dumps(settings))
    text = (export_adapter(loaded_emoji, run, "kohya", tmp_path / "out") / "README.md").read_text()
    assert f"6 to 7 steps, guidance {words}" in text and "about 12 steps, guidance 2.5" in text
    settings["recipe"]["guidance"] = ["much"]  # somebody else's file
    (run / "settings.json").write_text(json.dumps(settings))
    text = (export_adapter(loaded_emoji, run, "kohya", tmp_path / "other") / "README.md").read_text()
    assert "the steps and guidance of its finetuning are not known here" in text


def test_the_card_of_another_of_the_runs_adapters_has_its_own_numbers(loaded_emoji, evaluated, tmp_path):
    """The grid shows the first that was evaluated; what lies elsewhere was not."""
    info = {"base": loaded_emoji.fingerprints, "classes": CLASSES, "target": [0.3, 0.7]}
    raw, elsewhere = evaluated / "adapter_raw.safetensors", tmp_path / "mine.safetensors"
    for file in (raw, elsewhere):
        save_adapter(file, read_adapter(evaluated).tensors, info)
    text = (export_adapter(loaded_emoji, raw, "kohya", tmp_path / "raw") / "README.md").read_text()
    assert "| .83 ± .17 | .44 ± .17 |" in text and "before_after.png" not in text
    assert "woman 0.30, man 0.70." in text
    text = (export_adapter(loaded_emoji, elsewhere, "kohya", tmp_path / "out") / "README.md").read_text()
    assert ".83" not in text and "was not evaluated" in text and "steps, guidance" not in text


def test_the_card_shows_the_evaluation_of_this_very_adapter(loaded_emoji, evaluated, tmp_path):
    run = shutil.copytree(evaluated, tmp_path / "run")
    results = json.loads((run / "evaluation.json").read_text())
    for of_adapter, is_shown in ((fingerprint(read_adapter(run).tensors), True), ("0" * 64, False)):
        results["after (ema)"]["test"]["fingerprint"] = of_adapter
        (run / "evaluation.json").write_text(json.dumps(results))
        card = export_adapter(loaded_emoji, run, "kohya", tmp_path / str(is_shown)) / "README.md"
        assert (".83 ± .17" in card.read_text()) == is_shown == ("before_after.png" in card.read_text())


def test_the_card_names_the_judges_that_took_the_bundles_place(loaded_emoji, evaluated, tmp_path):
    run = shutil.copytree(evaluated, tmp_path / "run")
    settings = json.loads((run / "settings.json").read_text())
    rows = [
        {"role": "evaluate", "clip": "hat=a hat|a\nhead"},
        {"role": "dino", "path": "/x/d.py", "name": "d"},
    ]
    rows += [{"role": "evaluate", "path": "/x/own.py", "name": "loader", "sha256": "0"}]
    (run / "settings.json").write_text(json.dumps({**settings, "judge": rows}))
    text = (export_adapter(loaded_emoji, run, "kohya", tmp_path / "out") / "README.md").read_text()
    said = "classifier judged `clip:hat=a hat|a head`, which is CLIP without training; `own.py:loader`."
    assert said in text and "/x/" not in text


@pytest.mark.parametrize("to, model", [("kohya", "emoji"), ("merged", "derived")])
def test_the_card_on_another_base_claims_nothing_of_it(loaded_emoji, evaluated, tmp_path, to, model):
    other = copy.deepcopy(loaded_emoji.unet)
    other.conv_in.weight.data += 1
    del other.fingerprint
    derived = replace(loaded_emoji, unet=other, path=loaded_emoji.path.with_name("derived"))
    if to == "merged":  # which copies the tokenizer's files
        derived = replace(derived, manifest={**derived.manifest, "stable_diffusion": str(loaded_emoji.path)})
    folder = export_adapter(derived, evaluated, to, tmp_path / "out", any_base=True)
    text = (folder / "README.md").read_text()
    assert ModelCard(text).data.base_model == model and "Here it was put on derived, another model." in text
    assert ".83" not in text and "what it does to derived was not evaluated" in text
    assert not (folder / "before_after.png").exists() and "before_after.png" not in text


def test_the_card_of_an_imported_adapter_does_not_say_that_fairref_made_it(loaded_emoji, whole, tmp_path):
    adapter = read_adapter(whole)
    info = {"imported_from": "Some UCE.safetensors"}
    save_adapter(tmp_path / FILE, adapter.tensors, info, IMPORTED)
    folder = export_adapter(loaded_emoji, tmp_path, "single-file", tmp_path / "out")
    text = (folder / "README.md").read_text()
    assert "imported it from `Some UCE.safetensors`" in text and "made with fairref" not in text
    assert "not known which weights it was made from" in text and loaded_emoji.fingerprints["unet"] in text
    assert (folder / "fairref-some-uce.safetensors").is_file()


def test_an_evaluation_that_is_damaged_is_named(loaded_emoji, evaluated, tmp_path):
    run = shutil.copytree(evaluated, tmp_path / "run")
    (run / "evaluation.json").write_text('{"before": {"test": {"judges": 3}}, "after (ema)": {"test": {}}}')
    with pytest.raises(UserError, match=r"evaluation\.json: not what an evaluation"):
        export_adapter(loaded_emoji, run, "kohya", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("component, to, half", WAYS)
def test_no_text_of_an_export_has_a_path_of_this_machine(exported, component, to, half):
    folder = exported(component, to, half)
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert str(BASE.resolve().parent) not in path.read_text(), path
            assert str(folder.parents[1]) not in path.read_text(), path


@pytest.mark.parametrize("component, to, half", WAYS)
def test_the_cards_lines_for_diffusers_draw(exported, component, to, half):
    folder = exported(component, to, half)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    code = code.replace("FOLDER", str(folder)).replace('"BASE"', repr(str(BASE)))
    *lines, last = code.strip().splitlines()
    names = {}
    exec("\n".join(lines), names)
    names["pipe"].set_progress_bar_config(disable=True)
    image = eval(last.replace('person"', 'person", num_inference_steps=2'), names)
    assert image.size == (64, 64)


def test_the_command(weights_of_tiny, tmp_path, capsys):
    """From the command line, on another bundle."""
    folder, run = weights_of_tiny
    argv = [str(run), "--weights", str(folder), "--out", str(tmp_path / "out")]
    assert cli.run(export.main, [*argv, "--to", "diffusers"]) == 0
    said = capsys.readouterr().out
    assert "README.md, check.py, pytorch_lora_weights.safetensors" in said and "check.py BASE" in said
    assert cli.run(export.main, [*argv, "--to", "diffusers"]) == 2
    assert "give a new one" in capsys.readouterr().err
    assert cli.run(export.main, [*argv, "--to", "webui"]) == 2


@pytest.fixture
def weights_of_tiny(tiny_folder, loaded_tiny, tmp_path):
    save_adapter(tmp_path / "run.safetensors", moved(loaded_tiny, "both"), {"base": loaded_tiny.fingerprints})
    return tiny_folder, tmp_path / "run.safetensors"


def test_a_space_names_its_base_and_holds_fairref(tmp_path, runs):
    """Of Stable Diffusion 1.5, of which nothing but the shape is needed here."""
    adapter = read_adapter(runs["text_encoder"])
    base = SimpleNamespace(path=tmp_path / "sd15", unet=SimpleNamespace(config=SD15))
    to_space(Export(base, adapter, "space", tmp_path, NAME, False))
    names = {".gitattributes", "README.md", "adapter.safetensors", "app.py", "requirements.txt"}
    (wheel,) = {path.name for path in tmp_path.iterdir()} - names
    card = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=True).data.to_dict()
    assert (card["sdk"], card["app_file"], card["models"]) == ("gradio", "app.py", [SD15_ID])
    assert card["preload_from_hub"] == [SD15_ID] and card["license"] == "creativeml-openrail-m"
    assert card["suggested_hardware"] == "t4-small"  # a CPU draws nothing within a request's 300 seconds
    assert torch.equal(read_adapter(tmp_path / "adapter.safetensors").tensors[FIRST], adapter.tensors[FIRST])
    lines = configparser.ConfigParser()
    lines.read(ROOT / "setup.cfg")
    assert (tmp_path / "requirements.txt").read_text().split() == lines["options"]["install_requires"].split()
    called, hub, served = [], ModuleType("huggingface_hub"), []
    hub.snapshot_download = lambda name, **files: called.append((name, files)) or "/downloaded"
    code = (tmp_path / "app.py").read_text()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setitem(sys.modules, "huggingface_hub", hub)
        patch.setattr(cli, "run", lambda main, options: served.append(options))
        patch.setattr(sys, "path", sys.path[:])
        exec(compile(code, "app.py", "exec"), {"__file__": str(tmp_path / "app.py")})
    assert called[0][0] == SD15_ID and served[0][-2:] == ["--weights", "/downloaded"]
    assert "--any-base" not in served[0]
    with zipfile.ZipFile(tmp_path / wheel) as file:
        held = set(file.namelist())
        about = f"fairref-{fairref.__version__}.dist-info"
        assert file.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert b"License-File: LICENSE\n" in file.read(f"{about}/METADATA")
    assert {"fairref/web/page.py", "fairref/reporting/templates/report.html.jinja"} <= held
    assert not any(name.startswith("fairref/weights/") for name in held)


def test_a_space_of_another_model_of_that_size_names_it(tmp_path, runs):
    """And goes on where the export did."""
    base = SimpleNamespace(path=tmp_path / "sd15", unet=SimpleNamespace(config=SD15))
    to_space(
        Export(base, read_adapter(runs["text_encoder"]), "space", tmp_path, NAME, False, True, "who/model")
    )
    card = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=True).data.to_dict()
    assert card["models"] == card["preload_from_hub"] == ["who/model"]
    code = (tmp_path / "app.py").read_text()
    assert 'BASE = "who/model"' in code and 'options = ["--any-base", "--adapter"' in code


def test_where_a_base_on_the_hub_is_refused(tmp_path, weights_of_tiny, loaded_emoji, monkeypatch):
    weights, adapter = weights_of_tiny
    bundle = load_bundle(weights)
    for to, hub_id, said in (
        ("kohya", "who/model", "--hub-id is for --to space"),
        ("space", "model", "expected OWNER/NAME"),
        ("space", "who/mo del", "expected OWNER/NAME"),
    ):
        with pytest.raises(UserError, match=said):
            export_adapter(bundle, adapter, to, tmp_path / "out", hub_id=hub_id)
    monkeypatch.setattr(space, "load_bundle", lambda _: loaded_emoji)
    with pytest.raises(UserError, match="goes into the Space itself; leave out --hub-id"):
        to_space(
            Export(loaded_emoji, read_adapter(adapter), "space", tmp_path, NAME, False, hub_id="who/model")
        )


def test_a_space_of_the_small_bundle_names_whose_work_it_holds(tmp_path, runs, loaded_emoji, monkeypatch):
    monkeypatch.setattr(space, "load_bundle", lambda _: loaded_emoji)
    monkeypatch.setattr(space, "write_wheel", lambda *_: "fairref.whl")
    to_space(Export(loaded_emoji, read_adapter(runs["text_encoder"]), "space", tmp_path, NAME, False))
    card = (tmp_path / "README.md").read_text()
    metadata, text = card.split("---\n")[1:]
    assert "suggested_hardware" not in metadata
    for line in ("Copyright 2013-2022 Google LLC", "Kaipeng Zhang", "David Sandberg", "Timothy Esler"):
        assert line in text


def test_the_command_says_how_a_space_is_pushed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "load_bundle", lambda _: None)
    monkeypatch.setattr(export, "export_adapter", lambda *_: tmp_path / "a space")
    export.main(["runs/gender", "--to", "space", "--out", str(tmp_path / "a space")])
    command = f"hf upload NAME/SPACE '{tmp_path}/a space' . --repo-type space"
    assert capsys.readouterr().out.splitlines()[-1] == command


def test_without_an_adapter_only_a_space_has_one(tmp_path, tiny_folder):
    for argv in (["--to", "kohya"], ["--to", "space", "--weights", str(tiny_folder)]):
        with pytest.raises(UserError, match="no adapter is named"):
            export.main([*argv, "--out", str(tmp_path / "out")])


def test_a_space_of_another_base_is_refused(tmp_path, weights_of_tiny):
    """Whatever its folder is called."""
    weights, adapter = weights_of_tiny
    weights = shutil.copytree(weights, tmp_path / "emoji")
    with pytest.raises(UserError, match=r"is neither Stable Diffusion 1\.5 nor weights/emoji"):
        export_adapter(load_bundle(weights), adapter, "space", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_space_of_the_small_bundle_installs_and_serves(tmp_path):
    out = tmp_path / "space"
    export.main(["--to", "space", "--out", str(out)])  # with the adapter that comes with the bundle
    (wheel,) = out.glob("*.whl")
    pip = [
        sys.executable,
        "-m",
        *["pip", "install", "-q", "--no-deps", "--target"],
        str(tmp_path / "lib"),
        str(wheel),
    ]
    subprocess.run(pip, check=True)
    assert (tmp_path / "lib" / "fairref" / "weights" / "emoji" / "bundle.json").exists()
    pytest.importorskip("gradio", reason='the extra "web" brings it')
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PORT": str(port)}
    environment.pop("PYTHONPATH", None)
    process = subprocess.Popen([sys.executable, out / "app.py"], cwd=tmp_path, env=environment)
    try:
        while True:
            assert process.poll() is None
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                time.sleep(0.3)
    finally:
        process.kill()
        process.wait()
