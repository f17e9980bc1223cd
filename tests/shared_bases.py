"""Bases that many tests share and leave as they are."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from spectral_diffusion.bases.base import Base, load_base

BASES = ("tiny", "embedded")


@cache
def shared_base(which: str, tiny_base_folder: Path) -> Base:
    """One of `BASES`, loaded once for all tests that leave it as it is."""
    return load_base(tiny_base_folder if which == "tiny" else None, device="cpu")
