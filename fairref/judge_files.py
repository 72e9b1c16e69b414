"""Folders and files of judges -> ready networks that look at pictures.

A judge's folder holds `model.safetensors`, or one .pth, .pt or .bin file as the network's makers publish it, and a
`config.json` where the shape is not said by the weights or not the published one.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from fairref.errors import UserError
from fairref.fairness.faces import Detector, with_mtcnn
from fairref.judges.dino import Dino, DinoConfig
from fairref.judges.mobilenet import Classifier, MobileNetConfig, MobileNetV3
from fairref.judges.mtcnn import MTCNN
from fairref.judges.sfnet import SFNet, config_of
from fairref.nets.clip import (
    LEGACY_EOS,
    Clip,
    ClipConfig,
    ClipTextConfig,
    ClipVisionConfig,
)
from fairref.tokenizer import Tokenizer
from fairref.weights_io import load_strict, read, read_json, read_judge, write
from fairref.weights_names import open_clip_names

UNIT = 0.01  # how far the norms of D_F may be from 1
FACE_FEATURES = "embeddings"  # the tensor of D_F's file


def load_clip(folder: Path) -> tuple[Clip, Tokenizer]:
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
        config = ClipConfig.from_dict(read_json(path), str(path))
        source = str(folder / "model.safetensors")
        tensors = read(source)
    with torch.device("meta"):  # random initial values would take longer than loading
        clip = Clip(config)
    load_strict(clip, tensors, source)
    return clip, Tokenizer(folder / "vocab.json", folder / "merges.txt", config.text.max_position_embeddings)


def open_clip_config(d: dict, source: str) -> ClipConfig:
    """The shape that an open_clip_config.json describes. Raises UserError for towers of another kind."""
    d = d.get("model_cfg", d)
    known = {
        "vision_cfg": {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"},
        "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
        "model_cfg": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
    }
    for part, keys in known.items():
        found = d if part == "model_cfg" else d.get(part)
        strange = sorted(set(found) - keys) if isinstance(found, dict) else [part]
        if strange:
            raise UserError(
                f"{source}: {part} has {strange[0]!r}; expected open_clip's plain vision transformer and text"
                f" transformer, which are described by {', '.join(sorted(keys))}."
            )
    vision, text = d["vision_cfg"], d["text_cfg"]
    act = "quick_gelu" if d.get("quick_gelu") else "gelu"
    try:
        return ClipConfig(
            ClipTextConfig(
                text["vocab_size"],
                text["width"],
                int(text["width"] * text.get("mlp_ratio", 4.0)),
                text["layers"],
                text["heads"],
                text["context_length"],
                act,
                eos_token_id=LEGACY_EOS,
            ),
            ClipVisionConfig(
                vision["width"],
                int(vision["width"] * vision.get("mlp_ratio", 4.0)),
                d["embed_dim"],
                vision["layers"],
                vision["width"] // vision.get("head_width", 64),
                image_size=vision["image_size"],
                patch_size=vision["patch_size"],
                hidden_act=act,
            ),
            d["embed_dim"],
        )
    except KeyError as error:
        raise UserError(
            f"{source}: lacks {error}; take the file that open_clip's weights came with."
        ) from None


def load_classifier(folder: str | Path) -> Classifier:
    """The attribute classifier of a folder. Raises UserError. Its config.json, every key but the first optional:

    {"attributes": {"gender": ["woman", "man"]}, "kind": "large", "width": 1.0, "input_size": 224,
     "pixels": "imagenet",              or "plain", for networks that were trained on pixels in [-1, 1]
     "num_logits": 80, "logits": {"gender": [40, 41]}}   where the network has more logits than are meant
    """
    path = Path(folder) / "config.json"
    d = read_json(path)
    attributes, logits = d.pop("attributes", None), d.pop("logits", None)
    if not isinstance(attributes, dict) or not all(
        isinstance(classes, list) and len(classes) >= 2 for classes in attributes.values()
    ):
        raise UserError(
            f'{path}: "attributes" is {attributes!r}; expected a list of two or more classes for each.'
        )
    if logits is not None and not (
        isinstance(logits, dict) and all(isinstance(places, list) for places in logits.values())
    ):
        raise UserError(f'{path}: "logits" is {logits!r}; expected a list of places for each attribute.')
    try:
        d.setdefault("num_logits", sum(map(len, attributes.values())))
        classifier = Classifier(MobileNetV3(MobileNetConfig.from_dict(d)), attributes, logits)
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: {error}") from None
    tensors, source = read_judge(folder)
    _loaded(classifier.network, tensors, source)
    return classifier.eval()


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
    config["attributes"] = {name: list(classes) for name, classes in classifier.attributes.items()}
    if classifier.logits is None:
        del config["num_logits"]  # the attributes say it
    else:
        config["logits"] = {name: list(places) for name, places in classifier.logits.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_dino(folder: str | Path) -> Dino:
    """DINOv2 of a folder: ViT-B/14, unless its config.json gives other fields of DinoConfig. Raises UserError."""
    config = DinoConfig(**_options(folder, DinoConfig.__dataclass_fields__))
    tensors, source = read_judge(folder)
    return _loaded(Dino(config), tensors, source)


def load_mtcnn(folder: str | Path) -> MTCNN:
    """The face detector of a folder, whose config.json may give `smallest` and `thresholds`. Raises UserError."""
    options = _options(folder, ("smallest", "thresholds"))
    try:
        network = MTCNN(**options)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    tensors, source = read_judge(folder)
    return _loaded(network, tensors, source)


def load_detector(folder: str | Path, device="cpu", dtype=torch.float32) -> Detector:
    """`load_mtcnn` as what `fairness.faces.find` calls, in at least float32."""
    network = load_mtcnn(folder).to(device, torch.promote_types(dtype, torch.float32))
    return with_mtcnn(network.requires_grad_(False))


def load_embedder(folder: str | Path) -> SFNet:
    """The face embedder of a folder: any SFNet of opensphere's; config.json gives `relu_before_sum` and may give `side`."""
    tensors, source = read_judge(folder)
    try:
        config = config_of(tensors, **_options(folder, ("side", "relu_before_sum")))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return _loaded(SFNet(config), tensors, source)


def load_face_features(path: str | Path, width: int | None = None) -> Tensor:
    """D_F (R, D): the unit embeddings of external real faces, D = `width` of the embedder (None: any). Raises UserError."""
    tensors = read(path)
    found = tensors.get(FACE_FEATURES)
    fits = found is not None and found.dim() == 2 and len(found) and width in (None, found.shape[1])
    if set(tensors) != {FACE_FEATURES} or not fits:
        shape = "none" if found is None else list(found.shape)
        raise UserError(
            f"{path}: {FACE_FEATURES} is {shape}; expected one tensor of (faces, {width or 'D'}), as python -m"
            " fairref.face_features writes it with this embedder."
        )
    norms = found.float().norm(dim=1)
    if not (norms - 1).abs().max() < UNIT:
        raise UserError(
            f"{path}: its embeddings have norms from {norms.min():.3g} to {norms.max():.3g}; expected 1, as python -m"
            " fairref.face_features writes them."
        )
    return found


def _loaded(network: nn.Module, tensors: dict[str, Tensor], source: str) -> nn.Module:
    load_strict(network, tensors, source)
    return network.eval()


def _options(folder, known):
    path = Path(folder) / "config.json"
    options = read_json(path) if path.is_file() else {}
    strange = sorted(set(options) - set(known))
    if strange:
        raise UserError(f"{path}: found key {strange[0]!r}; expected some of {', '.join(known)}.")
    return options
