"""What a concept's model feeds into each layer while it draws: the thin Gram factors that the aligned sum needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from spectral_diffusion.adapter import input_group
from spectral_diffusion.base import Base, linear_layers
from spectral_diffusion.conditioning import prompts

DRAWINGS = 8
DRAWING_STEPS = 8
GUIDANCE = 4.0
COLUMNS = 48
"""Leading eigenvectors kept of each Gram matrix."""
PROMPTS = ("{}", "a photo of {}", "{} near a lake", "{} in the snow", "{} in the city", "{} in a room")


@torch.no_grad()
def measure_activations(base: Base, token: str, layer_keys: tuple[str, ...], seed: int) -> dict[str, torch.Tensor]:
    """Return, per group of layers with one input, a factor `F (in, k)` with `F F^T` near the Gram matrix of that input.

    The base must have the concept's adapter and token attached. `DRAWINGS` short drawings of prompts with `token` are
    made; only the conditional half of each guidance pair counts. The Gram matrices are scaled to trace `in`.
    """
    layers = linear_layers(base, None)
    watched = {input_group(key): layers[key] for key in reversed(layer_keys)}
    grams = {group: torch.zeros(layer.in_features, layer.in_features) for group, layer in watched.items()}
    captions = [PROMPTS[number % len(PROMPTS)].format(token) for number in range(DRAWINGS)]
    texts = {group: layer for group, layer in watched.items() if group.startswith("text_encoder")}
    with _recorded(texts, grams):
        encoded = prompts(base, captions)
    with _recorded({group: layer for group, layer in watched.items() if group not in texts}, grams):
        base.pipeline(
            **encoded,
            num_inference_steps=DRAWING_STEPS,
            guidance_scale=GUIDANCE,
            height=base.resolution,
            width=base.resolution,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        )
    return {group: _thin_factor(gram) for group, gram in grams.items()}


@contextmanager
def _recorded(watched: dict[str, nn.Linear], grams: dict[str, torch.Tensor]) -> Iterator[None]:
    """While entered, what the `watched` layers read is added to `grams`."""
    with ExitStack() as stack:
        for group, layer in watched.items():
            stack.callback(layer.register_forward_pre_hook(_recorder(grams, group)).remove)
        yield


def _recorder(grams: dict[str, torch.Tensor], group: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        flat = inputs[0][-DRAWINGS:].flatten(0, -2).float()  # of a guidance pair, the second half has the prompts
        grams[group] += (flat.T @ flat).cpu()

    return record


def _thin_factor(gram: torch.Tensor) -> torch.Tensor:
    gram = gram.double() * (len(gram) / gram.trace().clamp(min=1e-12))
    values, vectors = torch.linalg.eigh(gram)
    kept = min(COLUMNS, len(values))
    return (vectors[:, -kept:] * values[-kept:].clamp(min=0).sqrt()).float().contiguous()
