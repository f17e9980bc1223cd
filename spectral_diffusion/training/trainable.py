"""What a training moves: each token's vectors in each text encoder, and the adaptation of the base's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spectral_diffusion.adapters.adapter import ConceptPart
from spectral_diffusion.bases.base import Base, adaptable_layers
from spectral_diffusion.bases.cross_attention import cross_attention_layers
from spectral_diffusion.errors import InputError
from spectral_diffusion.parametrisations import SPECTRAL
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.spectra.spectrum import Spectrum, base_spectrum
from spectral_diffusion.training.adaptation import Adaptation, adapt
from spectral_diffusion.training.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """Everything that an optimiser step moves, of one concept or several side by side.

    Attributes:
        embeddings: per concept, its token's vectors `(n, width)` per text encoder; layer-wise `(layers, n, width)`.
        adaptation: the adapted layers.
    """

    embeddings: tuple[dict[str, torch.Tensor], ...]
    adaptation: Adaptation

    def parameters(self, part: str) -> list[torch.Tensor]:
        """Return the trained tensors of the layers of `part`: `unet`, or `text_encoder` for all text encoders."""
        return [tensor for name, tensor in self.adaptation.named().items() if name.startswith(part)]

    def gradients(self, concept: int) -> list[torch.Tensor]:
        """Return the gradients of concept number `concept`, to be changed in place."""
        tokens = [vectors.grad for vectors in self.embeddings[concept].values()]
        return [*self.adaptation.gradients(concept), *(own for own in tokens if own is not None)]

    @torch.no_grad()
    def stop_tokens(self, norm: float) -> None:
        """Take the gradients from every token whose vectors' mean norm has come to `norm`, so that it moves no more."""
        for own in self.embeddings:
            for vectors in own.values():
                if vectors.norm(dim=-1).mean() >= norm:
                    vectors.grad = None

    def parameter_count(self) -> int:
        """Return how many numbers are trained for each concept, token embeddings included."""
        return sum(tensor.numel() for tensor in self.named().values()) // len(self.embeddings)

    def named(self) -> dict[str, torch.Tensor]:
        """Return every trained tensor by a name of its own."""
        return self.adaptation.named() | {
            f"token/{concept}/{part}": vectors for concept, own in enumerate(self.embeddings) for part, vectors in own.items()
        }

    def state(self) -> dict[str, Any]:
        """Return a copy of every trained tensor by name, and what the adaptation remembers."""
        copied = {name: tensor.detach().clone() for name, tensor in self.named().items()}
        memory = self.adaptation.memory()
        return copied | ({"memory": memory} if memory else {})

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        for name, tensor in self.named().items():
            tensor.copy_(state[name])
        self.adaptation.recall(state.get("memory", {}))

    @torch.no_grad()
    def start(self, concept: int, part: ConceptPart) -> None:
        """Let concept number `concept` begin as `part` was trained, of the same form, layers, band and token vectors."""
        self.adaptation.start(concept, part.layers)
        for encoder, vectors in self.embeddings[concept].items():
            vectors.copy_(part.embeddings[encoder])

    def token_vectors(self, concept: int) -> dict[str, torch.Tensor]:
        """Return a copy of the token's vectors of concept number `concept`, on the CPU."""
        return {part: vectors.detach().clone().cpu() for part, vectors in self.embeddings[concept].items()}


def training_spectrum(base: Base, settings: TrainingSettings) -> dict[str, Spectrum]:
    """Return the spectrum of the adapted layers; nothing where a form needs none."""
    return base_spectrum(base, adaptable_layers(base, settings.layers)) if settings.parametrisation in SPECTRAL else {}


def build_trainable(
    base: Base,
    tokens: Sequence[str],
    bands: Sequence[Band],
    vectors: Sequence[dict[str, torch.Tensor]],
    settings: TrainingSettings,
) -> Trainable:
    """Return what will be trained, at its start: no change of the base, each token's vectors as given.

    Args:
        tokens, bands, vectors: one per concept; see `first_vectors`.

    Raises:
        InputError: no layer of the base is called as the settings ask, or the parametrisation does not take what they ask.
        BandError: a band lies beyond the smallest layer.
    """
    layers = adaptable_layers(base, settings.layers)
    if not layers:
        raise InputError(f"No layer of '{base.source}' ends in {', '.join(settings.layers)}; choose others as layers.")
    spectra = training_spectrum(base, settings)
    embeddings = tuple({part: own.clone().requires_grad_(True) for part, own in first.items()} for first in vectors)
    return Trainable(embeddings=embeddings, adaptation=adapt(layers, spectra, tokens, bands, settings))


def first_vectors(
    base: Base, token: str, class_vectors: dict[str, torch.Tensor], settings: TrainingSettings
) -> dict[str, torch.Tensor]:
    """Return per text encoder the vectors that `token` begins with: the last at its class word, as far off as the settings say.

    Those before it are random, as far apart as words are (ED-LoRA, Gu et al. 2023, section 3.2). All are others for every token.
    """
    generator = torch.Generator().manual_seed(settings.seed_of(token))
    begun = {}
    for part, class_vector in class_vectors.items():
        spread = base.text_encoders[part].get_input_embeddings().weight.std().item()
        before = spread * torch.randn(settings.token_vectors - 1, class_vector.shape[1], generator=generator)
        begun[part] = torch.cat([before.to(class_vector), moved(class_vector, settings.token_distance, generator)])
        if settings.layerwise_token:
            begun[part] = begun[part].repeat(len(cross_attention_layers(base.pipeline.unet)), 1, 1)
    return begun


def moved(vector: torch.Tensor, distance: float, generator: torch.Generator) -> torch.Tensor:
    """Return `vector (1, width)` moved by `distance` times its norm in a random direction."""
    direction = torch.randn(vector.shape, generator=generator).to(vector)
    return vector + distance * vector.norm() * direction / direction.norm()


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
