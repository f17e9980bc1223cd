"""How good is the embedded base? `python -m benchmarks.base_quality --json PATH`

- `single`: share of pictures of one thing on a scene whose class is right, as the judge sees it;
- `pairs`, `triples`: share of pictures of two and of three things in which all classes are right;
- `psnr`: of the autoencoder, in dB, on renderings that it never saw.

The prompts are fixed: combinations of things and scene that the base's training keeps out (`pictures.is_reserved`).
Identities count by class word: a 'dog' may be drawn as either of the base's two dogs.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from spectral_diffusion.bases.base import Base, load_base
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.prompts.tokens import listed
from spectral_diffusion.reports.contact_sheet import Cell, Row, contact_sheet
from spectral_diffusion.toyworld.captions import with_article
from spectral_diffusion.toyworld.characters import BASE_CHARACTERS, CHARACTER_BY_NAME
from spectral_diffusion.toyworld.judge import load_judge
from spectral_diffusion.toyworld.recipe.autoencoder import to_pixels, to_tensor
from spectral_diffusion.toyworld.recipe.judge import fresh_renderings
from spectral_diffusion.toyworld.recipe.pictures import is_reserved
from spectral_diffusion.toyworld.scenes import SCENES
from spectral_diffusion.toyworld.sprites import fetch_sprites

PICTURES = 100
COUNTS = {"single": 1, "pairs": 2, "triples": 3}


def reserved_prompts(things: int) -> list[tuple[str, frozenset[str]]]:
    """Return `PICTURES` prompts of `things` things never trained on, each with the class words it asks for."""
    names = [character.name for character in BASE_CHARACTERS]
    every = [(chosen, scene) for chosen in combinations(names, things) for scene in SCENES if is_reserved(chosen, scene)]
    order = np.random.default_rng(0).permutation(len(every))
    prompts = []
    for index in range(PICTURES):
        chosen, scene = every[order[index % len(order)]]
        words = [CHARACTER_BY_NAME[name].class_word for name in chosen]
        prompts.append((f"{listed([with_article(word) for word in words])} {scene}", frozenset(words)))
    return prompts


def draw_and_judge(base: Base, things: int) -> tuple[float, list[Cell]]:
    """Draw the reserved prompts, 25 steps each, and return the share judged right and the pictures."""
    judge, cells, right = load_judge(), [], 0
    for seed, (prompt, wanted) in enumerate(reserved_prompts(things)):
        image = generate(base, Drawing(prompt=prompt, seed=seed, steps=25))[0].image
        seen = judge.names_present(image, things)
        right += {CHARACTER_BY_NAME[name].class_word for name in seen} == wanted
        cells.append(Cell(image=image, lines=(prompt[:30], ", ".join(seen))))
    return right / PICTURES, cells


@torch.no_grad()
def autoencoder_psnr(base: Base, sprites: dict[str, Image.Image]) -> float:
    """Return the mean PSNR in dB over 200 unseen renderings of one and two things."""
    values = []
    for things in (1, 2):
        pixels, _ = fresh_renderings(sprites, things, 100, 30_000 + things)
        decoded = []
        for start in range(0, len(pixels), 50):
            latents = base.pipeline.vae.encode(to_tensor(pixels[start : start + 50], base.device)).latent_dist.mean
            decoded.append(to_pixels(base.pipeline.vae.decode(latents).sample))
        difference = np.concatenate(decoded).astype(np.float64) - pixels
        values += [10 * math.log10(255**2 / error) for error in (difference**2).mean(axis=(1, 2, 3))]
    return float(np.mean(values))


def main() -> None:
    """Measure and write the JSON, with contact sheets beside it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.base_quality", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--sprites", type=Path, default=Path("out/base/sprites"), help="where the drawings are kept")
    options = parser.parse_args()
    base = load_base()
    drawn = {name: draw_and_judge(base, things) for name, things in COUNTS.items()}
    result = {name: right for name, (right, _) in drawn.items()}
    result["psnr"] = autoencoder_psnr(base, fetch_sprites(options.sprites))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
    for name, (_, cells) in drawn.items():
        rows = [Row(label=name, cells=tuple(cells[start : start + 10])) for start in range(0, 40, 10)]
        contact_sheet(rows).save(options.json.with_name(f"{options.json.stem}-{name}.png"))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
