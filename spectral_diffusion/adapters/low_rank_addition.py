"""A layer's low-rank change added to what the layer gives, and the way back, which keeps as little as can be between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Counts = Callable[[torch.Tensor], torch.Tensor | None]
"""Gives, for what a layer reads `(batch, n, k)`, how much each column counts, `(batch or 1, n or 1, k)`; None: all fully."""


class _LowRankAddition(torch.autograd.Function):
    """Autograd alone would keep `down^T x` for every layer besides `x`, and write each sum to a new place."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        values: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        counts: Counts | None,
    ) -> torch.Tensor:
        read = _rows(values, down) @ down
        ctx.mask = counts(read.view(len(values), -1, read.shape[-1])) if counts else None
        read = _masked(read, ctx.mask, len(values))
        rows = _rows(output, up)
        (rows.addmm_ if up.dim() == 2 else rows.baddbmm_)(read, up.mT)
        ctx.save_for_backward(values if down.requires_grad else read, up, down)  # `x` is kept anyway to move `down`
        ctx.shape = values.shape
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, up, down = ctx.saved_tensors
        _, to_values, to_up, to_down, _ = ctx.needs_input_grad
        rows = _rows(gradient, up)
        back = _masked(rows @ up, ctx.mask, len(gradient)) if to_values or to_down else None
        read_from = _rows(kept, down) if to_down else None
        read = kept if read_from is None else _masked(read_from @ down, ctx.mask, len(gradient))
        return (
            gradient,
            (back @ down.mT).view(ctx.shape) if to_values else None,
            rows.mT @ read if to_up else None,
            read_from.mT @ back if to_down else None,
            None,
        )


def add_low_rank(
    output: torch.Tensor, values: torch.Tensor, up: torch.Tensor, down: torch.Tensor, counts: Counts | None = None
) -> torch.Tensor:
    """Return `output + up (g * down^T values)`, `g` being 1 without `counts`; written into `output` where that is in one piece.

    Args:
        output: `(batch, ..., out)`, of which nothing else needs the old numbers.
        values: `(batch, ..., in)`.
        up, down: `(out, k)` and `(in, k)`, or `(concepts, out, k)` and `(concepts, in, k)` for as many equal shares of the batch.
    """
    return _LowRankAddition.apply(output.contiguous(), values, up, down, counts)


def add_low_rank_to_pixels(
    output: torch.Tensor, read: torch.Tensor, up: torch.Tensor, counts: Counts | None = None
) -> torch.Tensor:
    """Return `output + up (g * read)` at every pixel, `g` being 1 without `counts`.

    Args:
        output: `(batch, out, height, width)`.
        read: what the layer reads, projected, `(batch, k, height, width)`.
        up: `(out, k)`, or `(concepts, out, k)` for as many equal shares of the batch.
    """
    columns = read.flatten(2)
    mask = counts(columns.mT) if counts else None
    columns = columns if mask is None else columns * mask.mT
    if up.dim() == 3:
        up = up.repeat_interleave(len(columns) // len(up), 0)
    return output + (up @ columns).view_as(output)


def _rows(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return `values (batch, ..., width)` as `(rows, width)`, or for factors of several concepts as `(concepts, rows, width)`."""
    return values.reshape(*factor.shape[:-2], -1, values.shape[-1])


def _masked(read: torch.Tensor, mask: torch.Tensor | None, batch: int) -> torch.Tensor:
    """Return `read`, rows of a batch of so many samples, times `mask (batch or 1, n or 1, k)`."""
    return read if mask is None else (read.view(batch, -1, read.shape[-1]) * mask).view_as(read)
