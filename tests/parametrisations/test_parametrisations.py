"""What the parametrisations promise, for each of them, checked against `W'` written out densely."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_adapters import FORMS, band_of, random_adapter
from shared_bases import BASES, shared_base
from torch import nn

from spectral_diffusion.bases.base import adaptable_layers
from spectral_diffusion.parametrisations import SPECTRAL
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.spectra.spectrum import Spectrum, singular_directions
from spectral_diffusion.training import TrainingSettings
from spectral_diffusion.training.adaptation import adapt

OUT, IN, RANK = 24, 18, 3


def whole_spectrum(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, Spectrum]:
    """Return a random weight and all its singular directions."""
    weight = torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    U, s, Vh = torch.linalg.svd(weight, full_matrices=False)
    return weight.to(dtype), Spectrum(U=U.to(dtype), s=s.to(dtype), V=Vh.T.to(dtype))


def random_tensors(form: str, band: Spectrum, size: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    zeros = SPECTRAL[form].initial(band)
    return {name: size * torch.randn(zero.shape, generator=generator).to(zero) for name, zero in zeros.items()}


def delta(form: str, band: Spectrum, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    up, down = SPECTRAL[form].factors(band, tensors)
    return up @ down.T


def changed_weight(form: str, weight: torch.Tensor, band: Spectrum, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return `W'` as the paper writes it, densely."""
    without = weight - band.U @ torch.diag(band.s) @ band.V.T
    if form == "additive":
        values = torch.diag(band.s + tensors["c"])
        return without + (band.U + tensors["A"]) @ values @ (band.V + tensors["B"]).T
    R_U, R_V = cayley(tensors["Q_U"]), cayley(tensors["Q_V"])
    return without + band.U @ R_U @ torch.diag(band.s * (1 + tensors["g"])) @ R_V.T @ band.V.T


def cayley(raw: torch.Tensor) -> torch.Tensor:
    Q, identity = (raw - raw.T) / 2, torch.eye(len(raw), dtype=raw.dtype)
    return (identity + Q) @ torch.linalg.inv(identity - Q)


def after_optimiser_steps(form: str, band: Spectrum, kept: Spectrum) -> dict[str, torch.Tensor]:
    """Return the tensors after AdamW steps with weight decay towards a random weight, confined after each."""
    target = torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    tensors = {name: tensor.requires_grad_() for name, tensor in SPECTRAL[form].initial(band).items()}
    optimizer = torch.optim.AdamW(tensors.values(), lr=0.05, weight_decay=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        (delta(form, band, tensors) - target).square().sum().backward()
        optimizer.step()
        SPECTRAL[form].confine(tensors, kept.U, kept.V)
    return {name: tensor.detach() for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_change_is_exactly_zero_at_the_start(form: str, dtype: torch.dtype) -> None:
    band = band_of(whole_spectrum(dtype)[1], 2, RANK)
    change = delta(form, band, SPECTRAL[form].initial(band))
    assert change.dtype == dtype and torch.count_nonzero(change) == 0


@pytest.mark.parametrize("form", FORMS)
def test_training_can_leave_the_start(form: str) -> None:
    weight, spectrum = whole_spectrum()
    band = band_of(spectrum, 2, RANK)
    tensors = {name: tensor.requires_grad_() for name, tensor in SPECTRAL[form].initial(band).items()}
    (delta(form, band, tensors) * weight.flip(0)).sum().backward()
    assert all(torch.count_nonzero(tensor.grad) for tensor in tensors.values())


@pytest.mark.parametrize("form", FORMS)
def test_the_low_rank_change_is_the_dense_one(form: str) -> None:
    weight, spectrum = whole_spectrum()
    band = band_of(spectrum, 2, RANK)
    tensors = random_tensors(form, band)
    dense = changed_weight(form, weight, band, tensors) - weight
    # float64 round-off of numbers around 10
    torch.testing.assert_close(delta(form, band, tensors), dense, rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_trained_on_the_balanced_band_is_kept_for_the_band_itself(form: str) -> None:
    module, band = SPECTRAL[form], band_of(whole_spectrum()[1], 2, RANK)
    tensors = random_tensors(form, band)
    kept = module.kept(band.s, tensors)
    # float64 round-off of numbers around 10
    torch.testing.assert_close(delta(form, band, kept), delta(form, module.balanced(band), tensors), rtol=0, atol=1e-13)
    torch.testing.assert_close(module.resumed(band.s, kept), tensors, rtol=1e-14, atol=0)


def test_balanced_the_product_of_both_shifts_does_not_depend_on_the_band() -> None:
    spectrum = whole_spectrum()[1]
    faint = Spectrum(U=spectrum.U, s=spectrum.s / 100, V=spectrum.V)
    bands = [SPECTRAL["additive"].balanced(band_of(one, 2, RANK)) for one in (spectrum, faint)]
    tensors = random_tensors("additive", bands[0])
    strong, weak = (delta("additive", band, tensors) for band in bands)
    product = tensors["A"] @ torch.diag(1 + tensors["c"]) @ tensors["B"].T
    first = strong - product
    # the shifts of one side alone, a tenth on a hundredth of the singular values, save c, which is relative to them
    change_of_values = [band.U @ torch.diag(tensors["c"]) @ band.V.T for band in bands]
    torch.testing.assert_close(weak - product - change_of_values[1], (first - change_of_values[0]) / 10, rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_directions_that_a_layer_has_not_are_trained_too(form: str) -> None:
    layer = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
    layer.weight[:, 1:] = 0  # of rank 1
    spectra = {"unet.a": singular_directions(layer.weight)}
    settings = TrainingSettings(parametrisation=form, rank=RANK)
    adaptation = adapt({"unet.a": layer}, spectra, ["<V1>"], [Band(start=1, rank=RANK)], settings)
    for tensor in adaptation.named().values():
        tensor.data.normal_()
    part = adaptation.result(0).parts["unet.a"]
    change = delta(form, part.band, part.tensors)
    x = torch.eye(IN)
    with adaptation.attached():
        adaptation.show(torch.float32)
        trained = (layer(x) - x @ layer.weight.T).T
    assert change.norm() > 0
    torch.testing.assert_close(change, trained.detach(), rtol=1e-4, atol=1e-4)  # float32 round-off of numbers around 1


@pytest.mark.parametrize(("form", "rank"), [("additive", 2 * RANK), ("rotational", RANK)])
def test_the_rank_is_that_of_the_form(form: str, rank: int) -> None:
    band = band_of(whole_spectrum()[1], 2, RANK)
    tensors = random_tensors(form, band)
    up, down = SPECTRAL[form].factors(band, tensors)
    assert up.shape == (OUT, rank) and down.shape == (IN, rank)
    assert torch.linalg.matrix_rank(up @ down.T) == rank


def test_a_rotation_keeps_the_singular_values() -> None:
    weight, spectrum = whole_spectrum()
    band = band_of(spectrum, 2, RANK)
    tensors = random_tensors("rotational", band, size=1.0) | {"g": torch.zeros(RANK, dtype=torch.float64)}
    change = delta("rotational", band, tensors)
    assert change.norm() > 1
    torch.testing.assert_close(torch.linalg.svdvals(weight + change), spectrum.s, rtol=1e-12, atol=0)


def test_rotational_bands_are_orthogonal_on_both_sides_after_optimiser_steps() -> None:
    spectrum = whole_spectrum()[1]
    bands = band_of(spectrum, 0, RANK), band_of(spectrum, RANK, RANK)
    one, other = (delta("rotational", band, after_optimiser_steps("rotational", band, band)) for band in bands)
    overlap = max((one.T @ other).norm(), (one @ other.T).norm()) / (one.norm() * other.norm())
    assert overlap < 1e-14  # float64 round-off


@pytest.mark.parametrize("form", FORMS)
def test_isolated_bands_stay_untouched_after_optimiser_steps(form: str) -> None:
    spectrum = whole_spectrum()[1]
    band, kept = band_of(spectrum, 2, RANK), band_of(spectrum, 2 + RANK, 6)
    change = delta(form, band, after_optimiser_steps(form, band, kept))
    written, read = kept.U.T @ change, change @ kept.V
    assert max(written.norm(), read.norm()) / change.norm() < 1e-14  # float64 round-off


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", BASES)
def test_forms_hold_on_the_layers_of_a_base(which: str, form: str, tiny_base_folder: Path) -> None:
    base = shared_base(which, tiny_base_folder)
    (concept,) = random_adapter(base, form, start=2).concepts
    for key, layer in list(adaptable_layers(base).items())[::12]:
        part, change = concept.layers[key], concept.delta(key)
        band = Spectrum(U=part.band.U.double(), s=part.band.s.double(), V=part.band.V.double())
        tensors = {name: tensor.double() for name, tensor in part.tensors.items()}
        weight = layer.weight.double()
        dense = changed_weight(form, weight, band, tensors) - weight
        assert change.rank == concept.band.rank * (2 if form == "additive" else 1)
        assert (change.dense() - dense).norm() / dense.norm() < 1e-5  # float32 factors
        fresh = singular_directions(layer.weight).s[2:4]
        torch.testing.assert_close(part.band.s, fresh, rtol=1e-5, atol=1e-5)
