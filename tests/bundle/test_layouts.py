"""Each layout in which people have one model gives the networks, the tokens and the images that diffusers gives.

The peer is diffusers itself: its folder is what every layout is made of, and its pipeline draws the images.
"""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from ldm_layout import FILES, to_ldm
from safetensors.torch import load_file, save_file
from tiny_bundle import SCHEDULER, write_tiny_bundle

from fairref.bundle.judges import load_clip
from fairref.bundle.loading import load_bundle
from fairref.bundle.stable_diffusion import load_stable_diffusion
from fairref.diffusion.sampler import noise
from fairref.errors import UserError
from fairref.files.vocabulary import clip_vocabulary
from fairref.generation.drawing import Drawing, draw
from fairref.progress import note

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS = ["a photo of the face of a pilot, a person", "nurse! <cat> !"]
CLOSE = 1 / 255
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny bundle's Stable Diffusion, with two rows of its embedding to spare, in diffusers' layout."""
    folder = write_tiny_bundle(tmp_path_factory.mktemp("layouts") / "sd")
    for path in [*folder.iterdir()]:
        if path.name not in PARTS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def grow(tensors):
        key = next(k for k in tensors if k.endswith("token_embedding.weight"))
        return {**tensors, key: torch.cat([tensors[key], 3 * tensors[key][:2].flip(1)])}

    rewrite(folder / FILES["text_encoder"], grow)
    edit(folder / "text_encoder/config.json", lambda d: d.update(vocab_size=d["vocab_size"] + 2))
    return folder


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "sd")


@pytest.fixture
def notes(caplog):
    note.cache_clear()
    caplog.set_level(logging.WARNING, "fairref")
    return caplog


def edit(path, change):
    d = json.loads(path.read_text()) if path.is_file() else {}
    change(d)
    path.write_text(json.dumps(d))


def rewrite(path, change):
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    save_file({key: value.contiguous() for key, value in change(tensors).items()}, path)


def images(loaded):
    z_T = noise(7, 0, range(len(PROMPTS)), (4, 8, 8))
    return torch.cat(
        [draw(loaded, (text, "a nurse!"), z_T[i : i + 1], Drawing(4, 3.0)) for i, text in enumerate(PROMPTS)]
    )


def peer_images(folder, tokenizer=None):
    """Of diffusers' whole pipeline, from the same noise."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(
        tokenizer or folder / "tokenizer", model_max_length=77
    )
    pipe = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32),
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        text_encoder=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=tokenizer,
        scheduler=diffusers.DPMSolverMultistepScheduler.from_config(SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=4, guidance_scale=3.0, height=32, width=32, output_type="pt")
    latents = noise(7, 0, range(len(PROMPTS)), (4, 8, 8))
    with torch.no_grad():
        return 2 * pipe(PROMPTS, negative_prompt=["a nurse!"] * 2, latents=latents, **options).images - 1


@pytest.fixture(scope="module")
def expected(tiny):
    return peer_images(tiny)


def split(folder, name, index, variant=""):
    """A network's weights in two files, under an index of a name."""
    whole = folder / FILES[name]
    tensors = load_file(whole)
    place, names = {}, sorted(tensors)
    for i, half in enumerate((names[::2], names[1::2])):
        part = whole.with_name(f"{whole.stem}{variant}-0000{i + 1}-of-00002.safetensors")
        save_file({key: tensors[key] for key in half}, part)
        place |= dict.fromkeys(half, part.name)
    whole.with_name(index).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    whole.unlink()
    return folder


def halve(folder):
    for file in FILES.values():
        rewrite(folder / file, lambda tensors: {key: value.half() for key, value in tensors.items()})


def rename_variants(folder, variant):
    for file in FILES.values():
        (folder / file).rename((folder / file).with_suffix(f".{variant}.safetensors"))
    return folder


def single(folder, change=lambda tensors: tensors, configs=True):
    """The folder as one file, with configs and tokenizer beside it."""
    tensors = change(to_ldm(folder))
    for name, file in FILES.items():
        (folder / file).unlink() if configs else shutil.rmtree(folder / name)
    path = folder / "model.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def with_more(*names):
    return lambda tensors: {**tensors, **{name: torch.ones(2) for name in names}}


def whole_clip(folder):
    """The text encoder's files as a CLIPModel's, with the image tower and the projections."""
    vision = {f"vision_model.x.{i}": torch.ones(2) for i in range(3)}
    others = {"logit_scale": torch.ones(()), "text_projection.weight": torch.ones(2, 2)}

    def change(tensors):
        named = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in tensors.items()}
        return {**named, **vision, **others, "visual_projection.weight": torch.ones(2, 2)}

    rewrite(folder / FILES["text_encoder"], change)
    place = folder / "text_encoder" / "config.json"
    config = {"model_type": "clip", "projection_dim": 2, "text_config": json.loads(place.read_text())}
    place.write_text(json.dumps(config))
    return folder


def own_vae(folder, place, prefix="", keep=False):
    """One file without a VAE (or with a wrong one), and the VAE in LDM's names at a place beside it."""
    vae = {k: v for k, v in to_ldm(folder).items() if k.startswith("first_stage_model.")}

    def change(tensors):
        others = {k: v for k, v in tensors.items() if not k.startswith("first_stage_model.")}
        return {**others, **({k: 2 * v for k, v in vae.items()} if keep else {})}

    path = single(folder, change)
    named = {
        prefix + key.removeprefix("first_stage_model."): value.contiguous() for key, value in vae.items()
    }
    save_file({**named, "loss.logvar": torch.ones(())}, folder / place)
    return path


def ldm_vae(folder):
    """A folder whose vae/ has LDM's names."""
    vae = {
        k.removeprefix("first_stage_model."): v
        for k, v in to_ldm(folder).items()
        if k.startswith("first_stage")
    }
    save_file({k: v.contiguous() for k, v in vae.items()}, folder / FILES["vae"])
    return folder


def add_marks(folder):
    for path in [*folder.rglob("*.json"), *folder.rglob("*.txt")]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return folder


def tokenizer_json(folder):
    transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / "new")
    shutil.rmtree(folder / "tokenizer")
    shutil.move(folder / "new", folder / "tokenizer")
    assert not (folder / "tokenizer/vocab.json").exists()
    return folder


def written(path, text, folder):
    path = folder / path
    path.write_text(text)
    return folder


SAME = {  # layout -> (folder -> what is loaded)
    "diffusers' folder": lambda f: f,
    "split, float32": lambda f: split(f, "unet", "diffusion_pytorch_model.safetensors.index.json"),
    "the text encoder split": lambda f: split(f, "text_encoder", "model.safetensors.index.json"),
    "bfloat16's name alone": lambda f: rename_variants(f, "bf16"),
    "without moving average": lambda f: rename_variants(f, "non_ema"),
    "a whole CLIPModel": whole_clip,
    "byte order marks": add_marks,
    "tokenizer.json": tokenizer_json,
    "the VAE in LDM's names": ldm_vae,
    "one file": single,
    "one file from ComfyUI": lambda f: single(f, renamed("cond_stage_model.", "cond_stage_model.clip_l.")),
    "one file with text_encoders": lambda f: single(f, renamed("cond_stage_model.", "text_encoders.clip_l.")),
    "one file with clip_l and vae": lambda f: single(
        f, lambda t: renamed("cond_stage_model.", "clip_l.")(renamed("first_stage_model.", "vae.")(t))
    ),
    "one file in a state_dict": lambda f: single(f, lambda t: {f"state_dict.{k}": v for k, v in t.items()}),
    "one file with more in it": lambda f: single(
        f,
        with_more(
            "embedding_manager.x",
            "denoiser.sigmas",
            "cond_stage_model.logit_scale",
            "model_ema.decay",
            "betas",
        ),
    ),
    "one file and NAME.yaml": lambda f: single(
        written(
            "model.yaml", 'model:\n  params:\n    linear_start: 0.00085\n    parameterization: "eps"\n', f
        )
    ),
    "one file and NAME.vae": lambda f: own_vae(f, "model.vae.safetensors", keep=True),
    "one file and NAME.vae with a prefix": lambda f: own_vae(
        f, "model.vae.safetensors", "first_stage_model."
    ),
    "one file and vae/": lambda f: own_vae(f, "vae/diffusion_pytorch_model.safetensors"),
}


@pytest.mark.parametrize("layout", SAME)
def test_every_layout_of_one_model_draws_what_diffusers_draws(folder, expected, layout):
    loaded = load_bundle(SAME[layout](folder))
    assert (images(loaded) - expected).abs().max() <= CLOSE / 10
    assert expected.std() > 0.05


@pytest.mark.parametrize(
    "spelling, variant",
    [
        ("diffusion_pytorch_model.safetensors.index.fp16.json", ".fp16"),
        ("diffusion_pytorch_model.fp16.safetensors.index.json", ".fp16"),
        ("diffusion_pytorch_model.safetensors.index.bf16.json", ""),
    ],
)
def test_half_precision_that_is_split_is_found(folder, spelling, variant):
    halve(folder)
    expected = peer_images(folder)
    split(folder, "unet", spelling, variant)
    for name in ("vae", "text_encoder"):
        (folder / FILES[name]).rename((folder / FILES[name]).with_suffix(".fp16.safetensors"))
    assert (images(load_bundle(folder)) - expected).abs().max() <= CLOSE / 10


TOKENIZERS = {  # name -> change of tokenizer/
    "! as padding": lambda d: edit(d / "special_tokens_map.json", lambda c: c.update(pad_token="!")),
    "an added token": lambda d: edit(d / "added_tokens.json", lambda c: c.update({"<cat>": 560})),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_a_tokenizer_adds_changes_images_as_in_diffusers(folder, expected, name):
    size = len(json.loads((folder / "tokenizer/vocab.json").read_text()))
    TOKENIZERS[name](folder / "tokenizer")
    path = folder / "tokenizer/added_tokens.json"
    if path.is_file():
        path.write_text(json.dumps({"<cat>": size}))
    theirs = peer_images(folder)
    assert (images(load_bundle(folder)) - theirs).abs().max() <= CLOSE / 10
    assert (theirs - expected).abs().max() > 10 * CLOSE


def test_what_is_left_out_is_said_once_in_one_line(folder, notes):
    whole_clip(folder)
    load_bundle(folder)
    (message,) = notes.messages
    assert message.endswith(
        "ignored 6 tensors that belong to none of its networks: logit_scale, text_projection.* (1), vision_model.* (3),"
        " visual_projection.* (1)."
    )


@pytest.mark.parametrize(
    "layout, said",
    [
        (
            "one file with more in it",
            "ignored 5 tensors that belong to none of its networks: betas, cond_stage_model.* (1), denoiser.*",
        ),
        ("one file and NAME.vae", "model.vae.safetensors: takes the place of the VAE in model.safetensors"),
        ("without moving average", "reads the weights of the variant 'non_ema', for there are no others"),
    ],
)
def test_what_is_not_as_usual_is_said(folder, notes, layout, said):
    load_bundle(SAME[layout](folder))
    assert any(said in message for message in notes.messages)


def test_a_vae_beside_a_file_that_has_its_own_is_not_read_and_said(folder, notes, tiny):
    path = single(folder)
    shutil.copy(tiny / FILES["vae"], folder / FILES["vae"])
    load_bundle(path)
    assert any("is not read, for model.safetensors has its own VAE" in message for message in notes.messages)


def test_one_file_alone_draws_with_clips_vocabulary(folder, tmp_path, monkeypatch):
    """Of SD-1.5's vocabulary, in the tiny shapes; nothing stands beside the file."""
    from fairref.bundle import stable_diffusion

    rows = len(clip_vocabulary().ids)

    def grow(tensors):
        key = next(k for k in tensors if k.endswith("token_embedding.weight"))
        return {
            **tensors,
            key: torch.randn(rows, tensors[key].shape[1], generator=torch.Generator().manual_seed(3)),
        }

    rewrite(folder / FILES["text_encoder"], grow)
    edit(folder / "text_encoder/config.json", lambda d: d.update(vocab_size=rows, eos_token_id=rows - 1))
    loaded = load_stable_diffusion(folder_without_tokenizer(folder, rows))
    configs = {name: getattr(loaded, name).config for name in FILES}
    monkeypatch.setattr(
        stable_diffusion,
        "NETWORKS",
        {
            name: SimpleNamespace(**{**vars(network), "sd15": configs[name]})
            for name, network in stable_diffusion.NETWORKS.items()
        },
    )
    alone = tmp_path / "alone" / "model.safetensors"
    alone.parent.mkdir()
    save_file({key: value.contiguous() for key, value in to_ldm(folder).items()}, alone)
    bundle = load_bundle(alone)
    assert bundle.tokenizer(["a photo of a cat"])[0, :6].tolist() == [49406, 320, 1125, 539, 320, 2368]
    theirs = peer_images(folder)
    assert (images(bundle) - theirs).abs().max() <= CLOSE / 10


def folder_without_tokenizer(folder, rows):
    """CLIP's own vocabulary takes the place of the tiny one."""
    vocabulary = clip_vocabulary()
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocabulary.ids), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, vocabulary.merges), ""]
    (folder / "tokenizer/merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def remove(*prefixes):
    return lambda tensors: {key: value for key, value in tensors.items() if not key.startswith(prefixes)}


REFUSED = {  # layout -> (folder -> what is loaded, a part of the sentence)
    "SDXL's folder": (
        lambda f: written("model_index.json", '{"_class_name": "StableDiffusionXLPipeline"}', f),
        "_class_name is 'StableDiffusionXLPipeline'; expected StableDiffusionPipeline",
    ),
    "a text encoder that masks padding": (
        lambda f: edit(f / "text_encoder/config.json", lambda d: d.update(use_attention_mask=True)) or f,
        "use_attention_mask = True, expected None or False",
    ),
    "SD-2's U-Net": (
        lambda f: edit(f / "unet/config.json", lambda d: d.update(cross_attention_dim=1024)) or f,
        "is of SD-2; use a model of Stable Diffusion 1.x",
    ),
    "SDXL's U-Net": (
        lambda f: edit(f / "unet/config.json", lambda d: d.update(addition_embed_type="text_time")) or f,
        "config.json: is of SDXL",
    ),
    "Flux's folder": (
        lambda f: (
            shutil.move(f / "unet", f / "transformer"),
            written("model_index.json", '{"_class_name": "FluxPipeline"}', f),
        )[1],
        "FluxPipeline",
    ),
    "another text encoder": (
        lambda f: written("model_index.json", '{"text_encoder": ["transformers", "T5EncoderModel"]}', f),
        r"text_encoder is \['transformers', 'T5EncoderModel'\]; expected \['transformers', 'CLIPTextModel'\]",
    ),
    "v by NAME.yaml": (
        lambda f: single(written("model.yaml", 'model:\n  params:\n    parameterization: "v"\n', f)),
        "model.yaml: parameterization is v; expected eps",
    ),
    "v by NAME.YAML in one line": (
        lambda f: single(written("model.YAML", "{model: {params: {parameterization: v}}}", f)),
        "model.YAML: parameterization is v; expected eps",
    ),
    "v by a marker": (lambda f: single(f, with_more("v_pred")), "predicts v, not the noise"),
    "another schedule by NAME.yaml": (
        lambda f: single(written("model.yaml", "linear_end: 0.02\n", f)),
        "linear_end is 0.02; expected 0.012",
    ),
    "clip skip by NAME.yaml": (
        lambda f: single(written("model.yaml", '  layer: "hidden"\n', f)),
        "layer is hidden; expected last",
    ),
    "half of merges.txt": (
        lambda f: written(
            "tokenizer/merges.txt", "\n".join((f / "tokenizer/merges.txt").read_text().split("\n")[:12]), f
        ),
        "tokens don't belong to 11 merges",
    ),
    "a token too many": (
        lambda f: written(
            "tokenizer/added_tokens.json",
            json.dumps({c: tokens_in(f) + i for i, c in enumerate(("<a>", "<b>", "<c>"))}),
            f,
        ),
        "expected at most",
    ),
    "no VAE": (
        lambda f: single(f, remove("first_stage_model.")),
        "found no first_stage_model.* in it, the vae; put it",
    ),
    "no U-Net": (
        lambda f: single(f, remove("model.diffusion")),
        "found no model.diffusion_model.* in it, the unet; use",
    ),
    "a tensor too many": (
        lambda f: single(f, with_more("model.diffusion_model.out.3.weight")),
        r"found 1 unknown tensors \(out.3.weight\)",
    ),
    "a variant that lacks its weights": (
        lambda f: written("unet/x.safetensors", "", f) and ((f / FILES["unet"]).unlink() or f),
        r"no such file \(x.safetensors is there\)",
    ),
}


def tokens_in(folder):
    return len(json.loads((folder / "tokenizer/vocab.json").read_text()))


@pytest.mark.parametrize("layout", REFUSED)
def test_what_is_another_model_is_refused_by_its_name(folder, layout):
    make, said = REFUSED[layout]
    with pytest.raises(UserError, match=said) as caught:
        load_bundle(make(folder))
    assert "\n" not in str(caught.value)


def test_the_header_of_a_file_says_its_kind(folder):
    path = single(folder)
    tensors = load_file(path)
    for said in (
        {"modelspec.prediction_type": "v"},
        {"modelspec.predict_key": "v"},
        {"modelspec.architecture": "stable-diffusion-xl-v1-base"},
    ):
        save_file(tensors, path, metadata=said)
        with pytest.raises(UserError, match="its header says modelspec"):
            load_bundle(path)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "clip"])
@pytest.mark.parametrize("value", [10**6, 10**30, float("inf"), 2.5, None, "abc", [1, 2], {}, True, [[[1]]]])
def test_sizes_are_compared_before_anything_is_built(tiny_folder, tmp_path, name, value):
    """In each place of a config that is a number, a thing that is none, or too large, is one sentence at once."""
    settings = {
        "unet": ("layers_per_block", "block_out_channels", "norm_num_groups", "cross_attention_dim"),
        "vae": ("layers_per_block", "latent_channels", "scaling_factor"),
        "text_encoder": ("num_hidden_layers", "hidden_size", "vocab_size", "layer_norm_eps"),
        "clip": ("projection_dim", "text_config"),
    }[name]
    source = shutil.copytree(tiny_folder, tmp_path / "copy")
    path = source / name / "config.json"
    whole = path.read_text()
    for setting in settings:
        if (setting, value) in (("scaling_factor", 2.5), ("layer_norm_eps", 2.5), ("text_config", {})):
            continue
        path.write_text(whole)
        edit(path, lambda d, s=setting: d.update({s: value}))
        with pytest.raises(UserError, match=name):
            load_clip(source / name) if name == "clip" else load_stable_diffusion(source)
