"""How the tests compare pictures."""

from __future__ import annotations

import numpy as np

from spectral_diffusion.generation.drawing import Picture


def difference(one: Picture, other: Picture) -> int:
    """Return the largest difference of two pictures in levels of 255."""
    first, second = (np.asarray(picture.image, dtype=int) for picture in (one, other))
    return int(np.abs(first - second).max())
