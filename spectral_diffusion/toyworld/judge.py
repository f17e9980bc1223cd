"""The judge: which characters of the toy world does a picture show, and where?

It is a ground truth for identity that no CLIP score gives. It only ever looks at finished pictures: nothing of it may
enter the training of a base or of an adapter, or it would stop being a judge.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from spectral_diffusion.errors import InputError
from spectral_diffusion.files import write_atomically

PICTURE_SIDE = 64
"""Pictures are brought to this side, in pixels, before the judge looks."""
GRID = 16
"""The judge answers for `GRID x GRID` cells of a picture."""
DEFAULT_JUDGE = Path(__file__).resolve().parents[2] / "assets" / "judge" / "judge.safetensors"

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """A character seen at `x`, `y` (centre, fractions of the picture) with a `confidence` between 0 and 1."""

    character: str
    confidence: float
    x: float
    y: float


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(features))))))


class JudgeNetwork(nn.Module):
    """`(n, 3, 64, 64)` in [-1, 1] to `(n, 1 + characters, 16, 16)` logits: is a centre here, and whose would it be?"""

    def __init__(self, characters: int):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 4, stride=2, padding=1)
        self.to_fine = nn.Conv2d(24, 48, 3, stride=2, padding=1)
        self.fine = _Residual(48)
        self.to_coarse = nn.Conv2d(48, 112, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(_Residual(112), _Residual(112))
        self.back = nn.Conv2d(112, 48, 1)
        self.merge = _Residual(48)
        self.norm = nn.GroupNorm(8, 48)
        self.head = nn.Conv2d(48, 1 + characters, 1)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        fine = self.fine(self.to_fine(F.silu(self.stem(pictures))))
        coarse = self.coarse(self.to_coarse(F.silu(fine)))
        merged = self.merge(fine + F.interpolate(self.back(F.silu(coarse)), scale_factor=2.0))
        return self.head(F.silu(self.norm(merged)))


class Judge:
    """A trained network and the names of the characters it tells apart."""

    def __init__(self, network: JudgeNetwork, characters: Sequence[str], device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.characters = tuple(characters)

    def look(self, images: Sequence[Image.Image], *, apart: float = 0.2, limit: int = 5) -> list[list[Sighting]]:
        """Return what each picture shows, the most confident sighting first; there is always at least one.

        Args:
            images: pictures of any size and mode.
            apart: the least distance between two sightings in fractions of the side; one place gives one character.
            limit: the most sightings of a picture.
        """
        found: list[list[Sighting]] = []
        for start in range(0, len(images), _BATCH):
            pixels = np.stack([_pixels(image) for image in images[start : start + _BATCH]])
            found += [self._sightings(scores, apart, limit) for scores in self._scores(pixels)]
        return found

    def first(self, image: Image.Image) -> Sighting:
        """Return the judge's first answer for one picture."""
        return self.look([image])[0][0]

    def names_present(self, image: Image.Image, count: int) -> tuple[str, ...]:
        """Return the characters at the `count` strongest places, the strongest first (fewer when there are no more)."""
        return tuple(sighting.character for sighting in self.look([image], limit=count)[0])

    @torch.no_grad()
    def _scores(self, pixels: np.ndarray) -> np.ndarray:
        """`(n, 64, 64, 3)` uint8 to `(n, characters, 16, 16)`: chance of a centre times chance of the character."""
        tensor = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        logits = self.network(tensor)
        return (logits[:, :1].sigmoid() * logits[:, 1:].softmax(dim=1)).cpu().numpy()

    def _sightings(self, scores: np.ndarray, apart: float, limit: int) -> list[Sighting]:
        best, who = scores.max(axis=0), scores.argmax(axis=0)
        sightings: list[Sighting] = []
        for cell in np.argsort(-best, axis=None):
            row, column = divmod(int(cell), GRID)
            x, y = (column + 0.5) / GRID, (row + 0.5) / GRID
            if len(sightings) == limit:
                break
            if not _is_peak(best, row, column) or any(np.hypot(s.x - x, s.y - y) < apart for s in sightings):
                continue
            name = self.characters[who[row, column]]
            sightings.append(Sighting(character=name, confidence=float(best[row, column]), x=x, y=y))
        return sightings


def _is_peak(best: np.ndarray, row: int, column: int) -> bool:
    around = best[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
    return bool(best[row, column] >= around.max())


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC))


def save_judge(network: JudgeNetwork, characters: Sequence[str], path: Path) -> None:
    """Write the network in half precision, with its character names in the file's metadata.

    Raises:
        StorageError: the file could not be written.
    """
    tensors = {key: tensor.detach().half().cpu().contiguous() for key, tensor in network.state_dict().items()}
    metadata = {"format": "spectral-diffusion-judge-1", "characters": json.dumps(list(characters))}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_judge(path: Path | None = None, *, device: torch.device | str = "cpu") -> Judge:
    """Return the judge stored in `path`, or the one that ships with the project when `path` is None.

    Raises:
        InputError: the file is missing or is not a judge.
    """
    path = DEFAULT_JUDGE if path is None else path
    if not path.is_file():
        raise InputError(f"There is no judge at '{path}'; restore the file from the repository or train one with the recipe.")
    try:
        with safe_open(path, framework="pt") as file:
            characters = json.loads((file.metadata() or {})["characters"])
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}
        network = JudgeNetwork(len(characters))
        network.load_state_dict(tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"'{path}' is not a judge ({error}); restore it from the repository.") from error
    return Judge(network, characters, device)
