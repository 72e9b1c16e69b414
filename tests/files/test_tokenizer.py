"""The tokenizer gives exactly the ids of transformers' CLIPTokenizer, and says what truncation cut."""

import gzip
import hashlib
import json
import random

import pytest
import torch

from fairref.emoji.bpe import train_bpe
from fairref.errors import UserError
from fairref.files.tokenizer import Tokenizer
from fairref.files.tokenizer_files import read_vocabulary
from fairref.files.vocabulary import BOS, CLIP_MERGES, EOS, byte_symbols, clip_vocabulary

PILOT = "\U0001f469\U0001f3fd\u200d\u2708\ufe0f"  # woman, medium skin tone, joiner, aeroplane
CORNERS = [
    "",
    " ",
    "\t\n\r\x0b\x0c",
    "a photo of the face of a pilot, a person",
    "A  PHOTO\nof\tThe  Face",
    "it's they'll I'M we've don't you'd 'S '",
    "'''s 's's",
    "1234567890 3.14 1,000 ½ ² Ⅷ ٣",
    "!!! ... ?!? <> #$%&*() _under_score_ -- — …",
    "cafe\u0301 café CAFÉ \u0041\u030a Å \u212b",
    "ﬁ ﬂ ß ẞ İ ı Σ ς ΟΔΟΣ Ǆ",
    "中文 日本語 한국어 العربية עברית हिन्दी ไทย",
    "👩🏽‍✈️ 👨‍👩‍👧‍👦 🇩🇪 🏳️‍🌈",
    PILOT * 30,
    "\x00\x01\x02\x07\x08\x1b[0m\x7f\x80\x9f",
    "\u200b\u200c\u200d\u2060\ufeff\u00ad",
    "\u00a0\u1680\u2003\u2028\u2029\u202f\u205f\u3000x",
    "\x1c\x1d\x1e\x1f\x85a",
    "<|startoftext|>",
    "<|endoftext|>",
    "a<|endoftext|>b <|startoftext|>c <|ENDOFTEXT|> < |endoftext| >",
    "</w> a</w> Ġ Ã ▁",
    "\ud7ff\ue000\uffff\U0010ffff\ufffd",
    "e" + "\u0301" * 100,
    "a" * 500,
    "word " * 75,
    "word " * 76,
    "word " * 400,
    "supercalifragilistic " * 40,
]
ROLES = [
    "pilot",
    "nurse",
    "doctor",
    "teacher",
    "farmer",
    "cook",
    "singer",
    "judge",
    "mechanic",
    "scientist",
    "firefighter",
    "astronaut",
]


def prompts() -> list[str]:
    """More than 500 texts: corners, sentences, and random characters of several ranges."""
    draw = random.Random(0)
    ranges = [
        (32, 127),
        (0, 0x250),
        (0x300, 0x370),
        (0x370, 0x800),
        (0x900, 0xE00),
        (0x2000, 0x2100),
        (0x3040, 0x30FF),
    ]
    ranges += [(0x4E00, 0x9FFF), (0xAC00, 0xD7A0), (0xFB00, 0xFB50), (0x1F300, 0x1FAFF), (0, 0xD800)]
    texts = list(CORNERS)
    for role in ROLES:
        texts += [
            f"a photo of the face of a {role}, a person",
            f"A {role.title()}'s portrait; 35mm, f/1.4, 4k!!",
        ]
    while len(texts) < 700:
        low, high = draw.choice(ranges)
        texts.append("".join(chr(draw.randrange(low, high)) for _ in range(draw.choice((1, 3, 10, 30, 120)))))
        mixed = [
            draw.choice([draw.choice(ROLES), draw.choice(CORNERS)[:9], " ", "\n", "'s"]) for _ in range(12)
        ]
        texts.append("".join(mixed))
    return texts


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    texts = [f"a photo of the face of a {role}, a person" for role in ROLES] + CORNERS
    train_bpe(texts, 700, folder)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """CLIP's own vocabulary, from the merges that the package ships, in the order of CLIP's code."""
    merges = gzip.decompress(CLIP_MERGES.read_bytes()).decode("utf-8").split("\n")[1:-1]
    alphabet = byte_symbols()
    tokens = (
        alphabet + [s + "</w>" for s in alphabet] + [merge.replace(" ", "") for merge in merges] + [BOS, EOS]
    )
    folder = tmp_path_factory.mktemp("own")
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


def load(folder, length=77):
    return Tokenizer(read_vocabulary(folder), length)


def peer_ids(folder, texts, length=77):
    transformers = pytest.importorskip("transformers")
    peer = transformers.CLIPTokenizer.from_pretrained(folder)
    return peer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids


@pytest.mark.parametrize("vocabulary", ["small", "own"])
@pytest.mark.parametrize("length", [77, 12])
def test_ids_are_those_of_transformers(vocabulary, length, request):
    folder, texts = request.getfixturevalue(vocabulary), prompts()
    assert len(texts) >= 500
    ids, expected = load(folder, length)(texts), peer_ids(folder, texts, length)
    different = [text for text, a, b in zip(texts, ids, expected, strict=True) if not torch.equal(a, b)]
    assert not different
    assert ids.dtype == torch.long and ids.shape == (len(texts), length)


def test_ids_of_clips_own_vocabulary_are_the_published_ones(own):
    tokenizer = load(own)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.vocab_size) == (49406, 49407, 49407, 49408)
    # "a photo of a cat" as every description of CLIP prints it
    assert tokenizer(["a photo of a cat"])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]


@pytest.mark.parametrize("vocabulary", ["small", "own"])
def test_every_row_begins_with_bos_and_ends_with_eos(vocabulary, request):
    tokenizer = load(request.getfixturevalue(vocabulary))
    ids = tokenizer(["", "word " * 400, "a pilot"])
    assert ids[:, 0].tolist() == [tokenizer.bos] * 3
    assert ids[:, -1].tolist() == [tokenizer.eos] * 3
    assert ids[0].tolist() == [tokenizer.bos] + [tokenizer.eos] * 76
    assert (ids[1] == tokenizer.eos).sum() == 1
    assert tokenizer([]).shape == (0, 77)


def test_cut_is_the_end_of_the_text_that_did_not_fit(own):
    tokenizer = load(own)
    words = ["Café" if i % 3 else "CAFE\u0301" for i in range(90)]
    text = "  ".join(words)
    assert tokenizer.cut(["word " * 75, text, "", "short"]) == ["", "  ".join(words[75:]), "", ""]
    assert tokenizer.cut(["word " * 76]) == ["word"]
    assert tokenizer.cut(["word " * 400]) == [" ".join(["word"] * 325)]


@pytest.mark.parametrize("vocabulary", ["small", "own"])
def test_what_is_kept_and_what_is_cut_are_the_whole_text(vocabulary, request):
    folder = request.getfixturevalue(vocabulary)
    tokenizer, endless = load(folder), load(folder, 10_000)
    for text in ("word " * 400, "it's 12 o'clock " * 20, "中文 " * 60, "a" * 500 + " b" * 80):
        (cut,) = tokenizer.cut([text])
        assert cut and text.rstrip().endswith(cut)
        whole = endless([text])[0]
        assert torch.equal(tokenizer([text])[0, :-1], whole[:76])


def test_one_text_instead_of_a_list_is_a_mistake(small):
    with pytest.raises(TypeError, match="list of texts"):
        load(small)("a pilot")


def test_a_text_that_is_not_unicode_is_refused(small):
    with pytest.raises(UserError, match=r"the prompt 'a \\udcff' is not in UTF-8"):
        load(small)(["a pilot", "a \udcff"])


def test_training_is_deterministic_and_in_clips_format(tmp_path, small):
    texts = [f"a photo of the face of a {role}, a person" for role in ROLES] + CORNERS
    assert train_bpe(texts, 700, tmp_path) == 700
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (small / name).read_bytes()
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    tokens = list(vocab)
    assert list(vocab.values()) == list(range(700))
    assert tokens[0] == "!" and tokens[255] == "Ń" and tokens[256] == "!</w>" and tokens[-2:] == [BOS, EOS]
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert list(dict.fromkeys(merge.replace(" ", "") for merge in merges)) == tokens[512:-2]


def test_training_merges_the_most_frequent_pair_first(tmp_path):
    assert train_bpe(["abc abc abd", "bc"], 516, tmp_path) == 516
    # b c</w> stands three times, a b three times: the one that sorts first, and then what is left of abc
    assert (tmp_path / "merges.txt").read_text().splitlines() == ["#version: 0.2", "a b", "ab c</w>"]
    train_bpe(["zy zy ab ab"], 515, tmp_path)
    assert (tmp_path / "merges.txt").read_text().splitlines() == ["#version: 0.2", "a b</w>"]
    assert train_bpe(["ab"], 600, tmp_path) == 515
    with pytest.raises(ValueError, match="514"):
        train_bpe(["ab"], 513, tmp_path)


def test_trained_words_become_one_token(small):
    tokenizer = load(small)
    ids = tokenizer(["a photo of the face of a person"])[0]
    assert (ids != tokenizer.eos).sum() == 1 + 8


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("vocab.json", None, "vocab.json: no such file"),
        ("merges.txt", None, "merges.txt: no such file"),
        ("vocab.json", b"{", "vocab.json: not JSON"),
        ("vocab.json", b"\xff\xfe", "vocab.json: is no UTF-8"),
        ("vocab.json", b"[]", "vocab.json: found a list, expected a JSON object"),
        ("vocab.json", b'{"a": "b"}', "vocab.json: expected one object"),
        ("vocab.json", b'{"a": 0, "<|startoftext|>": 1}', r"vocab.json: has no token <\|endoftext\|>"),
        ("merges.txt", b"#version: 0.2\na b c\n", "merges.txt: line 2 is 'a b c'"),
        (
            "merges.txt",
            b"#version: 0.2\nq\xc4\xa0 zzzz\n",
            "vocab.json, merges.txt: 700 tokens don't belong to 1 merges",
        ),
        ("merges.txt", b"\xff\xfe\n", "merges.txt: is no UTF-8"),
    ],
)
def test_a_wrong_file_gets_one_sentence(tmp_path, small, name, content, message):
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).write_bytes((small / file).read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


BASE = 700  # tokens of `small`
CAT = {
    "content": "<cat>",
    "lstrip": False,
    "rstrip": False,
    "single_word": False,
    "normalized": True,
    "special": False,
}


def config(**d):
    return {"tokenizer_config.json": d}


def decoder(**tokens):
    return config(added_tokens_decoder={i.removeprefix("_"): token for i, token in tokens.items()})


def special(content, normalized):
    flags = {"lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **flags}


SD15 = {  # as in stable-diffusion-v1-5's tokenizer/
    "tokenizer_config.json": {
        "add_prefix_space": False,
        "bos_token": special(BOS, True),
        "do_lower_case": True,
        "eos_token": special(EOS, True),
        "errors": "replace",
        "model_max_length": 77,
        "name_or_path": "openai/clip-vit-large-patch14",
        "pad_token": EOS,
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": special(EOS, True),
    },
    "special_tokens_map.json": {
        "bos_token": {k: v for k, v in special(BOS, True).items() if k != "__type"},
        "eos_token": {k: v for k, v in special(EOS, True).items() if k != "__type"},
        "pad_token": EOS,
        "unk_token": {k: v for k, v in special(EOS, True).items() if k != "__type"},
    },
}
LAYOUTS = {  # name -> what stands beside vocab.json and merges.txt
    "pad of the configuration": config(pad_token="!"),
    "pad of the special tokens": {"special_tokens_map.json": {"pad_token": "!"}},
    "the special tokens' pad wins": {**config(pad_token=EOS), "special_tokens_map.json": {"pad_token": "!"}},
    "unless tokens are added": {
        **config(pad_token=EOS, added_tokens_decoder={"700": CAT}),
        "special_tokens_map.json": {"pad_token": "!"},
    },
    "a new pad": config(pad_token="[PAD]"),
    "a pad with flags": config(pad_token={**CAT, "content": "!", "__type": "AddedToken"}),
    "added tokens": {"added_tokens.json": {"<cat>": 700, "<dog>": 701}},
    "added tokens and a pad among them": {"added_tokens.json": {"<cat>": 700}, **config(pad_token="<cat>")},
    "added tokens with flags": decoder(
        _700=CAT, _701={**CAT, "content": "<dog>", "special": True, "lstrip": True}
    ),
    "BOS and EOS with flags": decoder(
        _698={**CAT, "content": BOS, "special": True}, _699={**CAT, "content": EOS, "special": True}
    ),
    "SD-1.5's": SD15,
    "SD-1.5's configuration": {"tokenizer_config.json": SD15["tokenizer_config.json"]},
    "SD-2's": {**SD15, "special_tokens_map.json": {**SD15["special_tokens_map.json"], "pad_token": "!"}},
    "byte order marks": {"added_tokens.json": {"<cat>": 700}},
}
TRICKY = [
    "a <Cat> pilot <cat>s a<cat> <dog>  b",
    "hello! ! world!!",
    "a<|ENDOFTEXT|>b",
    "[PAD] [pad]",
    *CORNERS,
]


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_beside_the_vocabulary_count_as_in_transformers(tmp_path, small, name):
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).write_bytes((small / file).read_bytes())
    for file, content in LAYOUTS[name].items():
        (tmp_path / file).write_text(json.dumps(content))
    expected = peer_ids(tmp_path, TRICKY)
    if "marks" in name:
        for path in tmp_path.iterdir():
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    ids = load(tmp_path)(TRICKY)
    assert [text for text, a, b in zip(TRICKY, ids, expected, strict=True) if not torch.equal(a, b)] == []
    if "BOS" not in name and "SD-1.5" not in name:
        assert not torch.equal(ids, load(small)(TRICKY)), "the layout changes nothing"


@pytest.mark.parametrize("merges", ["pairs", "strings"])
@pytest.mark.parametrize("added", [(), ("<cat>", "<dog>")])
def test_tokenizer_json_alone_is_enough(tmp_path, small, merges, added):
    transformers = pytest.importorskip("transformers")
    peer = transformers.CLIPTokenizer.from_pretrained(small)
    peer.add_tokens(list(added))
    peer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    assert not (tmp_path / "vocab.json").exists()
    if merges == "strings":
        d = json.loads(path.read_text(encoding="utf-8"))
        d["model"]["merges"] = [" ".join(pair) for pair in d["model"]["merges"]]
        path.write_text(json.dumps(d), encoding="utf-8")
    tokenizer = load(tmp_path)
    assert torch.equal(tokenizer(TRICKY), peer_ids(tmp_path, TRICKY))
    assert tokenizer.vocab_size == BASE + len(added)


def test_one_tokenizer_has_one_fingerprint_in_every_layout(own, small, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.CLIPTokenizer.from_pretrained(own).save_pretrained(tmp_path)
    made = load(own).fingerprint
    assert made == load(tmp_path).fingerprint == Tokenizer(clip_vocabulary()).fingerprint
    assert len({made, load(small).fingerprint, load(own, 12).fingerprint}) == 3


def test_clips_vocabulary_comes_with_the_package(own):
    lines = gzip.decompress(CLIP_MERGES.read_bytes()).decode("utf-8").split("\n")[1:-1]
    # of lines 2 to 48,895 of bpe_simple_vocab_16e6.txt.gz in open_clip_torch 3.3.0
    golden = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == golden
    assert clip_vocabulary().ids == json.loads((own / "vocab.json").read_text(encoding="utf-8"))
    assert torch.equal(Tokenizer(clip_vocabulary())(TRICKY), load(own)(TRICKY))


def edit(path, change):
    d = json.loads(path.read_text(encoding="utf-8"))
    change(d)
    path.write_text(json.dumps(d), encoding="utf-8")


def halve(folder):
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    (folder / "merges.txt").write_text("\n".join(lines[: len(lines) // 2]), encoding="utf-8")


def repeat(folder):
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    (folder / "merges.txt").write_text("\n".join([*lines[:-1], lines[1], ""]), encoding="utf-8")


def swap(d):
    d["a"], d["b"] = d["b"], d["a"]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (halve, r"merges.txt: 700 tokens don't belong to 93 merges, which make 607: 512 of bytes, one for"),
        (repeat, "has the merge .* twice"),
        (lambda f: edit(f / "vocab.json", swap), r"with 'a' as 64, found 65"),
        (lambda f: edit(f / "vocab.json", lambda d: d.update(more=700)), "with 'more' as None, found 700"),
        (lambda f: edit(f / "vocab.json", lambda d: d.update(a=1e30)), "expected one object of token -> id"),
        (
            lambda f: (f / "added_tokens.json").write_text('{"<cat>": 703}'),
            "'<cat>' has the id 703; expected 700",
        ),
        (lambda f: (f / "added_tokens.json").write_text('{"a": 700}'), "'a' has the id 700; expected 64"),
        (lambda f: (f / "added_tokens.json").write_text('{"a": null}'), "has the added token"),
        (
            lambda f: (f / "tokenizer_config.json").write_text('{"bos_token": "x"}'),
            "bos_token is 'x'; expected",
        ),
        (
            lambda f: (f / "tokenizer_config.json").write_text('{"padding_side": "left"}'),
            "padding_side is 'left'",
        ),
        (
            lambda f: (f / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}'),
            "T5Tokenizer",
        ),
        (lambda f: (f / "tokenizer_config.json").write_text('{"pad_token": 3}'), "pad_token is 3"),
        (
            lambda f: (f / "tokenizer_config.json").write_text('{"model_max_length": 40}'),
            "is 40; expected 77",
        ),
        (
            lambda f: (f / "tokenizer_config.json").write_text('{"model_max_length": "abc"}'),
            "is 'abc'; expected 77",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, small, spoil, message):
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).write_bytes((small / file).read_bytes())
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["model"].update(end_of_word_suffix="@"), "end_of_word_suffix is '@'"),
        (lambda d: d["model"].update(dropout=0.1), "dropout is 0.1"),
        (lambda d: d["model"]["merges"].pop(3), "699|700 tokens don't belong to"),
        (lambda d: d["model"].update(merges=None), 'its "model" is no BPE'),
        (lambda d: d["model"].update(merges=["a b c"]), "merge 0 is 'a b c'"),
        (lambda d: d.update(normalizer=None), r"its normalizer is \[\]; expected \['NFC'"),
        (lambda d: d["normalizer"]["normalizers"].pop(), "its normalizer is"),
        (lambda d: d.update(added_tokens=[{"id": 1}]), "has the added token"),
    ],
)
def test_a_tokenizer_json_of_another_kind_is_refused(tmp_path, small, change, message):
    transformers = pytest.importorskip("transformers")
    transformers.CLIPTokenizer.from_pretrained(small).save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer.json", change)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_length_without_room_is_refused(small):
    with pytest.raises(UserError, match="token length is 1"):
        load(small, 1)
