"""Stage 4: a T2I-Adapter that lets the embedded base follow a sketch (Mou et al. 2023, arXiv 2302.08453)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, T2IAdapter
from PIL import Image

from spectral_diffusion.generation.condition_picture import EMBEDDED_SKETCH_ADAPTER, given_to, traced
from spectral_diffusion.toyworld.recipe.denoiser import draw_captions, draw_noise, thing_weights, tokenize_scenes
from spectral_diffusion.toyworld.recipe.pictures import PictureSet
from spectral_diffusion.toyworld.recipe.stage import train_stage

SILHOUETTES, TRACED_THINGS = 0.4, 0.3
"""How many sketches show the things' outer lines only, and all lines of the things; the rest is traced from the whole picture."""
FAINTEST = 0.35
"""A thin line that was drawn large is grey when it is scaled down to the base's pictures."""


def build_sketch_adapter() -> T2IAdapter:
    """Return an untrained adapter whose features have the shapes of the embedded base's three levels; lines on one channel."""
    return T2IAdapter(in_channels=1, channels=[32, 80, 128], num_res_blocks=2, downscale_factor=8, adapter_type="full_adapter_xl")


def make_sketch_adapter(
    work: Path,
    pictures: PictureSet,
    latents: np.ndarray,
    pipeline: StableDiffusionPipeline,
    steps: int,
    batch: int,
    *,
    folder: Path = EMBEDDED_SKETCH_ADAPTER,
) -> None:
    """Train the adapter on `latents (count, channels, 16, 16)` of `pictures`, the base frozen, and save it to `folder`."""
    device, scheduler, unet = pipeline.device, pipeline.scheduler, pipeline.unet
    pipeline.text_encoder.eval().requires_grad_(False)
    unet.eval().requires_grad_(False)
    torch.manual_seed(6)
    adapter = build_sketch_adapter().to(device)
    tokens, weights = tokenize_scenes(pipeline.tokenizer, pictures.scenes), thing_weights(pictures.scenes, latents.shape[-1])
    nothing = pipeline.tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]

    def loss_of_step(step: int, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(latents), (batch,), generator=generator).sort().values
        clean = torch.from_numpy(latents[chosen.numpy()]).float().to(device)
        sketches = torch.stack([sketch(pictures.pixels[row], pictures.things[row], generator) for row in chosen.tolist()])
        with torch.no_grad():
            states = pipeline.text_encoder(draw_captions(tokens[chosen], nothing, generator).to(device)).last_hidden_state
        noisy, times, velocity = draw_noise(scheduler, clean, 0.0, generator)
        with given_to(unet, adapter(sketches.to(device))):
            predicted = unet(noisy, times, states).sample
        return ((predicted - velocity) ** 2 * weights[chosen].to(device)).mean()

    train_stage(work, "sketches", {"adapter": adapter}, loss_of_step, steps=steps, peak_rate=1e-3, ema_decay=0.999)
    adapter.cpu().half().save_pretrained(folder)


def sketch(pixels: np.ndarray, things: np.ndarray, generator: torch.Generator) -> torch.Tensor:
    """Return white lines on black `(1, side, side)` in [0, 1], as somebody might draw or trace what a picture shows.

    Args:
        pixels: the picture, `(side, side, 3)` uint8.
        things: 0 where its scene is, else the thing's number, `(side, side)`.
    """
    kind, thickness, strength = torch.rand(3, generator=generator).tolist()
    lines = silhouettes(things)
    if kind > SILHOUETTES:
        found = np.asarray(traced(Image.fromarray(pixels))) > 0
        lines = lines | (found & (things > 0)) if kind < SILHOUETTES + TRACED_THINGS else found
    drawn = torch.from_numpy(lines).float()[None]
    if thickness > 0.5:
        drawn = F.max_pool2d(F.pad(drawn, (0, 1, 0, 1)), 2, stride=1)
    return drawn * (FAINTEST + (1 - FAINTEST) * strength)


def silhouettes(things: np.ndarray) -> np.ndarray:
    """Return where the outer lines of `things (side, side)` are: positions of a thing beside a position of another number."""
    around = np.pad(things, 1, mode="edge")
    beside = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
    return (things > 0) & np.any([things != other for other in beside], axis=0)
