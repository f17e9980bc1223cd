"""Checkpoints: a diffusers folder, a hub id, or one file with the whole model in the layout of the original code."""

from __future__ import annotations

from spectral_diffusion.bases.checkpoint.family import family_of
from spectral_diffusion.bases.checkpoint.folder import hub_folder, load_folder
from spectral_diffusion.bases.checkpoint.original_layout import to_original_layout
from spectral_diffusion.bases.checkpoint.recognition import PREDICTION_TYPES
from spectral_diffusion.bases.checkpoint.single_file import load_single_file

__all__ = ["PREDICTION_TYPES", "family_of", "hub_folder", "load_folder", "load_single_file", "to_original_layout"]
