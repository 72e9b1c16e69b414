"""Soft prompts against a literal construction in transformers, their starts, their files and their gradients."""

import json
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPTextModel

from fairref.bundle.loading import load_bundle
from fairref.errors import UserError
from fairref.evaluation.kept import model_of
from fairref.files.weights import write
from fairref.generation.adapters import FILE, FORMAT, load_adapter, load_adapters, read_adapter, save_adapter
from fairref.generation.drawing import Drawing
from fairref.generation.lora import COMPONENTS, adapt
from fairref.generation.padding import embed_padded
from fairref.generation.rollout import embed, guided
from fairref.generation.soft import HIDDEN, SOFT_PROMPTS, eos_place
from fairref.settings import SOFT

P = 4
PROMPT = "a photo of the face of a pilot, a person"
LONG = " ".join(["a pilot"] * 60)
PROMPTS = ["", "a", PROMPT, LONG]


@pytest.fixture(scope="module")
def bundle(tiny_folder):
    return load_bundle(tiny_folder, dtype=torch.float64)


@pytest.fixture(scope="module")
def peer(tiny_folder):
    """transformers' text encoder, in float64."""
    return CLIPTextModel.from_pretrained(tiny_folder / "text_encoder").double().eval().requires_grad_(False)


def start(bundle, component, seed=0):
    return adapt(bundle, component, tokens=P, generator=torch.Generator().manual_seed(seed))


def moved(bundle, component):
    """The adapted bundle, and the tensors of its adapter, far from where they start."""
    model, adapter = start(bundle, component)
    with torch.no_grad():
        for n, p in enumerate(adapter.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n)))
    return model, dict(adapter.named_parameters())


def by_hand(bundle, peer, component, tensors, prompt):
    """c (T, D) of a list of tokens, by transformers' own layers."""
    tokenizer, tower = bundle.tokenizer, getattr(peer, "text_model", peer)
    T, table = tokenizer.length, tower.embeddings.token_embedding.weight
    ids = tokenizer([prompt])[0].tolist()
    ids = ids[1 : ids.index(tokenizer.eos)]  # the words
    bos, eos = table[tokenizer.bos][None], table[tokenizer.eos][None]
    words = table[ids[: T - 2 - P]]
    if component == "generated":
        plain = [tokenizer.bos, *ids, *[tokenizer.eos] * (T - 1 - len(ids))]
        state = peer(torch.tensor([plain])).last_hidden_state[0, 1 + len(ids)]
        layers = [
            tensors[f"generated.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        ]
        out = layers[2] @ F.gelu(layers[0] @ state + layers[1]) + layers[3]
        soft = tensors["generated.tokens"] + out.reshape(P, -1)
    else:
        soft = tensors[component][0] if component == "deep" else tensors[component]
    row = [bos, words, soft] if component == "suffix" else [bos, soft, words]
    row = torch.cat([*row, *[eos] * (T - P - 1 - len(words))])
    x = (row + tower.embeddings.position_embedding.weight[:T])[None]
    mask = torch.full((T, T), -torch.inf, dtype=x.dtype).triu(1)[None, None]
    for n, layer in enumerate(tower.encoder.layers):
        if component == "deep" and n:
            x = torch.cat([x[:, :1], tensors["deep"][n][None], x[:, 1 + P :]], 1)
        x = layer(x, mask)
        x = x[0] if isinstance(x, tuple) else x
    return tower.final_layer_norm(x)[0]


def test_each_kind_is_a_component():
    assert tuple(SOFT_PROMPTS) == SOFT and set(SOFT) < set(COMPONENTS)


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize("component", SOFT)
def test_c_and_its_gradient_are_those_of_transformers_and_c_empty_stays(bundle, peer, component, prompt):
    model, tensors = moved(bundle, component)
    found, expected = embed(model, prompt, "ugly"), by_hand(bundle, peer, component, tensors, prompt)
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(found[1], embed(bundle, prompt, "ugly")[1])
    v = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7), dtype=expected.dtype)
    ours, theirs = (torch.autograd.grad((c * v).sum(), list(tensors.values())) for c in (found[0], expected))
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_the_empty_branch_is_fixed_where_nothing_that_is_trained_is_in_it(bundle):
    assert not guided(bundle, embed(bundle, PROMPT), 2.0).fixed_empty  # nothing is trained
    for component in COMPONENTS:
        for frozen in (None, bundle.text_encoder):
            model = replace(start(bundle, component)[0], empty_encoder=frozen)
            wanted = component in SOFT or (component == "text_encoder" and frozen is not None)
            text = embed(model, PROMPT)
            assert (
                guided(model, text, 2.0).fixed_empty == guided(model, text, 2.0, True).fixed_empty == wanted
            )
            assert not guided(model, text, 1.0).fixed_empty


def test_where_a_suffix_stands_in_a_prompt_of_each_length():
    """Which words each row has, whatever the padding's token is."""
    seen = []
    encoder = Mock(
        embed=lambda ids: ids[:, None].double(), side_effect=lambda embeddings: seen.append(embeddings)
    )
    for pad in (1, 9):
        fake = SimpleNamespace(
            text_encoder=encoder, tokenizer=SimpleNamespace(bos=0, eos=1, pad=pad, length=8)
        )
        suffix = SOFT_PROMPTS["suffix"](torch.tensor([[-1.0], [-2.0]]).double(), fake)
        for ids, expected in (
            ([0, 1, *[pad] * 6], [0, -1, -2, 1, *[pad] * 4]),
            ([0, 5, 6, 1, *[pad] * 4], [0, 5, 6, -1, -2, 1, pad, pad]),
            ([0, 5, 6, 7, 8, 1, pad, pad], [0, 5, 6, 7, 8, -1, -2, 1]),
            ([0, 5, 6, 7, 8, 4, 1, pad], [0, 5, 6, 7, 8, -1, -2, 1]),
            ([0, 5, 6, 7, 8, 4, 3, 1], [0, 5, 6, 7, 8, -1, -2, 1]),
        ):
            seen.clear()
            suffix(fake, torch.tensor(ids), None)
            assert seen[0].flatten().tolist() == expected
            assert ids[eos_place(fake, torch.tensor(ids))] == 1


@pytest.mark.parametrize("component", SOFT)
def test_each_starts_as_the_same_tokens_and_all_but_the_suffix_as_a_prefix(bundle, component):
    model, adapter = start(bundle, component)
    prefixed, prefix = start(bundle, "prefix")
    assert len(model.soft) == P == model.soft_tokens
    for prompt in PROMPTS:
        ours, theirs = embed(model, prompt), embed(prefixed, prompt)
        if component == "suffix" and prompt:
            assert torch.equal(adapter.suffix, prefix.prefix) and not torch.allclose(ours[0], theirs[0])
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    others = start(bundle, component, seed=1)[1]
    for (name, a), b in zip(adapter.named_parameters(), others.parameters(), strict=True):
        assert torch.equal(a, b) == (
            name in ("generated.fc1.bias", "generated.fc2.weight", "generated.fc2.bias")
        )


def test_tokens_that_are_made_from_a_prompt_differ_with_it(bundle):
    """Those of the others do not: what stands at a prefix's first place sees BOS and itself alone."""
    for component, differs in (("prefix", False), ("deep", False), ("generated", True)):
        model, _ = moved(bundle, component)
        a, b = (embed(model, prompt)[0, 1 : 1 + P] for prompt in (PROMPT, "a nurse"))
        assert torch.allclose(a, b, atol=1e-12) != differs


@pytest.mark.parametrize("component", SOFT)
def test_file_and_back_bit_for_bit(loaded_tiny, tmp_path, component):
    model, tensors = moved(loaded_tiny, component)
    save_adapter(tmp_path / FILE, tensors, {"base": loaded_tiny.fingerprints})
    read, loaded = read_adapter(tmp_path), load_adapter(loaded_tiny, tmp_path)
    assert (read.component, read.soft_tokens, loaded.soft_tokens) == (component, P, P)
    assert {name.split(".")[0] for name in read.tensors} == {
        component
    } and read.tensors.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read.tensors.items())
    for prompt in PROMPTS:
        assert torch.equal(embed(loaded, prompt), embed(model, prompt))
    assert torch.equal(embed(load_adapter(loaded_tiny, tmp_path, 0), PROMPT), embed(loaded_tiny, PROMPT))
    L = eos_place(loaded_tiny, loaded_tiny.tokenizer([PROMPT])[0]) + 1
    with torch.no_grad():
        assert torch.equal(embed_padded(loaded, PROMPT, "", "own"), embed(loaded, PROMPT)[:, : L + P])
    with pytest.raises(UserError, match="a soft prompt is there or not"):
        load_adapter(loaded_tiny, tmp_path, 0.5)
    for more in SOFT:
        save_adapter(tmp_path / "more.safetensors", dict(start(loaded_tiny, more)[1].named_parameters()), {})
        with pytest.raises(UserError, match="a second soft prompt"):
            load_adapters(loaded, [(tmp_path / "more.safetensors", 1)])
        with pytest.raises(UserError, match="a second soft prompt"):
            load_adapters(loaded_tiny, [(tmp_path, 1), (tmp_path / "more.safetensors", 1)])


def test_no_two_share_a_fingerprint_or_judgements(loaded_tiny, tmp_path):
    """Not even a prefix and a suffix of the same numbers."""
    known, fingerprints = set(), set()
    for component in SOFT:
        model, adapter = start(loaded_tiny, component)
        fingerprints.add(model.all_fingerprints["soft"])
        save_adapter(tmp_path / f"{component}.safetensors", dict(adapter.named_parameters()), {})
        loaded = load_adapter(loaded_tiny, tmp_path / f"{component}.safetensors")
        known.add(json.dumps(model_of(loaded, Drawing(2, 2.0), 0)))
    assert len(known) == len(fingerprints) == len(SOFT)
    with torch.no_grad():
        next(adapter.parameters()).add_(1)
    assert adapter.fingerprint not in fingerprints  # of a kind that training changes


def test_what_does_not_fit_is_refused(loaded_tiny, tmp_path):
    made = {name: p.detach() for name, p in start(loaded_tiny, "generated")[1].named_parameters()}
    for change, message in (
        ({"suffix": torch.zeros(4)}, "lora_down"),
        ({"suffix": torch.zeros(0, 32)}, "rank 0"),
        ({"suffix": torch.zeros(90, 32)}, "1 to 74"),
        ({"suffix": torch.zeros(4, 31)}, r"31\], expected float"),
        ({"suffix": torch.zeros(4, 32), "prefix": torch.zeros(4, 32)}, "lora_down"),
        ({"deep": torch.zeros(4, 32)}, r"\[4, 32\], expected float"),
        ({"deep": torch.zeros(3, 4, 32)}, r"\[3, 4, 32\], expected float"),
        ({**made, "generated.fc1.bias": torch.zeros(HIDDEN + 1)}, "fc1.bias"),
        ({**made, "generated.more": torch.zeros(1, 1)}, "1 unknown tensors .generated.more"),
        ({name: t for name, t in made.items() if "fc2.bias" not in name}, "1 tensors missing"),
        ({name: t for name, t in made.items() if "tokens" not in name}, "lora_down"),
    ):
        write(tmp_path / "file", change, {"format": FORMAT})
        with pytest.raises(UserError, match=message) as refused:
            load_adapter(loaded_tiny, tmp_path / "file")
        assert str(tmp_path / "file") in str(refused.value)


def test_in_half_precision_the_adapter_stays_in_float32(tiny_folder):
    half = load_bundle(tiny_folder, dtype=torch.bfloat16)
    for component in SOFT:
        model, tensors = moved(half, component)
        assert all(t.dtype == torch.float32 for t in tensors.values())
        assert embed(model, PROMPT).dtype == torch.bfloat16
