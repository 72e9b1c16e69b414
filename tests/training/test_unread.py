"""`--empty-prompt unread`: LoRA on the text encoder that has no part in what the empty prompt shows its layers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_run import make_setup

from fairref.files.weights import load_strict
from fairref.generation import lora
from fairref.generation.adapters import FILE, load_adapter, read_adapter
from fairref.generation.lora import adapt, empty_directions
from fairref.generation.rollout import embed
from fairref.nets.clip import ClipText, ClipTextConfig
from fairref.training.loop import RAW_FILE, new_state, update
from fairref.training.run import train


def steps(setup, count=3):
    """The state after random gradients."""
    _, state = new_state(setup)
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        update(
            setup.recipe,
            state,
            [torch.randn(p.shape, generator=generator) for p in state.parameters().values()],
        )
    return state


def moves(setup, tensors):
    """How far an adapter moves the empty prompt and another, relative to their lengths."""
    model, adapter = adapt(setup.bundle, setup.recipe.component, setup.recipe.rank)
    load_strict(adapter, {name: p.detach() for name, p in tensors.items()}, "the adapter")
    prompt = "a photo of the face of a pilot, a person"
    pairs = [(embed(model, text)[0], embed(setup.bundle, text)[0]) for text in ("", prompt)]
    return [float(((a - b).norm() / b.norm()).detach()) for a, b in pairs]


def test_the_directions_are_the_largest_of_a_layers_inputs(loaded_emoji):
    """By numpy's eigenvalues of what the layers are given, counted by transformers' names."""
    encoder, seen = loaded_emoji.text_encoder, {}
    name = "text_model.encoder.layers.1.mlp.fc1"
    hook = encoder.get_submodule(name).register_forward_hook(
        lambda _, given, __: seen.update(x=given[0][0].double())
    )
    with torch.no_grad():
        encoder(loaded_emoji.tokenizer([""]))
    hook.remove()
    directions = empty_directions(loaded_emoji)
    assert len(directions) == 3 * 6  # layers, and their matrices
    for key, basis in directions.items():
        wide = 384 if "fc2" in key else 96
        assert basis.shape == (wide // 6, wide)
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)).double(), atol=1e-9, rtol=0)
    values, vectors = np.linalg.eigh((seen["x"].T @ seen["x"]).numpy())
    top = torch.from_numpy(vectors[:, np.argsort(values)[::-1][:16].copy()])
    found = directions[f"text_encoder.{name}.lora_down.weight"]
    torch.testing.assert_close(found.T @ found, top @ top.T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("component", ["text_encoder", "both"])
def test_where_all_directions_are_unread_the_empty_prompt_stays(loaded_emoji, monkeypatch, component):
    monkeypatch.setattr(lora, "UNREAD", 1)
    stays(make_setup(loaded_emoji, component=component, empty_prompt="unread", lr=0.01))


def test_of_stable_diffusions_width_all_directions_are_unread(loaded_emoji):
    """77 tokens are a tenth of its 768 directions. Two of its text encoder's layers, random weights."""
    torch.manual_seed(0)
    shape = ClipTextConfig(
        768,
        3072,
        12,
        2,
        vocab_size=loaded_emoji.text_encoder.text_model.embeddings.token_embedding.num_embeddings,
    )
    setup = make_setup(
        replace(loaded_emoji, text_encoder=ClipText(shape)), empty_prompt="unread", rank=4, lr=0.01
    )
    found = empty_directions(setup.bundle)
    assert {of.shape for of in found.values()} == {(77, 768), (77, 3072)}
    stays(setup)


def stays(setup):
    """Asserts that the empty prompt does, while another moves."""
    state = steps(setup)
    for tensors in (state.parameters(), state.ema):
        empty, other = moves(setup, tensors)
        assert empty < 1e-5 < 1e-3 < other


def test_of_the_small_world_a_sixth_is_most_of_it(loaded_emoji):
    found = {
        how: moves(setup, steps(setup).ema)
        for how in ("trained", "unread")
        for setup in [make_setup(loaded_emoji, empty_prompt=how, lr=0.01)]
    }
    (empty, other), (left, still) = found["trained"], found["unread"]
    assert left < empty / 4 and still > other / 4


def test_a_run_leaves_a_plain_adapter(loaded_tiny, tmp_path):
    """Its matrices have no part in the directions, and the empty prompt goes through its own text encoder."""
    folder = train(
        loaded_tiny, "gender", tmp_path / "run", empty_prompt="unread", iterations=2, lr=0.01, evaluate="none"
    )
    for file in (folder / FILE, folder / RAW_FILE):
        adapter = read_adapter(file)
        assert not adapter.leaves_empty and load_adapter(loaded_tiny, file).empty_encoder is None
        for name, directions in empty_directions(loaded_tiny).items():
            down = adapter.tensors[name].double()
            assert float((down @ directions.T).abs().max()) < 1e-6 * float(down.norm())
