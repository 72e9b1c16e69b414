"""Judgements that are kept, so that no image is drawn twice: of each source and prompt one file, of its first n images.

A file's name is a hash of all that its rows follow from: what draws, how, on which noise, of which prompt, and who
judges. The images themselves are not kept, so another judge must draw them again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from fairref.bundle.loading import Bundle
from fairref.errors import UserError
from fairref.evaluation.statistics import JudgedImages
from fairref.files.weights import fingerprint_of, read, read_info, write
from fairref.generation.drawing import Drawing
from fairref.progress import note

KEPT = "judged"  # a run's folder of them
FORMAT = "fairref-judged-1"  # the number grows where fairref draws or judges otherwise than before
# parts of a bundle that see images; the tokenizer makes the texts of "clip:..." judges
LOOKING = ("classifiers.evaluate", "templates", "detector", "clip", "clip_tokenizer", "dino")
NO_SETTINGS = ("training", "fingerprint", "source")  # of what a judge's object holds


def read_kept(file: Path, info: Mapping[str, object], then: str) -> dict[str, Tensor] | None:
    """The tensors of a file with this `info`; None without one, and of a damaged one, which is named."""
    if not file.exists():
        return None
    try:
        tensors = read(file)
        if not info.items() <= read_info(file).items():
            raise UserError(f"{file}: holds something else than its name says.")
    except UserError as error:
        note(f"{str(error).partition(';')[0].rstrip('.')}: {then}.")
        return None
    return tensors


@dataclass(frozen=True)
class KeptJudgements:
    """The judgements of one source's images by the same judges."""

    folder: Path
    made_of: Mapping[str, object]
    judges: Mapping[str, object]

    def _info(self, prompt):
        """All that the rows of a prompt follow from."""
        made_of = {"made_of": self.made_of, "judges": self.judges, "prompt": prompt}
        return json.loads(json.dumps({"format": FORMAT, **made_of}))

    def file(self, prompt: str) -> Path:
        """Where the rows of a prompt are."""
        text = json.dumps(self._info(prompt), sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def read(self, prompt: str) -> JudgedImages | None:
        """The rows of a prompt's first images, None where there are none; of a damaged file, too, which is named."""
        tensors = read_kept(self.file(prompt), self._info(prompt), "its images are drawn again")
        return tensors and JudgedImages.from_tensors(tensors)

    def write(self, prompt: str, judged: JudgedImages) -> None:
        """Keeps the rows of a prompt's first images. Raises UserError."""
        # a process on another machine may lack the run's folder
        if self.folder.parent.is_dir():
            self.folder.mkdir(exist_ok=True)
            write(self.file(prompt), judged.tensors(), self._info(prompt))


def model_of(model: Bundle, drawing: Drawing, seed: int) -> dict[str, object]:
    """All that a bundle's images follow from beside prompt and number. Its adapters are those of `load_adapters`."""
    networks = (model.text_encoder, model.unet, model.vae, *filter(None, [model.empty_encoder]))
    return {
        "networks": model.fingerprints,
        "configs": [repr(network.config) for network in networks],
        "tokenizer": fingerprint_of(model.tokenizer),
        "schedule": repr(model.schedule),
        "resolution": model.resolution,
        "adapters": [adapter for adapter in model.adapters if adapter[1]],
        "drawing": drawing._asdict(),
        "seed": seed,
        "dtype": model.dtype,
        "device": model.device.type,
    }


def judges_of(bundle: Bundle, parts: Sequence[str] = LOOKING) -> dict[str, object] | None:
    """What tells these judges of a bundle from others; None where one can't be told, as a function put in by a program.

    A user's own judge is known by the hash of its file alone, as in settings.json: not by what that file loads.
    """
    found = {}
    for key in parts:
        group, _, role = key.rpartition(".")
        if not (key in bundle.manifest if key == "templates" else bundle.has(key)):
            continue
        own, made_of = bundle.own_judges.get(role, ()), bundle.all_fingerprints.get(key)
        if not own and made_of is None:
            return None
        held = bundle.classifiers[role] if group else () if key == "templates" else (getattr(bundle, key),)
        found[key] = {
            "made of": [{k: v for k, v in one.to_dict().items() if k != "path"} for one in own] or made_of,
            "settings": [getattr(judge, "classes", {}) if own else _settings(judge) for judge in held],
        }
    return found


def _settings(judge):
    """What a judge, and the network that it holds, are beside their tensors."""
    both = [part for part in (judge, getattr(judge, "network", None)) if hasattr(part, "__dict__")]
    return [
        {
            name: repr(value)
            for name, value in vars(part).items()
            if not name.startswith("_") and not isinstance(value, nn.Module) and name not in NO_SETTINGS
        }
        for part in both
    ]
