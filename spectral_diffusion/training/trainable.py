"""What a training moves: each token's vectors in each text encoder and, per layer, the tensors of each concept's band."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from spectral_diffusion.adapter import LayerPart
from spectral_diffusion.attach import Factors
from spectral_diffusion.bands import Band, check_fits
from spectral_diffusion.base import Base, linear_layers
from spectral_diffusion.errors import InputError
from spectral_diffusion.parametrisations import PARAMETRISATIONS
from spectral_diffusion.spectrum import Spectrum, base_spectrum
from spectral_diffusion.training.settings import TrainingSettings
from spectral_diffusion.training.stack import ConceptLayer, Stack, stacked


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """Everything that an optimiser step moves, of one concept or several side by side.

    Attributes:
        embeddings: per concept, its token's vectors `(n, width)` per text encoder.
        stacks: the adapted layers.
        now: each layer's `up` and `down`, as the base works with them at the moment.
    """

    embeddings: tuple[dict[str, torch.Tensor], ...]
    stacks: tuple[Stack, ...]
    now: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of all adapted layers."""
        return tuple(key for stack in self.stacks for key in stack.keys)

    def factors(self) -> dict[str, Factors]:
        """Return, per layer, the function that gives what `show` last put there."""
        return {key: lambda key=key: self.now[key] for key in self.keys}

    def show(self, dtype: torch.dtype, concept: int | None = None) -> None:
        """Let the base work with the tensors as they are now, until the next call.

        Args:
            dtype: what the layers compute in.
            concept: the only one to be shown, whatever the batch; all when missing, each on its share of the batch.
        """
        for stack in self.stacks:
            up, down = (factor.to(dtype).unbind(1) for factor in stack.factors())
            for key, *pair in zip(stack.keys, up, down, strict=True):
                self.now[key] = tuple(pair) if concept is None else tuple(factor[concept].detach() for factor in pair)

    def parameters(self, part: str) -> list[torch.Tensor]:
        """Return the trained tensors of the layers of `part`: `unet`, or `text_encoder` for all text encoders."""
        return [tensor for stack in self.stacks if stack.keys[0].startswith(part) for tensor in stack.tensors.values()]

    def gradients(self, concept: int) -> list[torch.Tensor]:
        """Return the gradients of concept number `concept`, to be changed in place."""
        stacks = [tensor.grad for stack in self.stacks for tensor in stack.tensors.values()]
        tokens = [vectors.grad for vectors in self.embeddings[concept].values()]
        return [own[concept] for own in stacks if own is not None] + [own for own in tokens if own is not None]

    def confine(self) -> None:
        """Take out of every layer what lies in other concepts' bands."""
        for stack in self.stacks:
            stack.confine()

    def _named(self) -> dict[str, torch.Tensor]:
        named = {f"{stack.keys[0]}/{name}": tensor for stack in self.stacks for name, tensor in stack.tensors.items()}
        return named | {
            f"token/{concept}/{part}": vectors for concept, own in enumerate(self.embeddings) for part, vectors in own.items()
        }

    def state(self) -> dict[str, torch.Tensor]:
        """Return a copy of every trained tensor by name."""
        return {name: tensor.detach().clone() for name, tensor in self._named().items()}

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state` returned."""
        for name, tensor in self._named().items():
            tensor.copy_(state[name])

    def token_vectors(self, concept: int) -> dict[str, torch.Tensor]:
        """Return a copy of the token's vectors of concept number `concept`, on the CPU."""
        return {part: vectors.detach().clone().cpu() for part, vectors in self.embeddings[concept].items()}

    def layer_parts(self, concept: int) -> dict[str, LayerPart]:
        """Return a copy of every layer of concept number `concept` as an adapter holds it, on the CPU."""
        return {key: part for stack in self.stacks for key, part in stack.parts(concept).items()}


def build_trainable(
    base: Base, bands: Sequence[Band], class_vectors: Sequence[dict[str, torch.Tensor]], settings: TrainingSettings
) -> Trainable:
    """Return what will be trained, at its start: all tensors zero, each token's vectors those of its class word.

    Args:
        bands, class_vectors: one per concept.

    Raises:
        InputError: no layer of the base is called as the settings ask.
        BandError: a band lies beyond the smallest layer.
    """
    layers = linear_layers(base, settings.layers)
    if not layers:
        raise InputError(f"No layer of '{base.source}' ends in {', '.join(settings.layers)}; choose others as layers.")
    spectra = base_spectrum(base, layers)
    smallest = min(spectra, key=lambda key: len(spectra[key].s))
    for band in bands:
        check_fits(band, len(spectra[smallest].s), smallest)
    concepts = [{key: _layer(spectrum, band, settings, base.device) for key, spectrum in spectra.items()} for band in bands]
    embeddings = tuple(
        {part: vector.repeat(settings.token_vectors, 1).requires_grad_(True) for part, vector in vectors.items()}
        for vectors in class_vectors
    )
    return Trainable(embeddings=embeddings, stacks=tuple(stacked(PARAMETRISATIONS[settings.parametrisation], concepts)))


def _layer(spectrum: Spectrum, band: Band, settings: TrainingSettings, device: torch.device) -> ConceptLayer:
    reserved = min(settings.isolation * settings.rank, len(spectrum.s))
    kept = _columns(spectrum, [i for i in range(reserved) if not band.start <= i < band.stop], device)
    own = _columns(spectrum, list(range(band.start, band.stop)), device)
    return ConceptLayer(band=own, U_kept=kept.U, V_kept=kept.V)


def _columns(spectrum: Spectrum, columns: list[int], device: torch.device) -> Spectrum:
    def take(matrix: torch.Tensor) -> torch.Tensor:
        return matrix[..., columns].contiguous().to(device)

    return Spectrum(U=take(spectrum.U), s=take(spectrum.s), V=take(spectrum.V))


def class_word_vectors(base: Base, class_word: str) -> dict[str, torch.Tensor]:
    """Return per text encoder `(1, width)`, the mean of the embeddings of the class word's pieces, in float32.

    Raises:
        InputError: the tokenizer makes nothing of the class word.
    """
    vectors = {}
    for part, tokenizer in base.tokenizers.items():
        ids = tokenizer(class_word, add_special_tokens=False).input_ids
        if not ids:
            raise InputError(f"The class word '{class_word}' is empty to the base's tokenizer; choose a word such as 'dog'.")
        weight = base.text_encoders[part].get_input_embeddings().weight
        vectors[part] = weight[torch.tensor(ids, device=weight.device)].float().mean(0, keepdim=True).detach()
    return vectors
