"""Put characters into scenes: pictures with the place and the mask of everything in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageEnhance

from spectral_diffusion.toyworld.scenes import draw_scene

PICTURE_SIZE = 64
"""Side of a toy-world picture in pixels."""

LEAN = 6.0
"""How far a thing leans to either side at most, in degrees. Nothing is mirrored: a base as small as ours draws what faces
both ways with a head at both ends."""

TINTS: dict[str, tuple[int, int, int]] = {
    "red": (226, 58, 52),
    "orange": (244, 140, 40),
    "yellow": (246, 214, 60),
    "green": (78, 178, 74),
    "blue": (62, 116, 226),
    "purple": (148, 84, 200),
    "pink": (246, 136, 184),
    "brown": (134, 88, 54),
    "black": (58, 58, 64),
    "white": (250, 250, 252),
}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A character to be drawn, in its own colours or washed with the colour word `tint` (a key of `TINTS`)."""

    character: str
    tint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where a thing stands: box `(left, top, right, bottom)` in fractions of the picture, mask of its visible pixels."""

    thing: Thing
    box: tuple[float, float, float, float]
    mask: Image.Image


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """An RGB picture and what is in it, from left to right."""

    picture: Image.Image
    placed: tuple[Placed, ...]


def render(
    sprites: dict[str, Image.Image],
    things: tuple[Thing, ...],
    scene: str,
    rng: np.random.Generator,
    size: int = PICTURE_SIZE,
    background: Image.Image | None = None,
) -> Rendering:
    """Draw `things` from left to right on a scene, each with its own size, turn and place.

    Args:
        sprites: character name to RGBA drawing (see `sprites.fetch_sprites`).
        things: one to three things, leftmost first.
        scene: a key of `scenes.SCENES`.
        rng: where every choice comes from.
        size: side of the picture in pixels.
        background: a scene drawn before, RGB of `size`; drawn afresh when missing.
    """
    picture = (background or draw_scene(scene, size, rng)).copy()
    slot = 1.0 / len(things)
    height_range = {1: (0.46, 0.78), 2: (0.40, 0.54), 3: (0.30, 0.40)}[len(things)]
    masks: list[Image.Image] = []
    boxes: list[tuple[float, float, float, float]] = []
    for index, thing in enumerate(things):
        sprite = _pose(_tinted(sprites[thing.character], thing.tint), rng)
        height = rng.uniform(*height_range)
        width = height * sprite.width / sprite.height
        widest = slot * (1.0 if len(things) > 1 else 0.85)
        if width > widest:
            height, width = height * widest / width, widest
        spare = max(slot - width, 0.0)
        left = index * slot + rng.uniform(0.5 - 0.38, 0.5 + 0.38) * spare
        bottom = rng.uniform(max(0.72, height + 0.04), 0.97)
        pixels = sprite.resize((max(2, round(width * size)), max(2, round(height * size))), Image.Resampling.LANCZOS)
        at = (round(left * size), round((bottom - height) * size))
        picture.paste(pixels, at, pixels)
        mask = Image.new("L", (size, size), 0)
        mask.paste(pixels.getchannel("A"), at)
        masks = [ImageChops.subtract(earlier, mask) for earlier in masks] + [mask]
        boxes.append((left, bottom - height, left + width, bottom))
    placed = tuple(Placed(thing=thing, box=box, mask=mask) for thing, box, mask in zip(things, boxes, masks, strict=True))
    return Rendering(picture=picture, placed=placed)


def _tinted(sprite: Image.Image, tint: str | None) -> Image.Image:
    if tint is None:
        return sprite
    grey = np.asarray(sprite.convert("L"), dtype=np.float32)[..., None] / 255.0
    own = np.asarray(sprite.convert("RGB"), dtype=np.float32)
    washed = np.array(TINTS[tint], dtype=np.float32) * (0.35 + 0.85 * grey)
    colours = np.clip(0.8 * washed + 0.2 * own, 0, 255).astype(np.uint8)
    result = Image.fromarray(colours).convert("RGBA")
    result.putalpha(sprite.getchannel("A"))
    return result


def _pose(sprite: Image.Image, rng: np.random.Generator) -> Image.Image:
    small = sprite.resize((max(2, sprite.width // 2), max(2, sprite.height // 2)), Image.Resampling.BOX)
    turned = small.rotate(rng.uniform(-LEAN, LEAN), Image.Resampling.BICUBIC, expand=True)
    turned = turned.crop(turned.getchannel("A").getbbox())
    alpha = turned.getchannel("A")
    bright = ImageEnhance.Brightness(turned.convert("RGB")).enhance(rng.uniform(0.9, 1.08))
    bright.putalpha(alpha)
    return bright
