"""CLIP's tokenizer: byte-level BPE, read from the two files `vocab.json` and `merges.txt`.

A text is put into Unicode form C, each run of white space becomes one blank, and all is lowercased. The pattern
below cuts it into words and drops the white space between them. Each UTF-8 byte of a word becomes one printable
symbol, and the last symbol of a word carries `</w>`. Merges join neighbours in the order of `merges.txt`.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from torch import LongTensor

from fairref.errors import UserError

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
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
    """Turns texts into ids (B, length): BOS, tokens, EOS, and EOS again as padding, as in SD-1.5.

    `bos`, `eos`, `pad` are ids, `vocab_size` is one more than the largest id. Raises UserError for files that
    are missing or aren't a CLIP vocabulary.
    """

    def __init__(self, vocab_path: str | Path, merges_path: str | Path, length: int = 77) -> None:
        if length < 2:
            raise UserError(f"token length is {length}, but BOS and EOS alone need 2: use 77")
        vocab, merges = _read_files(Path(vocab_path), Path(merges_path))
        self.length = length
        self.bos, self.eos, self.pad = vocab[BOS], vocab[EOS], vocab[EOS]
        self.vocab_size = max(vocab.values()) + 1
        self._backend = _backend(vocab, merges, vocab_path, merges_path)
        self._backend.enable_truncation(length)
        self._backend.enable_padding(length=length, pad_id=self.pad, pad_token=EOS)

    def __call__(self, texts: list[str]) -> LongTensor:
        """Return ids (B, length). The end of a text that is too long is dropped; `cut` returns it."""
        encodings = self._backend.encode_batch(_checked(texts))
        return torch.tensor([e.ids for e in encodings], dtype=torch.long).reshape(-1, self.length)

    def cut(self, texts: list[str], prefix: int = 0) -> list[str]:
        """Return the end of each text that does not fit behind `prefix` soft tokens; '' if all fits."""
        lost = []
        for text, encoding in zip(texts, self._backend.encode_batch(_checked(texts)), strict=True):
            # the overflow is BOS, what didn't fit, EOS; offsets are characters of the text as given
            place = self.length - 1 - prefix  # the first that is dropped, EOS where there is no prefix
            start = [encoding.offsets[place][0]] if not encoding.special_tokens_mask[place] else []
            start += [rest.offsets[1][0] for rest in encoding.overflowing[:1]]
            lost.append(text[start[0] :].strip() if start else "")
        return lost

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of all that makes a text's ids: vocabulary, merges, special tokens, length."""
        merges = json.loads(self._backend.to_str())["model"]["merges"]  # pairs, in older libraries texts
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
        ids = sorted(self._backend.get_vocab().items())
        content = [ids, merges, self.bos, self.eos, self.pad, self.length]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _checked(texts):
    if isinstance(texts, str):
        raise TypeError("a list of texts is expected, not one text")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"the prompt {text!r} is not in UTF-8; write it in UTF-8.") from None
    return list(texts)


def _read_files(vocab_path, merges_path):
    for path in (vocab_path, merges_path):
        if not path.is_file():
            raise UserError(f"{path}: no such file; a tokenizer needs CLIP's vocab.json and merges.txt")
    try:
        vocab = json.loads(vocab_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{vocab_path}: not JSON ({error}); CLIP's vocab.json is expected") from error
    if not isinstance(vocab, dict) or not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise UserError(f"{vocab_path}: expected one object of token -> id, as in CLIP's vocab.json")
    missing = [token for token in (BOS, EOS) if token not in vocab]
    if missing:
        raise UserError(f"{vocab_path}: has no token {missing[0]}; CLIP's vocab.json is expected")
    return vocab, _read_merges(merges_path)


def _read_merges(path):
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # symbols may hold other line breaks
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; CLIP's merges.txt is expected") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2:
            raise UserError(f"{path}: line {number} is {line!r}; two symbols with one blank are expected")
        merges.append(pair)
    return merges


def _backend(vocab, merges, vocab_path, merges_path):
    try:
        model = models.BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix=END_OF_WORD,
            unk_token=EOS,
        )
    except Exception as error:  # the library has no exception class of its own
        raise UserError(f"{merges_path}: doesn't belong to {vocab_path} ({error})") from error
    backend = Backend(model)
    backend.normalizer = normaliser()
    backend.pre_tokenizer = word_splitter()
    backend.add_special_tokens([BOS, EOS])
    backend.post_processor = processors.RobertaProcessing(
        (EOS, vocab[EOS]), (BOS, vocab[BOS]), trim_offsets=False, add_prefix_space=False
    )
    return backend
