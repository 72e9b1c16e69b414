"""The sampling loop: guidance, what it yields, its noise, and the whole loop beside diffusers' scheduler."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from fairref.diffusion.model import GuidedModel, guide
from fairref.diffusion.sampler import Step, noise, sample
from fairref.diffusion.schedule import Schedule
from fairref.diffusion.solver import ancestral_table, solver_table
from fairref.errors import UserError

SCHEDULE = Schedule()


class ToyUNet(nn.Module):
    """A few lines that depend on every input, and a record of the batches it was called with."""

    def __init__(self, d=6, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(torch.randn(4, 4, generator=generator).to(dtype) / 2)
        self.read = nn.Parameter(torch.randn(4, d, generator=generator).to(dtype) / 2)
        self.calls = []

    def forward(self, z, t, c):
        self.calls.append((z.shape[0], z.dtype, c.dtype, t))
        moved = torch.einsum("oc,bchw->bohw", self.mix, z)
        told = torch.einsum("od,btd->bo", self.read, c.tanh())[:, :, None, None]
        return torch.tanh(
            moved + told.repeat_interleave(len(z) // len(c), 0) + torch.as_tensor(t).view(-1, 1, 1, 1) / 1000
        )


def embeddings(n=1, d=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, d, generator=generator), torch.randn(n, 3, d, generator=generator)


def test_guide():
    eps_empty, eps_prompt = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(guide(eps_empty, eps_prompt, 0.0), eps_empty)
    torch.testing.assert_close(guide(eps_empty, eps_prompt, 1.0), eps_prompt)
    torch.testing.assert_close(guide(eps_empty, eps_prompt, 7.5), 7.5 * eps_prompt - 6.5 * eps_empty)


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_the_loop_is_that_of_diffusers(end):
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", final_sigmas_type=end
    )
    unet, (c, c_empty), z_T = ToyUNet(), embeddings(), noise(0, 0, range(3), (4, 2, 2))
    for S in (1, 8, 20, 25):
        peer.set_timesteps(S)
        theirs = z_T
        with torch.no_grad():
            for t in peer.timesteps:
                eps_prompt = unet(theirs, t, c.expand(3, -1, -1))
                eps_empty = unet(theirs, t, c_empty.expand(3, -1, -1))
                theirs = peer.step(eps_empty + 7.5 * (eps_prompt - eps_empty), t, theirs).prev_sample
            *_, last = sample(GuidedModel(unet, c, c_empty, 7.5), solver_table(SCHEDULE, S, end), z_T)
        np.testing.assert_allclose(last.z, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_what_is_yielded():
    unet, (c, c_empty), z_T = ToyUNet(), embeddings(), noise(0, 0, range(2), (4, 2, 2))
    table, kept = solver_table(SCHEDULE, 9), z_T.clone()
    with torch.no_grad():
        path = list(sample(GuidedModel(unet, c, c_empty, 7.5), table, z_T))
    assert [step.i for step in path] == list(range(10))
    assert [step.t for step in path[:-1]] == table.timesteps.tolist()
    assert path[0].z is z_T and torch.equal(z_T, kept)
    assert isinstance(path[-1], Step) and path[-1].t is None and path[-1].eps is None
    total = table.a * z_T.double() + sum(
        float(k) * step.eps.double() for k, step in zip(table.k, path[:-1], strict=True)
    )
    torch.testing.assert_close(path[-1].z.double(), total, rtol=1e-5, atol=1e-5)


def test_both_branches_are_one_call_and_guidance_1_needs_only_the_prompt():
    unet, (c, c_empty), z_T = ToyUNet(), embeddings(), noise(0, 0, range(2), (4, 2, 2))
    table = solver_table(SCHEDULE, 4)
    with torch.no_grad():
        *_, two = sample(GuidedModel(unet, c, c_empty, 1.0 + 1e-6), table, z_T)
        assert [call[0] for call in unet.calls] == [4] * 4
        unet.calls.clear()
        *_, one = sample(GuidedModel(unet, c, None, 1.0), table, z_T)
        assert [call[0] for call in unet.calls] == [2] * 4
    torch.testing.assert_close(two.z, one.z, rtol=1e-4, atol=1e-4)


def test_an_embedding_per_image():
    unet, z_T = ToyUNet(), noise(0, 0, range(3), (4, 2, 2))
    (c, c_empty), table = embeddings(3), solver_table(SCHEDULE, 5)
    with torch.no_grad():
        *_, together = sample(GuidedModel(unet, c, c_empty, 3.0), table, z_T)
        for n in range(3):
            one = slice(n, n + 1)
            *_, alone = sample(GuidedModel(unet, c[one], c_empty[one], 3.0), table, z_T[one])
            torch.testing.assert_close(together.z[one], alone.z, rtol=1e-5, atol=1e-5)


def test_a_half_precision_network_leaves_the_latents_float32():
    unet, (c, c_empty), z_T = ToyUNet(dtype=torch.bfloat16), embeddings(), noise(0, 0, range(2), (4, 2, 2))
    with torch.no_grad():
        path = list(sample(GuidedModel(unet, c, c_empty, 7.5), solver_table(SCHEDULE, 3), z_T))
    assert {step.z.dtype for step in path} | {step.eps.dtype for step in path[:-1]} == {torch.float32}
    assert {call[1:3] for call in unet.calls} == {(torch.bfloat16, torch.bfloat16)}


def test_ancestral_noise_enters():
    unet, (c, c_empty), z_T = ToyUNet(), embeddings(), noise(0, 0, range(2), (4, 2, 2))
    table = ancestral_table(SCHEDULE, 6)
    w = [noise(0, 1 + i, range(2), (4, 2, 2)) for i in range(6)]
    with torch.no_grad():
        path = list(sample(GuidedModel(unet, c, c_empty, 2.0), table, z_T, w))
    total = table.a * z_T + sum(float(k) * step.eps for k, step in zip(table.k, path[:-1], strict=True))
    total = total + sum(float(m) * x for m, x in zip(table.m, w, strict=True))
    torch.testing.assert_close(path[-1].z, total, rtol=1e-4, atol=1e-4)


def test_noise_belongs_to_the_image():
    whole = noise(5, 2, range(6), (4, 3, 3))
    assert whole.shape == (6, 4, 3, 3) and whole.dtype == torch.float32
    parts = torch.cat([noise(5, 2, [0, 2, 4], (4, 3, 3)), noise(5, 2, [1, 3, 5], (4, 3, 3))])
    assert torch.equal(parts[[0, 3, 1, 4, 2, 5]], whole)
    every = torch.cat([whole, noise(6, 2, range(6), (4, 3, 3)), noise(2, 5, range(6), (4, 3, 3))])
    assert every.flatten(1).unique(dim=0).shape[0] == 18
    assert noise(5, 2, [], (4, 3, 3)).shape == (0, 4, 3, 3)


def test_noise_has_a_key_of_three_numbers_and_no_sum_of_them():
    """numpy's own streams of these keys; images of unlike keys are unlike."""
    shape, keys = (4, 3, 3), list(itertools.product((0, 1, 3), (0, 1, 2), (0, 1, 2)))
    images = torch.cat([noise(seed, iteration, [n], shape) for seed, iteration, n in keys])
    for image, key in zip(images, keys, strict=True):
        stream = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        assert torch.equal(image, torch.from_numpy(stream.standard_normal(shape, dtype=np.float32)))
    assert len(images.flatten(1).unique(dim=0)) == len(keys)


def test_noise_is_standard_normal():
    x = noise(0, 0, range(64), (4, 16, 16))
    assert abs(float(x.mean())) < 4 / x.numel() ** 0.5
    assert abs(float(x.var()) - 1) < 4 * (2 / x.numel()) ** 0.5
    correlation = torch.corrcoef(x.flatten(1)) - torch.eye(64)
    assert float(correlation.abs().max()) < 6 / 1024**0.5


@pytest.mark.parametrize(
    "arguments, said", [((-1, 0, [0]), "seed is -1"), ((0, 0, [2**32]), "image index is")]
)
def test_noise_checks_its_key(arguments, said):
    with pytest.raises(UserError, match=said):
        noise(*arguments, (4, 2, 2))
