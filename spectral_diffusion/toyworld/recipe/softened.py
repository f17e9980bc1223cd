"""Pictures as the base would paint them: passed through the autoencoder, and lightly disturbed.

Judge and scoring CLIP look at pictures that the base drew. Those are softer than renderings, so both learn on a mix.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

from spectral_diffusion.files import write_atomically
from spectral_diffusion.toyworld.recipe.autoencoder import to_pixels, to_tensor

_BATCH = 64


@torch.no_grad()
def autoencode(autoencoder: AutoencoderKL, pixels: np.ndarray) -> np.ndarray:
    """Return `(n, side, side, 3)` uint8 pictures, encoded to the latents' mean and decoded again."""
    parts = []
    for start in tqdm(range(0, len(pixels), _BATCH), desc="autoencoding", mininterval=5, disable=len(pixels) <= _BATCH):
        tensor = to_tensor(pixels[start : start + _BATCH], autoencoder.device)
        parts.append(to_pixels(autoencoder.decode(autoencoder.encode(tensor).latent_dist.mean).sample))
    return np.concatenate(parts)


def load_or_soften(file: Path, pixels: np.ndarray, autoencoder: AutoencoderKL | None) -> np.ndarray:
    """Return `pixels` after the autoencoder, kept in `file` and memory-mapped; `pixels` themselves without one."""
    if autoencoder is None:
        return pixels
    if not file.exists():
        softened = autoencode(autoencoder, pixels)
        write_atomically(file, lambda temporary: np.save(temporary, softened))
    return np.load(file, mmap_mode="r")


def mixed(
    plain: np.ndarray, soft: np.ndarray, batch: int, generator: torch.Generator, device: torch.device
) -> tuple[torch.Tensor, np.ndarray]:
    """Return a batch `(batch, 3, side, side)` in [-1, 1], half of it from `soft`, and the pictures' indices.

    `soft` is the softened copy of the first `len(soft)` pictures of `plain`.
    """
    from_plain = torch.randint(len(plain), (batch - batch // 2,), generator=generator).numpy()
    from_soft = torch.randint(len(soft), (batch // 2,), generator=generator).numpy()
    pixels = np.concatenate([plain[from_plain], soft[from_soft]])
    return to_tensor(pixels, device), np.concatenate([from_plain, from_soft])


def disturbed(
    pictures: torch.Tensor, generator: torch.Generator, *, zoom: float = 0.1, shift: float = 0.06
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zoom, shift, blur, tone and noise each picture a little.

    Args:
        pictures: `(n, 3, side, side)` in [-1, 1].
        generator: where every choice comes from.
        zoom: the greatest change of size, as a share.
        shift: the greatest shift, as a fraction of the side.

    Returns:
        The disturbed pictures, and `(n, 3)` `scale, x, y`: what was at `p` is now at `(p - 0.5 - (x, y)) / scale + 0.5`
        (fractions of the side).
    """
    count, device = len(pictures), pictures.device
    draw = torch.rand((count, 7), generator=generator).to(device)
    scale, x, y = 1 + zoom * (2 * draw[:, 0] - 1), shift * (2 * draw[:, 1] - 1), shift * (2 * draw[:, 2] - 1)
    zero = torch.zeros_like(scale)
    affine = torch.stack([torch.stack([scale, zero, 2 * x], 1), torch.stack([zero, scale, 2 * y], 1)], 1)
    grid = F.affine_grid(affine, list(pictures.shape), align_corners=False)
    moved = F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blur = (draw[:, 3] * 2 - 1).clamp(min=0)[:, None, None, None]
    toned = torch.lerp(moved, blurred, blur) * (0.85 + 0.3 * draw[:, 4, None, None, None])
    toned = toned + 0.2 * (draw[:, 5, None, None, None] - 0.5)
    noise = torch.randn(pictures.shape, generator=generator).to(device) * 0.08 * draw[:, 6, None, None, None]
    return (toned + noise).clamp(-1, 1), torch.stack([scale, x, y], 1)
