"""One training loop for every network of the small world: resumable, seeded by (seed, stage, step)."""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fairref.progress import Progress


def generator_for(seed: int, stage: str, step: int) -> torch.Generator:
    """The randomness of one step, so that a resumed stage draws what an uninterrupted one draws."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {stage} {step}".encode()))


def learning_rate(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """Linear warm-up, then half a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class Training:
    """A stage under way: the network, its optimizer, the moving average of its weights, and the steps done."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    step: int = 0

    def restore(self, file: Path) -> None:
        """Go on from a stage file, if it is there."""
        if file.exists():
            state = torch.load(file, weights_only=True)
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step = state["average"], state["step"]

    def save(self, file: Path) -> None:
        """Write a stage file whole or not at all."""
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        temporary = file.with_suffix(".tmp")
        torch.save({**state, "average": self.average, "step": self.step}, temporary)
        temporary.replace(file)

    def update(self, loss: Tensor, lr: float, ema: float, clip: float) -> None:
        """One step of the optimizer and of the average, whose decay rises to `ema`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), clip)
        self.optimizer.step()
        self.step += 1
        decay = min(ema, self.step / (self.step + 9))
        for name, value in self.network.state_dict().items():
            if value.dtype.is_floating_point:
                self.average[name].lerp_(value, 1 - decay)
            else:
                self.average[name].copy_(value)


def fit(
    stage: str,
    network: nn.Module,
    loss_of: Callable[[nn.Module, torch.Generator], Tensor],
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
    """AdamW on `loss_of(network, generator)`, a scalar; returns the moving average of `network`, in eval mode.

    Progress goes to stderr. `folder/STAGE.pt` holds the state; a later call goes on from it.
    """
    file = folder / f"{stage}.pt"
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
    )
    training = Training(network, optimizer, {k: v.detach().clone() for k, v in network.state_dict().items()})
    training.restore(file)
    network.train()
    with Progress(steps, stage, done=training.step) as progress:
        while training.step < steps:
            loss = loss_of(network, generator_for(seed, stage, training.step))
            training.update(loss, learning_rate(training.step, steps, lr), ema, clip)
            progress.step(f"loss {loss.item():.4f}")
            if training.step % save_every == 0 or training.step == steps:
                training.save(file)
    network.load_state_dict(training.average)
    return network.eval()
