"""Training an adaptation on something small, the same way for every parametrisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from spectral_diffusion.parametrisations import SPECTRAL
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.spectra.spectrum import singular_directions
from spectral_diffusion.training import TrainingSettings
from spectral_diffusion.training.adaptation import Adaptation, adapt


def adapted(layers: dict[str, nn.Linear], band: Band, settings: TrainingSettings, token: str = "<V>") -> Adaptation:
    """Return the adaptation of `layers`, their singular directions computed where they are needed."""
    spectral = settings.parametrisation in SPECTRAL
    spectra = {key: singular_directions(layer.weight) for key, layer in layers.items()} if spectral else {}
    return adapt(layers, spectra, [token], [band], settings)


def descend(
    adaptation: Adaptation, loss: Callable[[int], torch.Tensor], rate: float, steps: int, on_step: Callable[[int], None]
) -> None:
    """Minimise `loss(step)` with AdamW, the rate falling linearly to zero; `on_step` is called after every step."""
    optimizer = torch.optim.AdamW(adaptation.named().values(), lr=rate, weight_decay=0.01)
    with adaptation.attached():
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / steps)
            optimizer.zero_grad()
            adaptation.show(torch.float32)
            (loss(step) + adaptation.penalty()).backward()
            optimizer.step()
            adaptation.after_step(step + 1)
            adaptation.show(torch.float32)
            on_step(step + 1)
