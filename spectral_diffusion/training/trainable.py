"""What a training moves: the token's vectors in each text encoder and, per layer, the tensors of the parametrisation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from spectral_diffusion.adapter import LayerPart
from spectral_diffusion.attach import hooked
from spectral_diffusion.bands import Band, check_fits
from spectral_diffusion.base import Base, linear_layers
from spectral_diffusion.errors import InputError
from spectral_diffusion.joining import LowRank
from spectral_diffusion.parametrisations import RIVALS, SPECTRAL, TUNERS
from spectral_diffusion.parametrisations.site import Site
from spectral_diffusion.spectrum import Spectrum, base_spectrum
from spectral_diffusion.training.settings import TrainingSettings
from spectral_diffusion.training.tuners import TunedLayers, tuned_layers


@dataclass(frozen=True, kw_only=True)
class TrainedLayers:
    """What came out of a training: the form that the changes are kept in, a key of `FORMS`, and a part per layer."""

    form: str
    parts: dict[str, LayerPart]


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """Everything that an optimiser step moves.

    Attributes:
        embeddings: the token's vectors `(n, width)` per text encoder.
        layers: the trained tensors of each layer, by layer key and name.
        attached: while entered, the base works with the tensors as they are at each moment.
        fixed: something that does not move and that the tensors mean nothing without; where there is none, a first tensor.
        result: returns a copy of every layer as an adapter holds it, on the CPU.
        after_step: called after optimiser step number `step`, counted from 1, while the gradients are there.
        penalty: returns a term of the loss that the parametrisation itself asks for.
        tuned: PEFT's layers, when they do the work.
    """

    embeddings: dict[str, torch.Tensor]
    layers: dict[str, dict[str, torch.Tensor]]
    attached: Callable[[], AbstractContextManager[None]]
    fixed: torch.Tensor
    result: Callable[[], TrainedLayers]
    after_step: Callable[[int], None] = lambda step: None
    penalty: Callable[[], torch.Tensor | float] = lambda: 0.0
    tuned: TunedLayers | None = None

    def parameters(self, part: str) -> list[torch.Tensor]:
        """Return the trained tensors of the layers of `part`: `unet`, or `text_encoder` for all text encoders."""
        return [tensor for key, tensors in self.layers.items() if key.startswith(part) for tensor in tensors.values()]

    def parameter_count(self) -> int:
        """Return how many numbers are trained, token embeddings included."""
        tensors = [tensor for layer in self.layers.values() for tensor in layer.values()]
        return sum(tensor.numel() for tensor in (*tensors, *self.embeddings.values()))

    def state(self) -> dict[str, Any]:
        """Return a copy of every trained tensor by name, and what a tuner remembers."""
        named = {f"{key}/{name}": tensor for key, tensors in self.layers.items() for name, tensor in tensors.items()}
        named |= {f"token/{part}": vectors for part, vectors in self.embeddings.items()}
        copied: dict[str, Any] = {name: tensor.detach().clone() for name, tensor in named.items()}
        return copied | ({"tuner": self.tuned.memory()} if self.tuned else {})

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        for part, vectors in self.embeddings.items():
            vectors.copy_(state[f"token/{part}"])
        for key, tensors in self.layers.items():
            for name, tensor in tensors.items():
                tensor.copy_(state[f"{key}/{name}"])
        if self.tuned:
            self.tuned.recall(state["tuner"])


def build_trainable(base: Base, band: Band, class_vectors: dict[str, torch.Tensor], settings: TrainingSettings) -> Trainable:
    """Return what will be trained, at its start: no change of the base, the token's vectors those of the class word.

    Raises:
        InputError: no layer of the base is called as the settings ask.
        BandError: the band lies beyond the smallest layer.
    """
    layers = linear_layers(base, settings.layers)
    if not layers:
        raise InputError(f"No layer of '{base.source}' ends in {', '.join(settings.layers)}; choose others as layers.")
    embeddings = {
        part: vector.detach().clone().repeat(settings.token_vectors, 1).requires_grad_(True)
        for part, vector in class_vectors.items()
    }
    if settings.parametrisation in SPECTRAL:
        return _spectral(base, layers, band, settings, embeddings)
    if settings.parametrisation in TUNERS:
        return _tuned(base, layers, settings, embeddings)
    return _rival(layers, band, settings, embeddings)


def _spectral(
    base: Base, layers: dict[str, nn.Linear], band: Band, settings: TrainingSettings, embeddings: dict[str, torch.Tensor]
) -> Trainable:
    form = SPECTRAL[settings.parametrisation]
    spectra = base_spectrum(base, layers)
    smallest = min(spectra, key=lambda key: len(spectra[key].s))
    check_fits(band, len(spectra[smallest].s), smallest)
    bands, kept, tensors = {}, {}, {}
    for key, spectrum in spectra.items():
        bands[key] = _columns(spectrum, list(range(band.start, band.stop)), base.device)
        reserved = min(settings.isolation * settings.rank, len(spectrum.s))
        kept[key] = _columns(spectrum, [i for i in range(reserved) if not band.start <= i < band.stop], base.device)
        tensors[key] = {name: tensor.requires_grad_(True) for name, tensor in form.initial(bands[key]).items()}

    def confine(step: int) -> None:
        for key, others in kept.items():
            if len(others.s):
                form.confine(tensors[key], others.U, others.V)

    def part(key: str) -> LayerPart:
        own = Spectrum(U=bands[key].U.cpu(), s=bands[key].s.cpu(), V=bands[key].V.cpu())
        return LayerPart(band=own, tensors={name: tensor.detach().cpu().clone() for name, tensor in tensors[key].items()})

    factors = {key: partial(form.factors, bands[key], tensors[key]) for key in tensors}
    return Trainable(
        embeddings=embeddings,
        layers=tensors,
        attached=lambda: hooked(layers, factors),
        fixed=bands[smallest].U,
        result=lambda: TrainedLayers(form=settings.parametrisation, parts={key: part(key) for key in tensors}),
        after_step=confine,
    )


def _rival(
    layers: dict[str, nn.Linear], band: Band, settings: TrainingSettings, embeddings: dict[str, torch.Tensor]
) -> Trainable:
    form = RIVALS[settings.parametrisation]
    if settings.parametrisation == "orthogonal":
        smallest = min(layers, key=lambda key: layers[key].in_features)
        check_fits(band, layers[smallest].in_features, smallest)
    beginnings = {
        key: form.begin(Site(key=key, weight=layer.weight.detach(), band=band, seed=settings.seed))
        for key, layer in layers.items()
    }
    for beginning in beginnings.values():
        for tensor in beginning.tensors.values():
            tensor.requires_grad_(True)
    factors = {key: partial(own.factors, own.tensors) for key, own in beginnings.items()}

    def result() -> TrainedLayers:
        with torch.no_grad():
            current = {key: own() for key, own in factors.items()}
        return trained_layers({key: LowRank(up=up, down=down) for key, (up, down) in current.items()})

    return Trainable(
        embeddings=embeddings,
        layers={key: beginning.tensors for key, beginning in beginnings.items()},
        attached=lambda: hooked(layers, factors),
        fixed=next(iter(factors.values()))()[1].detach().clone(),
        result=result,
    )


def _tuned(
    base: Base, layers: dict[str, nn.Linear], settings: TrainingSettings, embeddings: dict[str, torch.Tensor]
) -> Trainable:
    tuned = tuned_layers(settings.parametrisation, layers, settings.rank, settings.steps, settings.seed)
    tensors = tuned.tensors()
    parts = nn.ModuleList([base.pipeline.unet, *base.text_encoders.values()])
    return Trainable(
        embeddings=embeddings,
        layers=tensors,
        attached=lambda: tuned.in_place(parts),
        fixed=next(iter(next(iter(tensors.values())).values())).detach().clone(),
        result=lambda: trained_layers(tuned.deltas()),
        after_step=tuned.after_step,
        penalty=tuned.penalty,
        tuned=tuned,
    )


def trained_layers(deltas: dict[str, LowRank]) -> TrainedLayers:
    """Return changes without a band as an adapter holds them: as a LoRA, or densely where its factors would be larger."""
    thin = all(delta.rank * (len(delta.up) + len(delta.down)) <= len(delta.up) * len(delta.down) for delta in deltas.values())
    tensors = {key: {"up": delta.up, "down": delta.down} if thin else {"matrix": delta.dense()} for key, delta in deltas.items()}
    parts = {
        key: LayerPart(band=None, tensors={name: tensor.detach().cpu().clone() for name, tensor in own.items()})
        for key, own in tensors.items()
    }
    return TrainedLayers(form="lora" if thin else "dense", parts=parts)


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
