"""Render the sample concepts: six photos each of a held-out character, with masks, captions and `concept.toml`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from spectral_diffusion.concepts.concept import PLACEHOLDER
from spectral_diffusion.toyworld.characters import CHARACTER_BY_NAME, SAMPLE_CONCEPTS
from spectral_diffusion.toyworld.render import Thing, render
from spectral_diffusion.toyworld.scenes import SCENES

PHOTOS = 6
PHOTO_SIDE = 256
_SETTINGS = """\
name = "{name}"
token = "<{name}>"
class_word = "{class_word}"
source = "rendered by this project from Microsoft Fluent Emoji ({codepoint})"
licence = "MIT, see NOTICE"
"""


def render_concept(folder: Path, name: str, sprites: dict[str, Image.Image], seed: int) -> None:
    """Write the sample concept of character `name` into `folder`: photos of `PHOTO_SIDE` pixels on differing scenes."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = rng.permutation(list(SCENES))[:PHOTOS]
    for number, scene in enumerate(scenes, start=1):
        rendering = render(sprites, (Thing(character=name),), str(scene), rng, size=PHOTO_SIDE)
        rendering.picture.save(folder / f"{number}.jpg", quality=92)
        rendering.placed[0].mask.save(folder / f"{number}-mask.png", optimize=True)
        (folder / f"{number}.txt").write_text(f"{PLACEHOLDER} {scene}\n", encoding="utf-8")
    character = CHARACTER_BY_NAME[name]
    settings = _SETTINGS.format(name=name, class_word=character.class_word, codepoint=character.codepoint)
    (folder / "concept.toml").write_text(settings, encoding="utf-8")


def render_sample_concepts(root: Path, sprites: dict[str, Image.Image]) -> None:
    """Write every sample concept into its own folder below `root`."""
    for seed, name in enumerate(SAMPLE_CONCEPTS, start=300):
        render_concept(root / name, name, sprites, seed)
