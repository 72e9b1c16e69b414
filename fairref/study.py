"""The gradient of the sampling process on a bundle, as numbers: figures 6a and 6b of the source.

    python -m fairref.verify --figures DIR

S evaluations, R runs, N images of one prompt; everything is by gradient mode.
"""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fairref.diffusion.gradient import adjusted_gradient, exact_gradient, step_weights, vjp
from fairref.diffusion.sampler import noise, sample
from fairref.diffusion.solver import ancestral_table, solver_table
from fairref.fairness.losses import image_loss
from fairref.finetune.adapters import adapt
from fairref.finetune.rollout import decode, embed, first_noise, latent_shape, rollout
from fairref.progress import Progress
from fairref.prompts import occupation_prompt

MODES = ("exact", "paper", "solver", "none")
GUIDANCE = 3.0
CONFIDENCE = 0.9  # of the bands over runs of figure 6b
TARGET, NOISE, ADAPTER = 10_000, 20_000, 30_000  # seeds of the fixed target image, of images, of adapters


def scales(
    bundle, prompt: str = occupation_prompt("pilot"), S: int = 100, R: int = 20, seed: int = 0
) -> list[dict]:
    """Fig 6b: |R A_t B_t d eps/d c|, |R A_t d eps/d c|, |R d eps/d c| at each time of an ancestral run.

    R ~ N(0, 1e-4 I) stands for dL/dz_0. The gradient is that to the text embeddings (c, c_empty), through
    which every adapter of the text encoder acts. S strided ancestral steps, whose coefficient k_i stands for
    A_t (S = 1000: eq 3 itself). Rows: curve, t, mean and the 90 % band over the R runs."""
    table = ancestral_table(bundle.schedule, S)
    c, c_empty = embed(bundle, prompt).detach().split(1)
    c, c_empty = (x.expand(R, -1, -1) for x in (c, c_empty))  # a leaf an image, so a norm an image
    shape = latent_shape(bundle)
    z_T = first_noise(bundle, seed, NOISE, range(R))
    w = (noise(seed, NOISE + 1 + i, range(R), shape).to(z_T) for i in range(S))
    cotangent = 1e-2 * noise(seed, NOISE - 1, range(R), shape).to(z_T)
    with torch.no_grad():
        path = list(sample(bundle.unet, table, z_T, c, c_empty, GUIDANCE, list(w)))

    def pull(i: int, v: Tensor, wrt_z: bool) -> tuple[np.ndarray, Tensor | None]:
        t = table.timesteps[i].expand(R).to(v.device)
        dc, dc_empty, dz = vjp(
            bundle.unet, path[i].z, t, v, c, c_empty, GUIDANCE, list(range(R)), wrt_z=wrt_z
        )
        return torch.stack([dc, dc_empty]).flatten(2).norm(dim=(0, 2)).double().numpy(), dz

    rows, v = [], cotangent  # v: dL/dz_{i+1} of the exact gradient
    with Progress(S, "figure 6b") as progress:
        for i in reversed(range(S)):
            coupled, through = pull(i, float(table.q[i]) * v, True)  # q_i v = - A_t R B_t
            v = float(table.p[i]) * v + through
            alone, _ = pull(i, cotangent, False)
            t = int(table.timesteps[i]) + 1
            for curve, values in (
                ("|R A_t B_t dε/dc|", coupled),
                ("|R A_t dε/dc|", abs(float(table.k[i])) * alone),
                ("|R dε/dc|", alone),
            ):
                rows.append({"curve": curve, "t": t, **band(values, CONFIDENCE)})
            progress.step()
    return rows


def band(values: np.ndarray, share: float = 1.0) -> dict[str, float]:
    """Mean, and the interval that holds the middle `share` of the values."""
    low, high = np.quantile(values, [(1 - share) / 2, (1 + share) / 2])
    return {"mean": float(np.mean(values)), "low": float(low), "high": float(high)}


def descent(
    bundle,
    prompt: str = occupation_prompt("pilot"),
    target: str = occupation_prompt("nurse"),
    modes: tuple[str, ...] = MODES,
    iterations: int = 50,
    seeds: int = 3,
    N: int = 4,
    S: int = 10,
    lr: float = 1e-3,
) -> list[dict]:
    """Fig 6a: L_img to one fixed image by iteration, when the text encoder's LoRA follows each gradient.

    The image is the frozen model's of the prompt `target`; loss 1 - cos of CLIP features, mean over N images
    of `prompt`, new noise at every iteration, the same in all modes. AdamW, whose steps do not depend on the
    gradient's size. Rows: curve (the mode), iteration, mean, smallest and largest of the seeds."""
    table = solver_table(bundle.schedule, S)
    features: list[Callable] = [bundle.clip.encode_image]
    c, c_empty = embed(bundle, target).split(1)
    with torch.no_grad():
        o = decode(
            bundle, rollout(bundle, table, first_noise(bundle, TARGET, 0, [0]), c, c_empty, GUIDANCE)[-1].z
        )
    found = {mode: np.zeros((seeds, iterations)) for mode in modes}
    with Progress(len(modes) * seeds * iterations, "figure 6a") as progress:
        for mode in modes:
            for seed in range(seeds):
                generator = torch.Generator().manual_seed(ADAPTER + seed)
                model, adapter = adapt(bundle, "text_encoder", generator=generator)
                parameters = list(adapter.parameters())
                optimizer = torch.optim.AdamW(parameters, lr=lr)
                for i in range(iterations):
                    both = embed(model, prompt)
                    c, c_empty = both.detach().split(1)
                    z_T = first_noise(bundle, NOISE + seed, i, range(N))
                    path = rollout(bundle, table, z_T, c, c_empty, GUIDANCE)
                    z_0 = path[-1].z.clone().requires_grad_(True)
                    loss = image_loss(decode(bundle, z_0), o.expand(N, -1, -1, -1), features, N).sum()
                    (g,) = torch.autograd.grad(loss, z_0)
                    if mode == "exact":
                        dc, dc_empty, _ = exact_gradient(bundle.unet, table, path, g, c, c_empty, GUIDANCE)
                    else:
                        w = step_weights(bundle.schedule, table, mode)
                        dc, dc_empty = adjusted_gradient(bundle.unet, table, w, path, g, c, c_empty, GUIDANCE)
                    gradients = torch.autograd.grad(both, parameters, torch.cat([dc, dc_empty]))
                    for parameter, gradient in zip(parameters, gradients):
                        parameter.grad = gradient
                    optimizer.step()
                    found[mode][seed, i] = loss.item()
                    progress.step(f"{mode}, loss {loss.item():.3f}")
    return [
        {"curve": mode, "iteration": i, **band(values[:, i])}
        for mode, values in found.items()
        for i in range(iterations)
    ]


def by_curve(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each curve, in the order of the curves."""
    return {
        name: [row for row in rows if row["curve"] == name]
        for name in dict.fromkeys(r["curve"] for r in rows)
    }


def write_csv(path: Path, rows: list[dict]) -> None:
    """One line a row, the keys of the first as heads."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
