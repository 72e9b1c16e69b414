"""The gates of the emoji bundle: measured claims that must hold before it is used for finetuning.

B images, M of them with a face.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.stats import spearmanr
from torch import Tensor

from fairref.bundle.judges import load_sprites
from fairref.bundle.loading import Bundle, load_bundle
from fairref.bundle.recipe import resolve
from fairref.emoji import judging, stages
from fairref.emoji.captions import (
    FAR_AWAY,
    KINDS,
    NOBODY,
    TWO_PEOPLE,
    concepts,
    occupations,
    prompt_of,
)
from fairref.emoji.pictures import VIEWS, Scene, draw, face_points, random_scene
from fairref.emoji.sheet import things
from fairref.errors import UserError
from fairref.evaluation.judging import EvaluationSettings, draw_images, drawn_by, judge_prompts
from fairref.evaluation.statistics import bias_report
from fairref.fairness.attributes import parse_targets
from fairref.fairness.faces import Faces, crops, find
from fairref.files.images import grid, save_png
from fairref.files.paths import write_json
from fairref.generation.drawing import Drawing
from fairref.generation.views import classify, faces_of
from fairref.judges import ImageClassifier
from fairref.judges.sprites import LOOKS, Person
from fairref.prompts import occupation_prompt, read_occupations

UNSEEN = "check"  # names a stream of randomness that no training stage uses
NEAR = 3  # pixels that a detected face may be away from the true one


@dataclass(frozen=True)
class Gate:
    """A claim, the value measured for it, and the bar that the value must reach or, with `at_most`, not exceed."""

    claim: str
    value: float | None  # None: there was nothing to measure, so the gate fails
    bar: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        """Whether the value passes."""
        if self.value is None or not math.isfinite(self.value):
            return False
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        value = "nothing" if self.value is None else f"{self.value:.4f}"
        return f"{'pass' if self.holds else 'FAIL'}  {self.claim}: {value}  (bar {sign} {self.bar})"

    def to_dict(self) -> dict[str, object]:
        """Return the gate for JSON."""
        value = round(float(self.value), 4) if self.value is not None and math.isfinite(self.value) else None
        return {
            "claim": self.claim,
            "value": value,
            "bar": self.bar,
            "at_most": self.at_most,
            "holds": self.holds,
        }


def networks_gates(bundle: Bundle, count: int = 512) -> list[Gate]:
    """Return the gates that need no sampling: autoencoder, classifiers and detector."""
    gates = [
        Gate(
            "VAE, mean PSNR on unseen pictures, dB",
            stages.psnr(bundle.vae, stages.generator_for(0, UNSEEN, 0)),
            26,
        )
    ]
    for role, classifiers in bundle.classifiers.items():
        for classifier in classifiers:
            for name, share in held_out_accuracy(classifier, count).items():
                gates.append(Gate(f"{role} classifier, {name}, faces of held-out look x tone", share, 0.98))
    return gates + real_face_gates(bundle, 2 * count)


@torch.no_grad()
def held_out_accuracy(classifier: ImageClassifier, count: int) -> dict[str, float]:
    """Return the accuracy by attribute, on portraits of the pairs that no classifier was trained on."""
    generator = stages.generator_for(0, UNSEEN, 1)
    scene = stages.balanced_scene(8 * count, generator, portraits=True)
    scene = scene[judging.held_out(scene.person.look, scene.person.tone).nonzero()[:count, 0]]
    x = crops(draw(scene), judging.true_faces(scene), classifier.input_size)
    answers, truth = classifier(x), stages.labels(scene)
    return {
        name: (logits.argmax(1) == truth[name])[truth[name] >= 0].float().mean().item()
        for name, logits in answers.items()
    }


@torch.no_grad()
def real_face_gates(bundle: Bundle, count: int) -> list[Gate]:
    """Return the gates of the detector on pictures of all views, without a style, behind the VAE."""
    scene = stages.balanced_scene(count, stages.generator_for(0, UNSEEN, 2))
    scene = replace(scene, style=torch.zeros_like(scene.style))
    faces = find(bundle.detector, through(bundle, scene))
    right = found_right(faces, scene.person)[scene.shown].float().mean().item()
    nobody = nobody_scene(count, stages.generator_for(0, UNSEEN, 3))
    none = 1 - find(bundle.detector, through(bundle, nobody)).has_face.float().mean().item()
    return [
        Gate(f"detector, faces found to {NEAR} pixels, all views", right, 0.98),
        Gate("detector, no face on plain backgrounds and things", none, 0.98),
    ]


@torch.no_grad()
def faces_by_kind(bundle: Bundle, count: int) -> dict[str, float]:
    """Return the numbers of `real_face_gates` by view and background.

    These are the shares of faces that are found, and of pictures of nobody in which none is found.
    """
    scene = stages.balanced_scene(10 * count, stages.generator_for(0, UNSEEN, 2))
    scene = replace(scene, style=torch.zeros_like(scene.style))
    correct = {}
    for number, view in enumerate(VIEWS):
        if view != "nobody":
            some = scene[(scene.view == number).nonzero()[:count, 0]]
            correct[view] = found_right(find(bundle.detector, through(bundle, some)), some.person)
    nobody = nobody_scene(4 * count, stages.generator_for(0, UNSEEN, 3))
    none = ~find(bundle.detector, through(bundle, nobody)).has_face
    correct |= {"thing": none[::2], "plain": none[1::2]}
    return {kind: values.float().mean().item() for kind, values in correct.items()}


def nobody_scene(B: int, generator: torch.Generator) -> Scene:
    """Return B scenes without a person, half of them without a thing."""
    zero = torch.zeros(B, dtype=torch.long)
    thing = torch.randint(len(things()), (B,), generator=generator).where(torch.arange(B) % 2 == 0, -1)
    return random_scene(zero, zero, zero, generator, view=zero + VIEWS.index("nobody"), thing=thing)


def through(bundle: Bundle, scene: Scene) -> Tensor:
    """Return the scenes' pictures, encoded and decoded by the VAE."""
    parts = torch.arange(len(scene)).split(64)
    return torch.cat([stages.reconstructed(bundle.vae, draw(scene[p])) for p in parts])


def found_right(faces: Faces, person: Person) -> Tensor:
    """Return (B,) bool: the middle of the detected face is at most NEAR pixels from that of the person's face."""
    boxes = face_points(person[faces.has_face.nonzero()[:, 0]])[0]
    errors = ((faces.boxes[:, :2] + faces.boxes[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2).norm(dim=1)
    right = faces.has_face.clone()
    right[faces.has_face] = errors <= NEAR
    return right


def sampling_gates(
    bundle: Bundle,
    images: int = 24,
    explicit_images: int = 8,
    follow_images: int = 40,
    explicit_every: int = 4,
    follow_every: int = 1,
) -> Iterator[Gate]:
    """Yield the gates of generated images, at the bundle's default guidance and, for one gate, at guidance 1.

    `images`: for each occupation. `explicit_images`: for each explicit prompt of every `explicit_every`-th occupation.
    `follow_images`: at guidance 1, for every `follow_every`-th occupation.
    """
    recipe = resolve(("gender",), bundle.recipe, {})
    drawing = Drawing(recipe.eval_steps, recipe.eval_guidance, recipe.end)
    settings = {
        name: EvaluationSettings(bundle, parse_targets([name], bundle.attributes), drawing)
        for name in bundle.attributes
    }
    at_1 = replace(settings["gender"], drawing=drawing._replace(guidance=1.0))
    yield follows_data(bundle, at_1, follow_images, follow_every)
    yield from neutral_gates(bundle, settings["gender"], images)
    yield from face_gates(bundle, settings["gender"])
    yield from explicit_gates(bundle, settings, explicit_images, explicit_every)


def follows_data(bundle: Bundle, settings: EvaluationSettings, images: int, every: int = 1) -> Gate:
    """Return the gate that the share of women of each occupation follows the table."""
    jobs = occupations()[::every]
    prompts = [occupation_prompt(job.name) for job in jobs]
    seen = judge_prompts(settings, drawn_by(settings, bundle, "guidance 1"), prompts, images)
    counts = [s.counts("templates", settings.target.classes) for s in seen]
    share = [of_prompt[0] / max(1, of_prompt.sum()) for of_prompt in counts]
    correlation = spearmanr(share, [job.share_women for job in jobs]).statistic
    claim = f"share of women at guidance 1 against the table, Spearman, {len(jobs)} occupations x {images}"
    return Gate(claim, float(correlation), 0.9)


def neutral_gates(bundle: Bundle, settings: EvaluationSettings, images: int) -> Iterator[Gate]:
    """Yield the gates of neutral prompts: images of nobody, and bias."""
    names = [job.name for job in occupations()]
    drawn = drawn_by(settings, bundle, "neutral")
    seen = judge_prompts(settings, drawn, list(map(occupation_prompt, names)), images)
    report = bias_report(seen, names, settings.target.classes)
    yield Gate("none for the template judge", report["none"], 0.05, at_most=True)
    for judge, values in report["judges"].items():
        yield Gate(f"mean gender bias of neutral prompts, {judge}", values["mean"], 0.5)


@torch.no_grad()
def face_gates(bundle: Bundle, settings: EvaluationSettings, images: int = 8) -> Iterator[Gate]:
    """Yield the gates of the detector on generated images: people seen by the template judge, and nobody."""
    prompts = [occupation_prompt(job.name) for job in occupations()]
    x = torch.cat([draw_images(settings, bundle, prompt, images) for prompt in prompts])
    seen = bundle.templates(x)
    x = x[~seen["none"]]
    seen = {name: values[~seen["none"]] for name, values in seen.items()}
    zero = torch.zeros_like(seen["scale"])
    colour = zero[:, None].expand(-1, 3)
    who = seen["look"], seen["gender"], seen["skin_tone"], seen["age"]
    person = Person(*who, colour, zero, zero, seen["place"], seen["scale"])
    right = found_right(find(bundle.detector, x), person).float().mean().item()
    yield Gate(
        f"detector, faces found to {NEAR} pixels in {len(x)} generated pictures of people", right, 0.98
    )
    prompts = [NOBODY.format(thing=name.replace("_", " ")) for name in things()]
    x = torch.cat([draw_images(settings, bundle, prompt, 4) for prompt in prompts])
    none = 1 - find(bundle.detector, x).has_face.float().mean().item()
    yield Gate(f"detector, no face in {len(x)} generated pictures of nobody", none, 0.98)


def explicit_gates(
    bundle: Bundle, settings: dict[str, EvaluationSettings], images: int, every: int
) -> Iterator[Gate]:
    """Yield the gates of explicit prompts: they get their class, and classifiers agree with the template judge."""
    world, jobs = read_occupations(bundle.path), occupations()[::every]
    agree = {(role, name): [] for role, name in product(bundle.classifiers, settings)}
    for name, evaluation in settings.items():
        obeyed = []
        shown = [job.name for job in jobs if name != "age" or load_sprites().aged[LOOKS.index(job.look)]]
        for occupation, (k, c) in product(shown, enumerate(evaluation.target.classes[name])):
            x = draw_images(evaluation, bundle, world.explicit_prompt(name, c, occupation), images)
            seen = bundle.templates(x)
            obeyed += ((seen[name] == k) & seen[f"{name}_known"]).tolist()
            faces = faces_of(bundle, x)
            for role, classifiers in bundle.classifiers.items():
                for attribute, agreed in agreement(classifiers, tuple(settings), x, faces, seen).items():
                    agree[role, attribute] += agreed
        yield Gate(f"prompts that name a {name} get it, {len(obeyed)} images", float(np.mean(obeyed)), 0.9)
    for (role, name), values in agree.items():
        claim = f"{role} classifier agrees with the template judge, {name}, {len(values)} generated images"
        yield Gate(claim, float(np.mean(values)) if values else None, 0.95)


@torch.no_grad()
def agreement(
    classifiers: Sequence[ImageClassifier],
    attributes: tuple[str, ...],
    x: Tensor,
    faces: Faces,
    seen: dict[str, Tensor],
) -> dict[str, list[bool]]:
    """Return, by attribute, whether the classifiers agree with the template judge's verdict `seen`.

    Only faces count, and only those whose class the template judge knows.
    """
    logits, has_face = classify(classifiers, attributes, x, faces), faces.has_face
    return {
        name: (logits[name].argmax(1) == seen[name][has_face])[seen[f"{name}_known"][has_face]].tolist()
        for name in attributes
    }


def contact_sheet(bundle: Bundle) -> Image.Image:
    """Return a sheet of generated images: a row for the first test occupation of each look, then other prompts.

    An occupation has four images of its neutral prompt and one of each explicit prompt.
    """
    world, margin = read_occupations(bundle.path), 210
    recipe = resolve(("gender",), bundle.recipe, {})
    drawing = Drawing(recipe.eval_steps, recipe.eval_guidance, recipe.end)
    settings = EvaluationSettings(bundle, parse_targets(["gender"], bundle.attributes), drawing)
    classes = [(a, c) for a, names in bundle.attributes.items() for c in names]
    columns = 4 + len(classes)
    rows = {}
    for look in LOOKS[:-1]:
        job = next(job.name for job in occupations() if job.look == look and job.split == "test")
        prompts = [(occupation_prompt(job), 4)]
        prompts += [(world.explicit_prompt(a, c, job), 1) for a, c in classes]
        rows[job] = torch.cat([draw_images(settings, bundle, prompt, n) for prompt, n in prompts])
    for label, prompt in other_prompts().items():
        rows[label] = draw_images(settings, bundle, prompt, columns)
    heads = [("a photo of the face of a ..., a person", 4)] + [(c, 1) for _, c in classes]
    body = grid(torch.cat(list(rows.values())), columns)
    sheet = Image.new("RGB", (body.width + margin, body.height + 20), "white")
    sheet.paste(body, (margin, 20))
    pen, cell = ImageDraw.Draw(sheet), body.width / columns
    column = 0
    for line, (text, n) in enumerate(heads):
        pen.text((margin + column * cell + 2, 9 * (line % 2)), text, fill="black")  # in turn on two lines
        column += n
    for row, name in enumerate(rows):
        pen.text((4, 20 + (row + 0.4) * body.height / len(rows)), name, fill="black")
    return sheet


def other_prompts() -> dict[str, str]:
    """Return other prompts by label: unseen concepts of each kind, and every view."""
    job = next(job.name for job in occupations() if job.split == "test")
    prompts = {}
    for kind in KINDS:
        for concept in [c for c in concepts(kind) if c.split == "test"][:2]:
            prompts[concept.phrase] = prompt_of(concept, job)
    portrait = occupation_prompt(job)
    prompts |= {"far away": FAR_AWAY.format(c=portrait), "with a friend": TWO_PEOPLE.format(c=portrait)}
    return prompts | {"nobody": NOBODY.format(thing=next(iter(things())).replace("_", " "))}


def check(path: Path) -> int:
    """Measure and print every gate; return 0 if all hold, else 1. Raises UserError.

    Writes quality.json and contact_sheet.png into the bundle.
    """
    bundle = load_bundle(path)
    lacking = [name for name in ("detector", "templates", "classifiers", "clip") if not getattr(bundle, name)]
    if lacking:
        raise UserError(f"{path}: has no {lacking[0]}; the gates are those of a bundle with every judge.")
    sheet = contact_sheet(bundle)
    # this makes the file a third as large
    sheet = sheet.quantize(256, palette=sheet.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)
    save_png(sheet, bundle.path / "contact_sheet.png", {}, optimize=True)
    gates = []
    for gate in chain(networks_gates(bundle), sampling_gates(bundle)):
        print(gate, flush=True)
        gates.append(gate)
    write_json(bundle.path / "quality.json", [gate.to_dict() for gate in gates])
    return 0 if all(gate.holds for gate in gates) else 1
