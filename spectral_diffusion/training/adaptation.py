"""One parametrisation at work on some linear layers of any model: what is trained, and what comes out."""

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
from spectral_diffusion.joining import LowRank
from spectral_diffusion.parametrisations import RIVALS, SPECTRAL, TUNERS
from spectral_diffusion.parametrisations.site import Site
from spectral_diffusion.spectrum import Spectrum
from spectral_diffusion.training.settings import TrainingSettings
from spectral_diffusion.training.tuners import tuned_layers


@dataclass(frozen=True, kw_only=True)
class TrainedLayers:
    """What came out of a training: the form that the changes are kept in, a key of `FORMS`, and a part per layer."""

    form: str
    parts: dict[str, LayerPart]


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """Layers with a change in training; without any change at the start.

    Attributes:
        tensors: the trained tensors of each layer, by layer key and name.
        attached: while entered, the model works with the tensors as they are at each moment.
        fixed: something that does not move and that the tensors mean nothing without; where there is none, a first tensor.
        result: returns a copy of every layer as an adapter holds it, on the CPU.
        after_step: called after optimiser step number `step`, counted from 1, while the gradients are there.
        penalty: returns a term of the loss that the parametrisation itself asks for.
        memory: returns what the next step needs besides the tensors.
        recall: puts back what `memory` returned.
    """

    tensors: dict[str, dict[str, torch.Tensor]]
    attached: Callable[[], AbstractContextManager[None]]
    fixed: torch.Tensor
    result: Callable[[], TrainedLayers]
    after_step: Callable[[int], None] = lambda step: None
    penalty: Callable[[], torch.Tensor | float] = lambda: 0.0
    memory: Callable[[], dict[str, Any]] = dict
    recall: Callable[[dict[str, Any]], None] = lambda memory: None


def adapt(
    model: nn.Module, layers: dict[str, nn.Linear], spectra: dict[str, Spectrum], band: Band, settings: TrainingSettings
) -> Adaptation:
    """Return `layers` of `model` with a change as `settings` ask, at its start.

    Args:
        spectra: the layers' singular directions, for a spectral parametrisation; the others do without.

    Raises:
        BandError: the band lies beyond the smallest layer.
        InputError: the rank or the steps do not fit the parametrisation.
    """
    if settings.parametrisation in SPECTRAL:
        return _spectral(layers, spectra, band, settings)
    if settings.parametrisation in TUNERS:
        return _tuned(model, layers, settings)
    return _rival(layers, band, settings)


def _spectral(layers: dict[str, nn.Linear], spectra: dict[str, Spectrum], band: Band, settings: TrainingSettings) -> Adaptation:
    form = SPECTRAL[settings.parametrisation]
    smallest = min(spectra, key=lambda key: len(spectra[key].s))
    check_fits(band, len(spectra[smallest].s), smallest)
    bands, kept, tensors = {}, {}, {}
    for key, spectrum in spectra.items():
        bands[key] = _columns(spectrum, list(range(band.start, band.stop)), layers[key].weight.device)
        reserved = min(settings.isolation * settings.rank, len(spectrum.s))
        kept[key] = _columns(spectrum, [i for i in range(reserved) if not band.start <= i < band.stop], layers[key].weight.device)
        tensors[key] = {name: tensor.requires_grad_(True) for name, tensor in form.initial(bands[key]).items()}

    def confine(step: int) -> None:
        for key, others in kept.items():
            if len(others.s):
                form.confine(tensors[key], others.U, others.V)

    def part(key: str) -> LayerPart:
        own = Spectrum(U=bands[key].U.cpu(), s=bands[key].s.cpu(), V=bands[key].V.cpu())
        return LayerPart(band=own, tensors={name: tensor.detach().cpu().clone() for name, tensor in tensors[key].items()})

    factors = {key: partial(form.factors, bands[key], tensors[key]) for key in tensors}
    return Adaptation(
        tensors=tensors,
        attached=lambda: hooked(layers, factors),
        fixed=bands[smallest].U,
        result=lambda: TrainedLayers(form=settings.parametrisation, parts={key: part(key) for key in tensors}),
        after_step=confine,
    )


def _rival(layers: dict[str, nn.Linear], band: Band, settings: TrainingSettings) -> Adaptation:
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

    return Adaptation(
        tensors={key: beginning.tensors for key, beginning in beginnings.items()},
        attached=lambda: hooked(layers, factors),
        fixed=next(iter(factors.values()))()[1].detach().clone(),
        result=result,
    )


def _tuned(model: nn.Module, layers: dict[str, nn.Linear], settings: TrainingSettings) -> Adaptation:
    tuned = tuned_layers(settings.parametrisation, layers, settings.rank, settings.steps, settings.seed)
    tensors = tuned.tensors()
    return Adaptation(
        tensors=tensors,
        attached=lambda: tuned.in_place(model),
        fixed=next(iter(next(iter(tensors.values())).values())).detach().clone(),
        result=lambda: trained_layers(tuned.deltas()),
        after_step=tuned.after_step,
        penalty=tuned.penalty,
        memory=tuned.memory,
        recall=tuned.recall,
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
