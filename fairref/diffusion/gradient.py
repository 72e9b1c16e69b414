"""The gradient of the sampling process (eqs 9, 10): adjusted (Algorithm A.1) and exact.

With the U-Net's inputs detached, z_0 = a z_T + sum_i k_i eps_i. So the adjusted gradient is a weighted sum of
vector-Jacobian products, one a step, from the stored z_i and without a graph through the sampler:

    dL/dtheta = sum_i w_i (dL/dz_0)^T d eps_i/d theta,   w_i = C_i k_i"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fairref.diffusion.sampler import Step, network_dtype
from fairref.diffusion.schedule import Schedule
from fairref.diffusion.solver import SolverTable
from fairref.errors import UserError

# float16: a cotangent is brought to a largest entry in [8, 16) by a power of two. That leaves 2^12 upwards
# before 65504 and 2^27 downwards before 2^-24, and what a U-Net does to a cotangent is mostly to shrink it.
HALF_PEAK = 16.0
LOSS_SCALES = (2.0**16, 2.0**8, 1.0)


def A_t(schedule: Schedule, table: SolverTable) -> Tensor:
    """(S,) float64: A_t of eq 10 at the table's time steps."""
    return schedule.A[table.timesteps]


def C_i(schedule: Schedule, table: SolverTable) -> Tensor:
    """(S,) float64: the standardising coefficients of Algorithm A.1, 1/A_t over their geometric mean."""
    C = 1 / A_t(schedule, table)
    return C / geometric_mean(C)


def step_weights(schedule: Schedule, table: SolverTable, standardise: str = "paper") -> Tensor:
    """(S,) float64: w_i, the weight of step i in the adjusted gradient.

    "paper": C_i k_i, Algorithm A.1 as written. "solver": -geometric_mean(|k|) for every
    step, so A_t = 1 exactly for this solver; at the end "sigma_min" this turns, from S = 15 on, the sign of
    two late steps, where k_i > 0. "none": k_i, not standardised."""
    if standardise == "paper":
        return C_i(schedule, table) * table.k
    if standardise == "solver":
        return -geometric_mean(table.k.abs()).expand(table.S).clone()
    if standardise == "none":
        return table.k.clone()
    raise UserError(f"the standardisation is '{standardise}'; expected 'paper', 'solver' or 'none'")


def subsample(w: Tensor, M: int, u: float) -> Tensor:
    """(S,) weights of M draws of steps, with probability proportional to |w_i| and the sign of w_i kept.

    u, uniform in [0, 1), is all of the chance: the draws are the points u, u + 1, ..., u + M - 1 on the line
    on which step i has the length M |w_i| / sum |w|. The expected result is w, so the gradient stays unbiased;
    all draws weigh the same, and steps that are not drawn get 0 and are not evaluated."""
    if M < 1:
        raise UserError(f"the number of gradient steps is {M}; expected at least 1")
    total = w.abs().sum()
    edge = torch.cat([w.new_zeros(1), (w.abs() * M / total).cumsum(0)])
    edge[-1] = M  # but for rounding
    points = torch.ceil(edge - u).clamp(min=0).diff()  # (S,) draws of each step
    return points * w.sign() * total / M


def geometric_mean(x: Tensor) -> Tensor:
    """exp(mean(log x)), a scalar tensor."""
    return x.log().mean().exp()


def adjusted_gradient(
    unet: nn.Module,
    table: SolverTable,
    w: Tensor,
    path: Sequence[Step],
    g: Tensor,
    c: Tensor,
    c_empty: Tensor | None,
    guidance: float,
    micro_batch: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(dL/dc, dL/dc_empty) = sum_i w_i VJP_i(g), shaped as c and c_empty, at least float32.

    w (S,): `step_weights`; steps of weight 0 are not evaluated. path: the Steps of the run; g = dL/dz_0
    (N, 4, h, w). c, c_empty: (1, T, d), where the result sums over the images, or (N, T, d). micro_batch: at
    most this many pairs of an image and a step at once; default: all images of one step.
    Parameters of the U-Net that require grad have theirs added to `.grad`. Grad mode must be on."""
    N = g.shape[0]
    size = micro_batch or N
    pairs = [(i, n) for i in range(table.S) if w[i] != 0 for n in range(N)]
    dc, dc_empty = _zeros(c), _zeros(c_empty)
    for start in range(0, len(pairs), size):
        steps, images = map(list, zip(*pairs[start : start + size]))
        z = torch.stack([path[i].z[n] for i, n in zip(steps, images)])  # (B, 4, h, w)
        v = w[steps].to(g).view(-1, 1, 1, 1) * g[images]  # (B, 4, h, w)
        t = table.timesteps[steps].to(z.device)
        part, part_empty, _ = vjp(unet, z, t, v, c, c_empty, guidance, images)
        dc = dc + part
        dc_empty = None if dc_empty is None else dc_empty + part_empty
    return dc, dc_empty


def gradient_matrix(
    unet: nn.Module,
    table: SolverTable,
    w: Tensor,
    path: Sequence[Step],
    g: Tensor,
    c: Tensor,
    c_empty: Tensor | None,
    guidance: float,
    parameters: Sequence[Tensor],
    micro_batch: int | None = None,
) -> Tensor:
    """(N, P): row n is image n's part of dL/dtheta, for the P numbers in `parameters` behind c and c_empty.

    c, c_empty: (1, T, d) with their graph, which is kept; the rest as in `adjusted_gradient`. The rows sum to
    the batch's gradient."""
    both = [x for x in (c, c_empty) if x is not None]
    rows = [None if x is None else x.detach().expand(len(g), -1, -1) for x in (c, c_empty)]
    parts = adjusted_gradient(unet, table, w, path, g, *rows, guidance, micro_batch)  # (N, T, d) each
    parts = [x.to(c.dtype) for x in parts if x is not None]
    matrix = []
    for n in range(len(g)):
        of_image = [x[n : n + 1] for x in parts]
        row = torch.autograd.grad(
            both, parameters, of_image, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        matrix.append(torch.cat([x.flatten() for x in row]))
    return torch.stack(matrix)


def importance(matrix: Tensor) -> Tensor:
    """(N,): how much each image pulls at the parameters, the norm of its row of `gradient_matrix`."""
    return torch.linalg.vector_norm(matrix, dim=1)


def exact_gradient(
    unet: nn.Module,
    table: SolverTable,
    path: Sequence[Step],
    g: Tensor,
    c: Tensor,
    c_empty: Tensor | None,
    guidance: float,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """(dL/dc, dL/dc_empty, [dL/deps_i]): eq 9 in full, as autograd through `sample` gives it, in the memory
    of one step. With v_i = dL/dz_i and e_i = dL/deps_i (for the ancestral table with S = T: -g^T A_t B_t):

        v_S = g,   e_i = q_i v_{i+1} + s_{i+1} v_{i+2},
        v_i = p_i v_{i+1} + r_{i+1} v_{i+2} + e_i^T d eps_i/d z_i

    Arguments, and the U-Net's own parameters, as in `adjusted_gradient`."""
    p, q, r, s = (x.tolist() for x in (table.p, table.q, table.r, table.s))
    images = list(range(g.shape[0]))
    dc, dc_empty = _zeros(c), _zeros(c_empty)
    v_next, v_after = g, torch.zeros_like(g)
    cotangents = []
    for i in reversed(range(table.S)):
        r_next, s_next = (r[i + 1], s[i + 1]) if i + 1 < table.S else (0.0, 0.0)
        e = q[i] * v_next + s_next * v_after
        t = table.timesteps[i].expand(len(images)).to(g.device)
        part, part_empty, through_z = vjp(unet, path[i].z, t, e, c, c_empty, guidance, images, wrt_z=True)
        dc = dc + part
        dc_empty = None if dc_empty is None else dc_empty + part_empty
        v_next, v_after = p[i] * v_next + r_next * v_after + through_z, v_next
        cotangents.insert(0, e)
    return dc, dc_empty, cotangents


def vjp(
    unet: nn.Module,
    z: Tensor,
    t: Tensor,
    v: Tensor,
    c: Tensor,
    c_empty: Tensor | None,
    guidance: float,
    images: list[int],
    wrt_z: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """v^T d eps/d(c, c_empty, z) of the guided eps at inputs z (B, 4, h, w), times t (B,), with v like z. Row
    b belongs to image images[b], which picks its row of an (N, T, d) embedding. z is a constant unless wrt_z.

    The cotangent of the empty branch is (1 - guidance) v, that of the prompt's branch guidance v."""
    dtype = network_dtype(unet, z)
    c_leaf, z_leaf = _leaf(c), z.detach().requires_grad_(wrt_z)
    e_leaf = None if guidance == 1 else _leaf(c_empty)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]

    leaves = [c_leaf] if e_leaf is None else [e_leaf, c_leaf]
    rows = [leaf if len(leaf) == 1 else leaf[images] for leaf in leaves]  # (1, T, d) or (B, T, d)
    most = max(map(len, rows))
    context = torch.cat([row.expand(most, -1, -1) for row in rows]).to(dtype)
    z_all = torch.cat([z_leaf] * len(leaves)).to(dtype)  # (branches B, 4, h, w)
    eps = unet(z_all, t.repeat(len(leaves)), context)  # (branches B, 4, h, w)
    cotangent = guidance * v if e_leaf is None else torch.cat([(1 - guidance) * v, guidance * v])

    grads = pull(eps, [*leaves, *([z_leaf] if wrt_z else []), *parameters], cotangent)
    if parameters:
        for parameter, grad in zip(parameters, grads[-len(parameters) :]):
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
    dc_empty = _zeros(c_empty) if e_leaf is None else grads[0]
    return grads[len(leaves) - 1], dc_empty, grads[len(leaves)].to(z.dtype) if wrt_z else None


def pull(
    y: Tensor, inputs: Sequence[Tensor], v: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """v^T dy/d(inputs), zero for what y does not depend on. Where the network that made y computes in float16
    (`dtype`; None: y's own), v is scaled by a power of two and the results scaled back, both exactly."""
    scale = _half_scale(v) if (dtype or y.dtype) == torch.float16 else 1.0
    grads = torch.autograd.grad(y, inputs, (v * scale).to(y.dtype), allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad / scale for x, grad in zip(inputs, grads)]


def loss_gradient(loss: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dloss/dx through networks that compute in `dtype`. In float16 the loss is scaled by a power of two that leaves
    the result finite, for what a pixel weighs lies below float16's smallest numbers; the result is scaled back."""
    for scale in LOSS_SCALES if dtype == torch.float16 else (1.0,):
        (g,) = torch.autograd.grad(loss * scale, x, retain_graph=scale > 1)
        if torch.isfinite(g).all():
            break
    return g / scale


def _zeros(c: Tensor | None) -> Tensor | None:
    """A zero gradient for c, at least float32."""
    return None if c is None else torch.zeros_like(c, dtype=torch.promote_types(c.dtype, torch.float32))


def _leaf(c: Tensor) -> Tensor:
    """c as a graph leaf of at least float32: the sum over images and steps then happens in float32 too."""
    return c.detach().to(torch.promote_types(c.dtype, torch.float32)).requires_grad_(True)


def _half_scale(v: Tensor) -> float:
    """The power of two that brings the largest |v| into [HALF_PEAK / 2, HALF_PEAK); 1 where there is none."""
    peak = float(v.abs().max())
    if peak == 0 or not math.isfinite(peak):
        return 1.0
    return HALF_PEAK * 2.0 ** -math.frexp(peak)[1]
