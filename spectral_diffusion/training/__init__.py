"""Training one concept: settings, examples, inertness, checkpoints, and the loop that joins them."""

from spectral_diffusion.training.loop import TrainingProgress, TrainingResult, train
from spectral_diffusion.training.settings import PRESETS, TrainingSettings, preset

__all__ = ["PRESETS", "TrainingProgress", "TrainingResult", "TrainingSettings", "preset", "train"]
