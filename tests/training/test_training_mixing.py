"""Pictures of concepts side by side: who stands where, what is learnt there, and when they are shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from short_trainings import SHORT, prepare_less

from spectral_diffusion.bases.base import Base
from spectral_diffusion.concepts.concept import Concept, Example
from spectral_diffusion.concepts.photos import Photo
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.training import batches, train_together
from spectral_diffusion.training.mixing import PICTURES, mixed_examples, strip

RED, GREEN, GREY = (220, 30, 30), (30, 200, 30), (128, 128, 128)


def thing(token: str, colour: tuple[int, int, int], box: tuple[int, int, int, int], *, masked: bool = True) -> Concept:
    """Return a concept of one grey photo, 120 x 90, with a box of `colour` in it."""
    picture, mask = Image.new("RGB", (120, 90), GREY), Image.new("L", (120, 90))
    for image, fill in ((picture, colour), (mask, 255)):
        ImageDraw.Draw(image).rectangle([box[0], box[1], box[2] - 1, box[3] - 1], fill=fill)
    photo = Photo(path=Path("1.png"), image=picture)
    example = Example(photo=photo, caption="<TOK>", mask=mask if masked else None)
    return Concept(token=token, class_word="dog", examples=(example,), source=Path())


@pytest.fixture
def pair() -> list[Concept]:
    return [thing("<one>", RED, (5, 40, 65, 80)), thing("<two>", GREEN, (90, 0, 115, 88))]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("columns", [32, 21])
def test_a_strip_shows_all_of_the_thing_and_its_mask_fits(columns: int, masked: bool) -> None:
    concept = thing("<one>", RED, (0, 50, 40, 90), masked=masked)
    for seed in range(20):
        picture, mask = strip(concept.examples[0], columns, 64, np.random.default_rng(seed))
        assert picture.shape == (64, columns, 3) and mask.shape == (64, columns)
        red = (picture[..., 0] > 170) & (picture[..., 1] < 80)
        assert red.any()
        if masked:
            edge = (
                np.abs(np.diff((mask > 127).astype(int), axis=0)).sum() + np.abs(np.diff((mask > 127).astype(int), axis=1)).sum()
            )
            repeated = red & (mask <= 127)  # the thing touches the photo's edges, which are repeated
            assert not ((mask > 127) & ~red).sum() > edge and repeated.any()
            down, across = np.nonzero(mask > 127)
            assert abs((np.ptp(down) + 1) - (np.ptp(across) + 1)) <= 2  # a square stays one
        else:
            assert (mask > 127).sum() < mask.size  # what lies beyond the photo is nothing to learn


def test_who_is_named_first_stands_on_the_left(base: Base, pair: list[Concept], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}

    def look(base: Base, examples: list[object]) -> object:
        shown[len(shown)] = examples
        return examples

    monkeypatch.setattr("spectral_diffusion.training.mixing.encoded", look)
    mixed_examples(base, pair, seed=0)
    assert len(shown) == 2
    for number, examples in shown.items():
        assert len(examples) == PICTURES
        sides = set()
        for example in examples:
            colours = np.asarray(example.picture).astype(int)
            red, green = (colours[..., own] - colours[..., other] > 60 for own, other in ((0, 1), (1, 0)))
            middle = colours.shape[1] // 2
            left, right = ("<one>", "<two>") if red[:, :middle].any() else ("<two>", "<one>")
            assert example.caption.index(left) < example.caption.index(right)
            assert not (red[:, :middle].any() and red[:, middle:].any()) and red.any() and green.any()
            place = np.asarray(example.place) > 127
            own, other = (red, green) if number == 0 else (green, red)
            assert (place & own).any() and not (place & other).any()
            assert (np.asarray(example.mask) > 127).sum() > place.sum()
            sides.add(left)
        assert sides == {"<one>", "<two>"}


def test_of_three_every_two_meet_and_all_three(base: Base, pair: list[Concept], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectral_diffusion.training.mixing.encoded", lambda base, examples: examples)
    three = [*pair, thing("<three>", RED, (5, 5, 60, 60))]
    for concept, examples in zip(three, mixed_examples(base, three, seed=0), strict=True):
        others = {other.token for other in three if other is not concept}
        met = [frozenset(token for token in others if token in example.caption) for example in examples]
        assert all(concept.token in example.caption for example in examples)
        assert set(met) == {frozenset([one]) for one in others} | {frozenset(others)}
        assert {example.picture.size for example in examples} == {(base.resolution, base.resolution)}


def test_they_are_shown_in_steps_among_the_others_only(base: Base, pair: list[Concept], monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_less(monkeypatch)
    seen: list[tuple[bool, int]] = []
    draw = batches._share

    def watch(*arguments: Any) -> dict[str, torch.Tensor]:
        share, among = draw(*arguments), arguments[-1]
        tokens = [(share["ids"][:, 0] == own).any(1) for own in share["ids"][:, 0].unique() if own >= known]
        seen.append((among, sum(int(both) for both in torch.stack(tokens).sum(0) > 1) if len(tokens) > 1 else 0))
        return share

    known = len(next(iter(base.tokenizers.values())))
    monkeypatch.setattr(batches, "_share", watch)
    bands = [Band(start=0, rank=2), Band(start=2, rank=2)]
    settings = replace(SHORT, steps=12, batch=4, presence=0.5, inertness=0.0)
    train_together(base, list(zip(pair, bands, strict=True)), replace(settings, mixing=0.5))
    beside = {among: [count for one, count in seen if one is among] for among in (True, False)}
    assert sum(beside[False]) == 0 and 0.3 < sum(beside[True]) / (4 * len(beside[True])) < 0.7
    seen.clear()
    train_together(base, list(zip(pair, bands, strict=True)), replace(settings, mixing=0.0))
    assert sum(count for _, count in seen) == 0
