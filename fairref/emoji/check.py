"""The gates of the emoji bundle: what it must do before anything is finetuned on it.

B pictures, M of them with a face.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.stats import spearmanr
from torch import Tensor

from fairref.bundle import load_bundle
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
from fairref.emoji.pictures import VIEWS, Person, Scene, draw, face_points, random_scene, sprites
from fairref.emoji.sheet import LOOKS, things
from fairref.errors import UserError
from fairref.evaluate import How, look_at, pictures
from fairref.fairness.attributes import parse_targets
from fairref.fairness.faces import Faces, crops, find
from fairref.finetune.looking import classify, faces_of
from fairref.finetune.recipes import resolve
from fairref.images import grid
from fairref.prompts import occupation_prompt, read_occupations
from fairref.report import bias_report
from fairref.weights_io import write_json

UNSEEN = "check"  # names a stream of randomness that no training stage uses
NEAR = 3  # pixels from the middle of a face, for it to be the one that was found


@dataclass(frozen=True)
class Gate:
    claim: str
    value: float | None  # None: there was nothing to measure, which fails
    bar: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        if self.value is None or not math.isfinite(self.value):
            return False
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        value = "nothing" if self.value is None else f"{self.value:.4f}"
        return f"{'pass' if self.holds else 'FAIL'}  {self.claim}: {value}  (bar {sign} {self.bar})"

    def to_dict(self) -> dict:
        """Ready for JSON."""
        value = round(float(self.value), 4) if self.value is not None and math.isfinite(self.value) else None
        return {
            "claim": self.claim,
            "value": value,
            "bar": self.bar,
            "at_most": self.at_most,
            "holds": self.holds,
        }


def networks_gates(bundle, count: int = 512) -> list[Gate]:
    """What can be measured without sampling: autoencoder, classifiers and detector."""
    gates = [
        Gate(
            "VAE, mean PSNR on unseen pictures, dB",
            stages.psnr(bundle.vae, stages.generator_for(0, UNSEEN, 0)),
            26,
        )
    ]
    for role, classifier in bundle.classifiers.items():
        for name, share in held_out_accuracy(classifier, count).items():
            gates.append(Gate(f"{role} classifier, {name}, faces of held-out look x tone", share, 0.98))
    return gates + real_face_gates(bundle, 2 * count)


@torch.no_grad()
def held_out_accuracy(classifier, count: int) -> dict[str, float]:
    """Share of right answers on the faces of portraits of the pairs that no classifier was trained on."""
    generator = stages.generator_for(0, UNSEEN, 1)
    scene = stages.balanced_scene(8 * count, generator, portraits=True)
    scene = scene[judging.held_out(scene.person.look, scene.person.tone).nonzero()[:count, 0]]
    x = crops(draw(scene), judging.true_faces(scene), classifier.network.config.input_size)
    said, truth = classifier(x), stages.labels(scene)
    return {
        name: (logits.argmax(1) == truth[name])[truth[name] >= 0].float().mean().item()
        for name, logits in said.items()
    }


@torch.no_grad()
def real_face_gates(bundle, count: int) -> list[Gate]:
    """The detector on pictures of all views, in no style, seen through the VAE."""
    scene = stages.balanced_scene(count, stages.generator_for(0, UNSEEN, 2))
    scene = replace(scene, style=torch.zeros_like(scene.style))
    faces = find(bundle.detector, through(bundle, scene))
    right = found_right(faces, scene.person)[scene.shown].float().mean().item()
    nobody = nobody_scene(count, stages.generator_for(0, UNSEEN, 3))
    none = 1 - find(bundle.detector, through(bundle, nobody)).found.float().mean().item()
    return [
        Gate(f"detector, faces found to {NEAR} pixels, all views", right, 0.98),
        Gate("detector, no face on plain backgrounds and things", none, 0.98),
    ]


@torch.no_grad()
def faces_by_kind(bundle, count: int) -> dict[str, float]:
    """What `real_face_gates` pools, by view and background: faces found, and pictures of nobody without one."""
    scene = stages.balanced_scene(10 * count, stages.generator_for(0, UNSEEN, 2))
    scene = replace(scene, style=torch.zeros_like(scene.style))
    found = {}
    for number, view in enumerate(VIEWS):
        if view != "nobody":
            some = scene[(scene.view == number).nonzero()[:count, 0]]
            found[view] = found_right(find(bundle.detector, through(bundle, some)), some.person)
    nobody = nobody_scene(4 * count, stages.generator_for(0, UNSEEN, 3))
    none = ~find(bundle.detector, through(bundle, nobody)).found
    found |= {"thing": none[::2], "plain": none[1::2]}
    return {kind: values.float().mean().item() for kind, values in found.items()}


def nobody_scene(B: int, generator: torch.Generator) -> Scene:
    """B scenes without a person, half of them without a thing."""
    zero = torch.zeros(B, dtype=torch.long)
    thing = torch.randint(len(things()), (B,), generator=generator).where(torch.arange(B) % 2 == 0, -1)
    return random_scene(zero, zero, zero, generator, view=zero + VIEWS.index("nobody"), thing=thing)


def through(bundle, scene: Scene) -> Tensor:
    """The scenes' pictures as the VAE gives them back."""
    parts = torch.arange(len(scene)).split(64)
    return torch.cat([stages.reconstructed(bundle.vae, draw(scene[p])) for p in parts])


def found_right(faces: Faces, person: Person) -> Tensor:
    """Whether a face was found whose middle is that of the person's face, to NEAR pixels, (B,) bool."""
    boxes = face_points(person[faces.found.nonzero()[:, 0]])[0]
    errors = ((faces.boxes[:, :2] + faces.boxes[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2).norm(dim=1)
    right = faces.found.clone()
    right[faces.found] = errors <= NEAR
    return right


def sampling_gates(
    bundle,
    images: int = 24,
    named_images: int = 8,
    follow_images: int = 40,
    named_every: int = 4,
    follow_every: int = 1,
) -> Iterator[Gate]:
    """What the pictures of a bundle show, at its default guidance and, for one gate, at guidance 1.

    Images of each occupation: of neutral prompts, of prompts that name a class (every `named_every`-th
    occupation), and at guidance 1 (every `follow_every`-th).
    """
    recipe = resolve(("gender",), bundle.recipe, {})
    how = {
        name: How(
            bundle,
            parse_targets([name], bundle.attributes),
            recipe.eval_steps,
            recipe.eval_guidance,
            recipe.end,
        )
        for name in bundle.attributes
    }
    yield follows_data(bundle, replace(how["gender"], guidance=1.0), follow_images, follow_every)
    yield from neutral_gates(bundle, how["gender"], images)
    yield from face_gates(bundle, how["gender"])
    yield from named_gates(bundle, how, named_images, named_every)


def follows_data(bundle, how: How, images: int, every: int = 1) -> Gate:
    """The share of women of each occupation follows the table."""
    jobs = occupations()[::every]
    prompts = [occupation_prompt(job.name) for job in jobs]
    seen = look_at(how, bundle, prompts, images, "guidance 1")
    share = [s.counts["templates"][0] / max(1, s.counts["templates"].sum()) for s in seen]
    found = spearmanr(share, [job.share_women for job in jobs]).statistic
    claim = f"share of women at guidance 1 against the table, Spearman, {len(jobs)} occupations x {images}"
    return Gate(claim, float(found), 0.9)


def neutral_gates(bundle, how: How, images: int) -> Iterator[Gate]:
    """Bias of neutral prompts, and images of nobody."""
    names = [job.name for job in occupations()]
    seen = look_at(how, bundle, list(map(occupation_prompt, names)), images, "neutral")
    report = bias_report(seen, names, how.target.classes, images)
    yield Gate("none for the template judge", report["none"], 0.05, at_most=True)
    for judge, values in report["judges"].items():
        yield Gate(f"mean gender bias of neutral prompts, {judge}", values["mean"], 0.5)


@torch.no_grad()
def face_gates(bundle, how: How, images: int = 8) -> Iterator[Gate]:
    """The detector on what the model draws: people, where the template judge says that one is, and nobody."""
    prompts = [occupation_prompt(job.name) for job in occupations()]
    x = torch.cat([pictures(how, bundle, prompt, images) for prompt in prompts])
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
    x = torch.cat([pictures(how, bundle, prompt, 4) for prompt in prompts])
    none = 1 - find(bundle.detector, x).found.float().mean().item()
    yield Gate(f"detector, no face in {len(x)} generated pictures of nobody", none, 0.98)


def named_gates(bundle, how: dict[str, How], images: int, every: int) -> Iterator[Gate]:
    """Whether prompts that name a class get it, and whether classifiers and templates agree on those images."""
    world, jobs = read_occupations(bundle.path), occupations()[::every]
    agree = {(role, name): [] for role, name in product(bundle.classifiers, how)}
    for name, h in how.items():
        obeyed = []
        shown = [job.name for job in jobs if name != "age" or sprites().aged[LOOKS.index(job.look)]]
        for occupation, (k, c) in product(shown, enumerate(h.target.classes[name])):
            x = pictures(h, bundle, world.named_prompt(name, c, occupation), images)
            seen = bundle.templates(x)
            obeyed += ((seen[name] == k) & seen[f"{name}_known"]).tolist()
            faces = faces_of(bundle, x)
            for role, classifier in bundle.classifiers.items():
                for attribute, agreed in agreement(classifier, tuple(how), x, faces, seen).items():
                    agree[role, attribute] += agreed
        yield Gate(f"prompts that name a {name} get it, {len(obeyed)} images", float(np.mean(obeyed)), 0.9)
    for (role, name), values in agree.items():
        claim = f"{role} classifier agrees with the template judge, {name}, {len(values)} generated images"
        yield Gate(claim, float(np.mean(values)) if values else None, 0.95)


@torch.no_grad()
def agreement(
    classifier, attributes: tuple[str, ...], x: Tensor, faces: Faces, seen: dict
) -> dict[str, list]:
    """Attribute -> whether the classifier says what the template judge has `seen`, of each face whose class it knows."""
    logits = classify(classifier, attributes, x, faces)
    found = faces.found
    return {
        name: (logits[name].argmax(1) == seen[name][found])[seen[f"{name}_known"][found]].tolist()
        for name in attributes
    }


def contact_sheet(bundle) -> Image.Image:
    """A row for each look's first test occupation: four pictures as it comes, one for each named class; then others."""
    world, margin = read_occupations(bundle.path), 210
    recipe = resolve(("gender",), bundle.recipe, {})
    how = How(
        bundle,
        parse_targets(["gender"], bundle.attributes),
        recipe.eval_steps,
        recipe.eval_guidance,
        recipe.end,
    )
    classes = [(a, c) for a, names in bundle.attributes.items() for c in names]
    columns = 4 + len(classes)
    rows = {}
    for look in LOOKS[:-1]:
        job = next(job.name for job in occupations() if job.look == look and job.split == "test")
        prompts = [(occupation_prompt(job), 4)]
        prompts += [(world.named_prompt(a, c, job), 1) for a, c in classes]
        rows[job] = torch.cat([pictures(how, bundle, prompt, n) for prompt, n in prompts])
    for label, prompt in other_prompts().items():
        rows[label] = pictures(how, bundle, prompt, columns)
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
    """Label -> prompt, for what else the world knows: unseen concepts of each kind, and every view."""
    job = next(job.name for job in occupations() if job.split == "test")
    found = {}
    for kind in KINDS:
        for concept in [c for c in concepts(kind) if c.split == "test"][:2]:
            found[concept.phrase] = prompt_of(concept, job)
    portrait = occupation_prompt(job)
    found |= {"far away": FAR_AWAY.format(c=portrait), "with a friend": TWO_PEOPLE.format(c=portrait)}
    return found | {"nobody": NOBODY.format(thing=next(iter(things())).replace("_", " "))}


def check(path: Path) -> int:
    """Print every gate; 0 when all hold. Leaves quality.json and contact_sheet.png in the bundle.

    Raises UserError.
    """
    bundle = load_bundle(path)
    lacking = [name for name in ("detector", "templates", "classifiers", "clip") if not getattr(bundle, name)]
    if lacking:
        raise UserError(f"{path}: has no {lacking[0]}; the gates are those of a bundle with every judge.")
    sheet = contact_sheet(bundle)
    # a third of the size
    sheet = sheet.quantize(256, palette=sheet.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)
    sheet.save(bundle.path / "contact_sheet.png", optimize=True)
    gates = []
    for gate in chain(networks_gates(bundle), sampling_gates(bundle)):
        print(gate, flush=True)
        gates.append(gate)
    write_json(bundle.path / "quality.json", [gate.to_dict() for gate in gates])
    return 0 if all(gate.holds for gate in gates) else 1
