"""The method's gradient as its released code takes it, with diffusers' networks and scheduler.

Sampling is run twice: without a graph to look at the pictures, then again with one, through the scheduler, with a
hook on each noise prediction and the U-Net's inputs detached (Algorithm A.1 as it is printed). The blocks of the U-Net
and of the decoder are computed again in the backward pass. The text is embedded once for all images of a part, where
the released code embeds a copy for each.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor

from fairref.bundle.loading import Bundle
from fairref.diffusion.schedule import Schedule
from fairref.fairness.transport import joint_ot
from fairref.generation.rollout import embed, first_noise
from fairref.training.setup import Setup, Task
from fairref.training.step import all_logits
from fairref.training.terms import View, judged_pair, loss_of

SAME = ("block_out_channels", "layers_per_block", "in_channels", "out_channels", "norm_num_groups")
OF_UNET = ("down_block_types", "up_block_types", "cross_attention_dim", "attention_head_dim", "norm_eps")
OF_UNET += ("use_linear_projection",)


def with_peers(bundle: Bundle) -> Bundle:
    """The bundle with diffusers' U-Net and autoencoder, of the same weights in torch's order, in place of ours."""
    return replace(bundle, unet=peer_unet(bundle.unet), vae=peer_vae(bundle.vae))


def peer_unet(unet) -> UNet2DConditionModel:
    """Diffusers' U-Net with the weights of ours."""
    settings = {name: getattr(unet.config, name) for name in SAME + OF_UNET}
    with torch.device("meta"):
        peer = UNet2DConditionModel(**settings)
    return _ready(peer, unet)


def peer_vae(vae) -> AutoencoderKL:
    """Diffusers' autoencoder with the weights of ours."""
    levels = len(vae.config.block_out_channels)
    settings = {name: getattr(vae.config, name) for name in (*SAME, "latent_channels", "scaling_factor")}
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    with torch.device("meta"):
        peer = AutoencoderKL(**settings, **kinds)
    return _ready(peer, vae)


def _ready(peer, ours):
    peer.load_state_dict(ours.state_dict(), strict=True, assign=True)
    peer = peer.to(memory_format=torch.contiguous_format).requires_grad_(False)
    peer.enable_gradient_checkpointing()
    return peer.train()  # there is no dropout; some versions recompute in this mode only


def scheduler_of(s: Schedule, S: int, end: str) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (2M, midpoint) of a schedule, with S steps."""
    scheduler = DPMSolverMultistepScheduler(
        s.T, s.beta_start, s.beta_end, beta_schedule=s.kind, final_sigmas_type=end
    )
    scheduler.set_timesteps(S)
    return scheduler


def coefficients(scheduler) -> list[float]:
    """C_i = 1/A_t over their geometric mean, from the scheduler's own tables."""
    t = scheduler.timesteps
    alpha_bar = scheduler.alphas_cumprod[t].double()
    C = (alpha_bar * (1 - alpha_bar)).sqrt() / scheduler.betas[t].double()  # 1/A_t
    return (C / C.log().mean().exp()).tolist()


def steps(unet, scheduler, z_T: Tensor, both: Tensor, guidance: float) -> Iterator[Tensor]:
    """z after each step of a run; `both` = [c, c_empty] (2, T, d). Where there is a graph, it is Algorithm A.1's."""
    N, z, C = len(z_T), z_T, coefficients(scheduler)
    c, c_empty = both.to(unet.dtype).split(1)
    context = torch.cat([c_empty.expand(N, -1, -1), c.expand(N, -1, -1)])  # (2N, T, d)
    for i, t in enumerate(scheduler.timesteps):
        inputs = torch.cat([z.detach()] * 2).to(unet.dtype)
        eps_empty, eps = unet(inputs, t, encoder_hidden_states=context).sample.to(z.dtype).chunk(2)
        eps = eps_empty + guidance * (eps - eps_empty)
        if eps.requires_grad:
            eps.register_hook(lambda g, C_i=C[i]: C_i * g)
        z = scheduler.step(eps, t, z).prev_sample
        yield z


def drawn(model: Bundle, z_T: Tensor, both: Tensor, task: Task, end: str) -> Tensor:
    """Pictures (N, 3, H, W) of a whole run."""
    scheduler = scheduler_of(model.schedule, task.S, end)
    *_, z_0 = steps(model.unet, scheduler, z_T, both, task.guidance)
    return model.vae.decode(z_0 / model.vae.config.scaling_factor).sample.clamp(-1, 1)


def gradient(
    setup: Setup, model: Bundle, parameters: list, task: Task, loss: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """dL/dparameters: the pictures are drawn a second time, in parts, each with its graph.

    `loss(x, rows)` is the part of L that the images `rows` have.
    """
    N, recipe = setup.recipe.batch, setup.recipe
    z_T = first_noise(setup.bundle, recipe.seed, 0, range(N))
    for rows in torch.arange(N).split(recipe.micro_batch or N):
        x = drawn(model, z_T[rows], embed(model, task.prompt), task, recipe.end)
        loss(x, rows).backward()
    found = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return found


def look(setup: Setup, model: Bundle, task: Task) -> Tensor:
    """The adapted model's pictures, without a graph."""
    z_T = first_noise(setup.bundle, setup.recipe.seed, 0, range(setup.recipe.batch))
    with torch.no_grad():
        return drawn(model, z_T, embed(model, task.prompt), task, setup.recipe.end)


def iteration(setup: Setup, model: Bundle, parameters: list, task: Task) -> list[Tensor]:
    """dL/dparameters of a whole iteration, with the frozen model's pictures, targets and the finetuning loss."""
    x, o = look(setup, model, task), look(setup, setup.bundle, task)
    with torch.no_grad():
        pair = judged_pair(setup, x, x, o)  # its z_0 is not used
        logits, has_face = all_logits(setup, pair)
        q = {name: of_one.q for name, of_one in joint_ot(logits, task.target.table, has_face).items()}

    def loss(x, rows):
        of_rows = {name: of_all[rows] for name, of_all in q.items()}
        return loss_of(View(setup, task, x, pair[rows], of_rows))[0]

    return gradient(setup, model, parameters, task, loss)
