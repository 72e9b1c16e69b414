"""What an imported adapter adds to each layer is what diffusers and PEFT add when they load the same file."""

import json
import re

import diffusers
import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny_bundle import SCHEDULER

from fairref.__main__ import main
from fairref.bundle.loading import load_bundle
from fairref.errors import UserError
from fairref.exchange.importing import import_adapter, read_foreign
from fairref.generation.adapters import IMPORTED, load_adapter, read_adapter
from fairref.generation.lora import LAYERS, is_layer, trained_layers
from fairref.generation.rollout import embed

PROMPT = "a photo of the face of a pilot, a person"


def random_pairs(bundle, names=None, seed=0):
    """<network>.<layer> -> random down and up of each linear layer and convolution, of rank 2 or 3."""
    g, pairs = torch.Generator().manual_seed(seed), {}
    for part in LAYERS:
        for name, layer in getattr(bundle, part).named_modules():
            if is_layer(layer) and (names is None or name.endswith(names)):
                out, inner, *kernel = layer.weight.shape
                rank = 2 + len(pairs) % 2
                up = torch.randn(out, rank, *[1 for _ in kernel], generator=g)
                pairs[f"{part}.{name}"] = torch.randn(rank, inner, *kernel, generator=g) / 10, up / 10
    return pairs


def product(down, up):
    """up down in float64: (out, in) or (out, in, k, k)."""
    fused = up.double().flatten(1) @ down.double().flatten(1)
    return fused.reshape(len(up), *down.shape[1:])


def fused(path, bundle=None, drop=False):
    """Layer -> what our import of a file adds to its weight, float64."""
    tensors = read_foreign(path, bundle, drop).tensors
    layers = [n.removesuffix(".lora_down.weight") for n in tensors if n.endswith(".lora_down.weight")]
    return {
        name: product(tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"])
        for name in layers
    }


def pipeline(folder):
    """diffusers' pipeline of a bundle."""
    return diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77),
        scheduler=diffusers.DPMSolverMultistepScheduler.from_config(SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture
def peers(tiny_folder):
    """The tiny bundle's, in float64."""
    return pipeline(tiny_folder).to(torch.float64)


def theirs(networks):
    """<network>.<layer> -> what PEFT's layers add to the weight, of {network: module}."""
    found = {}
    for part, network in networks.items():
        for name, module in network.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                name = name.removeprefix("base_model.model.")
                if part == "text_encoder" and not name.startswith("text_model."):
                    name = f"text_model.{name}"
                (adapter,) = module.active_adapters
                found[f"{part}.{name}"] = module.get_delta_weight(adapter).detach()
    return found


def assert_equal(ours, expected):
    assert set(ours) == set(expected) and expected
    for name, delta in expected.items():  # up times alpha / rank is rounded to float32 once
        assert (ours[name] - delta).abs().max() <= 2e-7 * delta.abs().max(), name


def kohya_name(layer):
    part, _, name = layer.partition(".")
    return f"lora_{'te' if part == 'text_encoder' else part}_{name.replace('.', '_')}"


@pytest.mark.parametrize("alpha", [None, 1.0, 5.0])
@pytest.mark.parametrize(
    "names", [None, (".to_q", ".q_proj", ".out_proj", "conv1", "conv_in", "proj_in", "fc2")]
)
def test_kohya(loaded_tiny, peers, tmp_path, alpha, names):
    tensors, pairs = {}, random_pairs(loaded_tiny, names)
    for layer, (down, up) in pairs.items():
        tensors[f"{kohya_name(layer)}.lora_down.weight"] = down.half()
        tensors[f"{kohya_name(layer)}.lora_up.weight"] = up.half()
        if alpha is not None:
            tensors[f"{kohya_name(layer)}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "k.safetensors", {"ss_base_model_version": "sd_v1"})
    ours = fused(tmp_path / "k.safetensors", loaded_tiny)
    expected = {
        name: product(down.half(), up.half()) * (1 if alpha is None else alpha / len(down))
        for name, (down, up) in pairs.items()
    }
    assert_equal(ours, expected)
    if names:  # the layers that diffusers' own renaming knows
        peers.load_lora_weights(tmp_path, weight_name="k.safetensors")
        assert_equal(ours, theirs({"unet": peers.unet, "text_encoder": peers.text_encoder}))


def test_an_imported_adapter_of_all_layers_draws_as_merged_weights_do(tiny_folder, loaded_tiny, tmp_path):
    """Convolutions with a stride, of 1x1 and 3x3, and linear layers, all at once."""
    tensors, merged = {}, load_bundle(tiny_folder)
    for layer, (down, up) in random_pairs(loaded_tiny).items():
        part, _, name = layer.partition(".")
        getattr(merged, part).get_submodule(name).weight.data += product(down, up).float()
        tensors |= {f"{kohya_name(layer)}.lora_{end}.weight": t for end, t in (("down", down), ("up", up))}
    save_file(tensors, tmp_path / "k.safetensors")
    target, _ = import_adapter(tmp_path / "k.safetensors", tmp_path, loaded_tiny)
    model = load_adapter(loaded_tiny, target)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected, base = (b.unet(z, 5, embed(b, PROMPT)) for b in (model, merged, loaded_tiny))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - base).abs().max() > 0.01


@pytest.mark.parametrize("metadata", [False, True])
def test_diffusers_as_diffusers_writes_it(tiny_folder, loaded_tiny, peers, tmp_path, metadata):
    """Without metadata alpha is the rank; with it alpha / rank is .5, or alpha_pattern's."""
    config = {"init_lora_weights": False, "r": 4, "lora_alpha": 2 if metadata else 4}
    pattern = {"attn1.to_q": 3} if metadata else {}
    configs = {
        "unet": peft.LoraConfig(**config, target_modules=["to_q", "conv1"], alpha_pattern=pattern),
        "text_encoder": peft.LoraConfig(**config, target_modules=["q_proj", "fc1"]),
    }
    writer, options = pipeline(tiny_folder), {}
    for part, settings in configs.items():
        network = peft.inject_adapter_in_model(settings, getattr(writer, part))
        options[f"{part}_lora_layers"] = peft.get_peft_model_state_dict(network)
        if metadata:
            options[f"{part}_lora_adapter_metadata"] = settings.to_dict()
    writer.save_lora_weights(tmp_path, **options)
    peers.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    expected = theirs({"unet": peers.unet, "text_encoder": peers.text_encoder})
    assert_equal(fused(tmp_path / "pytorch_lora_weights.safetensors", loaded_tiny), expected)
    assert len({len(delta) for delta in expected.values()}) > 1


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"attn2.to_k": 5}}])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_folder_of_peft(loaded_tiny, peers, tmp_path, options, suffix):
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["to_k", "conv_shortcut"], init_lora_weights=False, **options
    )
    model = peft.get_peft_model(peers.unet.float(), config)
    model.save_pretrained(tmp_path, safe_serialization=suffix == "safetensors")
    ours = fused(tmp_path / f"adapter_model.{suffix}", loaded_tiny)
    assert_equal(ours, theirs({"unet": model.double()}))
    target, _ = import_adapter(tmp_path, tmp_path / "ours", loaded_tiny)
    assert target == tmp_path / "ours" / "adapter.safetensors"
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"no adapter_config\.json beside it, which says alpha"):
        import_adapter(tmp_path, tmp_path / "again", loaded_tiny)


def released(bundle, part):
    """The released code's names and our pairs, of all its layers."""
    layers = {f"{part}.{name}" for name in trained_layers(part, getattr(bundle, part))}
    pairs, tensors = {k: v for k, v in random_pairs(bundle).items() if k in layers}, {}
    for layer, pair in pairs.items():
        name = layer.partition(".")[2]
        if part == "unet":
            place, _, last = name.replace(".to_out.0", ".to_out").rpartition(".")
            name = f"{place}.processor.{last}_lora"
        else:
            name = f"{name}.lora_linear_layer"
        for end, tensor in zip(("down", "up"), pair, strict=True):
            tensors[f"{name}.{end}.weight"] = torch.nn.Parameter(tensor)  # as its EMA file has them
    return pairs, tensors


@pytest.mark.parametrize("part", LAYERS)
def test_the_released_codes_lora(loaded_tiny, peers, tmp_path, part):
    pairs, tensors = released(loaded_tiny, part)
    file = tmp_path / f"{part}_lora_EMA.pth"
    torch.save(tensors, file)
    assert any(".processor.to_out_lora.down.weight" in name for name in tensors) == (part == "unet")
    target, imported = import_adapter(file, tmp_path / "ours.safetensors", loaded_tiny)
    found = read_adapter(target)
    assert target == tmp_path / "ours.safetensors" and not imported.dropped
    assert found.component == part and found.info["format"] == IMPORTED
    assert found.info["base"] == loaded_tiny.fingerprints and found.info["imported_from"] == file.name
    for name, (down, up) in pairs.items():
        assert all(torch.equal(a, b) for a, b in zip(found.pairs[name], (down, up), strict=True))
    assert set(found.pairs) == set(pairs)
    prefixed = {f"{part}.{name}": tensor.detach() for name, tensor in tensors.items()}
    if part == "unet":  # diffusers still reads these
        peers.load_lora_weights(prefixed)
        assert_equal(fused(file, loaded_tiny), theirs({"unet": peers.unet}))


def test_the_released_codes_prefix_and_both_draw(loaded_tiny, tmp_path):
    positions = loaded_tiny.text_encoder.text_model.embeddings.position_embedding.weight
    table = torch.cat([torch.zeros(1, 32), torch.randn(5, 32)])
    content = {"token_embedding.weight": table, "position_embedding.weight": positions.half().float()}
    content["position_ids"] = torch.arange(77)[None]
    torch.save(content, tmp_path / "prefix_embedding.pth")
    target, imported = import_adapter(tmp_path / "prefix_embedding.pth", tmp_path / "ours", loaded_tiny)
    assert imported.summary == "a prefix of 5 tokens"
    model = load_adapter(loaded_tiny, target)
    assert torch.equal(model.soft.prefix, table[1:])
    words = loaded_tiny.text_encoder.embed(loaded_tiny.tokenizer([PROMPT]))
    by_hand = torch.cat([words[:, :1], table[None, 1:], words[:, 1:-5]], 1)
    torch.testing.assert_close(embed(model, PROMPT)[0], loaded_tiny.text_encoder(embeddings=by_hand)[0])
    content["position_embedding.weight"] = positions + 1
    torch.save(content, tmp_path / "prefix_embedding.pth")
    with pytest.raises(UserError, match=r"position_embedding.weight is not .*bundle's"):
        read_foreign(tmp_path / "prefix_embedding.pth", loaded_tiny)


def test_whole_matrices_as_uce_writes_them(tiny_folder, loaded_tiny, tmp_path):
    """Either those of attn2 alone, or a whole U-Net, of which what is the base's own is left out."""
    edited = load_bundle(tiny_folder)
    state = edited.unet.state_dict()
    names = [name for name in state if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    for name in names:
        state[name] += torch.randn(state[name].shape) / 10
    save_file({name: state[name] for name in names}, tmp_path / "uce.safetensors")
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "whole.pt")
    for file in ("uce.safetensors", "whole.pt"):
        target, imported = import_adapter(tmp_path / file, tmp_path / f"ours {file}", loaded_tiny)
        assert imported.summary == f"{len(names)} whole matrices" and not imported.dropped
        assert set(read_adapter(target).matrices) == {f"unet.{n.removesuffix('.weight')}" for n in names}
        z, c = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
        model = load_adapter(loaded_tiny, target)
        tolerance = 0 if file == "uce.safetensors" else 0.02
        torch.testing.assert_close(model.unet(z, 5, c), edited.unet(z, 5, c), rtol=0, atol=tolerance)
    assert len(imported.equal) == len(state) - len(names)
    with pytest.raises(UserError, match="--weights BASE leaves out what is the base's own"):
        save_file({"conv_norm_out.weight": torch.ones(320)}, tmp_path / "norm.safetensors")
        read_foreign(tmp_path / "norm.safetensors")


def test_without_weights_the_layers_are_sd15s_and_the_base_is_unknown(tmp_path, capsys, loaded_tiny):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    pair = {f"{name}.lora_down.weight": torch.randn(4, 768), f"{name}.lora_up.weight": torch.randn(320, 4)}
    save_file(pair, tmp_path / "a.safetensors")
    assert main(["import", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "ours")]) == 0
    out = capsys.readouterr().out
    assert "LoRA of rank 4 on 1 layers" in out and "its base is unknown" in out
    adapter = read_adapter(tmp_path / "ours")
    assert adapter.other_parts(loaded_tiny) is None
    assert list(adapter.pairs) == ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"]
    with pytest.raises(UserError, match="fairref wrote it"):
        read_foreign(tmp_path / "ours" / "adapter.safetensors")


LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
GOOD = {f"{LAYER}.lora_down.weight": torch.ones(2, 1280), f"{LAYER}.lora_up.weight": torch.ones(1280, 2)}


@pytest.mark.parametrize(
    "change, metadata, expected",
    [
        ({"lora_te1_text_model_x.lora_down.weight": torch.ones(1, 1)}, {}, "SDXL's"),
        ({"text_encoder_2.x.lora_A.weight": torch.ones(1, 1)}, {}, "SDXL's"),
        ({"transformer.x.lora_A.weight": torch.ones(1, 1)}, {}, "SD-3 or Flux's"),
        ({}, {"ss_base_model_version": "sdxl_base_v1-0"}, "says sdxl_base_v1-0"),
        ({}, {"modelspec.architecture": "flux-1-dev/lora"}, "says flux-1-dev/lora"),
        ({f"{LAYER}.dora_scale": torch.ones(1)}, {}, "makes more of a layer than up and down"),
        ({f"{LAYER}.lora_down.weight": torch.ones(2, 1024)}, {}, r"is float32 \[2, 1024\], expected float \[2, 1280\]"),
        ({f"{LAYER}.lora_down.weight": torch.ones(2, 1280, dtype=torch.int8)}, {}, "is int8"),
        ({f"{LAYER}.lora_down.weight": torch.ones(())}, {}, r"expected float \[0, 1280\]"),
        ({f"{LAYER}.lora_up.weight": None}, {}, "has lora_down.weight; expected lora_down and lora_up"),
        ({f"{LAYER}.lora_up.weight": torch.full((1280, 2), torch.nan)}, {}, "holds what is no number"),
        ({f"{LAYER}.alpha": torch.ones(3)}, {}, r"alpha is float32 \[3\], expected float \[\]"),
        ({"lora_unet_stranger.hada_w1_a": torch.ones(2, 2)}, {}, "1 tensors belong to no .*stranger.hada_w1_a"),
        ({"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 1280)}, {},
         "two tensors for unet.mid_block"),
        ({**dict.fromkeys(GOOD), "model_ema.decay": torch.ones(1)}, {}, "1 tensors belong"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, change, metadata, expected):
    tensors = {name: t for name, t in {**GOOD, **change, "position_ids": None}.items() if t is not None}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with pytest.raises(UserError, match=expected) as error:
        read_foreign(tmp_path / "a.safetensors")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["modelspec.architecture", "ss_base_model_version"])
def test_a_header_may_spell_sd15_in_any_way(tmp_path, key):
    for said in (
        "stable-diffusion-v1/lora",
        "sd_v1",
        "sd_1.5",
        "ss_v1",
        "sd15",
        "Stable Diffusion 1.5",
        "Unknown",
    ):
        save_file(GOOD, tmp_path / "a.safetensors", {key: said})
        assert len(read_foreign(tmp_path / "a.safetensors").tensors) == 2
    others = (
        "sd_v2_768_v",
        "stable-diffusion-v2-512",
        "stable-diffusion-xl-v1-base/lora",
        "SDXL",
        "sd3_m",
        "Flux.1-dev",
    )
    for said in others:
        save_file(GOOD, tmp_path / "a.safetensors", {key: said})
        with pytest.raises(UserError, match=re.escape(f"header says {said}")):
            read_foreign(tmp_path / "a.safetensors")


def test_what_is_there_is_never_written_over(tmp_path):
    save_file(GOOD, tmp_path / "a.safetensors")
    run = tmp_path / "run"
    run.mkdir()
    (run / "settings.json").write_text("{}")
    for out, why in (("a.safetensors", "is there already"), ("run", "a run is in it")):
        before = sorted((path, path.read_bytes()) for path in tmp_path.rglob("*.*"))
        with pytest.raises(UserError, match=why):
            import_adapter(tmp_path / "a.safetensors", tmp_path / out)
        assert before == sorted((path, path.read_bytes()) for path in tmp_path.rglob("*.*"))


def test_drop_leaves_out_what_belongs_to_no_layer_and_says_so(tmp_path, capsys):
    save_file({**GOOD, "lora_unet_stranger.hada_w1_a": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    arguments = ["import", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "b.safetensors")]
    assert main(arguments) == 2 and "--drop leaves them out" in capsys.readouterr().err
    assert main([*arguments, "--drop"]) == 0
    assert "left out 1 tensors, no layer's: lora_unet_stranger.hada_w1_a" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"init_lora_weights": "pissa_niter_4"}, "PEFT's pissa_niter_4 changed the base"),
        ({"alpha_pattern": {"(": 1}}, "settings of alpha can't be read"),
        ({"alpha_pattern": [1]}, "settings of alpha can't be read"),
        ({"lora_alpha": "much"}, "settings of alpha can't be read"),
    ],
)
def test_pefts_settings_that_are_refused(tmp_path, settings, expected):
    name = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {f"{name}.lora_A.weight": torch.ones(2, 1280), f"{name}.lora_B.weight": torch.ones(1280, 2)}
    save_file(pair, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, **settings}))
    with pytest.raises(UserError, match=expected):
        read_foreign(tmp_path / "adapter_model.safetensors")


def test_a_pickle_that_holds_more_than_tensors_is_not_read(tmp_path):
    torch.save({"x": torch.nn.Linear(1, 1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="more than tensors"):
        read_foreign(tmp_path / "a.pth")
    (tmp_path / "a.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match=r"expected .safetensors, or"):
        read_foreign(tmp_path / "a.ckpt")
