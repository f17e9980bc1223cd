"""Training: settings, examples, inertness, batches, the run with its checkpoints, and what joins them.

The public names below are loaded when they are first used: the settings alone need no pipeline.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "PRESETS": "settings",
    "TrainingProgress": "run",
    "TrainingResult": "loop",
    "TrainingSettings": "settings",
    "can_settle": "settling",
    "measure_pace": "pace",
    "preset": "settings",
    "settle": "settling",
    "train": "loop",
    "train_together": "loop",
    "training_spectrum": "trainable",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spectral_diffusion.training' has no attribute '{name}'")
    return getattr(import_module(f"spectral_diffusion.training.{_HOME[name]}"), name)
