"""Spectral Diffusion: train each concept on its own band of singular directions, then sum the adapters.

The public names below are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Adapter": "adapters.adapter",
    "Band": "spectra.bands",
    "Base": "bases.base",
    "ClipScorer": "scoring.clip_scorer",
    "Concept": "concepts.concept",
    "Drawing": "generation.drawing",
    "Picture": "generation.drawing",
    "SpectralDiffusionError": "errors",
    "TrainingProgress": "training",
    "TrainingResult": "training",
    "TrainingSettings": "training",
    "band_misfit": "adapters.fit",
    "export_checkpoint": "export",
    "export_diffusers": "export",
    "export_embeddings": "export",
    "export_kohya": "export",
    "fuse": "adapters.fusion",
    "generate": "generation.generate",
    "import_lora": "imports",
    "load_adapter": "adapters.adapter_file",
    "load_base": "bases.base",
    "load_concept": "concepts.concept",
    "load_scorer": "scoring.clip_scorer",
    "next_free_band": "spectra.bands",
    "preset": "training",
    "read_base": "bases.base",
    "report_fusion": "reports.fusion_report",
    "run_demo": "demo",
    "save_adapter": "adapters.adapter_file",
    "save_picture": "generation.picture_file",
    "score_pictures": "scoring.score",
    "settle": "training",
    "train": "training",
    "train_together": "training",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spectral_diffusion' has no attribute '{name}'")
    return getattr(import_module(f"spectral_diffusion.{_HOME[name]}"), name)
