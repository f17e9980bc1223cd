"""Attention regularisation: where a photo has a mask, the picture's positions outside it should not look at the token.

Mix-of-Show (Gu et al. 2023, arXiv 2305.18292) holds the token's attention maps to the mask. Here the loss is the share of the
token's attention that lies outside, from 0 to 1 whatever the layer's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from spectral_diffusion.bases.cross_attention import cross_attention_layers


@dataclass
class CrossAttention:
    """What the queries and keys of a UNet's cross-attention give in a forward pass that is watched, by layer.

    Attributes:
        heads: number of heads of each layer.
        queries: `(batch, positions, width)`.
        keys: `(batch, words, width)`.
        watching: whether what they give is written down.
    """

    heads: dict[str, int] = field(default_factory=dict)
    queries: dict[str, torch.Tensor] = field(default_factory=dict)
    keys: dict[str, torch.Tensor] = field(default_factory=dict)
    watching: bool = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While entered, what the layers give is written down; afterwards it is forgotten, however the pass ended.

        A backward pass that computes activations again is not watched: nobody would ask for them, and they hold its graph.
        """
        self.watching = True
        try:
            yield
        finally:
            self.watching = False
            self.queries.clear()
            self.keys.clear()

    def outside(self, tokens: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Return per sample the share of the tokens' attention outside the mask, mean over heads and layers, `(batch)`.

        Args:
            tokens: `(batch, words)`, which words are the concept's; a sample without any counts 0.
            masks: `(batch, 1, h, w)` in [0, 1], 1 where the concept is.
        """
        return torch.stack([self._outside(name, tokens, masks) for name in self.queries]).mean(0)

    def _outside(self, name: str, tokens: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        query, key = (
            values.float().unflatten(-1, (self.heads[name], -1)).transpose(1, 2)
            for values in (self.queries[name], self.keys[name])
        )
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)  # (batch, heads, positions, words)
        looks = (weights * tokens[:, None, None]).sum(-1)
        beside = 1 - adaptive_avg_pool2d(masks, _grid(query.shape[2], *masks.shape[2:])).flatten(1)
        share = (looks * beside[:, None]).sum(-1) / looks.sum(-1).clamp(min=1e-6)
        return share.mean(1)


def _grid(positions: int, rows: int, columns: int) -> tuple[int, int]:
    """Return rows and columns of a level of the UNet: from level to level it halves its grid and rounds up."""
    while rows * columns > positions:
        rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
    return rows, columns


@contextmanager
def watched_attention(unet: nn.Module) -> Iterator[CrossAttention]:
    """While entered, the cross-attention of `unet` can be watched; enter it after adapters are attached, to see what they do."""
    seen = CrossAttention()

    def keep(place: dict[str, torch.Tensor], name: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def hook(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            if seen.watching:
                place[name] = output

        return hook

    with ExitStack() as stack:
        for name, module in cross_attention_layers(unet).items():
            seen.heads[name] = module.heads
            stack.callback(module.to_q.register_forward_hook(keep(seen.queries, name)).remove)
            stack.callback(module.to_k.register_forward_hook(keep(seen.keys, name)).remove)
        yield seen
