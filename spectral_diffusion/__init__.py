"""Spectral Diffusion: train each concept on its own band of singular directions, then sum the adapters.

The public names below are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Adapter": "adapter",
    "Band": "bands",
    "Base": "base",
    "ClipScorer": "clip_scorer",
    "Concept": "concept",
    "Drawing": "generation",
    "Picture": "generation",
    "SpectralDiffusionError": "errors",
    "TrainingProgress": "training",
    "TrainingResult": "training",
    "TrainingSettings": "training",
    "band_misfit": "fit",
    "export_checkpoint": "export",
    "export_diffusers": "export",
    "export_embeddings": "export",
    "export_kohya": "export",
    "fuse": "fusion",
    "generate": "generation",
    "import_lora": "imports",
    "load_adapter": "adapter_file",
    "load_base": "base",
    "load_concept": "concept",
    "load_scorer": "clip_scorer",
    "next_free_band": "bands",
    "preset": "training",
    "read_base": "base",
    "run_demo": "demo",
    "report_fusion": "fusion_report",
    "save_adapter": "adapter_file",
    "save_picture": "picture_file",
    "score_pictures": "score",
    "train": "training",
    "train_together": "training",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spectral_diffusion' has no attribute '{name}'")
    return getattr(import_module(f"spectral_diffusion.{_HOME[name]}"), name)
