"""Folders and files of judges -> ready judges that look at pictures.

A judge's folder holds `model.safetensors`, or one .pth, .pt or .bin file as the network's makers publish it, and a
`config.json` where the shape is not said by the weights or not the published one.
"""

from dataclasses import fields
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fairref import judges
from fairref.bundle.configs import check_counts, read_config
from fairref.bundle.typed import read_dataclass, read_values, shown
from fairref.errors import UserError
from fairref.fairness.faces import Detector, MTCNNDetector
from fairref.files.images import read_rgba
from fairref.files.names import open_clip_names
from fairref.files.paths import read_json, write_json
from fairref.files.tokenizer import Tokenizer, check_rows
from fairref.files.tokenizer_files import read_vocabulary
from fairref.files.weights import check_fits, find, load_strict, read, read_judge, ready, write
from fairref.judges.dino import Dino, DinoConfig
from fairref.judges.mobilenet import Classifier, MobileNetConfig, MobileNetV3
from fairref.judges.mtcnn import MTCNN
from fairref.judges.sfnet import SFNet, config_of
from fairref.judges.sprites import LOOKS, Sprites, cut_sprites
from fairref.judges.templates import Templates
from fairref.nets.clip import (
    LEGACY_EOS,
    Clip,
    ClipConfig,
    ClipTextConfig,
    ClipVisionConfig,
)

UNIT = 0.01  # how far the norms of D_F may be from 1
FACE_FEATURES = "embeddings"  # the tensor of D_F's file
PEOPLE_SHEET = Path(judges.__file__).with_name("people.png")  # the sprites of the nearest-template judge


def load_clip(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Clip, Tokenizer]:
    """CLIP's folder -> (both towers, the tokenizer of vocab.json and merges.txt).

    config.json and model.safetensors of a transformers CLIPModel, or else open_clip_config.json and
    open_clip_model.safetensors (or the .bin file) of open_clip.
    """
    path, other = folder / "config.json", folder / "open_clip_config.json"
    if other.is_file() and not (path.is_file() and (folder / "model.safetensors").exists()):
        config = open_clip_config(read_json(other), str(other))
        layers = config.text.num_hidden_layers, config.vision.num_hidden_layers
        tensors, source = read_judge(folder, "open_clip_model")
        tensors = open_clip_names(tensors, layers, source)
    else:
        config = read_config(ClipConfig, read_json(path), str(path))
        source = str(find(folder, "model"))
        tensors = read(source)
    check_counts(config, tensors, source)
    with torch.device("meta"):  # random initial values would take longer than loading
        clip = Clip(config)
    load_strict(clip, tensors, source)
    tokenizer = Tokenizer(read_vocabulary(folder), config.text.max_position_embeddings)
    check_rows(tokenizer, config.text.vocab_size, str(folder))
    if config.text.eos_token_id not in (LEGACY_EOS, tokenizer.eos):
        raise UserError(
            f"{folder}: the text tower pools at eos_token_id = {config.text.eos_token_id}, but the tokenizer's EOS is"
            f" {tokenizer.eos}; use this model's files of the tokenizer."
        )
    return ready(clip, device, dtype), tokenizer


OPEN_CLIP = {  # part of open_clip_config.json -> its keys, with their types
    "model_cfg": {"embed_dim": int, "quick_gelu": bool},
    "vision_cfg": {
        "image_size": int,
        "layers": int,
        "width": int,
        "head_width": int,
        "patch_size": int,
        "mlp_ratio": float,
    },
    "text_cfg": {
        "context_length": int,
        "vocab_size": int,
        "width": int,
        "heads": int,
        "layers": int,
        "mlp_ratio": float,
    },
}


def open_clip_config(d: dict[str, object], source: str) -> ClipConfig:
    """The shape that an open_clip_config.json describes. Raises UserError for towers of another kind."""
    d = d.get("model_cfg", d)
    values = {}
    for part, kinds in OPEN_CLIP.items():
        found = d if part == "model_cfg" or not isinstance(d, dict) else d.get(part)
        keys = {*kinds, *(OPEN_CLIP if part == "model_cfg" else ())}
        strange = sorted(set(found) - keys) if isinstance(found, dict) else [part]
        if strange:
            raise UserError(
                f"{source}: {part} has {strange[0]!r}; expected open_clip's plain vision transformer and text"
                f" transformer, which are described by {', '.join(sorted(keys))}."
            )
        values[part] = read_values(kinds, found, f"{source}: {part}")
    vision, text, embed_dim = values["vision_cfg"], values["text_cfg"], values["model_cfg"].get("embed_dim")
    act = "quick_gelu" if d.get("quick_gelu") else "gelu"
    try:
        return ClipConfig(
            ClipTextConfig(
                vocab_size=text["vocab_size"],
                hidden_size=text["width"],
                intermediate_size=int(text["width"] * text.get("mlp_ratio", 4.0)),
                num_hidden_layers=text["layers"],
                num_attention_heads=text["heads"],
                max_position_embeddings=text["context_length"],
                hidden_act=act,
                eos_token_id=LEGACY_EOS,
            ),
            ClipVisionConfig(
                hidden_size=vision["width"],
                intermediate_size=int(vision["width"] * vision.get("mlp_ratio", 4.0)),
                projection_dim=embed_dim,
                num_hidden_layers=vision["layers"],
                num_attention_heads=vision["width"] // max(vision.get("head_width", 64), 1),
                image_size=vision["image_size"],
                patch_size=vision["patch_size"],
                hidden_act=act,
            ),
            embed_dim,
        )
    except KeyError as error:
        raise UserError(
            f"{source}: lacks {error}; take the file that open_clip's weights came with."
        ) from None
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def load_classifier(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Classifier:
    """The attribute classifier of a folder. Raises UserError. Its config.json, every key but the first optional:

    {"attributes": {"gender": ["woman", "man"]}, "kind": "large", "width": 1.0, "input_size": 224,
     "pixels": "imagenet",              or "plain", for networks that were trained on pixels in [-1, 1]
     "num_logits": 80, "logits": {"gender": [40, 41]}}   where the network has more logits than are meant
    """
    path = Path(folder) / "config.json"
    d = read_json(path)
    attributes, logits = d.pop("attributes", None), d.pop("logits", None)
    if not _are_lists(attributes, str, 2):
        raise UserError(
            f'{path}: "attributes" is {shown(attributes)}; expected a list of two or more classes for each.'
        )
    if logits is not None and not _are_lists(logits, int, 1):
        raise UserError(f'{path}: "logits" is {shown(logits)}; expected a list of places for each attribute.')
    d.setdefault("num_logits", sum(map(len, attributes.values())))
    if strange := sorted(set(d) - {field.name for field in fields(MobileNetConfig)}):
        raise UserError(f"{path}: found key {strange[0]!r}; MobileNet has no such option.")
    config = read_dataclass(MobileNetConfig, d, str(path))
    tensors, source = read_judge(folder)
    network = _built(lambda: MobileNetV3(config), tensors, source)
    try:
        classifier = Classifier(network, attributes, logits)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return ready(classifier, device, dtype)


def _are_lists(d, kind, least):
    """Whether it is a JSON object of lists, with at least so many values of a kind in each."""
    return isinstance(d, dict) and all(
        isinstance(items, list) and len(items) >= least and all(type(item) is kind for item in items)
        for items in d.values()
    )


def save_classifier(classifier: Classifier, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes what `load_classifier` reads. `dtype` is for the weights of convolutions and linear layers;
    biases and BatchNorm's parameters and statistics, few but of any range, stay float32."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: (value.detach().to(dtype) if value.dim() >= 2 else value.detach()).cpu().contiguous()
        for key, value in classifier.network.state_dict().items()
    }
    write(folder / "model.safetensors", tensors, {})
    config = classifier.network.config.to_dict()
    config["attributes"] = {name: list(classes) for name, classes in classifier.classes.items()}
    if classifier.logits is None:
        del config["num_logits"]  # the attributes say it
    else:
        config["logits"] = {name: list(places) for name, places in classifier.logits.items()}
    write_json(folder / "config.json", config)


def load_dino(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Dino:
    """DINOv2 of a folder: ViT-B/14, unless its config.json gives other fields of DinoConfig. Raises UserError."""
    options = _options(folder, {field.name: field.type for field in fields(DinoConfig)})
    try:
        config = DinoConfig(**options)
    except UserError as error:
        raise UserError(f"{Path(folder) / 'config.json'}: {error}") from None
    tensors, source = read_judge(folder)
    check_counts(config, tensors, source)
    return ready(_built(lambda: Dino(config), tensors, source), device, dtype)


def load_mtcnn(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> MTCNN:
    """The face detector of a folder, whose config.json may give `smallest` and `thresholds`. Raises UserError."""
    options = _options(folder, {"smallest": int, "thresholds": tuple[float, float, float]})
    try:
        network = MTCNN(**options)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    tensors, source = read_judge(folder)
    load_strict(network, tensors, source)
    return network.to(device, dtype).eval().requires_grad_(False)


def load_detector(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Detector:
    """`load_mtcnn` as what `fairness.faces.find` calls, in at least float32."""
    return MTCNNDetector(load_mtcnn(folder, device, torch.promote_types(dtype, torch.float32)))


def load_embedder(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> SFNet:
    """The face embedder of a folder: any SFNet of opensphere's. config.json may give `relu_before_sum` and `side`."""
    tensors, source = read_judge(folder)
    try:
        config = config_of(tensors, **_options(folder, {"side": int, "relu_before_sum": bool}))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return ready(_built(lambda: SFNet(config), tensors, source), device, dtype)


def load_face_features(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """D_F (R, D) on the CPU, as it is stored: the unit embeddings of external real faces. Raises UserError."""
    tensors = read(path)
    found = tensors.get(FACE_FEATURES)
    fits = found is not None and found.dim() == 2 and len(found)
    if set(tensors) != {FACE_FEATURES} or not fits:
        shape = "none" if found is None else list(found.shape)
        raise UserError(
            f"{path}: {FACE_FEATURES} is {shape}; expected one tensor of (faces, D); make it with"
            " `fairref faces`."
        )
    norms = found.float().norm(dim=1)
    if not (norms - 1).abs().max() < UNIT:
        raise UserError(
            f"{path}: its embeddings have norms from {norms.min():.3g} to {norms.max():.3g}; expected 1; make them"
            " with `fairref faces`."
        )
    return found


@cache
def load_sprites() -> Sprites:
    """Return all people of the sheet that comes with the package."""
    return cut_sprites(read_rgba(PEOPLE_SHEET))


def read_template_settings(path: str | Path) -> tuple[float, dict[str, float]]:
    """The threshold and each look's share of a templates.json. Raises UserError."""
    d = read_json(path)
    shares = d.get("shares")
    found = read_values({"threshold": float}, d, str(path))
    found |= {
        "shares": read_values(
            dict.fromkeys(LOOKS, float), shares if isinstance(shares, dict) else {}, str(path)
        )
    }
    threshold, shares = found.get("threshold", 0.0), found["shares"]
    if not (
        threshold > 0 and set(shares) == set(LOOKS) and all(0.5 < share <= 1.5 for share in shares.values())
    ):
        raise UserError(
            f"{path}: found threshold {threshold:g} and {len(shares)} shares, expected a JSON object with a number"
            f" above 0 and one from 0.5 to 1.5 for each of {len(LOOKS)} looks; take the file from its bundle."
        )
    return threshold, shares


def load_templates(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Templates:
    """The nearest-template judge of a templates.json, in float32 whatever `dtype` is. Raises UserError."""
    return Templates(load_sprites(), *read_template_settings(path)).to(device)


def _built(make, tensors, source):
    """The network that `make` builds, with the tensors; it gets memory only after their names and shapes were seen."""
    with torch.device("meta"):
        shape = make()
    check_fits(shape, tensors, source)
    network = make()
    load_strict(network, tensors, source)
    return network


def _options(folder, kinds):
    """The options in a folder's config.json, if it has one: keys of `kinds`, with values of their types."""
    path = Path(folder) / "config.json"
    options = read_json(path) if path.is_file() else {}
    strange = sorted(set(options) - set(kinds))
    if strange:
        raise UserError(f"{path}: found key {strange[0]!r}; expected some of {', '.join(kinds)}.")
    return read_values(kinds, options, str(path))
