"""Company: each sample of a step among the others is shown with some of them, and learns as if only those were attached."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from short_trainings import BAND, SHORT, prepare_less
from torch import nn

from spectral_diffusion.bases.base import Base
from spectral_diffusion.concepts.concept import load_concept
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.spectra.spectrum import singular_directions
from spectral_diffusion.training import run, train_together
from spectral_diffusion.training.adaptation import adapt
from spectral_diffusion.training.batches import Batch
from spectral_diffusion.training.company import Company, draw_company


def test_it_itself_is_there_and_every_number_of_others_comes_as_often() -> None:
    company = draw_company(1, 4, 3000, torch.Generator().manual_seed(0))
    assert company.shape == (3000, 4) and (company[:, 1] == 1).all()
    numbers = Counter(int(row.sum()) for row in company)
    assert numbers.keys() == {2, 3, 4} and all(900 < number < 1100 for number in numbers.values())
    assert all(share == pytest.approx(2 / 3, abs=0.05) for share in company[:, [0, 2, 3]].mean(0).tolist())


@pytest.mark.parametrize(("concepts", "expected"), [(1, [[1.0]]), (2, [[1.0, 1.0]])])
def test_of_two_the_other_is_always_there(concepts: int, expected: list[list[float]]) -> None:
    assert draw_company(0, concepts, 50, torch.Generator().manual_seed(0)).unique(dim=0).tolist() == expected


def test_a_text_encoder_may_read_every_sample_several_times() -> None:
    company = Company(present=torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    counts = company.gate("text_encoder.one", torch.zeros(4, 3, 6))
    assert counts is not None and counts.shape == (4, 1, 6)
    assert counts[:, 0, 0].tolist() == [1, 1, 0, 0] and counts[:, 0, -1].tolist() == [0, 0, 1, 1]
    assert Company().gate("text_encoder.one", torch.zeros(4, 3, 6)) is None


@pytest.mark.parametrize("form", ["additive", "lora"])
def test_a_sample_moves_only_those_that_are_there(form: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 10).requires_grad_(False)
    layers, spectra = {"unet.one": layer}, {"unet.one": singular_directions(layer.weight)}
    bands = [BAND, Band(start=4, rank=2), Band(start=6, rank=2)]
    adaptation = adapt(layers, spectra, ["<V1>", "<V2>", "<V3>"], bands, replace(SHORT, parametrisation=form))
    with torch.no_grad():
        for tensor in adaptation.named().values():
            tensor.add_(torch.randn(tensor.shape))
    values = torch.randn(3, 2, 12)
    with adaptation.attached():
        alone = []
        for number in range(3):
            adaptation.show(torch.float32, number)
            alone.append(layer(values) - nn.functional.linear(values, layer.weight, layer.bias))
        adaptation.show(torch.float32, company=torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]))
        changed = layer(values) - nn.functional.linear(values, layer.weight, layer.bias)
        expected = torch.stack([alone[0][0] + alone[2][0], sum(one[1] for one in alone), alone[0][2]])
        torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-4)
        layer(values)[0].sum().backward()
    moved = [any(gradient.any() for gradient in adaptation.gradients(number)) for number in range(3)]
    assert moved == [True, False, True]


def test_those_that_a_caption_names_are_there(base: Base, photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_less(monkeypatch)
    drawn: list[Batch] = []
    draw = run.draw_batch
    monkeypatch.setattr(run, "draw_batch", lambda *given, **named: drawn.append(draw(*given, **named)) or drawn[-1])
    loaded = [load_concept(photo_folder, token=f"<V{number}>", class_word="dog") for number in range(4)]
    concepts = [(concept, Band(start=2 * number, rank=2)) for number, concept in enumerate(loaded)]
    settings = replace(SHORT, steps=8, batch=4, presence=0.9, mixing=1.0, inertness=0.0)
    train_together(base, concepts, settings)
    known = len(next(iter(base.tokenizers.values())))
    beside = 0
    for batch in (batch for batch in drawn if batch.among):
        for own in range(4):
            for ids, there in zip(batch.ids[own][:, 0], batch.company[own], strict=True):
                named = {int(word) - known for word in ids.tolist() if word >= known}
                assert own in named and all(there[number] for number in named)
                beside += len(named) > 1
    assert beside > 20
