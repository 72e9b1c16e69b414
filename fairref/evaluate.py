"""How fair, and how faithful, the pictures of a model are (docs/method.md §8).

P prompts, n images of each, K classes. Two judges count classes: the evaluation classifier, whose gradient no
finetuning has seen (validation asks it which adapter is best), and the nearest-template judge, through which no
gradient can flow. Noise depends on (seed, prompt, image), so two models are measured on the same noise, whatever
else is measured with it.

    python -m fairref.evaluate --adapter runs/gender --part test --num-images 60
"""

import json
import os
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fairref import cli
from fairref.bundle import Bundle, load_bundle
from fairref.errors import UserError
from fairref.fairness.attributes import JointTarget, wanted_target
from fairref.fairness.metrics import blends, joint_counts
from fairref.finetune.adapters import load_adapter
from fairref.finetune.distributed import Processes
from fairref.finetune.looking import classify, faces_of
from fairref.finetune.mixture import OCCUPATIONS, Prompts, evenly, read_prompts
from fairref.finetune.recipes import resolve
from fairref.finetune.rollout import fixed_pictures
from fairref.finetune.setup import Setup, knows_all
from fairref.images import grid, save_png
from fairref.progress import Progress
from fairref.prompts import PARTS
from fairref.report import COLOURED, JUDGES, Seen, bias_report, joint_names, likeness, lines
from fairref.weights_io import finite, write_json

SEED = 1_000_000  # of evaluation noise, far from the seeds of finetuning
NAMED_IMAGES = 4  # of each occupation and named class
SO_FAR = "evaluation-so-far.json"
GRID = (6, 12)  # before/after grid: prompts, images of each


@dataclass(frozen=True)
class How:
    """What stays the same in an evaluation."""

    bundle: Bundle  # whose judges look; the model that draws may be an adapted one
    target: JointTarget  # what is counted
    steps: int  # S
    guidance: float  # s
    end: str = "zero"  # of the solver
    seed: int = SEED
    processes: Processes = Processes()  # prompts are shared out among them

    def __post_init__(self):
        if "evaluate" not in self.bundle.classifiers:
            raise UserError(
                f"{self.bundle.path}: has no classifier for evaluation; use a bundle that names one."
            )
        knows_all(self.bundle, "evaluate", self.target)


def pictures(how: How, model: Bundle, prompt: str, n: int) -> Tensor:
    """(n, 3, H, W) of one prompt; the noise follows from (seed, prompt, image). Raises UserError."""
    x = fixed_pictures(model, how.seed, prompt, range(n), how.steps, how.guidance, how.end)
    if not finite(x):
        raise UserError(
            f"Pictures of {prompt!r} at guidance {how.guidance} are no numbers; measure with python -m fairref.evaluate at"
            " a lower --guidance, or in float32."
        )
    return x


def judge(how: How, x: Tensor) -> Seen:
    """Both judges, CLIP and DINO on pictures of one prompt."""
    bundle, names, shape = how.bundle, tuple(how.target.classes), how.target.table.shape
    counts, none, features, colours = {}, 0, {}, {}
    with torch.no_grad():
        faces = faces_of(bundle, x)
        logits = list(classify(bundle.classifiers["evaluate"], names, x, faces).values())  # (M, K_a) each
        counts["classifier"] = joint_counts([of_one.argmax(1) for of_one in logits], shape)
        if bundle.templates is not None:
            found = bundle.templates(x)
            known = torch.stack([found[f"{name}_known"] for name in names]).all(0)
            counts["templates"] = joint_counts([found[name][known] for name in names], shape)
            none = int((~known).sum())
            colours = bundle.templates.colours(x, found)
        if bundle.clip is not None:
            features["clip"] = bundle.clip.encode_image(x).float()
        if bundle.dino is not None:
            features["dino"] = F.normalize(bundle.dino(x).float(), dim=1)
    return Seen(counts, none, len(x) - len(logits[0]), blends(logits), features, colours)


def look_at(how: How, model: Bundle, prompts: list[str], n: int, label: str) -> list[Seen]:
    """n images of each of P prompts, judged; every process gets all P results."""
    shape, processes = how.target.table.shape, how.processes
    mine = processes.part(len(prompts))
    seen = []
    with Progress(len(mine), label, processes.first) as progress:
        for p in mine:
            seen.append(judge(how, pictures(how, model, prompts[p], n)))
            progress.step(prompts[p][-40:])
    if processes.world == 1:
        return seen
    judges = [j for j in JUDGES if j == "classifier" or how.bundle.templates is not None]
    K = int(np.prod(shape))
    numbers = torch.zeros(len(mine), K * len(judges) + 3, dtype=torch.float64)
    for row, s in zip(numbers, seen):
        counts = np.concatenate([s.counts[j].reshape(-1) for j in judges])
        row[:] = torch.tensor([*counts, s.none, s.faceless, s.blended])
    numbers = processes.gather(numbers, len(prompts)).long().numpy()
    widths = {} if how.bundle.clip is None else {"clip": how.bundle.clip.config.projection_dim}
    widths |= {} if how.bundle.dino is None else {"dino": how.bundle.dino.config.width}
    colours = {} if how.bundle.templates is None else dict.fromkeys(COLOURED, 3)
    gathered = {}
    for name, D in {**widths, **colours}.items():
        rows = [{**s.features, **s.colours}[name].float() for s in seen]
        here = torch.stack(rows) if rows else torch.zeros(0, n, D, device=processes.device)
        gathered[name] = processes.gather(here, len(prompts))  # (P, n, D)
    return [
        Seen(
            {j: row[k * K : (k + 1) * K].reshape(shape) for k, j in enumerate(judges)},
            *map(int, row[-3:]),
            *({name: gathered[name][p] for name in kind} for kind in (widths, colours)),
        )
        for p, row in enumerate(numbers)
    ]


def clip_t(how: How, seen: list[Seen], prompts: list[str]) -> dict | None:
    """CLIP-T: mean cosine of images and their own prompt, and of images and all other prompts."""
    if how.bundle.clip is None or len(prompts) < 2:
        return None
    with torch.no_grad():
        ids = how.bundle.clip_tokenizer(prompts).to(seen[0].features["clip"].device)
        texts = how.bundle.clip.encode_text(ids).float()  # (P, D)
    # all are of unit norm, so the mean cosine with a text is the product with the mean feature
    cosines = torch.stack([s.features["clip"].mean(0) for s in seen]) @ texts.T  # (P, P)
    P = len(prompts)
    matched = cosines.diagonal().mean()
    return {"matched": float(matched), "shuffled": float((cosines.sum() - cosines.trace()) / (P * (P - 1)))}


def obedience(how: How, model: Bundle, prompts: Prompts, part: str, n: int, label: str) -> dict:
    """The share of images that show the class their prompt names, by each judge (one it can't tell is a miss)."""
    asked, axes = prompts.named(part, how.target.classes), list(how.target.classes)
    seen = look_at(how, model, [prompt for prompt, *_ in asked], n, label)
    right = {
        j: sum(int(s.counts[j].take(k, axes.index(name)).sum()) for s, (_, name, k) in zip(seen, asked))
        for j in seen[0].counts
    }
    return {"images": n * len(asked), **{j: count / (n * len(asked)) for j, count in right.items()}}


def evaluate(
    how: How,
    model: Bundle,
    prompts: Prompts,
    part: str,
    n: int,
    label: str = "evaluating",
    named_images: int = NAMED_IMAGES,
) -> tuple[dict, list[Seen]]:
    """The report on one part of a concept's prompts, ready for JSON, and what it was made from.

    Named classes are asked for where `named_images` > 0 and the concept can name them.
    """
    texts = list(getattr(prompts, part))
    label = f"{label}, {part} {prompts.name}"
    seen = look_at(how, model, texts, n, label)
    report = {
        "attribute": ",".join(how.target.classes),
        "classes": joint_names(how.target.classes),
        "concept": prompts.name,
        "part": part,
        "steps": how.steps,
        "guidance": how.guidance,
        "seed": how.seed,
        **bias_report(seen, list(map(prompts.short, texts)), how.target.classes, n, how.target.table),
        "clip_t": clip_t(how, seen, texts),
    }
    if named_images and prompts.occupations:
        report["named"] = obedience(how, model, prompts, part, named_images, f"{label}, named classes")
    return report, seen


def before_after(setup: Setup, adapters: dict[str, Path], concepts: list[Prompts], folder: Path) -> dict:
    """What train.py does last: evaluates the frozen model and each adapter on unseen and on finetuning
    prompts, prints it, writes evaluation.json and before_after.png (same noise)."""
    bundle, recipe = setup.bundle, setup.recipe
    how = How(
        bundle, setup.target, recipe.eval_steps, recipe.eval_guidance, recipe.end, processes=setup.processes
    )
    models = {"before": bundle}
    models |= {f"after ({name})": load_adapter(bundle, file) for name, file in adapters.items()}
    results, originals = {}, {}
    for prompts, part in product(concepts, ("test", "train")):
        key = part if len(concepts) == 1 else f"{prompts.name}, {part}"
        # without unseen prompts, as in a text file, those of finetuning are all there is
        n = recipe.eval_images if part == "test" or not prompts.test else recipe.eval_images_train
        for label, model in models.items() if n and getattr(prompts, part) else ():
            named = NAMED_IMAGES if part == "test" else 0
            report, seen = evaluate(how, model, prompts, part, n, label, named)
            originals.setdefault(key, seen)
            report |= {} if label == "before" else likeness(seen, originals[key])
            results.setdefault(label, {})[key] = report
            if setup.processes.first:
                print("\n  ".join([f"{label}:", *lines(report)]))
                write_json(folder / SO_FAR, results)  # what there is, should the run be stopped
    if setup.processes.first:
        write_json(folder / "evaluation.json", results)
        (folder / SO_FAR).unlink(missing_ok=True)
        texts = tuple(prompt for prompts in concepts for prompt in (prompts.test or prompts.train))
        _before_after_grid(how, models, evenly(texts, GRID[0]), folder / "before_after.png")
    return results


def _before_after_grid(how, models, prompts, path):
    """One row of images for each prompt and model: the frozen model's row, below it the first adapter's."""
    n, models = GRID[1], dict(list(models.items())[:2])
    rows = [pictures(how, model, prompt, n) for prompt in prompts for model in models.values()]
    text = {"prompts": "\n".join(prompts), "rows": " and ".join(models) + " of each prompt, same noise"}
    save_png(grid(torch.cat(rows), n), path, {**text, "seed": str(how.seed)})


def _options(argv):
    parser = cli.Parser(
        prog="python -m fairref.evaluate", description="Measure the bias of a model's pictures."
    )
    cli.add_common(parser)
    parser.add_argument(
        "--adapter", help="a run's folder or an adapter file; without it the bundle itself is measured"
    )
    parser.add_argument(
        "--attr", help="attributes, as in train.py (None: gender, where --target is not given)"
    )
    parser.add_argument(
        "--target", action="append", help="the shares that were aimed at, as in train.py (None: equal shares)"
    )
    parser.add_argument(
        "--prompts",
        default=OCCUPATIONS,
        help="concepts, as in sports,descriptors, each measured alone, or a text file (all of it is its part train)",
    )
    parser.add_argument("--part", default="test", choices=PARTS, help="which of a concept's parts")
    parser.add_argument(
        "--num-images", "-n", type=cli.whole(1), help="images of each prompt (None: the bundle's)"
    )
    parser.add_argument(
        "--named-images",
        type=cli.whole(0),
        default=NAMED_IMAGES,
        help="images of each occupation and named class",
    )
    parser.add_argument("--steps", type=cli.whole(1, 1000), help="sampling steps (None: the bundle's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (None: the bundle's)")
    parser.add_argument("--seed", type=cli.whole(0), default=SEED, help="of the noise")
    parser.add_argument("--out", type=cli.path, help="JSON file (None: the JSON goes to stdout)")
    return parser.parse_args(argv)


def main(argv=None):
    """The command line."""
    options = _options(argv)
    if options.out and options.out.is_dir():
        raise UserError(f"--out is {options.out}, which is a folder; give a file.")
    if options.out and not options.out.parent.is_dir():
        raise UserError(f"--out is {options.out}, whose folder doesn't exist; make it first.")
    if options.out and not os.access(options.out.parent, os.W_OK):
        raise UserError(f"--out is {options.out}, whose folder can't be written to; give another.")
    bundle = load_bundle(options.weights, cli.device(options.device), cli.DTYPES[options.dtype])
    attr = options.attr or (None if options.target else "gender")
    target = wanted_target(attr, options.target, bundle.attributes, str(bundle.path))
    given = {
        "eval_steps": options.steps,
        "eval_guidance": options.guidance,
        "eval_images": options.num_images,
    }
    given = {key: value for key, value in given.items() if value is not None}
    recipe = resolve(tuple(target.classes), bundle.recipe, given, bundle.path, bundle.attributes)
    concepts = read_prompts(options.prompts, None, bundle, list(target.classes))
    for prompts in concepts:
        if not getattr(prompts, options.part):
            raise UserError(
                f"--part is {options.part}, of which {prompts.name} has no prompt; give another part."
            )
    model = bundle if options.adapter is None else load_adapter(bundle, options.adapter)
    texts = [text for prompts in concepts for text in getattr(prompts, options.part)]
    cli.warn_of_cut(bundle.tokenizer, texts, 0 if model.prefix is None else len(model.prefix))
    how = How(bundle, target, recipe.eval_steps, recipe.eval_guidance, recipe.end, options.seed)
    reports, n = {}, recipe.eval_images
    for prompts in concepts:
        named = options.named_images
        reports[prompts.name], _ = evaluate(how, model, prompts, options.part, n, named_images=named)
    text = "\n".join(line for report in reports.values() for line in lines(report))
    report = reports if len(reports) > 1 else next(iter(reports.values()))
    report = {"weights": options.weights, "adapter": options.adapter, **report}
    if options.out:
        print(text)
        write_json(options.out, report)
        print(f"written: {options.out}")
    else:
        print(text, file=sys.stderr)
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    sys.exit(cli.run(main))
