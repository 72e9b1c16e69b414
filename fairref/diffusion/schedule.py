"""The noise schedule of the forward process (eqs 1, 2): float64 tables over all T diffusion times."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fairref.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """beta_t for t = 1..T and what follows from it. Every table is (T,) float64 on the CPU; index t - 1 holds
    time t, so the index is the scheduler's time step (0..T-1) that the U-Net is called with."""

    T: int = 1000  # number of diffusion times
    beta_start: float = 0.00085  # beta_1
    beta_end: float = 0.012  # beta_T
    kind: str = "scaled_linear"  # "scaled_linear": linear in sqrt(beta); "linear": linear in beta

    def __post_init__(self) -> None:
        if self.kind not in ("scaled_linear", "linear"):
            raise UserError(f"scheduler beta_schedule is '{self.kind}'; expected 'scaled_linear' or 'linear'")
        if self.T < 1 or not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(
                f"scheduler has num_train_timesteps {self.T}, beta_start {self.beta_start}, beta_end "
                f"{self.beta_end}; expected at least 1 time step and 0 < beta_start <= beta_end < 1"
            )

    @cached_property
    def beta(self) -> Tensor:
        """beta_t."""
        if self.kind == "linear":
            return torch.linspace(self.beta_start, self.beta_end, self.T, dtype=torch.float64)
        return torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.T, dtype=torch.float64) ** 2

    @cached_property
    def alpha(self) -> Tensor:
        """alpha_t = 1 - beta_t (not its cumulative product)."""
        return 1 - self.beta

    @cached_property
    def alpha_bar(self) -> Tensor:
        """The product of alpha_s over s <= t."""
        return self.alpha.cumprod(0)

    @cached_property
    def A(self) -> Tensor:
        """A_t = beta_t / sqrt(alpha_bar_t (1 - alpha_bar_t)): the weight of eps^(t) in z_0, eq 10."""
        return self.beta / (self.alpha_bar * (1 - self.alpha_bar)).sqrt()
