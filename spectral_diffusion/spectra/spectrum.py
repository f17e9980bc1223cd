"""The spectrum of the base's layers: thin singular value decompositions, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spectral_diffusion.bases.layer_matrix import Layer, is_told_by_fingerprint, matrix_of
from spectral_diffusion.errors import StorageError
from spectral_diffusion.files import write_atomically
from spectral_diffusion.stages import counted

if TYPE_CHECKING:
    from spectral_diffusion.bases.base import Base

logger = logging.getLogger(__name__)

MAX_DIRECTIONS = 256
"""Leading singular directions kept per layer: 32 bands of rank 8."""
_FAINT = 3e-2
"""Value over the first from which on down a Gram matrix in float32 tells a direction from others too little."""


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
    """Return the `count` leading singular directions of `weight (out, in)`, exactly.

    Where they are less than half of all and none is faint, they are found from the eigenvectors of the smaller Gram matrix, in
    0.45 to 0.75 of the time of a whole decomposition. What these span is then decomposed as the weight itself acts on it
    (Rayleigh and Ritz), so that the squares in the Gram matrix cost no precision.
    """
    matrix = weight.detach().float()
    if 2 * count <= min(matrix.shape):
        tall = matrix if matrix.shape[0] > matrix.shape[1] else matrix.T
        spanning = torch.linalg.eigh(tall.T @ tall).eigenvectors[:, -count:]
        basis = torch.linalg.qr(tall @ spanning).Q
        back, triangle = torch.linalg.qr(tall.T @ basis)
        V, s, Uh = torch.linalg.svd(triangle)
        if s[-1] > _FAINT * s[0]:
            U, V = basis @ Uh.T, back @ V
            return Spectrum(U=U, s=s, V=V) if tall is matrix else Spectrum(U=V, s=s, V=U)
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return Spectrum(U=U[:, :count].contiguous(), s=s[:count].contiguous(), V=Vh[:count].T.contiguous())


def spectra(weights: Sequence[torch.Tensor]) -> Iterator[Spectrum]:
    """Yield the leading singular directions of each of `weights (out, in)`, in their order.

    On a CPU as many layers are decomposed at once as there are threads, each by one of them: that is faster than all of them at
    one layer. On a GPU one follows the other.
    """
    threads = torch.get_num_threads()
    on_cpu = all(weight.device.type == "cpu" for weight in weights)
    workers = threads if on_cpu else 1  # the first calls of CUDA's linear algebra must not be at once (pytorch#90613)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(singular_directions, weights)
    finally:
        torch.set_num_threads(threads)  # what a worker sets holds for those who come after it too


def base_spectrum(base: Base, layers: dict[str, Layer]) -> dict[str, Spectrum]:
    """Return the spectrum of each of `layers`, from the cache under the base's fingerprint where it is there.

    Two processes may ask at once: one computes, the other waits. A damaged cache is computed again. A cache that cannot
    be written is a warning, not an error.
    """
    file = cache_folder() / "spectra" / f"{base.fingerprint}.safetensors"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            return _load_or_compute(file, layers)
    except (OSError, StorageError) as error:
        logger.warning("The spectrum could not be kept in '%s' (%s); it is computed each time.", file.parent, error)
        return dict(zip(layers, spectra([matrix_of(layer) for layer in layers.values()]), strict=True))


def _load_or_compute(file: Path, layers: dict[str, Layer]) -> dict[str, Spectrum]:
    cached = _read_cache(file)
    sides = {key: min(matrix_of(layer).shape) for key, layer in layers.items()}
    names = {key: _name(key, layer) for key, layer in layers.items()}
    missing = [key for key, side in sides.items() if len(cached.get(f"{names[key]}.s", ())) < min(MAX_DIRECTIONS, side)]
    if missing:
        logger.info("Computing the spectrum of %d layers (once per base).", len(missing))
        found = spectra([matrix_of(layers[key]) for key in missing])
        for key, spectrum in zip(counted("spectrum", "layer", missing), found, strict=True):
            cached |= {f"{names[key]}.{part}": getattr(spectrum, part).cpu() for part in ("U", "s", "V")}
        write_atomically(file, lambda path: save_file(cached, path))
    return {key: Spectrum(**{part: cached[f"{name}.{part}"] for part in ("U", "s", "V")}) for key, name in names.items()}


def _name(key: str, layer: Layer) -> str:
    """Return what layer `key` is called in the cache of its base: by its content too where the fingerprint does not tell it."""
    if is_told_by_fingerprint(layer):
        return key
    content = layer.weight.detach().half().cpu().contiguous().numpy().data
    return f"{key}@{hashlib.sha256(content).hexdigest()[:16]}"


def _read_cache(file: Path) -> dict[str, torch.Tensor]:
    if not file.exists():
        return {}
    try:
        # on Windows a file cannot be replaced while a tensor is still mapped from it
        return {name: tensor.clone() for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError):
        logger.warning("The cached spectrum '%s' is damaged; it is computed again.", file)
        return {}
