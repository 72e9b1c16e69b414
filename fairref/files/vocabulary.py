"""A vocabulary of CLIP's kind: byte-level BPE, whose merges say all of its tokens.

The tokens are 256 byte symbols, the same at the end of a word, one for each merge, BOS and EOS, in this order.
"""

import gzip
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
CLIP_MERGES = Path(__file__).with_name("clip_merges.txt.gz")
Merge = tuple[str, str]


@dataclass(frozen=True)
class Added:
    """A token that is looked for in a text before it is cut into words; the flags are those of `tokenizers`."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer is made of. `source` names its files in messages."""

    ids: dict[str, int]  # token -> id: 0, 1, 2, ..., the added ones last
    merges: list[Merge]  # first comes first
    added: tuple[Added, ...] = (Added(BOS), Added(EOS))
    pad: str = EOS  # the token that fills up a text that is too short
    source: str = "CLIP's vocabulary"
    max_length: int | None = None  # ids of a text, where a file says it


def byte_symbols() -> list[str]:
    """Return the 256 printable characters that stand for bytes, in the order of CLIP's vocabulary."""
    shown = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
    return [chr(b) for b in shown] + [chr(256 + n) for n in range(256 - len(shown))]


def tokens_of(merges: Iterable[Merge]) -> dict[str, int]:
    """Return the ids of all tokens that the merges make, in CLIP's order."""
    symbols = byte_symbols()
    # two merges may make the same string: it is one token
    tokens = [*symbols, *(s + END_OF_WORD for s in symbols), *("".join(pair) for pair in merges), BOS, EOS]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def clip_vocabulary() -> Vocabulary:
    """Return the vocabulary of every Stable Diffusion 1.x, which comes with the package."""
    lines = gzip.decompress(CLIP_MERGES.read_bytes()).decode("utf-8").split("\n")[1:-1]
    merges = [tuple(line.split(" ")) for line in lines]
    return Vocabulary(tokens_of(merges), merges)
