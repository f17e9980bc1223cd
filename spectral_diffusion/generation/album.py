"""A folder that drawn pictures are added to, under running numbers; nothing there is ever overwritten."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from PIL import Image

from spectral_diffusion.files import reserve, write_atomically
from spectral_diffusion.generation.drawing import Picture
from spectral_diffusion.generation.picture_file import save_picture


class Album:
    """Adds pictures that the base called `base_name` drew to `folder`, as `NUMBER-SEED.png`."""

    def __init__(self, folder: Path, base_name: str):
        self.folder, self.base_name = folder, base_name
        self.last = _last_number(folder)

    def add(self, picture: Picture) -> Path:
        """Save `picture` with its settings inside and return its path.

        Raises:
            StorageError: the file could not be written.
        """
        path = next(path for path in self._next_paths(picture.seed) if reserve(path))
        try:
            save_picture(picture, path, self.base_name)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    def _next_paths(self, seed: int) -> Iterator[Path]:
        while True:
            self.last += 1
            yield self.folder / f"{self.last:04d}-{seed}.png"


def _last_number(folder: Path) -> int:
    """Return the highest number that a picture in `folder` has, as in `0007-1234.png`."""
    matches = (re.match(r"(\d+)-", path.name) for path in folder.glob("*.png"))
    return max((int(match[1]) for match in matches if match), default=0)


def save_samples(samples: Sequence[Image.Image], step: int, folders: Sequence[Path]) -> list[list[Path]]:
    """Save what a training drew after `step`, each concept's share in a folder of its own, as `step-STEP-NUMBER.png`.

    Returns:
        The paths by folder.

    Raises:
        StorageError: a file could not be written.
    """
    each = len(samples) // len(folders)
    paths = [[folder / f"step-{step:06d}-{number}.png" for number in range(1, each + 1)] for folder in folders]
    for path, picture in zip(chain.from_iterable(paths), samples, strict=True):
        write_atomically(path, lambda temporary, picture=picture: picture.save(temporary, "PNG"))
    return paths
