"""Eqs 9 and 10 written out, for the checks and for docs/derivation.md. Finetuning does not use them.

T diffusion times, S solver steps, latents of n numbers.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from fairref.diffusion.gradient import adjusted_gradient
from fairref.diffusion.model import GuidedModel
from fairref.diffusion.sampler import Step
from fairref.diffusion.schedule import Schedule
from fairref.diffusion.solver import SolverTable


def unrolled_z0(schedule: Schedule, z_T: Tensor, eps: Tensor, sigma: Tensor, w: Tensor) -> Tensor:
    """Return z_0 of the full ancestral run as one sum (eq 10). eps, w (T, ...), sigma (T,): index t - 1 is time t.

    z_0 = - sum_t A_t eps^(t) + z_T / sqrt(alpha_bar_T) + sum_{t >= 2} sigma_t / sqrt(alpha_bar_{t-1}) w_t
    """
    A, root = schedule.A.to(eps), schedule.alpha_bar.sqrt().to(eps)
    drift = torch.tensordot(A, eps, dims=1)
    return z_T / root[-1] - drift + torch.tensordot(sigma[1:].to(eps) / root[:-1], w[1:], dims=1)


def coupling(schedule: Schedule, J: Tensor) -> Tensor:
    """Return B_t of eq 9 as explicit matrices (T, n, n). J (T, n, n): index t - 1 holds d eps^(t)/d z_t.

    B_1 = I, B_t = prod_{s < t} (I - beta_s / sqrt(1 - alpha_bar_s) J_s), s = 1 leftmost.
    """
    b = (schedule.beta / (1 - schedule.alpha_bar).sqrt()).to(J)
    B = [torch.eye(J.shape[-1], dtype=J.dtype, device=J.device)]
    for s in range(schedule.T - 1):
        B.append(B[-1] @ (B[0] - b[s] * J[s]))
    return torch.stack(B)


def gradient_paths(schedule: Schedule, J: Tensor, t: int) -> dict[tuple[int, ...], Tensor]:
    """Return the 2^(t-1) products whose sum is B_t: times s < t taken indirectly -> matrix (n, n).

    Time s is direct (factor I: the noise eps^(t) reaches z_{s-1} past the network) or indirect (factor
    -beta_s / sqrt(1 - alpha_bar_s) J_s: through it). The adjusted gradient keeps (), the all-direct one. J as
    in `coupling`.
    """
    b = (schedule.beta / (1 - schedule.alpha_bar).sqrt()).to(J)
    paths = {}
    for indirect in product((False, True), repeat=t - 1):
        matrix = torch.eye(J.shape[-1], dtype=J.dtype, device=J.device)
        for s in range(t - 1):
            matrix = matrix @ (-b[s] * J[s]) if indirect[s] else matrix
        paths[tuple(s + 1 for s in range(t - 1) if indirect[s])] = matrix
    return paths


def solver_coupling(table: SolverTable, J: Tensor) -> Tensor:
    """Return E_i = dz_0/d eps_i of eq 9 as explicit matrices (S, n, n), for any solver table.

    J (S, n, n): index i holds d eps_i / d z_i. For ancestral sampling with S = T, E_i is -A_t B_t.

        V_S = I,  E_i = q_i V_{i+1} + s_{i+1} V_{i+2},  V_i = p_i V_{i+1} + r_{i+1} V_{i+2} + E_i J_i
    """
    p, q, r, s = (x.tolist() for x in (table.p, table.q, table.r, table.s))
    V_next = torch.eye(J.shape[-1], dtype=J.dtype, device=J.device)
    V_after, E = torch.zeros_like(V_next), []
    for i in reversed(range(table.S)):
        r_next, s_next = (r[i + 1], s[i + 1]) if i + 1 < table.S else (0.0, 0.0)
        E.insert(0, q[i] * V_next + s_next * V_after)
        V_next, V_after = p[i] * V_next + r_next * V_after + E[0] @ J[i], V_next
    return torch.stack(E)


def gradient_matrix(
    model: GuidedModel,
    table: SolverTable,
    w: Tensor,
    path: Sequence[Step],
    g: Tensor,
    text: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> Tensor:
    """Return (N, P): row n is image n's part of dL/dtheta, for the P numbers of `parameters` behind the text.

    text = (c, c_empty), (1, T, d) each, with graphs, which are kept. The rest is as in `adjusted_gradient`. The
    rows sum to the batch's gradient.
    """
    rows = [x.detach().expand(len(g), -1, -1) for x in text]  # a leaf an image
    text_gradients = adjusted_gradient(replace(model, c=rows[0], c_empty=rows[1]), table, w, path, g)[:2]
    matrix = []
    for n in range(len(g)):
        cotangents = [x[n : n + 1].to(c.dtype) for x, c in zip(text_gradients, text, strict=True)]
        row = torch.autograd.grad(
            text, parameters, cotangents, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        matrix.append(torch.cat([x.flatten() for x in row]))
    return torch.stack(matrix)


def importance(matrix: Tensor) -> Tensor:
    """Return (N,): the norm of each image's row of `gradient_matrix`, its weight in the update."""
    return torch.linalg.vector_norm(matrix, dim=1)
