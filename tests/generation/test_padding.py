"""Texts padded to their own length are what the released code's text encoder, transformers', makes of them."""

import pytest
import torch
from transformers import CLIPTextModel

from fairref.errors import UserError
from fairref.generation.adapters import FILE, load_adapter, save_adapter
from fairref.generation.drawing import Drawing, fixed_images
from fairref.generation.padding import embed_padded
from fairref.generation.rollout import embed
from fairref.generation.soft import own_lengths

PROMPT = "a photo of the face of a pilot, a person"


def peer(folder, ids, mask):
    """transformers' hidden states (T, d) of one text with a mask over its tokens, as the released code asks."""
    network = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    with torch.no_grad():
        return network(ids[None], attention_mask=mask[None]).last_hidden_state[0]


@pytest.mark.parametrize("negative", ["", "a nurse", " ".join(["a nurse"] * 20)])
def test_own_padding_is_that_of_transformers_with_a_mask(tiny_folder, loaded_tiny, negative):
    ids = loaded_tiny.tokenizer([PROMPT, negative])
    lengths = own_lengths(ids, loaded_tiny.tokenizer.eos, loaded_tiny.tokenizer.pad)
    T = max(lengths)
    with torch.no_grad():
        found = embed_padded(loaded_tiny, PROMPT, negative, "own")
        assert torch.equal(
            embed_padded(loaded_tiny, PROMPT, negative, "full"), embed(loaded_tiny, PROMPT, negative)
        )
    assert found.shape == (2, T, 32)
    for row, text, L in zip(found, ids, lengths, strict=True):
        expected = peer(tiny_folder, text[:T], (torch.arange(T) < L).long())
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)
    if not negative:  # without the mask it would be another
        unmasked = embed(loaded_tiny, PROMPT)[1, :T]
        assert (unmasked - found[1])[:2].abs().max() < 1e-5 < 0.01 < (unmasked - found[1])[2:].abs().max()


def test_the_padding_at_the_end_alone_is_none_of_a_texts_own_tokens():
    bos, eos, pad = 0, 1, 2
    rows = torch.tensor([[bos, pad, 5, eos, pad], [bos, 5, 5, 5, eos], [bos, eos, pad, pad, pad]])
    assert own_lengths(rows, eos, pad) == [4, 5, 2]
    rows[rows == pad] = eos
    assert own_lengths(rows[1:], eos, eos) == [5, 2]


def test_a_prefix_counts_as_tokens_and_the_empty_prompt_is_as_ever(loaded_tiny, tmp_path):
    save_adapter(tmp_path / FILE, {"prefix": torch.randn(5, 32)}, {})
    model = load_adapter(loaded_tiny, tmp_path)
    (L,) = own_lengths(loaded_tiny.tokenizer([PROMPT]), loaded_tiny.tokenizer.eos, loaded_tiny.tokenizer.pad)
    with torch.no_grad():
        assert torch.equal(embed_padded(model, PROMPT, "", "own"), embed(model, PROMPT)[:, : L + 5])


def test_the_padding_changes_images(loaded_tiny):
    with pytest.raises(UserError, match="padding is 'none'; expected full or own"):
        fixed_images(loaded_tiny, 0, PROMPT, range(1), Drawing(2, 2.0, padding="none"))
    full, own = (
        fixed_images(loaded_tiny, 0, PROMPT, range(2), Drawing(2, 2.0, padding=p)) for p in ("full", "own")
    )
    assert (full - own).abs().max() > 1e-4
