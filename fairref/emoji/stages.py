"""How each network of the bundle is trained: every stage is a function of the folder of stage files.

Order: tokenizer, vae, classifiers, clip, latents (the VAE's latents of the pictures, drawn once), unet (with
the text encoder), unet_polish. Each stage reads what those before it left in the folder.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairref.diffusion.schedule import Schedule
from fairref.emoji.bpe import train_bpe
from fairref.emoji.captions import captions, describe, draw_captions
from fairref.emoji.fit import fit, generator_for
from fairref.emoji.pictures import RESOLUTION, draw, random_scene
from fairref.emoji.sheet import GENDERS, LOOKS, TONES
from fairref.judges.mobilenet import Classifier, MobileNetConfig, MobileNetV3
from fairref.nets.clip import Clip, ClipConfig, ClipText, ClipTextConfig
from fairref.nets.unet import UNet, UNetConfig
from fairref.nets.vae import VAE, VAEConfig
from fairref.tokenizer import Tokenizer

VOCABULARY = 1150  # nearly every word of the captions is one token
TOKENS = 77
ATTRIBUTES = {"gender": GENDERS, "skin_tone": TONES}

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
CLASSIFIER_CONFIG = {
    "finetune": {"kind": "small", "width": 0.75, "input_size": 96},
    "evaluate": {"kind": "small", "width": 1.0, "input_size": 80},
}
CLASSIFIER_STEPS = {"finetune": 1100, "evaluate": 800}


def held_out(look: Tensor, tone: Tensor) -> Tensor:
    """(B,) boolean: the look-tone pairs, a quarter of all, that classifiers are tested on and never see."""
    return (look + tone) % len(TONES) == 0


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer stage's vocabulary, learnt from every caption; made when it isn't there."""
    files = folder / "tokenizer" / "vocab.json", folder / "tokenizer" / "merges.txt"
    if not all(file.exists() for file in files):
        generator = generator_for(0, "tokenizer", 0)
        train_bpe(
            [*captions().texts, *describe(balanced_scene(2000, generator), generator).texts],
            VOCABULARY,
            folder / "tokenizer",
        )
    return Tokenizer(*files)


def balanced_scene(B: int, generator: torch.Generator):
    """B scenes with look, gender and tone uniform and independent."""
    look, gender, tone = (
        torch.randint(len(names), (B,), generator=generator) for names in (LOOKS, GENDERS, TONES)
    )
    return random_scene(look, gender, tone, generator)


def train_vae(folder, steps: int = 2200, batch: int = 16, kl: float = 1e-4) -> VAE:
    """Squared and absolute error, a little KL, a sampled latent: latent diffusion's without a discriminator."""

    def loss_of(vae, generator):
        x = draw(balanced_scene(batch, generator))
        mean, logvar = vae.moments(x)
        z = mean + torch.exp(logvar / 2) * torch.randn(mean.shape, generator=generator)
        error = vae.decode(z * vae.config.scaling_factor) - x
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.square().mean() * 4 + error.abs().mean() * 0.5 + kl * divergence

    torch.manual_seed(0)
    vae = VAE(VAEConfig.from_dict(VAE_CONFIG)).to(memory_format=torch.channels_last)
    return fit("vae", vae, loss_of, steps=steps, lr=2e-3, folder=folder, ema=0.995)


def scaled(vae: VAE, seed: int = 0) -> VAE:
    """The same autoencoder with the scaling_factor that gives its latents a standard deviation of one."""
    with torch.no_grad():
        mean, _ = vae.moments(draw(balanced_scene(512, generator_for(seed, "scale", 0))))
    config = VAEConfig.from_dict({**VAE_CONFIG, "scaling_factor": round(1 / mean.std().item(), 5)})
    new = VAE(config).to(memory_format=torch.channels_last)
    new.load_state_dict(vae.state_dict())
    return new.eval()


@torch.no_grad()
def make_latents(folder: Path, vae: VAE, copies: int = 288, seed: int = 0) -> Tensor:
    """Latents z (L, G, K, copies, 4, h, w) of pictures drawn once, `copies` for each look, gender and tone."""
    file = folder / "latents.pt"
    if file.exists():
        return torch.load(file, weights_only=True)
    L, G, K = len(LOOKS), len(GENDERS), len(TONES)
    cell = torch.arange(L * G * K)
    z = [
        vae.encode(
            draw(random_scene(cell // (G * K), cell // K % G, cell % K, generator_for(seed, "latents", n)))
        )
        for n in range(copies)
    ]  # each (L G K, 4, h, w)
    z = torch.stack(z, 1).view(L, G, K, copies, *z[0].shape[1:])
    torch.save(z, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)
    return z


class Painter(nn.Module):
    """U-Net and text encoder, trained together; the text encoder starts as CLIP's text tower."""

    def __init__(self, clip: Clip):
        super().__init__()
        self.text_encoder = ClipText(ClipTextConfig.from_dict(TEXT_CONFIG))
        self.text_encoder.text_model.load_state_dict(clip.text_model.state_dict())
        self.unet = UNet(UNetConfig.from_dict(UNET_CONFIG)).to(memory_format=torch.channels_last)


def tell_apart(network: nn.Module) -> None:
    """Initial embeddings large enough that what the blocks add does not drown which word or place it is."""
    for name, parameter in network.named_parameters():
        if name.endswith(("token_embedding.weight", "position_embedding.weight")):
            nn.init.normal_(parameter, std=0.5 if "token" in name else 0.1)


def noise_loss(folder: Path, latents: Tensor, stage: str, batch: int):
    """Mean squared error of the predicted noise, t uniform, a tenth of the prompts empty."""
    schedule = Schedule()
    keep = schedule.alpha_bar.sqrt().float()
    spread = (1 - schedule.alpha_bar).sqrt().float()
    ids = read_tokenizer(folder)(list(captions().texts))  # (M, T), the same texts in both stages

    def loss_of(painter, generator):
        index, *who = draw_captions(batch, generator, stage)
        copy = torch.randint(latents.shape[3], (batch,), generator=generator)
        z_0 = latents[(*who, copy)]  # (B, 4, h, w)
        t = torch.randint(schedule.T, (batch,), generator=generator)
        eps = torch.randn(z_0.shape, generator=generator)
        z_t = keep[t].view(-1, 1, 1, 1) * z_0 + spread[t].view(-1, 1, 1, 1) * eps
        return F.mse_loss(painter.unet(z_t, t, painter.text_encoder(ids[index])), eps)

    return loss_of


def train_unet(folder: Path, latents: Tensor, clip: Clip, steps: int = 3600, batch: int = 48) -> Painter:
    """The first stage, from random weights and CLIP's text tower."""
    torch.manual_seed(0)
    loss_of = noise_loss(folder, latents, "first", batch)
    return fit("unet", Painter(clip), loss_of, steps=steps, lr=1e-3, folder=folder, ema=0.998)


def polish_unet(
    folder: Path, latents: Tensor, painter: Painter, steps: int = 1500, batch: int = 48
) -> Painter:
    """The second stage: lower rates, and more captions that name a tone."""
    loss_of = noise_loss(folder, latents, "second", batch)
    return fit("unet_polish", painter, loss_of, steps=steps, lr=5e-4, folder=folder, ema=0.998)


class NamedClip(nn.Module):
    """CLIP and, for its training, one linear classifier for each thing that both towers must know."""

    def __init__(self):
        super().__init__()
        self.clip = Clip(ClipConfig.from_dict(CLIP_CONFIG))
        tell_apart(self.clip)
        classes = {"look": LOOKS, **ATTRIBUTES}
        self.heads = nn.ModuleDict(
            {k: nn.Linear(CLIP_CONFIG["projection_dim"], len(v)) for k, v in classes.items()}
        )


def train_clip(folder: Path, steps: int = 600, batch: int = 96, lr: float = 1e-3) -> Clip:
    """Symmetric contrastive loss over captions that also name hair and background.

    To tell pictures of a batch apart, look and background go a long way, and what decides between two people
    of one look is learnt late. So the same classifiers also read look, gender and tone off both towers'
    features, off a text's where it names them.
    """
    tokenizer = read_tokenizer(folder)

    def loss_of(named, generator):
        scene = balanced_scene(batch, generator)
        said = describe(scene, generator)
        clip = named.clip
        text, image = clip.encode_text(tokenizer(said.texts)), clip.encode_image(draw(scene))
        scale = clip.logit_scale.exp().clamp(max=100)
        logits = scale * image @ text.T  # (B, B)
        same = torch.arange(batch)
        loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        for name, seen, read in (
            ("look", scene.look, scene.look),
            ("gender", scene.gender, said.gender),
            ("skin_tone", scene.tone, said.tone),
        ):
            head = named.heads[name]
            loss = loss + F.cross_entropy(head(scale * image), seen)
            loss = loss + F.cross_entropy(head(scale * text), read, ignore_index=-1)
        return loss

    torch.manual_seed(1)
    return fit("clip", NamedClip(), loss_of, steps=steps, lr=lr, folder=folder, ema=0.99).clip


def closer(x: Tensor, generator: torch.Generator) -> Tensor:
    """A window of each picture, a quarter to 60 % of its side and near its middle, as large as the picture."""
    size, *place = torch.rand(3, len(x), generator=generator)
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 0.25 + 0.35 * size
    theta[:, :, 2] = 0.6 * torch.stack(place, 1) - 0.3
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False, padding_mode="border")


def veiled(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture behind a pane, more or less see-through, of any colour, size and place, as goggles are."""
    side = torch.linspace(-1, 1, x.shape[-1])
    cx, cy, w, h, alpha = torch.rand(5, len(x), 1, generator=generator)
    colour = torch.rand(len(x), 3, 1, 1, generator=generator)
    inside_x = (side - (1.6 * cx - 0.8)).abs() < 0.1 + 0.4 * w  # (B, W)
    inside_y = (side - (1.6 * cy - 0.8)).abs() < 0.1 + 0.3 * h  # (B, H)
    pane = (inside_y[:, :, None] & inside_x[:, None]) * (0.3 + 0.7 * alpha[:, :, None])  # (B, H, W)
    return torch.lerp(x, (2 * colour - 1).expand_as(x), pane[:, None].expand_as(x))


def train_classifier(folder: Path, role: str, vae: VAE, batch: int = 64) -> Classifier:
    """Cross-entropy with smoothed labels on balanced pictures, half of them through the VAE, with noise.

    Half of the pictures are seen closer, and then for their tone alone, and some are partly covered: what skin
    looks like must be learnt from any skin that shows, not from which tones a look was shown with.
    """

    def loss_of(classifier, generator):
        scene = balanced_scene(2 * batch, generator)
        scene = scene[(~held_out(scene.look, scene.tone)).nonzero()[:batch, 0]]
        x = draw(scene)
        half = len(x) // 2
        with torch.no_grad():
            x = torch.cat([vae.decode(vae.encode(x[:half])).clamp(-1, 1), x[half:]])
        near, covered = (torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5 for _ in range(2))
        x = torch.where(near, closer(x, generator), x)
        x = torch.where(covered, veiled(x, generator), x)
        x = x + 0.1 * torch.rand(len(x), 1, 1, 1, generator=generator) * torch.randn(
            x.shape, generator=generator
        )
        logits = classifier(x)
        return sum(
            F.cross_entropy(logits[name], label, label_smoothing=0.05, ignore_index=-1)
            for name, label in (
                ("gender", scene.gender.where(~near.flatten(), -1)),
                ("skin_tone", scene.tone),
            )
        )

    seed = 2 + list(CLASSIFIER_CONFIG).index(role)
    torch.manual_seed(seed)
    config = MobileNetConfig(**CLASSIFIER_CONFIG[role], num_logits=sum(map(len, ATTRIBUTES.values())))
    classifier = Classifier(MobileNetV3(config), ATTRIBUTES)
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.05  # the usual 0.01 is for runs a hundred times longer
    steps = CLASSIFIER_STEPS[role]
    return fit(
        f"classifier_{role}", classifier, loss_of, steps=steps, lr=2e-3, folder=folder, seed=seed, ema=0.99
    )


@torch.no_grad()
def psnr(vae, generator: torch.Generator, count: int = 256) -> float:
    """Mean peak signal-to-noise ratio of reconstructions, dB, peak-to-peak 2."""
    x = draw(balanced_scene(count, generator))
    error = F.mse_loss(vae.decode(vae.encode(x)).clamp(-1, 1), x, reduction="none").mean((1, 2, 3))
    return (10 * torch.log10(4 / error)).mean().item()
