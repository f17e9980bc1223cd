"""Adapters of random numbers, and whether two of them are the same."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from spectral_diffusion.adapters.adapter import Adapter, ConceptPart, LayerPart, input_group
from spectral_diffusion.bases.base import Base, adaptable_layers
from spectral_diffusion.bases.layer_matrix import matrix_of
from spectral_diffusion.bases.layer_names import ATTENTION_LAYERS
from spectral_diffusion.parametrisations import SPECTRAL
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.spectra.spectrum import Spectrum, base_spectrum

FORMS = sorted(SPECTRAL)


def random_adapter(
    base: Base,
    form: str = "additive",
    *,
    token: str = "<V1>",
    start: int = 0,
    rank: int = 2,
    size: float = 0.1,
    vectors: int = 1,
    measured: bool = False,
    seed: int = 0,
    endings: tuple[str, ...] = ATTENTION_LAYERS,
) -> Adapter:
    """Return an adapter of one concept on the layers of `endings` with trained tensors of `size` times normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    layers = adaptable_layers(base, endings)
    parts = {}
    for key, spectrum in base_spectrum(base, layers).items():
        band = band_of(spectrum, start, rank) if form in SPECTRAL else None
        zeros = SPECTRAL[form].initial(band) if band else zero_tensors(form, matrix_of(layers[key]), rank)
        tensors = {name: size * torch.randn(zero.shape, generator=generator) for name, zero in zeros.items()}
        parts[key] = LayerPart(band=band, tensors=tensors)
    linear = [key for key in parts if isinstance(layers[key], nn.Linear)]
    widths = {input_group(key): layers[key].in_features for key in linear}
    concept = ConceptPart(
        token=token,
        class_word="dog",
        band=Band(start=start, rank=rank) if form in SPECTRAL else None,
        parametrisation=form,
        embeddings={
            part: torch.randn(vectors, model.config.hidden_size, generator=generator)
            for part, model in base.text_encoders.items()
        },
        layers=parts,
        activations={group: torch.randn(width, 4, generator=generator) for group, width in widths.items()} if measured else {},
        settings={"steps": 3},
    )
    origin = {"family": base.family, "fingerprint": base.fingerprint, "prediction_type": base.prediction_type}
    return Adapter(**origin, concepts=(concept,), weights=(1.0,))


def zero_tensors(form: str, weight: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    """Return the tensors of a form without a band: a LoRA's or a dense change's."""
    if form == "dense":
        return {"matrix": torch.zeros(weight.shape)}
    return {"up": torch.zeros(len(weight), rank), "down": torch.zeros(weight.shape[1], rank)}


def band_of(spectrum: Spectrum, start: int, rank: int) -> Spectrum:
    columns = slice(start, start + rank)
    return Spectrum(U=spectrum.U[:, columns].contiguous(), s=spectrum.s[columns].clone(), V=spectrum.V[:, columns].contiguous())


Description = dict[str, Any]


def contents(adapter: Adapter) -> tuple[Description, list[torch.Tensor]]:
    """Return what `adapter` holds: everything but tensors, and the tensors in order."""
    tensors: list[torch.Tensor] = []

    def without_tensors(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            return tuple(value.shape)
        if isinstance(value, dict):
            return {key: without_tensors(value[key]) for key in sorted(value)}
        return [without_tensors(item) for item in value] if isinstance(value, tuple) else value

    return without_tensors(asdict(adapter)), tensors


def assert_same(one: Adapter, other: Adapter) -> None:
    assert contents(one)[0] == contents(other)[0]
    assert all(torch.equal(a, b) for a, b in zip(contents(one)[1], contents(other)[1], strict=True))


def assert_same_in_half_precision(loaded: Adapter, adapter: Adapter) -> None:
    assert contents(loaded)[0] == contents(adapter)[0]
    for stored, exact in zip(contents(loaded)[1], contents(adapter)[1], strict=True):
        # float16's rounding, and its smallest numbers
        torch.testing.assert_close(stored, exact, rtol=2**-11, atol=2**-25, check_dtype=False)
    for concept in loaded.concepts:
        assert {factor.dtype for factor in concept.activations.values()} == {torch.float16}
        assert {tensor.dtype for part in concept.layers.values() for tensor in part.tensors.values()} == {torch.float32}
