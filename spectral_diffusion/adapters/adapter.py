"""An adapter is a value: token embeddings and, per layer, a low-rank change with the band it was trained on."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import torch

from spectral_diffusion.bases.layer_names import is_convolution
from spectral_diffusion.errors import AdapterError
from spectral_diffusion.joining import FUSERS, Inputs, LowRank, weighted_sum
from spectral_diffusion.parametrisations import FORMS
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.spectra.spectrum import Spectrum

METHODS = tuple(FUSERS)
"""How the concepts of one adapter can be joined."""


@dataclass(frozen=True, kw_only=True)
class LayerPart:
    """One concept's part in one layer: the band's directions `U_b (out, r)`, `s_b (r)`, `V_b (in, r)` and what was trained.

    A LoRA has no band; its tensors are `up (out, r)` and `down (in, r)`. Nor has a dense change, a `matrix (out, in)`.
    """

    band: Spectrum | None
    tensors: dict[str, torch.Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the weight that is changed."""
        if "matrix" in self.tensors:
            return tuple(self.tensors["matrix"].shape)
        out_side, in_side = (self.tensors["up"], self.tensors["down"]) if self.band is None else (self.band.U, self.band.V)
        return len(out_side), len(in_side)


@dataclass(frozen=True, kw_only=True)
class ConceptPart:
    """One trained concept.

    Attributes:
        token: the word that calls the concept in a prompt.
        class_word: what it is a kind of.
        band: the directions that are its own, in every layer; none for a LoRA.
        parametrisation: a key of `FORMS`.
        embeddings: the vectors that the token stands for, per text encoder (`text_encoder`, in SDXL also `text_encoder_2`),
            each `(n, width of that encoder)` with one `n`, or layer-wise `(cross-attention layers, n, width)`; where there are
            none, the token stands for the class word.
        layers: its part in each adapted layer, by layer key.
        activations: per group of linear layers with one input, a factor `(in, k)` of the Gram matrix of that input (see
            `joining.aligned_sum`), in float16 or float32; empty when it was not measured.
        settings: how it was trained, for the record.
    """

    token: str
    class_word: str
    band: Band | None
    parametrisation: str
    embeddings: dict[str, torch.Tensor]
    layers: dict[str, LayerPart]
    activations: dict[str, torch.Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def token_vectors(self) -> int:
        """How many vectors the token stands for; 0 when it has none of its own."""
        return max((vectors.shape[-2] for vectors in self.embeddings.values()), default=0)

    @property
    def is_layerwise(self) -> bool:
        """Whether the token stands for other vectors in every cross-attention layer."""
        return any(vectors.ndim == 3 for vectors in self.embeddings.values())

    @property
    def shared_embeddings(self) -> dict[str, torch.Tensor]:
        """The vectors `(n, width)` per text encoder that other tools can hold: of layer-wise ones the mean over the layers."""
        return {part: own.mean(0) if own.ndim == 3 else own for part, own in self.embeddings.items()}

    @property
    def rank(self) -> int | None:
        """The rank that it was trained with: the band's, or a LoRA's columns; None where a layer's differ or it is dense."""
        if self.band is not None:
            return self.band.rank
        ranks = {part.tensors["down"].shape[1] if "down" in part.tensors else None for part in self.layers.values()}
        return ranks.pop() if len(ranks) == 1 else None

    @property
    def words(self) -> str:
        """What the token is written as for the text encoder: a word per vector, or the class word."""
        return token_words(self.token, self.token_vectors) if self.embeddings else self.class_word

    def delta(self, key: str) -> LowRank:
        """Return this concept's change of layer `key`."""
        part = self.layers[key]
        up, down = FORMS[self.parametrisation].factors(part.band, part.tensors)
        return LowRank(up=up, down=down)

    def parameters(self) -> int:
        """Return how many numbers were trained, token embeddings included; of what is kept, where its training did not say."""
        if isinstance(self.settings.get("parameters"), int):
            return self.settings["parameters"]
        trained = sum(tensor.numel() for part in self.layers.values() for tensor in part.tensors.values())
        return trained + sum(vectors.numel() for vectors in self.embeddings.values())


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One or several concepts, trained on a base of `family` with `fingerprint`, with a strength each and a way to join them.

    `prediction_type` is what that base predicts, `epsilon` or `v_prediction`. It and the fingerprint are empty when they are
    not known, as for an imported LoRA.
    """

    family: str
    fingerprint: str
    concepts: tuple[ConceptPart, ...]
    weights: tuple[float, ...]
    method: str = "sum"
    prediction_type: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise AdapterError(f"'{self.method}' is not a way to join concepts; choose one of {', '.join(METHODS)}.")
        if self.prediction_type not in ("", "epsilon", "v_prediction"):
            raise AdapterError(f"'{self.prediction_type}' is nothing that a base predicts; train the adapter again.")
        if len(self.weights) != len(self.concepts):
            raise AdapterError(f"{len(self.concepts)} concepts need as many strengths, got {len(self.weights)}.")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise AdapterError(f"Strengths must be numbers, got {', '.join(map(str, self.weights))}.")
        _check_tokens(self.concepts)
        if FUSERS[self.method].measured and len(self.concepts) > 1:
            _check_measured(self.concepts, self.method, self.family)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens of all concepts."""
        return tuple(concept.token for concept in self.concepts)

    @property
    def words(self) -> tuple[str, ...]:
        """What the tokens of all concepts are written as for the text encoder."""
        return tuple(concept.words for concept in self.concepts)

    @property
    def embeddings(self) -> dict[str, dict[str, torch.Tensor]]:
        """Token to its vectors `(n, width)` per text encoder, of the concepts that have some."""
        return {concept.token: concept.embeddings for concept in self.concepts if concept.embeddings}

    @property
    def class_words(self) -> dict[str, str]:
        """Token to class word."""
        return {concept.token: concept.class_word for concept in self.concepts}

    def concept(self, token: str) -> ConceptPart:
        """Return the concept called `token`.

        Raises:
            AdapterError: it has no such token.
        """
        found = next((concept for concept in self.concepts if concept.token == token), None)
        if found is None:
            raise AdapterError(f"The adapter has no concept '{token}'; its tokens are {', '.join(self.tokens)}.")
        return found

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
        return self.strengthened(dict.fromkeys(self.tokens, factor))

    def strengthened(self, factors: Mapping[str, float]) -> Adapter:
        """Return the adapter with the strengths of the tokens in `factors` multiplied by those, the others as they are.

        Raises:
            AdapterError: it has no such token.
        """
        for token in factors:
            self.concept(token)
        strengths = zip(self.tokens, self.weights, strict=True)
        return replace(self, weights=tuple(weight * factors.get(token, 1.0) for token, weight in strengths))

    def delta(self, key: str) -> LowRank:
        """Return the joined change of layer `key`: exact factors, low rank.

        Methods that look at the inputs join linear layers only; convolutions, of which none were measured, are summed.

        Raises:
            AdapterError: the method fails on this layer; the message says why.
        """
        having = self._having(key)
        summed = self.method == "sum" or (FUSERS[self.method].measured and is_convolution(key, self.family))
        if summed or len(having) == 1:
            return weighted_sum(*self._parts(key, having))
        if key not in self._joined:
            self._joined.update(self._join_readers_of(input_group(key)))
        return self._joined[key]

    def _having(self, key: str) -> tuple[int, ...]:
        """Return the numbers of the concepts that count in layer `key`: those that change it, in an average all."""
        is_average = self.method == "average"
        return tuple(index for index, concept in enumerate(self.concepts) if is_average or key in concept.layers)

    def _parts(self, key: str, having: tuple[int, ...]) -> tuple[list[LowRank], list[float]]:
        changes = {index: self.concepts[index].delta(key) for index in having if key in self.concepts[index].layers}
        some = next(iter(changes.values()))
        none = LowRank(up=some.up[:, :0], down=some.down[:, :0])
        return [changes.get(index, none) for index in having], [self.weights[index] for index in having]

    def _join_readers_of(self, group: str) -> dict[str, LowRank]:
        """Return the joined changes of all layers that read the input `group`: what was measured of it is worked up once."""
        joined: dict[str, LowRank] = {}
        inputs: dict[tuple[int, ...], Inputs] = {}
        for key in self.layer_keys():
            if input_group(key) != group:
                continue
            having = self._having(key)
            if having not in inputs:
                inputs[having] = Inputs([self.concepts[index].activations.get(group) for index in having])
            try:
                joined[key] = FUSERS[self.method].join(*self._parts(key, having), inputs[having])
            except ArithmeticError as error:
                raise AdapterError(f"Layer '{key}' cannot be joined by '{self.method}': {error}; fuse with 'sum'.") from error
        return joined

    @cached_property
    def _joined(self) -> dict[str, LowRank]:
        """What was joined already, other than by the plain sum: some methods take long."""
        return {}

    def deltas(self) -> dict[str, LowRank]:
        """Return the joined change of every layer, by layer key."""
        return {key: self.delta(key) for key in self.layer_keys()}


def token_words(token: str, vectors: int) -> str:
    """Return the words that stand for a token of several vectors: `<V1> <V1>_1`."""
    return " ".join([token, *(f"{token}_{number}" for number in range(1, vectors))])


def _check_tokens(concepts: Sequence[ConceptPart]) -> None:
    for one, other in combinations(concepts, 2):
        if one.token.lower() == other.token.lower():
            raise AdapterError(
                f"Two concepts use the token '{one.token}'; a prompt could not tell them apart. Train one again with another "
                "token, or give each adapter once."
            )


def _check_measured(concepts: Sequence[ConceptPart], method: str, family: str) -> None:
    for concept in concepts:
        linear = (key for key in concept.layers if not is_convolution(key, family))
        if not all(input_group(key) in concept.activations for key in linear):
            raise AdapterError(
                f"'{concept.token}' carries no measured activations, which the method '{method}' needs; fuse with the method "
                "'sum'."
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
