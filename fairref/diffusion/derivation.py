"""Eqs 9 and 10 written out, as values to look at and to check: finetuning uses none of it.

T diffusion times, S solver steps, latents of n numbers; docs/derivation.md goes through them."""

from itertools import product

import torch
from torch import Tensor

from fairref.diffusion.schedule import Schedule
from fairref.diffusion.solver import SolverTable


def unrolled_z0(schedule: Schedule, z_T: Tensor, eps: Tensor, sigma: Tensor, w: Tensor) -> Tensor:
    """Eq 10, z_0 of the full ancestral run in one sum. eps, w (T, ...), sigma (T,): index t - 1 is time t.

    z_0 = - sum_t A_t eps^(t) + z_T / sqrt(alpha_bar_T) + sum_{t >= 2} sigma_t / sqrt(alpha_bar_{t-1}) w_t"""
    A, root = schedule.A.to(eps), schedule.alpha_bar.sqrt().to(eps)
    drift = torch.tensordot(A, eps, dims=1)
    return z_T / root[-1] - drift + torch.tensordot(sigma[1:].to(eps) / root[:-1], w[1:], dims=1)


def coupling(schedule: Schedule, J: Tensor) -> Tensor:
    """B_t of eq 9 as explicit matrices (T, n, n), for latents of n numbers; J (T, n, n), index t - 1 holds
    d eps^(t)/d z_t. B_1 = I, B_t = prod_{s < t} (I - beta_s / sqrt(1 - alpha_bar_s) J_s), s = 1 leftmost."""
    b = (schedule.beta / (1 - schedule.alpha_bar).sqrt()).to(J)
    B = [torch.eye(J.shape[-1], dtype=J.dtype, device=J.device)]
    for s in range(schedule.T - 1):
        B.append(B[-1] @ (B[0] - b[s] * J[s]))
    return torch.stack(B)


def gradient_paths(schedule: Schedule, J: Tensor, t: int) -> dict[tuple[int, ...], Tensor]:
    """The 2^(t-1) products that B_t is the sum of: times s < t taken indirectly -> matrix (n, n).

    Time s is direct (factor I: the noise eps^(t) reaches z_{s-1} past the network) or indirect (factor
    -beta_s / sqrt(1 - alpha_bar_s) J_s: through it). The adjusted gradient keeps (), the all-direct one. J as
    in `coupling`."""
    b = (schedule.beta / (1 - schedule.alpha_bar).sqrt()).to(J)
    paths = {}
    for indirect in product((False, True), repeat=t - 1):
        matrix = torch.eye(J.shape[-1], dtype=J.dtype, device=J.device)
        for s in range(t - 1):
            matrix = matrix @ (-b[s] * J[s]) if indirect[s] else matrix
        paths[tuple(s + 1 for s in range(t - 1) if indirect[s])] = matrix
    return paths


def solver_coupling(table: SolverTable, J: Tensor) -> Tensor:
    """E_i = dz_0/d eps_i of eq 9 as explicit matrices (S, n, n) for any solver table; J (S, n, n), index i
    holds d eps_i / d z_i. What -A_t B_t is for ancestral sampling with S = T, with the memory of two steps:

        V_S = I,  E_i = q_i V_{i+1} + s_{i+1} V_{i+2},  V_i = p_i V_{i+1} + r_{i+1} V_{i+2} + E_i J_i"""
    p, q, r, s = (x.tolist() for x in (table.p, table.q, table.r, table.s))
    V_next = torch.eye(J.shape[-1], dtype=J.dtype, device=J.device)
    V_after, E = torch.zeros_like(V_next), []
    for i in reversed(range(table.S)):
        r_next, s_next = (r[i + 1], s[i + 1]) if i + 1 < table.S else (0.0, 0.0)
        E.insert(0, q[i] * V_next + s_next * V_after)
        V_next, V_after = p[i] * V_next + r_next * V_after + E[0] @ J[i], V_next
    return torch.stack(E)
