"""The training loop of every network of the small world: resumable, seeded by (seed, stage, step)."""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fairref.progress import Progress

Network = TypeVar("Network", bound=nn.Module)


def generator_for(seed: int, stage: str, step: int) -> torch.Generator:
    """Return the generator of one step, so that a resumed stage draws the same as an uninterrupted one."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {stage} {step}".encode()))


def learning_rate(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """Return the rate of a step: linear warm-up, then half a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class Training:
    """The state of a stage: the network, its optimizer, the moving average of its weights, and the steps done."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    step: int = 0

    def restore(self, file: Path) -> None:
        """Load the state from a stage file, if it is there."""
        if file.exists():
            state = torch.load(file, weights_only=True)
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step = state["average"], state["step"]

    def save(self, file: Path) -> None:
        """Write a stage file under a temporary name, then rename it."""
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        temporary = file.with_suffix(".tmp")
        torch.save({**state, "average": self.average, "step": self.step}, temporary)
        temporary.replace(file)

    def update(self, loss: Tensor, lr: float, ema: float, clip: float) -> None:
        """Make one step of the optimizer and of the moving average. The average's decay rises to `ema`."""
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
    network: Network,
    loss_of: Callable[[Network, torch.Generator], Tensor],
    *,
    steps: int,
    lr: float,
    folder: Path,
    seed: int = 0,
    ema: float = 0.0,
    weight_decay: float = 1e-2,
    clip: float = 1.0,
    save_every: int = 100,
) -> Network:
    """Minimise the scalar `loss_of(network, generator)` with AdamW; return the network, averaged, in eval mode.

    The progress is shown on stderr. `folder/STAGE.pt` holds the state, and a later call goes on from it.
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
