"""Drawing: the same seed gives the same picture, and the file says how it was drawn."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from apple import OnApple
from diffusers import DDIMScheduler
from drawn_pictures import difference
from PIL import Image
from random_adapters import random_adapter
from shared_bases import BASES, shared_base

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base
from spectral_diffusion.errors import InputError, StorageError
from spectral_diffusion.generation.drawing import SCHEDULERS, Drawing, Picture
from spectral_diffusion.generation.generate import generate, named_only
from spectral_diffusion.generation.picture_file import save_picture


@pytest.fixture
def pair(base: Base) -> Adapter:
    return fuse([random_adapter(base), random_adapter(base, token="<V2>", start=2, vectors=2, seed=1)], method="sum")


@pytest.mark.parametrize("scheduler", ["DDIM", "Euler a"])
def test_a_seed_gives_its_picture_whatever_the_batch(scheduler: str, base: Base, pair: Adapter) -> None:
    prompt = "<V1> and <V2> near a lake"
    told: list[Picture] = []
    together = generate(
        base, Drawing(prompt=prompt, count=3, seed=5, steps=3, scheduler=scheduler), pair, batch=2, on_picture=told.append
    )
    assert [picture.seed for picture in together] == [5, 6, 7] and told == together
    for picture in together:
        (alone,) = generate(base, Drawing(prompt=prompt, seed=picture.seed, steps=3, scheduler=scheduler), pair)
        assert difference(picture, alone) <= 1  # float32 round-off of another batch size, rounded to a level
    assert difference(together[0], together[1]) > 20


def test_as_many_are_drawn_at_once_as_memory_allows(
    tiny_base: Base, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drawing = Drawing(prompt="a dog", count=3, seed=5, steps=2)
    unhindered = generate(tiny_base, drawing)
    alone, samples_at_once, tried = tiny_base.pipeline.unet.forward, 4, []

    def forward(sample: torch.Tensor, *positional: object, **named: object) -> object:
        tried.append(len(sample))
        if len(sample) > samples_at_once:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return alone(sample, *positional, **named)

    monkeypatch.setattr(tiny_base.pipeline.unet, "forward", forward)
    hindered = generate(tiny_base, drawing)
    assert tried == [6, 2, 2, 2, 2, 2, 2] and [picture.seed for picture in hindered] == [5, 6, 7]
    assert all(difference(one, other) <= 1 for one, other in zip(hindered, unhindered, strict=True))
    assert "Memory does not suffice for 3 pictures at once; it goes on with 1." in caplog.text
    samples_at_once = 1
    with pytest.raises(InputError, match=r"does not suffice for a picture of 32 x 32 pixels; choose a smaller size, or close"):
        generate(tiny_base, drawing)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_sampler_draws(scheduler: str, base: Base) -> None:
    kept = base.pipeline.scheduler
    (picture,) = generate(base, Drawing(prompt="a dog", steps=3, scheduler=scheduler))
    assert np.asarray(picture.image).std() > 1
    assert base.pipeline.scheduler is kept


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "Heun"])
@pytest.mark.parametrize("ends_in_noise", [False, True])
def test_every_sampler_has_the_noise_that_the_base_was_trained_with(
    scheduler: str, ends_in_noise: bool, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = DDIMScheduler.from_config(base.pipeline.scheduler.config, rescale_betas_zero_snr=ends_in_noise)
    monkeypatch.setattr(base.pipeline, "scheduler", kept)
    remaining: list[torch.Tensor] = []

    def look(picture: Picture) -> None:
        remaining.append(base.pipeline.scheduler.alphas_cumprod)

    generate(base, Drawing(prompt="a dog", steps=3, scheduler=scheduler), on_picture=look)
    torch.testing.assert_close(remaining[0], kept.alphas_cumprod, rtol=1e-4, atol=1e-6)
    assert (remaining[0][-1] < 1e-6) == ends_in_noise


def test_what_a_training_left_on_apples_gpu_is_no_hindrance(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = DDIMScheduler.from_config(base.pipeline.scheduler.config, rescale_betas_zero_snr=True)
    kept.alphas_cumprod = kept.alphas_cumprod.as_subclass(OnApple)
    monkeypatch.setattr(base.pipeline, "scheduler", kept)
    assert generate(base, Drawing(prompt="a dog", steps=3, scheduler="PNDM"))


@pytest.mark.parametrize("which", BASES)
def test_pictures_have_the_size_asked_for(which: str, tiny_base_folder: Path) -> None:
    base = shared_base(which, tiny_base_folder)
    side = base.resolution
    for size, expected in ((None, (side, side)), ((side + 16, side), (side + 16, side))):
        (picture,) = generate(base, Drawing(prompt="a dog", steps=1, size=size))
        assert picture.image.size == expected


def test_only_what_the_prompt_names_is_attached_unless_the_whole_is_asked_for(base: Base, pair: Adapter) -> None:
    assert [named_only(pair, prompt).tokens for prompt in ("<v2> asleep", "a dog", "<V2><V1>")] == [
        ("<V2>",),
        (),
        ("<V1>", "<V2>"),
    ]
    drawing = Drawing(prompt="<V1> asleep", steps=2)
    (named,), (alone,) = generate(base, drawing, pair), generate(base, drawing, pair.only(["<V1>"]))
    (whole,), (bare,) = generate(base, drawing, pair, whole=True), generate(base, drawing)
    assert named.tokens == ("<V1>",) and whole.tokens == ("<V1>", "<V2>")
    assert named.image == alone.image
    assert difference(named, whole) > 1 and difference(named, bare) > 1


def test_what_the_settings_say_is_what_is_drawn(base: Base) -> None:
    (plain,) = generate(base, Drawing(prompt="a dog", steps=2))
    (as_said,) = generate(base, plain.drawing)
    assert plain.drawing.guidance == base.guidance and as_said.image == plain.image
    for other in ({"negative_prompt": "snow"}, {"guidance": 1.0}, {"steps": 3}, {"seed": 1}, {"scheduler": "DDPM"}):
        (changed,) = generate(base, Drawing(**{"prompt": "a dog", "steps": 2} | other))
        assert changed.image != plain.image, other


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": " "}, "The prompt is empty"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 501}, "steps must be at most 500, got 501"),
        ({"guidance": float("nan")}, "guidance must be a number, got nan"),
        ({"guidance": float("inf")}, "guidance must be a number, got inf"),
        ({"seed": -1}, r"seed must be a whole number from 0 to \d+, got -1"),
        ({"scheduler": "Bob Ross"}, "no sampler 'Bob Ross'; choose one of DDIM, "),
        ({"size": (60, 64)}, "size must be multiples of 8 pixels, got 60 x 64"),
    ],
)
def test_a_drawing_out_of_range_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Drawing(**{"prompt": "a dog"} | wrong)


def drawn(**settings: object) -> Picture:
    drawing = Drawing(**{"prompt": '<V1>: a dog, "quoted", 犬', "guidance": 5.0} | settings)
    image = Image.new("RGB", (64, 32), (200, 30, 90))
    return Picture(image=image, seed=7, drawing=drawing, tokens=("<V1>",), class_words={"<V1>": "dög"})


def parse_infotext(text: str) -> tuple[str, str, dict[str, str]]:
    """Read an infotext as AUTOMATIC1111 does (modules/infotext_utils.py): prompt, negative prompt, pairs."""
    *lines, last = text.split("\n")
    pairs = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt: ")
    return prompt, negative, {key: json.loads(value) if value[0] == '"' else value for key, value in pairs.items()}


def test_a_picture_file_says_how_it_was_drawn_as_other_tools_read_it(tmp_path: Path) -> None:
    picture = drawn(negative_prompt="snow,\nrain", scheduler="DPM++ 2M Karras", guidance=4.5, steps=12)
    save_picture(picture, tmp_path / "ein Hündchen.png", base_name="my: base, v2")
    with Image.open(tmp_path / "ein Hündchen.png") as saved:
        saved.load()
        assert (saved.format, saved.convert("RGB").tobytes()) == ("PNG", picture.image.tobytes())
        prompt, negative, pairs = parse_infotext(saved.info["parameters"])
        assert json.loads(saved.info["spectral_diffusion"]) == {"class_words": {"<V1>": "dög"}}
    assert (prompt, negative) == ('<V1>: a dog, "quoted", 犬', "snow,\nrain")
    assert pairs == {
        "Steps": "12", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "4.5", "Seed": "7",
        "Size": "64x32", "Model": "my: base, v2", "Version": "spectral-diffusion",
    }  # fmt: skip


def test_without_a_negative_prompt_there_is_no_such_line(tmp_path: Path) -> None:
    save_picture(drawn(), tmp_path / "a.png", base_name="base")
    with Image.open(tmp_path / "a.png") as saved:
        lines = saved.info["parameters"].split("\n")
    assert len(lines) == 2 and "Schedule type: Automatic" in lines[1]


def test_numbers_too_large_for_a_picture_are_said(base: Base, pair: Adapter) -> None:
    with pytest.raises(InputError, match=r"came to numbers that float32 does not hold; lower the strengths or the guidance"):
        generate(base, Drawing(prompt="<V1>", steps=1), pair.scaled(1e30))


def test_a_token_in_the_negative_prompt_alone_is_said(base: Base, pair: Adapter, caplog: pytest.LogCaptureFixture) -> None:
    drawing = Drawing(prompt="<V1>", negative_prompt="<v2>, snow", steps=1)
    generate(base, drawing, pair)
    assert "Only the negative prompt names <V2>" in caplog.text
    caplog.clear()
    generate(base, drawing, pair, whole=True)
    assert not caplog.text


def test_a_picture_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"a\.png' could not be written"):
        save_picture(drawn(), tmp_path / "file" / "a.png", base_name="base")


def test_drawing_changes_nothing_in_the_base(base: Base, pair: Adapter) -> None:
    before = {name: value.clone() for name, value in base.pipeline.unet.state_dict().items()}
    generate(base, Drawing(prompt="<V1>", steps=1), pair)
    after = base.pipeline.unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_pictures_are_seen_forming_and_end_the_same(tiny_base: Base) -> None:
    drawing = Drawing(prompt="a dog near a lake", steps=8, seed=5, count=2)
    previews: list[tuple[int, bytes]] = []
    watched = generate(tiny_base, drawing, on_preview=lambda seed, image: previews.append((seed, image.tobytes())))
    assert [seed for seed, _ in previews] == [5, 6] * 3
    assert len({pixels for _, pixels in previews}) == 6
    assert [picture.image.tobytes() for picture in watched] == [
        picture.image.tobytes() for picture in generate(tiny_base, drawing)
    ]
