"""Sketches, poses and the like that a picture follows, through a T2I-Adapter (Mou et al. 2023, arXiv 2302.08453).

The embedded base has one for sketches beside it, which is taken when none is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import T2IAdapter
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor

from spectral_diffusion.bases.base import EMBEDDED_BASE, Base
from spectral_diffusion.concepts.photos import BLACK, WHITE, read_photo
from spectral_diffusion.errors import InputError, PhotoError
from spectral_diffusion.picture_text import picture_from_text, picture_text

EMBEDDED_SKETCH_ADAPTER = EMBEDDED_BASE.parent / "sketch-adapter"
"""The T2I-Adapter for sketches that ships with the embedded base."""
SHAPE_TOLERANCE = 0.02
"""How far the proportions of a condition may be from the picture's, which it is scaled to."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A picture that says where things stand, and the network that reads it.

    Attributes:
        image: white lines on black for a sketch, coloured limbs on black for a pose; what the adapter was trained on.
        adapter: a diffusers folder or hub id of a T2I-Adapter made for the base's family; empty: the embedded base's own.
        strength: how strictly it is followed.
        photo: the image is a photo or drawing, and the sketch is traced from it.

    Raises:
        InputError: the strength is negative or no number.
    """

    image: Image.Image
    adapter: str = ""
    strength: float = 1.0
    photo: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise InputError(f"The condition's strength must not be negative, got {self.strength:g}.")


def read_condition(file: Path, adapter: str = "", strength: float = 1.0, *, photo: bool = False) -> Condition:
    """Return the condition in the picture `file`.

    Raises:
        InputError: it is not a picture that can be read.
    """
    try:
        image = read_photo(file, background=WHITE if photo else BLACK).image
    except PhotoError as error:
        raise InputError(f"The condition cannot be read. {error}") from error
    return Condition(image=image, adapter=adapter, strength=strength, photo=photo)


def condition_record(condition: Condition) -> dict[str, Any]:
    """Return `condition` as JSON holds it, its picture inside it: the arguments of `condition_from_record`."""
    return {
        "image": picture_text(condition.image),
        "adapter": condition.adapter,
        "strength": condition.strength,
        "photo": condition.photo,
    }


def condition_from_record(image: str, adapter: str, strength: float, photo: bool = False) -> Condition:
    """Return the condition that `condition_record` wrote, or wrote before photos could be traced."""
    return Condition(image=picture_from_text(image), adapter=adapter, strength=strength, photo=photo)


def traced(image: Image.Image) -> Image.Image:
    """Return the edges of a photo or drawing, white on black, of the same size (Canny 1986).

    What counts as an edge depends on the photo's own contrast: the threshold that best parts its light from its dark (Otsu 1979).
    """
    import cv2

    grey = cv2.GaussianBlur(np.asarray(image.convert("L")), (3, 3), 0)
    threshold, _ = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return Image.fromarray(cv2.Canny(grey, threshold / 2, threshold))


@contextmanager
def following(base: Base, condition: Condition, width: int, height: int) -> Iterator[None]:
    """While entered, what `base` draws, `width x height` pixels, follows `condition`.

    Raises:
        InputError: the condition has other proportions than the picture, or its adapter cannot be loaded or does not fit.
    """
    dtype = base.pipeline.unet.dtype
    features = [condition.strength * feature.to(dtype) for feature in _features(base, condition, width, height)]
    with given_to(base.pipeline.unet, features):
        yield


@contextmanager
def given_to(unet: nn.Module, features: Sequence[torch.Tensor]) -> Iterator[None]:
    """While entered, `unet` adds `features` after its levels: one for all samples, or one for each."""

    def give(unet: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = [feature.expand(len(positional[0]), -1, -1, -1) for feature in features]
        return positional, named | {"down_intrablock_additional_residuals": given}

    handle = unet.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _features(base: Base, condition: Condition, width: int, height: int) -> list[torch.Tensor]:
    """Return what the adapter adds after each level of the UNet, each `(1, channels, rows, columns)`."""
    image = condition.image
    if abs(math.log(image.width * height / (image.height * width))) > SHAPE_TOLERANCE:
        raise InputError(
            f"The condition is {image.width} x {image.height} pixels, the picture {width} x {height}; give a condition of the "
            "same proportions, or the picture's size to suit it."
        )
    source = condition.adapter or _own_adapter(base)
    adapter = _load(source).to(base.device)
    step = adapter.downscale_factor
    if width % step or height % step:
        raise InputError(f"The adapter '{source}' wants a size of multiples of {step} pixels, got {width} x {height}.")
    mode = "L" if adapter.config.in_channels == 1 else "RGB"
    scaled = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = to_tensor((traced(scaled) if condition.photo else scaled).convert(mode))[None]
    features = adapter(pixels.to(base.device))
    found = [tuple(feature.shape[1:]) for feature in features]
    wanted = _levels(base, width, height)
    if found not in (wanted, wanted[:-1]):
        raise InputError(
            f"The adapter '{source}' gives {_in_words(found)}, the base '{base.source}' reads "
            f"{_in_words(wanted[:-1])}; give one that was made for its family."
        )
    return features


def _own_adapter(base: Base) -> str:
    if base.family == "mini":
        return str(EMBEDDED_SKETCH_ADAPTER)
    raise InputError(
        f"The base '{base.source}' has no T2I-Adapter of its own; name one of its family, a diffusers folder or a hub id."
    )


def _load(source: str) -> T2IAdapter:
    try:
        kind = T2IAdapter.load_config(source).get("_class_name")
        if kind == "T2IAdapter":
            return T2IAdapter.from_pretrained(source).eval().requires_grad_(False)
    except Exception as error:  # the hub's library fails in many ways, without a network in others
        raise InputError(
            f"The condition adapter '{source}' cannot be loaded ({str(error).strip().partition(chr(10))[0].rstrip('.')}); give a "
            "diffusers folder of a T2I-Adapter, or a hub id that is on this computer or can be downloaded now."
        ) from error
    raise InputError(f"The condition adapter '{source}' is a {kind}; give a T2I-Adapter.")


def _levels(base: Base, width: int, height: int) -> list[tuple[int, int, int]]:
    """Return `(channels, rows, columns)` where each level of the UNet takes a condition, and in its middle last."""
    unet, factor = base.pipeline.unet, base.pipeline.vae_scale_factor
    rows, columns = height // factor, width // factor
    levels = []
    for block, channels in zip(unet.down_blocks, unet.config.block_out_channels, strict=True):
        smaller = (math.ceil(rows / 2), math.ceil(columns / 2)) if block.downsamplers else (rows, columns)
        has_attention = getattr(block, "has_cross_attention", False)  # such a level takes it before it shrinks
        levels.append((channels, *((rows, columns) if has_attention else smaller)))
        rows, columns = smaller
    return [*levels, (channels, rows, columns)]


def _in_words(levels: list[tuple[int, int, int]]) -> str:
    return ", ".join(f"{channels} channels of {rows} x {columns}" for channels, rows, columns in levels)
