"""What a bundle is made of, one row a part.

bundle.json's keys, loading, `fairref bundle check` and the table of docs/sd15.md derive from PARTS.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fairref.bundle.judges import (
    load_classifier,
    load_clip,
    load_detector,
    load_dino,
    load_embedder,
    load_face_features,
    load_templates,
)
from fairref.bundle.stable_diffusion import load_stable_diffusion

USES = {  # what a bundle is good for -> the kinds of parts that it takes
    "draw": {"to draw"},
    "finetune": {"to draw", "to finetune"},
    "evaluate": {"to draw", "to evaluate"},
    "finetune on faces, as the method does": {"to draw", "to finetune", "for faces", "for L_img's DINO"},
}
OPTIONAL = "for the small world"  # the kind of a part that no use asks for


@dataclass(frozen=True)
class Part:
    """A part of a bundle, and facts about the one that belongs to Stable Diffusion 1.5."""

    key: str  # in bundle.json; GROUP.ROLE for one of several
    load: Callable[..., object]  # (place, device, dtype) -> the ready part; raises UserError
    needed: str  # a kind of part in USES
    place: str  # where docs/sd15.md puts it, relative to the bundle
    megabytes: int  # of its weights in float32
    source: str
    licence: str
    several: bool = False  # whether bundle.json may list more than one, in a GROUP
    own: bool = False  # whether --judge may put a user's own in its place

    @property
    def group(self) -> str:
        """The key that holds this part and others of its kind; "" for a part alone."""
        return self.key.rpartition(".")[0]

    @property
    def role(self) -> str:
        """What --judge calls it."""
        return self.key.rpartition(".")[2]


CLASSIFIER = (
    "fairref classifier (CelebA or FairFace), or MobileNetV3-Large of the released data.zip, folder {folder}, with the"
    " config.json of docs/sd15.md"
)
FACES_LICENCE = "CelebA: non-commercial research; FairFace: CC BY 4.0"
PARTS = (
    Part(
        "stable_diffusion",
        load_stable_diffusion,
        "to draw",
        ".",
        4265,
        "stable-diffusion-v1-5/stable-diffusion-v1-5 on the Hugging Face hub: unet, vae, text_encoder, tokenizer,"
        " scheduler; or one v1-5-pruned-emaonly.safetensors",
        "CreativeML Open RAIL-M",
    ),
    Part(
        "classifiers.finetune",
        load_classifier,
        "to finetune",
        "classifier_finetune",
        17,
        CLASSIFIER.format(folder="2-trained-classifiers"),
        FACES_LICENCE,
        several=True,
        own=True,
    ),
    Part(
        "clip",
        load_clip,
        "to finetune",
        "clip",
        3944,
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K on the Hugging Face hub: config.json, model.safetensors, vocab.json,"
        " merges.txt",
        "MIT",
    ),
    Part(
        "classifiers.evaluate",
        load_classifier,
        "to evaluate",
        "classifier_evaluate",
        17,
        CLASSIFIER.format(folder="5-trained-test-classifiers"),
        FACES_LICENCE,
        several=True,
        own=True,
    ),
    Part(
        "detector",
        load_detector,
        "for faces",
        "../mtcnn",
        2,
        "weights/mtcnn of this repository",
        "MIT",
    ),
    Part(
        "embedder",
        load_embedder,
        "for faces",
        "embedder",
        98,
        "SFNet-20 of opensphere: backbone_100000.pth of its 20220424_210641 checkpoints",
        "see opensphere",
        own=True,
    ),
    Part(
        "face_features",
        load_face_features,
        "for faces",
        "faces.safetensors",
        205,
        "fairref faces on CelebA or FairFace (100,000 faces)",
        FACES_LICENCE,
    ),
    Part(
        "dino",
        load_dino,
        "for L_img's DINO",
        "dino",
        346,
        "dinov2_vitb14_pretrain.pth of facebookresearch/dinov2",
        "Apache 2.0",
        own=True,
    ),
    Part(
        "templates",
        load_templates,
        OPTIONAL,
        "templates.json",
        0,
        "fairref emoji build, for the small world alone",
        "SIL Open Font License 1.1",
    ),
)
