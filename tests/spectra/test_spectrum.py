"""The spectrum of the base: exact, computed once per content, and never a reason to fail."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spectral_diffusion.bases.base import Base, adaptable_layers, load_base
from spectral_diffusion.bases.layer_matrix import Layer, matrix_of
from spectral_diffusion.spectra.spectrum import Spectrum, base_spectrum, singular_directions, spectra


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The weights whose spectrum was computed and not read."""
    weights: list[torch.Tensor] = []

    def compute(weight: torch.Tensor) -> Spectrum:
        weights.append(weight)
        return singular_directions(weight)

    monkeypatch.setattr("spectral_diffusion.spectra.spectrum.singular_directions", compute)
    return weights


def some_layers(base: Base, count: int = 3) -> dict[str, nn.Linear]:
    return dict(list(adaptable_layers(base).items())[:count])


def assert_spectra(spectra: dict[str, Spectrum], layers: dict[str, Layer]) -> None:
    """The directions are those of the layers' weights: orthonormal, `W V = U diag(s)`, `s` falling."""
    assert spectra.keys() == layers.keys()
    for key, spectrum in spectra.items():
        identity = torch.eye(len(spectrum.s))
        # float32 products of a few dozen terms of size 1
        for factor in (spectrum.U, spectrum.V):
            torch.testing.assert_close(factor.T @ factor, identity, rtol=0, atol=1e-5)
        torch.testing.assert_close(matrix_of(layers[key]) @ spectrum.V, spectrum.U * spectrum.s, rtol=0, atol=1e-5)
        assert (spectrum.s.diff() <= 0).all() and (spectrum.s >= 0).all()


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_the_leading_directions_are_the_strongest(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    spectrum = singular_directions(weight, 3)
    assert (spectrum.U.shape, spectrum.s.shape, spectrum.V.shape) == ((shape[0], 3), (3,), (shape[1], 3))
    rest = weight - spectrum.U * spectrum.s @ spectrum.V.T
    strongest = torch.linalg.matrix_norm(weight.double(), ord=2), torch.linalg.matrix_norm(rest.double(), ord=2)
    fourth = torch.linalg.svdvals(weight.double())[3]
    torch.testing.assert_close(torch.stack(strongest), torch.stack([spectrum.s[0].double(), fourth]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(640, 700), (700, 640)])
@pytest.mark.parametrize("power", [0.0, -0.5, -0.8, -2.0])
def test_less_than_half_of_the_directions_are_as_exact_as_from_all(shape: tuple[int, int], power: float) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))  # of close values the directions are the hardest
    if power:
        U, _, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        weight = (U * torch.arange(1, 641) ** power @ Vh).float()
    count, whole = 64, torch.linalg.svd(weight.double(), full_matrices=False)
    found = singular_directions(weight, count)
    U, s, V = (tensor.double() for tensor in (found.U, found.s, found.V))
    exact = {"rtol": 0, "atol": 2e-6 * s[0].item()}
    torch.testing.assert_close(s, whole.S[:count], **exact)
    for factor in (U, V):
        torch.testing.assert_close(factor.T @ factor, torch.eye(count).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(weight.double() @ V, U * s, **exact)
    torch.testing.assert_close(weight.double().T @ U, V * s, **exact)
    again = singular_directions(weight, count)
    assert torch.equal(found.U, again.U) and torch.equal(found.V, again.V)


def test_a_cache_of_fewer_directions_is_not_taken_for_whole(
    tiny_base: Base, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = {"unet.large": nn.Linear(80, 77), "unet.small": nn.Linear(60, 10)}
    monkeypatch.setattr("spectral_diffusion.spectra.spectrum.MAX_DIRECTIONS", 16)
    monkeypatch.setattr("spectral_diffusion.spectra.spectrum.singular_directions", partial(singular_directions, count=16))
    first = base_spectrum(tiny_base, layers)
    assert {key: len(spectrum.s) for key, spectrum in first.items()} == {"unet.large": 16, "unet.small": 10}
    monkeypatch.undo()
    monkeypatch.setenv("SPECTRAL_DIFFUSION_CACHE", str(cache))
    whole = base_spectrum(tiny_base, layers)
    assert len(whole["unet.large"].s) == 77
    assert torch.equal(whole["unet.small"].U, first["unet.small"].U)


def test_the_spectrum_is_computed_once_per_content_wherever_the_base_lies(
    tiny_base: Base, tiny_base_folder: Path, tmp_path: Path, cache: Path, computed: list[torch.Tensor]
) -> None:
    layers = some_layers(tiny_base)
    assert_spectra(base_spectrum(tiny_base, layers), layers)
    assert len(computed) == 3
    moved = load_base(shutil.copytree(tiny_base_folder, tmp_path / "moved"), device="cpu")
    assert_spectra(base_spectrum(moved, some_layers(moved)), layers)
    assert len(computed) == 3


def test_another_content_has_another_fingerprint(tiny_base: Base, tiny_base_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base_folder, tmp_path / "changed")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("attn2.to_k.weight"))
    weights[name][0, 0] += 0.1
    save_file(weights, file, {"format": "pt"})
    assert load_base(folder, device="cpu").fingerprint != tiny_base.fingerprint


def test_convolutions_of_another_content_have_a_spectrum_of_their_own(
    tiny_base: Base, tiny_base_folder: Path, tmp_path: Path, cache: Path, computed: list[torch.Tensor]
) -> None:
    base_spectrum(tiny_base, adaptable_layers(tiny_base, ("conv1",)))
    folder = shutil.copytree(tiny_base_folder, tmp_path / "changed")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("conv1.weight"))
    weights[name] = weights[name].flip(0, 1).contiguous()
    save_file(weights, file, {"format": "pt"})
    changed = load_base(folder, device="cpu")
    for base in (changed, tiny_base):
        layers = adaptable_layers(base, ("conv1",))
        assert_spectra(base_spectrum(base, layers), layers)
        assert len(computed) == len(layers) + 1


def test_only_layers_that_are_not_cached_are_computed(tiny_base: Base, cache: Path, computed: list[torch.Tensor]) -> None:
    base_spectrum(tiny_base, some_layers(tiny_base, 2))
    layers = some_layers(tiny_base, 5)
    assert_spectra(base_spectrum(tiny_base, layers), layers)
    assert len(computed) == 5


def test_nothing_read_from_the_cache_is_mapped_from_its_file(tiny_base: Base, cache: Path) -> None:
    layers = some_layers(tiny_base)
    base_spectrum(tiny_base, layers)
    again = base_spectrum(tiny_base, layers)
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(bytes(file.stat().st_size))  # a mapped tensor would show the zeros
    assert_spectra(again, layers)


@pytest.mark.parametrize("kept_bytes", [0, 5, 3000])
def test_a_damaged_cache_is_said_and_mended(
    kept_bytes: int, tiny_base: Base, cache: Path, computed: list[torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    layers = some_layers(tiny_base)
    base_spectrum(tiny_base, layers)
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:kept_bytes])
    assert_spectra(base_spectrum(tiny_base, layers), layers)
    assert "is damaged; it is computed again" in caplog.text
    base_spectrum(tiny_base, layers)
    assert len(computed) == 6


def test_a_cache_that_cannot_be_written_is_a_warning(tiny_base: Base, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file where the folder should be")
    layers = some_layers(tiny_base)
    with caplog.at_level(logging.WARNING):
        assert_spectra(base_spectrum(tiny_base, layers), layers)
    assert "could not be kept" in caplog.text


@pytest.fixture
def forked() -> Iterator[list[multiprocessing.Process]]:
    """Processes that are ended with the test."""
    processes: list[multiprocessing.Process] = []
    yield processes
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that share the loaded base need fork")
def test_of_two_processes_at_once_one_computes_and_one_waits(
    tiny_base: Base,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forked: list[multiprocessing.Process],
) -> None:
    log = tmp_path / "computed"

    def compute_slowly(weight: torch.Tensor) -> Spectrum:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.1)
        count = min(weight.shape)
        return Spectrum(U=torch.ones(2, count), s=torch.ones(count), V=torch.ones(2, count))

    monkeypatch.setattr("spectral_diffusion.spectra.spectrum.singular_directions", compute_slowly)
    layers, context = some_layers(tiny_base), multiprocessing.get_context("fork")
    forked += [context.Process(target=base_spectrum, args=(tiny_base, layers)) for _ in range(2)]
    for process in forked:
        process.start()
    for process in forked:
        process.join(30)
    assert [process.exitcode for process in forked] == [0, 0]
    pids = log.read_text().split()
    assert len(pids) == 3 and len(set(pids)) == 1


def test_layers_side_by_side_come_in_order_and_leave_the_threads_as_they_were() -> None:
    weights = [torch.randn(12 + number, 9, generator=torch.Generator().manual_seed(number)) for number in range(7)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for weight, found in zip(weights, spectra(weights), strict=True):
            torch.testing.assert_close(found.U * found.s @ found.V.T, weight)
        assert torch.get_num_threads() == _threads_of_another() == 3
    finally:
        torch.set_num_threads(before)


def test_away_from_the_cpu_one_layer_is_decomposed_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.empty(4, 3, device="meta") for _ in range(6)]
    places: set[int] = set()

    def compute(weight: torch.Tensor) -> Spectrum:
        time.sleep(0.01)
        places.add(threading.get_ident())
        return Spectrum(U=weight, s=weight[0], V=weight)

    monkeypatch.setattr("spectral_diffusion.spectra.spectrum.singular_directions", compute)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert len(list(spectra(weights))) == 6 and len(places) == 1


def _threads_of_another() -> int:
    """Return how many threads torch computes with in a thread that is begun now."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()
