"""The layers of a UNet that read the prompt, and text states in which each of them reads its own.

A token may stand for other vectors in every cross-attention layer (Voynov et al. 2023, P+, arXiv 2303.09522; ED-LoRA of Gu et al.
2023, arXiv 2305.18292, section 3.2). The states of all layers then stand side by side, `(batch, length, layers * width)`, which
pipelines pass on as they are, and every layer takes its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


def cross_attention_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """Return the cross-attention layers of `unet` by name, in the order in which layer-wise vectors are counted."""
    return dict(sorted((name, module) for name, module in unet.named_modules() if name.endswith(".attn2")))


def side_by_side(states: torch.Tensor, layers: int) -> torch.Tensor:
    """Return `states (n * layers, length, width)`, a sample's layers one after the other, as `(n, length, layers * width)`."""
    return states.unflatten(0, (-1, layers)).transpose(1, 2).flatten(2)


def own_states(layer: nn.Module, number: int, states: torch.Tensor) -> torch.Tensor:
    """Return what cross-attention `layer`, the one with this `number`, reads of `states`; all of it where they are shared."""
    width = layer.to_k.in_features
    return states if states.shape[-1] == width else states[..., number * width : (number + 1) * width]


@contextmanager
def each_reading_its_own(unet: nn.Module) -> Iterator[None]:
    """While entered, every cross-attention layer of `unet` takes its share of states that stand side by side."""

    def taker(number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
        def take(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return inputs, named | {"encoder_hidden_states": own_states(layer, number, named["encoder_hidden_states"])}

        return take

    with ExitStack() as stack:
        for number, layer in enumerate(cross_attention_layers(unet).values()):
            stack.callback(layer.register_forward_pre_hook(taker(number), with_kwargs=True).remove)
        yield
