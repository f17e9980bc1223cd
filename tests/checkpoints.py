"""What the tests of checkpoints share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

Tensors = dict[str, torch.Tensor]
UNET = "model.diffusion_model."


class Trap:
    """Pickled, it creates the file `path` when it is unpickled by a general reader."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT | os.O_WRONLY)


def assert_same_weights(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]
