"""A run on the tiny bundle, for tests of what stands on a run."""

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


def images_by_hand(setup, model, i):
    """x and o of iteration i, x with the graph of Algorithm A.1 as it is printed: detached U-Net inputs, hooks on
    eps, a solver that is not detached; or with the whole graph. All but networks and the solver's table is anew."""
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

    def run(model):
        words = [model.text_encoder.embed(bundle.tokenizer([text])) for text in (prompt, "")]
        if model.prefix is not None:
            words[0] = torch.cat(
                [words[0][:, :1], model.prefix[None], words[0][:, 1 : -len(model.prefix)]], 1
            )
        c, c_empty = (model.text_encoder(embeddings=x).expand(N, -1, -1) for x in words)
        z, previous = z_T, None
        for j in range(S):
            z_in = z if r.gradient == "exact" else z.detach()
            eps_empty, eps_prompt = model.unet(z_in, t[j], c_empty), model.unet(z_in, t[j], c)
            eps = (1 - task.guidance) * eps_empty + task.guidance * eps_prompt
            if eps.requires_grad and r.gradient == "paper":
                eps.register_hook(lambda grad, j=j: C[j] * grad)
            z, previous = solver.step(table, j, z, eps, previous), (z, eps)
        return torch.clamp(bundle.vae.decode(z), -1, 1)

    x = run(model)
    with torch.no_grad():
        return x, run(bundle)
