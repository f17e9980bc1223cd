"""What a training moves: the token's vectors in each text encoder, and the adaptation of the base's layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spectral_diffusion.bands import Band
from spectral_diffusion.base import Base, linear_layers
from spectral_diffusion.errors import InputError
from spectral_diffusion.parametrisations import SPECTRAL
from spectral_diffusion.spectrum import base_spectrum
from spectral_diffusion.training.adaptation import Adaptation, adapt
from spectral_diffusion.training.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """Everything that an optimiser step moves: `embeddings (n, width)` per text encoder, and the layers' `adaptation`."""

    embeddings: dict[str, torch.Tensor]
    adaptation: Adaptation

    def parameters(self, part: str) -> list[torch.Tensor]:
        """Return the trained tensors of the layers of `part`: `unet`, or `text_encoder` for all text encoders."""
        layers = self.adaptation.tensors.items()
        return [tensor for key, tensors in layers if key.startswith(part) for tensor in tensors.values()]

    def parameter_count(self) -> int:
        """Return how many numbers are trained, token embeddings included."""
        tensors = [tensor for layer in self.adaptation.tensors.values() for tensor in layer.values()]
        return sum(tensor.numel() for tensor in (*tensors, *self.embeddings.values()))

    def state(self) -> dict[str, Any]:
        """Return a copy of every trained tensor by name, and what the adaptation remembers."""
        layers = self.adaptation.tensors.items()
        named = {f"{key}/{name}": tensor for key, tensors in layers for name, tensor in tensors.items()}
        named |= {f"token/{part}": vectors for part, vectors in self.embeddings.items()}
        return {name: tensor.detach().clone() for name, tensor in named.items()} | {"memory": self.adaptation.memory()}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        for part, vectors in self.embeddings.items():
            vectors.copy_(state[f"token/{part}"])
        for key, tensors in self.adaptation.tensors.items():
            for name, tensor in tensors.items():
                tensor.copy_(state[f"{key}/{name}"])
        self.adaptation.recall(state["memory"])


def build_trainable(base: Base, band: Band, class_vectors: dict[str, torch.Tensor], settings: TrainingSettings) -> Trainable:
    """Return what will be trained, at its start: no change of the base, the token's vectors those of the class word.

    Raises:
        InputError: no layer of the base is called as the settings ask, or the parametrisation does not take them.
        BandError: the band lies beyond the smallest layer.
    """
    layers = linear_layers(base, settings.layers)
    if not layers:
        raise InputError(f"No layer of '{base.source}' ends in {', '.join(settings.layers)}; choose others as layers.")
    spectra = base_spectrum(base, layers) if settings.parametrisation in SPECTRAL else {}
    model = nn.ModuleList([base.pipeline.unet, *base.text_encoders.values()])
    embeddings = {
        part: vector.detach().clone().repeat(settings.token_vectors, 1).requires_grad_(True)
        for part, vector in class_vectors.items()
    }
    return Trainable(embeddings=embeddings, adaptation=adapt(model, layers, spectra, band, settings))


def class_word_vectors(base: Base, class_word: str) -> dict[str, torch.Tensor]:
    """Return per text encoder `(1, width)`, the mean of the embeddings of the class word's pieces.

    Raises:
        InputError: the tokenizer makes nothing of the class word.
    """
    vectors = {}
    for part, tokenizer in base.tokenizers.items():
        ids = tokenizer(class_word, add_special_tokens=False).input_ids
        if not ids:
            raise InputError(f"The class word '{class_word}' is empty to the base's tokenizer; choose a word such as 'dog'.")
        weight = base.text_encoders[part].get_input_embeddings().weight
        vectors[part] = weight[torch.tensor(ids, device=weight.device)].mean(0, keepdim=True).detach()
    return vectors
