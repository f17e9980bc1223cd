"""Masks made without a model: what stands out from a photo's edges, as a start to be looked at and corrected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from spectral_diffusion.concepts.photos import mask_path, read_photos, require_photos
from spectral_diffusion.files import write_atomically

_SIDE, _ROUNDS = 256, 5
_EDGE = 0.04  # this share of the photo at the top, left and right is taken for background; things stand on the bottom
_CORNERS = 0.85  # outside an ellipse of this squared size the start says "rather background"
_LEAST_PIECE = 0.2  # pieces smaller than this share of the largest one are dropped
_LEAST, _MOST = 0.02, 0.9  # a mask of less or more of the photo found nothing


@dataclass(frozen=True, kw_only=True)
class SuggestedMask:
    """What became of the photo at `photo`: the mask written at `path`, and the `share` of the photo that is white.

    `path` is None when nothing stood out.
    """

    photo: Path
    path: Path | None
    share: float


def suggest_mask(image: Image.Image) -> Image.Image | None:
    """Return a mask of what stands out in the RGB picture `image`: mode L, of its size, white where it is; None for nothing.

    In a picture so narrow that it is all edge nothing does. It works on plain backgrounds; elsewhere take it as a start.
    Source: GrabCut (Rother, Kolmogorov and Blake 2004), which begins from "the thing is in the middle" here.
    """
    import cv2

    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    labels = _start(small.height, small.width)
    if not (labels == cv2.GC_PR_FGD).any():
        return None
    cv2.setRNGSeed(0)
    pixels, models = np.ascontiguousarray(np.asarray(small)[:, :, ::-1]), (np.zeros((1, 65)), np.zeros((1, 65)))
    cv2.grabCut(pixels, labels, None, *models, _ROUNDS, cv2.GC_INIT_WITH_MASK)
    found = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    count, pieces, statistics, _ = cv2.connectedComponentsWithStats(found)
    areas = statistics[1:, cv2.CC_STAT_AREA]
    kept = [piece for piece in range(1, count) if areas[piece - 1] >= _LEAST_PIECE * areas.max()]
    found = cv2.morphologyEx(np.isin(pieces, kept).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
    if not _LEAST <= found.mean() <= _MOST:
        return None
    return Image.fromarray(found * 255).resize(image.size, Image.Resampling.BICUBIC)


def _start(height: int, width: int) -> np.ndarray:
    """Return `(height, width)` labels: background at the edges, rather background in the corners, rather the thing elsewhere."""
    import cv2

    y, x = np.mgrid[0:height, 0:width]
    far = ((2 * x / width - 1) ** 2 + (2 * y / height - 1) ** 2) > _CORNERS
    labels = np.where(far, cv2.GC_PR_BGD, cv2.GC_PR_FGD).astype(np.uint8)
    edge = max(2, round(_EDGE * min(height, width)))
    labels[:edge] = labels[:, :edge] = labels[:, -edge:] = cv2.GC_BGD
    return labels


def write_suggested_masks(
    folder: Path, *, on_mask: Callable[[SuggestedMask], None] = lambda mask: None
) -> tuple[SuggestedMask, ...]:
    """Write a mask beside every photo in `folder` that has none; one that is there is never touched.

    Args:
        on_mask: called after each photo.

    Raises:
        PhotoError: there is no usable photo.
        StorageError: a mask could not be written.
    """
    made = []
    for photo in require_photos(read_photos(folder), folder):
        path = mask_path(photo.path)
        if path.exists():
            continue
        mask = suggest_mask(photo.image)
        if mask is not None:
            write_atomically(path, lambda temporary, mask=mask: mask.save(temporary, "PNG"))
        share = 0.0 if mask is None else float(np.asarray(mask).mean()) / 255
        made.append(SuggestedMask(photo=photo.path, path=None if mask is None else path, share=share))
        on_mask(made[-1])
    return tuple(made)
