"""Training one concept: settings, examples, inertness, checkpoints, and the loop that joins them."""

from spectral_diffusion.training.settings import PRESETS, TrainingSettings, preset
from spectral_diffusion.training.train import TrainingProgress, TrainingResult, train

__all__ = ["PRESETS", "TrainingProgress", "TrainingResult", "TrainingSettings", "preset", "train"]
