"""Checkpoints as model sites give them: one file with the whole model, in the layout of the original code."""

from __future__ import annotations

from spectral_diffusion.checkpoint.original_layout import to_original_layout

__all__ = ["to_original_layout"]
