"""Weights are read from safetensors only, renamed by explicit tables, and loaded strictly both ways."""

import errno
import hashlib
import json
import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fairref.errors import UserError
from fairref.files import weights as weights_io
from fairref.files.ldm import ldm_split
from fairref.files.names import ignored, rename, squeeze_vae_attention, unet_table, vae_table
from fairref.files.paths import read_json, refuse_mistyped
from fairref.files.weights import load_strict, read

# Names of the public SD-1.5 checkpoint and of its diffusers conversion, one of each kind.
BLOCK = "transformer_blocks.0"
UNET_NAMES = {
    "time_embed.0.weight": "time_embedding.linear_1.weight",
    "time_embed.2.bias": "time_embedding.linear_2.bias",
    "input_blocks.0.0.weight": "conv_in.weight",
    "input_blocks.1.0.in_layers.0.weight": "down_blocks.0.resnets.0.norm1.weight",
    "input_blocks.2.0.in_layers.2.bias": "down_blocks.0.resnets.1.conv1.bias",
    "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
    "input_blocks.4.0.skip_connection.weight": "down_blocks.1.resnets.0.conv_shortcut.weight",
    "input_blocks.4.1.proj_in.weight": "down_blocks.1.attentions.0.proj_in.weight",
    "input_blocks.8.0.emb_layers.1.weight": "down_blocks.2.resnets.1.time_emb_proj.weight",
    "input_blocks.9.0.op.bias": "down_blocks.2.downsamplers.0.conv.bias",
    "input_blocks.11.0.out_layers.0.weight": "down_blocks.3.resnets.1.norm2.weight",
    "middle_block.0.out_layers.3.weight": "mid_block.resnets.0.conv2.weight",
    f"middle_block.1.{BLOCK}.attn2.to_k.weight": f"mid_block.attentions.0.{BLOCK}.attn2.to_k.weight",
    "middle_block.2.in_layers.0.bias": "mid_block.resnets.1.norm1.bias",
    "output_blocks.2.0.in_layers.0.weight": "up_blocks.0.resnets.2.norm1.weight",
    "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
    "output_blocks.3.1.norm.weight": "up_blocks.1.attentions.0.norm.weight",
    "output_blocks.5.1.proj_out.bias": "up_blocks.1.attentions.2.proj_out.bias",
    "output_blocks.5.2.conv.weight": "up_blocks.1.upsamplers.0.conv.weight",
    "output_blocks.8.2.conv.bias": "up_blocks.2.upsamplers.0.conv.bias",
    f"output_blocks.11.1.{BLOCK}.ff.net.0.proj.bias": f"up_blocks.3.attentions.2.{BLOCK}.ff.net.0.proj.bias",
    "out.0.weight": "conv_norm_out.weight",
    "out.2.weight": "conv_out.weight",
}
VAE_NAMES = {
    "encoder.conv_in.weight": "encoder.conv_in.weight",
    "encoder.down.0.block.1.norm1.weight": "encoder.down_blocks.0.resnets.1.norm1.weight",
    "encoder.down.1.block.0.nin_shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
    "encoder.down.2.downsample.conv.weight": "encoder.down_blocks.2.downsamplers.0.conv.weight",
    "encoder.mid.block_2.conv2.bias": "encoder.mid_block.resnets.1.conv2.bias",
    "encoder.mid.attn_1.q.weight": "encoder.mid_block.attentions.0.to_q.weight",
    "encoder.norm_out.weight": "encoder.conv_norm_out.weight",
    "decoder.mid.attn_1.norm.weight": "decoder.mid_block.attentions.0.group_norm.weight",
    "decoder.mid.attn_1.proj_out.bias": "decoder.mid_block.attentions.0.to_out.0.bias",
    "decoder.up.3.block.2.conv1.weight": "decoder.up_blocks.0.resnets.2.conv1.weight",
    "decoder.up.3.upsample.conv.weight": "decoder.up_blocks.0.upsamplers.0.conv.weight",
    "decoder.up.0.block.0.nin_shortcut.bias": "decoder.up_blocks.3.resnets.0.conv_shortcut.bias",
    "decoder.conv_out.weight": "decoder.conv_out.weight",
    "quant_conv.weight": "quant_conv.weight",
    "post_quant_conv.bias": "post_quant_conv.bias",
}


@pytest.mark.parametrize("table, names", [(unet_table(4, 2), UNET_NAMES), (vae_table(4, 2), VAE_NAMES)])
def test_names_of_the_public_checkpoint(table, names):
    tensors = {name: torch.tensor(i) for i, name in enumerate(names)}
    renamed = rename(tensors, table, "file")
    assert {name: int(i) for name, i in renamed.items()} == {new: i for i, new in enumerate(names.values())}


def test_two_tensors_with_one_new_name_are_refused():
    both = {f"output_blocks.2.{place}.conv.weight": torch.zeros(1) for place in (1, 2)}
    with pytest.raises(
        UserError, match=r"^some.safetensors: two tensors for up_blocks.0.upsamplers.0.conv.weight"
    ):
        rename(both, unet_table(4, 2), "some.safetensors")


def ldm_tensors():
    return {
        "model.diffusion_model.out.2.weight": torch.ones(2),
        "first_stage_model.encoder.mid.attn_1.q.weight": torch.arange(4.0).reshape(2, 2, 1, 1),
        "first_stage_model.quant_conv.weight": torch.ones(2, 2, 1, 1),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.ones(3),
    }


def test_single_file_is_split_and_the_attention_squeezed():
    extra = {
        "model_ema.decay": torch.ones(()),
        "model_ema.diffusion_modeloutweight": torch.ones(2),
        "betas": torch.ones(3),
        "sqrt_recipm1_alphas_cumprod": torch.ones(3),
        "first_stage_model.loss.logvar": torch.ones(()),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    parts, outside = ldm_split({**ldm_tensors(), **extra}, "file")
    assert outside == [
        *("model_ema.decay", "model_ema.diffusion_modeloutweight", "betas", "sqrt_recipm1_alphas_cumprod"),
        "first_stage_model.loss.logvar",
    ]
    assert {part: list(tensors) for part, tensors in parts.items()} == {
        "unet": ["out.2.weight"],
        "vae": ["encoder.mid.attn_1.q.weight", "quant_conv.weight"],
        "text_encoder": [
            "text_model.final_layer_norm.weight",
            "text_model.embeddings.position_ids",
        ],
    }
    weight = {
        f"encoder.mid_block.attentions.0.{name}.weight": torch.ones(2, 2, 1, 1) for name in ("to_q", "x")
    }
    assert {tuple(value.shape) for value in squeeze_vae_attention(weight).values()} == {(2, 2)}


@pytest.mark.parametrize(
    "key, shape, kind",
    [
        ("conditioner.embedders.0.weight", 1, "SDXL"),
        ("model.diffusion_model.joint_blocks.0.context_block.mlp.fc1.weight", 1, "SD-3"),
        ("model.diffusion_model.double_blocks.0.img_attn.proj.weight", 1, "Flux"),
        ("double_blocks.0.img_attn.proj.weight", 1, "Flux"),
        ("cond_stage_model.model.ln_final.weight", 1, "SD-2"),
        ("control_model.out.2.weight", 1, "a ControlNet"),
        ("lora_unet_down_blocks_0.lora_up.weight", 1, "a LoRA"),
        ("emb_params", 1, "an embedding"),
        ("v_pred", 0, "a model that predicts v, not the noise"),
        ("ztsnr", 0, "a model of a schedule that ends in pure noise"),
        (
            "model.diffusion_model.input_blocks.0.0.weight",
            9,
            "an inpainting or edit model, whose U-Net takes 9",
        ),
        (
            "model.diffusion_model.input_blocks.0.0.weight",
            8,
            "an inpainting or edit model, whose U-Net takes 8",
        ),
    ],
)
def test_single_file_of_another_model_is_refused_by_its_name(key, shape, kind):
    for wrapper in ("", "state_dict."):
        tensors = {
            wrapper + name: value
            for name, value in {**ldm_tensors(), key: torch.ones(4, shape, 3, 3)}.items()
        }
        with pytest.raises(UserError, match=f"^xl.safetensors: is {re.escape(kind)}"):
            ldm_split(tensors, "xl.safetensors")


def test_a_tensor_that_stands_in_it_twice_is_refused():
    twice = {f"state_dict.{name}": value for name, value in ldm_tensors().items()} | ldm_tensors()
    with pytest.raises(
        UserError, match=r"^a.safetensors: two tensors for model.diffusion_model.out.2.weight"
    ):
        ldm_split(twice, "a.safetensors")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)


def test_strict_loading_copies_every_tensor_and_nothing_else():
    source, module = Small(), Small()
    tensors = {**source.state_dict(), "text_model.embeddings.position_ids": torch.arange(3)}
    tensors["linear.weight"] = tensors["linear.weight"].half()
    load_strict(module, tensors, "file")
    assert torch.equal(module.linear.weight, source.linear.weight.half().float())
    assert torch.equal(module.linear.bias, source.linear.bias)
    assert module.linear.weight.dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_loaded_tensors_are_not_those_of_the_file(tmp_path, device):
    source, path = Small(), tmp_path / "w.safetensors"
    save_file(source.state_dict(), path)
    with torch.device(device):
        module = Small()
    tensors = read(path)
    load_strict(module, tensors, "file")
    assert not any(p.is_meta for p in [*module.parameters(), *module.buffers()])
    assert all(parameter.requires_grad for parameter in module.parameters())
    tensors["linear.weight"].zero_()
    assert torch.equal(module.linear.weight, source.linear.weight)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("linear.bias"), r"found 1 tensors missing \(linear.bias\); use"),
        (lambda t: t.update(more=torch.ones(1)), r"found 1 unknown tensors \(more\); use"),
        (
            lambda t: [t.update({f"x{i}": t.pop(k)}) for i, k in enumerate(list(t))],
            r"found 7 tensors missing \(linear.weight, linear.bias, norm.weight and 4 more\) and "
            r"7 unknown tensors \(x0",
        ),
        (
            lambda t: t.update({"linear.weight": torch.ones(2, 4)}),
            r"linear.weight is float \[2, 4\], expected float \[2, 3\]; use",
        ),
        (
            lambda t: t.update({"linear.weight": torch.ones(3, 2)}),
            r"linear.weight is float \[3, 2\], expected float \[2, 3\]",
        ),
        (
            lambda t: t.update({"linear.bias": torch.ones(2, dtype=torch.int8)}),
            r"linear.bias is int8 \[2\], expected float \[2\]",
        ),
        (
            lambda t: t["linear.weight"][1, 2].fill_(float("nan")),
            "linear.weight holds what is no number; get",
        ),
        (
            lambda t: t["norm.running_var"][0].fill_(-float("inf")),
            "norm.running_var holds what is no number; get",
        ),
        (
            lambda t: t.update({"norm.num_batches_tracked": torch.tensor(1.5)}),
            r"norm.num_batches_tracked is float \[\], expected int64",
        ),
    ],
)
def test_every_difference_is_named_and_nothing_is_loaded(change, message):
    module, tensors = Small(), Small().state_dict()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    change(tensors)
    with pytest.raises(UserError, match=r"^file: " + message):
        load_strict(module, tensors, "file")
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_reading_gives_the_tensors_back(tmp_path):
    tensors = {"a": torch.randn(3, 2).half(), "b": torch.arange(3), "c": torch.randn(2).bfloat16()}
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    found = read(tmp_path / "w.safetensors")
    assert set(found) == set(tensors) and all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_what_is_written_can_be_read_by_whoever_may_read_other_files(tmp_path):
    (tmp_path / "other").touch()
    weights_io.write(tmp_path / "w.safetensors", {"a": torch.ones(2)}, {"iteration": 3})
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert weights_io.read_info(tmp_path / "w.safetensors") == {"iteration": 3}
    assert [path.name for path in tmp_path.glob("w*")] == ["w.safetensors"]


@pytest.mark.parametrize("length", [0x0280, 0x0480])
def test_a_header_as_long_as_a_pickle_begins_is_read(tmp_path, length):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"note": ""})
    note = length - int.from_bytes(path.read_bytes()[:8], "little")
    save_file({"a": torch.ones(2)}, path, metadata={"note": "x" * note})
    assert path.read_bytes().startswith(length.to_bytes(8, "little"))
    assert read(path)["a"].tolist() == [1, 1]


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "w.safetensors"
    save_file({"a": torch.zeros(100), "b": torch.zeros(50)}, path)
    return path.read_bytes()


def torch_zip(path):
    torch.save({"a": torch.zeros(3)}, path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda whole, path: whole[:-4], r"truncated: \d+ bytes, expected \d+; get"),
        (lambda whole, path: whole[:40], r"truncated: 40 bytes, expected \d+; get"),
        (lambda whole, path: whole[:12], r"truncated: 12 bytes, expected \d+; get"),
        (lambda whole, path: whole[:5], r"not a safetensors file \(5 bytes\)"),
        (lambda whole, path: b"", r"not a safetensors file \(0 bytes\)"),
        (lambda whole, path: b"<html>not found</html>", "not a safetensors file"),
        (lambda whole, path: whole + b"more", "damaged safetensors file"),
        (lambda whole, path: whole.replace(b"F32", b"X32"), "damaged safetensors file"),
        (lambda whole, path: whole[:20] + b"\xff" * 10 + whole[30:], "damaged safetensors file"),
        (
            lambda whole, path: pickle.dumps(Bomb(), protocol=2),
            "a pickle, which could run code and isn't read",
        ),
        (lambda whole, path: pickle.dumps(Bomb()), "a pickle, which could run code and isn't read"),
        (lambda whole, path: torch_zip(path), "a pickle, which could run code and isn't read"),
        (
            lambda whole, path: b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "a Git LFS pointer",
        ),
    ],
)
def test_every_file_that_is_not_whole_safetensors_gets_one_sentence(tmp_path, whole, content, message):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content(whole, path))
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_missing_file_is_named_with_the_pickle_beside_it(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="no such file; put it there or correct the path"):
        read(path)
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"no such file \(pytorch_model.bin is a pickle"):
        read(path)


def test_weights_that_diffusers_split_are_read_whole(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    vae.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tensors = read(tmp_path / "diffusion_pytorch_model.safetensors")
    assert tensors.keys() == vae.state_dict().keys()
    assert all(torch.equal(tensors[name], value) for name, value in vae.state_dict().items())


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"a": "one.safetensors", "b": "one.safetensors"}, "one.safetensors: its tensors are not those"),
        ({"a": "two.safetensors"}, "two.safetensors: no such file"),
        ({"a": "../one.safetensors"}, "weight_map"),
        ("one.safetensors", "weight_map"),
    ],
)
def test_split_weights_must_be_what_their_index_says(tmp_path, place, message):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    (tmp_path / "all.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    with pytest.raises(UserError, match=message):
        read(tmp_path / "all.safetensors")


def test_json_files(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match="can't be read"):
        read_json(path)
    for content, message in (
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "found a list, expected a JSON object"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands in it twice"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_json(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="no UTF-8 text"):
        read_json(path)
    for mark in ("", "\ufeff"):
        path.write_text(mark + '{"a": [1]}', encoding="utf-8")
        assert read_json(path) == {"a": [1]}


@pytest.mark.parametrize(
    "key, mistyped",
    [
        *(
            ("scaling_factr", True),
            ("SCALING_FACTOR", True),
            ("scalinging_factor", True),
            ("sca_factor", True),
        ),
        *(("scaling", False), ("factor", False), ("latents_mean", False)),
    ],
)
def test_a_key_that_is_mistyped_is_refused_where_the_right_one_is_absent(key, mistyped):
    refuse_mistyped(["scaling_factor"], {key: 1, "scaling_factor": 2}, "file")
    if mistyped:
        with pytest.raises(UserError, match=f"^file: found key '{key}', expected 'scaling_factor'"):
            refuse_mistyped(["scaling_factor"], {key: 1}, "file")
    else:
        refuse_mistyped(["scaling_factor"], {key: 1}, "file")


def test_ignored_names_are_whole_names():
    assert ignored("betas") and ignored("x.position_ids") and ignored("model_ema.a")
    assert not ignored("model.betas") and not ignored("position_ids.weight")


def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path)

    def forbidden(*args):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(weights_io, "_check_header", forbidden)
    with pytest.raises(UserError, match=r"model.safetensors: can't be read \(Permission denied\)"):
        read(path)


def test_a_fingerprint_is_of_the_values_in_float16_under_their_names():
    torch.manual_seed(0)
    x, bias = torch.randn(3, 4, 2, 2), torch.tensor([1.0, -2.5])
    made = weights_io.fingerprint({"conv.weight": x, "conv.bias": bias})
    by_hand = hashlib.sha256(b"conv.bias [2] torch.float16\n" + np.array([1, -2.5], "<f2").tobytes())
    by_hand.update(b"conv.weight [3, 4, 2, 2] torch.float16\n" + x.numpy().astype("<f2").tobytes())
    assert made == by_hand.hexdigest()
    same = {"conv.bias": bias.half(), "conv.weight": x.half().to(memory_format=torch.channels_last)}
    assert weights_io.fingerprint(same) == made
    other = x.clone()
    other.view(-1)[7] *= 1 + 2**-9
    for changed in (
        {"conv.weight": x},
        {"c": x, "conv.bias": bias},
        {"conv.weight": other, "conv.bias": bias},
    ):
        assert weights_io.fingerprint(changed) != made
    assert weights_io.fingerprint({"conv.weight": x.bfloat16(), "conv.bias": bias}) != made


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_a_network_s_fingerprint_is_its_file_s_whatever_it_computes_in(dtype):
    network = nn.Linear(3, 2)
    made = weights_io.fingerprint(network.state_dict())
    assert weights_io.fingerprint_of(weights_io.ready(network, "cpu", dtype)) == made
