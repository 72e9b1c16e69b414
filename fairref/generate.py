"""What sample.py does: pictures of a prompt, with how they were made in the files' own text."""

import json
import math
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fairref import cli
from fairref.bundle import load_bundle
from fairref.errors import UserError
from fairref.finetune.adapters import load_adapter
from fairref.finetune.recipes import resolve
from fairref.finetune.rollout import draw, first_noise, group_size
from fairref.images import grid, save_png, to_image
from fairref.progress import Progress
from fairref.weights_io import expanded, finite

LONGEST = 100  # bytes of a prompt in a folder's name


@dataclass(frozen=True)
class Settings:
    """The options of sample.py."""

    prompt: str
    num_images: int = 8
    seed: int = 0  # of the noise; image i of a seed is the same whatever num_images is
    steps: int | None = None  # S; None: the bundle's
    guidance: float | None = None  # s; None: the bundle's
    negative_prompt: str = ""  # takes the place of the empty prompt
    weights: str = cli.WEIGHTS
    adapter: str | None = None  # a run's folder or an adapter file
    out: str | None = None  # folder; None: samples/<prompt>, and the adapter's name
    device: str = "auto"
    dtype: str = "float32"


def generate(settings: Settings) -> list[Path]:
    """Draws, writes and names the files: one PNG an image, and a grid. Raises UserError."""
    bundle = load_bundle(settings.weights, cli.device(settings.device), cli.DTYPES[settings.dtype])
    recipe = resolve((), bundle.recipe, {}, bundle.path, bundle.attributes)
    steps = recipe.eval_steps if settings.steps is None else settings.steps
    guidance = recipe.eval_guidance if settings.guidance is None else settings.guidance
    if not math.isfinite(guidance):
        raise UserError(f"--guidance is {guidance}; expected a number.")
    if settings.adapter is not None:
        bundle = load_adapter(bundle, settings.adapter)
    texts = (settings.prompt, settings.negative_prompt)
    prefix = 0 if bundle.prefix is None else len(bundle.prefix)
    for text, soft in zip(texts, (prefix, 0)):
        cli.warn_of_cut(bundle.tokenizer, [text], soft)

    folder = _folder(settings)
    resolved = {**asdict(settings), "steps": steps, "guidance": guidance, "end": recipe.end}
    groups = torch.arange(settings.num_images).split(group_size(bundle))
    pictures = []
    with Progress(steps * len(groups), "drawing") as progress, torch.no_grad():
        for group in groups:
            z_T = first_noise(bundle, settings.seed, 0, group.tolist())
            x = draw(bundle, texts, z_T, steps, guidance, recipe.end, progress.step)
            if not finite(x):
                raise UserError(
                    f"--guidance {guidance} and --dtype {settings.dtype} draw what is no number; take a lower guidance or"
                    " float32."
                )
            pictures.append(x)
    x = torch.cat(pictures)
    return _write(folder, x, settings, resolved)


def _folder(settings):
    words = re.sub(r"[\W_]+", "-", settings.prompt.lower()).strip("-").encode()
    slug = words[:LONGEST].decode(errors="ignore") or "empty-prompt"
    if len(words) > LONGEST or re.search(r"[^\w\s,.-]", settings.prompt):  # others would have the same
        slug += f"-{zlib.crc32(settings.prompt.encode()):08x}"
    if settings.adapter is not None:  # its pictures lie beside those without it, not in their place
        adapter = expanded(settings.adapter).resolve()
        slug += f"-{adapter.name}" if adapter.is_dir() else f"-{adapter.parent.name}-{adapter.stem}"
    folder = Path("samples") / slug if settings.out is None else expanded(settings.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out is {folder}, which can't be made ({error.strerror}); give a folder."
        ) from None
    return folder


def _write(folder, x, settings, resolved):
    common = {"prompt": settings.prompt, "seed": str(settings.seed), "settings": json.dumps(resolved)}
    paths = []
    for i, picture in enumerate(x):
        paths.append(folder / f"seed{settings.seed}-{i:03d}.png")
        save_png(to_image(picture), paths[-1], {**common, "image": str(i)})
    paths.append(folder / f"seed{settings.seed}-grid.png")
    save_png(grid(x), paths[-1], common)
    return paths
