"""A sketch says where things stand: T2I-Adapters of the published structure on small bases, beside diffusers' own pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionAdapterPipeline, StableDiffusionXLAdapterPipeline, T2IAdapter
from PIL import ExifTags, Image, ImageDraw
from random_adapters import random_adapter
from shared_bases import shared_base
from studios import work

from app.actions import pictures as actions
from app.actions.pictures import condition_from, drawing_from
from app.actions.studio import Studio
from app.jobs import State
from spectral_diffusion.bases.base import Base, load_base
from spectral_diffusion.cli import main
from spectral_diffusion.errors import InputError
from spectral_diffusion.generation.condition_picture import (
    Condition,
    condition_from_record,
    condition_record,
    read_condition,
    traced,
)
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.generation.picture_file import save_picture
from spectral_diffusion.generation.regions import Region
from spectral_diffusion.prompts.conditioning import prompts
from spectral_diffusion.toyworld.judge import load_judge

KINDS = {
    "sd1": {"in_channels": 1, "channels": [32, 32, 64, 64], "adapter_type": "full_adapter"},
    "sd2": {"in_channels": 3, "channels": [32, 32, 64], "adapter_type": "light_adapter"},
    "sdxl": {"in_channels": 3, "channels": [32, 32, 64, 64], "downscale_factor": 16, "adapter_type": "full_adapter_xl"},
    "tiny": {"in_channels": 1, "channels": [32, 64], "adapter_type": "full_adapter_xl"},
}
PIPELINES = {"sd1": StableDiffusionAdapterPipeline, "sdxl": StableDiffusionXLAdapterPipeline}

OPTIONS = {"sd1": {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}, "sdxl": {}}


@pytest.fixture(scope="session")
def condition_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a random T2I-Adapter of one of `KINDS`, with the published structure but few channels."""
    folder = tmp_path_factory.mktemp("condition-adapters")

    def make(kind: str) -> Path:
        if not (folder / kind).exists():
            torch.manual_seed(0)
            T2IAdapter(num_res_blocks=1, **KINDS[kind]).save_pretrained(folder / kind)
        return folder / kind

    return make


def sketch(width: int = 64, height: int = 64, mode: str = "RGB") -> Image.Image:
    image = Image.new("L", (width, height), 0)
    ImageDraw.Draw(image).ellipse([width // 8, height // 4, width // 2, height - 8], outline=255, width=3)
    return image.convert(mode)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_it_draws_what_the_pipeline_of_diffusers_draws(
    family: str, loaded_bases: dict[str, Base], condition_adapter: Callable[[str], Path]
) -> None:
    base, folder = loaded_bases[family], condition_adapter(family)
    condition = Condition(image=sketch(), adapter=str(folder), strength=0.8)
    ours, bare = (generate(base, Drawing(prompt="a dog", steps=2, seed=3, condition=used))[0] for used in (condition, None))
    with torch.no_grad():
        components = {name: part for name, part in base.pipeline.components.items() if part is not None}
        reader = T2IAdapter.from_pretrained(folder)
        pipeline = PIPELINES[family](**components, adapter=reader, **OPTIONS[family])
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline(
            **prompts(base, ["a dog"], [""]),
            image=sketch(mode="L" if family == "sd1" else "RGB"),
            adapter_conditioning_scale=0.8,
            num_inference_steps=2,
            guidance_scale=5.0,
            width=64,
            height=64,
            generator=torch.Generator().manual_seed(3),
        ).images[0]
    apart = [np.abs(np.asarray(ours.image, dtype=int) - np.asarray(other, dtype=int)).max() for other in (theirs, bare.image)]
    assert apart[0] <= 1 < apart[1]  # a level of round-off: the texts are encoded in another batch


def test_a_condition_of_another_size_is_scaled_and_felt_beside_regions(
    tiny_base_folder: Path, condition_adapter: Callable[[str], Path]
) -> None:
    base, folder = shared_base("tiny", tiny_base_folder), str(condition_adapter("tiny"))
    adapter = random_adapter(base)
    place = {"prompt": "a lake", "steps": 2, "regions": (Region(prompt="<V1>", box=(0, 0, 0.5, 1)),), "confined": True}
    images = {None: None, "own": sketch(32, 32), "large": sketch(320, 320), "none": Image.new("L", (32, 32), 0)}
    drawn = {}
    for name, image in images.items():
        condition = image and Condition(image=image, adapter=folder)
        pictures = generate(base, Drawing(**place, count=3, condition=condition), adapter, batch=2)
        drawn[name] = b"".join(picture.image.tobytes() for picture in pictures)
    assert len(set(drawn.values())) == 4
    nothing = Condition(image=sketch(32, 32), adapter=folder, strength=0)
    assert generate(base, Drawing(**place, condition=nothing), adapter)[0].image.tobytes() == drawn[None][: 32 * 32 * 3]
    assert not base.pipeline.unet._forward_pre_hooks


def test_light_adapters_fit_too(loaded_bases: dict[str, Base], condition_adapter: Callable[[str], Path]) -> None:
    condition = Condition(image=sketch(96, 64), adapter=str(condition_adapter("sd2")))
    with_it, without = (
        generate(loaded_bases["sd2"], Drawing(prompt="a dog", steps=1, size=(96, 64), condition=used))
        for used in (condition, None)
    )
    assert with_it[0].image.tobytes() != without[0].image.tobytes()


def test_a_condition_that_does_not_suit_is_one_sentence(
    tiny_base_folder: Path, condition_adapter: Callable[[str], Path], tmp_path: Path, loaded_bases: dict[str, Base]
) -> None:
    base, folder = shared_base("tiny", tiny_base_folder), str(condition_adapter("tiny"))
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    wrong = [
        (Condition(image=sketch(64, 48), adapter=folder), "The condition is 64 x 48 pixels, the picture 32 x 32"),
        (Condition(image=sketch(), adapter=str(condition_adapter("sd1"))), "gives 32 channels of 4 x 4.* reads 32 channels"),
        (Condition(image=sketch(), adapter=str(tiny_base_folder / "unet")), "is a UNet2DConditionModel; give a T2I-Adapter"),
        (Condition(image=sketch(), adapter=str(tmp_path / "empty")), "cannot be loaded .*; give a diffusers folder"),
        (Condition(image=sketch(), adapter="nobody/nothing"), "cannot be loaded .*; give a diffusers folder"),
    ]
    for condition, message in wrong:
        with pytest.raises(InputError, match=message):
            generate(base, Drawing(prompt="a dog", steps=1, condition=condition))
    odd = Condition(image=sketch(72, 72), adapter=str(condition_adapter("sdxl")))
    with pytest.raises(InputError, match="wants a size of multiples of 16 pixels, got 72 x 72"):
        generate(loaded_bases["sdxl"], Drawing(prompt="a dog", steps=1, size=(72, 72), condition=odd))
    with pytest.raises(InputError, match="has no T2I-Adapter of its own; name one of its family"):
        generate(loaded_bases["sdxl"], Drawing(prompt="a dog", steps=1, condition=Condition(image=sketch())))
    with pytest.raises(InputError, match="strength must not be negative, got -1"):
        Condition(image=sketch(), adapter=folder, strength=-1)
    for file in (tmp_path / "text.png", tmp_path / "missing.png", tmp_path):
        with pytest.raises(InputError, match="The condition cannot be read"):
            read_condition(file, folder)


def test_a_condition_is_read_like_a_photo(tmp_path: Path) -> None:
    upright, exif = Image.new("RGB", (64, 96), (200, 30, 90)), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.jpg", exif=exif)
    assert read_condition(tmp_path / "phone.jpg", photo=True).image.size == (64, 96)
    lines = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    lines.paste((255, 255, 255, 255), (0, 30, 64, 34))
    lines.save(tmp_path / "lines.png")
    assert np.asarray(read_condition(tmp_path / "lines.png").image).mean() == pytest.approx(255 / 16)
    Image.new("RGB", (4608, 3456)).save(tmp_path / "camera.jpg")
    condition = read_condition(tmp_path / "camera.jpg", photo=True)
    assert condition_from_record(**condition_record(condition)).image.tobytes() == condition.image.tobytes()


def test_the_command_line_takes_a_condition(
    tiny_base_folder: Path, condition_adapter: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sketch().save(tmp_path / "sketch.png")
    words = ["generate", "--base", str(tiny_base_folder), "--prompt", "a lake", "--steps", "1", "--seed", "1"]
    condition = ["--condition", str(tmp_path / "sketch.png"), "--condition-adapter", str(condition_adapter("tiny"))]
    assert main([*words, "--out", str(tmp_path / "plain")]) == 0
    assert main([*words, "--out", str(tmp_path / "followed"), *condition, "--condition-strength", "2"]) == 0
    plain, followed = (Image.open(tmp_path / name / "0001-1.png") for name in ("plain", "followed"))
    assert plain.tobytes() != followed.tobytes()
    own = json.loads(followed.text["spectral_diffusion"])
    assert own["condition"] == {"adapter": str(condition_adapter("tiny")), "strength": 2, "photo": False}
    for options in (condition[2:], ["--condition-photo"]):
        assert main([*words, "--out", str(tmp_path / "plain"), *options]) == 1
        assert f"{options[0]} says how --condition is read; give the picture too" in capsys.readouterr().err


def test_the_file_of_a_picture_without_a_condition_names_none(tiny_base_folder: Path, tmp_path: Path) -> None:
    (picture,) = generate(shared_base("tiny", tiny_base_folder), Drawing(prompt="a dog", steps=1))
    save_picture(picture, tmp_path / "a.png", "tiny")
    assert "condition" not in json.loads(Image.open(tmp_path / "a.png").text["spectral_diffusion"])


def test_the_studio_draws_along_a_condition(
    tiny_studio: Studio, tiny_base_folder: Path, condition_adapter: Callable[[str], Path], tmp_path: Path
) -> None:
    sketch(32, 32).save(tmp_path / "sketch.png")
    condition = condition_from(str(tmp_path / "sketch.png"), True, f" {condition_adapter('tiny')} ", 1.5)
    drawing = drawing_from({"prompt": "a dog", "steps": 1, "seed": 3})
    actions.generate(tiny_studio, None, replace(drawing, condition=condition))
    assert work(tiny_studio) == [State.DONE], tiny_studio.jobs.jobs()[0].reason
    (card,) = actions.picture_cards(tiny_studio)
    (ours,) = generate(shared_base("tiny", tiny_base_folder), replace(drawing, condition=condition))
    with Image.open(card.path) as drawn:
        assert drawn.tobytes() == ours.image.tobytes()


def test_the_studio_says_what_is_missing_beside_an_adapter(tmp_path: Path) -> None:
    assert condition_from(None, False, " ", 1.0) is None
    with pytest.raises(InputError, match="'folder' has nothing to read; give a sketch or pose too"):
        condition_from(None, False, " folder ", 1.0)
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(InputError, match=r"The condition cannot be read. '.*a\.png': The file is damaged"):
        condition_from(str(tmp_path / "a.png"), False, "folder", 1.0)


def test_a_photo_is_traced_at_the_pictures_size(tiny_base_folder: Path, condition_adapter: Callable[[str], Path]) -> None:
    photo = Image.new("RGB", (320, 320), (40, 120, 60))
    ImageDraw.Draw(photo).rectangle([80, 80, 239, 239], fill=(230, 210, 200))
    small = photo.resize((32, 32), Image.Resampling.LANCZOS)
    lines = np.asarray(traced(small))
    assert set(np.unique(lines)) == {0, 255}
    assert lines[7:9, 12:20].any(axis=0).all() and lines[12:20, 23:25].any(axis=1).all()  # the square's upper and right edge
    assert not lines[10:22, 10:22].any() and not lines[:6].any()
    base, folder = shared_base("tiny", tiny_base_folder), str(condition_adapter("tiny"))
    of_photo, of_lines = (
        generate(base, Drawing(prompt="a dog", steps=1, condition=condition))[0].image.tobytes()
        for condition in (Condition(image=photo, adapter=folder, photo=True), Condition(image=traced(small), adapter=folder))
    )
    assert of_photo == of_lines


def test_the_embedded_base_draws_things_where_a_sketch_has_them() -> None:
    base, judge = load_base(), load_judge()
    for left, side in ((4, range(0, 32)), (34, range(32, 64))):
        lines = Image.new("L", (64, 64))
        ImageDraw.Draw(lines).ellipse([left, 24, left + 25, 56], outline=255)
        drawing = Drawing(prompt="a lion near a lake", count=4, seed=5, condition=Condition(image=lines))
        looks = judge.look([picture.image for picture in generate(base, drawing)])
        assert [first.character for first, *_ in looks] == ["lion"] * 4
        assert all(round(64 * first.x) in side for first, *_ in looks)
