"""Text embeddings padded as in the released code, in the place of the 77 tokens that Stable Diffusion reads.

There a prompt has no padding: T is its own number of tokens L. The empty one's L - 2 tokens of padding see only its BOS
and EOS, not each other (in the runs with a prefix they see each other, too).
"""

import torch
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.errors import UserError
from fairref.generation.rollout import embed
from fairref.nets import attention

PADDINGS = {
    "full": "to all 77 tokens",
    "own": "to the prompt's own number of tokens, as in the paper's released code",
}
PADDING_HELP = "padding of the texts; " + "; ".join(f"{name}: {what}" for name, what in PADDINGS.items())


def embed_padded(bundle: Bundle, prompt: str, negative: str, padding: str) -> Tensor:
    """[c, c_empty] (2, T, d) as `embed` has them; with "own" padding T is the longer text's number of tokens.

    Raises UserError for another padding.
    """
    if padding not in PADDINGS:
        raise UserError(f"The padding is {padding!r}; expected {' or '.join(PADDINGS)}.")
    padded = embed(bundle, prompt, negative)
    if padding == "full":
        return padded
    tokenizer, soft = bundle.tokenizer, 0 if bundle.prefix is None else len(bundle.prefix)
    ids = tokenizer([prompt, negative])
    lengths = [
        min(count + extra, tokenizer.length)
        for count, extra in zip(own_lengths(ids, tokenizer.eos, tokenizer.pad), (soft, 0), strict=True)
    ]
    T = max(lengths)
    if soft:
        return padded[:, :T]
    encoders = (bundle.text_encoder, bundle.empty_encoder or bundle.text_encoder)
    rows = zip(encoders, ids, lengths, strict=True)
    return torch.stack([_masked(encoder, row[:T], L) for encoder, row, L in rows])


def own_lengths(ids: Tensor, eos: int, pad: int) -> list[int]:
    """Tokens of each text in ids (B, T), BOS and one EOS among them, without the padding at its end."""
    is_pad = (ids == pad).flip(1).int().cumprod(1).sum(1)  # at the end of each
    return (ids.shape[1] - is_pad + int(pad == eos)).clamp(max=ids.shape[1]).tolist()


def _masked(encoder, ids, L):
    """(T, d): the first L of ids (T,) as ever, for attention is causal; of the others each sees those L alone."""
    tower = encoder.text_model
    x = encoder.embed(ids[None].to(next(encoder.parameters()).device))  # (1, T, D)
    x = x + tower.embeddings.position_embedding.weight[: len(ids)]
    text, rest = x[:, :L], x[:, L:]
    for layer in tower.encoder.layers:
        attend, seen = layer.self_attn, layer.layer_norm1(text)
        q, k, v = attend.q_proj(layer.layer_norm1(rest)), attend.k_proj(seen), attend.v_proj(seen)
        rest = rest + attend.out_proj(attention(q, k, v, attend.heads))
        rest = rest + layer.mlp(layer.layer_norm2(rest))
        text = layer(text)
    return tower.final_layer_norm(torch.cat([text, rest], 1))[0]
