"""docs/method.md section 2, proved in float64 on a toy network: eq 9, eq 10, and that the weighted sum of
vector-Jacobian products is Algorithm A.1."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn

from fairref.diffusion.gradient import (
    A_t,
    C_i,
    adjusted_gradient,
    exact_gradient,
    step_weights,
    subsample,
)
from fairref.diffusion.model import GuidedModel, KeepingModel
from fairref.diffusion.sampler import sample
from fairref.diffusion.schedule import Schedule
from fairref.diffusion.solver import ancestral_table, solver_table, step
from fairref.verification.derivation import (
    coupling,
    gradient_matrix,
    gradient_paths,
    importance,
    solver_coupling,
    unrolled_z0,
)

SCHEDULE = Schedule()
N, T, D = 3, 2, 5  # images, tokens, width
close = {"rtol": 1e-10, "atol": 1e-10}


class ToyUNet(nn.Module):
    """eps(z, t, c): mixes channels and neighbouring pixels, reads every token, is not linear in anything."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Parameter((torch.randn(6, 4, 3, 3, generator=generator) / 6).to(dtype))
        self.read = nn.Parameter((torch.randn(6, D, generator=generator) / 2).to(dtype))
        self.out = nn.Parameter((torch.randn(4, 6, generator=generator) / 2).to(dtype))
        self.calls = []

    def forward(self, z, t, c):
        assert not torch.is_tensor(t) or t.ndim == 0 or t.shape == z.shape[:1]
        t = torch.as_tensor(t).to(z).reshape(-1, 1, 1, 1) / 1000
        told = torch.einsum("od,btd->bo", self.read, (c * c.roll(1, dims=1)).tanh())[:, :, None, None]
        told = told.repeat_interleave(len(z) // len(c), 0)
        hidden = torch.tanh(nn.functional.conv2d(z, self.conv, padding=1) * (1 + told) + t + told)
        eps = torch.einsum("oc,bchw->bohw", self.out, hidden)
        self.calls.append((z.shape[0], weakref.ref(hidden)))
        return eps


class ToyTextEncoder(nn.Module):
    """One parameter phi behind both embeddings, as a LoRA on the text encoder is."""

    def __init__(self):
        super().__init__()
        self.phi = nn.Parameter(random(D, D, seed=7) / 2)

    def forward(self, P):
        return torch.tanh(P @ self.phi)


def random(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss(z_0):
    """Any function of z_0 that tells images and pixels apart."""
    return (z_0.sin() * random(*z_0.shape, seed=9)).sum() + (z_0[0] * z_0[1]).sum()


def setting(end="zero", S=20, per_image=False):
    """(unet, table, z_T, c, c_empty)"""
    n = N if per_image else 1
    table = ancestral_table(SCHEDULE, S) if end == "ancestral" else solver_table(SCHEDULE, S, end)
    return ToyUNet(), table, random(N, 4, 2, 2, seed=1), random(n, T, D, seed=2), random(n, T, D, seed=3)


def walk(model, table, z_T, w=None):
    """(path, dL/dz_0) of a run without a graph."""
    with torch.no_grad():
        path = list(sample(model, table, z_T, w))
    z_0 = path[-1].z.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(loss(z_0), z_0)
    return path, g


def algorithm_A1(unet, table, z_T, c, c_empty, guidance, C, scheduler=step):
    """Algorithm A.1 as it is written: detached U-Net inputs, a hook on each noise prediction, autograd
    through the scheduler. Gives z_0 with its graph."""
    z, previous = z_T, None
    for i, t in enumerate(table.timesteps.tolist()):
        z_detached = z.detach()
        eps_empty, eps_prompt = (unet(z_detached, t, x.expand(N, -1, -1)) for x in (c_empty, c))
        eps = eps_empty + guidance * (eps_prompt - eps_empty)
        eps.register_hook(lambda grad, C_i=float(C[i]): C_i * grad)
        z, previous = scheduler(table, i, z, eps, previous), (z, eps)
    return z


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("S", [1, 2, 8, 20])
@pytest.mark.parametrize("guidance", [1.0, 7.5, 0.0])
@pytest.mark.parametrize("per_image", [False, True])
def test_the_sum_of_vjps_is_algorithm_A1(end, S, guidance, per_image):
    unet, table, z_T, c, c_empty = setting(end, S, per_image)
    leaves = [c.clone().requires_grad_(True), c_empty.clone().requires_grad_(True)]
    z_0 = algorithm_A1(unet, table, z_T, *leaves, guidance, C_i(SCHEDULE, table))
    expected = torch.autograd.grad(loss(z_0), [*leaves, *unet.parameters()])

    model = GuidedModel(unet, c, c_empty, guidance)
    path, g = walk(model, table, z_T)
    torch.testing.assert_close(path[-1].z, z_0.detach(), **close)
    got = adjusted_gradient(model, table, step_weights(SCHEDULE, table), path, g)
    assert all(parameter.grad is None for parameter in unet.parameters())
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **close)


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_algorithm_A1_on_the_scheduler_of_diffusers(end):
    # The same with someone else's solver, whose tables and latents are float32.
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", final_sigmas_type=end
    )
    for S in (8, 20):
        unet, table, z_T, c, c_empty = setting(end, S)
        peer.set_timesteps(S)
        leaves = [c.clone().requires_grad_(True), c_empty.clone().requires_grad_(True)]

        def scheduler(table, i, z, eps, previous):
            return peer.step(eps, peer.timesteps[i], z).prev_sample

        z_0 = algorithm_A1(unet, table, z_T, *leaves, 7.5, C_i(SCHEDULE, table), scheduler)
        expected = torch.autograd.grad(loss(z_0), [*leaves, *unet.parameters()])
        model = GuidedModel(unet, c, c_empty, 7.5)
        path, g = walk(model, table, z_T)
        got = adjusted_gradient(model, table, step_weights(SCHEDULE, table), path, g)
        for ours, theirs in zip(got, expected, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


def test_through_the_text_encoder():
    unet, table, z_T, P, P_empty = setting()
    encoder, C = ToyTextEncoder(), C_i(SCHEDULE, table)
    unet.requires_grad_(False)
    z_0 = algorithm_A1(unet, table, z_T, encoder(P), encoder(P_empty), 7.5, C)
    (expected,) = torch.autograd.grad(loss(z_0), encoder.phi)

    c, c_empty = encoder(P), encoder(P_empty)
    model = GuidedModel(unet, c, c_empty, 7.5)
    path, g = walk(model, table, z_T)
    dc, dc_empty = adjusted_gradient(model, table, C * table.k, path, g)
    (got,) = torch.autograd.grad([c, c_empty], encoder.phi, [dc, dc_empty])
    torch.testing.assert_close(got, expected, **close)
    assert all(parameter.grad is None for parameter in unet.parameters())


@pytest.mark.parametrize("end", ["zero", "sigma_min", "ancestral"])
@pytest.mark.parametrize("S", [1, 2, 14, 20])
def test_k_is_the_derivative_of_z_0(end, S):
    _, table, z_T, _, _ = setting(end, S)
    eps = random(S, 4, seed=4).requires_grad_(True)
    start = z_T.flatten()[:4].clone().requires_grad_(True)
    z, previous = start, None
    for i in range(S):
        z, previous = step(table, i, z, eps[i], previous, torch.ones(4, dtype=torch.float64)), (z, eps[i])
    da, dk = torch.autograd.grad(z.sum(), [start, eps])
    torch.testing.assert_close(da, torch.full_like(da, table.a), **close)
    torch.testing.assert_close(dk, table.k[:, None].expand(S, 4), **close)


def test_eq_10_is_the_recursion_of_eq_3():
    schedule = Schedule(T=40, beta_end=0.2)
    unet, z_T, c, c_empty = (
        ToyUNet(),
        random(N, 4, 2, 2, seed=1),
        random(1, T, D, seed=2),
        random(1, T, D, seed=3),
    )
    table, w = ancestral_table(schedule), random(40, N, 4, 2, 2, seed=5)
    path, _ = walk(GuidedModel(unet, c, c_empty, 7.5), table, z_T, w)
    eps = torch.stack([point.eps for point in reversed(path[:-1])])  # (T, N, 4, h, w), index t - 1
    z_0 = unrolled_z0(schedule, z_T, eps, table.sigma.flip(0), w.flip(0))
    torch.testing.assert_close(z_0, path[-1].z, **close)


def test_for_ancestral_sampling_k_is_minus_A_and_the_paper_standardises_exactly():
    table = ancestral_table(SCHEDULE)
    torch.testing.assert_close(table.k, -A_t(SCHEDULE, table), rtol=1e-11, atol=0)
    assert table.a == pytest.approx(float(SCHEDULE.alpha_bar[-1]) ** -0.5, rel=1e-11)
    w = step_weights(SCHEDULE, table)
    torch.testing.assert_close(w, step_weights(SCHEDULE, table, "solver"), rtol=1e-11, atol=0)
    assert float(w.max() - w.min()) < 1e-11


def test_eq_9():
    # T = 6: B_t as explicit matrices, from the Jacobian of the network at each z_t.
    schedule = Schedule(T=6, beta_start=0.05, beta_end=0.4)
    unet, table, n = ToyUNet(), ancestral_table(schedule), 4 * 2 * 2
    z_T, c = random(1, 4, 2, 2, seed=1), random(1, T, D, seed=2).requires_grad_(True)
    w = random(6, 1, 4, 2, 2, seed=5)
    model = GuidedModel(unet, c, None, 1.0)
    with torch.no_grad():
        path = list(sample(model, table, z_T, w))
    J, deps = [], []
    for _, t, z, _ in reversed(path[:-1]):  # t = 1..T
        dz, dc = torch.autograd.functional.jacobian(lambda z, c, t=t: unet(z, t, c), (z, c))
        J.append(dz.reshape(n, n))
        deps.append(dc.reshape(n, T * D))
    J, deps = torch.stack(J), torch.stack(deps)
    expected = -torch.einsum("t,tij,tjk->ik", schedule.A, coupling(schedule, J), deps)

    *_, last = sample(model, table, z_T, w)
    rows = [torch.autograd.grad(x, c, retain_graph=True)[0].flatten() for x in last.z.flatten()]
    torch.testing.assert_close(expected, torch.stack(rows), **close)

    g = random(1, 4, 2, 2, seed=6)
    (dc, *_), cotangents = exact_gradient(model, table, path, g)
    torch.testing.assert_close(dc.flatten(), g.flatten() @ expected, **close)
    for A, B, cotangent in zip(schedule.A, coupling(schedule, J), reversed(cotangents), strict=True):
        torch.testing.assert_close(cotangent.flatten(), -A * g.flatten() @ B, **close)


def jacobians(unet, table, path, c):
    """J (S, n, n) and d eps_i / dc (S, n, T D) of one image, in run order."""
    J, deps = [], []
    for _, t, z, _ in path[:-1]:
        dz, dc = torch.autograd.functional.jacobian(lambda z, c, t=t: unet(z, t, c), (z, c))
        J.append(dz.flatten(1).reshape(z.numel(), -1))
        deps.append(dc.reshape(z.numel(), -1))
    return torch.stack(J), torch.stack(deps)


@pytest.mark.parametrize(
    "end, S", [("zero", 1), ("zero", 4), ("zero", 8), ("sigma_min", 16), ("ancestral", 6)]
)
def test_eq_9_of_any_solver(end, S):
    """Explicit matrices, autograd through the sampler and finite differences agree."""
    schedule = Schedule(T=50, beta_start=0.002, beta_end=0.2)
    table = ancestral_table(schedule, S) if end == "ancestral" else solver_table(schedule, S, end)
    unet, z_T, c = ToyUNet(), random(1, 4, 2, 2, seed=1), random(1, T, D, seed=2).requires_grad_(True)
    w = random(S, 1, 4, 2, 2, seed=5) if end == "ancestral" else None
    model = GuidedModel(unet, c, None, 1.0)
    with torch.no_grad():
        path = list(sample(model, table, z_T, w))
    J, deps = jacobians(unet, table, path, c)
    E = solver_coupling(table, J)
    explicit = torch.einsum("sij,sjk->ik", E, deps)  # dz_0/dc

    *_, last = sample(model, table, z_T, w)
    rows = [torch.autograd.grad(x, c, retain_graph=True)[0].flatten() for x in last.z.flatten()]
    torch.testing.assert_close(explicit, torch.stack(rows), **close)

    way, h = random(1, T, D, seed=11), 1e-4
    with torch.no_grad():
        moved = [GuidedModel(unet, c + x * h * way, None, 1.0) for x in (-2, -1, 1, 2)]
        z = [list(sample(at, table, z_T, w))[-1].z for at in moved]
    difference = (8 * (z[2] - z[1]) - (z[3] - z[0])) / (12 * h)
    torch.testing.assert_close(explicit @ way.flatten(), difference.flatten(), rtol=1e-7, atol=1e-9)

    g = random(1, 4, 2, 2, seed=6)
    _, cotangents = exact_gradient(model, table, path, g)
    for row, cotangent in zip(E, cotangents, strict=True):
        torch.testing.assert_close(g.flatten() @ row, cotangent.flatten(), **close)


def test_the_coupling_of_the_ancestral_table_is_minus_A_t_B_t():
    schedule = Schedule(T=7, beta_start=0.05, beta_end=0.4)
    J = random(7, 5, 5, seed=3)
    table = ancestral_table(schedule)
    E = solver_coupling(table, J.flip(0)).flip(0)  # index t - 1
    torch.testing.assert_close(E, -schedule.A[:, None, None] * coupling(schedule, J), **close)


@pytest.mark.parametrize("t", [1, 2, 3, 5])
def test_B_t_is_the_sum_of_all_paths_and_the_adjusted_gradient_keeps_the_direct_one(t):
    schedule = Schedule(T=5, beta_start=0.05, beta_end=0.4)
    J = random(5, 3, 3, seed=4)
    paths = gradient_paths(schedule, J, t)
    assert len(paths) == 2 ** (t - 1)
    torch.testing.assert_close(sum(paths.values()), coupling(schedule, J)[t - 1], **close)
    assert torch.equal(paths[()], torch.eye(3, dtype=torch.float64))
    if t == 3:
        b = schedule.beta / (1 - schedule.alpha_bar).sqrt()
        torch.testing.assert_close(paths[1, 2], b[0] * b[1] * J[0] @ J[1], **close)  # s = 1 leftmost
        torch.testing.assert_close(paths[2,], -b[1] * J[1], **close)


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("M", [1, 3, 7, 19])
@pytest.mark.parametrize("sizes", [(1.0,), (1.0, 0.02, 0.0, 5.0)])
def test_a_subsample_of_steps_is_unbiased(end, M, sizes):
    """Of steps alone, and of pairs of a step and an image, whose dL/dz_0 have some size, or are 0."""
    steps = step_weights(SCHEDULE, solver_table(SCHEDULE, 20, end))
    assert end == "zero" or (steps > 0).any()  # two steps of the other sign
    w, size = steps.repeat(len(sizes)), torch.tensor(sizes).double().repeat_interleave(20)
    u = (torch.arange(4000, dtype=torch.float64)[:, None] + 0.5) / 4000
    draws = subsample(w, M, u, size)  # (4000, P)
    assert torch.equal(draws[7], subsample(w, M, float(u[7]), size))
    share = w.abs() * size / (w.abs() * size).sum()
    # a term is drawn M share times on the average, and never one time more or less than that, rounded
    unit = (w / (M * share)).where(share > 0, 0)
    times = torch.where(share > 0, draws / unit, 0)
    torch.testing.assert_close(times, times.round(), **close)
    assert ((times.sum(1) - M).abs() < 1e-9).all()
    assert ((times - M * share).abs() < 1 + 1e-9).all() and (draws * w >= 0).all()
    torch.testing.assert_close(times.mean(0), M * share, rtol=0, atol=1 / 2000)
    assert torch.equal(draws[:, share == 0], torch.zeros(4000, int((share == 0).sum())).double())
    assert torch.equal(subsample(w, M, 0.3, 0 * size), torch.zeros_like(w))  # no image has a gradient


def test_the_mean_of_subsampled_gradients_is_the_gradient():
    unet, table, z_T, c, c_empty = setting(S=8)
    model = GuidedModel(unet, c, c_empty, 7.5)
    path, g = walk(model, table, z_T)
    w, count = step_weights(SCHEDULE, table), 400
    whole = adjusted_gradient(model, table, w, path, g)[0]
    one_by_one = torch.stack(
        [adjusted_gradient(model, table, unit, path, g)[0] for unit in torch.eye(8).double()]
    )
    u = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws = torch.stack([torch.tensordot(subsample(w, 3, float(x)), one_by_one, 1) for x in u])
    error = (draws.mean(0) - whole) / (draws.std(0) / count**0.5)
    assert error.abs().max() < 4 and draws.std(0).min() > 0
    unet.calls.clear()
    got = adjusted_gradient(model, table, subsample(w, 3, 0.4), path, g)[0]
    torch.testing.assert_close(got, torch.tensordot(subsample(w, 3, 0.4), one_by_one, 1), **close)
    assert len(unet.calls) <= 3


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_each_image_may_have_weights_of_its_own(micro_batch):
    unet, table, z_T, c, c_empty = setting(S=5)
    model = GuidedModel(unet, c, c_empty, 7.5)
    path, g = walk(model, table, z_T)
    w = random(5, len(g), seed=8) * (random(5, len(g), seed=9) > 0)
    got = adjusted_gradient(model, table, w, path, g, micro_batch)
    alone = [
        adjusted_gradient(model, table, w[:, n], [x._replace(z=x.z[n : n + 1]) for x in path], g[n : n + 1])
        for n in range(len(g))
    ]
    for leaf, of_images in zip(got, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(leaf, sum(of_images), **close)


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_kept_graphs_give_the_same_gradient_without_another_evaluation(guidance):
    unet, table, z_T, c, c_empty = setting(S=5)
    model, keeping = (kind(unet, c, c_empty, guidance) for kind in (GuidedModel, KeepingModel))
    path, g = walk(model, table, z_T)
    w = step_weights(SCHEDULE, table)
    expected = adjusted_gradient(model, table, w, path, g)
    with torch.no_grad():
        kept = list(sample(keeping, table, z_T))
    for a, b in zip(kept, path, strict=True):
        assert torch.equal(a.z, b.z) and not a.z.requires_grad
        assert a.eps is None or (torch.equal(a.eps, b.eps) and not a.eps.requires_grad)
    unet.calls.clear()
    for once_more in (0, 5):  # a graph serves once
        got = adjusted_gradient(keeping, table, w, kept, g)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert len(unet.calls) == once_more
    with torch.no_grad():
        kept = list(sample(keeping, table, z_T + 1))
    got = adjusted_gradient(keeping, table, w, path, g)  # not the latents whose graphs are there
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("fixed_empty", [False, True])
def test_no_cycle_keeps_a_graph_that_nobody_asked_for(fixed_empty):
    """Else it would be there until Python looks for cycles, on a GPU too late."""
    unet, table, (c, c_empty) = ToyUNet(), solver_table(SCHEDULE, 3), random(2, 1, T, D, seed=1)
    model = KeepingModel(unet, c, c_empty, 2.0, fixed_empty)
    with torch.no_grad():
        path = list(sample(model, table, random(N, 4, 3, 3, seed=2)))
    known = weakref.ref(model)  # which holds them
    assert len(model.graphs) == 3
    gc.disable()
    try:
        del model, path
        assert known() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_a_row_of_the_gradient_matrix_is_one_images_gradient(guidance):
    unet, table, z_T, P, P_empty = setting()
    encoder, w = ToyTextEncoder(), step_weights(SCHEDULE, table)
    unet.requires_grad_(False)
    c, c_empty = encoder(P), encoder(P_empty)
    model = GuidedModel(unet, c.detach(), c_empty.detach(), guidance)
    path, g = walk(model, table, z_T)
    matrix = gradient_matrix(model, table, w, path, g, [c, c_empty], [encoder.phi])
    assert matrix.shape == (N, D * D)

    dc, dc_empty = adjusted_gradient(model, table, w, path, g)
    (whole,) = torch.autograd.grad([c, c_empty], encoder.phi, [dc, dc_empty], retain_graph=True)
    torch.testing.assert_close(matrix.sum(0), whole.flatten(), **close)
    for n in range(N):
        only = torch.zeros_like(g)
        only[n] = g[n]
        dc, dc_empty = adjusted_gradient(model, table, w, path, only)
        (row,) = torch.autograd.grad([c, c_empty], encoder.phi, [dc, dc_empty], retain_graph=True)
        torch.testing.assert_close(matrix[n], row.flatten(), **close)
        assert float(importance(matrix)[n]) == pytest.approx(float(row.norm()), rel=1e-12)


class Scalar(nn.Module):
    """eps(z, t, c) of latents that are one number: tanh(c_0 z + c_1 t + c_2)."""

    def forward(self, z, t, c):
        c = c[:, 0, :, None, None, None].unbind(1)  # each (B, 1, 1, 1)
        return torch.tanh(c[0] * z + c[1] * torch.as_tensor(t).to(z).reshape(-1, 1, 1, 1) / 50 + c[2])


@pytest.mark.parametrize("steps", [4, 13, 50])
def test_eq_9_for_latents_of_one_number_in_plain_arithmetic(steps):
    schedule = Schedule(T=steps, beta_start=0.01, beta_end=0.3)
    table, unet = ancestral_table(schedule), Scalar()
    z_T, c, w = random(1, 1, 1, 1, seed=1), random(1, 1, 3, seed=2), random(steps, 1, 1, 1, 1, seed=3)
    model = GuidedModel(unet, c, None, 1.0)
    with torch.no_grad():
        path = list(sample(model, table, z_T, w))
    g = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    (found,), cotangents = exact_gradient(model, table, path, g)

    expected, B = [0.0, 0.0, 0.0], 1.0
    beta = schedule.beta.tolist()
    for t in range(1, steps + 1):
        bar = math.prod(1 - b for b in beta[:t])
        z = path[steps - t].z.item()
        eps = math.tanh(c[0, 0, 0].item() * z + c[0, 0, 1].item() * (t - 1) / 50 + c[0, 0, 2].item())
        A = beta[t - 1] / math.sqrt(bar * (1 - bar))
        slope = 1 - eps**2
        for j, of_parameter in enumerate((z, (t - 1) / 50, 1.0)):
            expected[j] -= A * B * slope * of_parameter
        assert cotangents[steps - t].item() == pytest.approx(-A * B, rel=1e-10)
        B *= 1 - beta[t - 1] / math.sqrt(1 - bar) * slope * c[0, 0, 0].item()
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("end, S", [("zero", 3), ("zero", 20), ("sigma_min", 20), ("ancestral", 12)])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_the_exact_gradient_is_autograd_through_the_loop(end, S, guidance):
    unet, table, z_T, c, c_empty = setting(end, S)
    w = random(S, N, 4, 2, 2, seed=5) if end == "ancestral" else None
    leaves = [c.clone().requires_grad_(True), c_empty.clone().requires_grad_(True)]
    *_, last = sample(GuidedModel(unet, *leaves, guidance), table, z_T, w)
    wanted = [*leaves, *unet.parameters()]
    expected = torch.autograd.grad(loss(last.z), wanted, allow_unused=True)

    model = GuidedModel(unet, c, c_empty, guidance)
    path, g = walk(model, table, z_T, w)
    found, _ = exact_gradient(model, table, path, g)
    for ours, theirs in zip(found, expected, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        assert float((ours - theirs).norm()) <= 1e-10 * max(1.0, float(theirs.norm()))


@pytest.mark.parametrize("end, S", [("zero", 5), ("sigma_min", 15)])
def test_the_exact_gradient_is_a_finite_difference(end, S):
    unet, table, z_T, c, c_empty = setting(end, S)
    model = GuidedModel(unet, c, c_empty, 3.0)
    path, g = walk(model, table, z_T)
    (dc, dc_empty, *_), _ = exact_gradient(model, table, path, g)
    way, way_empty, h = random(1, T, D, seed=11), random(1, T, D, seed=12), 1e-5

    def along(x):
        with torch.no_grad():
            *_, last = sample(GuidedModel(unet, c + x * way, c_empty + x * way_empty, 3.0), table, z_T)
            return float(loss(last.z))

    difference = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    assert float((dc * way).sum() + (dc_empty * way_empty).sum()) == pytest.approx(difference, rel=1e-7)


def test_the_adjusted_gradient_drops_the_coupling():
    # With B_t = I put in by hand (a network that ignores z) exact and unstandardised are the same.
    unet, table, z_T, c, c_empty = setting()
    unet.conv.data.zero_()
    model = GuidedModel(unet, c, c_empty, 7.5)
    path, g = walk(model, table, z_T)
    adjusted = adjusted_gradient(model, table, step_weights(SCHEDULE, table, "none"), path, g)
    exact, _ = exact_gradient(model, table, path, g)
    for ours, theirs in zip(adjusted, exact, strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_micro_batches_change_nothing_but_memory():
    unet, table, z_T, c, c_empty = setting()
    model = GuidedModel(unet, c, c_empty, 7.5)
    path, g = walk(model, table, z_T)
    w, results = step_weights(SCHEDULE, table), []
    for micro_batch in (0, 1, 2, 5, 8, 1000):
        unet.calls.clear()
        results.append(adjusted_gradient(model, table, w, path, g, micro_batch))
        # U-Net inputs, of which a pair of an image and a step has two
        assert max(batch for batch, _ in unet.calls) == 2 * min(micro_batch or N, N * table.S)
        assert sum(batch for batch, _ in unet.calls) == 2 * N * table.S
    for result in results[1:]:
        for ours, theirs in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, **close)


def test_no_graph_outlives_its_step():
    unet, table, z_T, c, c_empty = setting()
    model = GuidedModel(unet, c, c_empty, 7.5)
    path, g = walk(model, table, z_T)
    alive = []
    forward = unet.forward

    def watched(*arguments):
        alive.append(sum(hidden() is not None for _, hidden in unet.calls))
        return forward(*arguments)

    unet.forward = watched
    adjusted_gradient(model, table, step_weights(SCHEDULE, table), path, g)
    exact_gradient(model, table, path, g)
    exact_gradient(
        model, table, path, g, (torch.arange(table.S) >= table.S - 3).double()
    )  # the last three alone
    assert len(alive) == 2 * table.S + 3 and max(alive) == 0


def test_steps_of_weight_zero_are_not_evaluated():
    unet, table, z_T, c, c_empty = setting()
    model = GuidedModel(unet, c, c_empty, 7.5)
    path, g = walk(model, table, z_T)
    w, odd = step_weights(SCHEDULE, table), torch.arange(20) % 2 == 1
    whole = adjusted_gradient(model, table, w, path, g)
    unet.calls.clear()
    parts = [adjusted_gradient(model, table, w * keep, path, g) for keep in (odd, ~odd)]
    assert len(unet.calls) == 20
    for a, b, both in zip(*parts, whole, strict=True):
        torch.testing.assert_close(a + b, both, **close)


def test_arguments_are_left_alone():
    unet, table, z_T, c, c_empty = setting()
    model = GuidedModel(unet, c, c_empty, 7.5)
    path, g = walk(model, table, z_T)
    kept = [x.clone() for x in (c, c_empty, g, path[0].z)]
    adjusted_gradient(model, table, step_weights(SCHEDULE, table), path, g)
    kappa = torch.full((table.S,), 0.5)
    exact_gradient(model, table, path, g, kappa)
    assert (kappa == 0.5).all()
    for x, before in zip((c, c_empty, g, path[0].z), kept, strict=True):
        assert torch.equal(x, before) and not x.requires_grad
    assert all(parameter.grad is None for parameter in unet.parameters())


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("per_image", [False, True])
def test_a_vjp_is_the_finite_difference_of_each_leaf_in_turn(guidance, per_image):
    unet, table, z, c, c_empty = setting(per_image=per_image)
    model, v, h = GuidedModel(unet, c, c_empty, guidance), random(N, 4, 2, 2, seed=6), 1e-4
    t = table.timesteps[[3, 3, 9]]  # a time of its own for each image
    found, through_z = model.vjp(z, t, v, wrt_z=True)
    assert model.vjp(z, t, v)[1] is None
    leaves = [c, c_empty, unet.conv, unet.read, unet.out]
    assert all(a is b for a, b in zip(model.leaves, leaves, strict=True))
    for n, (x, gradient) in enumerate(zip([*leaves, z], [*found, through_z], strict=True)):
        way = random(*x.shape, seed=20 + n)
        x, values = x.detach(), []
        for k in (-2, -1, 1, 2):
            x += k * h * way
            with torch.no_grad():
                values.append(float((model.eps(z, t) * v).sum()))
            x -= k * h * way
        difference = (8 * (values[2] - values[1]) - (values[3] - values[0])) / (12 * h)
        assert float((gradient * way).sum()) == pytest.approx(difference, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("kind", [GuidedModel, KeepingModel])
def test_a_fixed_empty_branch_has_no_part_in_the_gradient_and_is_not_differentiated(kind):
    """c's gradient and eps are as ever, from half of the rows; with dz asked for all is as ever."""
    unet, table, z, c, c_empty = setting()
    unet.requires_grad_(False)
    whole, fixed = (kind(unet, c, c_empty, 7.5, fixed_empty) for fixed_empty in (False, True))
    v, t, rows, same = random(N, 4, 2, 2, seed=6), table.timesteps[3], {}, {}
    for model in (whole, fixed):
        unet.calls.clear()
        eps = model.eps(z, t)
        assert torch.allclose(eps, whole.eps(z, t), **close)
        unet.calls.clear()
        (dc, dc_empty), _ = GuidedModel.vjp(model, z, t, v)
        kept_eps, vjp = model.kept(z, t)
        assert torch.allclose(kept_eps, eps, **close) and torch.allclose(vjp(v)[0][0], dc, **close)
        rows[model is fixed] = [count for count, _ in unet.calls]
        same[model is fixed] = dc, *model.vjp(z, t, v, wrt_z=True)[0], model.vjp(z, t, v, wrt_z=True)[1]
        assert bool(dc_empty.any()) == (model is whole)
    assert rows == {False: [2 * N, 2 * N], True: [N, N, N]}  # each `vjp`, then `kept`
    for a, b in zip(*same.values(), strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e9])
def test_half_precision_holds_a_gradient_of_any_size(size):
    unet, table, z_T, c, c_empty = setting()
    model = GuidedModel(unet, c, c_empty, 7.5)
    path, g = walk(model, table, z_T)
    w = step_weights(SCHEDULE, table)
    unet.requires_grad_(False)
    expected = adjusted_gradient(model, table, w, path, g * size)
    frozen = ToyUNet(torch.float16).requires_grad_(False)
    half = GuidedModel(frozen, c.half(), c_empty.half(), 7.5)
    path32 = [point._replace(z=point.z.float()) for point in path]
    got = adjusted_gradient(half, table, w, path32, (g * size).float())
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32
        # 20 u of float16, u = 2^-11, where sqrt(R) u of the R = 899 roundings is 30 u. Most of the 11 u that are found
        # are of weights and inputs, rounded once: the order in which a processor adds changes a hundredth of it
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-2
    # Scaling by a power of two is exact: g 2^20 times as large gives bit for bit 2^20 times as much.
    g32 = (g * size).float() * 2**20
    larger = adjusted_gradient(half, table, w, path32, g32)
    assert all(torch.equal(x * 2**20, y) for x, y in zip(got, larger, strict=True))
