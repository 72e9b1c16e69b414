"""What a soft prefix of five tokens can do at best, and why not more.

    python tests/benchmarks/prefix_limits.py RUN [--candidates 200] [--folder runs/prefix_limits]
        [--report docs/results/prefix_limits.json]

Each row is one model, judged on 12 validation occupations, 60 images of each, on the same noise:

shift           the prompt's words at the positions that a prefix gives them, without a prefix
random words    five random tokens, as a prefix starts; three draws
best words      of --candidates prefixes of real words, half of them with words for a gender, the best three: on
                finetuning prompts, 48 images of each candidate, then 176 of the best tenth
fit of c        five tokens fitted, by least squares on all finetuning prompts, to the text embeddings that RUN makes
fit of eps      five tokens fitted to RUN's noise predictions, on its own sampling paths

RUN is an adapter of the text encoder that leaves the empty prompt alone (--empty-prompt frozen), as a prefix does. The
report also says what share of RUN's change each fit explains, and what share of it is the same for all prompts. Each
stage is kept; about an hour of a core in all.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent))
from measure import ROOT, table
from result_tables import CONCEPTS
from screen import IMAGES, SHORT, mean, row_of

from fairref.bundle.loading import DEFAULT, Bundle, load_bundle
from fairref.diffusion.model import GuidedModel
from fairref.diffusion.sampler import sample
from fairref.diffusion.solver import solver_table
from fairref.evaluation.gaps import squared_gap, told
from fairref.evaluation.judging import EvaluationSettings, drawn_by, judge_prompts
from fairref.evaluation.kept import KEPT
from fairref.evaluation.parts import EXPLICIT_IMAGES, PromptPart, clip_t, compare
from fairref.evaluation.statistics import JudgedImages, counts_by_judge
from fairref.fairness.attributes import parse_attributes, product_target
from fairref.files import weights
from fairref.files.paths import only_numbers, read_json, write_json
from fairref.files.weights import fingerprint
from fairref.generation.adapters import load_adapter, read_adapter
from fairref.generation.drawing import Drawing
from fairref.generation.lora import first_tokens
from fairref.generation.rollout import embed, first_noise
from fairref.generation.soft import Prefix, eos_place, with_prefix
from fairref.progress import Progress
from fairref.prompts.sets import OCCUPATIONS, Prompts, read_prompts

P = 5  # tokens
KEPT_SHARE = 0.9  # of the original's CLIP-T, which a prefix of words must keep
STEPS, GUIDANCE, SAMPLED = 12, 2.5, 6  # of evaluation, and steps of the paths of the second fit
RATE, THIRDS = 0.05, 3  # Adam's; a step of the first fit takes a third of the prompts
SHOWN = SHORT[2:]  # columns
ORIGINAL, FITS = "original", ("fit of c", "fit of eps")
GENDERED = ("woman", "man", "female", "male", "women", "men", "person", "people")


class Shift:
    """c of a prompt whose words have the positions that P soft tokens before them would give them."""

    def __len__(self) -> int:
        return P

    def __call__(self, bundle: Bundle, ids: Tensor, plain: Tensor) -> Tensor:
        tower = bundle.text_encoder.text_model
        own = tower.embeddings.position_embedding.weight
        words = bundle.text_encoder.embed(ids)
        moved = words[1 : len(ids) - P] + own[1 + P : len(ids)] - own[1 : len(ids) - P]
        return bundle.text_encoder(embeddings=torch.cat([words[:1], moved, words[len(ids) - P :]])[None])


def with_tokens(bundle: Bundle, tokens: Tensor, name: str) -> Bundle:
    """The bundle with a prefix."""
    soft = Prefix(tokens, bundle).requires_grad_(False)
    return replace(bundle, soft=soft, adapters=((f"{name} {soft.fingerprint}", 1.0),))


@torch.no_grad()
def tokens_of(bundle: Bundle, words: Sequence[str]) -> Tensor:
    """(P, D) the embeddings of words that are one token each."""
    ids = bundle.tokenizer([" ".join(words)])[0, 1 : 1 + len(words)]
    return bundle.text_encoder.embed(ids).float()


def real_words(bundle: Bundle) -> list[str]:
    """Those of the bundle's own prompts that are one token."""
    texts = (
        text for concept in read_prompts(",".join(CONCEPTS), None, bundle.path, []) for text in concept.train
    )
    words = sorted({word for text in texts for word in re.findall("[a-z]{3,}", text.lower())})
    return one_token(bundle, words)


def one_token(bundle: Bundle, words: Sequence[str]) -> list[str]:
    """Those that are."""
    return [
        w for w, ids in zip(words, bundle.tokenizer(list(words)), strict=True) if eos_place(bundle, ids) == 2
    ]


def candidates(bundle: Bundle, count: int) -> list[list[str]]:
    """Prefixes of P words, every second with one to three words for a gender."""
    rng, words = np.random.default_rng(0), real_words(bundle)
    gendered = one_token(bundle, GENDERED)
    found = []
    for i in range(count):
        named = rng.choice(gendered, rng.integers(1, 4)) if i % 2 else []
        chosen = [*named, *rng.choice(words, P - len(named))]
        found.append([str(word) for word in rng.permutation(chosen)])
    return found


def score(
    how: EvaluationSettings, judged: Sequence[JudgedImages], prompts: Sequence[str], least: float
) -> float:
    """The squared gap without noise's part (0: fair), of a mean over prompts; infinite where pictures are lost: below a
    CLIP-T, or where more than a tenth show nobody."""
    known = sum(int(s.known("classifier").sum()) for s in judged) / sum(map(len, judged))
    if known < KEPT_SHARE or clip_t(how, judged, prompts)["matched"] < least:
        return np.inf
    counts = counts_by_judge(judged, how.target.classes)["classifier"].reshape(len(judged), -1)
    return float(squared_gap(told(counts), how.target.table.reshape(-1)).value)


def best_words(how: EvaluationSettings, concept: Prompts, count: int, folder: Path) -> list[list[str]]:
    """The best three of `count` prefixes, by halving."""
    left = candidates(how.bundle, count)
    for prompts, images, kept in ((12, 4, max(3, count // 10)), (24, 8, 3)):
        some = concept.train[:: len(concept.train) // prompts | 1][:prompts]
        scores, plain = [], judge_prompts(how, drawn_by(how, how.bundle, ORIGINAL), some, images)
        least = KEPT_SHARE * clip_t(how, plain, some)["matched"]
        for words in left:
            model = with_tokens(how.bundle, tokens_of(how.bundle, words), " ".join(words))
            source = drawn_by(how, model, " ".join(words))
            scores.append(score(how, judge_prompts(how, source, some, images), some, least))
        left = [left[i] for i in np.argsort(scores)[:kept]]
        write_json(folder / f"words-{images}.json", only_numbers({"left": left, "scores": scores}))
    return left


def aligned(c: Tensor, moved: int) -> Tensor:
    """The rows of c (1, T, D) behind BOS, which a prefix moves by P places, but for the last P, which it pushes out."""
    return c[0, 1 + moved : c.shape[1] - P + moved]


def least_squares(start: Tensor, steps: int, about: str, loss_of: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Tokens from `start` with a small loss_of(tokens, step), by Adam with a falling rate."""
    tokens = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([tokens], lr=RATE)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with Progress(steps, about) as progress:
        for i in range(steps):
            loss = loss_of(tokens, i)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            progress.step(f"{loss.item():.4g}")
    return tokens.detach()


def fit_of_c(bundle: Bundle, whole: Bundle, prompts: Sequence[str]) -> Callable[[Tensor, int], Tensor]:
    """Squared distance of the rows of c that a prefix makes of prompts and those of the adapted encoder, a prompt."""
    wanted = [aligned(embed(whole, prompt)[:1].detach(), 0) for prompt in prompts]
    words = [bundle.text_encoder.embed(ids) for ids in bundle.tokenizer(list(prompts))]

    def loss(tokens, i):
        some = range(i % THIRDS, len(prompts), THIRDS)
        c = bundle.text_encoder(embeddings=torch.cat([with_prefix(words[p], tokens) for p in some]))
        made = [aligned(c[[row]], P) for row, p in enumerate(some)]
        return sum((x - wanted[p]).square().sum() for x, p in zip(made, some, strict=True)) / len(some)

    return loss


def fit_of_eps(bundle: Bundle, whole: Bundle, prompts: Sequence[str]) -> Callable[[Tensor, int], Tensor]:
    """Mean squared distance of the noise predictions of both, at drawn steps of the adapted model's paths."""
    solver, rng = solver_table(bundle.schedule, SAMPLED), np.random.default_rng(0)

    def loss(tokens, i):
        total = 0.0
        for prompt in rng.choice(prompts, 4, replace=False).tolist():
            c, c_empty = embed(whole, prompt).detach().split(1)
            z_T = first_noise(bundle, 0, i, range(4))
            with torch.no_grad():
                step = list(sample(GuidedModel(bundle.unet, c, c_empty, GUIDANCE), solver, z_T))[
                    rng.integers(SAMPLED)
                ]
                wanted = GuidedModel(bundle.unet, c, None, 1.0).eps(step.z, step.t)
            words = bundle.text_encoder.embed(bundle.tokenizer([prompt])[0])
            own = bundle.text_encoder(embeddings=with_prefix(words, tokens))
            total = (
                total
                + (GuidedModel(bundle.unet, own, None, 1.0).eps(step.z, step.t) - wanted).square().mean()
            )
        return total / 4

    return loss


@torch.no_grad()
def explained(bundle: Bundle, whole: Bundle, tokens: Tensor, prompts: Sequence[str]) -> float:
    """The share of the adapter's squared change of c that tokens make, over the rows of `aligned`; may be negative."""
    left = change = 0.0
    for prompt in prompts:
        plain, wanted = (aligned(embed(of, prompt)[:1], 0) for of in (bundle, whole))
        made = aligned(embed(with_tokens(bundle, tokens, "fit"), prompt)[:1], P)
        left += float((made - wanted).square().sum())
        change += float((plain - wanted).square().sum())
    return 1 - left / change


@torch.no_grad()
def in_common(bundle: Bundle, whole: Bundle, prompts: Sequence[str]) -> float:
    """The share of the squared change of c at EOS that is one vector for all prompts."""
    changes = []
    for prompt in prompts:
        place = eos_place(bundle, bundle.tokenizer([prompt])[0])
        changes.append((embed(whole, prompt) - embed(bundle, prompt))[0, place])
    changes = torch.stack(changes)
    return float(changes.mean(0).square().sum() / changes.square().sum(1).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--steps", type=int, nargs=2, default=[400, 200], help="of the two fits")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "prefix_limits")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "results" / "prefix_limits.json")
    options = parser.parse_args()
    bundle = load_bundle(DEFAULT)
    whole, adapter = load_adapter(bundle, options.run), read_adapter(options.run)
    if not adapter.leaves_empty:
        print(f"{options.run}: changes the empty prompt, too, which a prefix can't", file=sys.stderr)
    options.folder.mkdir(parents=True, exist_ok=True)
    target = product_target(parse_attributes("gender", bundle.attributes))
    (concept,) = read_prompts(OCCUPATIONS, None, bundle.path, ["gender"])
    how = EvaluationSettings(bundle, target, Drawing(STEPS, GUIDANCE), kept=options.folder / KEPT)
    made_of = fingerprint(adapter.tensors)
    found = (
        read_json(options.report) if options.report.exists() else {"run": made_of, "rows": {}, "about": {}}
    )
    if found["run"] != made_of:
        parser.error(f"{options.report}: is of another adapter; give another --report")

    def say(models: dict[str, Bundle]) -> None:
        """Judges the models that have no row yet."""
        models = {ORIGINAL: bundle} | {name: of for name, of in models.items() if name not in found["rows"]}
        part = PromptPart(concept, "validation", options.images, EXPLICIT_IMAGES)
        for name, evaluated in compare(how, models, part) if len(models) > 1 else ():
            found["rows"][name] = row_of(evaluated.report)
            write_json(options.report, found)
            print(name, found["rows"][name], flush=True)

    starts = [first_tokens(bundle, P, torch.Generator().manual_seed(seed)) for seed in range(3)]
    say({"the adapter": whole, "shift": replace(bundle, soft=Shift(), adapters=(("shift", 1.0),))})
    say({f"random words, draw {i}": with_tokens(bundle, of, "random") for i, of in enumerate(starts)})
    for name, steps, fit in zip(FITS, options.steps, (fit_of_c, fit_of_eps), strict=True):
        if name not in found["rows"]:
            tokens = least_squares(starts[0], steps, name, fit(bundle, whole, concept.train))
            weights.write(options.folder / f"{name.replace(' ', '_')}.safetensors", {"prefix": tokens}, {})
            shares = (explained(bundle, whole, tokens, part) for part in (concept.train, concept.validation))
            found["about"][name] = dict(zip(("finetuning", "validation"), shares, strict=True))
            say({name: with_tokens(bundle, tokens, name)})
    found["about"]["in common"] = in_common(bundle, whole, concept.train)
    chosen = best_words(how, concept, options.candidates, options.folder)
    say({" ".join(words): with_tokens(bundle, tokens_of(bundle, words), "words") for words in chosen})
    write_json(options.report, found)
    print(lines_of(found))
    for name, about in found["about"].items():
        print(f"{name}: {about}")


def lines_of(found: dict) -> str:
    """The table."""
    return table(["model", *SHOWN], [[name, *cells(row)] for name, row in found["rows"].items()])


def cells(row: dict) -> list:
    """A row's, the bias by both judges as one."""
    values = ((key, row.get(key)) for key in SHOWN)
    return [mean([value]) if key == "bias" else value for key, value in values]


if __name__ == "__main__":
    main()
