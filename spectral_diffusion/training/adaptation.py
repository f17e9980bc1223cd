"""One parametrisation at work on some linear layers of any model: what is trained, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Literal, Protocol

import torch

from spectral_diffusion.adapters.adapter import LayerPart
from spectral_diffusion.adapters.attach import hooked
from spectral_diffusion.bases.layer_matrix import Layer, matrix_of
from spectral_diffusion.errors import InputError
from spectral_diffusion.joining import LowRank
from spectral_diffusion.parametrisations import RIVALS, SPECTRAL
from spectral_diffusion.parametrisations.site import Beginning, Site
from spectral_diffusion.spectra.bands import Band, bands_in_order, check_fits
from spectral_diffusion.spectra.spectrum import Spectrum, directions_of
from spectral_diffusion.training.company import Company
from spectral_diffusion.training.settings import TrainingSettings
from spectral_diffusion.training.stack import ConceptLayer, Stacks, TrainedLayers, stacked
from spectral_diffusion.training.tuners import TunedLayers, tuned_layers

FAINTEST = 1e-4
"""Least singular value of a band's direction: one that a layer has not at all is taken for one that it hardly has."""


class Adaptation(Protocol):
    """Layers with a change in training, of one concept or several; no change at the start."""

    layers: dict[str, Layer]

    @property
    def fixed(self) -> torch.Tensor:
        """Something that does not move and that the tensors mean nothing without; where there is none, a first tensor."""

    def attached(self) -> AbstractContextManager[None]:
        """While entered, the model works with what `show` last put there."""

    def show(self, dtype: torch.dtype, concept: int | None = None, *, company: torch.Tensor | None = None) -> None:
        """Let the model work with the tensors as they are now, until the next call.

        Args:
            dtype: what the layers compute in.
            concept: the only one to be shown, whatever the batch; all when missing, each on its share of the batch.
            company: show on each sample the sum of those that are there, `(samples, concepts)`, 1 or 0.
        """

    def named(self) -> dict[str, torch.Tensor]:
        """Return every trained tensor by a name that begins with the key of a layer."""

    def gradients(self, concept: int) -> list[torch.Tensor]:
        """Return the gradients of concept number `concept`, to be changed in place."""

    def start(self, concept: int, parts: Mapping[str, LayerPart]) -> None:
        """Let concept number `concept` begin with what `parts` hold, of the same form, layers and band."""

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
    layers: dict[str, Layer],
    spectra: dict[str, Spectrum],
    tokens: Sequence[str],
    bands: Sequence[Band],
    settings: TrainingSettings,
) -> Adaptation:
    """Return `layers` with a change of one concept per token and band as `settings` ask, at its start.

    Args:
        spectra: the layers' singular directions, for a spectral parametrisation; the others do without.
        tokens: one per concept; what begins at random begins elsewhere for each, also in trainings apart.

    Raises:
        BandError: a band lies beyond the smallest layer.
        InputError: the rank, the steps or the number of concepts do not fit the parametrisation.
    """
    form = settings.parametrisation
    if form in SPECTRAL:
        return _spectral(layers, spectra, bands, settings)
    if form in RIVALS:
        return _rivals(layers, tokens, bands, settings)
    if len(bands) > 1:
        raise InputError(f"'{form}' trains one concept at a time, got {len(bands)}; train them one after the other.")
    return _tuned(layers, tokens[0], settings)


def _spectral(
    layers: dict[str, Layer], spectra: dict[str, Spectrum], bands: Sequence[Band], settings: TrainingSettings
) -> Stacks:
    smallest = min(layers, key=lambda key: min(matrix_of(layers[key]).shape))
    directions = directions_of(layers)
    for band in bands:
        check_fits(band, directions, smallest)
    isolated = isolated_bands(settings, directions)
    reserved = [direction for other in isolated for direction in range(other.start, other.stop)]
    concepts = [
        {key: _layer(spectra[key], band, reserved, layer.weight.device) for key, layer in layers.items()} for band in bands
    ]
    stacks = stacked(SPECTRAL[settings.parametrisation], concepts)
    return Stacks(form=settings.parametrisation, layers=layers, stacks=tuple(stacks))


def isolated_bands(settings: TrainingSettings, directions: int) -> list[Band]:
    """Return the bands that no concept reads or writes but its own, among the `directions` of the smallest layer."""
    order = bands_in_order(settings.rank, directions, weakest_first=settings.weakest_first)
    return list(islice(order, settings.isolation))


def _layer(spectrum: Spectrum, band: Band, reserved: list[int], device: torch.device) -> ConceptLayer:
    kept = _columns(spectrum, [direction for direction in reserved if not band.start <= direction < band.stop], device)
    own = _columns(spectrum, list(range(band.start, band.stop)), device)
    own = replace(own, s=own.s.clamp(min=FAINTEST))
    return ConceptLayer(band=own, U_kept=kept.U, V_kept=kept.V)


def _columns(spectrum: Spectrum, columns: list[int], device: torch.device) -> Spectrum:
    def take(matrix: torch.Tensor) -> torch.Tensor:
        return matrix[..., columns].contiguous().to(device)

    return Spectrum(U=take(spectrum.U), s=take(spectrum.s), V=take(spectrum.V))


@dataclass(kw_only=True)
class Rivals:
    """A parametrisation without a band of singular directions at work on `layers`, of one concept or several; see `Adaptation`.

    Attributes:
        concepts: per concept what is trained in each layer, and the factors as a function of it.
        shown: the number of the only concept that the model works with, the `sum` of those in `company`, or all on their
            `shares` of the batch.
    """

    layers: dict[str, Layer]
    concepts: tuple[dict[str, Beginning], ...]
    shown: int | Literal["sum", "shares"] = "shares"
    company: Company = field(default_factory=Company)

    @property
    def fixed(self) -> torch.Tensor:
        """What the first layer's inputs are projected on at the start."""
        return self._factors(0, next(iter(self.layers)))[1].detach()

    def attached(self) -> AbstractContextManager[None]:
        """While entered, the model works with what `show` last chose."""
        return hooked(self.layers, {key: partial(self._now, key) for key in self.layers}, gate=self.company.gate)

    def show(self, dtype: torch.dtype, concept: int | None = None, *, company: torch.Tensor | None = None) -> None:
        """Choose what the model works with: always the tensors as they are at that moment."""
        self.shown = "sum" if company is not None else "shares" if concept is None else concept
        self.company.meet(company)

    def _factors(self, concept: int, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        beginning = self.concepts[concept][key]
        return beginning.factors(beginning.tensors)

    def _now(self, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(self.shown, int):
            up, down = self._factors(self.shown, key)
            return up.detach(), down.detach()
        if len(self.concepts) == 1:
            return self._factors(0, key)
        ups, downs = zip(*(self._factors(number, key) for number in range(len(self.concepts))), strict=True)
        if self.shown == "sum":
            return torch.cat(ups, dim=1), torch.cat(downs, dim=1)
        return torch.stack(ups), torch.stack(downs)

    def named(self) -> dict[str, torch.Tensor]:
        """Return every trained tensor by layer key, number of the concept and name."""
        return {
            f"{key}/{number}/{name}": tensor
            for number, own in enumerate(self.concepts)
            for key, beginning in own.items()
            for name, tensor in beginning.tensors.items()
        }

    def gradients(self, concept: int) -> list[torch.Tensor]:
        """Return the gradients of concept number `concept`, to be changed in place."""
        tensors = (tensor for beginning in self.concepts[concept].values() for tensor in beginning.tensors.values())
        return [tensor.grad for tensor in tensors if tensor.grad is not None]

    @torch.no_grad()
    def start(self, concept: int, parts: Mapping[str, LayerPart]) -> None:
        """Let concept number `concept` begin with what `parts` hold of a LoRA, the only one kept as it was trained."""
        for key, beginning in self.concepts[concept].items():
            for name, tensor in beginning.tensors.items():
                tensor.copy_(parts[key].tensors[name])

    def after_step(self, step: int) -> None:
        """Do nothing."""

    def penalty(self) -> float:
        """Return nothing."""
        return 0.0

    def memory(self) -> dict[str, Any]:
        """Return nothing: the tensors are all there is."""
        return {}

    def recall(self, memory: dict[str, Any]) -> None:
        """Do nothing."""

    @torch.no_grad()
    def result(self, concept: int) -> TrainedLayers:
        """Return the changes of concept number `concept`; see `_kept`."""
        factors = {key: self._factors(concept, key) for key in self.layers}
        return _kept({key: LowRank(up=up, down=down) for key, (up, down) in factors.items()})


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A parametrisation of PEFT at work, of one concept; see `Adaptation`.

    Attributes:
        tensors: the trained tensors by layer key and name.
    """

    tuner: TunedLayers
    layers: dict[str, Layer]
    tensors: dict[str, torch.Tensor]
    fixed: torch.Tensor

    def attached(self) -> AbstractContextManager[None]:
        """While entered, the model works with the tensors as they are."""
        return self.tuner.attached()

    def show(self, dtype: torch.dtype, concept: int | None = None, *, company: torch.Tensor | None = None) -> None:
        """Do nothing: the layers compute with the tensors themselves."""

    def named(self) -> dict[str, torch.Tensor]:
        """Return every trained tensor by layer key and name."""
        return dict(self.tensors)

    def gradients(self, concept: int) -> list[torch.Tensor]:
        """Return the gradients, to be changed in place."""
        return [tensor.grad for tensor in self.tensors.values() if tensor.grad is not None]

    def start(self, concept: int, parts: Mapping[str, LayerPart]) -> None:
        """Refuse: what is kept is the change, not the tensors that were trained.

        Raises:
            InputError: always.
        """
        raise InputError(f"Of '{self.tuner.method}' only the change is kept, which cannot be trained on; start it anew.")

    def after_step(self, step: int) -> None:
        """Let PEFT do what its method asks for."""
        self.tuner.after_step(step)

    def penalty(self) -> torch.Tensor | float:
        """Return PEFT's term of the loss."""
        return self.tuner.penalty()

    def memory(self) -> dict[str, Any]:
        """Return what PEFT's method remembers."""
        return self.tuner.memory()

    def recall(self, memory: dict[str, Any]) -> None:
        """Put back what `memory` returned."""
        self.tuner.recall(memory)

    def result(self, concept: int) -> TrainedLayers:
        """Return the changes; see `_kept`."""
        return _kept(self.tuner.deltas())


def _kept(deltas: dict[str, LowRank]) -> TrainedLayers:
    """Return changes as a LoRA, or densely where its factors would be larger than the layers, on the CPU."""
    thin = all(d.rank * (len(d.up) + len(d.down)) <= len(d.up) * len(d.down) for d in deltas.values())
    tensors = {key: {"up": d.up, "down": d.down} if thin else {"matrix": d.dense()} for key, d in deltas.items()}
    parts = {
        key: LayerPart(band=None, tensors={name: tensor.detach().clone().cpu() for name, tensor in own.items()})
        for key, own in tensors.items()
    }
    return TrainedLayers(form="lora" if thin else "dense", parts=parts)


def _rivals(layers: dict[str, Layer], tokens: Sequence[str], bands: Sequence[Band], settings: TrainingSettings) -> Rivals:
    if settings.parametrisation == "orthogonal":
        smallest = min(layers, key=lambda key: matrix_of(layers[key]).shape[1])
        for band in bands:
            check_fits(band, matrix_of(layers[smallest]).shape[1], smallest)
    concepts = tuple(
        {key: _begun(key, layer, band, settings, token) for key, layer in layers.items()}
        for token, band in zip(tokens, bands, strict=True)
    )
    return Rivals(layers=layers, concepts=concepts)


def _begun(key: str, layer: Layer, band: Band, settings: TrainingSettings, token: str) -> Beginning:
    form = RIVALS[settings.parametrisation]
    beginning = form.begin(Site(key=key, weight=matrix_of(layer).detach().float(), band=band, seed=settings.seed_of(token)))
    for tensor in beginning.tensors.values():
        tensor.requires_grad_(True)
    return beginning


def _tuned(layers: dict[str, Layer], token: str, settings: TrainingSettings) -> Tuned:
    tuner = tuned_layers(settings.parametrisation, layers, settings.rank, settings.steps, settings.seed_of(token))
    tensors = {f"{key}/{name}": tensor for key, own in tuner.tensors().items() for name, tensor in own.items()}
    first = next(iter(tensors.values()))
    return Tuned(tuner=tuner, layers=layers, tensors=tensors, fixed=first.detach().clone())
