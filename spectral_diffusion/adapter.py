"""An adapter is a value: token embeddings and, per layer, a low-rank change with the band it was trained on."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch

from spectral_diffusion.bands import Band
from spectral_diffusion.errors import AdapterError
from spectral_diffusion.joining import LowRank, aligned_sum, weighted_sum
from spectral_diffusion.parametrisations import PARAMETRISATIONS
from spectral_diffusion.spectrum import Spectrum

METHODS = ("sum", "aligned")
"""How the concepts of one adapter are joined: the plain exact sum, or the aligned sum."""


@dataclass(frozen=True, kw_only=True)
class LayerPart:
    """One concept's part in one layer: the band's directions `U_b (out, r)`, `s_b (r)`, `V_b (in, r)` and what was trained."""

    band: Spectrum
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class ConceptPart:
    """One trained concept.

    Attributes:
        token: the word that calls the concept in a prompt.
        class_word: what it is a kind of.
        band: the singular directions that are its own, in every layer.
        parametrisation: a key of `PARAMETRISATIONS`.
        embeddings: the vectors that the token stands for, per text encoder (`text_encoder`, in SDXL also `text_encoder_2`),
            each `(n, width of that encoder)` with one `n`.
        layers: its part in each adapted layer, by layer key.
        activations: per group of layers with one input, a factor `(in, k)` of the Gram matrix of that input (see
            `joining.aligned_sum`); empty when it was not measured.
        settings: how it was trained, for the record.
    """

    token: str
    class_word: str
    band: Band
    parametrisation: str
    embeddings: dict[str, torch.Tensor]
    layers: dict[str, LayerPart]
    activations: dict[str, torch.Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def token_vectors(self) -> int:
        """How many vectors the token stands for."""
        return len(next(iter(self.embeddings.values())))

    def delta(self, key: str) -> LowRank:
        """Return this concept's change of layer `key`."""
        part = self.layers[key]
        up, down = PARAMETRISATIONS[self.parametrisation].factors(part.band, part.tensors)
        return LowRank(up=up, down=down)

    def parameters(self) -> int:
        """Return how many numbers were trained, token embeddings included."""
        trained = sum(tensor.numel() for part in self.layers.values() for tensor in part.tensors.values())
        return trained + sum(vectors.numel() for vectors in self.embeddings.values())


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One or several concepts, trained on a base of `family` with `fingerprint`, with a strength each and a way to join them."""

    family: str
    fingerprint: str
    concepts: tuple[ConceptPart, ...]
    weights: tuple[float, ...]
    method: str = "sum"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise AdapterError(f"'{self.method}' is not a way to join concepts; choose one of {', '.join(METHODS)}.")
        if len(self.weights) != len(self.concepts):
            raise AdapterError(f"{len(self.concepts)} concepts need as many strengths, got {len(self.weights)}.")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise AdapterError(f"Strengths must be numbers, got {', '.join(map(str, self.weights))}.")
        _check_tokens(self.concepts)
        if self.method == "aligned" and len(self.concepts) > 1:
            _check_measured(self.concepts)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens of all concepts."""
        return tuple(concept.token for concept in self.concepts)

    @property
    def class_words(self) -> dict[str, str]:
        """Token to class word."""
        return {concept.token: concept.class_word for concept in self.concepts}

    def layer_keys(self) -> tuple[str, ...]:
        """Keys of all layers that any concept changes."""
        return tuple(dict.fromkeys(key for concept in self.concepts for key in concept.layers))

    def only(self, tokens: Collection[str]) -> Adapter:
        """Return the adapter with only the concepts called `tokens`; their bands make that the same as never fusing the rest."""
        chosen = [index for index, concept in enumerate(self.concepts) if concept.token in tokens]
        return replace(
            self,
            concepts=tuple(self.concepts[index] for index in chosen),
            weights=tuple(self.weights[index] for index in chosen),
        )

    def scaled(self, factor: float) -> Adapter:
        """Return the adapter with every strength multiplied by `factor`."""
        return replace(self, weights=tuple(weight * factor for weight in self.weights))

    def delta(self, key: str) -> LowRank:
        """Return the joined change of layer `key`: exact factors, low rank."""
        having = [index for index, concept in enumerate(self.concepts) if key in concept.layers]
        deltas = [self.concepts[index].delta(key) for index in having]
        weights = [self.weights[index] for index in having]
        group = input_group(key)
        if self.method == "sum" or len(having) == 1:
            return weighted_sum(deltas, weights)
        return aligned_sum(deltas, weights, [self.concepts[index].activations[group] for index in having])

    def deltas(self) -> dict[str, LowRank]:
        """Return the joined change of every layer, by layer key."""
        return {key: self.delta(key) for key in self.layer_keys()}


def _check_tokens(concepts: Sequence[ConceptPart]) -> None:
    for one, other in combinations(concepts, 2):
        if one.token.lower() == other.token.lower():
            raise AdapterError(
                f"Two concepts use the token '{one.token}'; a prompt could not tell them apart. Train one again with another "
                "token, or give each adapter once."
            )


def _check_measured(concepts: Sequence[ConceptPart]) -> None:
    for concept in concepts:
        if not all(input_group(key) in concept.activations for key in concept.layers):
            raise AdapterError(
                f"'{concept.token}' carries no measured activations, which the aligned sum needs; fuse with the method 'sum'."
            )


def input_group(key: str) -> str:
    """Return the key of the layer that stands for all layers reading the same input as layer `key`.

    Queries, keys and values of one attention read the same input; the keys and values of cross-attention all read the
    text encoder's output.
    """
    if ".attn2.to_k" in key or ".attn2.to_v" in key:
        return "text"
    stem, _, ending = key.rpartition(".")
    if ending in ("to_q", "to_k", "to_v"):
        return f"{stem}.to_q"
    if ending in ("q_proj", "k_proj", "v_proj"):
        return f"{stem}.q_proj"
    return key
