"""Layers of one shape side by side, of one concept or several: few large operations in place of many small ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import pad

from spectral_diffusion.adapters.adapter import LayerPart
from spectral_diffusion.adapters.attach import hooked
from spectral_diffusion.bases.layer_matrix import Layer
from spectral_diffusion.spectra.spectrum import Spectrum
from spectral_diffusion.training.company import Company


@dataclass(frozen=True, kw_only=True)
class TrainedLayers:
    """What came out of a training: the form that the changes are kept in, a key of `FORMS`, and a part per layer."""

    form: str
    parts: dict[str, LayerPart]


@dataclass(frozen=True, kw_only=True)
class ConceptLayer:
    """One concept's band in one layer, and the directions of other bands, `U_kept (out, m)`, `V_kept (in, m)`, to leave alone."""

    band: Spectrum
    U_kept: torch.Tensor
    V_kept: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Stack:
    """`n` layers of one shape, of every concept that is being trained.

    Attributes:
        form: the module of the parametrisation.
        keys: the layers' keys.
        band: each concept's directions, `U (concepts, n, out, r)`, `s (concepts, n, r)`, `V (concepts, n, in, r)`.
        balanced: the same as the form trains on it.
        tensors: the trained tensors by name, `(concepts, n, ...)` each, on the balanced band.
        U_kept, V_kept: what each leaves alone, `(concepts, n, out or in, m)`; columns that one has not are zero.
    """

    form: ModuleType
    keys: tuple[str, ...]
    band: Spectrum
    balanced: Spectrum
    tensors: dict[str, torch.Tensor]
    U_kept: torch.Tensor
    V_kept: torch.Tensor

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `up (concepts, n, out, k)` and `down (concepts, n, in, k)` of the tensors as they are now."""
        return self.form.factors(self.balanced, self.tensors)

    def confine(self) -> None:
        """Take out of every layer what lies in other concepts' bands."""
        if self.U_kept.shape[-1]:
            self.form.confine(self.tensors, self.U_kept, self.V_kept)

    @torch.no_grad()
    def start(self, concept: int, parts: Mapping[str, LayerPart]) -> None:
        """Put the tensors of `parts`, and the directions that they were trained on, in the place of those of concept `concept`.

        Directions that are found again may point the other way, or be turned among close singular values.
        """
        device = self.band.s.device

        def of(take: Callable[[LayerPart], torch.Tensor]) -> torch.Tensor:
            return torch.stack([take(parts[key]) for key in self.keys]).to(device)

        band = Spectrum(U=of(lambda part: part.band.U), s=of(lambda part: part.band.s), V=of(lambda part: part.band.V))
        for there, own in ((self.band, band), (self.balanced, self.form.balanced(band))):
            for name in ("U", "s", "V"):
                getattr(there, name)[concept].copy_(getattr(own, name))
        begun = {name: of(lambda part, name=name: part.tensors[name]) for name in self.tensors}
        for name, tensor in self.form.resumed(band.s, begun).items():
            self.tensors[name][concept].copy_(tensor)

    def parts(self, concept: int) -> dict[str, LayerPart]:
        """Return a copy of the layers of concept number `concept` as an adapter holds them, on the CPU."""
        tensors = {name: tensor[concept].detach() for name, tensor in self.tensors.items()}
        band = Spectrum(U=self.band.U[concept], s=self.band.s[concept], V=self.band.V[concept])
        kept = self.form.kept(band.s, tensors)
        return {
            key: LayerPart(
                band=Spectrum(U=band.U[i].clone().cpu(), s=band.s[i].clone().cpu(), V=band.V[i].clone().cpu()),
                tensors={name: tensor[i].clone().cpu() for name, tensor in kept.items()},
            )
            for i, key in enumerate(self.keys)
        }


def stacked(form: ModuleType, concepts: Sequence[dict[str, ConceptLayer]]) -> list[Stack]:
    """Return the layers of `concepts`, all of which have the same keys, stacked by part of the base and shape."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for key, layer in concepts[0].items():
        groups.setdefault((key.split(".")[0], layer.band.U.shape, layer.band.V.shape), []).append(key)
    return [_stack(form, keys, [[layers[key] for key in keys] for layers in concepts]) for keys in groups.values()]


def _stack(form: ModuleType, keys: list[str], concepts: list[list[ConceptLayer]]) -> Stack:
    def of(take: Callable[[ConceptLayer], torch.Tensor]) -> torch.Tensor:
        return torch.stack([torch.stack([take(layer) for layer in layers]) for layers in concepts])

    kept = max(layer.U_kept.shape[1] for layers in concepts for layer in layers)
    band = Spectrum(U=of(lambda layer: layer.band.U), s=of(lambda layer: layer.band.s), V=of(lambda layer: layer.band.V))
    balanced = form.balanced(band)
    return Stack(
        form=form,
        keys=tuple(keys),
        band=band,
        balanced=balanced,
        tensors={name: tensor.requires_grad_(True) for name, tensor in form.initial(balanced).items()},
        U_kept=of(lambda layer: pad(layer.U_kept, (0, kept - layer.U_kept.shape[1]))),
        V_kept=of(lambda layer: pad(layer.V_kept, (0, kept - layer.V_kept.shape[1]))),
    )


@dataclass(frozen=True, kw_only=True)
class Stacks:
    """A spectral parametrisation at work on linear layers, of one concept or several side by side; see `Adaptation`.

    Attributes:
        form: the parametrisation's name.
        layers: the adapted layers by key.
        now: each layer's `up` and `down`, as the model works with them at the moment.
        company: who counts on each sample where they are those of all side by side.
    """

    form: str
    layers: dict[str, Layer]
    stacks: tuple[Stack, ...]
    now: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    company: Company = field(default_factory=Company)

    @property
    def fixed(self) -> torch.Tensor:
        """The directions of the first layers, as they are trained on."""
        return self.stacks[0].balanced.U

    def attached(self) -> AbstractContextManager[None]:
        """While entered, the model works with what `show` last put there."""
        return hooked(self.layers, {key: lambda key=key: self.now[key] for key in self.layers}, gate=self.company.gate)

    def show(self, dtype: torch.dtype, concept: int | None = None, *, company: torch.Tensor | None = None) -> None:
        """Let the model work with the tensors as they are now, until the next call."""
        self.company.meet(company)
        for stack in self.stacks:
            factors = (factor.to(dtype) for factor in stack.factors())
            if company is not None:
                factors = (factor.permute(1, 2, 0, 3).flatten(2) for factor in factors)
            elif concept is not None:
                factors = (factor[concept].detach() for factor in factors)
            else:
                factors = (factor.transpose(0, 1) for factor in factors)
            self.now.update(zip(stack.keys, zip(*factors, strict=True), strict=True))

    def named(self) -> dict[str, torch.Tensor]:
        """Return every trained tensor, `(concepts, n, ...)`, by a name that begins with the key of a layer."""
        return {f"{stack.keys[0]}/{name}": tensor for stack in self.stacks for name, tensor in stack.tensors.items()}

    def gradients(self, concept: int) -> list[torch.Tensor]:
        """Return the gradients of concept number `concept`, to be changed in place."""
        return [tensor.grad[concept] for tensor in self.named().values() if tensor.grad is not None]

    def start(self, concept: int, parts: Mapping[str, LayerPart]) -> None:
        """Let concept number `concept` begin with what `parts` hold, of the same layers and band."""
        for stack in self.stacks:
            stack.start(concept, parts)

    def after_step(self, step: int) -> None:
        """Take out of every layer what lies in other concepts' bands."""
        for stack in self.stacks:
            stack.confine()

    def penalty(self) -> float:
        """Return nothing."""
        return 0.0

    def memory(self) -> dict[str, Any]:
        """Return nothing: the tensors are all there is."""
        return {}

    def recall(self, memory: dict[str, Any]) -> None:
        """Do nothing."""

    def result(self, concept: int) -> TrainedLayers:
        """Return a copy of every layer of concept number `concept`, on the CPU."""
        return TrainedLayers(form=self.form, parts={key: part for s in self.stacks for key, part in s.parts(concept).items()})
