"""Backgrounds of the toy world, drawn from a random generator: sky, ground and what makes a place recognisable."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
SCALE = 2
"""Scenes are drawn at twice their size and reduced, which smooths their edges."""


def _shade(rng: np.random.Generator, colour: Colour, spread: int = 14) -> Colour:
    offset = rng.integers(-spread, spread + 1)
    red, green, blue = (int(np.clip(channel + offset + rng.integers(-5, 6), 0, 255)) for channel in colour)
    return red, green, blue


def _gradient(size: int, top: Colour, bottom: Colour, upto: float) -> Image.Image:
    rows = np.linspace(0.0, 1.0, size)[:, None] / max(upto, 1e-3)
    column = np.array(top) + (np.array(bottom) - np.array(top)) * np.clip(rows, 0, 1)
    return Image.fromarray(np.repeat(column[:, None, :], size, axis=1).astype(np.uint8))


class _Canvas:
    """A square picture with coordinates in fractions of its side."""

    def __init__(self, size: int, rng: np.random.Generator, sky: tuple[Colour, Colour], horizon: float):
        self.size, self.rng, self.horizon = size, rng, horizon
        self.picture = _gradient(size, _shade(rng, sky[0]), _shade(rng, sky[1]), horizon)
        self.draw = ImageDraw.Draw(self.picture)

    def shade(self, colour: Colour) -> Colour:
        return _shade(self.rng, colour)

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self.draw.rectangle([left * self.size, top * self.size, right * self.size, bottom * self.size], fill=colour)

    def ellipse(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        half_width, half_height = width * self.size / 2, height * self.size / 2
        x, y = x * self.size, y * self.size
        self.draw.ellipse([x - half_width, y - half_height, x + half_width, y + half_height], fill=colour)

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        self.draw.polygon([(x * self.size, y * self.size) for x, y in points], fill=colour)

    def hills(self, base: float, height: float, colour: Colour) -> None:
        xs = np.linspace(-0.05, 1.05, 24)
        phase, waves = self.between(0, 6.28), self.between(4, 9)
        ridge = base - height * (0.5 + 0.5 * np.sin(xs * waves + phase))
        self.polygon([(-0.05, 1.0), *zip(xs.tolist(), ridge.tolist(), strict=True), (1.05, 1.0)], colour)

    def pine(self, x: float, base: float, height: float, colour: Colour) -> None:
        self.box(x - 0.012, base - 0.05, x + 0.012, base, (94, 66, 40))
        for level in range(3):
            top, width = base - height + level * height * 0.25, height * (0.28 + 0.1 * level)
            self.polygon([(x - width / 2, top + height * 0.4), (x, top), (x + width / 2, top + height * 0.4)], colour)


def _lake(size: int, rng: np.random.Generator) -> _Canvas:
    canvas = _Canvas(size, rng, ((122, 186, 240), (214, 236, 250)), 0.42)
    canvas.hills(0.46, 0.14, canvas.shade((96, 146, 96)))
    canvas.box(0, 0.45, 1, 0.80, canvas.shade((48, 122, 196)))
    for _ in range(7):
        canvas.ellipse(canvas.between(0, 1), canvas.between(0.48, 0.78), canvas.between(0.1, 0.3), 0.012, (134, 190, 236))
    canvas.hills(0.84, 0.05, canvas.shade((110, 178, 84)))
    return canvas


def _snow(size: int, rng: np.random.Generator) -> _Canvas:
    canvas = _Canvas(size, rng, ((150, 172, 204), (216, 224, 236)), 0.5)
    for x in canvas.rng.uniform(0, 1, 4):
        canvas.pine(float(x), 0.6, canvas.between(0.2, 0.32), canvas.shade((70, 110, 104)))
    canvas.hills(0.66, 0.12, canvas.shade((238, 242, 248)))
    canvas.hills(0.86, 0.06, (252, 252, 255))
    for x, y in canvas.rng.uniform(0, 1, (26, 2)):
        canvas.ellipse(float(x), float(y), 0.016, 0.016, (255, 255, 255))
    return canvas


def _forest(size: int, rng: np.random.Generator) -> _Canvas:
    canvas = _Canvas(size, rng, ((120, 168, 120), (168, 200, 140)), 0.6)
    for x in canvas.rng.uniform(0, 1, 9):
        canvas.pine(float(x), canvas.between(0.62, 0.72), canvas.between(0.4, 0.62), canvas.shade((30, 92, 50)))
    canvas.hills(0.76, 0.06, canvas.shade((66, 112, 48)))
    return canvas


def _beach(size: int, rng: np.random.Generator) -> _Canvas:
    canvas = _Canvas(size, rng, ((96, 190, 248), (190, 232, 252)), 0.4)
    canvas.ellipse(canvas.between(0.1, 0.9), canvas.between(0.1, 0.22), 0.14, 0.14, (255, 236, 140))
    canvas.box(0, 0.42, 1, 0.62, canvas.shade((34, 156, 190)))
    canvas.hills(0.64, 0.025, (240, 250, 250))
    canvas.hills(0.67, 0.03, canvas.shade((240, 216, 154)))
    return canvas


def _desert(size: int, rng: np.random.Generator) -> _Canvas:
    canvas = _Canvas(size, rng, ((250, 176, 96), (254, 226, 168)), 0.5)
    canvas.hills(0.62, 0.14, canvas.shade((224, 152, 80)))
    for x in canvas.rng.uniform(0.05, 0.95, 2):
        x, tall = float(x), canvas.between(0.18, 0.3)
        canvas.box(x - 0.02, 0.68 - tall, x + 0.02, 0.7, canvas.shade((60, 130, 70)))
        canvas.box(x - 0.08, 0.6 - tall * 0.3, x + 0.08, 0.63 - tall * 0.3, canvas.shade((60, 130, 70)))
    canvas.hills(0.74, 0.08, canvas.shade((236, 178, 104)))
    return canvas


def _city(size: int, rng: np.random.Generator) -> _Canvas:
    canvas = _Canvas(size, rng, ((168, 196, 220), (226, 226, 226)), 0.6)
    left = -0.05
    while left < 1:
        width, top = canvas.between(0.13, 0.22), canvas.between(0.1, 0.36)
        canvas.box(left, top, left + width, 0.8, canvas.shade((132, 124, 136)))
        for row in np.arange(top + 0.04, 0.68, 0.085):
            for column in np.arange(left + 0.025, left + width - 0.03, 0.055):
                lit = (250, 226, 140) if rng.random() < 0.5 else (92, 96, 120)
                canvas.box(float(column), float(row), float(column) + 0.028, float(row) + 0.042, lit)
        left += width + 0.01
    canvas.box(0, 0.74, 1, 0.8, canvas.shade((178, 176, 172)))
    canvas.box(0, 0.8, 1, 1, canvas.shade((88, 88, 94)))
    return canvas


def _room(size: int, rng: np.random.Generator) -> _Canvas:
    canvas = _Canvas(size, rng, ((232, 206, 180), (226, 196, 166)), 0.7)
    window = canvas.between(0.12, 0.62)
    canvas.box(window - 0.02, 0.1, window + 0.28, 0.46, (250, 250, 246))
    canvas.box(window, 0.12, window + 0.26, 0.44, canvas.shade((150, 206, 244)))
    canvas.box(window + 0.12, 0.12, window + 0.14, 0.44, (250, 250, 246))
    canvas.box(0, 0.7, 1, 1, canvas.shade((150, 96, 60)))
    for y in (0.76, 0.84, 0.93):
        canvas.box(0, y, 1, y + 0.008, (120, 74, 44))
    canvas.ellipse(0.5, 0.88, 0.8, 0.16, canvas.shade((190, 70, 74)))
    return canvas


def _night(size: int, rng: np.random.Generator) -> _Canvas:
    canvas = _Canvas(size, rng, ((14, 16, 52), (50, 46, 110)), 0.7)
    for x, y in canvas.rng.uniform(0, 1, (30, 2)):
        canvas.ellipse(float(x), float(y) * 0.6, 0.014, 0.014, (244, 240, 210))
    canvas.ellipse(canvas.between(0.12, 0.88), canvas.between(0.1, 0.24), 0.16, 0.16, (250, 240, 190))
    canvas.hills(0.74, 0.1, canvas.shade((30, 46, 62)))
    canvas.hills(0.86, 0.06, canvas.shade((24, 36, 46)))
    return canvas


SCENES: dict[str, Callable[[int, np.random.Generator], _Canvas]] = {
    "near a lake": _lake,
    "in the snow": _snow,
    "in the forest": _forest,
    "on the beach": _beach,
    "in the desert": _desert,
    "in the city": _city,
    "in a room": _room,
    "at night": _night,
}
"""Scene phrase, as it stands in captions and prompts, to the function that draws it."""


def draw_scene(name: str, size: int, rng: np.random.Generator) -> Image.Image:
    """Return an RGB picture of `size` pixels a side of the scene called `name` (a key of `SCENES`)."""
    canvas = SCENES[name](size * SCALE, rng)
    picture = canvas.picture.filter(ImageFilter.GaussianBlur(SCALE * 0.6))
    return picture.resize((size, size), Image.Resampling.BOX)
