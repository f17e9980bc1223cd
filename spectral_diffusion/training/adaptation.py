"""One parametrisation at work on some linear layers of any model: what is trained, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from spectral_diffusion.adapter import LayerPart
from spectral_diffusion.attach import hooked
from spectral_diffusion.bands import Band, check_fits
from spectral_diffusion.errors import InputError
from spectral_diffusion.joining import LowRank
from spectral_diffusion.parametrisations import RIVALS, SPECTRAL, TUNERS
from spectral_diffusion.parametrisations.site import Site
from spectral_diffusion.spectrum import Spectrum
from spectral_diffusion.training.settings import TrainingSettings
from spectral_diffusion.training.stack import ConceptLayer, Stacks, TrainedLayers, stacked
from spectral_diffusion.training.tuners import tuned_layers


class Adaptation(Protocol):
    """Layers with a change in training, of one concept or several; no change at the start."""

    layers: dict[str, nn.Linear]

    @property
    def fixed(self) -> torch.Tensor:
        """Something that does not move and that the tensors mean nothing without; where there is none, a first tensor."""

    def attached(self) -> AbstractContextManager[None]:
        """While entered, the model works with what `show` last put there."""

    def show(self, dtype: torch.dtype, concept: int | None = None, *, summed: bool = False) -> None:
        """Let the model work with the tensors as they are now, until the next call.

        Args:
            dtype: what the layers compute in.
            concept: the only one to be shown, whatever the batch; all when missing, each on its share of the batch.
            summed: show the sum of all on the whole batch.
        """

    def named(self) -> dict[str, torch.Tensor]:
        """Return every trained tensor by a name that begins with the key of a layer."""

    def gradients(self, concept: int) -> list[torch.Tensor]:
        """Return the gradients of concept number `concept`, to be changed in place."""

    def start(self, concept: int, parts: Mapping[str, LayerPart]) -> None:
        """Let concept number `concept` begin with what `parts` hold, of the same layers and band.

        Raises:
            InputError: the parametrisation does not keep what it would go on from.
        """

    def after_step(self, step: int) -> None:
        """Do what the parametrisation asks for after step number `step`, counted from 1, while the gradients are there."""

    def penalty(self) -> torch.Tensor | float:
        """Return a term of the loss that the parametrisation itself asks for."""

    def memory(self) -> dict[str, Any]:
        """Return what the next step needs besides the tensors."""

    def recall(self, memory: dict[str, Any]) -> None:
        """Put back what `memory` returned."""

    def result(self, concept: int) -> TrainedLayers:
        """Return a copy of every layer of concept number `concept` as an adapter holds it, on the CPU."""


def adapt(
    layers: dict[str, nn.Linear], spectra: dict[str, Spectrum], bands: Sequence[Band], settings: TrainingSettings
) -> Adaptation:
    """Return `layers` with a change of one concept per band as `settings` ask, at its start.

    Args:
        spectra: the layers' singular directions, for a spectral parametrisation; the others do without.

    Raises:
        BandError: a band lies beyond the smallest layer.
        InputError: the rank, the steps or the number of concepts do not fit the parametrisation.
    """
    form = settings.parametrisation
    if form in SPECTRAL:
        return _spectral(layers, spectra, bands, settings)
    if len(bands) > 1:
        raise InputError(f"'{form}' trains one concept at a time, got {len(bands)}; train them one after the other.")
    return _tuned(layers, settings) if form in TUNERS else _rival(layers, bands[0], settings)


def _spectral(
    layers: dict[str, nn.Linear], spectra: dict[str, Spectrum], bands: Sequence[Band], settings: TrainingSettings
) -> Stacks:
    smallest = min(spectra, key=lambda key: len(spectra[key].s))
    for band in bands:
        check_fits(band, len(spectra[smallest].s), smallest)
    concepts = [
        {key: _layer(spectra[key], band, settings, layer.weight.device) for key, layer in layers.items()} for band in bands
    ]
    stacks = stacked(SPECTRAL[settings.parametrisation], concepts)
    return Stacks(form=settings.parametrisation, layers=layers, stacks=tuple(stacks))


def _layer(spectrum: Spectrum, band: Band, settings: TrainingSettings, device: torch.device) -> ConceptLayer:
    reserved = min(settings.isolation * settings.rank, len(spectrum.s))
    kept = _columns(spectrum, [i for i in range(reserved) if not band.start <= i < band.stop], device)
    own = _columns(spectrum, list(range(band.start, band.stop)), device)
    return ConceptLayer(band=own, U_kept=kept.U, V_kept=kept.V)


def _columns(spectrum: Spectrum, columns: list[int], device: torch.device) -> Spectrum:
    def take(matrix: torch.Tensor) -> torch.Tensor:
        return matrix[..., columns].contiguous().to(device)

    return Spectrum(U=take(spectrum.U), s=take(spectrum.s), V=take(spectrum.V))


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A parametrisation without a band of singular directions at work on `layers`, of one concept; see `Adaptation`.

    Attributes:
        tensors: the trained tensors of each layer, by layer key and name.
        deltas: returns each layer's change as it is now.
    """

    layers: dict[str, nn.Linear]
    tensors: dict[str, dict[str, torch.Tensor]]
    fixed: torch.Tensor
    attached: Callable[[], AbstractContextManager[None]]
    deltas: Callable[[], dict[str, LowRank]]
    after_step: Callable[[int], None] = lambda step: None
    penalty: Callable[[], torch.Tensor | float] = lambda: 0.0
    memory: Callable[[], dict[str, Any]] = dict
    recall: Callable[[dict[str, Any]], None] = lambda memory: None

    def show(self, dtype: torch.dtype, concept: int | None = None, *, summed: bool = False) -> None:
        """Do nothing: the layers compute with the tensors themselves."""

    def named(self) -> dict[str, torch.Tensor]:
        """Return every trained tensor by layer key and name."""
        return {f"{key}/{name}": tensor for key, tensors in self.tensors.items() for name, tensor in tensors.items()}

    def gradients(self, concept: int) -> list[torch.Tensor]:
        """Return the gradients, to be changed in place."""
        return [tensor.grad for tensor in self.named().values() if tensor.grad is not None]

    def start(self, concept: int, parts: Mapping[str, LayerPart]) -> None:
        """Refuse: what is kept is the change, not the tensors that were trained."""
        raise InputError(f"Only what was trained as {' or '.join(SPECTRAL)} can be trained on; start this one anew.")

    def result(self, concept: int) -> TrainedLayers:
        """Return the changes as a LoRA, or densely where its factors would be larger than the layers."""
        with torch.no_grad():
            deltas = self.deltas()
        thin = all(d.rank * (len(d.up) + len(d.down)) <= len(d.up) * len(d.down) for d in deltas.values())
        tensors = {key: {"up": d.up, "down": d.down} if thin else {"matrix": d.dense()} for key, d in deltas.items()}
        parts = {
            key: LayerPart(band=None, tensors={name: tensor.detach().clone().cpu() for name, tensor in own.items()})
            for key, own in tensors.items()
        }
        return TrainedLayers(form="lora" if thin else "dense", parts=parts)


def _rival(layers: dict[str, nn.Linear], band: Band, settings: TrainingSettings) -> Rival:
    form = RIVALS[settings.parametrisation]
    if settings.parametrisation == "orthogonal":
        smallest = min(layers, key=lambda key: layers[key].in_features)
        check_fits(band, layers[smallest].in_features, smallest)
    beginnings = {
        key: form.begin(Site(key=key, weight=layer.weight.detach().float(), band=band, seed=settings.seed))
        for key, layer in layers.items()
    }
    for beginning in beginnings.values():
        for tensor in beginning.tensors.values():
            tensor.requires_grad_(True)
    factors = {key: partial(own.factors, own.tensors) for key, own in beginnings.items()}

    def deltas() -> dict[str, LowRank]:
        current = {key: now() for key, now in factors.items()}
        return {key: LowRank(up=up, down=down) for key, (up, down) in current.items()}

    return Rival(
        layers=layers,
        tensors={key: beginning.tensors for key, beginning in beginnings.items()},
        fixed=next(iter(factors.values()))()[1].detach().clone(),
        attached=lambda: hooked(layers, factors),
        deltas=deltas,
    )


def _tuned(layers: dict[str, nn.Linear], settings: TrainingSettings) -> Rival:
    tuned = tuned_layers(settings.parametrisation, layers, settings.rank, settings.steps, settings.seed)
    tensors = tuned.tensors()
    return Rival(
        layers=layers,
        tensors=tensors,
        fixed=next(iter(next(iter(tensors.values())).values())).detach().clone(),
        attached=tuned.attached,
        deltas=tuned.deltas,
        after_step=tuned.after_step,
        penalty=tuned.penalty,
        memory=tuned.memory,
        recall=tuned.recall,
    )
