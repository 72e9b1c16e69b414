"""Examples of what a reader computes in the course: drawn arguments, and fairref's own value of them.

They leave the easy cases: sizes differ from one to the next, coefficients are free, one image is at the threshold.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from fairref.diffusion import gradient as production
from fairref.diffusion import solver
from fairref.diffusion.model import guide
from fairref.diffusion.schedule import Schedule
from fairref.fairness import losses, metrics
from fairref.fairness.transport import expected_ot
from fairref.verification.derivation import coupling, unrolled_z0


def _schedule(rng):
    return Schedule(
        T=int(rng.integers(5, 8)), beta_start=rng.uniform(0.02, 0.1), beta_end=rng.uniform(0.3, 0.5)
    )


def _of(schedule):
    return {"beta": schedule.beta.numpy(), "alpha_bar": schedule.alpha_bar.numpy()}


def _alpha_bar(rng):
    schedule = _schedule(rng)
    return {"beta": schedule.beta.numpy()}, schedule.alpha_bar


def _sigma_t(rng):
    schedule = _schedule(rng)
    return _of(schedule), solver.ancestral_table(schedule).sigma.flip(0)


def _epsilon(rng):
    eps, empty, s = rng.normal(size=(3, 2)), rng.normal(size=(3, 2)), rng.uniform(2, 9)
    found = guide(torch.from_numpy(empty), torch.from_numpy(eps), s)
    return {"eps_prompt": eps, "eps_empty": empty, "s": s}, found


def _A_t(rng):
    schedule = _schedule(rng)
    return _of(schedule), schedule.A


def _z_0(rng):
    schedule = _schedule(rng)
    z_T, eps, w = rng.normal(size=3), *rng.normal(size=(2, schedule.T, 3))
    sigma = solver.ancestral_table(schedule).sigma.flip(0)
    found = unrolled_z0(schedule, *map(torch.from_numpy, (z_T, eps)), sigma, torch.from_numpy(w))
    return {**_of(schedule), "z_T": z_T, "eps": eps, "w": w}, found


def _B_t(rng):
    schedule = _schedule(rng)
    J = rng.normal(size=(schedule.T, 3, 3))
    return {**_of(schedule), "J": J}, coupling(schedule, torch.from_numpy(J))


def _gradient(rng):
    schedule = _schedule(rng)
    J, eps_theta = rng.normal(size=(schedule.T, 3, 3)), rng.normal(size=(schedule.T, 3, 4))
    B = coupling(schedule, torch.from_numpy(J))
    found = -torch.einsum("t,tij,tjm->im", schedule.A, B, torch.from_numpy(eps_theta))
    return {**_of(schedule), "J": J, "eps_theta": eps_theta}, found


def _table(rng) -> tuple[Schedule, solver.SolverTable]:
    schedule = Schedule(T=40, beta_start=rng.uniform(0.01, 0.02), beta_end=rng.uniform(0.1, 0.2))
    return schedule, solver.solver_table(
        schedule, int(rng.integers(4, 9)), str(rng.choice(["zero", "sigma_min"]))
    )


def _C_i(rng):
    """The sampler's times with t = T among them, and without it."""
    schedule, table = _table(rng)
    table = replace(table, timesteps=table.timesteps - int(rng.integers(2)))
    return {**_of(schedule), "times": table.timesteps.numpy() + 1}, production.C_i(schedule, table)


def _k_i(rng):
    """Free coefficients: those of a short sampler have no memory in the last step."""
    table = _table(rng)[1]
    free = {name: torch.from_numpy(rng.uniform(0.3, 1.5, table.S)) for name in ("p", "q", "r", "s")}
    free["r"][0] = free["s"][0] = 0
    return {name: x.numpy() for name, x in free.items()}, solver._with_totals(
        table.timesteps, **free, sigma=table.sigma
    ).k


def _adjusted(rng):
    """k of both signs, as the late steps of a long sampler have them."""
    S = int(rng.integers(4, 9))
    C, k, vjps = rng.uniform(0.3, 2, S), rng.normal(size=S), rng.normal(size=(S, 4))
    return {"C": C, "k": k, "vjps": vjps}, torch.einsum("i,i,ij->j", *map(torch.from_numpy, (C, k, vjps)))


def _q(rng):
    logits, share = 2 * rng.normal(size=(int(rng.integers(5, 9)), 2)), rng.uniform(0.2, 0.8)
    target = np.array([1 - share, share])
    return {"logits": logits, "target": target}, expected_ot(
        torch.from_numpy(logits), torch.from_numpy(target)
    ).q


def _L_align(rng):
    """Two classes, or three. Some images are sure, some are not, and one is at the threshold itself."""
    K, C = int(rng.integers(2, 4)), float(rng.uniform(0.6, 0.9))
    of_each = rng.integers(2, 5, 2)
    sure = np.concatenate([[1, C], rng.uniform(1.1 / K, C, of_each[0]), rng.uniform(C, 1, of_each[1])])
    rest = (1 - sure)[:, None] * rng.dirichlet(
        np.full(K - 1, 1e3), len(sure)
    )  # nearly alike, each below `sure`
    q = rng.permuted(np.column_stack([sure, rest]), axis=1)
    logits = rng.normal(size=q.shape)
    found, _ = losses.align_loss(torch.from_numpy(logits), torch.from_numpy(q), C, len(q))
    return {"logits": logits, "q": q, "C": C}, found.sum()


def _L_img(rng):
    N, towers = int(rng.integers(4, 7)), (5, 3)
    x, o = (np.concatenate([rng.normal(0.3, 1, (N, d)) for d in towers], 1) for _ in "xo")
    parts = [lambda features: features[:, : towers[0]], lambda features: features[:, towers[0] :]]
    found = losses.image_loss(torch.from_numpy(x), torch.from_numpy(o), parts, N).sum()
    names = ("clip_x", "clip_o", "dino_x", "dino_o")
    return dict(zip(names, (part(of) for part in parts for of in (x, o)), strict=True)), found


def _bias(rng):
    shares = rng.dirichlet(np.ones(int(rng.integers(3, 6))))
    return {"shares": shares}, torch.as_tensor(metrics.bias(shares))


EXAMPLES: dict[str, Callable[[np.random.Generator], tuple[dict[str, np.ndarray], torch.Tensor]]] = {
    "alpha_bar": _alpha_bar,
    "sigma_t": _sigma_t,
    "epsilon": _epsilon,
    "A_t": _A_t,
    "z_0": _z_0,
    "B_t": _B_t,
    "gradient": _gradient,
    "C_i": _C_i,
    "k_i": _k_i,
    "adjusted": _adjusted,
    "q": _q,
    "L_align": _L_align,
    "L_img": _L_img,
    "bias": _bias,
}
