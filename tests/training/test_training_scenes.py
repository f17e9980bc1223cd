"""Pictures of a concept beside things that the base draws: where it stands, what is learnt there, and when they are shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from short_trainings import SHORT, prepare_less

from spectral_diffusion.bases.base import Base, load_base
from spectral_diffusion.concepts.concept import Concept, Example
from spectral_diffusion.concepts.photos import Photo
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.training import batches, examples, scenes, train
from spectral_diffusion.training.scenes import scene_examples

RED, GREY = (220, 30, 30), (128, 128, 128)
BAND = Band(start=0, rank=2)


def thing(*, masked: bool = True) -> Concept:
    """Return a concept of one grey photo, 120 x 90, with a red box in it."""
    picture, mask = Image.new("RGB", (120, 90), GREY), Image.new("L", (120, 90))
    for image, fill in ((picture, RED), (mask, 255)):
        ImageDraw.Draw(image).rectangle([30, 30, 89, 79], fill=fill)
    example = Example(photo=Photo(path=Path("1.png"), image=picture), caption="<TOK> in the snow", mask=mask if masked else None)
    return Concept(token="<one>", class_word="dog", examples=(example,), source=Path())


def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "PICTURES", 8)
    monkeypatch.setattr(scenes, "DRAWING_STEPS", 2)


def test_the_concept_stands_in_its_place_as_it_is_and_the_base_draws_the_rest(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer(monkeypatch)
    crops: list[examples.Crop] = []
    encoded = scenes.encoded

    def look(base: Base, given: list[examples.Crop]) -> examples.EncodedExamples:
        crops.extend(given)
        return encoded(base, given)

    monkeypatch.setattr(scenes, "encoded", look)
    found = scene_examples(base, thing(), seed=0)
    assert found is not None and (found.alone, found.scenes, len(found.latents), len(crops)) == (0, 8, 8, 8)
    before = encoded(base, crops).latents
    places = set()
    for number, crop in enumerate(crops):
        assert crop.caption.endswith(" in the snow") and "a dog" not in crop.caption
        names = crop.caption.removesuffix(" in the snow").replace(" and ", ", ").split(", ")
        assert len(names) == 2 + number % 2
        place = np.asarray(crop.place) > 127
        red = np.asarray(crop.picture)[..., 0].astype(int) - np.asarray(crop.picture)[..., 1] > 60
        inner, outer = (np.asarray(crop.place.filter(kind(3))) > 127 for kind in (ImageFilter.MinFilter, ImageFilter.MaxFilter))
        assert red[inner].all() and not red[~outer].any()  # the mask lies on the thing
        middle = np.flatnonzero(place.any(0)).mean() / place.shape[1]
        own = names.index("<one>")
        assert int(middle * len(names)) == own
        places.add((len(names), own))
        is_own = found.places[number] > 0.9
        moved = (found.latents[number] - before[number]).abs().amax(0, keepdim=True)
        assert float(moved[is_own].max()) < 1e-5 and float(moved[found.places[number] == 0].median()) > 0.05
        assert float(found.known[number][is_own].min()) == 1 and 0 < float((found.known[number] == 0).float().mean()) < 0.5
    assert len(places) > 3


@pytest.mark.parametrize("box", [(30, 30, 89, 79), (0, 0, 119, 89), (100, 5, 119, 60), (50, 70, 52, 89)])
def test_only_what_shows_is_resized_and_comes_out_as_of_the_whole(box: tuple[int, int, int, int]) -> None:
    rng = np.random.default_rng(1)
    photo = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).resize((120, 90), Image.Resampling.BICUBIC)
    mask, side = Image.new("L", photo.size), 64
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    for scale in (0.2, 0.7, 1.6, 4.0):
        size = round(photo.width * scale), round(photo.height * scale)
        corner = round(21 - box[0] * scale), round(0.88 * side - box[3] * scale)
        picture, place = scenes._placed(photo, mask, size, corner, side)
        columns, rows = (np.clip(np.arange(side) - start, 0, limit - 1) for start, limit in zip(corner, size, strict=True))
        whole = np.asarray(photo.resize(size, Image.Resampling.LANCZOS))[rows][:, columns]
        pasted = Image.new("L", (side, side))
        pasted.paste(mask.resize(size, Image.Resampling.LANCZOS), corner)
        for found, wanted in ((picture, whole), (place, np.asarray(pasted))):
            assert np.abs(found.astype(int) - wanted).max() <= 1


def test_a_dot_on_a_large_photo_is_enlarged_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    picture, mask = Image.new("RGB", (2048, 2048), GREY), Image.new("L", (2048, 2048))
    mask.putpixel((3, 5), 255)
    (example,) = thing().examples
    dotted = replace(example, photo=replace(example.photo, image=picture), mask=mask)
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def watch(image: Image.Image, size: tuple[int, int], *arguments: Any, **options: Any) -> Image.Image:
        sizes.append(size)
        assert max(size) <= 64
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", watch)
    begun = scenes._begin(dotted, thing(), 2, 64, np.random.default_rng(0))
    assert begun.crop.picture.size == begun.crop.place.size == (64, 64) and sizes


def test_what_is_cut_out_reaches_as_far_around_it_on_every_side() -> None:
    (example,) = thing().examples
    begun = scenes._begin(example, thing(), 2, 64, np.random.default_rng(0))
    reach = ImageFilter.MaxFilter(2 * round(scenes.MARGIN * 64) + 1)
    assert np.array_equal(np.asarray(begun.cut), np.asarray(begun.crop.place.filter(reach)))


def test_the_embedded_base_draws_around_a_concept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fewer(monkeypatch)
    found = scene_examples(load_base(), thing(), seed=0)
    assert found is not None and found.latents.isfinite().all()


def test_without_a_mask_it_is_shown_by_itself(base: Base) -> None:
    assert scene_examples(base, thing(masked=False), seed=0) is None


def test_what_the_base_drew_around_it_is_not_learnt(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    fewer(monkeypatch)
    found = scene_examples(base, thing(), seed=0)
    assert found is not None
    photos = batches.Photos(examples=replace(found, scenes=0, alone=8), ids=torch.zeros(8, 1, 4), tokens=torch.zeros(8, 4))
    samples = photos.samples(base, replace(SHORT, background=1.0), 32, torch.Generator().manual_seed(0), among=False)
    weights = samples["weights"]
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
    assert 0.05 < float((weights == 0).float().mean()) < 0.5  # in its place, around it


def test_a_training_is_the_same_whatever_the_last_bit_of_its_latents(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    fewer(monkeypatch)
    found = scene_examples(base, thing(), seed=0)
    assert found is not None

    def told(given: examples.EncodedExamples) -> list[torch.Tensor]:
        return list(batches.Photos(examples=given, ids=torch.zeros(8, 1, 4), tokens=torch.zeros(8, 4)).identity())

    moved = replace(found, latents=found.latents + 1e-6)
    assert all(one.equal(other) for one, other in zip(told(found), told(moved), strict=True))
    photo = thing().examples[0].photo
    touched = photo.image.copy()
    touched.putpixel((touched.width // 2, touched.height // 2), (1, 2, 3))
    other = replace(thing(), examples=(replace(thing().examples[0], photo=replace(photo, image=touched)),))
    changed = scene_examples(base, other, seed=0)
    assert changed is not None
    assert not all(one.equal(another) for one, another in zip(told(found), told(changed), strict=True))


@pytest.mark.parametrize("presence", [0.0, 0.5])
def test_the_share_of_scenes_is_that_which_was_asked_for(base: Base, monkeypatch: pytest.MonkeyPatch, presence: float) -> None:
    prepare_less(monkeypatch)
    seen: list[float] = []
    draw = batches._share

    def watch(*arguments: Any) -> dict[str, torch.Tensor]:
        share = draw(*arguments)
        seen.extend((share["weights"] == 0).flatten(1).any(1).float().tolist())
        return share

    monkeypatch.setattr(batches, "_share", watch)
    settings = replace(SHORT, steps=12, batch=8, presence=presence, inertness=0.0, background=1.0)
    for scenes_share, least, most in ((0.5, 0.35, 0.65), (0.0, 0.0, 0.0)):
        seen.clear()
        train(base, thing(), BAND, replace(settings, scenes=scenes_share))
        assert least <= sum(seen) / len(seen) <= most


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_bases_of_every_family_draw_scenes(family: str, loaded_bases: dict[str, Base], monkeypatch: pytest.MonkeyPatch) -> None:
    fewer(monkeypatch)
    found = scene_examples(loaded_bases[family], thing(), seed=0)
    assert found is not None and bool(found.latents.isfinite().all()) and len(found.latents) == 8
