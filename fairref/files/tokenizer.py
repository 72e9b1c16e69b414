"""CLIP's tokenizer: byte-level BPE with the vocabulary of `files/vocabulary.py`.

A text is put into Unicode form C, each run of white space becomes one blank, and all is lowercased. The pattern
below cuts it into words and drops the white space between them. Each UTF-8 byte of a word becomes one printable
symbol, and the last symbol of a word carries `</w>`. Merges join neighbours, the first of the list first.
"""

import hashlib
import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from torch import LongTensor

from fairref.errors import UserError
from fairref.files.vocabulary import BOS, END_OF_WORD, EOS, Vocabulary

# Special tokens, English clitics, a run of letters, one digit, a run of anything else that isn't white space.
WORD = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def normaliser() -> normalizers.Normalizer:
    """Return the normalisation of a text before it is cut into words."""
    return normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )


def word_splitter() -> pre_tokenizers.PreTokenizer:
    """Return the splitter of a normalised text into words, written in byte symbols."""
    # ByteLevel also splits by GPT-2's pattern, as CLIPTokenizer of transformers lets it do.
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


class Tokenizer:
    """Turns texts into ids (B, length): BOS, tokens, EOS, and padding, which in SD-1.5 is EOS again.

    `bos`, `eos`, `pad` are ids, `vocab_size` is one more than the largest id. Raises UserError for a vocabulary that
    the merges do not make.
    """

    def __init__(self, vocabulary: Vocabulary, length: int = 77) -> None:
        if length < 2:
            raise UserError(f"token length is {length}, but BOS and EOS alone need 2: use 77")
        if (vocabulary.max_length or length) < length:
            raise UserError(
                f"{vocabulary.source}: model_max_length beside it is {vocabulary.max_length}; expected {length}, as"
                " many as the text encoder takes: use this model's files."
            )
        ids = vocabulary.ids
        self.length, self.source = length, vocabulary.source
        self.bos, self.eos, self.pad = ids[BOS], ids[EOS], ids[vocabulary.pad]
        self.vocab_size = len(ids)
        self._backend = _backend(vocabulary)
        self._backend.enable_truncation(length)
        self._backend.enable_padding(length=length, pad_id=self.pad, pad_token=vocabulary.pad)

    def __call__(self, texts: list[str]) -> LongTensor:
        """Return ids (B, length). The end of a text that is too long is dropped; `cut` returns it."""
        encodings = self._backend.encode_batch(_checked(texts))
        return torch.tensor([e.ids for e in encodings], dtype=torch.long).reshape(-1, self.length)

    def cut(self, texts: list[str], soft: int = 0) -> list[str]:
        """Return the end of each text that does not fit beside `soft` soft tokens; '' if all fits."""
        lost = []
        for text, encoding in zip(texts, self._backend.encode_batch(_checked(texts)), strict=True):
            # the overflow is BOS, what didn't fit, EOS; offsets are characters of the text as given
            place = self.length - 1 - soft  # the first that is dropped, EOS where there are no soft tokens
            start = [encoding.offsets[place][0]] if not encoding.special_tokens_mask[place] else []
            start += [rest.offsets[1][0] for rest in encoding.overflowing[:1]]
            lost.append(text[start[0] :].strip() if start else "")
        return lost

    @property
    def pad_token(self) -> str:
        """The token that fills up a text that is too short."""
        return self._backend.id_to_token(self.pad)

    def save(self, folder: str | Path) -> None:
        """Writes vocab.json and merges.txt into a folder that is there."""
        self._backend.model.save(str(folder))

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of all that makes a text's ids: vocabulary, merges, special tokens, length."""
        held = json.loads(self._backend.to_str())
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in held["model"]["merges"]]
        ids = sorted(self._backend.get_vocab().items())
        added = [
            token for token in held["added_tokens"] if token["content"] not in (BOS, EOS)
        ]  # their flags vary
        content = [ids, merges, added, self.bos, self.eos, self.pad, self.length]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def check_rows(tokenizer: Tokenizer, rows: int, source: str) -> None:
    """Raise a UserError if the tokenizer has more tokens than the embedding has rows; `source` names the latter."""
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens ({tokenizer.source}); expected at most {rows},"
            " as many as the text encoder: put this model's vocab.json and merges.txt there."
        )


def _checked(texts):
    if isinstance(texts, str):
        raise TypeError("a list of texts is expected, not one text")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"the prompt {text!r} is not in UTF-8; write it in UTF-8.") from None
    return list(texts)


def _backend(vocabulary):
    ids = vocabulary.ids
    try:
        model = models.BPE(
            vocab=ids,
            merges=vocabulary.merges,
            continuing_subword_prefix="",
            end_of_word_suffix=END_OF_WORD,
            unk_token=EOS,
        )
    except Exception as error:  # the library has no exception class of its own
        raise UserError(
            f"{vocabulary.source}: doesn't belong to its merges ({error}); take both from one model."
        ) from error
    backend = Backend(model)
    backend.normalizer = normaliser()
    backend.pre_tokenizer = word_splitter()
    backend.add_tokens([AddedToken(**asdict(token)) for token in vocabulary.added])
    backend.post_processor = processors.RobertaProcessing(
        (EOS, ids[EOS]), (BOS, ids[BOS]), trim_offsets=False, add_prefix_space=False
    )
    return backend
