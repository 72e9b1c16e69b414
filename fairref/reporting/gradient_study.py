"""The numbers of the paper's figures 6a and 6b: the gradient of the sampling process on a bundle.

S evaluations, R runs, N images of one prompt.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.diffusion.gradient import gradient_mode
from fairref.diffusion.model import GuidedModel
from fairref.diffusion.sampler import noise, sample
from fairref.diffusion.solver import ancestral_table, solver_table
from fairref.errors import UserError
from fairref.fairness.losses import image_loss
from fairref.generation.lora import LoRALayer, adapt
from fairref.generation.rollout import (
    decode,
    embed,
    first_noise,
    guided,
    latent_shape,
    rollout,
)
from fairref.progress import Progress
from fairref.prompts import occupation_prompt
from fairref.settings import Recipe
from fairref.training.setup import Setup, Task
from fairref.training.step import sample_path, sampling_gradient

Row = dict[str, str | float | None]  # of a table of numbers: column -> value
MODES = ("exact", "paper", "solver", "none")
GUIDANCE = 3.0
STEPS = 10  # of the runs of figure 6a
CONFIDENCE = 0.9  # of the bands over runs of figure 6b
TARGET, NOISE, ADAPTER = 10_000, 20_000, 30_000  # seeds of the fixed target image, of images, of adapters


def scales(
    bundle: Bundle,
    prompt: str = occupation_prompt("pilot"),
    S: int = 100,
    R: int = 20,
    seed: int = 0,
    over: str = "c",
    guidance: float = GUIDANCE,
) -> list[Row]:
    """Return fig 6b: |R A_t B_t d eps/d theta|, |R A_t d eps/d theta|, |R d eps/d theta| by time of an ancestral run.

    R ~ N(0, 1e-4 I) stands for dL/dz_0. theta, by `over`: "c" is the text embeddings (c, c_empty), through which every
    adapter of the text encoder acts; "text_encoder" and "unet" are the LoRA there, the bundle's own where it has an
    adapter, else one at its start. The run has S strided ancestral steps, and their coefficient k_i stands for A_t
    (S = 1000: eq 3 itself). Rows: curve, t, mean and the 90 % band over the R runs.
    """
    table = ancestral_table(bundle.schedule, S)
    theta = Theta(bundle, over, prompt, guidance)
    shape = latent_shape(bundle)
    z_T = first_noise(bundle, seed, NOISE, range(R))
    w = (noise(seed, NOISE + 1 + i, range(R), shape).to(z_T) for i in range(S))
    cotangent = 1e-2 * noise(seed, NOISE - 1, range(R), shape).to(z_T)
    with torch.no_grad():
        path = list(sample(theta.model(R), table, z_T, list(w)))
    rows, v = [], cotangent  # v: dL/dz_{i+1} of the exact gradient
    with Progress(S, "figure 6b") as progress:
        for i in reversed(range(S)):
            step = (path[i].z, int(table.timesteps[i]))
            coupled, through = theta.norms(*step, float(table.q[i]) * v)  # q_i v = - A_t R B_t
            v = float(table.p[i]) * v + through
            alone, _ = theta.norms(*step, cotangent)
            for curve, values in (
                ("|R A_t B_t dε/dθ|", coupled),
                ("|R A_t dε/dθ|", abs(float(table.k[i])) * alone),
                ("|R dε/dθ|", alone),
            ):
                rows.append({"curve": curve, "t": step[1] + 1, **band(values, CONFIDENCE)})
            progress.step()
    return rows


class Theta:
    """What figure 6b differentiates by: the text embeddings, or the LoRA of a network. Raises UserError."""

    def __init__(self, bundle: Bundle, over: str, prompt: str, guidance: float):
        if over != "c" and not _lora(bundle, over):
            bundle, _ = adapt(bundle, over, generator=torch.Generator().manual_seed(ADAPTER))
        self.parameters = [] if over == "c" else _lora(bundle, over)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.bundle, self.over, self.guidance = bundle, over, guidance
        self.text_embeddings = embed(bundle, prompt)  # (2, T, d)

    def model(self, rows: int) -> GuidedModel:
        """Return the guided model with a leaf c for each of so many rows, so that each has its own gradient."""
        c, c_empty = (x.expand(rows, -1, -1) for x in self.text_embeddings.detach().split(1))
        return GuidedModel(self.bundle.unet, c, c_empty, self.guidance)

    def norms(self, z: Tensor, t: int, v: Tensor) -> tuple[np.ndarray, Tensor]:
        """Return |v^T d eps/d theta| of each row, float64, and v^T d eps/dz: z and v (R, 4, h, w), time step t."""
        at_once = 1 if self.over == "unet" else len(z)  # the U-Net sums its parameters' gradients over rows
        norms, through = [], []
        for z_part, v_part in zip(z.split(at_once), v.split(at_once), strict=True):
            timesteps = torch.full((len(z_part),), t, device=z.device)
            (dc, dc_empty, *of_unet), dz = self.model(len(z_part)).vjp(z_part, timesteps, v_part, True)
            if self.over == "unet":
                gradients = [of_unet]
            else:
                gradients = [
                    self._through_text(pair) for pair in torch.stack([dc, dc_empty], 1)
                ]  # (2, T, d) a row
            norms += [_norm(gradient) for gradient in gradients]
            through.append(dz)
        return np.array(norms), torch.cat(through)

    def _through_text(self, cotangent):
        """The cotangent of (c, c_empty) itself, or what it is of the text encoder's LoRA."""
        if self.over == "c":
            return [cotangent]
        return torch.autograd.grad(self.text_embeddings, self.parameters, cotangent, retain_graph=True)


def _lora(bundle, over):
    """The LoRA parameters of a network."""
    layers = [m for m in getattr(bundle, over).modules() if isinstance(m, LoRALayer)]
    return [layer.weight for lora in layers for layer in (lora.lora_down, lora.lora_up)]


def _norm(tensors):
    return float(torch.stack([x.double().norm() for x in tensors]).norm())


def band(values: np.ndarray, share: float = 1.0) -> dict[str, float]:
    """Return the mean, and the interval with the middle `share` of the values."""
    low, high = np.quantile(values, [(1 - share) / 2, (1 + share) / 2])
    return {"mean": float(np.mean(values)), "low": float(low), "high": float(high)}


def check_mode(name: str, S: int = STEPS) -> None:
    """Refuse a gradient that figure 6a can't compare: one that its runs are too short for, or that ends them early,
    which has another loss. Raises UserError."""
    mode = gradient_mode(name)
    if mode.takes > S or mode.stop(S, np.random.default_rng(0)) is not None:
        raise UserError(
            f"the gradient is '{name}'; figure 6a needs one of whole runs with {S} sampling steps."
        )


def descent(
    bundle: Bundle,
    prompt: str = occupation_prompt("pilot"),
    target: str = occupation_prompt("nurse"),
    modes: tuple[str, ...] = MODES,
    iterations: int = 50,
    seeds: int = 3,
    N: int = 4,
    S: int = STEPS,
    lr: float = 1e-3,
) -> list[Row]:
    """Return fig 6a: L_img to one fixed image by iteration, when a LoRA of the text encoder follows each gradient.

    The fixed image is the frozen model's for the prompt `target`. The loss is 1 - cos of CLIP features, the mean over
    N images of `prompt`. Each iteration has new noise, the same in all modes. The optimizer is AdamW, so steps do not
    depend on the gradient's size. Rows: curve (the mode), iteration, mean, smallest and largest of the seeds.
    """
    table, task = solver_table(bundle.schedule, S), Task(prompt, None, False, S, GUIDANCE)
    features: list[Callable[[Tensor], Tensor]] = [bundle.clip.encode_image]
    with torch.no_grad():
        frozen = guided(bundle, embed(bundle, target), GUIDANCE)
        o = decode(bundle, rollout(frozen, table, first_noise(bundle, TARGET, 0, [0]))[-1].z)
    losses = {mode: np.zeros((seeds, iterations)) for mode in modes}
    with Progress(len(modes) * seeds * iterations, "figure 6a") as progress:
        for mode in modes:
            for seed in range(seeds):
                generator = torch.Generator().manual_seed(ADAPTER + seed)
                model, adapter = adapt(bundle, "text_encoder", generator=generator)
                parameters = list(adapter.parameters())
                optimizer = torch.optim.AdamW(parameters, lr=lr)
                recipe = Recipe(seed=NOISE + seed, batch=N, gradient=mode)
                setup = Setup(bundle, recipe, None, ((prompt,),))
                for i in range(iterations):
                    text = embed(model, prompt)
                    drawn = sample_path(setup, model, task, text, i)
                    z_0 = drawn.path[-1].z.clone().requires_grad_(True)
                    loss = image_loss(decode(bundle, z_0), o.expand(N, -1, -1, -1), features, N).sum()
                    (g,) = torch.autograd.grad(loss, z_0)
                    gradients = sampling_gradient(setup, drawn, g, text, parameters)
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.grad = gradient
                    optimizer.step()
                    losses[mode][seed, i] = loss.item()
                    progress.step(f"{mode}, loss {loss.item():.3f}")
    return [
        {"curve": mode, "iteration": i, **band(values[:, i])}
        for mode, values in losses.items()
        for i in range(iterations)
    ]
