"""One model in memory, several adapters: a view -> its images by the base and by the adapted model, judged.

n images of a prompt by each model, from the same noise. One request draws at a time; that is the caller's to keep.
"""

import json
import re
import time
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch
from PIL import Image
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.bundle.recipe import resolve
from fairref.diffusion.model import GuidedModel
from fairref.diffusion.sampler import sample
from fairref.diffusion.solver import solver_table
from fairref.errors import UserError
from fairref.evaluation.certainty import share
from fairref.evaluation.judging import logits_of, turns
from fairref.files.images import png_bytes, to_image
from fairref.files.weights import finite
from fairref.generation.adapters import AdapterFile, load_adapters
from fairref.generation.drawing import group_size
from fairref.generation.rollout import decode, embed, first_noise
from fairref.generation.strengths import describe_adapters
from fairref.generation.views import faces_of
from fairref.prompts.words import naming
from fairref.web.view import MAX_GUIDANCE, Limits, View

KEPT = 4  # adapted models in memory, whose weights but the adapter's are the base's
BEFORE, AFTER = "original", "fair"
Progress = tuple[int, int]  # evaluations of the U-Net that are done, and all of them


@dataclass(frozen=True)
class Seen:
    """What the first classifier sees of an attribute in one model's n images."""

    classes: list[int]  # -1: no face
    probabilities: list[float | None]
    shares: list[
        tuple[float | None, float | None, float | None]
    ]  # of each class, with Wilson's 95 % interval
    counts: list[int]


@dataclass(frozen=True)
class Side:
    """One model's images, and what is seen of them."""

    files: list[bytes]  # PNG with the settings in it
    seen: dict[str, Seen]  # attribute -> ...; {} without a classifier
    boxes: list[
        tuple[float, float, float, float] | None
    ]  # edges of the face that counts, as shares of the side


@dataclass(frozen=True)
class Drawn:
    """A view's images."""

    view: View
    sides: dict[str, Side]  # BEFORE, and AFTER where there is an adapter
    classes: dict[str, tuple[str, ...]]
    notes: list[str]  # what a visitor must know of the prompt
    made_fair: tuple[str, ...] = ()  # the attributes that the adapter is for


class Studio:
    """`for step in studio.draw(view)`: the last step is Drawn. `adapters` by the names that visitors see."""

    def __init__(
        self, bundle: Bundle, adapters: Mapping[str, AdapterFile], limits: Limits, any_base: bool = False
    ) -> None:
        self.bundle, self.adapters, self.limits, self.any_base = bundle, dict(adapters), limits, any_base
        self.thread = ThreadPoolExecutor(1, "drawing")
        self.models: OrderedDict[tuple[str, float], Bundle] = OrderedDict()
        recipe = resolve((), bundle.recipe, {}, bundle.path, bundle.attributes)
        self.end = recipe.end
        name = next(iter(self.adapters), "")
        self.default = View(
            "",
            n=min(View.n, limits.images),
            guidance=min(recipe.eval_guidance, MAX_GUIDANCE),
            steps=min(recipe.eval_steps, limits.steps),
            adapter=name,
        )
        judge = turns(bundle).get("classifier", {})
        known = [name for names in judge.values() for name in names]
        self.classes = {name: bundle.attributes[name] for name in known}
        for name in self.adapters:  # what does not fit is said before anybody asks
            self.model(name, 1.0)

    def model(self, name: str, strength: float) -> Bundle:
        """The adapted model, from the few that are kept. Raises UserError."""
        if name not in self.adapters:
            names = ", ".join(self.adapters) or "none"
            raise UserError(f"There is no adapter {name[:80]!r} here; expected one of {names}.")
        key = name, strength
        adapter = self.adapters[name]
        if adapter.prefix is not None and strength not in (0, 1):
            raise UserError(
                f"The strength of {name} is {strength:g}; it is a prefix, which is there (1) or not (0)."
            )
        if key not in self.models:
            self.models[key] = load_adapters(self.bundle, [(adapter, strength)], self.any_base)
            while len(self.models) > KEPT:
                self.models.popitem(last=False)
        self.models.move_to_end(key)
        return self.models[key]

    def draw(self, view: View, seconds: float | None = None) -> Iterator[Progress | Drawn]:
        """Yields the progress, and at the end the images. Raises UserError, also where it takes longer than `seconds`.

        `seconds`: None: the limits'. Whoever asks, one thread draws: each that torch sees keeps memory of its own.
        """
        drawing = self._draw(view, self.limits.seconds if seconds is None else seconds)
        step = None
        while not isinstance(step, Drawn):
            try:
                step = self.thread.submit(next, drawing).result()
            except UserError:
                raise
            except Exception as error:
                traceback.print_exc()
                raise UserError("The drawing failed; the server's output says why.") from error
            yield step

    @torch.no_grad()
    def _draw(self, view, seconds):
        models = {BEFORE: self.bundle}
        if self.adapters or view.adapter:
            models[AFTER] = self.model(view.adapter, view.strength)
        ends = time.monotonic() + seconds
        groups = torch.arange(view.n).split(group_size(self.bundle))
        done, total = 0, view.steps * len(groups) * len(models)
        yield done, total
        sides = {}
        for label, model in models.items():
            c, c_empty = embed(model, view.prompt, view.negative).split(1)
            guided = GuidedModel(model.unet, c, c_empty, view.guidance)
            table, images = solver_table(model.schedule, view.steps, self.end), []
            for group in groups:
                for step in sample(guided, table, first_noise(model, view.seed, 0, group.tolist())):
                    if step.eps is not None:
                        done += 1
                        yield done, total
                    if time.monotonic() > ends:
                        raise UserError(
                            f"Drawing took longer than {seconds:g} s and was stopped; ask for fewer images"
                            " or steps."
                        )
                images.append(decode(model, step.z))
            x = torch.cat(images)
            if not finite(x):
                raise UserError(f"Guidance {view.guidance:g} draws what is no number; take a lower one.")
            sides[label] = self._side(view, label, x)
        made_fair = self.adapters[view.adapter].info.get("classes", {}) if self.adapters else {}
        yield Drawn(view, sides, self.classes, self.notes(view), tuple(made_fair))

    def _side(self, view: View, label: str, x: Tensor) -> Side:
        faces = faces_of(self.bundle, x)
        has_face = torch.ones(len(x), dtype=torch.bool) if faces is None else faces.has_face.cpu()
        edges = iter((faces.boxes.cpu() / x.shape[-1]).tolist() if faces is not None else ())
        boxes = [tuple(next(edges)) if there and faces is not None else None for there in has_face.tolist()]
        seen = {}
        for name, logits in (logits_of(self.bundle, "classifier", x, faces) if self.classes else {}).items():
            rows = iter(logits.softmax(1).cpu().tolist())
            p = [next(rows) if there else None for there in has_face.tolist()]
            classes = [-1 if of is None else max(range(len(of)), key=of.__getitem__) for of in p]
            counts = [classes.count(k) for k in range(len(self.classes[name]))]
            shares = [share(count, sum(counts)) for count in counts]
            seen[name] = Seen(classes, [None if of is None else max(of) for of in p], shares, counts)
        return Side(self._files(view, label, [to_image(image) for image in x]), seen, boxes)

    def _files(self, view: View, label: str, images: list[Image.Image]) -> list[bytes]:
        """PNG files as sample.py writes them: the settings are their text."""
        of_fair = label == AFTER
        adapters = [(self.adapters[view.adapter], view.strength)] if of_fair else []
        made_by = {
            **{
                key: value
                for key, value in asdict(view).items()
                if key not in ("adapter", "strength", "negative")
            },
            "negative_prompt": view.negative,
            "end": self.end,
            "weights": self.bundle.path.name,
            "dtype": self.bundle.dtype,
            "adapters": describe_adapters(self.bundle, adapters),
        }
        common = {"prompt": view.prompt, "seed": str(view.seed), "settings": json.dumps(made_by)}
        return [png_bytes(image, {**common, "image": str(i)}) for i, image in enumerate(images)]

    def notes(self, view: View) -> list[str]:
        """What of the prompt is cut, and which attributes it names."""
        prefix = self.adapters[view.adapter].prefix if self.adapters and view.strength else None
        soft = 0 if prefix is None else len(prefix)
        notes, read = [], view.prompt
        for what, text, tokens in (("prompt", view.prompt, soft), ("negative prompt", view.negative, 0)):
            (end,) = self.bundle.tokenizer.cut([text], tokens)
            notes += [f"The {what} is too long for the model: its end is not used, “{end}”."] if end else []
            if end and what == "prompt":  # without the word that may have been cut in two
                read = re.sub(r"[\w-]*$", "", text.removesuffix(end))
        for name in self.classes:
            if words := naming(read, name):
                notes.append(
                    f"This prompt names {name.replace('_', ' ')} (“{words}”): that is to be kept, not balanced."
                    " The counts show whether it was."
                )
        return notes
