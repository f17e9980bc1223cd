"""Bases in half precision, as they are kept on a GPU: the same pictures but for rounding, in half the memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from narrow_bases import NarrowBase
from random_adapters import random_adapter
from shared_bases import shared_base
from short_trainings import BAND, SHORT, prepare_less

from spectral_diffusion.adapters.attach import attached
from spectral_diffusion.bases.base import Base, adaptable_layers, load_base
from spectral_diffusion.concepts.concept import Concept
from spectral_diffusion.generation.drawing import SCHEDULERS, Drawing, Picture
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.generation.regions import Region
from spectral_diffusion.training import train

REGIONS = (Region(prompt="<V1>", box=(0.0, 0.0, 0.5, 1.0)), Region(prompt="a cat", box=(0.5, 0.0, 1.0, 1.0)))


def apart(one: list[Picture], other: list[Picture]) -> float:
    """Return the mean difference of two lists of pictures in levels of 255."""
    first, second = (np.stack([np.asarray(picture.image, dtype=float) for picture in pictures]) for pictures in (one, other))
    return float(np.abs(first - second).mean())


@pytest.mark.parametrize(
    ("family", "precision"), [("sd1", torch.bfloat16), ("sd2", torch.float16), ("sdxl", torch.float16)], ids=str
)
def test_every_family_draws_the_same_in_half_precision(
    family: str, precision: torch.dtype, loaded_bases: dict[str, Base], narrow_bases: dict[str, NarrowBase]
) -> None:
    whole, half = loaded_bases[family], load_base(narrow_bases[family].folder, device="cpu", precision=precision)
    assert (half.pipeline.unet.dtype, half.pipeline.vae.dtype, half.fingerprint) == (precision, torch.float32, whole.fingerprint)
    adapter = random_adapter(whole, size=0.05, vectors=2)
    for regions in ((), REGIONS):
        drawing = Drawing(prompt="<V1> (near:1.3) a lake", steps=2, seed=4, count=2, regions=regions)
        ours, other = generate(half, drawing, adapter), generate(whole, drawing, adapter)
        assert apart(ours, other) < 2.5
        assert apart(other[:1], other[1:]) > 10


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_sampler_draws_in_half_precision(scheduler: str, half: Base) -> None:
    (picture,) = generate(half, Drawing(prompt="a dog", steps=3, scheduler=scheduler))
    assert np.asarray(picture.image).std() > 1


@pytest.fixture(scope="module")
def half(tiny_base_folder: Path) -> Base:
    return load_base(tiny_base_folder, device="cpu", precision=torch.float16)


def test_a_base_in_half_precision_is_bit_for_bit_what_it_was(half: Base) -> None:
    adapter, before = random_adapter(half, size=0.1), {key: layer.weight.clone() for key, layer in adaptable_layers(half).items()}
    with attached(half, adapter):
        assert any(not torch.equal(layer.weight, before[key]) for key, layer in adaptable_layers(half).items())
    assert all(torch.equal(layer.weight, before[key]) for key, layer in adaptable_layers(half).items())


def test_a_base_in_half_precision_is_trained(
    half: Base, tiny_base_folder: Path, concept: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_less(monkeypatch)
    trained, whole = (train(base, concept, BAND, SHORT).adapter for base in (half, shared_base("tiny", tiny_base_folder)))
    one, other = (adapter.deltas() for adapter in (trained, whole))
    cosines = [torch.cosine_similarity(one[key].dense().flatten(), other[key].dense().flatten(), dim=0) for key in one]
    assert torch.stack(cosines).median() > 0.9
