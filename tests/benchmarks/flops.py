"""What a run on Stable Diffusion 1.5 costs, by arithmetic: FLOPs, memory, hours. The tables of docs/cost.md.

    python tests/benchmarks/flops.py [--tflops 312] [--utilisation 0.35] [--out FILE]

Networks are counted under torch's FakeTensorMode, which knows shapes only: it takes seconds and no memory. A FLOP is
a multiplication or an addition, of matrix products, convolutions and attention; the rest is not counted.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

sys.path.append(str(Path(__file__).resolve().parent))
from measure import table, write

from fairref.bundle.stable_diffusion import NETWORKS
from fairref.generation.lora import put_lora, shared_copy, trained_layers
from fairref.judges.dino import Dino, DinoConfig
from fairref.judges.mobilenet import MobileNetConfig, MobileNetV3
from fairref.judges.sfnet import SFNet, SFNetConfig
from fairref.nets.clip import ClipImage, ClipVisionConfig
from fairref.nets.unet import SD15, Conv3x3
from fairref.nets.vae import Level, MidBlock
from fairref.settings import Recipe
from fairref.training.loop import RECOMPUTED

LATENT, PICTURE = (4, 64, 64), (3, 512, 512)
TEXT = (77, 768)  # c of a prompt
HALF = torch.float16
CLIP_H = ClipVisionConfig(1280, 5120, 16, 32, projection_dim=1024, patch_size=14, hidden_act="gelu")
SOURCE = {"gpus": 8, "hours": 48}  # A100, of the method's description
SOURCE_MICRO_BATCH = 3  # images of a GPU with a graph at once, in the paper's runs and in docs/sd15.md
SUBSAMPLES = (10, 5, 1)  # M of the S steps
# GB and TFLOP/s of a card that has the whole batch -> options, M, images with a graph at once, whether recomputed
ONE_GPU = {
    (12, 50): ("--grad-steps 2 --micro-batch 2 --recompute", 2, 2, True),
    (24, 150): ("--grad-steps 2 --micro-batch 4", 2, 4, False),
}
DIFFUSERS_DECODER = "VAE decoder, recomputed as diffusers does"
PER_PICTURE = ("CLIP-H, pictures", "DINOv2 ViT-B/14", "classifier", "SFNet-20")  # what looks at pictures

BLOCKS = tuple(block for blocks in RECOMPUTED.values() for block in blocks)
LARGE_BLOCKS = (MidBlock, Level)  # of the decoder, as diffusers recomputes it

aten = torch.ops.aten
ATTENTION = {  # torch's counter knows the GPU's kernels, not the CPU's
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)
    ),
}


@dataclass(frozen=True)
class Cost:
    """Of a network for one input, in float16."""

    forward: int  # FLOPs
    backward: int  # FLOPs of the gradient that finetuning needs, which is never one of frozen weights
    parameters: int
    saved: int  # bytes that a forward pass keeps for the backward pass, without weights
    inputs: int = 0  # bytes of the inputs of BLOCKS, which is what is kept where these are recomputed
    largest: int = 0  # bytes that the largest of BLOCKS keeps


class Kept:
    """What a forward pass keeps for the backward pass, as memory -> bytes: of the network, at most of one block, and
    the blocks' inputs."""

    def __init__(self, network: nn.Module, blocks: tuple[type, ...]):
        self.weights = {storage(p) for p in (*network.parameters(), *network.buffers())}
        self.saved, self.inputs, self.block, self.largest = {}, {}, {}, 0
        self.alive = []  # else another tensor could get the memory, and the name, of one that is counted
        self.blocks = [module for module in network.modules() if isinstance(module, blocks)]

    def keep(self, x):
        if storage(x) not in self.weights:
            self.alive.append(x)
            self.saved[storage(x)] = self.block[storage(x)] = x.untyped_storage().nbytes()
        return x

    def enter(self, module, arguments):
        self.alive += arguments
        self.inputs.update({storage(x): x.untyped_storage().nbytes() for x in arguments})
        self.block = {}

    def leave(self, module, arguments, y):
        self.largest = max(self.largest, sum(self.block.values()))

    @contextmanager
    def watched(self):
        """The forward pass happens inside."""
        hooks = [block.register_forward_pre_hook(self.enter) for block in self.blocks]
        hooks += [block.register_forward_hook(self.leave) for block in self.blocks]
        with saved_tensors_hooks(self.keep, lambda x: x):
            yield
        for hook in hooks:
            hook.remove()


def counted(
    network: nn.Module, run: Callable, leaf: torch.Tensor | None = None, blocks: tuple[type, ...] = BLOCKS
) -> Cost:
    """The cost of y = run(network) and of its gradient at `leaf`, or at the parameters that require one.

    Call it under FakeTensorMode.
    """
    kept = Kept(network, blocks)
    with kept.watched(), counter() as forward:
        y = run(network)
    wrt = [leaf] if leaf is not None else [p for p in network.parameters() if p.requires_grad]
    with counter() as backward:
        torch.autograd.grad(y, wrt, torch.ones_like(y))
    return Cost(
        forward.get_total_flops(),
        backward.get_total_flops(),
        sum(p.numel() for p in network.parameters()),
        sum(kept.saved.values()),
        sum(kept.inputs.values()),
        kept.largest,
    )


def storage(x: torch.Tensor) -> int:
    """What tells two tensors' memory apart, also where there is none."""
    return x.untyped_storage()._cdata


def counter() -> FlopCounterMode:
    """Counts the FLOPs in its context."""
    return FlopCounterMode(display=False, custom_mapping=ATTENTION)


def networks() -> dict[str, Cost]:
    """The cost of each network of an SD-1.5 run, for one latent, picture or pair of texts."""
    half = {"dtype": HALF, "requires_grad": True}

    def frozen(network, *settings):
        default = torch.get_default_dtype()
        torch.set_default_dtype(HALF)  # a network without memory can't be converted later
        try:
            return network(*settings).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(default)

    # what is counted is a GPU's, on which convolutions have one way only
    with FakeTensorMode(), patch.object(Conv3x3, "forward", nn.Conv2d.forward):
        built = {name: frozen(part.network, part.sd15) for name, part in NETWORKS.items()}
        lora = shared_copy(built["text_encoder"])
        put_lora(lora, dict.fromkeys(trained_layers("text_encoder", lora), Recipe().rank))
        z, c = torch.empty(1, *LATENT, **half), torch.empty(1, *TEXT, **half)
        x, face = torch.empty(1, *PICTURE, **half), torch.empty(1, 3, 112, 112, **half)
        crop = torch.empty(1, 3, 224, 224, **half)
        ids = torch.zeros(2, TEXT[0], dtype=torch.long)
        judges = [
            (frozen(ClipImage, CLIP_H), lambda net: net.encode_image(x), x),
            (frozen(Dino, DinoConfig()), lambda net: net(x), x),
            (frozen(MobileNetV3, MobileNetConfig(num_logits=2)), lambda net: net(crop), crop),
            (frozen(SFNet, SFNetConfig()), lambda net: net(torch.cat([face, face.flip(3)])), face),
        ]
        latents = z.detach()
        return {
            "U-Net": counted(built["unet"], lambda net: net(latents, 500, c), c),
            "VAE decoder": counted(built["vae"], lambda net: net.decode(z), z),
            DIFFUSERS_DECODER: counted(built["vae"], lambda net: net.decode(z), z, LARGE_BLOCKS),
            "text encoder, LoRA": counted(lora, lambda net: net(ids)),
            **{name: counted(net, run, at) for name, (net, run, at) in zip(PER_PICTURE, judges, strict=True)},
        }


@dataclass(frozen=True)
class Way:
    """How often an iteration runs each network, of N images and S steps."""

    unet: float  # forward passes of the U-Net, in units of 2 N S
    unet_back: float  # backward passes, in the same
    decoded: int  # forward passes of the decoder, in units of N
    steps_kept: int  # steps whose graph is there at once
    recomputed: bool  # whether only the inputs of blocks are kept
    end_to_end: bool  # whether the pictures' graph is there at the same time


def ways(S: int) -> dict[str, Way]:
    """All draw the model's pictures and the frozen one's; then they differ."""
    return {
        "as the released code": Way(2 + 2, 1, 4, S, True, True),
        "stored path": Way(2 + 1, 1, 3, 1, False, False),
        "stored path, recomputed": Way(2 + 2, 1, 4, 1, True, False),
        **{f"stored path, M = {M}": Way(2 + M / S, M / S, 3, 1, False, False) for M in SUBSAMPLES},
    }


def flops_of(way: Way, costs: dict[str, Cost], N: int, S: int) -> float:
    """FLOPs of one iteration: U-Net, decoder, judges on both pictures and back, text."""
    unet, vae, text = (costs[name] for name in ("U-Net", "VAE decoder", "text encoder, LoRA"))
    total = 2 * N * S * (way.unet * unet.forward + way.unet_back * unet.backward)
    total += N * (way.decoded * vae.forward + vae.backward)
    for name in PER_PICTURE:
        looks = 3 if name == "classifier" else 2  # targets need a look at the pictures before
        looks += way.recomputed and not way.end_to_end and costs[name].inputs > 0
        total += N * (looks * costs[name].forward + costs[name].backward)
    return total + 2 * text.forward + text.backward


def weights_of(costs: dict[str, Cost]) -> float:
    """Bytes of all weights, the adapter's with AdamW's and the moving average's copies."""
    lora = costs["text encoder, LoRA"].parameters - text_parameters()
    there = sum(cost.parameters for name, cost in costs.items() if name != DIFFUSERS_DECODER)
    return 2 * (there - lora) + 5 * 4 * lora


def memory_of(way: Way, costs: dict[str, Cost], micro_batch: int) -> float:
    """Bytes of one GPU: frozen weights, the adapter with AdamW's and the moving average's copies, and what is kept for
    gradients of a micro-batch of images."""
    weights = weights_of(costs)
    unet, vae, looks = costs["U-Net"], costs["VAE decoder"], [costs[name] for name in PER_PICTURE]
    judges = micro_batch * sum(cost.saved for cost in looks)
    steps = 2 * micro_batch * way.steps_kept * (unet.inputs if way.recomputed else unet.saved)
    block = 2 * micro_batch * unet.largest if way.recomputed else 0
    if way.end_to_end:  # pictures hang on the path, and the decoder is recomputed, too
        vae = costs[DIFFUSERS_DECODER]
        return weights + steps + micro_batch * vae.inputs + max(judges, micro_batch * vae.largest, block)
    decoder = micro_batch * vae.saved
    if way.recomputed:
        decoder = vae.inputs + vae.largest  # one picture at once
        kept = (cost.inputs if cost.inputs else cost.saved for cost in looks)
        judges = micro_batch * (sum(kept) + max(cost.largest for cost in looks))
    return weights + max(steps + block, decoder, judges)


def one_gpu(costs: dict[str, Cost], recipe: Recipe, S: int, utilisation: float) -> list[dict]:
    """What a run on a single card of ONE_GPU takes."""
    rows = []
    for (size, tflops), (options, M, micro_batch, recomputed) in ONE_GPU.items():
        share = M / S
        way = Way(2 + share * (1 + recomputed), share, 3 + recomputed, 1, recomputed, False)
        flops = flops_of(way, costs, recipe.batch, S)
        peak = memory_of(way, costs, micro_batch)
        # the sampler has no graph, but all images: at most an MLP's gate, its two halves and their product
        pixels, width = LATENT[1] * LATENT[2], SD15.block_out_channels[0]
        sampling = 2 * 2 * recipe.batch * pixels * width * (8 + 4 + 4)
        rows.append(
            {
                "card": f"{size} GB, {tflops} TFLOP/s",
                "options": f"`{options}`",
                "gigabytes": max(peak, weights_of(costs) + sampling) / 1e9,
                "seconds": hours(flops, 1, 1, tflops, utilisation) * 3600,
                "hours": hours(flops, recipe.iterations, 1, tflops, utilisation),
            }
        )
    return rows


def text_parameters() -> int:
    """Of SD-1.5's text encoder without LoRA."""
    with torch.device("meta"):
        return sum(
            p.numel() for p in NETWORKS["text_encoder"].network(NETWORKS["text_encoder"].sd15).parameters()
        )


def hours(flops: float, iterations: int, gpus: int, tflops: float, utilisation: float) -> float:
    """Of a whole run."""
    return flops * iterations / (gpus * tflops * 1e12 * utilisation) / 3600


def report(tflops: float, utilisation: float) -> dict:
    """All numbers of the tables."""
    recipe, costs = Recipe(), networks()
    N, S = recipe.batch, round(sum(recipe.steps[:2]) / 2)
    found = {}
    for name, way in ways(S).items():
        flops = flops_of(way, costs, N, S)
        found[name] = {
            "petaflop": flops / 1e15,
            "gigabytes": memory_of(way, costs, SOURCE_MICRO_BATCH) / 1e9,
            "hours_1": hours(flops, recipe.iterations, 1, tflops, utilisation),
            "hours_8": hours(flops, recipe.iterations, 8, tflops, utilisation),
        }
    released = found["as the released code"]
    source = (
        released["petaflop"] * 1e3 * recipe.iterations / (SOURCE["gpus"] * SOURCE["hours"] * 3600 * tflops)
    )
    return {
        "recipe": {"N": N, "S": S, "iterations": recipe.iterations, "micro_batch": SOURCE_MICRO_BATCH},
        "assumed": {"tflops": tflops, "utilisation": utilisation},
        "networks": {name: asdict(cost) for name, cost in costs.items()},
        "ways": found,
        "one_gpu": one_gpu(costs, recipe, S, utilisation),
        "source_utilisation": source,
    }


def tables(found: dict) -> str:
    """What docs/cost.md shows."""
    header = ["one input", "forward, GFLOP", "backward, GFLOP", "parameters, M", "kept for backward, MB"]
    rows = [
        [name, c["forward"] / 1e9, c["backward"] / 1e9, c["parameters"] / 1e6, c["saved"] / 1e6]
        for name, c in found["networks"].items()
        if name != DIFFUSERS_DECODER
    ]
    released = found["ways"]["as the released code"]
    per_way = [
        [
            name,
            w["petaflop"],
            f"{w['petaflop'] / released['petaflop']:.0%}",
            w["gigabytes"],
            w["hours_1"],
            w["hours_8"],
        ]
        for name, w in found["ways"].items()
    ]
    recipe = found["recipe"]
    titles = ["way", "PFLOP an iteration", "share", "memory of a GPU, GB", "hours, 1 GPU", "hours, 8 GPUs"]
    source = [f"the paper, {SOURCE['gpus']} x A100", None, None, None, None, SOURCE["hours"]]
    text = (
        f"N = {recipe['N']}, S = {recipe['S']}, {recipe['iterations']:,} iterations, {recipe['micro_batch']} images a "
        f"GPU with a graph at once, float16; {found['assumed']['tflops']:g} TFLOP/s of a GPU, of which "
        f"{found['assumed']['utilisation']:.0%} are used. "
        f"By this count the paper's {SOURCE['hours']} hours used {found['source_utilisation']:.0%}."
    )
    of_cards = ["card", "options", "memory, GB", "seconds an iteration", f"hours of {recipe['iterations']:,}"]
    cards = [list(row.values()) for row in found["one_gpu"]]
    return "\n\n".join([table(header, rows), table(titles, [*per_way, source]), text, table(of_cards, cards)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--tflops", type=float, default=312, help="a GPU's peak in float16 (312: A100, dense)"
    )
    parser.add_argument("--utilisation", type=float, default=0.35, help="share of it that a run reaches")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    found = report(options.tflops, options.utilisation)
    print(tables(found))
    write(options.out, found)


if __name__ == "__main__":
    main()
