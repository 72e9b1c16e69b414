"""A run on the tiny bundle, for tests of what stands on a run."""

import numpy as np
import torch
from tiny_bundle import RESOLUTION

from fairref.bundle.recipe import resolve
from fairref.diffusion import solver
from fairref.diffusion.sampler import noise
from fairref.fairness.attributes import parse_attributes, product_target
from fairref.prompts import occupation_prompt, read_occupations
from fairref.training.loop import new_state
from fairref.training.setup import Setup
from fairref.training.step import draw_task, prompt_of

MOVED = 0.3  # standard deviation of the adapter's up: adapted images differ visibly from the frozen model's


def make_setup(bundle, attribute="gender", **recipe):
    """A run for an attribute, or for none."""
    target = product_target(parse_attributes(attribute, bundle.attributes)) if attribute else None
    prompts = (tuple(map(occupation_prompt, read_occupations(bundle.path).train)),)
    attributes = tuple(target.classes) if target else ()
    return Setup(bundle, resolve(attributes, bundle.recipe, recipe), target, prompts)


def moved(setup):
    """An adapted bundle away from its start, and its parameters."""
    model, state = new_state(setup)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in state.adapter.named_parameters():
            if "lora_down" not in name:
                p.copy_(MOVED * torch.randn(p.shape, generator=generator))
    return model, state


def drawn_by_hand(gradient, S, seed, i):
    """What a published gradient does in iteration i of S steps: the share of z's graph that enters the U-Net, the steps
    whose eps keeps its graph, and the number of steps after which the run ends in one."""
    kind, _, number = gradient.partition(":")
    steps, stop = np.random.default_rng((seed, 3, i)), np.random.default_rng((seed, 7, i))
    if kind == "last":
        return 1, set(range(S - int(number), S)), None
    if kind == "random":
        return 1, set(range(S - 1 - int(steps.integers(int(number))), S)), None
    if kind == "bernoulli":
        truncated = steps.integers(0, S, size=S, endpoint=True)
        return 1, {j for j in range(S) if not j < truncated[j]}, None
    if kind == "drtune":
        n = S - int(stop.integers(round(0.4 * S)))
        apart = n // int(number)
        first = int(steps.integers(n - (int(number) - 1) * apart))
        return 0, {first + apart * m for m in range(int(number))}, n
    return {"exact": 1, "couple": float(number or 0)}.get(kind, 0), set(range(S)), None


def images_by_hand(setup, model, i):
    """x and o of iteration i, x with the graph of the literal algorithm: for "paper" Algorithm A.1, detached U-Net
    inputs, hooks on eps, a solver that is not detached. All but networks and the solver's table is anew."""
    bundle, r = setup.bundle, setup.recipe
    N, task = r.batch, draw_task(setup, i)
    S = task.S
    prompt = setup.prompts[0][prompt_of(r.seed, i, len(setup.prompts[0]), r.group)]
    z_T = noise(r.seed, i, range(N), (4, RESOLUTION // 4, RESOLUTION // 4)).double()
    table = solver.solver_table(bundle.schedule, S, r.end)
    t = table.timesteps
    A = bundle.schedule.beta[t] / (
        bundle.schedule.alpha_bar[t].sqrt() * (1 - bundle.schedule.alpha_bar[t]).sqrt()
    )
    C = (1 / A) / torch.prod(1 / A) ** (1 / S)
    share, kept, n = drawn_by_hand(r.gradient, S, r.seed, i)

    def run(model):
        words = [model.text_encoder.embed(bundle.tokenizer([text])) for text in (prompt, "")]
        if model.soft is not None:
            words[0] = torch.cat(
                [words[0][:, :1], model.soft.prefix[None], words[0][:, 1 : -len(model.soft)]], 1
            )
        c, c_empty = (model.text_encoder(embeddings=x).expand(N, -1, -1) for x in words)
        z, previous = z_T, None
        for j in range(n or S):
            z_in = share * z + (1 - share) * z.detach()
            eps_empty, eps_prompt = model.unet(z_in, t[j], c_empty), model.unet(z_in, t[j], c)
            eps = (1 - task.guidance) * eps_empty + task.guidance * eps_prompt
            if eps.requires_grad and r.gradient == "paper":
                eps.register_hook(lambda grad, j=j: C[j] * grad)
            eps = eps if j in kept else eps.detach()
            if j + 1 == n:
                bar = bundle.schedule.alpha_bar[t[j]]
                z = (z - (1 - bar).sqrt() * eps) / bar.sqrt()
                break
            z, previous = solver.step(table, j, z, eps, previous), (z, eps)
        return torch.clamp(bundle.vae.decode(z), -1, 1)

    x = run(model)
    with torch.no_grad():
        return x, run(bundle)
