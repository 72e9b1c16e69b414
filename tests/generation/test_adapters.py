"""What can be trained, and its file."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_bundle import write_tiny_bundle

from fairref.bundle.loading import load_bundle
from fairref.errors import UserError
from fairref.files.images import to_image
from fairref.files.weights import write
from fairref.generation.adapters import (
    FILE,
    FORMAT,
    IMPORTED,
    load_adapter,
    load_adapters,
    read_adapter,
    save_adapter,
)
from fairref.generation.lora import COMPONENTS, adapt, first_tokens
from fairref.generation.padding import embed_padded
from fairref.generation.rollout import embed
from fairref.generation.sampling import SampleSettings, sample, sample_tensor
from fairref.generation.strengths import choose_adapters, describe_adapters
from fairref.settings import SOFT

RANK, TOKENS = 3, 4
PROMPT = "a photo of the face of a pilot, a person"
SEED = {name: seed for seed, name in enumerate(COMPONENTS)}  # of each one's adapter
LORA = [name for name in COMPONENTS if name not in SOFT]
ATTENTION = [
    f"{place}.{layer}" for place in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")
]
TEXT = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def bundle(folder):
    return load_bundle(folder)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def start(bundle, component):
    return adapt(bundle, component, RANK, TOKENS, generator())


def moved(bundle, component):
    adapted, adapter = start(bundle, component)
    with torch.no_grad():
        for n, (name, p) in enumerate(adapter.named_parameters()):
            if "lora_down" not in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator(n)))
    return adapted, adapter


@torch.no_grad()
def outputs(bundle):
    """[c, c_empty] of a prompt, and what the U-Net makes of them: all that an adapter can change."""
    both = embed(bundle, PROMPT)
    z = torch.randn(2, 4, 8, 8, generator=generator(9)).to(both.dtype)
    return both, bundle.unet(z, 300, both)


@pytest.mark.parametrize("component", LORA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_start_of_lora_is_the_frozen_model_bit_for_bit(folder, dtype, component):
    bundle = load_bundle(folder, dtype=dtype)
    adapted, adapter = start(bundle, component)
    for ours, frozen in zip(outputs(adapted), outputs(bundle), strict=True):
        assert torch.equal(ours, frozen) and ours.dtype == dtype
    assert all(p.dtype == torch.promote_types(dtype, torch.float32) for p in adapter.parameters())


@pytest.mark.parametrize("component", LORA)
def test_lora_is_the_sum_of_base_and_product(folder, bundle, component):
    """Merged by hand into plain weights, the adapted networks are ordinary ones."""
    adapted, adapter = moved(bundle, component)
    tensors = {name: p.detach() for name, p in adapter.named_parameters()}
    merged = load_bundle(folder)
    layers = [name.removesuffix(".lora_up.weight") for name in tensors if name.endswith(".lora_up.weight")]
    for layer in layers:
        part, _, name = layer.partition(".")
        product = tensors[f"{layer}.lora_up.weight"] @ tensors[f"{layer}.lora_down.weight"]
        getattr(merged, part).get_submodule(name).weight.data += product
    ours = outputs(adapted)
    for found, expected in zip(ours, outputs(merged), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (ours[-1] - outputs(bundle)[-1]).abs().max() > 0.01
    wanted = {"text_encoder": TEXT, "unet": ATTENTION}
    for part in COMPONENTS[component]:
        network = getattr(bundle, part)
        ends = tuple(f".{end}" for end in wanted[part])
        expected = {f"{part}.{name}" for name, _ in network.named_modules() if name.endswith(ends)}
        assert {layer for layer in layers if layer.startswith(f"{part}.")} == expected and expected


def test_a_prefix_stands_between_bos_and_the_prompt_and_nowhere_in_the_empty_one(bundle):
    adapted, adapter = moved(bundle, "prefix")
    encoder, T = bundle.text_encoder, bundle.tokenizer.length
    with torch.no_grad():
        (of_prompt, of_empty), (_, empty) = embed(adapted, PROMPT), embed(bundle, PROMPT)
        ids = bundle.tokenizer([PROMPT])
        words = encoder.embed(ids)
        by_hand = torch.cat([words[:, :1], adapter.prefix[None], words[:, 1:]], 1)[:, :T]
        torch.testing.assert_close(of_prompt, encoder(embeddings=by_hand)[0])
        assert torch.equal(of_empty, empty)
        torch.testing.assert_close(embed(adapted, "", "a pilot")[1], embed(bundle, "a pilot")[0])


def test_a_long_prompt_loses_its_end_to_the_prefix_but_not_its_eos(bundle):
    adapted, adapter = moved(bundle, "prefix")
    tokenizer, encoder = bundle.tokenizer, bundle.text_encoder
    prompt = " ".join("a pilot" for _ in range(60))
    words = encoder.embed(tokenizer([prompt]))[0]
    by_hand = torch.cat([words[:1], adapter.prefix, words[1 : tokenizer.length - TOKENS - 1]])
    by_hand = torch.cat([by_hand, encoder.embed(torch.tensor([tokenizer.eos]))])
    torch.testing.assert_close(embed(adapted, prompt)[0], encoder(embeddings=by_hand[None])[0])
    kept, longer = tokenizer.cut([prompt])[0], tokenizer.cut([prompt], TOKENS)[0]
    assert longer.endswith(kept) and len(longer) > len(kept)
    count = int((tokenizer([PROMPT])[0] != tokenizer.eos).sum()) + 1  # BOS, words, one EOS
    room = tokenizer.length - count
    assert tokenizer.cut([PROMPT], room) == [""]
    assert tokenizer.cut([PROMPT], room + 1) != [""] and PROMPT.endswith(tokenizer.cut([PROMPT], room + 1)[0])


def test_the_first_soft_tokens_are_random_tokens_of_the_vocabulary(bundle):
    table = bundle.text_encoder.text_model.embeddings.token_embedding.weight
    prefix = adapt(bundle, "prefix", 1, 40, generator())[1].prefix
    rows = [int((table == token).all(1).nonzero()[0]) for token in prefix]
    assert len(set(rows)) > 30 and not {bundle.tokenizer.bos, bundle.tokenizer.eos} & set(rows)
    other = adapt(bundle, "prefix", 1, 40, generator(1))[1].prefix
    assert not torch.equal(prefix, other)
    for tokens in (0, 75):
        with pytest.raises(UserError, match="1 to 74"):
            adapt(bundle, "prefix", 1, tokens)


@pytest.mark.parametrize("bos, eos", [*itertools.permutations((0, 2, 5), 2)])
def test_a_soft_token_starts_as_any_token_but_bos_and_eos(bos, eos):
    """Of a vocabulary of six, 60 tokens: one of the four others is left out once in ten million draws."""
    tokenizer = SimpleNamespace(length=77, vocab_size=6, bos=bos, eos=eos)
    table = torch.nn.Embedding(6, 6).requires_grad_(False)
    table.weight.copy_(torch.eye(6))
    encoder = SimpleNamespace(embed=table, parameters=table.parameters)
    bundle = SimpleNamespace(tokenizer=tokenizer, text_encoder=encoder)
    rows = first_tokens(bundle, 60, generator())
    assert (rows.sum(1) == 1).all() and set(rows.argmax(1).tolist()) == set(range(6)) - {bos, eos}


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_given_bundle_stays_and_its_weights_are_shared(bundle, component):
    before, networks = outputs(bundle), (bundle.text_encoder, bundle.unet)
    names = [name for network in networks for name, _ in network.named_modules()]
    adapted, adapter = moved(bundle, component)
    assert all(torch.equal(a, b) for a, b in zip(outputs(bundle), before, strict=True))
    assert [name for network in networks for name, _ in network.named_modules()] == names
    frozen = {p.data_ptr() for network in networks for p in network.parameters()}
    ours = {p.data_ptr(): p for network in (adapted.text_encoder, adapted.unet) for p in network.parameters()}
    if adapted.soft is not None:
        ours |= {p.data_ptr(): p for p in adapted.soft.parameters()}
    assert frozen <= set(ours)
    assert {at for at, p in ours.items() if p.requires_grad} == {p.data_ptr() for p in adapter.parameters()}
    assert not (frozen & {p.data_ptr() for p in adapter.parameters()})


def test_down_starts_with_deviation_one_over_rank(bundle):
    _, adapter = adapt(bundle, "both", 8, generator=generator())
    down = torch.cat([p.flatten() for name, p in adapter.named_parameters() if "lora_down" in name])
    assert down.std().item() == pytest.approx(1 / 8, rel=0.05) and abs(down.mean().item()) < 0.01


@pytest.mark.parametrize("component", COMPONENTS)
def test_file_and_back(bundle, tmp_path, component):
    adapted, adapter = moved(bundle, component)
    tensors = dict(adapter.named_parameters())
    info = {"average": "raw", "target": [0.5, 0.5]}
    save_adapter(tmp_path / FILE, tensors, info)
    for path in (tmp_path, tmp_path / FILE, str(tmp_path)):
        loaded = load_adapter(bundle, path)
        assert all(torch.equal(a, b) for a, b in zip(outputs(loaded), outputs(adapted), strict=True))
        assert not any(p.requires_grad for n in (loaded.text_encoder, loaded.unet) for p in n.parameters())
        assert loaded.soft is None or not any(p.requires_grad for p in loaded.soft.parameters())
    with safe_open(tmp_path / FILE, "pt") as file:
        assert list(file.metadata()) == ["fairref"]
        assert json.loads(file.metadata()["fairref"])["info"] == {**info, "format": FORMAT}
        assert set(file.keys()) == set(tensors)
    first = (tmp_path / FILE).read_bytes()
    save_adapter(tmp_path / FILE, dict(reversed(tensors.items())), dict(reversed(info.items())))
    assert (tmp_path / FILE).read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_the_empty_prompt_may_stay_as_it_was(bundle, tmp_path):
    adapted, adapter = moved(bundle, "text_encoder")
    both, base = embed(adapted, PROMPT, "ugly"), embed(bundle, PROMPT, "ugly")
    info = {"base": bundle.fingerprints, "component": "text_encoder"}
    files = {how: tmp_path / f"{how}.safetensors" for how in ("trained", "frozen")}
    for how, file in files.items():
        save_adapter(file, dict(adapter.named_parameters()), {**info, "empty_prompt": how})
    assert torch.equal(embed(load_adapter(bundle, files["trained"]), PROMPT, "ugly"), both)
    frozen = load_adapter(bundle, files["frozen"])
    c, c_empty = embed(frozen, PROMPT, "ugly")
    torch.testing.assert_close(c, both[0])
    torch.testing.assert_close(c_empty, base[1])
    assert (both[1] - base[1]).abs().max() > 0.01
    own = embed_padded(frozen, PROMPT, "ugly", "own")
    torch.testing.assert_close(own[0], embed_padded(adapted, PROMPT, "ugly", "own")[0])
    torch.testing.assert_close(own[1], embed_padded(bundle, PROMPT, "ugly", "own")[1])
    together = [(files["frozen"], 1.0), (files["frozen"], 0.5)]
    one_by_one = load_adapter(load_adapter(bundle, files["frozen"]), files["frozen"], 0.5)
    of_both = embed(load_adapters(bundle, together), PROMPT, "ugly")
    torch.testing.assert_close(embed(one_by_one, PROMPT, "ugly"), of_both)
    torch.testing.assert_close(of_both[1], base[1])
    for first, second in (("frozen", "trained"), ("trained", "frozen")):
        with pytest.raises(UserError, match="some leave the empty prompt as it was"):
            load_adapters(bundle, [(files[first], 1.0), (files[second], 1.0)])
        with pytest.raises(UserError, match="some leave the empty prompt as it was"):
            load_adapter(load_adapter(bundle, files[first]), files[second])


def test_names_in_the_file(bundle):
    names = set(dict(moved(bundle, "both")[1].named_parameters()))
    assert "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_down.weight" in names
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc2.lora_up.weight" in names
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_up.weight" in names
    assert set(dict(moved(bundle, "prefix")[1].named_parameters())) == {"prefix"}


def test_a_file_that_does_not_fit_is_refused(bundle, tmp_path):
    _, adapter = moved(bundle, "both")
    save_adapter(tmp_path / FILE, dict(adapter.named_parameters()), {})
    tensors, info = load_file(tmp_path / FILE), {"format": FORMAT}
    name = next(iter(tensors))
    write(tmp_path / "less", {key: tensor for key, tensor in tensors.items() if key != name}, info)
    write(tmp_path / "more", {**tensors, "unet.stranger": torch.zeros(1)}, info)
    write(tmp_path / "wide", {**tensors, name: torch.zeros(RANK, 999)}, info)
    write(tmp_path / "other_format", tensors, {})
    write(tmp_path / "nothing", {"x": torch.zeros(1)}, info)
    write(tmp_path / "vae", {f"vae.{name}": torch.zeros(1, 1)}, info)
    write(tmp_path / "flat", {"prefix": torch.zeros(9)}, info)
    write(tmp_path / "long", {"prefix": torch.zeros(90, 32)}, info)
    for file, message in (
        ("less", "1 tensors missing"),
        ("more", "1 unknown tensors .unet.stranger"),
        ("wide", r"999\], expected float"),
        ("other_format", "expected an adapter that train.py"),
        ("nothing", "lora_down"),
        ("vae", "lora_down"),
        ("flat", "lora_down"),
        ("long", "1 to 74"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_adapter(bundle, tmp_path / file)
        assert str(tmp_path / file) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such adapter"):
        load_adapter(bundle, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no adapter\.safetensors in it"):
        (tmp_path / "empty").mkdir()
        load_adapter(bundle, tmp_path / "empty")


def write_adapter(bundle, folder, component, seed=0, **info):
    """A LoRA or prefix of this bundle in a file of this folder, another one for each seed."""
    _, adapter = adapt(bundle, component, RANK, TOKENS, generator(seed))
    tensors = {name: p.detach() for name, p in adapter.named_parameters()}
    for n, name in enumerate(tensors):
        if "lora_up" in name:
            tensors[name] = 0.3 * torch.randn(tensors[name].shape, generator=generator(seed + n))
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(folder / FILE, tensors, {"base": bundle.fingerprints, **info})
    return folder


@pytest.fixture(scope="module")
def files(bundle, tmp_path_factory):
    """One LoRA on the U-Net, one on both networks, a prefix."""
    folder = tmp_path_factory.mktemp("files")
    made = {name: write_adapter(bundle, folder / name, name, seed) for name, seed in SEED.items()}
    whole = bundle.unet.state_dict()
    names = [name for name in whole if name.endswith(("attn2.to_k.weight", "conv_in.weight"))]
    matrices = {f"unet.{name}": torch.randn(whole[name].shape, generator=generator(7)) for name in names}
    (folder / "whole").mkdir()
    save_adapter(folder / "whole" / FILE, matrices, {"base": bundle.fingerprints}, IMPORTED)
    return {**made, "whole": folder / "whole"}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True))


@pytest.mark.parametrize("name", [*COMPONENTS, "whole"])
def test_strength_0_is_the_base_and_1_is_as_if_it_were_not_named_bit_for_bit(bundle, files, name):
    assert same(load_adapter(bundle, files[name], 0.0), bundle)
    assert same(load_adapter(bundle, files[name], 1.0), load_adapters(bundle, choose_adapters(files[name])))
    assert not same(load_adapter(bundle, files[name]), bundle)


@pytest.mark.parametrize("s", [0.5, 1.5])
def test_strengths_of_several_multiply_what_each_adds_to_the_weights(folder, bundle, files, s):
    """Against a bundle whose weights are W + s up down and W + 2/3 s (new - W), merged by hand in float64."""
    both, whole = read_adapter(files["both"]), read_adapter(files["whole"])
    merged = load_bundle(folder)
    change = {name: s * up.double() @ down.double() for name, (down, up) in both.pairs.items()}
    for name, matrix in whole.matrices.items():
        part, _, layer = name.partition(".")
        base = getattr(bundle, part).get_submodule(layer).weight
        change[name] = change.get(name, 0) + 2 / 3 * s * (matrix.double() - base)
    for name, tensor in change.items():
        part, _, layer = name.partition(".")
        weight = getattr(merged, part).get_submodule(layer).weight
        weight.data = (weight.double() + tensor).float()
    model = load_adapters(bundle, [(files["both"], s), (files["whole"], 2 / 3 * s)])
    for found, expected in zip(outputs(model), outputs(merged), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    other = load_adapters(bundle, [(whole, 2 / 3 * s), (both, s)])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs(model), outputs(other), strict=True))


def test_all_of_several_are_held_against_the_base_itself(folder, bundle, files, tmp_path):
    once = load_adapter(
        load_bundle(folder), write_adapter(bundle, tmp_path / "old", "both", SEED["both"], base=None)
    )
    twice = load_adapter(once, files["unet"])  # one after the other: an adapted bundle is still of its base
    assert same(twice, load_adapters(bundle, [(files["both"], 1.0), (files["unet"], 1.0)]))
    assert load_adapter(load_bundle(folder), files["both"]).fingerprints == bundle.fingerprints
    foreign = {**bundle.fingerprints, "unet": "0" * 64}
    write_adapter(bundle, tmp_path, "unet", base=foreign)
    for adapters in ([(files["both"], 1.0), (tmp_path, 1.0)], [(tmp_path, 1.0), (files["both"], 1.0)]):
        with pytest.raises(UserError, match="made from another unet"):
            load_adapters(bundle, adapters)
        load_adapters(bundle, adapters, any_base=True)
    said = describe_adapters(bundle, choose_adapters([files["both"], tmp_path], [0.5, 1.5]))
    assert [(s["strength"], s["base"]) for s in said] == [(0.5, "this one"), (1.5, "another unet")]


@pytest.mark.parametrize(
    "names, strengths, expected",
    [
        (["both", "prefix", "unet"], [], [1, 1, 1]),
        (["both", "prefix", "unet"], [0.5], [0.5, 1, 0.5]),
        (["both", "prefix"], [0.5, 0], [0.5, 0]),
        (["whole"], [0.5], [0.5]),
        (["both", "unet", "prefix"], [0.5, 1], "2 strengths for 3 adapters"),
        ([], [0.5], "--strength is of an --adapter"),
        (["prefix"], [0.5], "a soft prompt is there or not"),
        (["unet"], [1.6], "strength is 1.6; expected 0 to 1.5"),
        (["unet"], [float("nan")], "strength is nan"),
        (["prefix", "prefix"], [], "a second soft prompt"),
        (["whole", "whole"], [], r"replaces unet\S+, as .*whole.* does"),
    ],
)
def test_which_strength_counts_for_which_adapter(bundle, files, names, strengths, expected):
    paths = [files[name] for name in names]
    if not isinstance(expected, str):
        chosen = choose_adapters(paths, strengths)
        assert [strength for _, strength in chosen] == expected
        load_adapters(bundle, chosen)
        return
    with pytest.raises(UserError, match=expected):
        load_adapters(bundle, choose_adapters(paths, strengths))


def test_the_library_draws_with_adapters_as_the_command_line_does(bundle, files):
    chosen = choose_adapters([files["unet"], files["prefix"]], 0.5)
    expected = sample_tensor(load_adapters(bundle, chosen), SampleSettings(PROMPT, 2))
    found = sample(bundle, PROMPT, 2, adapter=[files["unet"], files["prefix"]], strength=0.5)
    assert [image.tobytes() for image in found] == [to_image(x).tobytes() for x in expected]
