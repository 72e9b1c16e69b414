"""Make a small BPE vocabulary in CLIP's file format."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from fairref.files.paths import write_file
from fairref.files.tokenizer import normaliser, word_splitter
from fairref.files.vocabulary import END_OF_WORD, tokens_of


def train_bpe(texts: list[str], vocab_size: int, folder: str | Path) -> int:
    """Learn `vocab.json` and `merges.txt` from `texts`, write them, and return the number of tokens.

    Order of ids: 256 byte symbols, the same with `</w>`, one for each merge, BOS, EOS. The most frequent pair is
    merged first, and of equally frequent pairs the first in sorted order. So the same texts make the same files. There
    are fewer tokens than `vocab_size` if the texts have no pair left to merge.
    """
    alone = len(tokens_of([]))
    if vocab_size < alone:
        raise ValueError(f"vocab_size is {vocab_size}; the bytes and two special tokens alone need {alone}")
    merges = _merges(_word_counts(texts), vocab_size - alone)
    vocab = tokens_of(merges)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False).encode())
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    write_file(folder / "merges.txt", ("\n".join(lines) + "\n").encode())
    return len(vocab)


def _word_counts(texts: Sequence[str]) -> Counter[str]:
    normalise, split = normaliser(), word_splitter()
    counts = Counter()
    for text in texts:
        counts.update(word for word, _ in split.pre_tokenize_str(normalise.normalize_str(text)))
    return counts


def _merges(word_counts: Mapping[str, int], number: int) -> list[tuple[str, str]]:
    """Return the merges that make `number` new symbols, best first, as pairs of symbols."""
    words = [(*word[:-1], word[-1] + END_OF_WORD) for word in word_counts]
    weight = list(word_counts.values())
    count, places = Counter(), defaultdict(set)  # of each pair: its number, and the words that have it

    def add(w: int, sign: int) -> None:
        for pair in zip(words[w][:-1], words[w][1:], strict=True):
            count[pair] += sign * weight[w]
            if sign > 0:
                places[pair].add(w)

    for w in range(len(words)):
        add(w, +1)
    merges, made = [], set()
    while len(made) < number and count:
        best = min(count, key=lambda pair: (-count[pair], pair))
        if count[best] <= 0:
            break
        for w in places.pop(best):
            add(w, -1)
            words[w] = _merge(words[w], best)
            add(w, +1)
        del count[best]
        made.add("".join(best))
        merges.append(best)
    return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Return the word with each occurrence of the pair joined, from the left."""
    merged, i = [], 0
    while i < len(word):
        joined = word[i : i + 2] == pair
        merged.append("".join(pair) if joined else word[i])
        i += 2 if joined else 1
    return tuple(merged)
