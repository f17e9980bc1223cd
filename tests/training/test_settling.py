"""Settling: what was trained apart learns, without photos, to give in the sum what it gave alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from short_trainings import SHORT, assert_bit_equal, prepare_less

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.attach import attached, beside, with_tokens
from spectral_diffusion.adapters.fusion import default_method, fuse
from spectral_diffusion.bases.base import Base
from spectral_diffusion.concepts.concept import Concept, load_concept
from spectral_diffusion.errors import AdapterError
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.own_models import own_models
from spectral_diffusion.prompts.conditioning import tokenize
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.training import TrainingProgress, composed, settle, settling, train, train_together
from spectral_diffusion.training.batches import Pool
from spectral_diffusion.training.prediction import predict

LOUD = replace(SHORT, steps=12, unet_rate=3e-2, text_encoder_rate=3e-3, token_rate=3e-2)


@pytest.fixture(scope="module")
def concepts(photo_folder: Path) -> list[Concept]:
    return [load_concept(photo_folder, token=f"<V{i}>", class_word=word) for i, word in enumerate(("dog", "cat"))]


@pytest.fixture(scope="module")
def apart(base: Base, concepts: list[Concept]) -> list[Adapter]:
    """Two concepts, trained so hard that their sum is not what each was."""
    with pytest.MonkeyPatch.context() as patch:
        prepare_less(patch)
        bands = [Band(start=0, rank=2), Band(start=2, rank=2)]
        return [train(base, concept, band, LOUD).adapter for concept, band in zip(concepts, bands, strict=True)]


@torch.no_grad()
def answer(base: Base, adapter: Adapter | None, token: str) -> torch.Tensor:
    side = base.resolution // base.pipeline.vae_scale_factor
    noisy = torch.randn(8, base.pipeline.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(1))
    with attached(base, adapter) if adapter else nullcontext():
        return predict(base, noisy, torch.arange(8) * 100, tokenize(base, [f"{token} near a lake"] * 8))


def strayed(base: Base, before: list[Adapter], fused: Adapter) -> float:
    """Return how far the sum's answers are from those that each concept gave alone."""
    return sum((answer(base, one, one.tokens[0]) - answer(base, fused, one.tokens[0])).norm().item() for one in before)


def test_the_sum_comes_nearer_to_what_each_gave_alone(base: Base, apart: list[Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_less(monkeypatch)
    monkeypatch.setattr("spectral_diffusion.training.settling.SAMPLES", 256)
    assert default_method([one.concepts[0] for one in apart]) == "aligned"
    events: list[TrainingProgress] = []
    results = settle(base, apart, steps=200, on_progress=events.append)
    settled = [result.adapter for result in results]
    fused = fuse(settled)
    assert fused.method == "sum" and len(events) == 200 and all(result.finished for result in results)
    plain = strayed(base, apart, fuse(apart, method="sum"))
    assert strayed(base, apart, fused) < 0.5 * plain
    for one, other in zip(apart, settled, strict=True):
        assert other.tokens == one.tokens and other.concepts[0].band == one.concepts[0].band
        assert (other.concepts[0].settings["steps_done"], other.concepts[0].settings["mixing"]) == (212, 0)
        alone = (answer(base, one, one.tokens[0]) - answer(base, other, one.tokens[0])).norm().item()
        assert alone < 0.5 * plain  # each by itself stays much as it was


@torch.no_grad()
def test_what_is_taught_of_several_is_what_their_own_models_predict(
    base: Base, apart: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_less(monkeypatch)
    asked: list[Drawing] = []

    def watched(base: Base, drawing: Drawing, adapter: Adapter) -> AbstractContextManager[None]:
        asked.append(drawing)
        return own_models(base, drawing, adapter)

    monkeypatch.setattr(composed, "own_models", watched)
    words, pair = {one.tokens[0]: one.tokens[0] for one in apart}, fuse(apart, method="sum")
    with with_tokens(base, pair.embeddings):
        pools = composed.composed_pools(base, pair, words, seed=0, strength=4.0)
        each = composed.PICTURES * composed.SAMPLES
        numbers = base.pipeline.tokenizer.convert_tokens_to_ids(list(pair.tokens))
        for number, several in enumerate(pools):
            for pool, named in ((several.together, numbers), (several.own, numbers[number : number + 1])):
                assert len(pool.times) == 2 * composed.GROUPS * each
                assert [int((pool.ids[:, 0] == one).any(1).all()) for one in numbers] == [int(one in named) for one in numbers]
            with beside(base, pair.only([pair.tokens[number]])):
                alone = predict(base, several.own.noisy[:each], several.own.times[:each], several.own.ids[:each])
            torch.testing.assert_close(alone, several.own.predictions[:each], rtol=1e-4, atol=1e-5)
        assert [drawing.guidance for drawing in asked] == [base.guidance, 1.0] * 2 * composed.GROUPS
        first = pools[0].together
        for ids, drawing in ((first.ids[:each], asked[1]), (tokenize(base, [asked[1].prompt] * each), asked[1])):
            with own_models(base, drawing, pair):
                predicted = predict(base, first.noisy[:each], first.times[:each], ids)
            torch.testing.assert_close(predicted, first.predictions[:each], rtol=1e-4, atol=1e-5)
            change = predicted - predict(base, first.noisy[:each], first.times[:each], ids)
            sizes = change.square().mean((1, 2, 3), keepdim=True).sqrt()
            torch.testing.assert_close(2 * change / sizes, first.directions[:each], rtol=1e-3, atol=1e-3)


def test_each_meets_one_or_two_of_the_others_in_any_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composed, "GROUPS", 12)
    groups = composed._groups(4, torch.Generator().manual_seed(0))
    assert len(groups) == 4 * composed.GROUPS and {len(group) for group in groups} == {2, 3}
    assert all(len(set(group)) == len(group) for group in groups)
    for own in range(4):
        met = [group for group in groups if own in group]
        assert len(met) >= composed.GROUPS and {group.index(own) for group in met} == {0, 1, 2}
        assert {number for group in met for number in group} == {0, 1, 2, 3}
    assert {len(group) for group in composed._groups(2, torch.Generator())} == {2}


@torch.no_grad()
def test_what_falls_short_along_the_own_change_counts_more(base: Base, apart: list[Adapter]) -> None:
    side, generator = base.resolution // base.pipeline.vae_scale_factor, torch.Generator().manual_seed(2)
    noisy = torch.randn(3, base.pipeline.unet.config.in_channels, side, side, generator=generator)
    times = torch.tensor([10, 400, 900])
    with with_tokens(base, apart[0].embeddings):
        ids = tokenize(base, [apart[0].tokens[0]] * 3)
        bare = predict(base, noisy, times, ids)
        with beside(base, apart[0]):
            own = predict(base, noisy, times, ids)
        pool = Pool(noisy=noisy, times=times, ids=ids, predictions=own)
        directed = composed.directed(base, pool, 4.0)
    assert torch.equal(directed.predictions, own) and (own - bare).norm() > 0.1 * bare.norm()
    drawn = directed.samples(base, SHORT, 5, torch.Generator().manual_seed(0), among=True)
    assert not pool.samples(base, SHORT, 5, torch.Generator().manual_seed(0), among=True)["directions"].any()
    change = drawn["targets"] - torch.stack([bare[(own == target).all((1, 2, 3))][0] for target in drawn["targets"]])
    across = torch.randn(change.shape, generator=generator)
    across -= change * ((across * change).sum((1, 2, 3)) / change.square().sum((1, 2, 3))).view(-1, 1, 1, 1)
    for distance, factor in ((-0.2 * change, 5.0), (0.1 * change, 5.0), (across, 1.0)):
        square = distance.square().mean((1, 2, 3))
        counted = square + (distance * drawn["directions"]).mean((1, 2, 3)) ** 2
        torch.testing.assert_close(counted, factor * square, rtol=1e-4, atol=1e-7)


def test_the_sum_is_as_strong_as_each_alone(base: Base, apart: list[Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_less(monkeypatch)
    monkeypatch.setattr("spectral_diffusion.training.settling.SAMPLES", 64)

    def along(strength: float) -> list[float]:
        monkeypatch.setattr("spectral_diffusion.training.settling.STRENGTH", strength)
        fused, shares = fuse([result.adapter for result in settle(base, apart, steps=40)]), []
        for one in apart:
            with with_tokens(base, one.embeddings):
                bare = answer(base, None, one.tokens[0])
            change, kept = answer(base, one, one.tokens[0]) - bare, answer(base, fused, one.tokens[0]) - bare
            shares.append(float((change * kept).sum() / change.square().sum()))
        return shares

    as_it_ships, squares_only = along(settling.STRENGTH), along(0.0)
    assert min(squares_only) < 0.85 < min(as_it_ships) and sum(as_it_ships) > sum(squares_only) + 0.1


def test_pictures_of_several_are_taught_as_all_see_them_among_the_others_and_else_as_its_own_model_does() -> None:
    own, own_among, together, alone = (
        Pool(
            noisy=torch.full((3, 4, 2, 2), value),
            times=torch.zeros(3),
            ids=torch.zeros(3, 1, 5),
            predictions=torch.full((3, 4, 2, 2), value),
        )
        for value in (0.0, 3.0, 1.0, 2.0)
    )
    taught = settling.Taught(own=own, own_among=own_among, several=composed.Several(together=together, own=alone))
    base, generator = SimpleNamespace(device=torch.device("cpu")), torch.Generator().manual_seed(0)
    for among, single, value in ((True, 3.0, 1.0), (False, 0.0, 2.0)):
        samples = taught.samples(base, SHORT, 400, generator, among=among)
        assert torch.equal(samples["noisy"], samples["targets"]) and set(samples["noisy"].flatten().tolist()) == {single, value}
        assert (samples["noisy"] == value).float().mean().item() == pytest.approx(settling.SEVERAL, abs=0.08)


def test_a_stopped_settling_goes_on_where_it_was(
    base: Base, apart: list[Adapter], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prepare_less(monkeypatch)
    state, events = tmp_path / "state", []
    stopped = settle(base, apart, steps=4, checkpoint=state, on_progress=events.append, should_stop=lambda: len(events) == 2)
    assert [result.finished for result in stopped] == [False, False]
    resumed = settle(base, apart, steps=4, checkpoint=state, on_progress=events.append)
    assert [event.step for event in events] == [1, 2, 3, 4]
    for one, other in zip(resumed, settle(base, apart, steps=4), strict=True):
        assert_bit_equal(one.adapter, other.adapter)


def test_bands_that_overlap_are_settled_if_asked_for(
    base: Base, concepts: list[Concept], apart: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_less(monkeypatch)
    other = train(base, concepts[1], Band(start=1, rank=2), replace(SHORT, steps=1)).adapter
    assert all(result.finished for result in settle(base, [apart[0], other], steps=1))


def test_what_cannot_be_settled_is_said(base: Base, concepts: list[Concept], apart: list[Adapter]) -> None:
    with pytest.raises(AdapterError, match="needs at least two concepts"):
        settle(base, apart[:1])
    with pytest.raises(AdapterError, match="<V0>, <V1> is fused already; settle those that it was fused from"):
        settle(base, [fuse(apart, method="sum"), apart[0]])
    wider = train(base, concepts[1], Band(start=4, rank=4), replace(SHORT, rank=4, steps=1)).adapter
    with pytest.raises(AdapterError, match="'<V1>' was trained with rank 4, '<V0>' with 2; settle what is alike"):
        settle(base, [apart[0], wider])
    lidb, lora = (
        train(base, concepts[1], Band(start=0, rank=2), replace(SHORT, parametrisation=form, steps=1)).adapter
        for form in ("lidb", "lora")
    )
    with pytest.raises(AdapterError, match="'<V1>' was not trained here as additive, rotational or lora"):
        settle(base, [apart[0], lidb])
    with pytest.raises(AdapterError, match="'<V1>' was trained with parametrisation lora, '<V0>' with additive"):
        settle(base, [apart[0], lora])


@pytest.mark.parametrize("form", ["rotational", "lora"])
def test_other_forms_settle_from_where_they_are(
    form: str, base: Base, concepts: list[Concept], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_less(monkeypatch)
    pairs = list(zip(concepts, [Band(start=0, rank=2), Band(start=2, rank=2)], strict=True))
    settings = replace(SHORT, parametrisation=form, steps=2, unet_rate=1e-2)
    before = [result.adapter for result in train_together(base, pairs, settings)]
    for one, result in zip(before, settle(base, before, steps=1), strict=True):
        changes = [(result.adapter.delta(key).dense() - one.delta(key).dense()).norm() for key in one.layer_keys()]
        sizes = [one.delta(key).dense().norm() for key in one.layer_keys()]
        assert result.finished and 0 < sum(changes) < sum(sizes)
