"""Soft prompts: P trained tokens of width D, which a prompt's text embedding c has and c_empty has not.

What of a prompt no longer fits into T tokens is dropped at its end; EOS stays. L layers of the text encoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairref.bundle.loading import Bundle
from fairref.files.weights import fingerprint

HIDDEN = 64  # width of the network that makes tokens from a prompt


class SoftPrompt(nn.Module):
    """The common call. Its parameters have the names of an adapter's file; one of them, `named`, is (..., P, D)."""

    named: str

    def __init__(self, tokens: Tensor, bundle: Bundle, generator: torch.Generator | None = None):
        """Starts as the tokens (P, D); `generator` (on the CPU) draws what else it has."""
        super().__init__()

    def __len__(self) -> int:
        return self.get_parameter(self.named).shape[-2]

    @property
    def fingerprint(self) -> str:
        """What tells it from others, anew each time, since training changes it."""
        return fingerprint(self.state_dict())

    def forward(self, bundle: Bundle, ids: Tensor, plain: Tensor) -> Tensor:
        """c (1, T, D) of a prompt's ids (T,), of which the encoder alone makes `plain` (1, T, D)."""
        raise NotImplementedError


class Prefix(SoftPrompt):
    """Tokens between BOS and the prompt's first word."""

    named = "prefix"

    def __init__(self, tokens: Tensor, bundle: Bundle, generator: torch.Generator | None = None):
        super().__init__(tokens, bundle)
        self.prefix = nn.Parameter(tokens)

    def forward(self, bundle: Bundle, ids: Tensor, plain: Tensor) -> Tensor:
        encoder = bundle.text_encoder
        return encoder(embeddings=with_prefix(encoder.embed(ids), self.prefix))


class Suffix(SoftPrompt):
    """Tokens between the prompt's last word and its EOS, where a causal encoder lets them see the prompt."""

    named = "suffix"

    def __init__(self, tokens: Tensor, bundle: Bundle, generator: torch.Generator | None = None):
        super().__init__(tokens, bundle)
        self.suffix = nn.Parameter(tokens)

    def forward(self, bundle: Bundle, ids: Tensor, plain: Tensor) -> Tensor:
        words, eos = bundle.text_encoder.embed(ids), eos_place(bundle, ids)  # (T, D)
        kept = words[: min(eos, len(ids) - len(self) - 1)]
        row = torch.cat([kept, self.suffix.to(words.dtype), words[eos:]])[: len(ids)]
        return bundle.text_encoder(embeddings=row[None])


class Deep(SoftPrompt):
    """At the prefix's places (L, P, D): before each layer its own vectors take the place of what comes there.

    The first layer's are token embeddings. The others start as what the encoder has there, so all start as a prefix.
    """

    named = "deep"

    def __init__(self, tokens: Tensor, bundle: Bundle, generator: torch.Generator | None = None):
        super().__init__(tokens, bundle)
        self.deep = nn.Parameter(torch.stack([tokens, *prefix_states(tokens, bundle)]))

    def forward(self, bundle: Bundle, ids: Tensor, plain: Tensor) -> Tensor:
        tower, (first, *others) = bundle.text_encoder.text_model, self.deep
        x = with_prefix(tower.embeddings.token_embedding(ids), first)
        x = tower.encoder.layers[0](x + tower.embeddings.position_embedding.weight[: len(ids)])
        for layer, own in zip(tower.encoder.layers[1:], others, strict=True):
            x = layer(torch.cat([x[:, :1], own[None].to(x.dtype), x[:, len(own) + 1 :]], 1))
        return tower.final_layer_norm(x)


class Generated(SoftPrompt):
    """At the prefix's place learned tokens plus what two linear layers and a GELU make of the prompt's state at EOS.

    The last layer starts at zero, so it starts as a prefix.
    """

    named = "generated.tokens"

    def __init__(self, tokens: Tensor, bundle: Bundle, generator: torch.Generator | None = None):
        super().__init__(tokens, bundle)
        kind, D = {"dtype": tokens.dtype, "device": tokens.device}, tokens.shape[1]
        self.generated = nn.Module()
        self.generated.tokens = nn.Parameter(tokens)
        self.generated.fc1 = nn.Linear(D, HIDDEN, **kind)
        self.generated.fc2 = nn.Linear(HIDDEN, tokens.numel(), **kind)
        self.generated.fc1.weight.data.copy_(torch.randn(HIDDEN, D, generator=generator) / D**0.5)
        for zero in (self.generated.fc1.bias, *self.generated.fc2.parameters()):
            nn.init.zeros_(zero)

    def forward(self, bundle: Bundle, ids: Tensor, plain: Tensor) -> Tensor:
        network, encoder = self.generated, bundle.text_encoder
        state = plain[0, eos_place(bundle, ids)].to(network.tokens.dtype)  # (D,)
        tokens = network.tokens + network.fc2(F.gelu(network.fc1(state))).view_as(network.tokens)
        return encoder(embeddings=with_prefix(encoder.embed(ids), tokens))


SOFT_PROMPTS: dict[str, type[SoftPrompt]] = {
    "prefix": Prefix,
    "suffix": Suffix,
    "deep": Deep,
    "generated": Generated,
}


def with_prefix(words: Tensor, tokens: Tensor) -> Tensor:
    """A prompt's token embeddings (T, D) with tokens (P, D) behind BOS, as a row (1, T, D)."""
    P = len(tokens)
    bos, kept, _, last = words.split([1, len(words) - P - 2, P, 1])
    return torch.cat([bos, tokens.to(words.dtype), kept, last])[None]


@torch.no_grad()
def prefix_states(tokens: Tensor, bundle: Bundle) -> list[Tensor]:
    """(P, D) before each layer but the first at a prefix's places, which the words behind it can't change."""
    tower, bos = bundle.text_encoder.text_model, torch.tensor([bundle.tokenizer.bos], device=tokens.device)
    words = tower.embeddings.token_embedding(bos)
    x = torch.cat([words, tokens.to(words.dtype)])[None]  # (1, 1 + P, D)
    x = x + tower.embeddings.position_embedding.weight[: x.shape[1]]
    states = []
    for layer in tower.encoder.layers[:-1]:
        x = layer(x)
        states.append(x[0, 1:].to(tokens.dtype))
    return states


def eos_place(bundle: Bundle, ids: Tensor) -> int:
    """Where the EOS behind the last word of ids (T,) is."""
    return own_lengths(ids[None], bundle.tokenizer.eos, bundle.tokenizer.pad)[0] - 1


def own_lengths(ids: Tensor, eos: int, pad: int) -> list[int]:
    """Tokens of each text in ids (B, T), BOS and one EOS among them, without the padding at its end."""
    is_pad = (ids == pad).flip(1).int().cumprod(1).sum(1)  # at the end of each
    return (ids.shape[1] - is_pad + int(pad == eos)).clamp(max=ids.shape[1]).tolist()
