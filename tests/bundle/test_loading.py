"""Every layout of the same weights gives the same networks, and every mistake one sentence."""

import configparser
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ldm_layout import FILES, to_ldm
from safetensors.torch import load_file, save_file

import fairref
from fairref.bundle import loading
from fairref.bundle.configs import read_config
from fairref.bundle.judges import save_classifier
from fairref.bundle.loading import bundle_path, load_bundle
from fairref.bundle.stable_diffusion import NETWORKS
from fairref.diffusion.sampler import noise
from fairref.diffusion.schedule import Schedule
from fairref.emoji.bpe import train_bpe
from fairref.emoji.build import SCHEDULER
from fairref.errors import UserError
from fairref.generation.drawing import Drawing, draw
from fairref.judges.mobilenet import Classifier, MobileNetConfig, MobileNetV3
from fairref.judges.sprites import LOOKS

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TOKENS = 530
LEVELS = 4
WIDTH = 16  # of the text encoder
UNET = dict(
    sample_size=16,
    block_out_channels=(8, 16, 24, 24),
    layers_per_block=2,
    cross_attention_dim=WIDTH,
    norm_num_groups=4,
    attention_head_dim=2,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
)
VAE = dict(
    block_out_channels=(8, 8, 16, 16),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=4,
    down_block_types=("DownEncoderBlock2D",) * LEVELS,
    up_block_types=("UpDecoderBlock2D",) * LEVELS,
)
TEXT = dict(hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
TEXT |= dict(vocab_size=TOKENS, bos_token_id=TOKENS - 2, eos_token_id=TOKENS - 1, pad_token_id=TOKENS - 1)
VISION = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
)
# Of the public SD-1.5 checkpoint.
SD15_UNET = dict(UNET, sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768)
SD15_UNET |= dict(norm_num_groups=32, attention_head_dim=8)
SD15_VAE = dict(
    VAE, sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32
)
SD15_TEXT = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
SD15_PARAMETERS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


def write_diffusers(folder, unet, vae, text, variant=None):
    """Random networks of the peer libraries, saved by them; returns them."""
    torch.manual_seed(0)
    peers = SimpleNamespace(
        unet=diffusers.UNet2DConditionModel(**unet).eval(),
        vae=diffusers.AutoencoderKL(**vae).eval(),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)).eval(),
    )
    for name in FILES:
        getattr(peers, name).save_pretrained(folder / name, variant=variant)
    config = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
    diffusers.PNDMScheduler(**config).save_pretrained(folder / "scheduler")
    return peers


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small model in diffusers' layout, and its peers."""
    folder = tmp_path_factory.mktemp("layouts") / "sd"
    peers = write_diffusers(folder, UNET, VAE, TEXT)
    assert (
        train_bpe(["a photo of a pilot", "pilots and nurses and a nurse"], TOKENS, folder / "tokenizer")
        == TOKENS
    )
    return SimpleNamespace(folder=folder, peers=peers, loaded=load_bundle(folder))


@pytest.fixture
def copy(world, tmp_path):
    shutil.copytree(world.folder, tmp_path / "sd")
    return tmp_path / "sd"


def state(bundle):
    return {f"{n}.{key}": value for n in FILES for key, value in getattr(bundle, n).state_dict().items()}


def same(a, b):
    a, b = state(a), state(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def rewrite(path, change):
    """Replaces a weight file by what `change` makes of its tensors."""
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    save_file({key: value.contiguous() for key, value in change(tensors).items()}, path)


EXTRA = {
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.diffusion_modelout2weight": torch.ones(3),
    "betas": torch.ones(1000),
    "alphas_cumprod_prev": torch.ones(1000),
    "posterior_log_variance_clipped": torch.ones(1000),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
}


@pytest.fixture
def single(copy):
    """The same model as one file, with configs and tokenizer beside it."""
    tensors = {**to_ldm(copy), **EXTRA}
    for file in FILES.values():
        (copy / file).unlink()
    save_file({key: value.contiguous() for key, value in tensors.items()}, copy / "model.safetensors")
    return copy / "model.safetensors"


def test_the_networks_are_those_of_diffusers_and_transformers(world):
    b, peers, g = world.loaded, world.peers, torch.Generator().manual_seed(1)
    z, x = torch.randn(2, 4, 16, 16, generator=g), torch.rand(2, 3, 32, 32, generator=g) * 2 - 1
    ids = b.tokenizer(["a pilot", "two nurses"])
    with torch.no_grad():
        c = peers.text_encoder(ids).last_hidden_state
        torch.testing.assert_close(b.text_encoder(ids), c, rtol=1e-5, atol=1e-5)
        eps = peers.unet(z, torch.tensor([3, 801]), c).sample
        torch.testing.assert_close(b.unet(z, torch.tensor([3, 801]), c), eps, rtol=1e-5, atol=1e-5)
        image = peers.vae.decode(z / 0.18215).sample
        torch.testing.assert_close(b.vae.decode(z), image, rtol=1e-5, atol=1e-5)
        latent = peers.vae.encode(x).latent_dist.mean * 0.18215
        torch.testing.assert_close(b.vae.encode(x), latent, rtol=1e-5, atol=1e-6)


def pictures(bundle, peers, latents, steps, guidance, prompts=("a pilot", "two nurses")):
    """One for each prompt, here and by diffusers' whole pipeline from the same noise: (B, 3, H, W) in [-1, 1]."""
    pipe = diffusers.StableDiffusionPipeline(
        **vars(peers),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(bundle.path / "tokenizer", model_max_length=77),
        scheduler=diffusers.DPMSolverMultistepScheduler.from_config(SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    z_T = noise(7, 0, range(len(prompts)), (4, latents, latents))
    with torch.no_grad():
        ours = [
            draw(bundle, (text, "a nurse"), z_T[i : i + 1], Drawing(steps, guidance))
            for i, text in enumerate(prompts)
        ]
        theirs = pipe(
            list(prompts),
            negative_prompt=["a nurse"] * len(prompts),
            latents=z_T,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=8 * latents,
            width=8 * latents,
            output_type="pt",
        ).images
    return torch.cat(ours), 2 * theirs - 1


def test_the_whole_way_from_texts_to_pictures_is_diffusers(world):
    """In float32, both; diffusers' pictures are in [0, 1]."""
    for steps, guidance in ((20, 7.5), (5, 2.0)):
        ours, theirs = pictures(world.loaded, world.peers, 16, steps, guidance)
        assert theirs.std() > 0.02 and (ours[0] - ours[1]).abs().max() > 0.05
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_what_a_folder_without_manifest_gives(world):
    b = world.loaded
    assert (b.path, b.manifest, b.resolution) == (world.folder, {}, 128)
    assert (b.clip, b.clip_tokenizer, b.classifiers, b.templates) == (None, None, {}, None)
    assert (b.attributes, b.recipe) == ({}, {})
    assert b.schedule == Schedule(1000, 0.00085, 0.012, "scaled_linear")
    assert b.tokenizer.eos == TOKENS - 1 and b.tokenizer(["a"]).shape == (1, 77)
    for name in FILES:
        network = getattr(b, name)
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_dtype(world):
    half = load_bundle(world.folder, dtype=torch.float16)
    assert {value.dtype for value in state(half).values() if value.is_floating_point()} == {torch.float16}


def test_half_precision_files(world, tmp_path):
    for name, file in FILES.items():
        shutil.copytree(world.folder / name, tmp_path / name)
        target = (tmp_path / file).with_suffix(".fp16.safetensors")
        (tmp_path / file).rename(target)
        rewrite(target, lambda tensors: {key: value.half() for key, value in tensors.items()})
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(world.folder / name, tmp_path / name)
    half, full = state(load_bundle(tmp_path)), state(world.loaded)
    assert all(torch.equal(half[key], full[key].half().float()) for key in full)


def test_variant_names_are_those_that_diffusers_writes(tmp_path):
    write_diffusers(tmp_path, UNET, VAE, TEXT, variant="fp16")
    train_bpe(["a photo of a pilot", "pilots and nurses and a nurse"], TOKENS, tmp_path / "tokenizer")
    assert sorted(f.name for f in tmp_path.rglob("*.safetensors")) == [
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "model.fp16.safetensors",
    ]
    load_bundle(tmp_path)


def test_full_precision_comes_before_half(world, copy):
    (copy / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    assert same(load_bundle(copy), world.loaded)
    whole = copy / FILES["unet"]  # nor does it where the full one is split
    part = whole.with_name("diffusion_pytorch_model-00001-of-00001.safetensors")
    names = load_file(whole)
    whole.rename(part)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, part.name)}
    whole.with_name(f"{whole.name}.index.json").write_text(json.dumps(index))
    assert same(load_bundle(copy), world.loaded)


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_legacy_names_of_the_vae_attention(world, copy, as_convolutions):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def legacy(tensors):
        renamed = {}
        for key, value in tensors.items():
            for new, name in old.items():
                if f".attentions.0.{new}." in key:
                    key = key.replace(new, name)
                    value = value[..., None, None] if as_convolutions and value.dim() == 2 else value
            renamed[key] = value
        return renamed

    rewrite(copy / FILES["vae"], legacy)
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in load_file(copy / FILES["vae"])
    assert same(load_bundle(copy), world.loaded)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoder_with_and_without_prefix(world, copy, prefix):
    def change(tensors):
        found = {prefix + key.removeprefix("text_model."): value for key, value in tensors.items()}
        return {**found, f"{prefix}embeddings.position_ids": torch.arange(77)[None]}

    rewrite(copy / FILES["text_encoder"], change)
    assert same(load_bundle(copy), world.loaded)


def test_single_file_names_are_those_that_diffusers_converts(single, world):
    """diffusers' own converter takes the file of `to_ldm` back to the weights it was made from."""
    from diffusers.loaders import single_file_utils as peer

    tensors = load_file(single)
    unet = peer.convert_ldm_unet_checkpoint(dict(tensors), dict(UNET, class_embed_type=None))
    vae = peer.convert_ldm_vae_checkpoint(dict(tensors), VAE)
    text = peer.convert_ldm_clip_checkpoint(dict(tensors))
    for found, network in ((unet, world.peers.unet), (vae, world.peers.vae)):
        expected = network.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key].reshape(value.shape), value) for key, value in expected.items())
    text = {key: value for key, value in text.items() if not key.endswith("position_ids")}
    assert text.keys() == {key for key in world.loaded.text_encoder.state_dict()}


def test_single_file_gives_the_same_networks(single, world):
    b = load_bundle(single)
    assert same(b, world.loaded)
    assert (b.path, b.manifest, b.resolution, b.schedule) == (single, {}, 128, world.loaded.schedule)


@pytest.mark.parametrize("sd", [".", "sd", "sd/model.safetensors"])
def test_manifest_says_where_stable_diffusion_is(request, world, tmp_path, sd):
    folder = (
        request.getfixturevalue("single").parent
        if sd.endswith("tensors")
        else request.getfixturevalue("copy")
    )
    root = folder if sd == "." else folder.parent
    recipe = {"iterations": 3, "lr": 1e-4}
    manifest = {"name": "small", "resolution": 64, "stable_diffusion": sd, "recipe": recipe}
    (root / "bundle.json").write_text(json.dumps(manifest))
    b = load_bundle(root)
    assert same(b, world.loaded)
    assert (b.manifest, b.resolution, b.recipe, b.path) == (manifest, 64, recipe, root)


def test_single_file_tokenizer_beside_it(single):
    for name in ("vocab.json", "merges.txt"):
        (single.parent / "tokenizer" / name).rename(single.parent / name)
    assert load_bundle(single).tokenizer.eos == TOKENS - 1
    (single.parent / "vocab.json").unlink()
    with pytest.raises(UserError, match=r"vocab.json: no such file; a tokenizer needs"):
        load_bundle(single)


def test_single_file_without_configs_is_taken_for_sd15(single):
    for name in FILES:
        shutil.rmtree(single.parent / name)
    with pytest.raises(
        UserError,
        match=r"model.safetensors \(vae\): has 1 of the layers encoder.down.0.block.N.*, but layers_per_block asks",
    ):
        load_bundle(single)


@pytest.mark.parametrize(
    "name, config", [("unet", SD15_UNET), ("vae", SD15_VAE), ("text_encoder", SD15_TEXT)]
)
def test_the_shapes_of_sd15(name, config):
    part = NETWORKS[name]
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    assert read_config(part.config, listed) == part.sd15
    with torch.device("meta"):
        network = part.network(part.sd15)
    assert sum(parameter.numel() for parameter in network.parameters()) == SD15_PARAMETERS[name]


@pytest.fixture
def full(copy):
    """A bundle with every judge."""
    root = copy.parent
    clip_config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
    torch.manual_seed(2)
    peer = transformers.CLIPModel(clip_config).eval()
    peer.save_pretrained(root / "clip")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(copy / "tokenizer" / name, root / "clip" / name)
    attributes = {"gender": ("woman", "man"), "skin_tone": ("light", "medium", "dark")}
    for name in ("a", "b"):
        network = MobileNetV3(MobileNetConfig.from_dict({"width": 0.25, "num_logits": 5}))
        save_classifier(Classifier(network, attributes), root / name)
    manifest = {
        "name": "full",
        "stable_diffusion": "sd",
        "clip": "clip",
        "attributes": {"gender": ["woman", "man"], "skin_tone": ["light", "medium", "dark"]},
        "classifiers": {"finetune": "a", "evaluate": "b"},
    }
    (root / "bundle.json").write_text(json.dumps(manifest))
    return SimpleNamespace(root=root, peer=peer, manifest=manifest, attributes=attributes)


def test_judges_of_a_manifest(full):
    b = load_bundle(full.root)
    assert b.attributes == full.attributes and set(b.classifiers) == {"finetune", "evaluate"}
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    ids = b.clip_tokenizer(["a pilot", "two nurses"])
    with torch.no_grad():
        logits = {role: classifier(x) for role, (classifier,) in b.classifiers.items()}
        assert {name: value.shape for name, value in logits["finetune"].items()} == {
            "gender": (2, 2),
            "skin_tone": (2, 3),
        }
        assert not torch.equal(logits["finetune"]["gender"], logits["evaluate"]["gender"])
        text = full.peer.get_text_features(ids)
        text = getattr(text, "pooler_output", text)
        torch.testing.assert_close(
            b.clip.encode_text(ids), text / text.norm(dim=-1, keepdim=True), rtol=1e-5, atol=1e-5
        )
    for network in (b.clip, *(one for of_role in b.classifiers.values() for one in of_role)):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"nmae": "x"},
            "bundle.json: found key 'nmae'; expected some of attributes, .*, name, recipe, resolution",
        ),
        ({"resolution": "64"}, "bundle.json: resolution is '64'; expected a value of type int"),
        ({"resolution": True}, "bundle.json: resolution is True; expected a value of type int"),
        ({"resolution": 10**30}, r"bundle.json: resolution is 10+ pixels; expected at most 8192"),
        ({"resolution": 60}, "resolution is 60 pixels; expected a positive multiple of 8"),
        ({"resolution": 0}, "resolution is 0 pixels; expected a positive multiple of 8"),
        (
            {"attributes": {"gender": ["woman"]}},
            r"bundle.json: attribute 'gender' is \['woman'\]; expected two or more",
        ),
        (
            {"attributes": {"gender": ["man", "woman"]}},
            r"classes of 'gender' are \('man', 'woman'\); expected \('woman', 'man'\)",
        ),
        (
            {"classifiers": {"train": "a"}},
            "bundle.json: classifiers has 'train': 'a'; expected the folder for finetune or evaluate",
        ),
        ({"classifiers": {"finetune": "nowhere"}}, "nowhere"),
        ({"templates": "nowhere.json"}, "nowhere.json: can't be read"),
        ({"clip": "nowhere"}, "nowhere.config.json: can't be read"),
        (
            {"stable_diffusion": "nowhere"},
            "nowhere: found no unet/ in it; expected a folder with bundle.json",
        ),
    ],
)
def test_mistakes_in_a_manifest(full, change, message):
    (full.root / "bundle.json").write_text(json.dumps({**full.manifest, **change}))
    with pytest.raises(UserError, match=message) as caught:
        load_bundle(full.root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("threshold", [None, "x", 10**400, -1, 0, [1]])
def test_a_template_judge_that_can_not_be_made_is_refused_with_the_bundle(full, threshold):
    (full.root / "bundle.json").write_text(json.dumps({**full.manifest, "templates": "templates.json"}))
    settings = {"threshold": threshold, "shares": dict.fromkeys(LOOKS, 1.0)}
    (full.root / "templates.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"templates\.json: found threshold .*, expected a"):
        load_bundle(full.root)


@pytest.mark.parametrize(
    "size, side", [(16, 16), ([16, 16], 16), ([16, 8], None), ("x", None), (True, None), (1.5, None)]
)
def test_the_size_of_latents_as_diffusers_writes_it(copy, size, side):
    edit_config(copy, "unet", sample_size=size)
    if side is None:
        with pytest.raises(UserError, match=r"the U-Net's sample_size is .*; expected a whole number"):
            load_bundle(copy)
    else:
        b = load_bundle(copy)
        assert b.resolution == side * 2 ** (len(b.vae.config.block_out_channels) - 1)


def edit_config(folder, part, **values):
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def grown(tensors):
    return {**tensors, "conv_in.bias": torch.zeros(9)}


def without(tensors):
    return {key: value for key, value in tensors.items() if key != "conv_in.bias"}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / FILES["vae"]).unlink(), "vae.diffusion_pytorch_model.safetensors: no such file"),
        (
            lambda f: (f / FILES["unet"]).write_bytes((f / FILES["unet"]).read_bytes()[:-8]),
            "unet.*truncated: ",
        ),
        (
            lambda f: (f / FILES["text_encoder"]).write_bytes(pickle.dumps({})),
            "text_encoder.model.safetensors: a pickle",
        ),
        (
            lambda f: rewrite(f / FILES["unet"], grown),
            r"unet.*conv_in.bias is float \[9\], expected float \[8\]",
        ),
        (lambda f: rewrite(f / FILES["unet"], without), r"unet.*found 1 tensors missing \(conv_in.bias\)"),
        (
            lambda f: edit_config(f, "unet", layers_per_block=1),
            r"unet.*has 2 of the layers down_blocks.0.resnets.N.\*, but layers_per_block asks for 1;",
        ),
        (
            lambda f: edit_config(f, "unet", cross_attention_dim=24),
            r"unet.*is float \[8, 16\], expected float \[8, 24\]",
        ),
        (lambda f: edit_config(f, "vae", act_fn="relu"), "vae.config.json: found act_fn = 'relu'"),
        (lambda f: (f / "vae/config.json").unlink(), "vae.config.json: can't be read"),
        (lambda f: (f / "text_encoder/config.json").write_text("{"), "text_encoder.config.json: not JSON"),
        (
            lambda f: (f / "scheduler/scheduler_config.json").unlink(),
            "scheduler.scheduler_config.json: can't be read",
        ),
        (
            lambda f: shutil.rmtree(f / "tokenizer"),
            "no tokenizer with it; put CLIP's vocab.json and merges.txt into",
        ),
        (
            lambda f: train_bpe(["pilots, nurses, mechanics"], 532, f / "tokenizer"),
            r"the tokenizer has 532 tokens \(.*vocab.json, merges.txt\); expected at most 530",
        ),
        (lambda f: shutil.rmtree(f / "unet"), "found no unet/ in it"),
    ],
)
def test_mistakes_in_a_folder(copy, spoil, message):
    spoil(copy)
    with pytest.raises(UserError, match=message) as caught:
        load_bundle(copy)
    assert "\n" not in str(caught.value)


def test_parts_of_different_models(copy, tmp_path):
    for change, message in (
        (
            dict(cross_attention_dim=24),
            "cross_attention_dim is 24; expected 16, the text encoder's hidden_size",
        ),
        (dict(in_channels=5), "in_channels is 5; expected 4, the VAE's latent_channels"),
        (
            dict(in_channels=9),
            "unet/config.json: is of an inpainting or edit model, whose U-Net takes 9 channels",
        ),
    ):
        write_diffusers(tmp_path / "other", {**UNET, **change}, VAE, TEXT)
        shutil.copytree(tmp_path / "other" / "unet", copy / "unet", dirs_exist_ok=True)
        with pytest.raises(UserError, match=message):
            load_bundle(copy)


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_a_pickle_as_single_file_is_refused(single, name):
    path = single.with_name(name)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match=f"{name}: a pickle, which could run code and isn't read"):
        load_bundle(path)


def test_bundles_are_found_from_any_working_directory(monkeypatch, tmp_path):
    package, elsewhere = tmp_path / "site" / "fairref", tmp_path / "elsewhere"
    monkeypatch.setattr(loading, "__file__", str(package / "bundle" / "loading.py"))
    inside, beside, here = package / "weights/x", package.parent / "weights/x", elsewhere / "weights/x"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(UserError, match="x: no such weights, neither here nor in"):
        bundle_path("weights/x")
    for place in (inside, beside):  # what stands beside the scripts comes before package data
        place.mkdir(parents=True)
        assert bundle_path("weights/x") == bundle_path("x") == place
    here.mkdir(parents=True)
    assert bundle_path("weights/x").absolute() == here
    assert bundle_path(inside) == inside


def test_every_room_is_a_package_that_gets_installed():
    setup, root = configparser.ConfigParser(), Path(__file__).parents[2]
    setup.read(root / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    rooms = {".".join(p.parent.relative_to(root).parts) for p in (root / "fairref").rglob("__init__.py")}
    assert listed == rooms | {"fairref.weights"}


def test_import_is_light_and_load_bundle_is_there():
    assert fairref.load_bundle is load_bundle and fairref.UserError is UserError
    assert fairref.__version__
    with pytest.raises(AttributeError):
        fairref.nothing  # noqa: B018


@pytest.mark.slow
def test_full_size_layouts(world, tmp_path):
    """SD-1.5's shapes with random weights: 4 GB on disk for each layout, 12 GB of memory."""
    folder, single = tmp_path / "sd", tmp_path / "single" / "v1-5.safetensors"
    peers = write_diffusers(folder, SD15_UNET, SD15_VAE, SD15_TEXT)
    shutil.copytree(world.folder / "tokenizer", folder / "tokenizer")
    first = load_bundle(folder)
    assert first.resolution == 512
    ours, theirs = pictures(first, peers, 32, 2, 3.0, ("a pilot",))
    assert theirs.std() > 0.02
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    del peers
    single.parent.mkdir()
    save_file({key: value.contiguous() for key, value in {**to_ldm(folder), **EXTRA}.items()}, single)
    shutil.copytree(world.folder / "tokenizer", single.parent / "tokenizer")
    second = load_bundle(single)  # no configs beside it
    assert second.resolution == 512
    assert same(first, second)


def test_the_default_bundle_s_folder_without_weights_says_what_makes_them(tmp_path):
    folder = tmp_path / "weights" / "emoji"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=r"fairref emoji build makes it"):
        load_bundle(folder)
