"""The spectrum of the base's layers: thin singular value decompositions, computed once and kept on disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spectral_diffusion.errors import StorageError
from spectral_diffusion.files import write_atomically
from spectral_diffusion.layer_matrix import Layer, matrix_of
from spectral_diffusion.stages import counted

if TYPE_CHECKING:
    from spectral_diffusion.base import Base

logger = logging.getLogger(__name__)

MAX_DIRECTIONS = 256
"""Leading singular directions kept per layer: 32 bands of rank 8."""
LEADING = 64
"""So many, eight bands of rank 8, are found without the others where no more are asked for."""
_LARGE = 12 * LEADING  # smaller layers are decomposed whole about as fast
_MOST_ROUNDS = 16
_SETTLED = 3e-4  # a value that moves by less in a round is within 1e-3 of where it goes


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Leading singular directions of one layer: `U (out, k)`, `s (k)` falling, `V (in, k)`, all float32."""

    U: torch.Tensor
    s: torch.Tensor
    V: torch.Tensor


def cache_folder() -> Path:
    """Where things that can be computed again are kept: `SPECTRAL_DIFFUSION_CACHE`, else `~/.cache/spectral-diffusion`."""
    return Path(os.environ.get("SPECTRAL_DIFFUSION_CACHE", Path.home() / ".cache" / "spectral-diffusion"))


def directions_of(layers: Mapping[str, Layer]) -> int:
    """Return how many singular directions the smallest of `layers` has, `MAX_DIRECTIONS` at most."""
    return min([MAX_DIRECTIONS, *(min(matrix_of(layer).shape) for layer in layers.values())])


def singular_directions(weight: torch.Tensor, count: int = MAX_DIRECTIONS) -> Spectrum:
    """Return the `count` leading singular directions of `weight (out, in)`, exactly, from a full thin SVD."""
    U, s, Vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    count = min(count, len(s))
    return Spectrum(U=U[:, :count].contiguous(), s=s[:count].contiguous(), V=Vh[:count].T.contiguous())


def leading_directions(weight: torch.Tensor, count: int = LEADING) -> Spectrum:
    """Return the `count` leading singular directions of `weight (out, in)`, the values within 1e-3 of what they are.

    By subspace iteration with twice as many columns (Halko, Martinsson & Tropp 2011, SIAM Review 53, algorithm 4.4), from the
    same start every time. The directions are orthonormal however far the iteration has come.
    """
    matrix = weight.detach().float()
    if matrix.shape[0] > matrix.shape[1]:
        turned = leading_directions(matrix.T, count)
        return Spectrum(U=turned.V, s=turned.s, V=turned.U)
    start = torch.randn(matrix.shape[1], 2 * count, generator=torch.Generator().manual_seed(0))
    basis, values = torch.linalg.qr(matrix @ start.to(matrix)).Q, torch.zeros(count)
    for _ in range(_MOST_ROUNDS):
        basis, triangle = torch.linalg.qr(matrix @ (matrix.T @ basis))
        before, values = values, torch.linalg.svdvals(triangle.cpu())[:count].sqrt()
        if ((values - before).abs() <= _SETTLED * values).all():
            break
    inside = singular_directions(basis.T @ matrix, count)
    return Spectrum(U=basis @ inside.U, s=inside.s, V=inside.V)


def spectra(weights: Sequence[torch.Tensor], count: int = MAX_DIRECTIONS) -> Iterator[Spectrum]:
    """Yield the singular directions of each of `weights (out, in)`, in their order, at least the `count` leading ones.

    As many layers are decomposed at once as there are threads, each by one of them: that is faster than all of them at one layer.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(partial(_decomposed, count), weights)
    finally:
        torch.set_num_threads(threads)  # what a worker sets holds for those who come after it too


def _decomposed(count: int, weight: torch.Tensor) -> Spectrum:
    if count <= LEADING and min(weight.shape) >= _LARGE:
        return leading_directions(weight)
    return singular_directions(weight)


def base_spectrum(
    base: Base,
    layers: dict[str, Layer],
    count: int = MAX_DIRECTIONS,
) -> dict[str, Spectrum]:
    """Return the spectrum of each of `layers`, from the cache under the base's fingerprint where it is there.

    Args:
        count: so many leading directions are needed, as far as a layer has them; there may be more.

    Two processes may ask at once: one computes, the other waits. A damaged cache is computed again. A cache that cannot
    be written is a warning, not an error.
    """
    file = cache_folder() / "spectra" / f"{base.fingerprint}.safetensors"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            return _load_or_compute(file, layers, count)
    except (OSError, StorageError) as error:
        logger.warning("The spectrum could not be kept in '%s' (%s); it is computed each time.", file.parent, error)
        return dict(zip(layers, spectra([matrix_of(layer) for layer in layers.values()], count), strict=True))


def _load_or_compute(file: Path, layers: dict[str, Layer], count: int) -> dict[str, Spectrum]:
    cached = _read_cache(file)
    missing = [key for key, layer in layers.items() if len(cached.get(f"{key}.s", ())) < min(count, *matrix_of(layer).shape)]
    if missing:
        logger.info("Computing the spectrum of %d layers (once per base).", len(missing))
        found = spectra([matrix_of(layers[key]) for key in missing], count)
        for key, spectrum in zip(counted("spectrum", "layer", missing), found, strict=True):
            cached |= {f"{key}.U": spectrum.U.cpu(), f"{key}.s": spectrum.s.cpu(), f"{key}.V": spectrum.V.cpu()}
        write_atomically(file, lambda path: save_file(cached, path))
    return {key: Spectrum(U=cached[f"{key}.U"], s=cached[f"{key}.s"], V=cached[f"{key}.V"]) for key in layers}


def _read_cache(file: Path) -> dict[str, torch.Tensor]:
    if not file.exists():
        return {}
    try:
        return load_file(file)
    except (SafetensorError, OSError):
        logger.warning("The cached spectrum '%s' is damaged; it is computed again.", file)
        return {}
