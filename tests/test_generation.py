"""Drawing: repeatable pictures, samplers by their usual names, settings inside the files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_parametrisations import random_adapter, shared_base

from spectral_diffusion.adapter import Adapter
from spectral_diffusion.base import Base
from spectral_diffusion.errors import InputError
from spectral_diffusion.fusion import fuse
from spectral_diffusion.generation import SCHEDULERS, Drawing, generate, named_only
from spectral_diffusion.picture_file import OWN_CHUNK, save_picture


@pytest.fixture
def base(tiny_base_folder: Path) -> Base:
    return shared_base("tiny", tiny_base_folder)


@pytest.fixture
def pair(base: Base) -> Adapter:
    return fuse([random_adapter(base, "additive", token=f"<V{n}>", start=2 * n, seed=n) for n in (1, 2)], method="sum")


def test_a_seed_draws_the_same_picture_in_any_batch(base: Base, pair: Adapter) -> None:
    drawing = Drawing(prompt="<V1> near a lake", count=3, seed=7, steps=2)
    at_once = generate(base, drawing, pair, batch=3)
    one_by_one = generate(base, drawing, pair, batch=1)
    assert [picture.seed for picture in at_once] == [7, 8, 9]
    for one, other in zip(at_once, one_by_one, strict=True):
        # A batch sums in another order: at most one step of 255.
        assert np.abs(np.asarray(one.image, dtype=int) - np.asarray(other.image, dtype=int)).max() <= 1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_sampler_draws_and_leaves_the_bases_own_in_place(base: Base, name: str) -> None:
    own = base.pipeline.scheduler
    picture = generate(base, Drawing(prompt="a dog", steps=3, scheduler=name))[0].image
    assert np.asarray(picture).std() > 0
    assert base.pipeline.scheduler is own


def test_only_the_concepts_in_the_prompt_are_attached(base: Base, pair: Adapter) -> None:
    assert named_only(pair, "a <v2> in the snow").tokens == ("<V2>",)
    drawing = Drawing(prompt="<V1> near a lake", steps=2)
    named = generate(base, drawing, pair)[0]
    alone = generate(base, drawing, pair.only(["<V1>"]), whole=True)[0]
    whole = generate(base, drawing, pair, whole=True)[0]
    assert named.tokens == ("<V1>",)
    assert np.array_equal(np.asarray(named.image), np.asarray(alone.image))
    assert not np.array_equal(np.asarray(whole.image), np.asarray(alone.image))


def test_the_file_says_how_it_was_drawn(base: Base, pair: Adapter, tmp_path: Path) -> None:
    drawing = Drawing(prompt="<V1> and <V2>, near: a lake", negative_prompt="dark", seed=3, steps=2, scheduler="DPM++ 2M Karras")
    picture = generate(base, drawing, pair)[0]
    save_picture(picture, tmp_path / "picture.png", "tiny")
    with Image.open(tmp_path / "picture.png") as opened:
        lines = opened.text["parameters"].split("\n")
        own = json.loads(opened.text[OWN_CHUNK])
    assert lines[:2] == [drawing.prompt, "Negative prompt: dark"]
    pairs = dict(part.split(": ", 1) for part in lines[2].split(", "))
    expected = {"Steps": "2", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "5", "Seed": "3", "Size": "32x32"}
    assert expected.items() <= pairs.items()
    assert own["class_words"] == pair.class_words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"count": 0}, "count must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"scheduler": "Oiler"}, "no sampler 'Oiler'"),
        ({"size": (60, 64)}, "multiples of 8"),
    ],
)
def test_a_wrong_drawing_is_refused_by_its_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Drawing(**({"prompt": "a dog"} | change))


def test_drawing_changes_nothing_in_the_base(base: Base, pair: Adapter) -> None:
    before = {name: value.clone() for name, value in base.pipeline.unet.state_dict().items()}
    generate(base, Drawing(prompt="<V1>", steps=1), pair)
    after = base.pipeline.unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
