"""One training loop for every network of the small world: resumable, seeded by (seed, stage, step)."""

import math
import sys
import time
import zlib
from pathlib import Path

import torch
from torch import nn


def generator_for(seed: int, stage: str, step: int) -> torch.Generator:
    """The randomness of one step, so that a resumed stage draws what an uninterrupted one draws."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {stage} {step}".encode()))


def learning_rate(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """Linear warm-up, then half a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def fit(
    stage: str,
    network: nn.Module,
    loss_of,
    *,
    steps: int,
    lr: float,
    folder: Path,
    seed: int = 0,
    ema: float = 0.0,
    weight_decay: float = 1e-2,
    clip: float = 1.0,
    save_every: int = 100,
) -> nn.Module:
    """AdamW on `loss_of(network, generator) -> scalar`; returns the moving average of `network`, in eval mode.

    Progress goes to stderr. `folder/STAGE.pt` holds the state; a later call goes on from it.
    """
    file = folder / f"{stage}.pt"
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    average = {k: v.detach().clone() for k, v in network.state_dict().items()}
    start = 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        average, start = state["average"], state["step"]
    network.train()
    smooth, began = None, time.monotonic()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        loss = loss_of(network, generator_for(seed, stage, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        decay = min(ema, (step + 1) / (step + 10)) if ema else 0.0
        for k, v in network.state_dict().items():
            if v.dtype.is_floating_point:
                average[k].lerp_(v, 1 - decay)
            else:
                average[k].copy_(v)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if (step + 1) % 20 == 0 or step + 1 == steps:
            pace = (time.monotonic() - began) / (step + 1 - start)
            print(
                f"\r{stage}: {step + 1}/{steps}  loss {smooth:.4f}  {pace:.2f} s/step  "
                f"{pace * (steps - step - 1) / 60:.1f} min left   ",
                end="",
                file=sys.stderr,
                flush=True,
            )
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average,
                "step": step + 1,
            }
            torch.save(state, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
    print(file=sys.stderr)
    network.load_state_dict(average)
    return network.eval()
