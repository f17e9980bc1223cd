"""What a concept's model feeds into each layer while it draws: the thin Gram factors that the aligned sum needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from spectral_diffusion.adapter import input_group
from spectral_diffusion.base import Base, adaptable_layers
from spectral_diffusion.conditioning import read
from spectral_diffusion.layer_matrix import Layer, matrix_of, rows_read

DRAWING_STEPS = 5
GUIDANCE = 4.0
COLUMNS = 48
"""Leading eigenvectors kept of each Gram matrix."""
DIRECTIONS = 4 * COLUMNS
"""Random directions that a Gram matrix is known by."""
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
def measure_activations(base: Base, token: str, layer_keys: tuple[str, ...], seed: int) -> dict[str, torch.Tensor]:
    """Return, per group of layers with one input, a factor `F (in, k)` with `F F^T` near the Gram matrix of that input.

    The base must have the concept's adapter and token attached. Each of `PROMPTS` is drawn with `token` in few steps;
    only the conditional half of each guidance pair counts. The Gram matrices are scaled to trace `in`.
    A token with vectors for every cross-attention layer is measured as the first of the adapted ones reads it.
    """
    layers = adaptable_layers(base, None)
    watched = {input_group(key): layers[key] for key in reversed(layer_keys)}
    grams = {group: _GramSketch(matrix_of(layer).shape[1]) for group, layer in watched.items()}
    captions = [prompt.format(token) for prompt in PROMPTS]
    texts = {group: layer for group, layer in watched.items() if group.startswith("text_encoder")}
    with _recorded(texts, grams):
        wanted = read(base, captions)
    encoded = wanted | read(base, [""] * len(captions), "negative_")
    generator, batch = torch.Generator().manual_seed(seed), base.pictures_at_once
    with _recorded({group: layer for group, layer in watched.items() if group not in texts}, grams, paired=True):
        for start in range(0, len(captions), batch):
            base.pipeline(
                **{name: values[start : start + batch] for name, values in encoded.items()},
                num_inference_steps=DRAWING_STEPS,
                guidance_scale=GUIDANCE,
                height=base.resolution,
                width=base.resolution,
                generator=generator,
                output_type="latent",
            )
    return {group: gram.thin_factor() for group, gram in grams.items()}


class _GramSketch:
    """A Gram matrix `G (in, in)` by what it makes of fixed random directions: a convolution's is too large to be held.

    Its leading eigenvectors come out by the stabilised Nyström approximation, as they are where there are as many directions as
    inputs (Tropp, Yurtsever, Udell & Cevher 2017, arXiv 1706.05736, algorithm 3).
    """

    def __init__(self, width: int):
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(width, min(width, DIRECTIONS), dtype=torch.float64, generator=generator)
        self.directions = torch.linalg.qr(directions).Q.float()
        self.image, self.trace = torch.zeros_like(self.directions), 0.0

    def add(self, rows: torch.Tensor) -> None:
        """Add the Gram matrix of `rows (n, in)`."""
        self.directions = self.directions.to(rows.device)
        self.image += (rows.T @ (rows @ self.directions)).cpu()
        self.trace += float(rows.square().sum())

    def thin_factor(self) -> torch.Tensor:
        """Return `F (in, COLUMNS at most)` with `F F^T` near `G`, scaled to trace `in`."""
        directions = self.directions.cpu().double()
        image = self.image.double() * (len(directions) / max(self.trace, 1e-12))
        shift = 1e-6 * image.norm().clamp(min=1e-12)  # what single precision has lost
        image = image + shift * directions
        inner = directions.T @ image
        values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        U, s, _ = torch.linalg.svd(image @ (vectors / values.clamp(min=shift / 2).sqrt()), full_matrices=False)
        return (U[:, :COLUMNS] * (s[:COLUMNS].square() - shift).clamp(min=0).sqrt()).float().contiguous()


@contextmanager
def _recorded(watched: dict[str, Layer], grams: dict[str, _GramSketch], *, paired: bool = False) -> Iterator[None]:
    """While entered, what the `watched` layers read is added to `grams`; of guidance pairs (`paired`) the conditional half."""
    with ExitStack() as stack:
        for group, layer in watched.items():
            stack.callback(layer.register_forward_pre_hook(_recorder(grams[group], paired)).remove)
        yield


def _recorder(gram: _GramSketch, paired: bool) -> Callable[[Layer, tuple[torch.Tensor, ...]], None]:
    def record(module: Layer, inputs: tuple[torch.Tensor, ...]) -> None:
        values = inputs[0]
        gram.add(rows_read(module, values[len(values) // 2 if paired else 0 :]).flatten(0, 1).float())

    return record
