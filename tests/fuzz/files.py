"""Files that people load, damaged at random: `python -m tests.fuzz.files --cases 1000 --seed 0`.

Each case takes one kind of file (KINDS), damages it in one way (MUTATORS) and loads what it belongs to, in this
process, with a timer. What comes out of loading is its outcome: names, shapes and values of all tensors, ids of some
texts, an image, numbers. The verdicts:

    refused     a UserError of one line that names the file
    equal       it loads, and the outcome is that of the whole file
    said        it loads with a note that the whole file does not make
    other       it loads, and the outcome differs because the file now says something else that is as valid
    fault       any other exception, more than SECONDS, a message of another form, or a silent difference

When does a damaged file say something else that is as valid? Only when nothing in it, beside it or in its format tells:
- numbers in a safetensors file whose header has the same names, dtypes and shapes (the format has no checksum, and says
  once which number belongs to which tensor). A .pth file has checksums, so there a difference is a fault;
- values of a file of settings (`settings`), if the file still has the same structure: each value has the type that it
  had (RANGES have several; a run says how many steps its schedule allows), and no key is new. A key that is absent
  means its default there, as it does in diffusers and transformers. A run whose settings ask for more iterations may
  take longer, too;
- texts and rows of data (`data`): prompts, labels, added tokens, lines of metrics.
A vocabulary, its merges, an index, the shapes in a config.json and the names in a header are said twice. There, each
difference is a fault.
"""

import argparse
import hashlib
import json
import logging
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import wraps
from io import StringIO
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fairref.bundle.judges import (
    load_classifier,
    load_clip,
    load_dino,
    load_embedder,
    load_face_features,
    read_template_settings,
)
from fairref.bundle.loading import load_bundle
from fairref.bundle.recipe import resolve
from fairref.commands.train import main as train
from fairref.diffusion.sampler import noise
from fairref.errors import UserError
from fairref.evaluation.labels import read_labels
from fairref.files.datasets import read_labelled, read_photographs
from fairref.files.tokenizer_files import PAIR
from fairref.generation.adapters import load_adapter
from fairref.generation.drawing import Drawing, draw
from fairref.judges.sprites import LOOKS
from fairref.progress import note
from fairref.prompts import read_occupations
from fairref.training.checkpoints import read_settings
from fairref.training.stored import of_settings
from tests.ldm_layout import FILES, to_ldm
from tests.tiny_bundle import write_tiny_bundle

SECONDS = 20  # of a case
RANGES = ("steps", "guidance")  # of a recipe: 20, "19:23"
NAMES = ("attributes", "classes", "logits")  # keys of objects whose own keys are a user's names
TEXTS = ["a photo of the face of a pilot, a person", "two nurses <cat>!"]
DEEP = "[" * 100_000 + "]" * 100_000
VALUES = (
    "null",
    "Infinity",
    "NaN",
    "1e30",
    str(10**30),
    "-1",
    "0",
    "2.5",
    "true",
    '"abc"',
    "[]",
    "[1, 2]",
    "{}",
    DEEP,
)

Outcome = dict[str, object]
WORLD: dict[str, object] = {}  # what is made once for all cases


@dataclass(frozen=True)
class Kind:
    """A kind of file: where it stands, and what loading gives."""

    file: str  # inside the world's folder
    load: Callable[[Path], Outcome]  # of the world's folder
    other: str  # a whole file of another role, for a swap
    settings: bool = False  # whether its values are a user's choice
    data: bool = False  # whether its texts and rows are


class Hang(BaseException):
    """A case took too long."""


def digest(tensors):
    """A hash of each tensor, by name."""
    return {
        name: (tuple(t.shape), hashlib.sha256(t.detach().float().contiguous().numpy().tobytes()).hexdigest())
        for name, t in tensors.items()
    }


def of_bundle(path, image=True):
    """The outcome of a bundle: all tensors, ids of texts, the schedule, an image."""
    bundle = load_bundle(path)
    outcome = {name: digest(getattr(bundle, name).state_dict()) for name in FILES}
    outcome["ids"] = bundle.tokenizer(TEXTS).tolist()
    outcome["beta"] = bundle.schedule.beta.tolist()
    recipe = resolve((), bundle.recipe, {}, bundle.path, bundle.attributes)
    outcome["said"] = [bundle.resolution, bundle.attributes, bundle.recipe, repr(recipe)]
    if image:
        drawn = draw(bundle, (TEXTS[0], ""), noise(7, 0, range(1), (4, 8, 8)), Drawing(2, 3.0))
        outcome["image"] = digest({"image": drawn})
    return outcome


def of_clip(folder):
    clip, tokenizer = load_clip(folder)
    return {
        "ids": tokenizer(TEXTS).tolist(),
        "tensors": digest(clip.state_dict()),
        "config": repr(clip.config),
    }


def of_classifier(folder):
    classifier = load_classifier(folder)
    said = [classifier.classes, classifier.logits, repr(classifier.network.config)]
    return {"tensors": digest(classifier.network.state_dict()), "said": said}


def of_resumed(folder):
    """A copy of a finished run goes on: nothing is left to do, but all of its files are read."""
    again = folder.with_name("again")
    shutil.rmtree(again, ignore_errors=True)
    shutil.copytree(folder, again, ignore=shutil.ignore_patterns("adapter*"))
    train(["--resume", str(again)])
    target, recipe = of_settings(read_settings(again))
    tensors = digest(load_file(again / "adapter.safetensors"))
    return {"tensors": tensors, "recipe": repr(recipe), "target": repr(target)}


def of_features(path):
    return {"D_F": digest({"D_F": load_face_features(path)})}


def of_templates(path):
    return {"said": read_template_settings(path)}


def of_labels(folder, data):
    found = read_photographs(data, folder, ["gender"])
    for reason in found.bad:
        note(reason)
    return {part: [(row.file.name, row.labels) for row in rows] for part, rows in found.parts.items()}


def of_own_pictures(folder):
    found = read_labelled(folder, {"gender": ("woman", "man")})
    return {"rows": [(row.file.name, row.labels) for row in found.parts["test"]]}


def of_label_table(path):
    names = [str(i) for i in range(6)]
    of_model = read_labels(path, {"gender": ("woman", "man")}, [("pilot",), ("nurse",)], [names, names])
    (found,) = of_model.values()
    return {name: [rows.tolist() for rows in of_prompts] for name, of_prompts in found.items()}


def of_prompts(folder):
    found = read_occupations(folder)
    return {"prompts": repr(found), "explicit": found.explicit_prompt("gender", "woman", "pilot")}


def at(load: Callable[[Path], Outcome], place: str, **options: object) -> Callable[[Path], Outcome]:
    """What loads a place inside the world's folder."""
    return lambda root: load(root / place, **options)


def network(load: Callable[[Path], torch.nn.Module]) -> Callable[[Path], Outcome]:
    """The outcome of what loads one network."""

    def outcome(path):
        loaded = load(path)
        return {"tensors": digest(loaded.state_dict()), "config": repr(getattr(loaded, "config", ""))}

    return outcome


def adapted(path):
    return load_adapter(WORLD["bundle"], path).text_encoder


SD, ALONE, SINGLE = at(of_bundle, "sd"), at(of_bundle, "alone"), at(of_bundle, "single/model.safetensors")
RUN = at(of_resumed, "resumed")
UNET, VAE, TEXT = (f"sd/{name}/config.json" for name in FILES)
INDEX, JUDGE, MERGES = "sd/model_index.json", "bundle/dino/model.safetensors", "sd/tokenizer/merges.txt"
KINDS = {
    "unet/config.json": Kind(UNET, SD, VAE, settings=True),
    "vae/config.json": Kind(VAE, SD, UNET, settings=True),
    "text_encoder/config.json": Kind(TEXT, SD, VAE, settings=True),
    "model_index.json": Kind(INDEX, SD, UNET),
    "scheduler_config.json": Kind("sd/scheduler/scheduler_config.json", SD, UNET, settings=True),
    "vocab.json": Kind("sd/tokenizer/vocab.json", SD, "bundle/clip/vocab.json"),
    "merges.txt": Kind(MERGES, SD, "bundle/clip/merges.txt"),
    "tokenizer_config.json": Kind("sd/tokenizer/tokenizer_config.json", SD, INDEX, settings=True),
    "added_tokens.json": Kind("sd/tokenizer/added_tokens.json", SD, INDEX, data=True),
    "tokenizer.json": Kind("alone/tokenizer/tokenizer.json", ALONE, INDEX),
    "index.json": Kind(f"alone/{FILES['vae']}.index.json", ALONE, INDEX),
    "safetensors": Kind(f"sd/{FILES['vae']}", SD, f"sd/{FILES['text_encoder']}"),
    "single file": Kind("single/model.safetensors", SINGLE, f"sd/{FILES['unet']}"),
    "NAME.yaml": Kind("single/model.yaml", SINGLE, MERGES),
    "clip/config.json": Kind("bundle/clip/config.json", at(of_clip, "bundle/clip"), TEXT, settings=True),
    "open_clip_config.json": Kind(
        "open_clip/open_clip_config.json", at(of_clip, "open_clip"), UNET, settings=True
    ),
    "dino/config.json": Kind(
        "bundle/dino/config.json", at(network(load_dino), "bundle/dino"), VAE, settings=True
    ),
    ".pth": Kind("pth/backbone.pth", at(network(load_embedder), "pth"), JUDGE),
    "classifier/config.json": Kind(
        "bundle/finetune/config.json", at(of_classifier, "bundle/finetune"), VAE, settings=True
    ),
    "face features": Kind("bundle/D_F.safetensors", at(of_features, "bundle/D_F.safetensors"), JUDGE),
    "templates.json": Kind("templates.json", at(of_templates, "templates.json"), INDEX, settings=True),
    "bundle.json": Kind("bundle/bundle.json", at(of_bundle, "bundle", image=False), INDEX, settings=True),
    "prompts.json": Kind("bundle/prompts.json", at(of_prompts, "bundle"), INDEX, data=True),
    "FairFace's csv": Kind(
        "fairface/fairface_label_train.csv", at(of_labels, "fairface", data="fairface"), MERGES, data=True
    ),
    "CelebA's list": Kind(
        "celeba/list_attr_celeba.txt", at(of_labels, "celeba", data="celeba"), MERGES, data=True
    ),
    "labels.csv": Kind("own/labels.csv", at(of_own_pictures, "own"), MERGES, data=True),
    "labels of images": Kind("own/table.csv", at(of_label_table, "own/table.csv"), MERGES, data=True),
    "adapter": Kind("run/adapter.safetensors", at(network(adapted), "run/adapter.safetensors"), JUDGE),
    "settings.json": Kind("resumed/settings.json", RUN, "bundle/bundle.json", settings=True),
    "metrics.jsonl": Kind("resumed/metrics.jsonl", RUN, MERGES, data=True),
    "checkpoint": Kind("resumed/checkpoint-000002.safetensors", RUN, "run/adapter.safetensors"),
}


def make_world(root: Path) -> None:
    """Write all whole files below `root`."""
    bundle = write_tiny_bundle(root / "bundle", faces=True)
    WORLD["bundle"] = load_bundle(bundle)
    sd = root / "sd"
    for part in (*FILES, "tokenizer", "scheduler"):
        shutil.copytree(bundle / part, sd / part)
    tensors = load_file(sd / FILES["text_encoder"])
    key = next(key for key in tensors if key.endswith("token_embedding.weight"))
    tokens = len(tensors[key])
    save_file({**tensors, key: torch.cat([tensors[key], tensors[key][:2] + 1])}, sd / FILES["text_encoder"])
    edit(sd / "text_encoder/config.json", vocab_size=tokens + 2)
    edit(sd / "tokenizer/added_tokens.json", **{"<cat>": tokens})
    edit(
        sd / "tokenizer/tokenizer_config.json",
        pad_token="!",
        model_max_length=77,
        bos_token="<|startoftext|>",
    )
    peers = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "scheduler": "DPMSolverMultistepScheduler",
    }
    entries = {name: ["diffusers", peer] for name, peer in peers.items()}
    entries["text_encoder"] = ["transformers", "CLIPTextModel"]
    edit(sd / "model_index.json", _class_name="StableDiffusionPipeline", **entries)
    _make_alone(shutil.copytree(sd, root / "alone"))
    _make_single(shutil.copytree(sd, root / "single"))
    (root / "pth").mkdir()
    torch.save(load_file(bundle / "embedder/model.safetensors"), root / "pth/backbone.pth")
    edit(root / "pth/config.json", **json.loads((bundle / "embedder/config.json").read_text()))
    edit(root / "templates.json", threshold=0.5, shares=dict.fromkeys(LOOKS, 1.0))
    _make_open_clip(bundle / "clip", root / "open_clip")
    _make_labels(root)
    run = [*("--attr", "gender", "--weights", str(bundle), "--iterations", "2", "--evaluate", "none")]
    train([*run, "--out", str(root / "run"), "--validate-every", "0", "--grid-every", "0"])
    shutil.copytree(root / "run", root / "resumed")


def edit(path, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    d = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**d, **values}, indent=1, ensure_ascii=False), encoding="utf-8")


def _make_alone(folder):
    """tokenizer.json takes the place of the other files of the tokenizer; the VAE is split."""
    vocab = json.loads((folder / "tokenizer" / PAIR[0]).read_text(encoding="utf-8"))
    merges = [
        line.split(" ")
        for line in (folder / "tokenizer" / PAIR[1]).read_text(encoding="utf-8").split("\n")[1:-1]
    ]
    shutil.rmtree(folder / "tokenizer")
    splits = [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
        {"type": "Lowercase"},
    ]
    edit(
        folder / "tokenizer/tokenizer.json",
        added_tokens=[{"id": len(vocab), "content": "<cat>", "normalized": True, "special": False}],
        normalizer={"type": "Sequence", "normalizers": splits},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]},
        post_processor={"type": "RobertaProcessing"},
        model={"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocab, "merges": merges},
    )
    tensors, place = load_file(folder / FILES["vae"]), {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        save_file({name: tensors[name] for name in names}, folder / f"vae/part-{i}.safetensors")
        place |= dict.fromkeys(names, f"part-{i}.safetensors")
    (folder / FILES["vae"]).unlink()
    edit(folder / f"{FILES['vae']}.index.json", metadata={}, weight_map=place)


def _make_single(folder):
    tensors = {key: value.contiguous() for key, value in to_ldm(folder).items()}
    for file in FILES.values():
        (folder / file).unlink()
    save_file(tensors, folder / "model.safetensors")
    text = "model:\n  params:\n    linear_start: 0.00085\n    linear_end: 0.0120\n    timesteps: 1000\n"
    (folder / "model.yaml").write_text(f'{text}    parameterization: "eps"\n    scale_factor: 0.18215\n')


def _make_open_clip(clip, folder):
    """CLIP's towers under open_clip's names."""
    from fairref.files.names import open_clip_table

    folder.mkdir()
    for name in PAIR:
        shutil.copy(clip / name, folder / name)
    d = json.loads((clip / "config.json").read_text())
    text, vision = d["text_config"], d["vision_config"]
    tower = {"layers": 1, "width": 16, "mlp_ratio": 2.0}
    shape = {"image_size": vision["image_size"], "patch_size": vision["patch_size"], "head_width": 8}
    rows = {"context_length": 77, "vocab_size": text["vocab_size"], "heads": 2}
    edit(
        folder / "open_clip_config.json",
        model_cfg={
            "embed_dim": 16,
            "quick_gelu": True,
            "vision_cfg": {**tower, **shape},
            "text_cfg": {**tower, **rows},
        },
    )
    table = {here: there for there, here in open_clip_table(1, 1)}
    renamed = {}
    for key, value in load_file(clip / "model.safetensors").items():
        here = max((h for h in table if key.startswith(h)), key=len, default="")
        name = table.get(here, "") + key.removeprefix(here)
        renamed[name] = value.T.contiguous() if name in ("text_projection", "visual.proj") else value
    for start in {name.split("q_proj.")[0] for name in renamed if ".q_proj." in name}:
        for end in ("weight", "bias"):
            parts = [renamed.pop(f"{start}{x}_proj.{end}") for x in "qkv"]
            renamed[f"{start}in_proj_{end}"] = torch.cat(parts)
    save_file(renamed, folder / "open_clip_model.safetensors")


def _make_labels(root):
    (root / "fairface/train").mkdir(parents=True)
    (root / "fairface/val").mkdir()
    (root / "celeba/img_align_celeba").mkdir(parents=True)
    image = Image.new("RGB", (8, 8))
    header, rows = "file,age,gender,race,service_test", []
    for part in ("train", "val"):
        rows = [f"{part}/{i}.jpg,20-29,{('Female', 'Male')[i % 2]},White,True" for i in range(6)]
        (root / f"fairface/fairface_label_{part}.csv").write_text("\n".join([header, *rows, ""]))
        for i in range(6):
            image.save(root / f"fairface/{part}/{i}.jpg")
    (root / "own").mkdir()
    for i in range(6):
        image.save(root / f"own/{i}.png")
    own = [f"{i}.png,{('woman', 'man')[i % 2]}" for i in range(6)]
    (root / "own/labels.csv").write_text("\n".join(["file,gender", *own, ""]))
    own = [f"{('pilot', 'nurse')[i % 2]},{i},{('woman', 'man')[i % 3 % 2]}" for i in range(6)]
    (root / "own/table.csv").write_text("\n".join(["prompt,image,gender", *own, ""]))
    names = [f"{i:06d}.jpg" for i in range(1, 10)]
    for name in names:
        image.save(root / "celeba/img_align_celeba" / name)
    lines = [f"{name} {(-1, 1)[i % 2]:2d} {(1, -1)[i % 2]:2d}" for i, name in enumerate(names)]
    (root / "celeba/list_attr_celeba.txt").write_text("\n".join([str(len(names)), "Male Young ", *lines, ""]))
    parts = [f"{name} {i % 3}" for i, name in enumerate(names)]
    (root / "celeba/list_eval_partition.txt").write_text("\n".join([*parts, ""]))


def flip_bit(content, draw, other):
    at = draw.randrange(min(len(content), draw.choice((256, 4096, 10**9))))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def truncate(content, draw, other):
    return content[: draw.randrange(len(content))]


def empty(content, draw, other):
    return b""


def insert_bytes(content, draw, other):
    at = draw.randrange(len(content))
    return (
        content[:at]
        + draw.choice((b"\0", b"\xff\xfe", b"\n", b"{", b",", b"12", draw.randbytes(9)))
        + content[at:]
    )


def remove_bytes(content, draw, other):
    at = draw.randrange(len(content))
    return content[:at] + content[at + draw.choice((1, 8, 100)) :]


def repeat_bytes(content, draw, other):
    at, length = draw.randrange(len(content)), draw.choice((1, 8, 100))
    return content[: at + length] + content[at:]


def add_mark(content, draw, other):
    return b"\xef\xbb\xbf" + content


def swap_file(content, draw, other):
    return other


def lines_mixed(content, draw, other):
    """Two lines change places, or one is gone, or stands there twice."""
    lines = content.split(b"\n")
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    how = draw.randrange(3)
    if how == 0:
        lines[i], lines[j] = lines[j], lines[i]
    else:
        lines[i : i + 1] = [] if how == 1 else [lines[i], lines[i]]
    return b"\n".join(lines)


def _in_json(change):
    """A mutator of the JSON in a file: all of it, or the header of a safetensors file."""

    @wraps(change)
    def mutate(content, draw, other):
        start = 8 if content[8:9] == b"{" and not content.lstrip().startswith(b"{") else 0
        end = start + int.from_bytes(content[:8], "little") if start else len(content)
        try:
            d = json.loads(content[start:end])
        except ValueError:
            return lines_mixed(content, draw, other)  # no JSON
        text = change(d, draw).encode()
        text += b" " * (-len(text) % 8) if start else b""
        return (len(text).to_bytes(8, "little") if start else b"") + text + content[end:]

    return mutate


def places(d, path=()):
    """Paths of all values in a JSON content; of long objects and lists only some."""
    items = list(d.items() if isinstance(d, dict) else enumerate(d) if isinstance(d, list) else ())
    for key, value in items[:40] + items[-40:] if len(items) > 80 else items:
        yield (*path, key)
        yield from places(value, (*path, key))


def _holder(d, path):
    for key in path[:-1]:
        d = d[key]
    return d


MARK = "\N{SNOWMAN}"


@_in_json
def replace_value(d, draw):
    path = draw.choice([*places(d)] or [None])
    if path is None:
        return draw.choice(VALUES)
    _holder(d, path)[path[-1]] = MARK
    return json.dumps(d, ensure_ascii=False).replace(f'"{MARK}"', draw.choice(VALUES))


def _keys(d):
    return [path for path in places(d) if isinstance(path[-1], str)]


@_in_json
def remove_key(d, draw):
    if paths := _keys(d):
        path = draw.choice(paths)
        del _holder(d, path)[path[-1]]
    return json.dumps(d, ensure_ascii=False)


@_in_json
def rename_key(d, draw):
    if paths := _keys(d):
        path = draw.choice(paths)
        holder, key = _holder(d, path), path[-1]
        at = draw.randrange(len(key) + 1)
        holder[draw.choice((key[:at] + "x" + key[at:], key[:at] + "x" + key[at + 1 :], key.upper()))] = (
            holder.pop(key)
        )
    return json.dumps(d, ensure_ascii=False)


@_in_json
def repeat_key(d, draw):
    if paths := _keys(d):
        path = draw.choice(paths)
        holder = _holder(d, path)
        holder[MARK] = draw.choice([*holder.values()])
        return json.dumps(d, ensure_ascii=False).replace(
            f'"{MARK}"', json.dumps(path[-1], ensure_ascii=False)
        )
    return json.dumps(d, ensure_ascii=False)


@_in_json
def swap_values(d, draw):
    """Two values of one object change places."""
    if paths := _keys(d):
        path = draw.choice(paths)
        holder = _holder(d, path)
        a, b = path[-1], draw.choice([*holder])
        holder[a], holder[b] = holder[b], holder[a]
    return json.dumps(d, ensure_ascii=False)


MUTATORS = (
    flip_bit,
    truncate,
    empty,
    insert_bytes,
    remove_bytes,
    repeat_bytes,
    add_mark,
    swap_file,
    lines_mixed,
    replace_value,
    remove_key,
    rename_key,
    repeat_key,
    swap_values,
)


@dataclass
class Report:
    """What became of the cases."""

    verdicts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0  # seconds


@contextmanager
def timer(seconds: float) -> Iterator[None]:
    """Raises Hang after some seconds."""

    def ring(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Notes(logging.Handler):
    """Keeps what is said."""

    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


@contextmanager
def listening() -> Iterator[list[str]]:
    """What is said meanwhile, in notes and on stderr; nothing is printed."""
    notes, logger = Notes(), logging.getLogger("fairref")
    logger.addHandler(notes)
    logger.propagate, before = False, logger.propagate
    note.cache_clear()
    stderr = StringIO()
    try:
        with redirect_stdout(StringIO()), redirect_stderr(stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield notes.said
    finally:
        lines = [
            line for line in stderr.getvalue().splitlines() if not line.startswith(("finetuning", "evaluat"))
        ]
        notes.said += lines
        logger.removeHandler(notes)
        logger.propagate = before


def structure(d, key=""):
    """A JSON content without its values and without a user's own names: types remain."""
    if key in RANGES and not isinstance(d, list):
        return "range"
    if isinstance(d, dict) and key in NAMES:
        return sorted(json.dumps(structure(value)) for value in d.values())
    if isinstance(d, dict):
        return {key: structure(value, key) for key, value in d.items()}
    if isinstance(d, list):
        return [structure(value) for value in d]
    return "number" if type(d) in (int, float) else type(d).__name__


def is_part(a, b):
    """Whether structure a is b, but for keys that are absent."""
    if isinstance(a, dict) and isinstance(b, dict):
        return all(key in b and is_part(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return all(any(is_part(x, y) for y in b) for x in a)
    return a == b


def says_something_else(kind: Kind, whole: bytes, damaged: bytes) -> bool:
    """Whether a damaged file is as valid as the whole one, by the rule of this module."""
    if kind.data:
        return True
    if kind.settings:
        try:
            return is_part(structure(json.loads(damaged)), structure(json.loads(whole)))
        except (ValueError, RecursionError):
            return False
    is_sealed = b"sha256" in whole[: 8 + int.from_bytes(whole[:8], "little")]  # a file of fairref's own
    return whole[8:9] == b"{" and not is_sealed and header(damaged) == header(whole)


def header(content):
    """Name, dtype and shape of all tensors of a safetensors file."""
    entries = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {
        name: (entry["dtype"], entry["shape"]) for name, entry in entries.items() if name != "__metadata__"
    }


def run_case(root: Path, name: str, number: int, seed: int) -> tuple[str, str, float]:
    """One case -> (verdict, what to say of it, seconds)."""
    kind = KINDS[name]
    draw_from = random.Random(f"{seed} {number} {name}")
    path = root / kind.file
    whole, expected, said = WORLD[name]
    mutator = draw_from.choice(MUTATORS)
    damaged = mutator(whole, draw_from, (root / kind.other).read_bytes())
    label = f"case {number}: {name}, {mutator.__name__}"
    path.write_bytes(damaged)
    start = time.monotonic()
    try:
        with listening() as notes, timer(SECONDS):
            found = kind.load(root)
        verdict, why = "equal", ""
        if found != expected:
            why = ", ".join(key for key in expected if found.get(key) != expected[key])
            is_said = len(set(notes) - set(said)) > 0
            is_other = says_something_else(kind, whole, damaged)
            verdict = "said" if is_said else "other" if is_other else "fault"
            why = f"loads silently with another {why}"
    except UserError as error:
        message = str(error)
        # what a run's settings ask for may lie elsewhere
        named = [path.name, str(path.parent), *(["bundle"] if kind.load is RUN else [])]
        is_named = any(name in message for name in named)
        verdict = "refused" if is_named and "\n" not in message else "fault"
        why = f"the message is no sentence that names the file: {message!r}"
    except Hang:
        is_other = kind.settings and kind.load is RUN and says_something_else(kind, whole, damaged)
        verdict, why = "other" if is_other else "fault", f"takes more than {SECONDS} s"
    except (Exception, SystemExit):
        lines = traceback.format_exc().strip().splitlines()
        verdict, why = (
            "fault",
            f"{lines[-1][:200]} ({' <- '.join(re.findall(r'line [0-9]+, in [^ ]+', ' '.join(lines))[-3:])})",
        )
    finally:
        path.write_bytes(whole)
    return verdict, f"{label}: {why}", time.monotonic() - start


def fuzz(root: Path, cases: int, seed: int, only: str = "", say: Callable[[str], None] = print) -> Report:
    """Run the cases, kind by kind in turn; `only` is one kind's name."""
    names = [name for name in KINDS if only in name]
    if "bundle" not in WORLD:
        with listening():
            make_world(root)
    for name in set(names) - set(WORLD):
        kind = KINDS[name]
        with listening() as notes:
            expected = kind.load(root)
        WORLD[name] = (root / kind.file).read_bytes(), expected, list(notes)
    report = Report()
    for number in range(cases):
        verdict, line, seconds = run_case(root, names[number % len(names)], number, seed)
        report.verdicts[verdict] += 1
        report.slowest = max(report.slowest, seconds)
        if verdict == "fault":
            report.faults.append(line)
            say(line)
    return report


def main(argv: list[str] | None = None) -> int:
    """The command line; exit code 1 where there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of a kind's name")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as root:
        report = fuzz(Path(root), options.cases, options.seed, options.only)
    print(
        f"{options.cases} cases of seed {options.seed}: {dict(report.verdicts)}, the slowest {report.slowest:.1f} s"
    )
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
