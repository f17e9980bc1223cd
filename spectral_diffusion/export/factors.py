"""An adapter's changes as the factors of a LoRA: all of one rank, exact, or compressed to a smaller rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.fit import GROUPS, layer_group
from spectral_diffusion.bases.layer_names import patch_side
from spectral_diffusion.errors import AdapterError, InputError
from spectral_diffusion.finite import is_finite
from spectral_diffusion.joining import LowRank

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""What the numbers in a file can be, by the names that users give."""


@dataclass(frozen=True, kw_only=True)
class LoraFactors:
    """Per layer key of a base of `family`, factors with `rank` columns; `errors` as in `Export`."""

    family: str
    layers: dict[str, LowRank]
    rank: int
    errors: dict[str, float]

    def matrices(self, key: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the up matrix `(out, rank)` and the down matrix `(rank, in)` of layer `key` in `dtype`.

        A convolution's are kernels, `(out, rank, 1, 1)` and `(rank, channels, side, side)`, as in LoCon.

        Raises:
            AdapterError: a number is too large for `dtype`.
        """
        up = in_precision(self.layers[key].up, dtype, key)
        down = in_precision(self.layers[key].down.T, dtype, key)
        side = patch_side(key, self.family)
        return (up, down) if side is None else (up[:, :, None, None], down.unflatten(1, (-1, side, side)))


def lora_factors(adapter: Adapter, rank: int | None = None) -> LoraFactors:
    """Return the factors of `adapter`'s changes.

    Args:
        rank: columns to compress to, by singular value decomposition; when missing the factors are exact, padded to the
            largest rank of any layer.

    Raises:
        InputError: `rank` is below 1 or above the adapter's own.
    """
    deltas = adapter.deltas()
    own = max(delta.rank for delta in deltas.values())
    if rank is None:
        return LoraFactors(family=adapter.family, layers=_of_one_rank(deltas, own), rank=own, errors={})
    if not 1 <= rank <= own:
        raise InputError(f"rank must be from 1 to {own}, the adapter's own, got {rank}; leave it out to export exactly.")
    compressed, values = {}, {}
    for key, delta in deltas.items():
        compressed[key], values[key] = delta.compressed(rank)
    layers = _of_one_rank(compressed, rank)
    return LoraFactors(family=adapter.family, layers=layers, rank=rank, errors=_relative_errors(values, rank))


def _of_one_rank(deltas: Mapping[str, LowRank], rank: int) -> dict[str, LowRank]:
    return {key: delta.padded(rank).balanced() for key, delta in deltas.items()}


def _relative_errors(values: Mapping[str, torch.Tensor], rank: int) -> dict[str, float]:
    """Return the relative Frobenius error per group of layers, from each layer's singular values."""
    lost: dict[str, float] = {}
    whole: dict[str, float] = {}
    for key, s in values.items():
        for group in (layer_group(key), "overall"):
            lost[group] = lost.get(group, 0.0) + float(s[rank:].square().sum())
            whole[group] = whole.get(group, 0.0) + float(s.square().sum())
    order = [group for group in (*GROUPS, "overall") if group in whole]
    return {group: (lost[group] / whole[group]) ** 0.5 if whole[group] else 0.0 for group in order}


def in_precision(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Return `tensor` in `dtype`, contiguous.

    Raises:
        AdapterError: a number of what is called `name` is too large for `dtype`.
    """
    converted = tensor.detach().to(dtype).contiguous()
    if not is_finite(converted):
        raise AdapterError(f"'{name}' holds numbers too large for {dtype}; lower the strengths.")
    return converted
