"""Spectral Adapter^R: the band's singular vectors are rotated among themselves (Zhang & Pilanci 2024, section 3).

`W' = W + U_b (R_U diag(s_b (1 + g)) R_V^T - diag(s_b)) V_b^T` with `R = (I + Q)(I - Q)^-1` and `Q` skew-symmetric (Cayley).
Trained: two `(r, r)` matrices whose skew parts are the `Q`s, and `g (r)`, whatever the layer's size.
"""

from __future__ import annotations

import torch

from spectral_diffusion.spectra.spectrum import Spectrum

TENSORS = ("Q_U", "Q_V", "g")


def initial(band: Spectrum) -> dict[str, torch.Tensor]:
    """Return `Q_U (..., r, r)`, `Q_V (..., r, r)` and `g (..., r)`, all zero."""
    square = torch.zeros_like(torch.diag_embed(band.s))
    return {"Q_U": square, "Q_V": square.clone(), "g": torch.zeros_like(band.s)}


def factors(band: Spectrum, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `up (..., out, r)` and `down (..., in, r)` of `W' - W`: exactly zero for zero tensors, rank at most `r`.

    With `R = I + P` the difference of the cores is `diag(s g) + P_U S + S P_V^T + P_U S P_V^T`, `S = diag(s (1 + g))`.
    """
    P_U, P_V = _rotation_minus_identity(tensors["Q_U"]), _rotation_minus_identity(tensors["Q_V"])
    S = torch.diag_embed(band.s * (1 + tensors["g"]))
    core = torch.diag_embed(band.s * tensors["g"]) + P_U @ S + S @ P_V.mT + P_U @ S @ P_V.mT
    return band.U @ core, band.V


def balanced(band: Spectrum) -> Spectrum:
    """Return the band as it is: a turn moves every direction alike, and changes the weight relative to its singular values."""
    return band


def kept(s: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `tensors` as they are."""
    return tensors


def resumed(s: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `tensors` as they are."""
    return tensors


def confine(tensors: dict[str, torch.Tensor], U_kept: torch.Tensor, V_kept: torch.Tensor) -> None:
    """Do nothing: a rotation never leaves its own band."""


def _rotation_minus_identity(raw: torch.Tensor) -> torch.Tensor:
    """Return `R - I = 2 (I - Q)^-1 Q` for the skew part `Q` of `raw`, solved in float32 at least: LAPACK has no half."""
    Q = ((raw - raw.mT) / 2).to(torch.promote_types(raw.dtype, torch.float32))
    identity = torch.eye(Q.shape[-1], device=Q.device, dtype=Q.dtype)
    return (2 * torch.linalg.solve(identity - Q, Q)).to(raw.dtype)
