"""Ways of training that fairref has not, to be screened: what one of them is worth decides whether it comes in.

    python tests/benchmarks/variants.py align=0.1,up=4 --attr gender ...        (else as train.py)

align=L    L_align's part of the gradient is shortened to the length L, the other terms' is left as it is. With
           --clip 0 nothing else is shortened.
image=L    Each image's own gradient at the end of its path, dL/dz_0, is shortened to the length L.
every=K    The original's pictures are drawn in every K-th iteration alone, where L_img weighs K times as much. In the
           others there is no L_img, and a face is compared with itself.
sum=K      One step of the optimizer takes the mean of K iterations' gradients, each shortened to --clip. Such a run
           can't be resumed.
up=R       LoRA+: the learning rate of up is R times that of down (Hayou et al., arXiv 2402.12354).
replay=P   with the chance P a neutral prompt is one of the eighth of those seen, at least 16, that were last most
           biased, or its neighbour in the list. Neighbours lean opposite ways, and each has the chance of a half.
length=L   after each iteration each soft token has the length L; those of the small vocabulary have a median of 4.70.
words=K    a soft prompt starts as words, those of row K of STARTS, in place of random tokens.
asked=1    the metrics say how many images of a batch are asked to show another class.
empty=W    a penalty: W times the squared change of the empty prompt's embedding, as a share of its own square.
leaning=K  a world whose unconditional model leans: row K of LEANING is in the place of the empty prompt.
A run that was stopped goes on with the same words before --resume.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps

import numpy as np
import torch

from fairref.bundle.loading import Bundle
from fairref.commands import cli
from fairref.commands.train import main
from fairref.errors import UserError
from fairref.generation import lora
from fairref.tools.balance import asked_images
from fairref.training import loop, run, step, terms
from fairref.training.checkpoints import METRICS
from fairref.training.scores import seen_by_losses

REPLAY = 100  # a stream of random numbers of its own, beside those of training/step.py
EIGHTH = 8


def align(longest: float) -> None:
    """L_align's gradient and the other terms' apart: its length is at most `longest`."""

    def parts(setup, model, parameters, i, watch=None):
        task = step.draw_task(setup, i)
        text = step.embed(model, task.prompt)
        drawn = step.sample_path(setup, model, task, text, i)
        pair = step.draw_pair(setup, model, task, text, drawn)
        targets = step.transport_targets(setup, task, pair, i)
        if watch:
            raise UserError("align: shows its parts to nobody; leave out asked and --scores.")
        if targets is None:
            return [torch.full_like(p, torch.nan) for p in parameters], {"prompt": task.prompt}
        q, said = targets
        gradients, about = [], {"prompt": task.prompt, "S": task.S, "guidance": task.guidance, "loss": 0.0}
        for pulls in (True, False):
            terms.terms_of = lambda of, pulls=pulls: {
                name: partial(with_graph, term)
                for name, term in whole(of).items()
                if (name == "align") == pulls
            }
            g, sums = terms.image_gradient(setup, task, pair, q)
            found = dict(zip(terms.sums_of(setup), sums.tolist(), strict=True))
            terms.terms_of = whole
            about |= {**found, "loss": about["loss"] + found["loss"]}
            text = step.embed(model, task.prompt)  # a graph for each
            sampled = step.draw_terms(setup, drawn, g, i)
            gradients.append(step.sampling_gradient(setup, sampled, g, text, parameters))
        pull, others = gradients
        length = float(torch.cat([g.flatten() for g in pull]).norm())
        scale = min(1.0, longest / (length + 1e-12))
        gradient = [scale * a + b for a, b in zip(pull, others, strict=True)]
        return gradient, {**about, **said, "align_norm": length}

    whole = terms.terms_of
    loop.iteration_gradient = parts


def with_graph(term: Callable, view: terms.View) -> terms.Values:
    """A term's values, also where no image has a face for it."""
    values, weight = term(view)
    return values + 0 * view.x.flatten(1).sum(1), weight


def image(longest: float) -> None:
    """dL/dz_0 of an image is at most `longest`."""
    image_gradient = step.image_gradient

    def shortened(*of):
        g, sums = image_gradient(*of)
        lengths = g.flatten(1).norm(dim=1).view(-1, *[1] * (g.dim() - 1))
        return g * (longest / (lengths + 1e-12)).clamp(max=1), sums

    step.image_gradient = shortened


def every(period: float) -> None:
    """L_img, and the frozen model's path, in one of `period` iterations."""
    gradient_of, draw_pair, row = loop.iteration_gradient, step.draw_pair, terms.TERMS["image"]

    def weighed(view):
        values, weight = row.values(view)
        return values, weight * period

    def none(view):
        return 0 * view.x.flatten(1).sum(1), 1.0

    def alone(setup, model, task, text, drawn):
        with torch.no_grad():
            z_0 = drawn.path[-1].z
            x = terms.map_batches(
                lambda part: terms.decode(setup.bundle, part), z_0, setup.recipe.micro_batch
            )
            return terms.judged_pair(setup, z_0, x, x)

    def by_turns(setup, model, parameters, i, watch=None):
        due = i % int(period) == 0
        step.draw_pair = draw_pair if due else alone
        terms.TERMS["image"] = replace(row, values=weighed if due else none)
        return gradient_of(setup, model, parameters, i, watch)

    loop.iteration_gradient = by_turns


def summed(iterations: float) -> None:
    """A step of the optimizer for several prompts, so that what opposite leans ask of all prompts alike cancels."""
    update, kept, seen = loop.update, [], set()

    def of_several(recipe, state, gradient):
        # a checkpoint has neither what was summed nor how often Adam stepped
        if state.iteration and not seen:
            raise UserError("sum: such a run can't be resumed; make it anew.")
        seen.add(state.iteration)
        norm = float(torch.cat([g.flatten() for g in gradient]).norm())
        kept.append([g * loop.clip_scale(recipe, norm) for g in gradient])
        if len(kept) < iterations:
            state.iteration += 1
            state.updates += 1  # all of a checkpoint's iterations but those whose gradient was not finite
            return norm, True
        mean = [sum(parts) / len(kept) for parts in zip(*kept, strict=True)]
        kept.clear()
        update(replace(recipe, clip=0.0), state, mean)
        return norm, True

    loop.update = of_several


class Plus(torch.optim.AdamW):
    """AdamW whose groups' learning rates are multiplied by their `ratio`."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] *= group["ratio"]
        return super().step(closure)


def up(ratio: float) -> None:
    """LoRA+."""
    new_state = loop.new_state

    def with_groups(setup):
        model, state = new_state(setup)
        (group,) = state.optimizer.param_groups
        ups = [p for name, p in state.parameters().items() if name.endswith("lora_up.weight")]
        rest = [p for p in group["params"] if not any(p is one for one in ups)]
        kept = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        groups = [{"params": rest, "ratio": 1.0}, {"params": ups, "ratio": ratio}]
        state.optimizer = Plus(groups, **kept)
        return model, state

    loop.new_state = with_groups


def replay(chance: float) -> None:
    """Prompts that lean come again sooner. What is known of them is what iterations before this one have measured."""
    draw_task, iterate, finetune, known = step.draw_task, loop.iterate, run.finetune, []

    def drawn(setup, i):
        task = draw_task(setup, i)
        rng = np.random.default_rng((setup.recipe.seed, REPLAY, i))
        last = {prompt: bias for iteration, prompt, bias in known if iteration < i}
        if task.explicit or rng.random() >= chance or len(last) < 2 * EIGHTH:
            return task
        worst = sorted(last, key=last.get)[len(last) * (EIGHTH - 1) // EIGHTH :]
        prompts = setup.prompts[0]
        place = prompts.index(worst[rng.integers(len(worst))]) ^ int(rng.integers(2))
        return task._replace(prompt=prompts[min(place, len(prompts) - 1)])

    def remember(metrics):
        if metrics.get("bias") is not None:
            known.append((metrics["iteration"], metrics["prompt"], metrics["bias"]))
        return metrics

    def going_on(setup, folder, info):
        lines = (folder / METRICS).read_text().splitlines() if (folder / METRICS).exists() else []
        for line in lines:
            remember(json.loads(line))
        return finetune(setup, folder, info)

    step.draw_task = drawn
    loop.iterate = wraps(iterate)(lambda *of: remember(iterate(*of)))
    run.finetune = going_on


def asked(_: float) -> None:
    """How often eq 6 asks anything."""
    gradient_of = loop.iteration_gradient

    def counted(setup, model, parameters, i, watch=None):
        asks = []

        def see(task, drawn, pair, q, g, gradient):
            asks.append(int(asked_images(seen_by_losses(setup, pair, q), q).sum()))
            if watch:
                watch(task, drawn, pair, q, g, gradient)

        gradient, metrics = gradient_of(setup, model, parameters, i, see)
        return gradient, metrics | ({"asked": asks[0]} if asks else {})

    loop.iteration_gradient = counted


def length(wanted: float) -> None:
    """Soft tokens on a sphere."""
    update = loop.update

    def held(recipe, state, gradient):
        found = update(recipe, state, gradient)
        for name, tokens in state.parameters().items():
            if name in TOKENS:
                tokens.data *= wanted / tokens.data.norm(dim=-1, keepdim=True)
        return found

    loop.update = held


def words(row: float) -> None:
    """Soft prompts that start as words."""

    def start(bundle, tokens, generator=None):
        chosen = (STARTS[int(row)].split() * tokens)[:tokens]
        ids = bundle.tokenizer([" ".join(chosen)])[0, 1 : 1 + tokens]
        return bundle.text_encoder.embed(ids).detach().float()

    lora.first_tokens = start


def empty(weight: float) -> None:
    """c_empty held back."""
    gradient_of = loop.iteration_gradient

    def with_penalty(setup, model, parameters, i, watch=None):
        gradient, metrics = gradient_of(setup, model, parameters, i, watch)
        c_empty, own = (step.embed(of, "")[1] for of in (model, setup.bundle))
        penalty = weight * (c_empty - own).square().sum() / own.square().sum()
        pull = torch.autograd.grad(penalty, parameters)
        return [a + b for a, b in zip(gradient, pull, strict=True)], {
            **metrics,
            "empty": float(penalty.detach()),
        }

    loop.iteration_gradient = with_penalty


class Another(torch.nn.Module):
    """A text encoder that reads another prompt than the empty one."""

    def __init__(self, encoder: torch.nn.Module, ids: torch.Tensor, empty: torch.Tensor):
        super().__init__()
        self.encoder, self.ids, self.empty, self.config = encoder, ids, empty, encoder.config

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.encoder(torch.where((ids == self.empty).all(1, keepdim=True), self.ids, ids))


def leaning_world(bundle: Bundle, row: float, model: Bundle | None = None) -> Bundle:
    """The bundle, or an adapted `model` of it, with that prompt in the place of the empty one."""
    ids, none = bundle.tokenizer([LEANING[int(row)], ""])
    model = model or bundle
    read_by = Another(model.empty_encoder or model.text_encoder, ids, none)
    whose = "frozen" if model.empty_encoder else "own"
    known = (f"leaning {LEANING[int(row)]}, {whose}", 1.0)  # to what is kept
    return replace(model, empty_encoder=read_by, adapters=(*model.adapters, known))


def leaning(row: float) -> None:
    """Both models draw in that world."""
    new_state, finetune = loop.new_state, run.finetune

    def in_world(setup):
        model, state = new_state(setup)
        return leaning_world(model, row), state

    def started(setup, folder, info):
        return finetune(replace(setup, bundle=leaning_world(setup.bundle, row)), folder, info)

    def of_plain(setup):  # the adapter goes into the bundle as it is
        return in_world(replace(setup, bundle=replace(setup.bundle, empty_encoder=None)))

    loop.new_state, run.finetune = of_plain, started


LEANING = ("a photo of the face of a carpenter, a person",)
TOKENS = ("prefix", "suffix", "deep", "generated.tokens")
STARTS = ("photo of a person ,", "woman man person woman man")
VARIANTS = {
    "asked": asked,
    "empty": empty,
    "every": every,
    "leaning": leaning,
    "length": length,
    "words": words,
    "align": align,
    "image": image,
    "sum": summed,
    "up": up,
    "replay": replay,
}


def put(words: str) -> None:
    """Puts "align=0.1,up=4" in place."""
    for word in words.split(","):
        name, _, value = word.partition("=")
        VARIANTS[name](float(value))


if __name__ == "__main__":
    put(sys.argv[1])
    sys.exit(cli.run(main, sys.argv[2:]))
