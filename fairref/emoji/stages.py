"""Train the networks that draw. Every stage is a function of the folder of stage files.

Order: tokenizer, vae, clip, pool (captions and the VAE's latents of their pictures, drawn once), unet (with the
text encoder), unet_polish. Each reads the files of the stages before it. The judges are trained in judging.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairref.bundle.configs import read_config
from fairref.bundle.judges import load_sprites
from fairref.diffusion.schedule import Schedule
from fairref.emoji.bpe import train_bpe
from fairref.emoji.captions import (
    KINDS,
    concepts,
    describe,
    draw_world,
    occupations,
    prompt_of,
)
from fairref.emoji.fit import fit, generator_for
from fairref.emoji.pictures import (
    AGES,
    COLOURLESS,
    STYLES,
    VIEWS,
    Scene,
    draw,
    random_scene,
)
from fairref.emoji.sheet import things
from fairref.files.tokenizer import Tokenizer
from fairref.files.tokenizer_files import read_vocabulary
from fairref.judges.sprites import GENDERS, LOOKS, RESOLUTION, TONES
from fairref.nets.clip import Clip, ClipConfig, ClipText, ClipTextConfig
from fairref.nets.unet import UNet, UNetConfig
from fairref.nets.vae import VAE, VAEConfig
from fairref.progress import Progress

VOCABULARY = 2000  # nearly every word of the captions is one token
TOKENS = 77
ATTRIBUTES = {"gender": GENDERS, "skin_tone": TONES, "age": AGES}
VIEW_SHARE = (0.7, 0.12, 0.12, 0.06)  # of balanced scenes, in the order of VIEWS
THING_SHARE, STYLE_SHARE = 0.4, 0.2

VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [16, 32, 64, 96],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "scaling_factor": 1.0,
    "sample_size": RESOLUTION,
}
UNET_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": RESOLUTION // 8,
    "block_out_channels": [96, 160, 192],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "cross_attention_dim": 96,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
    "norm_eps": 1e-5,
    "act_fn": "silu",
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
TEXT_CONFIG = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 384,
    "projection_dim": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": VOCABULARY - 2,
    "eos_token_id": VOCABULARY - 1,
    "pad_token_id": VOCABULARY - 1,
}
CLIP_CONFIG = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": 64,
    "text_config": TEXT_CONFIG,
    "vision_config": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "projection_dim": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_channels": 3,
        "image_size": RESOLUTION,
        "patch_size": 8,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer; if it is not in the folder yet, learn it from captions that have every name."""
    files = folder / "tokenizer" / "vocab.json", folder / "tokenizer" / "merges.txt"
    if not all(file.exists() for file in files):
        generator = generator_for(0, "tokenizer", 0)
        texts = describe(*draw_world(8000, generator, "clip"), generator)
        jobs = [job.name for job in occupations()]
        texts += jobs + [name.replace("_", " ") for name in things()]
        texts += [prompt_of(concept, jobs[0]) for kind in KINDS for concept in concepts(kind)]
        made = train_bpe(texts, VOCABULARY, folder / "tokenizer")
        assert made == VOCABULARY, f"the captions make {made} tokens: TEXT_CONFIG's ids would be wrong"
    return Tokenizer(read_vocabulary(folder / "tokenizer"))


def balanced_scene(
    B: int, generator: torch.Generator, portraits: bool = False, views: tuple[float, ...] = VIEW_SHARE
) -> Scene:
    """Return B scenes with look, gender, tone and age uniform and independent; `views`: shares of VIEWS.

    `portraits`: all are portraits without a style.
    """
    look, gender, tone, old, thing, style = (
        torch.randint(len(names), (B,), generator=generator)
        for names in (LOOKS, GENDERS, TONES, AGES, things(), STYLES)
    )
    with_thing, in_style = torch.rand(2, B, generator=generator) < torch.tensor(
        [[THING_SHARE], [STYLE_SHARE]]
    )
    view = torch.multinomial(torch.tensor(views), B, replacement=True, generator=generator)
    if portraits:
        view, in_style = torch.zeros_like(view), torch.zeros_like(in_style)
    thing = thing.where(with_thing | (view == VIEWS.index("nobody")), -1)
    return random_scene(look, gender, tone, generator, old, view, thing, style * in_style)


def labels(scene: Scene) -> dict[str, Tensor]:
    """Return the person's look and classes of ATTRIBUTES, each (B,), -1 where it can't be seen."""
    colours = ~torch.isin(scene.style, torch.tensor([STYLES.index(name) for name in COLOURLESS]))
    p, shown = scene.person, scene.shown
    return {
        "look": p.look.where(shown, -1),
        "gender": p.gender.where(shown, -1),
        "skin_tone": p.tone.where(shown & colours, -1),
        "age": p.old.where(shown & colours & load_sprites().aged[p.look], -1),
    }


def train_vae(folder: Path, steps: int = 3600, batch: int = 16, kl: float = 1e-4) -> VAE:
    """Train the VAE as latent diffusion's without a discriminator: squared and absolute error, a little KL."""

    def loss_of(vae: VAE, generator: torch.Generator) -> Tensor:
        x = draw(balanced_scene(batch, generator))
        mean, logvar = vae.moments(x)
        z = mean + torch.exp(logvar / 2) * torch.randn(mean.shape, generator=generator)
        error = vae.decode(z * vae.config.scaling_factor) - x
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.square().mean() * 4 + error.abs().mean() * 0.5 + kl * divergence

    torch.manual_seed(0)
    vae = VAE(read_config(VAEConfig, VAE_CONFIG)).to(memory_format=torch.channels_last)
    return fit("vae", vae, loss_of, steps=steps, lr=2e-3, folder=folder, ema=0.995)


def scaled(vae: VAE, seed: int = 0) -> VAE:
    """Return the same VAE with the scaling_factor that gives its latents a standard deviation of one."""
    with torch.no_grad():
        mean, _ = vae.moments(draw(balanced_scene(512, generator_for(seed, "scale", 0))))
    config = read_config(VAEConfig, {**VAE_CONFIG, "scaling_factor": round(1 / mean.std().item(), 5)})
    new = VAE(config).to(memory_format=torch.channels_last)
    new.load_state_dict(vae.state_dict())
    return new.eval()


@dataclass(frozen=True)
class Pool:
    """Captions and the latents of their pictures."""

    texts: list[str]
    z: Tensor  # (M, 4, h, w)


@torch.no_grad()
def make_pool(folder: Path, vae: VAE, stage: str, count: int = 48_000, batch: int = 64) -> Pool:
    """Return `count` captions of a stage of the U-Net with one picture each, drawn once and kept in the folder."""
    file = folder / f"pool_{stage}.pt"
    if not file.exists():
        texts, z = [], []
        with Progress(count // batch, f"pool_{stage}") as progress:
            for n in range(count // batch):
                captions, scene = draw_world(batch, generator_for(0, f"pool {stage}", n), stage)
                texts += [caption.text for caption in captions]
                z.append(vae.encode(draw(scene)))
                progress.step("")
        torch.save({"texts": texts, "z": torch.cat(z)}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    return Pool(**torch.load(file, weights_only=True))


class Painter(nn.Module):
    """U-Net and text encoder, trained together; the text encoder starts as CLIP's text tower."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.text_encoder = ClipText(read_config(ClipTextConfig, TEXT_CONFIG))
        self.text_encoder.text_model.load_state_dict(clip.text_model.state_dict())
        self.unet = UNet(read_config(UNetConfig, UNET_CONFIG)).to(memory_format=torch.channels_last)


def tell_apart(network: nn.Module) -> None:
    """Make the initial embeddings large: the blocks must not hide which word or place it is."""
    for name, parameter in network.named_parameters():
        if name.endswith(("token_embedding.weight", "position_embedding.weight")):
            nn.init.normal_(parameter, std=0.5 if "token" in name else 0.1)


def noise_loss(folder: Path, pool: Pool, batch: int) -> Callable[[Painter, torch.Generator], Tensor]:
    """Return the loss of the U-Net: mean squared error of the predicted noise, t uniform."""
    schedule = Schedule()
    signal = schedule.alpha_bar.sqrt().float()
    sigma = (1 - schedule.alpha_bar).sqrt().float()
    tokenizer = read_tokenizer(folder)

    def loss_of(painter: Painter, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pool.z), (batch,), generator=generator)
        ids = tokenizer([pool.texts[i] for i in index])
        z_0 = pool.z[index]  # (B, 4, h, w)
        t = torch.randint(schedule.T, (batch,), generator=generator)
        eps = torch.randn(z_0.shape, generator=generator)
        z_t = signal[t].view(-1, 1, 1, 1) * z_0 + sigma[t].view(-1, 1, 1, 1) * eps
        return F.mse_loss(painter.unet(z_t, t, painter.text_encoder(ids)), eps)

    return loss_of


def train_unet(folder: Path, vae: VAE, clip: Clip, steps: int = 4800, batch: int = 48) -> Painter:
    """Train the U-Net's first stage, from random weights and CLIP's text tower."""
    torch.manual_seed(0)
    loss_of = noise_loss(folder, make_pool(folder, vae, "first"), batch)
    return fit("unet", Painter(clip), loss_of, steps=steps, lr=1e-3, folder=folder, ema=0.998)


def polish_unet(folder: Path, vae: VAE, painter: Painter, steps: int = 4800, batch: int = 48) -> Painter:
    """Train the second stage: a lower rate, and more captions of hard cases (tones, pairs, far away, things alone)."""
    loss_of = noise_loss(folder, make_pool(folder, vae, "second"), batch)
    return fit("unet_polish", painter, loss_of, steps=steps, lr=5e-4, folder=folder, ema=0.998)


class NamedClip(nn.Module):
    """CLIP and, for its training, linear classifiers that read both towers."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = Clip(read_config(ClipConfig, CLIP_CONFIG))
        tell_apart(self.clip)
        classes = {
            "look": LOOKS,
            **ATTRIBUTES,
            "view": VIEWS,
            "style": STYLES,
            "thing": ("none", *things()),
        }
        self.heads = nn.ModuleDict(
            {k: nn.Linear(CLIP_CONFIG["projection_dim"], len(v)) for k, v in classes.items()}
        )


def train_clip(folder: Path, steps: int = 900, batch: int = 96, lr: float = 1e-3) -> Clip:
    """Train CLIP with the symmetric contrastive loss, over captions that also name hair and background.

    Look and background nearly suffice to tell the pictures of a batch apart, so the difference between two people of
    one look is learnt late. For this reason linear classifiers predict look, attributes, view, style and thing too.
    The same ones read both towers; of a text they predict only the attributes that it names.
    """
    tokenizer = read_tokenizer(folder)

    def loss_of(named: NamedClip, generator: torch.Generator) -> Tensor:
        captions, scene = draw_world(batch, generator, "clip")
        clip = named.clip
        text = clip.encode_text(tokenizer(describe(captions, scene, generator)))
        image = clip.encode_image(draw(scene))
        scale = clip.logit_scale.exp().clamp(max=100)
        logits = scale * image @ text.T  # (B, B)
        same = torch.arange(batch)
        loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        seen = {**labels(scene), "view": scene.view, "style": scene.style, "thing": scene.thing + 1}
        for name, field in (("gender", "gender"), ("skin_tone", "tone"), ("age", "old")):
            named_there = torch.tensor([getattr(caption, field) >= 0 for caption in captions])
            seen[name] = seen[name], seen[name].where(named_there, -1)
        for name, label in seen.items():
            image_label, text_label = label if isinstance(label, tuple) else (label, label)
            head = named.heads[name]
            loss = loss + F.cross_entropy(head(scale * image), image_label, ignore_index=-1)
            loss = loss + F.cross_entropy(head(scale * text), text_label, ignore_index=-1)
        return loss

    torch.manual_seed(1)
    return fit("clip", NamedClip(), loss_of, steps=steps, lr=lr, folder=folder, ema=0.99).clip


@torch.no_grad()
def reconstructed(vae: VAE, x: Tensor) -> Tensor:
    """Return images (B, 3, H, W), encoded and decoded by the VAE."""
    return vae.decode(vae.encode(x)).clamp(-1, 1)


@torch.no_grad()
def psnr(vae: VAE, generator: torch.Generator, count: int = 256) -> float:
    """Return the mean peak signal-to-noise ratio of reconstructions, in dB; images range over 2."""
    x = draw(balanced_scene(count, generator))
    error = F.mse_loss(reconstructed(vae, x), x, reduction="none").mean((1, 2, 3))
    return (10 * torch.log10(4 / error)).mean().item()
