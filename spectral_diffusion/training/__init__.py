"""Training: settings, examples, inertness, batches, the run with its checkpoints, and what joins them."""

from spectral_diffusion.training.loop import TrainingResult, train, train_together
from spectral_diffusion.training.run import TrainingProgress
from spectral_diffusion.training.settings import PRESETS, TrainingSettings, preset

__all__ = ["PRESETS", "TrainingProgress", "TrainingResult", "TrainingSettings", "preset", "train", "train_together"]
