"""Regionally controllable sampling: cross-attention inside a region reads the region's prompt (Gu et al. 2023, Mix-of-Show,
arXiv 2305.18292, section 3.3).

Attention processors are put on for a while and always taken off; no weight is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from spectral_diffusion.bases.base import Base
from spectral_diffusion.bases.cross_attention import cross_attention_layers, own_states
from spectral_diffusion.generation.coverage import coverage, shares_at
from spectral_diffusion.generation.drawing import Drawing


@dataclass(kw_only=True)
class Layout:
    """Where the regions of one drawing lie, on whatever grid of positions a layer works.

    Attributes:
        shares: `(regions, height, width)` in latent positions, see `coverage.coverage`.
    """

    shares: torch.Tensor
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


def layout_of(base: Base, drawing: Drawing) -> Layout:
    """Return where the regions of `drawing` lie on `base`."""
    width, height = drawing.size or (base.resolution, base.resolution)
    factor = base.pipeline.vae_scale_factor
    return Layout(shares=shares_at(coverage(drawing.regions, width, height), height // factor, width // factor))


class _RegionalProcessor:
    """Cross-attention that reads each region's own text inside the region, the picture's elsewhere."""

    def __init__(self, original: Any, layout: Layout):
        self.original, self.layout = original, layout
        self.texts: Sequence[torch.Tensor] = ()

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


class RegionalTexts:
    """What cross-attention reads inside each region."""

    def __init__(self, processors: Sequence[tuple[nn.Module, _RegionalProcessor]]):
        self.processors = processors

    def read(self, texts: Sequence[torch.Tensor]) -> None:
        """Let `texts` be read from now on.

        Args:
            texts: per region the states of its negative and its prompt, `(2, length, width)`; `(1, length, width)` where only one
                half is drawn; `layers * width` wide where tokens have vectors for every layer.
        """
        for number, (module, processor) in enumerate(self.processors):
            processor.texts = [own_states(module, number, text) for text in texts]


@contextmanager
def regional_attention(unet: nn.Module, layout: Layout) -> Iterator[RegionalTexts]:
    """While entered, the cross-attention of `unet` reads, inside the regions of `layout`, what it is told to."""
    replaced = [(module, module.processor) for module in cross_attention_layers(unet).values()]
    processors = [(module, _RegionalProcessor(processor, layout)) for module, processor in replaced]
    try:
        for module, regional in processors:
            module.set_processor(regional)
        yield RegionalTexts(processors)
    finally:
        for module, processor in replaced:
            module.set_processor(processor)
