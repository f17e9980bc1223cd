"""Settings in picture files: what is written is read back, and what cannot be used is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from spectral_diffusion.errors import InputError
from spectral_diffusion.generation.drawing import Drawing, Picture
from spectral_diffusion.generation.picture_file import OWN_CHUNK, read_drawing, save_picture
from spectral_diffusion.generation.regions import Region

FORM = Image.linear_gradient("L")
DRAWINGS = [
    Drawing(prompt="a dog", seed=3, guidance=5.0),
    Drawing(prompt='<V1>, "big": 1\nSteps and stones', negative_prompt="blurred, bad", guidance=5.0, scheduler="DPM++ 2M Karras"),
    Drawing(prompt="a dog", guidance=5.0, scheduler="DPM++ 2M"),
    Drawing(prompt="x", negative_prompt="two\nlines", steps=7, guidance=2.5, size=(48, 64)),
    Drawing(
        prompt="a lake",
        guidance=7.5,
        regions=(Region(prompt="<V1>", box=(0.0, 0.25, 0.5, 1.0)), Region(prompt="<V2>", negative_prompt="fog", mask=FORM)),
        confined=True,
    ),
]


def save_with(path: Path, parameters: str) -> Path:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("parameters", parameters)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return path


@pytest.mark.parametrize("drawing", DRAWINGS)
def test_what_is_written_is_read_back(drawing: Drawing, tmp_path: Path) -> None:
    image = Image.new("RGB", drawing.size or (64, 64))
    picture = Picture(image=image, seed=9, drawing=drawing, tokens=(), class_words={})
    save_picture(picture, tmp_path / "p.png", "base, with: marks")
    read = read_drawing(tmp_path / "p.png")
    expected = {"prompt", "negative_prompt", "steps", "guidance", "scheduler"}
    assert {name: getattr(read, name) for name in expected} == {name: getattr(drawing, name) for name in expected}
    assert (read.seed, read.size, read.count) == (9, image.size, 1)
    assert (read.regions, read.confined) == (drawing.regions, drawing.confined)


@pytest.mark.parametrize(
    "parameters",
    [
        "a dog\nsits\nNegative prompt: fog\nrain\nSteps: 3, Sampler: DDIM, Seed: 1\n",
        "a dog\r\nsits\r\nNegative prompt: fog\r\nrain\r\nSteps: 3, Sampler: DDIM, Seed: 1\r\n",
        "a dog \nsits\nNegative prompt:fog\nrain\n Steps: 3, Sampler: DDIM, Seed: 1",
    ],
)
def test_lines_are_told_apart_as_automatic1111_does_it(parameters: str, tmp_path: Path) -> None:
    read = read_drawing(save_with(tmp_path / "p.png", parameters))
    assert (read.prompt, read.negative_prompt, read.steps) == ("a dog\nsits", "fog\nrain", 3)


@pytest.mark.parametrize(
    ("pairs", "scheduler"),
    [
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "DPM++ 2M Karras"),
        ("Sampler: DPM++ 2M, Schedule type: Uniform", "DPM++ 2M"),
        ("Sampler: DPM++ 2M", "DPM++ 2M"),
        ("Sampler: Euler, Schedule type: Automatic", "Euler"),
    ],
)
def test_a_sampler_of_automatic1111_is_the_one_that_it_means(pairs: str, scheduler: str, tmp_path: Path) -> None:
    assert read_drawing(save_with(tmp_path / "p.png", f"a dog\nSteps: 3, {pairs}, Seed: 1")).scheduler == scheduler


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ("", "does not say how it was drawn"),
        ("a dog\nSteps: 3", "does not say how it was drawn"),
        ("Negative prompt: fog\nSteps: 3, Sampler: DDIM, Seed: 1", "does not say how it was drawn"),
        ("a dog\nSteps: 3, Sampler: Magic, Seed: 1", "no sampler 'Magic'"),
        ("a dog\nSteps: x, Sampler: DDIM, Seed: 1", "are damaged"),
        ('a dog\nSteps: 3, Sampler: "\\x", Seed: 1', "are damaged"),
    ],
)
def test_unusable_settings_are_said(parameters: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        read_drawing(save_with(tmp_path / "p.png", parameters))


@pytest.mark.parametrize(
    "own",
    [
        "[]",
        '{"regions": [{"box": [0, 0, 1, 1]}]}',
        '{"regions": 3}',
        "{",
        '{"regions": [{"prompt": "a", "mask": "/etc/passwd"}]}',
    ],
)
def test_damaged_regions_are_said(own: str, tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("parameters", "a dog\nSteps: 3, Sampler: DDIM, Seed: 1")
    chunks.add_itxt(OWN_CHUNK, own)
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png", pnginfo=chunks)
    with pytest.raises(InputError, match="are damaged"):
        read_drawing(tmp_path / "p.png")


def test_other_files_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_text("<svg/>")
    with pytest.raises(InputError, match="is no PNG picture"):
        read_drawing(tmp_path / "p.png")
