"""What a training moves: the token's vectors in each text encoder and, per layer, the tensors of the concept's band."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spectral_diffusion.adapter import LayerPart
from spectral_diffusion.attach import Factors
from spectral_diffusion.bands import Band, check_fits
from spectral_diffusion.base import Base, linear_layers
from spectral_diffusion.errors import InputError
from spectral_diffusion.parametrisations import PARAMETRISATIONS
from spectral_diffusion.spectrum import Spectrum, base_spectrum
from spectral_diffusion.training.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class TrainableLayer:
    """One layer's band, its trained tensors, and the directions of other bands that it must leave alone."""

    band: Spectrum
    tensors: dict[str, torch.Tensor]
    U_kept: torch.Tensor
    V_kept: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """Everything that an optimiser step moves."""

    parametrisation: str
    embeddings: dict[str, torch.Tensor]
    layers: dict[str, TrainableLayer]

    def factors(self) -> dict[str, Factors]:
        """Return, per layer, the function that gives its factors from the tensors as they are at that moment."""
        form = PARAMETRISATIONS[self.parametrisation]

        def of(layer: TrainableLayer) -> Factors:
            return lambda: form.factors(layer.band, layer.tensors)

        return {key: of(layer) for key, layer in self.layers.items()}

    def parameters(self, part: str) -> list[torch.Tensor]:
        """Return the trained tensors of the layers of `part`: `unet`, or `text_encoder` for all text encoders."""
        return [tensor for key, layer in self.layers.items() if key.startswith(part) for tensor in layer.tensors.values()]

    def confine(self) -> None:
        """Take out of every layer what lies in other concepts' bands."""
        for layer in self.layers.values():
            if layer.U_kept.shape[1]:
                PARAMETRISATIONS[self.parametrisation].confine(layer.tensors, layer.U_kept, layer.V_kept)

    def state(self) -> dict[str, torch.Tensor]:
        """Return a copy of every trained tensor by name."""
        named = {f"{key}/{name}": tensor for key, layer in self.layers.items() for name, tensor in layer.tensors.items()}
        named |= {f"token/{part}": vectors for part, vectors in self.embeddings.items()}
        return {name: tensor.detach().clone() for name, tensor in named.items()}

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state` returned."""
        for part, vectors in self.embeddings.items():
            vectors.copy_(state[f"token/{part}"])
        for key, layer in self.layers.items():
            for name, tensor in layer.tensors.items():
                tensor.copy_(state[f"{key}/{name}"])

    def layer_parts(self) -> dict[str, LayerPart]:
        """Return a copy of every layer as an adapter holds it, on the CPU."""
        return {
            key: LayerPart(
                band=Spectrum(U=layer.band.U.cpu(), s=layer.band.s.cpu(), V=layer.band.V.cpu()),
                tensors={name: tensor.detach().cpu().clone() for name, tensor in layer.tensors.items()},
            )
            for key, layer in self.layers.items()
        }


def build_trainable(base: Base, band: Band, class_vectors: dict[str, torch.Tensor], settings: TrainingSettings) -> Trainable:
    """Return what will be trained, at its start: all tensors zero, the token's vectors those of the class word.

    Raises:
        InputError: no layer of the base is called as the settings ask.
        BandError: the band lies beyond the smallest layer.
    """
    layers = linear_layers(base, settings.layers)
    if not layers:
        raise InputError(f"No layer of '{base.source}' ends in {', '.join(settings.layers)}; choose others as layers.")
    spectra = base_spectrum(base, layers)
    smallest = min(spectra, key=lambda key: len(spectra[key].s))
    check_fits(band, len(spectra[smallest].s), smallest)
    form = PARAMETRISATIONS[settings.parametrisation]
    trainable_layers = {}
    for key, spectrum in spectra.items():
        own = _columns(spectrum, list(range(band.start, band.stop)), base.device)
        reserved = min(settings.isolation * settings.rank, len(spectrum.s))
        kept = _columns(spectrum, [i for i in range(reserved) if not band.start <= i < band.stop], base.device)
        tensors = {name: tensor.requires_grad_(True) for name, tensor in form.initial(own).items()}
        trainable_layers[key] = TrainableLayer(band=own, tensors=tensors, U_kept=kept.U, V_kept=kept.V)
    embeddings = {
        part: vector.detach().clone().repeat(settings.token_vectors, 1).requires_grad_(True)
        for part, vector in class_vectors.items()
    }
    return Trainable(parametrisation=settings.parametrisation, embeddings=embeddings, layers=trainable_layers)


def _columns(spectrum: Spectrum, columns: list[int], device: torch.device) -> Spectrum:
    def take(matrix: torch.Tensor) -> torch.Tensor:
        return matrix[..., columns].contiguous().to(device)

    return Spectrum(U=take(spectrum.U), s=take(spectrum.s), V=take(spectrum.V))


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
