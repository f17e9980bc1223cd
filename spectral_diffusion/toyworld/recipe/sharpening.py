"""A stage of the autoencoder: its decoder against a critic, so that what the latents leave open is drawn sharp and not smeared.

A mean of all that may have been there is closest to a picture, and blurred; a critic that tells decoded pictures from renderings
at the scale of edges does not let that pass (Esser et al. 2021, arXiv 2012.09841, section 3.1). Latents that the base draws are
shown beside those of renderings, since they are what will be decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import nn
from torch.autograd.function import FunctionCtx
from tqdm import tqdm

from spectral_diffusion.files import write_atomically
from spectral_diffusion.toyworld.captions import caption
from spectral_diffusion.toyworld.recipe.autoencoder import reconstruction_loss, save_reconstructions, smeared, some_of, to_tensor
from spectral_diffusion.toyworld.recipe.pictures import PictureSet
from spectral_diffusion.toyworld.recipe.stage import train_stage

OWN_LATENTS = 1024
"""Pictures that the base draws for the decoder, as latents."""
DRAWING_STEPS = 20
GUIDANCE = 2.5
SHARE = 0.4
"""How hard the critic pulls at a decoded picture, beside how hard what it was made from does."""
HEAD_START = 60
"""Steps that the critic learns for before it pulls."""
SMEAR = 0.3
"""Most noise in the latents of renderings, in standard deviations of theirs; little is as often as much."""
COARSE = 4
"""Side in pixels of the squares whose mean colours are held where there is no rendering to compare with."""
_AT_ONCE = 32


class _Opposed(torch.autograd.Function):
    """The identity; backwards, a gradient turned round and brought to a norm (Ganin & Lempitsky 2015, arXiv 1409.7495).

    So one loss trains both: what lowers the critic's loss raises it through what the critic looks at.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, pictures: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        ctx.norm = norm
        return pictures.view_as(pictures)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * (-ctx.norm / gradient.norm().clamp(min=1e-12)), None


def opposed(pictures: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Return `pictures`, whose gradient will be turned round and of `norm`."""
    return _Opposed.apply(pictures, norm)


def build_critic() -> nn.Sequential:
    """Return an untrained critic: pictures `(n, 3, 64, 64)` to `(n, 1, 8, 8)`, positive where a patch looks rendered."""
    return nn.Sequential(
        nn.Conv2d(3, 48, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(48, 96, 4, 2, 1),
        nn.BatchNorm2d(96),
        nn.LeakyReLU(0.2),
        nn.Conv2d(96, 192, 4, 2, 1),
        nn.BatchNorm2d(192),
        nn.LeakyReLU(0.2),
        nn.Conv2d(192, 1, 3, 1, 1),
    )


@torch.no_grad()
def draw_own(pipeline: StableDiffusionPipeline, pictures: PictureSet, file: Path, count: int = OWN_LATENTS) -> torch.Tensor:
    """Return unscaled latents `(count, channels, 16, 16)` that the base draws by captions of `pictures`, kept in `file`."""
    if not file.exists():
        rng, parts = np.random.default_rng(5), []
        for start in tqdm(range(0, count, _AT_ONCE), desc="drawing", mininterval=5):
            scenes = [pictures.scenes[number] for number in rng.integers(len(pictures.scenes), size=min(_AT_ONCE, count - start))]
            latents = pipeline(
                [caption(scene.things, scene.scene, rng) for scene in scenes],
                num_inference_steps=DRAWING_STEPS,
                guidance_scale=GUIDANCE,
                generator=torch.Generator().manual_seed(start),
                output_type="latent",
            ).images
            parts.append((latents / pipeline.vae.config.scaling_factor).float().cpu().numpy())
        drawn = np.concatenate(parts)
        write_atomically(file, lambda temporary: np.save(temporary, drawn))
    return torch.from_numpy(np.load(file))


def sharpen_decoder(
    folder: Path,
    autoencoder: AutoencoderKL,
    pictures: Sequence[PictureSet],
    own: torch.Tensor,
    steps: int,
    batch: int,
    device: torch.device,
) -> AutoencoderKL:
    """Train the decoder on, and against a critic; the encoder is frozen: the latents, and so the denoiser, stay as they are.

    Args:
        pictures: shown in turn, `batch` a step.
        own: what the base draws, see `draw_own`, as many a step; by squares they keep the colours that they have.
    """
    torch.manual_seed(6)
    colours = _coarse_colours(autoencoder, own.to(device))
    autoencoder.decoder.requires_grad_(True)
    autoencoder.post_quant_conv.requires_grad_(True)
    critic = build_critic().to(device, memory_format=torch.channels_last)

    def loss_of_step(step: int, generator: torch.Generator) -> torch.Tensor:
        pixels = to_tensor(some_of(pictures[step % len(pictures)], batch, generator), device)
        chosen = torch.randint(len(own), (batch,), generator=generator)
        with torch.no_grad():
            mean = autoencoder.encode(pixels).latent_dist.mean
            latents = smeared(mean, SMEAR, generator)
        decoded = autoencoder.decode(torch.cat([latents, own[chosen].to(device)])).sample
        off = (F.avg_pool2d(decoded[batch:], COARSE) - colours[chosen.to(device)]).abs().mean()
        close = reconstruction_loss(decoded[:batch], pixels) + off
        pull = torch.autograd.grad(close, decoded, retain_graph=True)[0].norm() * (SHARE if step >= HEAD_START else 0.0)
        return close + F.relu(1 - critic(pixels)).mean() + F.relu(1 + critic(opposed(decoded, pull))).mean()

    def sheet(step: int) -> None:
        save_reconstructions(autoencoder, pictures[0].pixels[:12], folder / "sheets" / f"sharpening-{step:06d}.png", device)

    models = {"decoder": autoencoder.decoder, "post_quant_conv": autoencoder.post_quant_conv, "critic": critic}
    train_stage(folder, "sharpening", models, loss_of_step, steps=steps, peak_rate=5e-4, ema_decay=0.99, every=sheet)
    return autoencoder.eval().requires_grad_(False)


@torch.no_grad()
def _coarse_colours(autoencoder: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Return the mean colours of squares of `COARSE` pixels, `(n, 3, side, side)`, that the decoder gives `latents` as it is."""
    return torch.cat([F.avg_pool2d(autoencoder.decode(part).sample, COARSE) for part in latents.split(_AT_ONCE)])
