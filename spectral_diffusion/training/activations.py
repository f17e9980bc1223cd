"""What a concept's model feeds into each layer while it draws: the thin Gram factors that the aligned sum needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from spectral_diffusion.adapters.adapter import input_group
from spectral_diffusion.bases.base import Base, adaptable_layers
from spectral_diffusion.bases.layer_names import is_convolution
from spectral_diffusion.generation.latents import batches, draw_latents
from spectral_diffusion.prompts.conditioning import read
from spectral_diffusion.stages import counted

DRAWING_STEPS = 5
GUIDANCE = 4.0
COLUMNS = 48
"""Leading eigenvectors kept of each Gram matrix."""
PROMPTS = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "a painting of {}",
    "a close photo of {}",
    "{} near a lake",
    "{} in the snow",
    "{} on the beach",
    "{} in the city",
    "{} in the forest",
    "{} in a room",
    "{} at night",
    "{} in the desert",
    "{} in a garden",
    "{} on a street",
    "{} by the sea",
    "{} under a tree",
    "{} on a table",
    "{} in the mountains",
    "{} in the rain",
    "{} with a friend",
    "a photo of {} on grass",
    "a drawing of {} at home",
    "{} wearing a hat",
)
"""One short drawing each. The aligned sum is at its best where these lead, so they are many rather than drawn to the end."""


@torch.no_grad()
def measure_activations(
    base: Base, token: str, layer_keys: tuple[str, ...], seed: int, on: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """Return, per group of linear layers with one input, a factor `F (in, k)` with `F F^T` near the Gram matrix of that input.

    Convolutions read much the same patches whatever is drawn, so that nothing is gained by telling concepts apart by them.
    The base must have the concept's adapter and token attached. Each prompt (`on`, else `PROMPTS`) is drawn in a few steps;
    only the conditional half of each guidance pair counts. The Gram matrices are scaled to trace `in`.
    A token with vectors for every cross-attention layer is measured as the first of the adapted ones reads it.
    """
    layers = adaptable_layers(base, None)
    linear = [key for key in layer_keys if not is_convolution(key, base.family)]
    watched = {input_group(key): layers[key] for key in reversed(linear)}
    grams = {group: torch.zeros(layer.in_features, layer.in_features) for group, layer in watched.items()}
    captions = [prompt.format(token) for prompt in on or PROMPTS]
    texts = {group: layer for group, layer in watched.items() if group.startswith("text_encoder")}
    with _recorded(texts, grams):
        wanted = read(base, captions)
    encoded = wanted | read(base, [""] * len(captions), "negative_")
    generator = torch.Generator().manual_seed(seed)
    with _recorded({group: layer for group, layer in watched.items() if group not in texts}, grams, paired=True):
        for share in counted("activations", "batch", batches(base, len(captions))):
            read_at_once = {name: values[share] for name, values in encoded.items()}
            draw_latents(base, read_at_once, DRAWING_STEPS, GUIDANCE, generator=generator)
    return {group: _thin_factor(gram) for group, gram in grams.items()}


@contextmanager
def _recorded(watched: dict[str, nn.Linear], grams: dict[str, torch.Tensor], *, paired: bool = False) -> Iterator[None]:
    """While entered, what the `watched` layers read is added to `grams`; of guidance pairs (`paired`) the conditional half."""
    with ExitStack() as stack:
        for group, layer in watched.items():
            stack.callback(layer.register_forward_pre_hook(_recorder(grams, group, paired)).remove)
        yield


def _recorder(grams: dict[str, torch.Tensor], group: str, paired: bool) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        values = inputs[0]
        flat = values[len(values) // 2 if paired else 0 :].flatten(0, -2).float()
        grams[group] += (flat.T @ flat).cpu()

    return record


def _thin_factor(gram: torch.Tensor) -> torch.Tensor:
    gram = gram.double() * (len(gram) / gram.trace().clamp(min=1e-12))
    values, vectors = torch.linalg.eigh(gram)
    kept = min(COLUMNS, len(values))
    return (vectors[:, -kept:] * values[-kept:].clamp(min=0).sqrt()).float().contiguous()
