"""Spectral Adapter^A: the band's singular vectors and values are shifted (Zhang & Pilanci 2024, section 3).

`W' = W + (U_b + A) diag(s_b + c) (V_b + B)^T - U_b diag(s_b) V_b^T` with trained `A (out, r)`, `B (in, r)`, `c (r)`.
"""

from __future__ import annotations

import torch

from spectral_diffusion.spectra.spectrum import Spectrum

TENSORS = ("A", "B", "c")


def initial(band: Spectrum) -> dict[str, torch.Tensor]:
    """Return `A (..., out, r)`, `B (..., in, r)` and `c (..., r)`, all zero."""
    return {"A": torch.zeros_like(band.U), "B": torch.zeros_like(band.V), "c": torch.zeros_like(band.s)}


def factors(band: Spectrum, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `up (..., out, 2r)` and `down (..., in, 2r)` of the difference `W' - W`, written without cancellation.

    It is exactly zero for zero tensors, in any precision; its rank is at most `2r`.
    """
    A, B, c = tensors["A"], tensors["B"], tensors["c"][..., None, :]
    s = band.s[..., None, :] + c
    up = torch.cat([A * s + band.U * c, (band.U + A) * s], dim=-1)
    down = torch.cat([band.V, B], dim=-1)
    return up, down


def balanced(band: Spectrum) -> Spectrum:
    """Return `U_b sqrt(s_b)`, ones and `V_b sqrt(s_b)`: the same part of the weight, and what a training works on.

    An adaptive optimiser moves every number by steps of one size. Shifts of the unit vectors change the weight in proportion to
    the singular value, wildly in a layer's first band and hardly in its last. Shifts of these change it in proportion to its root
    where one side alone is shifted, and the product of both, which reads what it likes and writes what it likes, by as much
    whatever the band.
    """
    root = band.s[..., None, :].sqrt()
    return Spectrum(U=band.U * root, s=torch.ones_like(band.s), V=band.V * root)


def kept(s: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the `A`, `B` and `c` on a band of singular values `s (..., r)` that change as `tensors` do on the balanced band."""
    root = s[..., None, :].sqrt()
    return {"A": tensors["A"] / root, "B": tensors["B"] / root, "c": tensors["c"] * s}


def resumed(s: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what `kept` was given, to train on."""
    root = s[..., None, :].sqrt()
    return {"A": tensors["A"] * root, "B": tensors["B"] * root, "c": tensors["c"] / s}


@torch.no_grad()
def confine(tensors: dict[str, torch.Tensor], U_kept: torch.Tensor, V_kept: torch.Tensor) -> None:
    """Project `A` and `B` in place onto the complement of `U_kept (..., out, m)`, `V_kept (..., in, m)` (orthonormal columns).

    The parameters are projected, not their gradients: an adaptive optimiser's step leaves the subspace.
    """
    tensors["A"].sub_(U_kept @ (U_kept.mT @ tensors["A"]))
    tensors["B"].sub_(V_kept @ (V_kept.mT @ tensors["B"]))
