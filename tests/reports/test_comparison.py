"""Comparisons: every pair of values is drawn as it says, labelled, and in the table."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from random_adapters import random_adapter

from spectral_diffusion.bases.base import Base
from spectral_diffusion.errors import InputError
from spectral_diffusion.generation.album import Album
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.generation.picture_file import read_drawing
from spectral_diffusion.reports.axis import Axis
from spectral_diffusion.reports.comparison import compare
from spectral_diffusion.scoring.score import load_scorer


def test_every_pair_of_values_is_drawn_and_scored(tiny_base: Base, photo_folder: Path, tmp_path: Path) -> None:
    adapter, drawing = random_adapter(tiny_base, size=0.3), Drawing(prompt="<V1> near a lake", steps=1, seed=4)
    x, y = Axis.parse("seed", ["1", "2"]), Axis.parse("adapter", ["fused", "bare"])
    album = Album(tmp_path, "tiny")
    references = {"<V1>": photo_folder}
    both = {"fused": adapter, "bare": None}
    result = compare(tiny_base, drawing, both, x, y, album, load_scorer(), references=references)
    (alone,) = generate(tiny_base, Drawing(prompt="<V1> near a lake", steps=1, seed=2), adapter)
    assert result.images[1].tobytes() == alone.image.tobytes()
    assert len({image.tobytes() for image in result.images}) == 4
    rows = list(csv.reader(io.StringIO(result.table())))
    assert rows[0] == ["adapter", "seed", "picture", "clip_text", "clip_image <V1>", "judged"]
    assert [row[:3] for row in rows[1:]] == [
        ["fused", "1", "0001-1.png"],
        ["fused", "2", "0002-2.png"],
        ["bare", "1", "0003-1.png"],
        ["bare", "2", "0004-2.png"],
    ]
    assert result.sheet().width > 2 * 160


def test_a_token_that_no_adapter_has_is_named(tiny_base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter, drawing = random_adapter(tiny_base), Drawing(prompt="<V1> and <W1>", steps=1)
    x, y = Axis.parse("seed", ["1"]), Axis.parse("steps", ["1"])
    compare(tiny_base, drawing, {"a": adapter}, x, y, Album(tmp_path, "tiny"), load_scorer(), references={})
    assert "No adapter has <W1>; it is read as plain letters." in caplog.text
    assert "<V1>" not in caplog.text


def test_strengths_and_samplers_reach_the_drawing(tiny_base: Base, tmp_path: Path) -> None:
    adapter, drawing = random_adapter(tiny_base, size=0.3), Drawing(prompt="<V1>", steps=2)
    x, y = Axis.parse("strength", ["0", "1"]), Axis.parse("sampler", ["DDIM", "Euler a"])
    result = compare(tiny_base, drawing, {"a": adapter}, x, y, Album(tmp_path, "tiny"), load_scorer(), references={})
    assert len({image.tobytes() for image in result.images}) == 4
    assert read_drawing(tmp_path / "0004-0.png").scheduler == "Euler a"


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        ("colour", ["red"], "There is no axis 'colour'"),
        ("seed", [" "], "has no values"),
        ("steps", ["many"], "needs numbers, got many"),
        ("sampler", ["Magic"], "There is no sampler 'Magic'"),
    ],
)
def test_axes_that_make_no_sense_are_refused(name: str, values: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Axis.parse(name, values)


def test_what_cannot_be_scored_is_said_before_anything_is_drawn(tiny_base: Base, photo_folder: Path, tmp_path: Path) -> None:
    drawing, album = Drawing(prompt="<V1>", steps=1), Album(tmp_path / "album", "tiny")
    axes = Axis.parse("seed", ["1"]), Axis.parse("steps", ["1"])
    for references, sentence in (({"<V1>": tmp_path / "nowhere"}, "does not exist"), ({"<V1>": photo_folder}, "no class word")):
        with pytest.raises(InputError, match=sentence):
            compare(tiny_base, drawing, {"a": None}, *axes, album, load_scorer(), references=references)
    assert not list(tmp_path.rglob("*.png"))


def test_unknown_adapters_and_too_many_pictures_are_refused(tiny_base: Base, tmp_path: Path) -> None:
    drawing, album, scorer = Drawing(prompt="x"), Album(tmp_path, "tiny"), load_scorer()
    one, other = Axis.parse("adapter", ["b"]), Axis.parse("seed", ["1"])
    with pytest.raises(InputError, match="There is no adapter 'b'"):
        compare(tiny_base, drawing, {"a": None}, one, other, album, scorer, references={})
    many = Axis.parse("seed", [str(seed) for seed in range(11)])
    with pytest.raises(InputError, match="too many"):
        compare(tiny_base, drawing, {"a": None}, many, many, album, scorer, references={})
