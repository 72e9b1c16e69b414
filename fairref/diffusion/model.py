"""The guided model: all that the sampler and the gradient know of a network.

B rows, T tokens, d width. c is the prompt's text embedding, c_empty that of the empty or negative prompt: (1, T, d),
the same for all images, or (B, T, d).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

# float16: a cotangent is brought to a largest entry in [8, 16) by a power of two. That leaves 2^12 / s upwards
# before 65504 and 2^27 downwards before 2^-24, and what a U-Net does to a cotangent is mostly to shrink it.
HALF_PEAK = 16.0

Grads = tuple[list[Tensor], Tensor | None]
VJP = Callable[[Tensor], Grads]  # of v


class Model(Protocol):
    """Any noise prediction. Its leaves are the tensors that gradients are asked for."""

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors theta that eps depends on, in the order of `vjp`'s results."""

    def eps(self, z: Tensor, t: int | Tensor) -> Tensor:
        """eps(z, t) shaped as z (B, ...), for a time step t or one a row (B,)."""

    def vjp(self, z: Tensor, t: int | Tensor, v: Tensor, wrt_z: bool = False) -> Grads:
        """v^T d eps/d(leaves), summed over rows, and v^T d eps/dz where `wrt_z`, else None. Grad mode must be on."""


def guide(eps_empty: Tensor, eps_prompt: Tensor, s: float) -> Tensor:
    """Classifier-free guidance: eps = eps_empty + s (eps_prompt - eps_empty)."""
    return eps_empty + s * (eps_prompt - eps_empty)


@dataclass(frozen=True)
class GuidedModel:
    """A U-Net with classifier-free guidance of scale s. Leaves: c, c_empty, and what of the U-Net requires grad.

    At s = 1 the empty branch has no weight and is left out; c_empty may then be None. Where `fixed_empty`, all of its
    branch is a constant: it has no graph, and c_empty's gradient is zero, unless dz is asked for.
    """

    unet: nn.Module
    c: Tensor
    c_empty: Tensor | None
    s: float
    fixed_empty: bool = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What of the U-Net requires grad."""
        return [parameter for parameter in self.unet.parameters() if parameter.requires_grad]

    @property
    def texts(self) -> list[Tensor]:
        """[c, c_empty if there is one]."""
        return [self.c, *([] if self.c_empty is None else [self.c_empty])]

    @property
    def leaves(self) -> list[Tensor]:
        """[*texts, *parameters]."""
        return [*self.texts, *self.parameters]

    def eps(self, z: Tensor, t: int | Tensor) -> Tensor:
        """The guided noise prediction (B, 4, h, w) in the dtype of z; the U-Net computes in its own."""
        return self._eps(z, t, self.texts)

    def vjp(self, z: Tensor, t: int | Tensor, v: Tensor, wrt_z: bool = False) -> Grads:
        """v^T d eps/d(leaves), at least float32, and v^T d eps/dz: z (B, 4, h, w), which is a constant unless `wrt_z`.

        The cotangent of the empty branch is (1 - s) v, that of the prompt's branch s v.
        """
        if self.fixed_empty and not wrt_z:  # its branch need not be evaluated
            return replace(self, s=1.0, fixed_empty=False).vjp(z, t, self.s * v)
        return self.kept(z, t, wrt_z)[1](v)

    def kept(self, z: Tensor, t: int | Tensor, wrt_z: bool = False) -> tuple[Tensor, VJP]:
        """`eps`, and `vjp` as a function of v alone, which serves once: the evaluation's graph is kept until then."""
        if self.fixed_empty and not wrt_z:
            eps, vjp = replace(self, s=1.0, fixed_empty=False).kept(z, t)
            s, of_empty = self.s, GuidedModel(self.unet, self.c_empty, None, 1.0)  # which makes no graph
            return guide(of_empty.eps(z.detach(), t), eps, s), lambda v: vjp(s * v)
        with torch.enable_grad():
            texts, z = [_leaf(text) for text in self.texts], z.detach().requires_grad_(wrt_z)
            eps, dtype = self._eps(z, t, texts), network_dtype(self.unet, z)
        inputs = [*texts, *self.parameters, *([z] if wrt_z else [])]

        def vjp(v: Tensor) -> Grads:  # without self, which may hold it: no cycle keeps its graph alive
            grads = scaled_vjp(eps, inputs, v, dtype)
            return grads, grads.pop().to(z.dtype) if wrt_z else None

        return eps.detach(), vjp

    def _eps(self, z, t, texts):
        """eps of z for the texts [c, c_empty]; the U-Net takes the empty branch's rows first."""
        dtype, texts = network_dtype(self.unet, z), texts[:1] if self.s == 1 else texts[::-1]
        rows = max(map(len, texts))  # 1: the U-Net reads each text once for all images
        if rows not in (1, len(z)):
            raise ValueError(
                f"text embeddings are of {rows} images; expected 1 or {len(z)}, as many as latents."
            )
        context = torch.cat([text.expand(rows, -1, -1) for text in texts]).to(dtype)
        # for torch.compile, which makes a graph for each number, t is a tensor
        t = torch.as_tensor(t, device=z.device).expand(len(z)).repeat(len(texts))
        branches = self.unet(torch.cat([z] * len(texts)).to(dtype), t, context).to(z.dtype)
        return branches if self.s == 1 else guide(*branches.chunk(2), self.s)


@dataclass(frozen=True)
class KeepingModel(GuidedModel):
    """A guided model that keeps the graph of each time step it evaluates until `vjp` asks for the same: less time, and
    memory that grows with the steps."""

    graphs: dict[int, tuple[Tensor, VJP]] = field(default_factory=dict)  # t -> z and its vjp

    def eps(self, z: Tensor, t: int) -> Tensor:
        """As `GuidedModel.eps`."""
        eps, vjp = self.kept(z, t)
        self.graphs[t] = z, vjp
        return eps

    def vjp(self, z: Tensor, t: int | Tensor, v: Tensor, wrt_z: bool = False) -> Grads:
        """As `GuidedModel.vjp`."""
        kept_z, vjp = self.graphs.pop(int(torch.as_tensor(t).flatten()[0]), (None, None))
        if wrt_z or kept_z is None or not torch.equal(kept_z, z):
            return super().vjp(z, t, v, wrt_z)
        return vjp(v)


def network_dtype(network: nn.Module, z: Tensor) -> torch.dtype:
    """The dtype the network computes in: its first parameter's, or that of z where it has none."""
    return next((parameter.dtype for parameter in network.parameters()), z.dtype)


def scaled_vjp(
    y: Tensor, inputs: Sequence[Tensor], v: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """v^T dy/d(inputs), zero for what y does not depend on. Where the network that made y computes in float16
    (`dtype`; None: y's own), v is scaled by a power of two and the results scaled back, both exactly."""
    scale = _half_scale(v) if (dtype or y.dtype) == torch.float16 else 1.0
    grads = torch.autograd.grad(y, inputs, (v * scale).to(y.dtype), allow_unused=True)
    return [
        torch.zeros_like(x) if grad is None else grad / scale for x, grad in zip(inputs, grads, strict=True)
    ]


def zeros_like(leaf: Tensor | None) -> Tensor | None:
    """A zero gradient for a leaf, at least float32."""
    if leaf is None:
        return None
    return torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))


def _leaf(c: Tensor) -> Tensor:
    """c as a graph leaf of at least float32: the sum over images and steps then happens in float32 too."""
    return c.detach().to(torch.promote_types(c.dtype, torch.float32)).requires_grad_(True)


def _half_scale(v: Tensor) -> float:
    """The power of two that brings the largest |v| into [HALF_PEAK / 2, HALF_PEAK); 1 where there is none."""
    peak = float(v.abs().max())
    if peak == 0 or not math.isfinite(peak):
        return 1.0
    return HALF_PEAK * 2.0 ** -math.frexp(peak)[1]
