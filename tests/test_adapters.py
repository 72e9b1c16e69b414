"""LoRA on the text encoder, and its file."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fairref.errors import UserError
from fairref.finetune.adapters import ADAPTED, FILE, adapt, load_adapter, save_adapter
from fairref.nets.clip import ClipText, ClipTextConfig

RANK = 3


def make_encoder(width=16, dtype=torch.float32):
    config = ClipTextConfig(
        vocab_size=40,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=9,
        eos_token_id=39,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ClipText(config).to(dtype).eval().requires_grad_(False)


@pytest.fixture
def encoder():
    return make_encoder()


@pytest.fixture
def ids():
    return torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))


def moved(encoder):
    adapted, adapter = adapt(encoder, RANK, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for n, (name, p) in enumerate(adapter.named_parameters()):
            if "lora_up" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n)))
    return adapted, adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_start_is_the_frozen_model_bit_for_bit(ids, dtype):
    encoder = make_encoder(dtype=dtype)
    adapted, adapter = adapt(encoder, RANK, torch.Generator().manual_seed(0))
    assert torch.equal(adapted(ids), encoder(ids)) and adapted(ids).dtype == dtype
    assert all(p.dtype == torch.promote_types(dtype, torch.float32) for p in adapter.parameters())


def test_it_is_the_sum_of_base_and_product(encoder, ids):
    """Merged by hand into plain weights, the adapted encoder is an ordinary one."""
    adapted, adapter = moved(encoder)
    tensors = {name: p.detach() for name, p in adapter.named_parameters()}
    merged = make_encoder()
    weights = merged.state_dict()
    layers = [name.removesuffix(".lora_up.weight") for name in tensors if name.endswith(".lora_up.weight")]
    for layer in layers:
        product = tensors[f"{layer}.lora_up.weight"] @ tensors[f"{layer}.lora_down.weight"]
        weights[f"{layer.removeprefix('text_encoder.')}.weight"] += product
    assert len(layers) == 2 * len(ADAPTED) and (merged(ids) - encoder(ids)).abs().max() > 0.1
    torch.testing.assert_close(adapted(ids), merged(ids), rtol=1e-5, atol=1e-5)


def test_the_given_encoder_stays_and_its_weights_are_shared(encoder, ids):
    before, names = encoder(ids), [name for name, _ in encoder.named_modules()]
    adapted, adapter = moved(encoder)
    assert torch.equal(encoder(ids), before) and [name for name, _ in encoder.named_modules()] == names
    frozen = {p.data_ptr() for p in encoder.parameters()}
    assert frozen <= {p.data_ptr() for p in adapted.parameters()}
    assert {p.data_ptr() for p in adapted.parameters() if p.requires_grad} == {
        p.data_ptr() for p in adapter.parameters()
    }
    assert not (frozen & {p.data_ptr() for p in adapter.parameters()})


def test_down_starts_with_deviation_one_over_rank():
    _, adapter = adapt(make_encoder(64), 8, torch.Generator().manual_seed(0))
    down = torch.cat([p.flatten() for name, p in adapter.named_parameters() if "lora_down" in name])
    assert down.std().item() == pytest.approx(1 / 8, rel=0.05) and abs(down.mean().item()) < 0.01


def test_file_and_back(encoder, ids, tmp_path):
    adapted, adapter = moved(encoder)
    tensors = dict(adapter.named_parameters())
    save_adapter(tmp_path / FILE, tensors, {"average": "raw"})
    for path in (tmp_path, tmp_path / FILE, str(tmp_path)):
        loaded = load_adapter(encoder, path)
        assert torch.equal(loaded(ids), adapted(ids))
        assert not any(p.requires_grad for p in loaded.parameters())
    with safe_open(tmp_path / FILE, "pt") as file:
        assert file.metadata() == {
            "average": "raw",
            "format": "fairref-lora-1",
            "rank": str(RANK),
            "scale": "1",
        }
        assert "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_down.weight" in file.keys()
        assert "text_encoder.text_model.encoder.layers.0.mlp.fc2.lora_up.weight" in file.keys()
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_a_file_that_does_not_fit_is_refused(encoder, tmp_path):
    _, adapter = moved(encoder)
    save_adapter(tmp_path / FILE, dict(adapter.named_parameters()), {})
    with pytest.raises(UserError, match="float .*expected float"):
        load_adapter(make_encoder(8), tmp_path)
    tensors = load_file(tmp_path / FILE)
    metadata = {"format": "fairref-lora-1", "scale": "1"}
    name = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "less", metadata)
    save_file({**tensors, "stranger": torch.zeros(1)}, tmp_path / "more", metadata)
    save_file(tensors, tmp_path / "other_format")
    save_file({"x": torch.zeros(1)}, tmp_path / "nothing", metadata)
    for file, message in (
        ("less", "1 tensors missing"),
        ("more", "1 unknown tensors .stranger"),
        ("other_format", "expected an adapter that train.py wrote"),
        ("nothing", "lora_down"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_adapter(encoder, tmp_path / file)
        assert str(tmp_path / file) in str(error.value)
    with pytest.raises(UserError, match="no such adapter"):
        load_adapter(encoder, tmp_path / "nowhere")
    with pytest.raises(UserError, match="no adapter.safetensors in it"):
        (tmp_path / "empty").mkdir()
        load_adapter(encoder, tmp_path / "empty")
