"""What crops are called in the training, and a token that stops learning."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from short_trainings import BAND, SHORT, prepare_less

from spectral_diffusion.bases.base import Base
from spectral_diffusion.concepts.concept import DEFAULT_CAPTION, Concept
from spectral_diffusion.training import train
from spectral_diffusion.training.captions import TEMPLATES, vary_caption
from spectral_diffusion.training.trainable import class_word_vectors


def variants(caption: str, dropout: float = 0.0, count: int = 200) -> list[str]:
    rng = np.random.default_rng(0)
    return [vary_caption(caption, dropout, rng) for _ in range(count)]


def test_a_photo_without_a_caption_is_called_by_every_template() -> None:
    assert set(variants(DEFAULT_CAPTION)) == set(TEMPLATES)


def test_tags_change_places_behind_the_token() -> None:
    shuffled = variants("<TOK>, white background, sitting, red collar")
    assert len(set(shuffled)) == 6
    assert {caption.split(", ")[0] for caption in shuffled} == {"<TOK>"}
    assert {tuple(sorted(caption.split(", ")[1:])) for caption in shuffled} == {("red collar", "sitting", "white background")}


@pytest.mark.parametrize(
    "caption", ["<TOK> near a lake", "In the snow, <TOK>, asleep", "a photo of <TOK>, which sits, and waits", "<TOK>"]
)
def test_sentences_stay_as_they_were_written(caption: str) -> None:
    assert set(variants(caption)) == {caption}


def test_dropout_leaves_the_token_alone() -> None:
    assert set(variants("<TOK> near a lake", 1.0)) == {"<TOK>"}
    dropped = variants("<TOK> near a lake", 0.3, 2000).count("<TOK>")
    assert 0.26 < dropped / 2000 < 0.34


def test_a_token_stays_once_its_norm_is_reached(base: Base, concept: Concept, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_less(monkeypatch)
    start = class_word_vectors(base, concept.class_word)
    norm = max(vector.norm(dim=1).item() for vector in start.values())
    quick = replace(SHORT, steps=3, token_rate=1e-2)

    def vectors(token_norm: float) -> dict[str, torch.Tensor]:
        (part,) = train(base, concept, BAND, replace(quick, token_norm=token_norm)).adapter.concepts
        return part.embeddings

    still, free, far = vectors(norm * 0.5), vectors(0.0), vectors(norm * 100)
    for name, vector in start.items():
        assert torch.equal(still[name], vector.cpu())
        assert not torch.equal(free[name], vector.cpu())
        assert torch.equal(far[name], free[name])
