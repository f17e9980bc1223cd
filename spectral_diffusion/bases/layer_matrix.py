"""A layer as the matrix that a low-rank change is added to: a convolution is a linear layer over patches of pixels."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

Layer = nn.Linear | nn.Conv2d


def matrix_of(layer: Layer) -> torch.Tensor:
    """Return the weight of `layer` as `(out, in)`; for a convolution `in` counts channels, rows and columns of a patch."""
    return layer.weight.flatten(1)


def is_one_pixel_convolution(module: nn.Module) -> bool:
    """Tell whether `module` is a convolution that does the same as a linear layer at every pixel."""
    if not isinstance(module, nn.Conv2d) or module.groups != 1:
        return False
    return module.kernel_size == module.stride == (1, 1) and module.padding == (0, 0)


def is_told_by_fingerprint(layer: Layer) -> bool:
    """Tell whether a base's fingerprint says what `layer` holds: in finetunes so many of these differ that no more are needed."""
    return isinstance(layer, nn.Linear) or is_one_pixel_convolution(layer)


def projected(layer: nn.Conv2d, values: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return what a convolution reads projected on `down (in, k)`, as `(batch, k, height, width)`, without forming patches.

    Args:
        down: or `(concepts, in, k)` for as many equal shares of the batch.
    """
    concepts = len(down) if down.dim() == 3 else 1
    kernels = down.mT.reshape(-1, layer.in_channels, *layer.kernel_size)
    shares = values.unflatten(0, (concepts, -1)).transpose(0, 1).flatten(1, 2)
    read = functional.conv2d(shares, kernels, None, layer.stride, layer.padding, groups=concepts)
    return read.unflatten(1, (concepts, -1)).transpose(0, 1).flatten(0, 1)
