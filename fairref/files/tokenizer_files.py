"""A tokenizer's files -> its vocabulary.

They are `vocab.json` and `merges.txt`, or `tokenizer.json` alone; `tokenizer_config.json`, `special_tokens_map.json`
and `added_tokens.json` beside them change what they mean, and are read as transformers reads them.
"""

from dataclasses import replace
from pathlib import Path

from fairref.errors import UserError
from fairref.files.paths import read_json, read_text, refuse_mistyped
from fairref.files.vocabulary import BOS, END_OF_WORD, EOS, Added, Vocabulary, tokens_of

PAIR, ALONE, ADDED = ("vocab.json", "merges.txt"), "tokenizer.json", "added_tokens.json"
CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
MAX_TOKENS = 2**20

PLAIN = {  # key of tokenizer_config.json -> the values that are implemented, None where it is absent
    "tokenizer_class": (
        None,
        "CLIPTokenizer",
        "CLIPTokenizerFast",
        "PreTrainedTokenizerFast",
        "TokenizersBackend",
    ),
    "bos_token": (None, BOS),
    "eos_token": (None, EOS),
    "unk_token": (None, EOS),
    "add_prefix_space": (None, False),
    "do_lower_case": (None, True),
    "padding_side": (None, "right"),
    "truncation_side": (None, "right"),
    "additional_special_tokens": (None, []),
    "extra_special_tokens": (None, [], {}),
}
KEYS = (*PLAIN, "pad_token", "model_max_length", "added_tokens_decoder")
MODEL = {  # key of tokenizer.json's "model" -> the same
    "type": (None, "BPE"),
    "end_of_word_suffix": (END_OF_WORD,),
    "continuing_subword_prefix": (None, ""),
    "dropout": (None, 0.0),
    "fuse_unk": (None, False),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}
STEPS = {  # key of tokenizer.json -> the types of its steps, in CLIP's kind
    "normalizer": ["NFC", "Replace", "Lowercase"],
    "pre_tokenizer": ["Split", "ByteLevel"],
    "post_processor": ["RobertaProcessing"],
}


def has_tokenizer(folder: Path) -> bool:
    """Return whether a file of a tokenizer stands in the folder."""
    return any((folder / name).is_file() for name in (*PAIR, ALONE))


def read_vocabulary(folder: str | Path) -> Vocabulary:
    """Return the vocabulary of a folder. Raises UserError for files that are missing, damaged, or do not fit."""
    folder = Path(folder)
    alone = read_json(folder / ALONE) if (folder / ALONE).is_file() else {}
    config = _config(folder)
    added = _all_added(folder, config, alone)
    layouts = {str(folder / ALONE): _model(alone, folder / ALONE)} if alone else {}
    if not alone or any((folder / name).is_file() for name in PAIR):
        layouts[f"{folder / PAIR[0]}, {PAIR[1]}"] = _pair(folder)
    for source, (ids, merges) in layouts.items():
        made = tokens_of(merges)
        names = {token.content for token in added.values()} - set(made)
        _check({token: i for token, i in ids.items() if token not in names}, made, merges, source)
    if len({tuple(merges) for _, merges in layouts.values()}) > 1:
        raise UserError(
            f"{folder}: {ALONE} has other merges than {PAIR[1]}; take the files of one model, or one of the two."
        )
    pad = _pad(folder, config, alone)
    ids = _joined(made, added, pad, folder)
    known = {token.content for token in added.values()}
    named = (("bos_token", BOS), ("eos_token", EOS), ("unk_token", EOS), ("pad_token", pad))
    special = [
        _special(config.get(key) or default, folder / CONFIG) for key, default in named
    ]  # of one content the last counts
    last = {token.content: token for token in special if token.content not in known}
    tokens = [*added.values(), *last.values()]
    tokens.sort(key=lambda token: ids[token.content])
    return Vocabulary(ids, merges, tuple(tokens), pad, source, _max_length(folder, config))


def _pair(folder):
    """The ids and merges of vocab.json and merges.txt."""
    vocab_path, merges_path = (folder / name for name in PAIR)
    for path in (vocab_path, merges_path):
        if not path.is_file():
            raise UserError(f"{path}: no such file; a tokenizer needs CLIP's vocab.json and merges.txt.")
    ids = _ids(read_json(vocab_path), vocab_path)
    merges = []
    for number, line in enumerate(
        read_text(merges_path).split("\n"), 1
    ):  # symbols may hold other line breaks
        line = line.rstrip("\r")
        if line and not (number == 1 and line.startswith("#version")):
            merges.append(_merge(line.split(" "), f"{merges_path}: line {number}"))
    return ids, merges


def _ids(ids, path):
    if not isinstance(ids, dict) or not all(type(i) is int and 0 <= i < MAX_TOKENS for i in ids.values()):
        raise UserError(f"{path}: expected one object of token -> id, as in CLIP's vocab.json; get it again.")
    if missing := [token for token in (BOS, EOS) if token not in ids]:
        raise UserError(f"{path}: has no token {missing[0]}; CLIP's vocab.json is expected.")
    return ids


def _merge(symbols, where):
    """A merge of tokenizer.json, a pair or a string, or the parts of a line."""
    symbols = symbols.split(" ") if isinstance(symbols, str) else symbols
    if (
        not isinstance(symbols, list)
        or len(symbols) != 2
        or not all(isinstance(s, str) and s for s in symbols)
    ):
        found = " ".join(map(str, symbols)) if isinstance(symbols, list) else symbols
        raise UserError(f"{where} is {found!r}; two symbols with one blank are expected: get the file again.")
    return tuple(symbols)


def _model(d, path):
    """The ids and merges of tokenizer.json."""
    model = d.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
        raise UserError(f'{path}: its "model" is no BPE with "vocab" and "merges"; get the file again.')
    _refuse_others(model, MODEL, path)
    for key, kinds in STEPS.items():
        step = d.get(key)
        steps = step.get("normalizers", step.get("pretokenizers", [step])) if isinstance(step, dict) else []
        found = (
            [s.get("type") if isinstance(s, dict) else s for s in steps] if isinstance(steps, list) else steps
        )
        if found != kinds:
            raise UserError(f"{path}: its {key} is {found!r}; expected {kinds!r}, as CLIP's tokenizer has.")
    merges = [_merge(pair, f"{path}: merge {i}") for i, pair in enumerate(model["merges"])]
    return _ids(model.get("vocab"), path), merges


def _refuse_others(d, known, path):
    for key, allowed in known.items():
        value = d.get(key)
        value = value.get("content") if isinstance(value, dict) and "content" in value else value
        if not any(type(value) is type(a) and value == a for a in allowed):
            raise UserError(
                f"{path}: {key} is {value!r}; expected {allowed[-1]!r}, nothing else is implemented."
            )


def _config(folder):
    """tokenizer_config.json, with special_tokens_map.json over it as transformers has it."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    special = read_json(folder / SPECIAL) if (folder / SPECIAL).is_file() else {}
    merged = config if "added_tokens_decoder" in config else {**config, **special}
    for d, name in ((config, CONFIG), (special, SPECIAL)):
        if d and not set(d) & set(KEYS):
            raise UserError(
                f"{folder / name}: is no tokenizer's file, it has {next(iter(d))!r}; get it again."
            )
        refuse_mistyped(KEYS, d, str(folder / name))
        _refuse_others(d, PLAIN, folder / name)
    return merged


def _all_added(folder, config, alone):
    """id -> Added, of all files."""
    own = _added(alone.get("added_tokens", []), folder / ALONE)
    if "added_tokens_decoder" in config:
        table, path = config["added_tokens_decoder"], folder / CONFIG
        if not isinstance(table, dict) or not all(isinstance(token, dict) for token in table.values()):
            raise UserError(f"{path}: added_tokens_decoder is {table!r}; expected id -> token: get it again.")
        return {**own, **_added([{**token, "id": i} for i, token in table.items()], path)}
    path = folder / ADDED
    table = read_json(path) if path.is_file() else {}
    pad = _content(config.get("pad_token"))
    listed = [
        {
            "id": i,
            "content": token,
            "normalized": token not in (pad, BOS, EOS),
            "special": token in (pad, BOS, EOS),
        }
        for token, i in table.items()
    ]
    return {**_added(listed, path), **own}


def _added(tokens, path):
    """A list of {"id", "content", flags} -> id -> Added."""
    added = {}
    for token in tokens if isinstance(tokens, list) else [tokens]:
        try:
            i, content = int(token["id"]), token["content"]
            flags = {flag: token.get(flag, False) for flag in FLAGS}
            right = isinstance(content, str) and content and all(type(v) is bool for v in flags.values())
            if not right or type(token["id"]) not in (int, str) or i in added:
                raise ValueError(token)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"{path}: has the added token {token!r}; expected an id, a content and flags: get it again."
            ) from None
        added[i] = Added(content, **flags)
    return added


def _check(ids, made, merges, source):
    """The vocabulary must be what the merges make, each of which stands there once."""
    if len(set(merges)) < len(merges):
        twice = next(pair for pair in merges if merges.count(pair) > 1)
        raise UserError(f"{source}: has the merge {' '.join(twice)!r} twice; get the file again.")
    if ids == made:
        return
    token = next((t for t in made if ids.get(t) != made[t]), next((t for t in ids if t not in made), ""))
    raise UserError(
        f"{source}: {len(ids)} tokens don't belong to {len(merges)} merges, which make {len(made)}: 512 of bytes, one"
        f" for each merge and two more, with {token!r} as {made.get(token)}, found {ids.get(token)}; take both from one"
        " model."
    )


def _pad(folder, config, alone):
    """What fills up a text: the configuration's, else that of tokenizer.json, else EOS."""
    padding = alone.get("padding") or {"pad_token": EOS}
    pad = _content(config["pad_token"]) if "pad_token" in config else padding
    pad = pad.get("pad_token") if isinstance(pad, dict) else pad
    if not isinstance(pad, str) or not pad:
        raise UserError(f"{folder}: its pad_token is {pad!r}; expected a token: correct {CONFIG}.")
    return pad


def _special(token, path):
    """A special token of the configuration, a text or an object with flags."""
    if isinstance(token, dict):
        return replace(_added([{**token, "id": 0}], path)[0], special=True)
    return Added(token)


def _max_length(folder, config):
    length = config.get("model_max_length")
    if type(length) not in (int, type(None)) or (length is not None and length < 2):
        raise UserError(f"{folder / CONFIG}: model_max_length is {length!r}; expected 77, as in CLIP's.")
    return length


def _content(token):
    return token.get("content") if isinstance(token, dict) else token


def _joined(ids, added, pad, folder):
    """All ids: those of the merges, then the added ones without a hole."""
    new = {token.content: i for i, token in sorted(added.items()) if ids.get(token.content) != i}
    if pad not in ids and pad not in new:
        new[pad] = len(ids) + len(new)
    for expected, (token, i) in enumerate(new.items(), len(ids)):
        if i != expected or token in ids:
            raise UserError(
                f"{folder}: the added token {token!r} has the id {i}; expected {ids.get(token, expected)}: take all"
                " files of the tokenizer from one model."
            )
    return {**ids, **new}
