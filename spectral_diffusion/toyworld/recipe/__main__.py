"""Rebuild the embedded base, its sketch adapter, the scoring CLIP, the judge and the sample concepts: `make base`.

Every stage resumes where it was killed; sample sheets are left in `WORK/sheets`.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from spectral_diffusion.bases.base import EMBEDDED_BASE, read_base
from spectral_diffusion.concepts.concept import SAMPLES_FOLDER
from spectral_diffusion.toyworld.recipe.autoencoder import encode_all, train_autoencoder
from spectral_diffusion.toyworld.recipe.clip import make_clip
from spectral_diffusion.toyworld.recipe.concepts import render_sample_concepts
from spectral_diffusion.toyworld.recipe.denoiser import assemble, build_text_encoder, build_unet, train_denoiser
from spectral_diffusion.toyworld.recipe.judge import make_judge
from spectral_diffusion.toyworld.recipe.pictures import load_or_render
from spectral_diffusion.toyworld.recipe.sharpening import draw_own, sharpen_decoder
from spectral_diffusion.toyworld.recipe.sketches import make_sketch_adapter
from spectral_diffusion.toyworld.recipe.tokenizer import build_tokenizer
from spectral_diffusion.toyworld.sprites import fetch_sprites

PICTURES = 24_000


def main() -> None:
    """Run all stages."""
    parser = argparse.ArgumentParser(prog="python -m spectral_diffusion.toyworld.recipe", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("out/base"), help="folder for pictures and unfinished states")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument(
        "--improve",
        action="store_true",
        help="go on from the shipped base: its autoencoder as it is, text encoder and UNet trained further",
    )
    parser.add_argument("--autoencoder-steps", type=int, default=3000, help="steps of 8 pictures for the autoencoder")
    parser.add_argument("--denoiser-steps", type=int, default=12_000, help="steps of 32 latents for text encoder and UNet")
    parser.add_argument("--sharpening-steps", type=int, default=1000, help="steps of 4 pictures and 4 drawings against a critic")
    parser.add_argument("--sketch-steps", type=int, default=3000, help="steps of 32 latents for the sketch adapter")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    build(
        options.work,
        torch.device(options.device),
        improve=options.improve,
        autoencoder_steps=options.autoencoder_steps,
        denoiser_steps=options.denoiser_steps,
        sharpening_steps=options.sharpening_steps,
        sketch_steps=options.sketch_steps,
    )


def build(
    work: Path,
    device: torch.device,
    *,
    improve: bool,
    autoencoder_steps: int,
    denoiser_steps: int,
    sharpening_steps: int,
    sketch_steps: int,
) -> None:
    """Render the toy world and train everything from it, in order; what is finished is not done again."""
    sprites = fetch_sprites(work / "sprites")
    tokenizer = build_tokenizer(EMBEDDED_BASE / "tokenizer")
    shipped = read_base().pipeline.to(device, torch.float32) if improve else None
    colourful = load_or_render(work, "autoencoder-pictures", 6000, sprites, seed=10, held_out=False, tints=True)
    pictures = load_or_render(work, "base-pictures", PICTURES, sprites, seed=14, held_out=False, tints=False)
    autoencoder = shipped.vae if shipped else train_autoencoder(work, (pictures, colourful), autoencoder_steps, 8, device)
    latents = encode_all(autoencoder, pictures, work / "base-latents.npy", device)
    torch.manual_seed(2)
    text_encoder = shipped.text_encoder if shipped else build_text_encoder(tokenizer)
    unet = shipped.unet if shipped else build_unet()
    pipeline = assemble(autoencoder, text_encoder, tokenizer, unet)
    train_denoiser(work, pictures, latents, pipeline, denoiser_steps, 32)
    own = draw_own(pipeline, pictures, work / "own-latents.npy")
    sharpen_decoder(work, autoencoder, (pictures, colourful), own, sharpening_steps, 4, device)
    make_sketch_adapter(work, pictures, latents, pipeline, sketch_steps, 32)
    pipeline.to("cpu", torch.float16).save_pretrained(EMBEDDED_BASE)
    finished = read_base().pipeline.vae.to(device, torch.float32)
    make_judge(work, sprites, finished, device)
    make_clip(work, sprites, finished, tokenizer, device)
    render_sample_concepts(SAMPLES_FOLDER, sprites)


if __name__ == "__main__":
    main()
