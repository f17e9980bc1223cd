"""Long prompts: they go on in a new part, as if BREAK stood there, and nothing that belongs together is divided."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_adapters import random_adapter
from shared_bases import shared_base
from transformers import CLIPTokenizer

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.attach import attached
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.generation.regions import Region
from spectral_diffusion.prompts.conditioning import tokenize
from spectral_diffusion.prompts.parts import Part, parts_of

ROOM = 30
"""Tokens in one part of what the embedded base and the tiny one read."""


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> Base:
    return shared_base("tiny", tiny_base_folder)


@pytest.fixture(scope="module")
def adapter(base: Base) -> Adapter:
    return random_adapter(base, vectors=3)


@pytest.fixture(scope="module")
def tokenizer(base: Base) -> CLIPTokenizer:
    return base.tokenizers["text_encoder"]


def filled_with(part: Part) -> int:
    """Return how many tokens stand before the end of the text."""
    return part.ids.index(part.ids[-1]) - 1


@pytest.mark.parametrize(
    ("long", "broken"),
    [
        ("dog " * ROOM, "dog " * ROOM),
        ("dog " * ROOM + "cat", "dog " * ROOM + "BREAK cat"),
        ("dog " * 15 + "(" + "dog " * 15 + "cat:1.5)", "dog " * 15 + "(" + "dog " * 15 + ":1.5) BREAK (cat:1.5)"),
        ("dog " * 29 + "unbelievably cat", "dog " * 29 + "BREAK unbelievably cat"),
        ("dog " * 20 + ", " + "cat " * 20, "dog " * 20 + ", BREAK " + "cat " * 20),
        ("dog, " + "cat " * ROOM, "dog, " + "cat " * 28 + "BREAK " + "cat " * 2),
        ("dog " * 70, "dog " * ROOM + "BREAK " + "dog " * ROOM + "BREAK " + "dog " * 10),
        ("dog " * ROOM + "cat BREAK snow", "dog " * ROOM + "BREAK cat BREAK snow"),
    ],
)
def test_a_long_prompt_is_read_as_if_break_stood_there(long: str, broken: str, tokenizer: CLIPTokenizer) -> None:
    assert parts_of(tokenizer, long, {}) == parts_of(tokenizer, broken, {})
    assert all(len(part.ids) == len(part.weights) == ROOM + 2 for part in parts_of(tokenizer, long, {}))


def test_the_vectors_of_a_token_stay_together(base: Base, adapter: Adapter) -> None:
    words = {concept.token: concept.words for concept in adapter.concepts}
    with attached(base, adapter):
        tokenizer = base.tokenizers["text_encoder"]
        for before in (28, 29):
            prompt = "dog " * before + "{}<V1> cat"
            assert parts_of(tokenizer, prompt.format(""), words) == parts_of(tokenizer, prompt.format("BREAK "), words)
        assert len(parts_of(tokenizer, "dog " * 27 + "<v1>", words)) == 1


def test_a_word_longer_than_a_part_is_divided_and_kept(tokenizer: CLIPTokenizer) -> None:
    parts = parts_of(tokenizer, "wxyz" * 40, {})
    whole = tokenizer("wxyz" * 40, add_special_tokens=False).input_ids
    assert len(whole) > ROOM and len(parts) == -(-len(whole) // ROOM)
    assert [number for part in parts for number in part.ids[1 : filled_with(part) + 1]] == whole


@pytest.mark.parametrize("confined", [False, True])
def test_the_end_of_every_long_prompt_is_seen(confined: bool, base: Base, adapter: Adapter) -> None:
    """Also where another model reads a class word for a token of several vectors, and so has fewer parts."""
    pair = fuse([adapter, random_adapter(base, token="<V2>", start=2, seed=1)], method="sum")
    long = "dog " * 28
    left, right = Region(prompt="<V1>", box=(0, 0, 0.5, 1)), Region(prompt="<V2>", box=(0.5, 0, 1, 1))
    plain = {"prompt": f"{long} <V1>", "negative_prompt": "snow", "regions": (left, right), "steps": 1, "confined": confined}
    drawn = [
        generate(base, Drawing(**plain | changed), pair)[0].image.tobytes()
        for changed in (
            {},
            {"prompt": f"{long} <V1> at night", "regions": (Region(prompt="<V1>", box=(0, 0, 0.5, 1)),)},
            {"prompt": f"{long} <V1> by day", "regions": (Region(prompt="<V1>", box=(0, 0, 0.5, 1)),)},
            {"negative_prompt": f"{long} snow and rain"},
            {"negative_prompt": f"{long} snow and hail"},
            {"regions": (left, Region(prompt=f"{long} <V1> and <V2>", box=(0.5, 0, 1, 1)))},
            {"regions": (left, Region(prompt=f"{long} <V1> and <V2> asleep", box=(0.5, 0, 1, 1)))},
        )
    ]
    assert len(set(drawn)) == len(drawn)


def test_a_caption_that_is_cut_is_said_once(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    long = "a dog " * ROOM
    tokenize(base, [long, "a cat", long])
    assert [record.getMessage() for record in caplog.records] == [
        f"The caption '{long}' will be read up to its {ROOM}th token only; shorten it."
    ]
