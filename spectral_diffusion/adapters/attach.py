"""Put an adapter on a base for a while: changes beside the frozen layers or folded into them, tokens beside the vocabulary.

The base's weights are never written; leaving the context takes everything off again, also after an error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from spectral_diffusion.adapters.adapter import Adapter, token_words
from spectral_diffusion.adapters.low_rank_addition import add_low_rank, add_low_rank_to_pixels
from spectral_diffusion.bases.base import Base, adaptable_layers, tokenizer_name
from spectral_diffusion.bases.cross_attention import cross_attention_layers, each_reading_its_own
from spectral_diffusion.bases.layer_matrix import Layer, matrix_of, projected
from spectral_diffusion.concepts.concept import check_new_word
from spectral_diffusion.errors import AdapterError, InputError
from spectral_diffusion.joining import LowRank

Factors = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""Gives a layer's `up (out, k)` and `down (in, k)` at the moment of the forward pass, or `(concepts, out, k)` and
`(concepts, in, k)`: then the batch consists of as many equal shares, in order, and each share has factors of its own."""
Gate = Callable[[str, torch.Tensor], torch.Tensor | None]
"""Gives, for a layer's key and what it reads, `(batch, n, k)`, how much each column counts, `(batch or 1, n or 1, k)`; None: all
fully."""


@dataclass
class Switch:
    """Turns attached deltas off and on without taking them off."""

    on: bool = True


@contextmanager
def hooked(
    layers: dict[str, Layer], factors: dict[str, Factors], switch: Switch | None = None, gate: Gate | None = None
) -> Iterator[None]:
    """While entered, layer `key` gives `W x + up (g * down^T x)`, `g` being 1 without a gate; no dense weight is formed."""
    switch = switch or Switch()

    def hook_for(key: str, factor: Factors) -> Callable[[nn.Module, tuple[torch.Tensor], torch.Tensor], torch.Tensor | None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
            if not switch.on:
                return None
            up, down = (tensor.to(output.dtype) for tensor in factor())
            counts = partial(gate, key) if gate else None
            if isinstance(module, nn.Conv2d):
                return add_low_rank_to_pixels(output, projected(module, inputs[0], down), up, counts)
            return add_low_rank(output, inputs[0], up, down, counts)

        return hook

    with ExitStack() as stack:
        for key, factor in factors.items():
            handle = layers[key].register_forward_hook(hook_for(key, factor))
            stack.callback(handle.remove)
        yield


@contextmanager
def folded(layers: dict[str, Layer], deltas: dict[str, LowRank]) -> Iterator[None]:
    """While entered, layer `key` has the weight `W + up down^T` in place of its own, which costs nothing in a forward pass."""
    own = {key: layers[key].weight.data for key in deltas}
    try:
        for key, delta in deltas.items():
            up, down = (factor.to(own[key].device, torch.float32) for factor in (delta.up, delta.down))
            whole = torch.addmm(own[key].flatten(1).float(), up, down.T)
            layers[key].weight.data = whole.view(own[key].shape).to(own[key].dtype)
        yield
    finally:
        for key, weight in own.items():
            layers[key].weight.data = weight


class ExtendedEmbedding(nn.Module):
    """A frozen embedding followed by the vectors of new tokens, each `(n, width)`; they may be in training.

    Those that are layer-wise, `(layers, n, width)`, count by their mean over the layers, but while `spread`.

    Attributes:
        first: the number of the first new token; a table may have more rows than its tokenizer has words.
        layers: for how many cross-attention layers there are vectors of their own, 1 where all are shared.
        spread: whether a batch holds every sample `layers` times, one after the other, each to be read for the next layer.
    """

    def __init__(self, frozen: nn.Embedding, first: int, vectors: list[torch.Tensor]):
        super().__init__()
        self.frozen, self.first = frozen, first
        self.vectors = vectors
        self.layers = max((len(own) for own in vectors if own.ndim == 3), default=1)
        self.spread = False

    @property
    def rows(self) -> torch.Tensor:
        """The vectors of all new tokens, `(new, width)`; while spread of every layer, `(layers * new, width)`."""
        known = [own.to(self.frozen.weight) for own in self.vectors]
        if self.spread:
            return torch.cat([own.expand(self.layers, -1, -1) for own in known], dim=1).flatten(0, 1)
        return torch.cat([self.frozen.weight[:0], *(own.mean(0) if own.ndim == 3 else own for own in known)])

    @property
    def weight(self) -> torch.Tensor:
        """The whole table `(old + new, width)`."""
        return torch.cat([self.frozen.weight[: self.first], self.rows])

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Look up `token_ids (batch, length)`."""
        is_new = token_ids >= self.first
        old = self.frozen(token_ids.where(~is_new, 0))
        if not self.vectors:
            return old
        rows, numbers = self.rows, (token_ids - self.first).clamp(min=0)
        if self.spread:
            layer = torch.arange(len(token_ids), device=token_ids.device) % self.layers
            numbers = numbers + (layer * (len(rows) // self.layers))[:, None]
        new = nn.functional.embedding(numbers, rows)
        return torch.where(is_new[..., None], new, old)


def check_new_tokens(base: Base, tokens: Collection[str]) -> None:
    """Raise `InputError` when one of `tokens` is a word that a tokenizer of the base already has."""
    for tokenizer in base.tokenizers.values():
        words = tokenizer.get_vocab()  # a new dictionary of all words
        for token in tokens:
            check_new_word(token, words)


@contextmanager
def with_tokens(base: Base, embeddings: dict[str, dict[str, torch.Tensor]]) -> Iterator[None]:
    """While entered, the base knows the tokens of `embeddings`, each with its vectors per text encoder.

    Args:
        embeddings: `(n, width)`, or with vectors for every cross-attention layer `(layers, n, width)`.

    Raises:
        AdapterError: the vectors belong to a base of another family.
        InputError: a token is a word already, or stands for two concepts.
    """
    check_new_tokens(base, embeddings)
    reading = cross_attention_layers(base.pipeline.unet)
    is_layerwise = False
    for token, vectors in embeddings.items():
        if vectors.keys() != base.text_encoders.keys():
            raise AdapterError(
                f"The token '{token}' has vectors for {', '.join(vectors)}, the base '{base.source}' has "
                f"{', '.join(base.text_encoders)}; the adapter belongs to a base of another family."
            )
        for own in vectors.values():
            is_layerwise |= own.ndim == 3
            if own.ndim == 3 and len(own) != len(reading):
                raise AdapterError(
                    f"The token '{token}' has vectors for {len(own)} cross-attention layers, the base '{base.source}' has "
                    f"{len(reading)}; the adapter belongs to a base of another family."
                )
    with ExitStack() as stack:
        if is_layerwise:
            stack.enter_context(each_reading_its_own(base.pipeline.unet))
        for part in base.text_encoders:
            stack.enter_context(_one_encoder_with_tokens(base, part, {token: own[part] for token, own in embeddings.items()}))
        yield


@contextmanager
def _one_encoder_with_tokens(base: Base, part: str, embeddings: dict[str, torch.Tensor]) -> Iterator[None]:
    tokenizer, holder = base.tokenizers[part], _embedding_holder(base.text_encoders[part])
    frozen = holder.token_embedding
    extended_tokenizer, new = copy.deepcopy(tokenizer), []
    for token, vectors in embeddings.items():
        if vectors.shape[-1] != frozen.embedding_dim:
            raise AdapterError(
                f"The embedding of '{token}' is {vectors.shape[-1]} wide, the base's text encoder {frozen.embedding_dim}; "
                "the adapter belongs to a base of another family."
            )
        words = token_words(token, vectors.shape[-2]).split()
        if extended_tokenizer.add_tokens(words) != len(words):
            raise InputError(f"Two concepts use the token '{token}'; train one of them again with another token.")
        new += extended_tokenizer.convert_tokens_to_ids(words)
    setattr(base.pipeline, tokenizer_name(part), extended_tokenizer)
    rows = [vectors.to(frozen.weight.device) for vectors in embeddings.values()]
    holder.token_embedding = ExtendedEmbedding(frozen, min(new, default=frozen.num_embeddings), rows)
    try:
        yield
    finally:
        setattr(base.pipeline, tokenizer_name(part), tokenizer)
        holder.token_embedding = frozen


@contextmanager
def layer_by_layer(base: Base) -> Iterator[int]:
    """Give how many cross-attention layers the tokens' vectors are for; while entered, text encoders read as many copies of each
    sample, one after the other, each with the vectors of the next layer."""
    tables = [_embedding_holder(encoder).token_embedding for encoder in base.text_encoders.values()]
    tables = [table for table in tables if isinstance(table, ExtendedEmbedding) and table.layers > 1]
    for table in tables:
        table.spread = True
    try:
        yield tables[0].layers if tables else 1
    finally:
        for table in tables:
            table.spread = False


def _embedding_holder(text_encoder: nn.Module) -> nn.Module:
    return next(module for module in text_encoder.modules() if isinstance(getattr(module, "token_embedding", None), nn.Module))


@contextmanager
def attached(base: Base, adapter: Adapter) -> Iterator[None]:
    """While entered, `base.pipeline` draws with `adapter`; afterwards the base is bit for bit what it was.

    Raises:
        AdapterError: the adapter belongs to another family or its layers do not fit.
    """
    check_fits_base(base, adapter)
    with with_tokens(base, adapter.embeddings), folded(adaptable_layers(base, None), adapter.deltas()):
        yield


def beside(base: Base, adapter: Adapter, *, switch: Switch | None = None) -> AbstractContextManager[None]:
    """While entered, the layers give what they give with `adapter`, whose changes stand beside them; its tokens stay unknown.

    Raises:
        AdapterError: the adapter belongs to another family or its layers do not fit.
    """
    check_fits_base(base, adapter)
    factors = {key: fixed(delta.up.to(base.device), delta.down.to(base.device)) for key, delta in adapter.deltas().items()}
    return hooked(adaptable_layers(base, None), factors, switch)


def check_fits_base(base: Base, adapter: Adapter) -> None:
    """Raise `AdapterError` when `adapter` does not fit `base`: another family or prediction, a missing layer, another shape."""
    if adapter.family != base.family:
        raise AdapterError(
            f"The adapter belongs to a base of family '{adapter.family}', '{base.source}' is of family '{base.family}'; "
            "use it with a base of its own family."
        )
    if adapter.fingerprint == base.fingerprint and "" != adapter.prediction_type != base.prediction_type:
        raise AdapterError(
            f"'{', '.join(adapter.tokens)}' was trained where this base predicts {adapter.prediction_type}, and '{base.source}' "
            f"is read as one that predicts {base.prediction_type}; give --prediction-type {adapter.prediction_type}."
        )
    layers = adaptable_layers(base, None)
    for concept in adapter.concepts:
        for key, part in concept.layers.items():
            if key not in layers:
                raise AdapterError(f"The base '{base.source}' has no layer '{key}' that '{concept.token}' was trained on.")
            shape = tuple(matrix_of(layers[key]).shape)
            if shape != part.shape:
                raise AdapterError(f"Layer '{key}' is {shape} in '{base.source}' but {part.shape} in '{concept.token}'.")


def fixed(up: torch.Tensor, down: torch.Tensor) -> Factors:
    """Return factors that stay as they are."""
    return lambda: (up, down)
