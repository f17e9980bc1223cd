"""Run the command line in a test, on the tiny base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from spectral_diffusion.cli import main


class Commands:
    """Runs commands on the tiny base and keeps what the last one wrote."""

    def __init__(self, base: Path, capture: pytest.CaptureFixture[str]):
        self.base, self.capture = base, capture
        self.out = self.err = ""

    def __call__(self, *words: object, expect: int = 0) -> str:
        """Run one command line, check its exit code and that there is no traceback, and return its stdout."""
        code = main([str(word) for word in words])
        self.out, self.err = self.capture.readouterr()
        assert code == expect, self.err
        assert "Traceback" not in self.out + self.err
        return self.out

    def train(self, photos: Path, out: Path, *words: object, expect: int = 0) -> str:
        """Train for two steps on the tiny base."""
        quick = ("--base", self.base, "--device", "cpu", "--steps", 2, "--batch", 1, "--rank", 2, "--no-weakest-first")
        named = ("--class-word", "dog", *quick)
        return self("train", photos, "--out", out, *named, *words, expect=expect)

    @property
    def error(self) -> str:
        """The one line on stderr that says what is wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


def tensors(path: Path) -> list[torch.Tensor]:
    with safe_open(path, "pt") as file:
        return [file.get_tensor(name) for name in sorted(file.keys())]
