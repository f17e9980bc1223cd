"""Several concepts in one pass: apart from one another, and among those that they will be drawn with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import FORMS, random_adapter
from short_trainings import SHORT, assert_bit_equal, assert_near, trained_tensors

from spectral_diffusion.adapters.adapter import Adapter, LayerPart
from spectral_diffusion.adapters.band_plan import neighbours
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base, adaptable_layers
from spectral_diffusion.bases.layer_names import ATTENTION_LAYERS, CONVOLUTION_LAYERS
from spectral_diffusion.concepts.concept import Concept, load_concept
from spectral_diffusion.errors import AdapterError, InputError
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.spectra.spectrum import Spectrum
from spectral_diffusion.training import TrainingProgress, train, train_together
from spectral_diffusion.training.batches import Batch, draw_batch

BANDS = (Band(start=0, rank=2), Band(start=2, rank=2), Band(start=20, rank=2))


pytestmark = pytest.mark.usefixtures("less_preparation", "followed_gradients")


@pytest.fixture(scope="module")
def concepts(photo_folder: Path) -> list[tuple[Concept, Band]]:
    """Three concepts that differ in token, class word, photos and band; the last one's band is beyond the isolated ones."""
    loaded = [load_concept(photo_folder, token=f"<V{i}>", class_word=word) for i, word in enumerate(("dog", "cat", "vase"))]
    fewer = [replace(concept, examples=concept.examples[number:]) for number, concept in enumerate(loaded)]
    return list(zip(fewer, BANDS, strict=True))


@pytest.mark.parametrize(
    ("form", "layers"),
    [*((form, ATTENTION_LAYERS) for form in (*FORMS, "orthogonal", "lora")), ("additive", CONVOLUTION_LAYERS)],
)
def test_concepts_trained_together_end_as_alone(
    form: str, layers: tuple[str, ...], base: Base, concepts: list[tuple[Concept, Band]]
) -> None:
    settings = replace(SHORT, parametrisation=form, layers=layers, steps=3, batch=2, token_vectors=2, presence=0.0)
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
    settings = replace(SHORT, steps=2, gradient_norm=1e-3, presence=0.0)
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


@pytest.mark.parametrize("presence", [0.0, 0.5, 0.75])
def test_presence_is_the_share_of_steps_made_among_the_others(
    presence: float, base: Base, concepts: list[tuple[Concept, Band]], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[bool] = []

    def listening(*arguments: Any, among: bool) -> Batch:
        steps.append(among)
        return draw_batch(*arguments, among=among)

    monkeypatch.setattr("spectral_diffusion.training.run.draw_batch", listening)
    results = train_together(base, concepts[:2], replace(SHORT, steps=8, presence=presence))
    assert sum(steps) == 8 * presence
    told = [result.adapter.concepts[0].settings["among"] for result in results]
    assert told == ([["<V1>"], ["<V0>"]] if presence else [[], []])


def test_among_the_others_the_sum_of_all_is_trained(base: Base, concepts: list[tuple[Concept, Band]]) -> None:
    settings = replace(SHORT, steps=3)
    first, second = (train_together(base, pair, settings)[0].adapter for pair in (concepts[:2], [concepts[0], concepts[2]]))
    apart = replace(settings, presence=0.0)
    same, also = (train_together(base, pair, apart)[0].adapter for pair in (concepts[:2], [concepts[0], concepts[2]]))
    assert_near(same, also)
    with pytest.raises(AssertionError):
        assert_near(first, second)


def test_what_was_trained_before_is_the_start_and_stays(base: Base, concepts: list[tuple[Concept, Band]]) -> None:
    """The first step is made among the others: were the bare base the teacher, the inertness loss would not begin at zero."""
    (concept, band), before = concepts[1], random_adapter(base, token="<V0>", size=0.3)
    kept = {key: delta.dense() for key, delta in before.deltas().items()}
    weights = {key: layer.weight.clone() for key, layer in adaptable_layers(base, None).items()}
    events: list[TrainingProgress] = []
    result = train(base, concept, band, SHORT, among=before, on_progress=events.append)
    assert events[0].inertness_loss < 1e-10 < events[-1].inertness_loss
    assert result.adapter.tokens == ("<V1>",) and result.adapter.concepts[0].settings["among"] == ["<V0>"]
    assert all(torch.equal(kept[key], delta.dense()) for key, delta in before.deltas().items())
    assert all(torch.equal(weights[key], layer.weight) for key, layer in adaptable_layers(base, None).items())
    apart = train(base, concept, band, replace(SHORT, presence=0.0), among=before).adapter
    assert_bit_equal(apart, train(base, concept, band, replace(SHORT, presence=0.0)).adapter)
    with pytest.raises(AssertionError):
        assert_near(apart, result.adapter)


def test_a_training_goes_on_from_what_was_trained(base: Base, concepts: list[tuple[Concept, Band]]) -> None:
    before = [result.adapter for result in train_together(base, concepts[:2], SHORT)]
    still = replace(SHORT, steps=1, unet_rate=0.0, text_encoder_rate=0.0, token_rate=0.0)
    for result, adapter in zip(train_together(base, concepts[:2], still, start=before), before, strict=True):
        own, was = (trained_tensors(one) for one in (result.adapter, adapter))
        for name in adapter.concepts[0].embeddings | {f"{key}/A": None for key in adapter.layer_keys()}:
            torch.testing.assert_close(own[name], was[name], rtol=0, atol=1e-6)  # confined once more, which rounds
        assert result.adapter.concepts[0].settings["steps_done"] == SHORT.steps + 1
    fused = fuse(before, method="sum")
    one, other = (train(base, *concepts[0], SHORT, start=start).adapter for start in (fused, before[0]))
    assert_bit_equal(one, other)
    with pytest.raises(AssertionError):
        assert_near(one, before[0])


def test_a_training_goes_on_along_the_directions_that_it_was_begun_on(base: Base, concepts: list[tuple[Concept, Band]]) -> None:
    (concept,) = train(base, *concepts[0], SHORT).adapter.concepts
    layers = {}
    for key, part in concept.layers.items():  # as another machine may find them
        turned = Spectrum(U=-part.band.U, s=part.band.s, V=-part.band.V)
        tensors = part.tensors | {name: -part.tensors[name] for name in ("A", "B")}
        layers[key] = LayerPart(band=turned, tensors=tensors)
    start = Adapter(family=base.family, fingerprint=base.fingerprint, concepts=(replace(concept, layers=layers),), weights=(1.0,))
    still = replace(SHORT, steps=1, unet_rate=0.0, text_encoder_rate=0.0, token_rate=0.0)
    longer = train(base, *concepts[0], still, start=start).adapter.deltas()
    for key, delta in start.deltas().items():
        torch.testing.assert_close(longer[key].dense(), delta.dense(), rtol=0, atol=1e-6)  # confined once more, which rounds


def test_going_on_is_resumed_where_it_was(base: Base, concepts: list[tuple[Concept, Band]], tmp_path: Path) -> None:
    start = train(base, *concepts[0], SHORT).adapter
    undisturbed = train(base, *concepts[0], SHORT, start=start).adapter
    checkpoint, seen = tmp_path / "checkpoint", []
    stopped = {"on_progress": seen.append, "should_stop": lambda: len(seen) > 2}
    train(base, *concepts[0], SHORT, start=start, checkpoint=checkpoint, **stopped)
    resumed = train(base, *concepts[0], SHORT, start=start, checkpoint=checkpoint)
    assert seen[-1].step == 3 and resumed.finished
    assert_bit_equal(resumed.adapter, undisturbed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "other"}, "'<V0>' was trained on another base"),
        ({"family": "sd1"}, "belongs to a base of family 'sd1'"),
        ({"token": "<V7>"}, r"has no concept '<V0>'; its tokens are <V7>\."),
        ({"form": "rotational"}, "'<V0>' was trained with parametrisation rotational, not additive"),
        ({"start": 4}, "'<V0>' was trained with directions 4-5, not 0-1"),
        ({"vectors": 2}, "'<V0>' was trained with token_vectors 2, not 1"),
    ],
)
def test_what_does_not_fit_is_not_gone_on_from(
    changes: dict[str, object], message: str, base: Base, concepts: list[tuple[Concept, Band]]
) -> None:
    of_adapter = {name: changes[name] for name in changes if name in ("fingerprint", "family")}
    drawn = {"token": "<V0>"} | {name: changes[name] for name in changes if name not in of_adapter}
    start = replace(random_adapter(base, **drawn), **of_adapter)
    with pytest.raises(AdapterError, match=message):
        train(base, *concepts[0], SHORT, start=start)


def test_a_rival_and_other_layers_are_not_gone_on_from(base: Base, concepts: list[tuple[Concept, Band]]) -> None:
    rival = replace(SHORT, parametrisation="lidb", steps=1)
    with pytest.raises(AdapterError, match="'<V0>' was trained with parametrisation lora, not lidb"):
        train(base, *concepts[0], rival, start=train(base, *concepts[0], rival).adapter)
    with pytest.raises(AdapterError, match="'<V0>' was trained with rank 2, not 4; choose that, or start it anew"):
        lora = replace(SHORT, parametrisation="lora", steps=1)
        train(base, concepts[0][0], Band(start=0, rank=4), replace(lora, rank=4), start=train(base, *concepts[0], lora).adapter)
    fewer = replace(SHORT, layers=("to_v",))
    with pytest.raises(AdapterError, match="'<V0>' was trained on other layers"):
        train(base, *concepts[0], fewer, start=random_adapter(base, token="<V0>"))


def test_those_before_must_fit_by_token_and_base(base: Base, concepts: list[tuple[Concept, Band]]) -> None:
    concept, band = concepts[0]
    with pytest.raises(InputError, match="Two concepts use the token '<V0>'"):
        train(base, concept, band, SHORT, among=random_adapter(base, token="<v0>"))
    with pytest.raises(AdapterError, match="belongs to a base of family 'sd1'"):
        train(base, concept, band, SHORT, among=replace(random_adapter(base), family="sd1"))


def test_the_neighbours_are_the_known_concepts_each_once(base: Base, tmp_path: Path) -> None:
    one, two = random_adapter(base, token="<V1>"), random_adapter(base, token="<V2>", start=2)
    known = {tmp_path / "one": one, tmp_path / "pair": fuse([one, two], method="sum"), tmp_path / "two": two}
    assert neighbours(known, ["<V3>"]).tokens == ("<V1>", "<V2>")
    assert neighbours(known, ["<v1>"]).tokens == ("<V2>",)
    assert neighbours({tmp_path / "one": one}, ["<V1>"]) is None
