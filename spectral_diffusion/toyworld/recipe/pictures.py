"""The recipe's training pictures: rendered once, kept on disk, described by what stands in them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from spectral_diffusion.toyworld.characters import BASE_CHARACTERS, CHARACTERS, EXTRA_CHARACTERS, Character
from spectral_diffusion.toyworld.render import PICTURE_SIZE, TINTS, Thing, render
from spectral_diffusion.toyworld.scenes import SCENES

COUNT_SHARES = {1: 0.4, 2: 0.35, 3: 0.25}
"""How many things stand in a picture, and how often."""
EXTRA_SHARE = 0.4
"""How often a thing is one of the extra characters, where those appear."""
TINT_SHARE = 0.12
"""How often a thing is washed with a colour, where tints are asked for."""


def is_reserved(characters: Sequence[str], scene: str) -> bool:
    """Tell whether a combination is kept out of the base's training, so that a benchmark can ask for something new.

    One in eight combinations of a scene and the characters on it (in any order) is reserved.
    """
    return zlib.crc32(" ".join([*sorted(characters), scene]).encode()) % 8 == 0


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What one training picture shows: things from left to right, the scene, each thing's box in fractions."""

    things: tuple[Thing, ...]
    scene: str
    boxes: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True, kw_only=True)
class PictureSet:
    """Rendered pictures, memory-mapped.

    Attributes:
        pixels: `(count, side, side, 3)` uint8.
        things: `(count, side, side)` uint8: 0 where the scene is, else the number of the thing, from the left.
        scenes: what each picture shows.
    """

    pixels: np.ndarray
    things: np.ndarray
    scenes: list[Scene]


def load_or_render(
    folder: Path,
    name: str,
    count: int,
    sprites: dict[str, Image.Image],
    *,
    seed: int,
    held_out: bool,
    tints: bool,
) -> PictureSet:
    """Return the picture set `name` from `folder`, rendering it first when it is not there.

    Args:
        held_out: whether the held-out characters appear (for the judge) or the extra ones (for the base).
        tints: whether some things are washed with a colour.
    """
    pixel_file, thing_file, scene_file = folder / f"{name}.npy", folder / f"{name}-things.npy", folder / f"{name}.jsonl"
    if not scene_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shares = {character: 1 / len(CHARACTERS) for character in CHARACTERS} if held_out else base_shares()
        rng = np.random.default_rng(seed)
        combinations = [_draw_combination(rng, shares, reserve=not held_out, tints=tints) for _ in range(count)]
        _render_set(pixel_file, thing_file, scene_file, combinations, sprites, rng)
    scenes = [_scene_from_json(line) for line in scene_file.read_text().splitlines()]
    return PictureSet(pixels=np.load(pixel_file, mmap_mode="r"), things=np.load(thing_file, mmap_mode="r"), scenes=scenes)


def base_shares() -> dict[Character, float]:
    """Return how often each character that the base may see is drawn for a place in a picture; the shares sum to 1."""
    main, extra = (1 - EXTRA_SHARE) / len(BASE_CHARACTERS), EXTRA_SHARE / len(EXTRA_CHARACTERS)
    return dict.fromkeys(BASE_CHARACTERS, main) | dict.fromkeys(EXTRA_CHARACTERS, extra)


def _render_set(
    pixel_file: Path,
    thing_file: Path,
    scene_file: Path,
    combinations: Sequence[tuple[tuple[Thing, ...], str]],
    sprites: dict[str, Image.Image],
    rng: np.random.Generator,
) -> None:
    shape = (len(combinations), PICTURE_SIZE, PICTURE_SIZE, 3)
    pixels = np.lib.format.open_memmap(pixel_file, "w+", np.uint8, shape)
    numbers = np.lib.format.open_memmap(thing_file, "w+", np.uint8, shape[:3])
    lines = []
    for index, (things, scene) in enumerate(tqdm(combinations, desc=f"rendering {pixel_file.stem}", mininterval=5)):
        rendering = render(sprites, things, scene, rng)
        pixels[index] = np.asarray(rendering.picture)
        for number, placed in enumerate(rendering.placed, start=1):
            numbers[index][np.asarray(placed.mask) > 127] = number
        named = [[thing.character, thing.tint] for thing in things]
        boxes = [[round(edge, 4) for edge in placed.box] for placed in rendering.placed]
        lines.append(json.dumps({"things": named, "scene": scene, "boxes": boxes}))
    pixels.flush()
    numbers.flush()
    scene_file.write_text("\n".join(lines) + "\n")


def _draw_combination(
    rng: np.random.Generator, shares: dict[Character, float], *, reserve: bool, tints: bool
) -> tuple[tuple[Thing, ...], str]:
    characters, weights = list(shares), list(shares.values())
    while True:
        count = int(rng.choice(list(COUNT_SHARES), p=list(COUNT_SHARES.values())))
        names = [characters[index].name for index in rng.choice(len(characters), count, replace=False, p=weights)]
        scene = list(SCENES)[rng.integers(len(SCENES))]
        if not (reserve and is_reserved(names, scene)):
            break
    tint_names = list(TINTS)
    things = []
    for name in names:
        tint = tint_names[rng.integers(len(tint_names))] if tints and rng.random() < TINT_SHARE else None
        things.append(Thing(character=name, tint=tint))
    return tuple(things), scene


def _scene_from_json(line: str) -> Scene:
    record = json.loads(line)
    return Scene(
        things=tuple(Thing(character=name, tint=tint) for name, tint in record["things"]),
        scene=record["scene"],
        boxes=tuple(tuple(box) for box in record["boxes"]),
    )
