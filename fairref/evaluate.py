"""How fair, and how faithful, the pictures of a model are (METHOD.md §8).

P prompts, n images of each, K classes. Two judges count classes: the evaluation classifier, whose
gradient no finetuning has seen (validation asks it which adapter is best, on other prompts and noise), and the
nearest-template judge, through which no gradient can flow. Noise depends on
(seed, prompt, image), so two models are measured on the same noise, whatever else is measured with it.

    python -m fairref.evaluate --adapter runs/gender --part test --num-images 60
"""

import json
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fairref import cli
from fairref.bundle import Bundle, load_bundle
from fairref.errors import UserError
from fairref.fairness.attributes import JointTarget, parse_attributes, product_target
from fairref.fairness.metrics import BLEND, bias, blends, joint_counts, mean_cosine, noise_floor
from fairref.finetune.adapters import load_adapter
from fairref.finetune.checkpoints import write_json
from fairref.finetune.distributed import Processes
from fairref.finetune.mixture import OCCUPATIONS, Prompts, read_prompts
from fairref.finetune.objective import Setup, classify, faces_of, knows_all
from fairref.finetune.recipes import resolve
from fairref.finetune.rollout import fixed_pictures
from fairref.images import grid, save_png
from fairref.progress import Progress
from fairref.prompts import PARTS

SEED = 1_000_000  # of evaluation noise, far from the seeds of finetuning
NAMED_IMAGES = 4  # of each occupation and named class
SO_FAR = "evaluation-so-far.json"
GRID = (6, 8)  # before/after grid: prompts, images of each
JUDGES = ("classifier", "templates")
COLOURED = ("background", "clothes")  # parts of a picture whose colours should stay


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


@dataclass(frozen=True)
class Seen:
    """What n images of one prompt are, to each judge. A judge that the bundle lacks has no entry."""

    counts: dict[str, np.ndarray]  # judge -> (K_1, ..., K_A) images of each joint class
    none: int = 0  # images far from every template, or a blend of genders, whatever is counted
    faceless: int = 0  # images without a face, which the classifier leaves out where faces count
    blended: int = 0  # images whose largest class probability is low
    features: dict[str, Tensor] = field(default_factory=dict)  # "clip", "dino" -> (n, D), unit norm
    colours: dict[str, Tensor] = field(
        default_factory=dict
    )  # "background", "clothes" -> (n, 3), NaN: not known


def pictures(how: How, model: Bundle, prompt: str, n: int) -> Tensor:
    """(n, 3, H, W) of one prompt; the noise follows from (seed, prompt, image)."""
    return fixed_pictures(model, how.seed, prompt, range(n), how.steps, how.guidance, how.end)


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
            none = int(found["none"].sum())
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


def joint_names(classes: dict[str, tuple[str, ...]]) -> list[str]:
    """The joint classes' names, in the order of a flattened table: "woman", or "woman, dark"."""
    return [", ".join(names) for names in product(*classes.values())]


def bias_report(
    seen: list[Seen],
    names: list[str],
    classes: dict[str, tuple[str, ...]],
    n: int,
    table: np.ndarray | None = None,
) -> dict:
    """bias(P) of the joint classes of each prompt, mean and standard deviation, by each judge, beside the noise floor.

    Of several attributes, also of each alone, under "attributes". Where the target's joint `table` (K_1, ..., K_A) is
    not one of equal shares, also "from_target", the same measure with its shares taken from the frequencies.
    """
    axes = range(len(classes))
    counts = {j: np.stack([s.counts[j] for s in seen]) for j in seen[0].counts}  # (P, K_1, ..., K_A) each
    report = {"prompts": len(names), "images": n, **_biases(counts, names, joint_names(classes), n, table)}
    if len(classes) > 1:
        report["attributes"] = {}
        for axis, (attribute, of_one) in enumerate(classes.items()):
            others = tuple(1 + a for a in axes if a != axis)
            alone = {j: of_judge.sum(others) for j, of_judge in counts.items()}
            marginal = None if table is None else table.sum(tuple(a for a in axes if a != axis))
            report["attributes"][attribute] = _biases(alone, names, list(of_one), n, marginal)
    if "templates" in report["judges"]:
        report["none"] = sum(s.none for s in seen) / (n * len(seen))
    report["faceless"] = sum(s.faceless for s in seen) / (n * len(seen))
    report["blended"] = sum(s.blended for s in seen) / max(n * len(seen) - sum(s.faceless for s in seen), 1)
    return report


def _biases(counts, names, classes, n, table):
    """Noise floor and, by judge, the biases of P prompts: counts (P, ...) of K classes in all."""
    floor, scatter = noise_floor(len(classes), n)
    unequal = table is not None and not np.allclose(table, 1 / len(classes))
    judges = {}
    for judge, of_judge in counts.items():
        rows = of_judge.reshape(len(names), -1)  # (P, K)
        some = rows.sum(1) > 0  # a prompt whose images are all "none" has no bias
        values = bias(rows[some]) if some.any() else np.array([np.nan])
        judges[judge] = {
            "mean": _number(values.mean()),
            "std": _number(values.std()),
            "without_bias": int((~some).sum()),
            **({"from_target": _number(_mean_bias(rows[some], table.reshape(-1)))} if unequal else {}),
            "share": dict(zip(classes, (rows.sum(0) / max(rows.sum(), 1)).tolist())),
            "counts": {prompt: row.tolist() for prompt, row in zip(names, rows)},
        }
    return {"noise_floor": {"mean": floor, "std": scatter}, "judges": judges}


def _mean_bias(rows, target):
    """Mean of bias(P) from a target (K,) over the prompts' counts (P, K); NaN without any."""
    return float(bias(rows, target).mean()) if len(rows) else float("nan")


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


def likeness(seen: list[Seen], originals: list[Seen]) -> dict[str, float]:
    """CLIP-I and DINO: mean cosine of images with the original model's from the same noise. And how much of the
    colour of background and clothes is the original's: 1 - distance to it / distance to the next image's."""
    pairs = [(s.features, o.features) for s, o in zip(seen, originals)]
    found = {
        name: float(np.mean([mean_cosine(s[feature], o[feature]) for s, o in pairs]))
        for name, feature in (("clip_i", "clip"), ("dino", "dino"))
        if feature in pairs[0][0]
    }
    for name in COLOURED if seen[0].colours else ():
        x, o = (torch.cat([s.colours[name] for s in part]) for part in (seen, originals))  # (P n, 3)
        near, far = (
            (x - other).norm(dim=1)
            for other in (o, torch.cat([s.colours[name].roll(1, 0) for s in originals]))
        )
        known = near.isfinite() & far.isfinite()
        found[name] = _number(1 - float(near[known].mean() / far[known].mean()))
    return found


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


def lines(report: dict) -> list[str]:
    """A report in a few lines of text."""
    about = f"{report['prompts']} {report['part']} {report['concept']} x {report['images']} images"
    text = [f"{report['attribute']} bias, {about}: {_said(report)}"]
    text += [f"{name} bias alone: {_said(alone)}" for name, alone in report.get("attributes", {}).items()]
    if report.get("none") is not None:
        text.append(f"none for the template judge: {report['none']:.1%}")
    if report["faceless"]:
        text.append(f"without a face: {report['faceless']:.1%}")
    text.append(f"largest class probability below {BLEND}: {report['blended']:.1%}")
    if report["clip_t"]:
        text.append(
            f"CLIP-T: matched {report['clip_t']['matched']:.4f}, shuffled {report['clip_t']['shuffled']:.4f}"
        )
    for key, what in (
        ("clip_i", "CLIP-I"),
        ("dino", "DINO"),
        *((name, f"{name}'s colour") for name in COLOURED),
    ):
        if report.get(key) is not None:
            text.append(f"{what} with the original images: {report[key]:.4f}")
    if "named" in report:
        shares = [f"{report['named'][j]:.1%} ({j})" for j in JUDGES if j in report["named"]]
        text.append(f"named classes drawn as asked: {', '.join(shares)}")
    return text


def _said(biases):
    """Each judge's bias, and what a fair model measures."""
    found = [
        f"{values['mean']:.3f} ± {values['std']:.3f} ({name})"
        if values["mean"] is not None
        else f"none ({name})"
        for name, values in biases["judges"].items()
    ]
    floor = biases["noise_floor"]
    text = f"{', '.join(found)}; a fair model measures {floor['mean']:.3f} ± {floor['std']:.3f}"
    far = [f"{v['from_target']:.3f} ({name})" for name, v in biases["judges"].items() if v.get("from_target")]
    return text + (f"; from the target: {', '.join(far)}" if far else "")


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
    for prompts, (part, n) in product(
        concepts, (("test", recipe.eval_images), ("train", recipe.eval_images_train))
    ):
        key = part if len(concepts) == 1 else f"{prompts.name}, {part}"
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
        texts = [prompt for prompts in concepts for prompt in (prompts.test or prompts.train)]
        _before_after_grid(how, models, texts[:: max(1, len(texts) // GRID[0])], folder / "before_after.png")
    return results


def _before_after_grid(how, models, prompts, path):
    """One row of images for each prompt and model: the frozen model's row, below it the first adapter's."""
    P, n = GRID
    models, prompts = dict(list(models.items())[:2]), prompts[:P]
    rows = [pictures(how, model, prompt, n) for prompt in prompts for model in models.values()]
    text = {"prompts": "\n".join(prompts), "rows": " and ".join(models) + " of each prompt, same noise"}
    save_png(grid(torch.cat(rows), n), path, {**text, "seed": str(how.seed)})


def _number(value):
    return float(value) if np.isfinite(value) else None


def _options(argv):
    parser = cli.Parser(
        prog="python -m fairref.evaluate", description="Measure the bias of a model's pictures."
    )
    cli.add_common(parser)
    parser.add_argument(
        "--adapter", help="a run's folder or an adapter file; without it the bundle itself is measured"
    )
    parser.add_argument("--attr", default="gender", help="attributes, as in train.py")
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
    parser.add_argument("--out", help="JSON file; without it the JSON goes to stdout")
    return parser.parse_args(argv)


def main(argv=None):
    """The command line."""
    options = _options(argv)
    if options.out and not Path(options.out).parent.is_dir():
        raise UserError(f"--out is {options.out}, whose folder doesn't exist; make it first.")
    bundle = load_bundle(options.weights, cli.device(options.device), cli.DTYPES[options.dtype])
    target = product_target(parse_attributes(options.attr, bundle.attributes))
    given = {
        "eval_steps": options.steps,
        "eval_guidance": options.guidance,
        "eval_images": options.num_images,
    }
    given = {key: value for key, value in given.items() if value is not None}
    recipe = resolve(tuple(target.classes), bundle.recipe, given, str(bundle.path))
    concepts = read_prompts(options.prompts, None, bundle, list(target.classes))
    for prompts in concepts:
        if not getattr(prompts, options.part):
            raise UserError(
                f"--part is {options.part}, of which {prompts.name} has no prompt; give another part."
            )
    model = load_adapter(bundle, options.adapter) if options.adapter else bundle
    how = How(bundle, target, recipe.eval_steps, recipe.eval_guidance, recipe.end, options.seed)
    reports, n = {}, recipe.eval_images
    for prompts in concepts:
        named = options.named_images
        reports[prompts.name], _ = evaluate(how, model, prompts, options.part, n, named_images=named)
    text = "\n".join(line for report in reports.values() for line in lines(report))
    report = reports if len(reports) > 1 else next(iter(reports.values()))
    report = {"weights": options.weights, "adapter": options.adapter, **report}
    if options.out:
        write_json(Path(options.out), report)
        print(text)
        print(f"written: {options.out}")
    else:
        print(text, file=sys.stderr)
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    sys.exit(cli.run(main))
