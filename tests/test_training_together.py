"""Several concepts in one pass: each ends as if it were trained alone, and nothing of one reaches another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from short_trainings import SHORT, assert_bit_equal, assert_near
from test_parametrisations import FORMS

from spectral_diffusion.bands import Band
from spectral_diffusion.base import Base
from spectral_diffusion.concept import Concept, load_concept
from spectral_diffusion.errors import InputError
from spectral_diffusion.training import TrainingProgress, train, train_together

BANDS = (Band(start=0, rank=2), Band(start=2, rank=2), Band(start=20, rank=2))


pytestmark = pytest.mark.usefixtures("less_preparation")


@pytest.fixture(scope="module")
def concepts(photo_folder: Path) -> list[tuple[Concept, Band]]:
    """Three concepts that differ in token, class word, photos and band; the last one's band is beyond the isolated ones."""
    loaded = [load_concept(photo_folder, token=f"<V{i}>", class_word=word) for i, word in enumerate(("dog", "cat", "vase"))]
    fewer = [replace(concept, examples=concept.examples[number:]) for number, concept in enumerate(loaded)]
    return list(zip(fewer, BANDS, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_concepts_trained_together_end_as_alone(form: str, base: Base, concepts: list[tuple[Concept, Band]]) -> None:
    settings = replace(SHORT, parametrisation=form, steps=3, batch=2, token_vectors=2)
    events: list[TrainingProgress] = []
    together = train_together(base, concepts, settings, on_progress=events.append)
    losses = []
    for (concept, band), result in zip(concepts, together, strict=True):
        alone_events: list[TrainingProgress] = []
        alone = train(base, concept, band, settings, on_progress=alone_events.append)
        assert result.adapter.tokens == (concept.token,) and result.finished and result.steps_done == 3
        assert_near(result.adapter, alone.adapter)
        losses.append(alone_events[-1])
    assert [event.step for event in events] == [1, 2, 3]
    for name in ("concept_loss", "inertness_loss"):
        mean = sum(getattr(loss, name) for loss in losses) / len(losses)
        assert getattr(events[-1], name) == pytest.approx(mean, rel=1e-3)


def test_a_concept_that_is_clipped_leaves_the_others_alone(base: Base, concepts: list[tuple[Concept, Band]]) -> None:
    settings = replace(SHORT, steps=2, gradient_norm=1e-3)
    (alone,), (first, _) = train_together(base, concepts[:1], settings), train_together(base, concepts[:2], settings)
    assert_near(first.adapter, alone.adapter)


def test_a_stopped_training_of_several_goes_on_where_it_was(
    base: Base, concepts: list[tuple[Concept, Band]], tmp_path: Path
) -> None:
    state, events = tmp_path / "state", []
    pair = concepts[:2]
    stopped = train_together(base, pair, SHORT, checkpoint=state, on_progress=events.append, should_stop=lambda: len(events) == 3)
    assert [(result.finished, result.steps_done) for result in stopped] == [(False, 3)] * 2
    resumed = train_together(base, pair, SHORT, checkpoint=state, on_progress=events.append)
    assert [event.step for event in events] == [1, 2, 3, 4, 5]
    for one, other in zip(resumed, train_together(base, pair, SHORT), strict=True):
        assert_bit_equal(one.adapter, other.adapter)


def test_samples_show_each_concept(base: Base, concepts: list[tuple[Concept, Band]]) -> None:
    events: list[TrainingProgress] = []
    train_together(base, concepts[:2], replace(SHORT, steps=1, sample_every=1), on_progress=events.append)
    (event,) = events
    pictures = [picture.tobytes() for picture in event.samples]
    assert len(pictures) == len(set(pictures)) == 4


def test_one_token_is_not_given_to_two_concepts(base: Base, concepts: list[tuple[Concept, Band]]) -> None:
    (concept, band), _, (_, other) = concepts
    with pytest.raises(InputError, match="Two concepts use the token '<v0>'; give each a token of its own"):
        train_together(base, [(concept, band), (replace(concept, token="<v0>"), other)], SHORT)
