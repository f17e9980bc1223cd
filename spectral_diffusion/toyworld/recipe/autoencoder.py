"""Stage 1: the autoencoder, 64 pixels to 16 x 16 latents of 8 channels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm

from spectral_diffusion.toyworld.recipe.pictures import PictureSet
from spectral_diffusion.toyworld.recipe.stage import train_stage

LATENT_CHANNELS = 8
"""With 4 a thing a third of a picture wide comes back without its face."""
SMEAR = 0.15
"""Most noise in the latents, in standard deviations of theirs, as what is drawn is never exact; little is as often as much."""
CLOSE_UPS = 0.3
"""Share of the steps that show parts of the pictures, enlarged."""


def build_autoencoder() -> AutoencoderKL:
    """Return an untrained autoencoder: 64 x 64 x 3 pixels in [-1, 1] to 16 x 16 x 8 latents.

    The posterior starts narrow (standard deviation 0.05): a wide one would drown the picture in noise for the first
    thousand steps.
    """
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 80),
        layers_per_block=3,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )
    with torch.no_grad():
        autoencoder.quant_conv.weight[LATENT_CHANNELS:] = 0
        autoencoder.quant_conv.bias[LATENT_CHANNELS:] = -6
    return autoencoder


def to_tensor(pixels: np.ndarray, device: torch.device) -> torch.Tensor:
    """`(n, side, side, 3)` uint8 to `(n, 3, side, side)` in [-1, 1], channels last."""
    tensor = torch.from_numpy(np.array(pixels)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.contiguous(memory_format=torch.channels_last)


def train_autoencoder(
    folder: Path, pictures: Sequence[PictureSet], steps: int, batch: int, device: torch.device
) -> AutoencoderKL:
    """Train the whole autoencoder for `steps`, then return it with the latents' scale measured into its configuration.

    All of `pictures` are shown in turn, as many of each set. At the end it holds its averaged weights.
    """
    torch.manual_seed(1)
    autoencoder = build_autoencoder().to(device, memory_format=torch.channels_last)

    def loss_of_step(step: int, generator: torch.Generator) -> torch.Tensor:
        pixels = varied(to_tensor(some_of(pictures[step % len(pictures)], batch, generator), device), generator)
        posterior = autoencoder.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = autoencoder.decode(smeared(posterior.mean + posterior.std * noise, SMEAR, generator)).sample
        return reconstruction_loss(decoded, pixels) + 1e-5 * posterior.kl().mean() / posterior.mean[0].numel()

    def sheet(step: int) -> None:
        save_reconstructions(autoencoder, pictures[0].pixels[:12], folder / "sheets" / f"autoencoder-{step:06d}.png", device)

    models = {"autoencoder": autoencoder}
    train_stage(folder, "autoencoder", models, loss_of_step, steps=steps, peak_rate=1.5e-3, ema_decay=0.995, every=sheet)
    autoencoder.register_to_config(scaling_factor=_latent_scale(autoencoder, pictures[0], device))
    return autoencoder.eval().requires_grad_(False)


def some_of(pictures: PictureSet, count: int, generator: torch.Generator) -> np.ndarray:
    chosen = torch.randint(len(pictures.pixels), (count,), generator=generator).sort().values.numpy()
    return pictures.pixels[chosen]


def varied(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return pictures `(n, 3, side, side)` as they are or mirrored, and now and then a part of each, as large as they were."""
    if torch.rand(1, generator=generator) < 0.5:
        pixels = pixels.flip(3)
    if torch.rand(1, generator=generator) < CLOSE_UPS:
        whole = pixels.shape[-1]
        side = int(torch.randint(whole * 9 // 16, whole, (1,), generator=generator))
        top, left = torch.randint(whole - side + 1, (2,), generator=generator).tolist()
        part = pixels[:, :, top : top + side, left : left + side]
        pixels = F.interpolate(part, size=whole, mode="bilinear")
    return pixels.contiguous(memory_format=torch.channels_last)


def smeared(latents: torch.Tensor, most: float, generator: torch.Generator) -> torch.Tensor:
    """Return latents `(n, channels, side, side)` with noise, at most `most` standard deviations of theirs, mostly less."""
    amount = most * torch.rand(len(latents), 1, 1, 1, generator=generator).square()
    noise = amount * torch.randn(latents.shape, generator=generator)
    return latents + latents.detach().std() * noise.to(latents.device)


def reconstruction_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Mean absolute plus twice the mean squared difference, and the mean absolute difference of what neighbours differ by.

    The last looks at edges (gradient difference, Mathieu et al. 2016, arXiv 1511.05440), which the others let blur.
    """
    off = decoded - pixels
    edges = off.diff(dim=2).abs().mean() + off.diff(dim=3).abs().mean()
    return off.abs().mean() + 2 * off.square().mean() + edges


@torch.no_grad()
def encode_all(autoencoder: AutoencoderKL, pictures: PictureSet, file: Path, device: torch.device) -> np.ndarray:
    """Return the scaled latents of all pictures, `(count, channels, 16, 16)` float16, kept in `file`."""
    if not file.exists():
        scale = autoencoder.config.scaling_factor
        parts = []
        for start in tqdm(range(0, len(pictures.pixels), 64), desc="encoding", mininterval=5):
            mean = autoencoder.encode(to_tensor(pictures.pixels[start : start + 64], device)).latent_dist.mean
            parts.append((mean * scale).half().cpu().numpy())
        np.save(file, np.concatenate(parts))
    return np.load(file)


@torch.no_grad()
def _latent_scale(autoencoder: AutoencoderKL, pictures: PictureSet, device: torch.device) -> float:
    mean = autoencoder.encode(to_tensor(pictures.pixels[:256], device)).latent_dist.mean
    return round(1.0 / mean.std().item(), 5)


@torch.no_grad()
def save_reconstructions(autoencoder: AutoencoderKL, pixels: np.ndarray, file: Path, device: torch.device) -> None:
    """Save the pictures above what the autoencoder makes of them."""
    decoded = autoencoder.decode(autoencoder.encode(to_tensor(pixels, device)).latent_dist.mean).sample
    rows = [np.concatenate(list(pixels), axis=1), np.concatenate(list(to_pixels(decoded)), axis=1)]
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(file)


def to_pixels(decoded: torch.Tensor) -> np.ndarray:
    """`(n, 3, side, side)` in [-1, 1] to `(n, side, side, 3)` uint8."""
    scaled = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return scaled.permute(0, 2, 3, 1).cpu().numpy()
