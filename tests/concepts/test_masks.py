"""Suggested masks: what stands out is white, what the user made stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from commands import Commands
from PIL import Image, ImageDraw

from spectral_diffusion.concepts.concept import load_concept
from spectral_diffusion.concepts.masks import suggest_mask, write_suggested_masks
from spectral_diffusion.errors import PhotoError

THING = (60, 40, 140, 150)


def photo(thing: bool = True) -> Image.Image:
    """A red ellipse, or nothing, before a grainy blue wall."""
    grain = np.random.default_rng(2).integers(-12, 12, (160, 200, 3))
    picture = Image.fromarray(np.clip(np.array([40, 80, 170]) + grain, 0, 255).astype(np.uint8))
    if thing:
        ImageDraw.Draw(picture).ellipse(THING, fill=(200, 40, 30))
    return picture


def test_a_thing_before_a_plain_wall_is_found_whole_and_alone() -> None:
    mask = suggest_mask(photo())
    assert mask is not None and (mask.mode, mask.size) == ("L", (200, 160))
    truth = Image.new("L", mask.size)
    ImageDraw.Draw(truth).ellipse(THING, fill=255)
    found, wanted = np.asarray(mask) > 127, np.asarray(truth) > 127
    assert (found & wanted).sum() / (found | wanted).sum() > 0.93
    assert np.array_equal(np.asarray(suggest_mask(photo())), np.asarray(mask))


def test_nothing_is_suggested_where_nothing_stands_out() -> None:
    assert suggest_mask(Image.new("RGB", (64, 64), (9, 90, 200))) is None


@pytest.mark.parametrize("size", [(32, 2048), (2048, 32), (33, 1500)])
def test_a_narrow_picture_is_looked_at_without_failing(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, (40, 80, 170))
    ImageDraw.Draw(picture).ellipse([8, 8, 24, 24], fill=(200, 40, 30))
    assert suggest_mask(picture) is None


def test_masks_are_written_beside_photos_and_never_over_one(run: Commands, tmp_path: Path) -> None:
    for name in ("1", "2"):
        photo().transpose(Image.Transpose.FLIP_LEFT_RIGHT if name == "2" else Image.Transpose.FLIP_TOP_BOTTOM).save(
            tmp_path / f"{name}.png"
        )
    own = Image.new("L", (200, 160), 255)
    own.save(tmp_path / "1-mask.png")
    kept = (tmp_path / "1-mask.png").read_bytes()
    run("mask", tmp_path)
    assert "2-mask.png  " in run.out and "1-mask.png" not in run.out
    assert (tmp_path / "1-mask.png").read_bytes() == kept
    examples = load_concept(tmp_path, token="<V1>", class_word="ball").examples
    assert all(example.mask is not None for example in examples)
    assert write_suggested_masks(tmp_path) == ()
    with pytest.raises(PhotoError, match="does not exist"):
        write_suggested_masks(tmp_path / "nowhere")
