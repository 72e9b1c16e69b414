"""The gates of the emoji bundle: what it must do before anything is finetuned on it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.stats import spearmanr

from fairref.bundle import load_bundle
from fairref.emoji import stages
from fairref.emoji.captions import occupations
from fairref.emoji.pictures import draw
from fairref.emoji.sheet import GENDERS, LOOKS, TONES
from fairref.evaluate import How, bias_report, look_at, pictures
from fairref.fairness.attributes import parse_targets
from fairref.finetune.checkpoints import write_json
from fairref.finetune.recipes import resolve
from fairref.images import grid
from fairref.prompts import occupation_prompt, read_occupations

UNSEEN = "check"  # names a stream of randomness that no training stage uses


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
        return {"claim": self.claim, "value": value, "bar": self.bar, "holds": self.holds}


def networks_gates(bundle, count: int = 512) -> list[Gate]:
    """What can be measured without sampling: autoencoder and classifiers."""
    gates = [
        Gate(
            "VAE, mean PSNR on unseen pictures, dB",
            stages.psnr(bundle.vae, stages.generator_for(0, UNSEEN, 0)),
            26,
        )
    ]
    look, gender, tone = (
        i.flatten()
        for i in torch.meshgrid(*map(torch.arange, (len(LOOKS), len(GENDERS), len(TONES))), indexing="ij")
    )
    kept = stages.held_out(look, tone).nonzero()[:, 0].repeat(-(-count // (len(look) // len(TONES))))
    scene = stages.random_scene(look[kept], gender[kept], tone[kept], stages.generator_for(0, UNSEEN, 1))
    with torch.no_grad():
        x = draw(scene)
        for role, classifier in bundle.classifiers.items():
            for name, label in (("gender", scene.gender), ("skin_tone", scene.tone)):
                right = (classifier(x)[name].argmax(1) == label).float().mean().item()
                gates.append(Gate(f"{role} classifier, {name}, held-out look x tone", right, 0.98))
    return gates


def sampling_gates(
    bundle, images: int = 24, named_images: int = 8, follow_images: int = 40, named_every: int = 4
) -> Iterator[Gate]:
    """What the pictures of a bundle show, at its default guidance and, for one gate, at guidance 1.

    Images of each occupation: of neutral prompts, of prompts that name a class (every `named_every`-th
    occupation), and at guidance 1.
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
    yield follows_data(bundle, replace(how["gender"], guidance=1.0), follow_images)
    yield from neutral_gates(bundle, how["gender"], images)
    yield from named_gates(bundle, how, named_images, named_every)


def follows_data(bundle, how: How, images: int) -> Gate:
    """The share of women of each occupation follows the table."""
    jobs = occupations()
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


def named_gates(bundle, how: dict[str, How], images: int, every: int) -> Iterator[Gate]:
    """Whether prompts that name a class get it, and whether the two judges agree on those images."""
    world, names = read_occupations(bundle.path), [job.name for job in occupations()][::every]
    agree = {name: [] for name in how}
    for name, h in how.items():
        obeyed = []
        for occupation, (k, c) in product(names, enumerate(h.target.classes[name])):
            x = pictures(h, bundle, world.named_prompt(name, c, occupation), images)
            found = bundle.templates(x)
            with torch.no_grad():
                said = bundle.classifiers["evaluate"](x)
            obeyed += ((found[name] == k) & found[f"{name}_known"]).tolist()
            for attribute in agree:
                known = found[f"{attribute}_known"]
                agree[attribute] += (said[attribute].argmax(1) == found[attribute])[known].tolist()
        yield Gate(f"prompts that name a {name} get it, {len(obeyed)} images", float(np.mean(obeyed)), 0.9)
    for name, values in agree.items():
        claim = (
            f"evaluation classifier agrees with the template judge, {name}, {len(values)} generated images"
        )
        yield Gate(claim, float(np.mean(values)) if values else None, 0.95)


def contact_sheet(bundle) -> Image.Image:
    """A row for each look's first test occupation: six pictures as it comes, two for each named class."""
    world, margin = read_occupations(bundle.path), 150
    recipe = resolve(("gender",), bundle.recipe, {})
    rows, names = [], []
    for look in LOOKS:
        job = next(job.name for job in occupations() if job.look == look and job.split == "test")
        prompts = [(occupation_prompt(job), 6)]
        prompts += [
            (world.named_prompt(a, c, job), 2) for a, classes in bundle.attributes.items() for c in classes
        ]
        how = How(
            bundle,
            parse_targets(["gender"], bundle.attributes),
            recipe.eval_steps,
            recipe.eval_guidance,
            recipe.end,
        )
        rows.append(torch.cat([pictures(how, bundle, prompt, n) for prompt, n in prompts]))
        names.append(job)
    heads = [("a photo of the face of a ..., a person", 6)]
    heads += [(c, 2) for classes in bundle.attributes.values() for c in classes]
    body = grid(torch.cat(rows), len(rows[0]))
    sheet = Image.new("RGB", (body.width + margin, body.height + 20), "white")
    sheet.paste(body, (margin, 20))
    pen, cell = ImageDraw.Draw(sheet), body.width / len(rows[0])
    column = 0
    for text, n in heads:
        pen.text((margin + column * cell + 2, 4), text, fill="black")
        column += n
    for row, name in enumerate(names):
        pen.text((4, 20 + (row + 0.4) * body.height / len(rows)), name, fill="black")
    return sheet


def check(path: Path) -> int:
    """Print every gate; 0 when all hold. Leaves quality.json and contact_sheet.png in the bundle."""
    bundle = load_bundle(path)
    sheet = contact_sheet(bundle)
    sheet = sheet.quantize(
        256, palette=sheet.quantize(256), dither=Image.Dither.FLOYDSTEINBERG
    )  # a third of the size
    sheet.save(bundle.path / "contact_sheet.png", optimize=True)
    gates = []
    for gate in chain(networks_gates(bundle), sampling_gates(bundle)):
        print(gate, flush=True)
        gates.append(gate)
    write_json(bundle.path / "quality.json", [gate.to_dict() for gate in gates])
    return 0 if all(gate.holds for gate in gates) else 1
