"""The band map against dense linear algebra."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_adapters import random_adapter

from spectral_diffusion.adapters.adapter import input_group
from spectral_diffusion.adapters.band_map import band_map, layer_group
from spectral_diffusion.bases.base import Base
from spectral_diffusion.export import export_kohya
from spectral_diffusion.imports import import_lora


def test_energies_and_cross_talk_are_those_of_the_dense_changes(tiny_base: Base) -> None:
    one = random_adapter(tiny_base, measured=True)
    other = random_adapter(tiny_base, token="<V2>", start=2, measured=True, seed=1).scaled(0.5)
    result = band_map([one, other])
    parts = [one.concepts[0], other.concepts[0]]
    for row in result.rows:
        for share, part, strength in zip(row.shares, parts, (1, 0.5), strict=True):
            keys = [key for key in part.layers if layer_group(key) == row.group]
            dense = torch.cat([part.delta(key).dense().flatten() for key in keys])
            assert share.energy == pytest.approx(strength * float(dense.norm()), rel=1e-4)
            assert (share.start, share.stop) == (part.band.start, part.band.stop)
    answers = [
        torch.cat([(part.delta(key).dense() @ parts[0].activations[input_group(key)]).flatten() for key in parts[0].layers])
        for part in parts
    ]
    expected = 0.5 * float(answers[1].norm() / answers[0].norm())
    assert result.cross_talk[0] == pytest.approx((1, expected), rel=1e-4)


def test_cross_talk_is_told_by_the_linear_layers_where_convolutions_are_adapted_too(tiny_base: Base) -> None:
    def answers(*endings: str) -> tuple[tuple[float | None, ...], ...]:
        first = random_adapter(tiny_base, measured=True, endings=endings)
        return band_map([first, random_adapter(tiny_base, token="<V2>", start=2, measured=True, endings=endings)]).cross_talk

    assert answers("attn2.to_q", "conv1")[0][0] == pytest.approx(1)
    assert answers("conv1") == ((None, None), (None, None))


def test_overlapping_bands_are_conflicts(tiny_base: Base) -> None:
    adapters = [random_adapter(tiny_base), random_adapter(tiny_base, token="<V2>", start=1)]
    assert band_map(adapters).conflicts == (("<V1>", "<V2>"),)
    apart = [random_adapter(tiny_base), random_adapter(tiny_base, token="<V2>", start=2)]
    assert band_map(apart).conflicts == ()
    assert band_map(apart).cross_talk == ((None, None), (None, None))


def test_an_imported_lora_owns_no_directions(tiny_base: Base, tmp_path: Path) -> None:
    export_kohya(random_adapter(tiny_base), tmp_path / "lora.safetensors", dtype=torch.float32)
    imported = import_lora(tmp_path / "lora.safetensors", token="<V1>", class_word="dog")
    result, trained = (
        band_map([adapter, random_adapter(tiny_base, token="<V2>")]) for adapter in (imported, random_adapter(tiny_base))
    )
    assert result.conflicts == () and trained.conflicts == (("<V1>", "<V2>"),)
    for row, expected in zip(result.rows, trained.rows, strict=True):
        assert (row.directions, row.shares[0].start, row.shares[0].stop) == (expected.directions, None, None)
        assert row.shares[0].energy == pytest.approx(expected.shares[0].energy, rel=1e-4)
