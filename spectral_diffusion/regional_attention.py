"""Regionally controllable sampling: cross-attention inside a region reads the region's prompt (Gu et al. 2023, Mix-of-Show,
arXiv 2305.18292, section 3.3), and a concept's change acts inside its own region only.

Attention processors and hooks are put on for a while and always taken off; no weight is written.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from spectral_diffusion.adapter import Adapter
from spectral_diffusion.attach import Gate
from spectral_diffusion.coverage import shares_at
from spectral_diffusion.cross_attention import cross_attention_layers, own_states


@dataclass(kw_only=True)
class Layout:
    """Where the regions of one drawing lie, on whatever grid of positions a layer works.

    Attributes:
        shares: `(regions, height, width)` in latent positions, see `coverage.coverage`.
        current: the region whose prompt is being read, or None while the whole picture is.
    """

    shares: torch.Tensor
    current: int | None = None
    _grids: dict[int, torch.Tensor] = field(default_factory=dict)

    def at(self, positions: int) -> torch.Tensor | None:
        """Return the shares `(regions, rows, columns)` on the grid of `positions`, None if no grid has so many.

        A UNet halves its grid from level to level and rounds up.
        """
        if positions not in self._grids:
            rows, columns = self.shares.shape[1:]
            while rows * columns > positions and rows * columns > 1:
                rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
            if rows * columns != positions:
                return None
            self._grids[positions] = shares_at(self.shares, rows, columns)
        return self._grids[positions]

    @contextmanager
    def reading(self, region: int) -> Iterator[None]:
        """While entered, the prompt of `region` is being read."""
        before, self.current = self.current, region
        try:
            yield
        finally:
            self.current = before


def confining_gate(adapter: Adapter, layout: Layout, places: Mapping[str, tuple[int, ...]]) -> Gate:
    """Return the gate that lets each concept act in its own regions only.

    While a region's prompt is read only the concepts placed there count. While the whole picture is, a concept changes what
    a layer makes of a position as far as the position belongs to its regions, and no words.

    Args:
        places: token to the numbers of its regions; a concept without a place acts everywhere.
    """

    @functools.cache
    def columns(key: str) -> tuple[tuple[tuple[int, ...] | None, int], ...]:
        having = [concept for concept in adapter.concepts if key in concept.layers]
        return tuple((places.get(concept.token), concept.delta(key).rank) for concept in having)

    @functools.cache
    def counts(
        concepts: tuple[tuple[tuple[int, ...] | None, int], ...],
        positions: int | None,
        current: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        shares = None if positions is None or current is not None else layout.at(positions)
        parts = []
        for place, rank in concepts:
            if place is None or current in place:
                part = torch.ones(1)
            elif shares is None:
                part = torch.zeros(1)
            else:
                part = shares[list(place)].sum(0).flatten()
            parts.append(part[:, None].expand(-1, rank))
        longest = max(len(part) for part in parts)
        return torch.cat([part.expand(longest, -1) for part in parts], dim=1)[None].to(device, dtype)

    def gate(key: str, read: torch.Tensor) -> torch.Tensor:
        positions = read.shape[1] if _has_positions(key) else None
        return counts(columns(key), positions, layout.current, read.dtype, read.device)

    return gate


def _has_positions(key: str) -> bool:
    """Tell whether a layer reads positions of the picture; the others read words or the time."""
    in_picture = (".attentions." in key or ".resnets." in key or "samplers." in key) and ".time_emb_proj" not in key
    return in_picture and ".attn2.to_k" not in key and ".attn2.to_v" not in key


class _RegionalProcessor:
    """Cross-attention that reads each region's own text inside the region, the picture's elsewhere."""

    def __init__(self, original: Any, layout: Layout, texts: Sequence[torch.Tensor]):
        self.original, self.layout, self.texts = original, layout, texts

    def __call__(
        self,
        attention: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        *arguments: Any,
        **options: Any,
    ) -> torch.Tensor:
        """Attend from `hidden_states (batch, positions, width)`."""
        planned = self.layout.at(hidden_states.shape[1])
        if planned is None:
            return self.original(attention, hidden_states, encoder_hidden_states, *arguments, **options)
        shares, grid = planned.to(hidden_states), tuple(planned.shape[1:])
        positions = hidden_states.unflatten(1, grid)
        if _covers_all(planned):  # then the picture's own prompt is read nowhere
            result = torch.zeros_like(positions)
        else:
            context = self.original(attention, hidden_states, encoder_hidden_states, *arguments, **options)
            result = context.unflatten(1, grid) * (1 - shares.sum(0))[..., None]
        for region, text in enumerate(self.texts):
            window = _window(planned[region])  # on the CPU: asking a GPU would wait for it in every layer
            if window is None:
                continue
            inside = positions[:, *window]
            with self.layout.reading(region):
                drawn = self.original(attention, inside.flatten(1, 2), _for_batch(text, len(inside)), *arguments, **options)
            result[:, *window] += drawn.unflatten(1, inside.shape[1:3]) * shares[region][window][..., None]
        return result.flatten(1, 2)


def _covers_all(shares: torch.Tensor) -> bool:
    return bool(shares.sum(0).min() > 1 - 1e-4)


def _window(share: torch.Tensor) -> tuple[slice, slice] | None:
    """Return the rows and columns outside which `share` is zero; None when all of it is."""
    rows, columns = share.any(1).nonzero().flatten(), share.any(0).nonzero().flatten()
    if not len(rows):
        return None
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _for_batch(text: torch.Tensor, batch: int) -> torch.Tensor:
    """Return the states of a negative and a positive prompt `(2, length, width)`, or of the positive only, for a batch.

    With guidance the pipeline puts the negative half of a batch before the positive half.
    """
    return text.repeat_interleave(batch // len(text), dim=0)


@contextmanager
def regional_attention(unet: nn.Module, layout: Layout, texts: Sequence[torch.Tensor]) -> Iterator[None]:
    """While entered, the cross-attention of `unet` reads `texts` inside the regions of `layout`.

    Args:
        texts: per region the states of its negative and its prompt, `(2, length, width)`; `(1, length, width)` without guidance;
            `layers * width` wide where tokens have vectors for every layer.
    """
    replaced = [(module, module.processor) for module in cross_attention_layers(unet).values()]
    try:
        for number, (module, processor) in enumerate(replaced):
            own = [own_states(module, number, text) for text in texts]
            module.set_processor(_RegionalProcessor(processor, layout, own))
        yield
    finally:
        for module, processor in replaced:
            module.set_processor(processor)
