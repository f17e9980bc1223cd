"""Regions: each concept in its place, and nothing left behind on the base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, PngImagePlugin
from random_adapters import random_adapter
from shared_bases import shared_base

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.attach import attached, with_tokens
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base
from spectral_diffusion.cli import main
from spectral_diffusion.errors import InputError
from spectral_diffusion.generation.coverage import coverage
from spectral_diffusion.generation.drawing import Drawing, Picture
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.generation.own_models import own_models
from spectral_diffusion.generation.picture_file import save_picture
from spectral_diffusion.generation.regional_attention import Layout, layout_of, regional_attention
from spectral_diffusion.generation.regions import (
    Region,
    extent,
    parse_region,
    read_regions,
    region_from_record,
    region_record,
    suggest_regions,
)
from spectral_diffusion.prompts.conditioning import encode_prompts

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


@pytest.fixture
def pair(base: Base) -> Adapter:
    return fuse([random_adapter(base, vectors=2), random_adapter(base, token="<V2>", start=2, seed=1)], method="sum")


def draw(base: Base, adapter: Adapter | None = None, prompt: str = "near a lake", **options: object) -> Picture:
    (picture,) = generate(base, Drawing(prompt=prompt, seed=3, steps=3, **options), adapter)
    return picture


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(picture.image, dtype=int)


def test_shares_are_whole_and_later_regions_lie_on_top() -> None:
    shares = coverage([Region(prompt="a", box=LEFT), Region(prompt="b", box=(0.25, 0.25, 0.75, 0.75))], 64, 64)
    assert (shares >= 0).all() and (shares.sum(0) <= 1 + 1e-6).all()
    assert shares[:, 32, 5].tolist() == [1, 0] and shares[:, 32, 32].tolist() == [0, 1] and shares[:, 5, 60].tolist() == [0, 0]
    edge = shares[0, 32, :32]
    assert 0 < shares[0, 5, 30] < 1 and edge[0] == 1  # soft towards the picture, hard at the picture's own edge


def test_a_painted_mask_gives_the_region_its_form() -> None:
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    (share,) = coverage([Region(prompt="a", mask=mask)], 64, 64)
    assert share[32, 5] == 1 and share[32, 60] == 0 and 0 < share[32, 31] < 1


def test_a_layout_knows_every_grid_of_a_unet() -> None:
    layout = Layout(shares=coverage([Region(prompt="a", box=LEFT)], 13, 9))
    for rows, columns in ((9, 13), (5, 7), (3, 4), (2, 2), (1, 1)):
        assert layout.at(rows * columns).shape == (1, rows, columns)
    assert layout.at(50) is None


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_one_region_over_the_whole_picture_is_the_plain_prompt(guidance: float, base: Base, pair: Adapter) -> None:
    plain = draw(base, pair, "<V1> asleep", guidance=guidance, negative_prompt="rain")
    whole = draw(
        base, pair, guidance=guidance, regions=(Region(prompt="<V1> asleep", negative_prompt="rain"),), negative_prompt="snow"
    )
    other = draw(base, pair, guidance=guidance)
    assert np.abs(pixels(plain) - pixels(whole)).max() <= 1
    assert np.abs(pixels(plain) - pixels(other)).max() > 5


def test_disjoint_regions_are_the_same_in_any_order(base: Base, pair: Adapter) -> None:
    regions = (Region(prompt="<V1>", box=LEFT), Region(prompt="<V2>", box=RIGHT))
    for confined in (False, True):
        one = draw(base, pair, regions=regions, confined=confined)
        other = draw(base, pair, regions=regions[::-1], confined=confined)
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


def test_a_region_leaves_the_rest_as_it_was(tiny_base_folder: Path) -> None:
    base = shared_base("embedded", tiny_base_folder)
    box = (0.6, 0.4, 1.0, 1.0)
    kinds = [
        generate(base, Drawing(prompt="near a lake", count=3, steps=6, regions=regions))
        for regions in ((), (Region(prompt="a red car near a lake", box=box),))
    ]
    plain, regional = (np.mean([pixels(picture) for picture in pictures], axis=0) for pictures in kinds)
    change = np.abs(regional - plain).mean(axis=2)
    outside, inside = change[:, : base.resolution // 2].mean(), change[base.resolution // 2 :, 2 * base.resolution // 3 :].mean()
    assert outside < 16 and inside > 2 * outside, (outside, inside)


def test_overlapping_regions_have_an_order(base: Base) -> None:
    regions = (Region(prompt="a dog", box=LEFT), Region(prompt="a red car at night", box=(0.0, 0.0, 0.6, 1.0)))
    assert np.abs(pixels(draw(base, regions=regions)) - pixels(draw(base, regions=regions[::-1]))).max() > 3


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_confined_concept_is_drawn_by_its_own_model(family: str, loaded_bases: dict[str, Base]) -> None:
    """What counts of a region is what the base predicts there with its concept alone, which reads the others as class words."""
    base = loaded_bases[family]
    pair = fuse([random_adapter(base, size=0.05, vectors=2), random_adapter(base, token="<V2>", start=2, seed=1)], method="sum")
    drawing = Drawing(
        prompt="near a lake", guidance=1.0, regions=(Region(prompt="<V1> asleep", box=LEFT), Region(prompt="<V2>", box=RIGHT))
    )
    layout = layout_of(base, drawing)
    noisy, time = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor(500)
    unet = base.pipeline.unet
    expected = torch.zeros_like(noisy)
    for share, texts, token in (
        (layout.shares[0], ("<V1> asleep", "a dog"), "<V1>"),
        (layout.shares[1], ("a dog asleep", "<V2>"), "<V2>"),
    ):
        alone = pair.only([token])
        words = {concept.token: concept.words for concept in alone.concepts}
        with attached(base, alone), regional_attention(unet, layout) as regional:
            regional.read([encode_prompts(base, [text], words)["encoder_hidden_states"] for text in texts])
            whole = encode_prompts(base, ["near a lake"], words)
            expected += (share + (1 - layout.shares.sum(0)) / 2) * unet(noisy, time, **whole).sample
    with with_tokens(base, pair.embeddings), own_models(base, drawing, pair):
        nothing = {**encode_prompts(base, [""], {}), "encoder_hidden_states": torch.zeros(1, 1, 1)}
        found = unet(noisy, time, **nothing).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_every_vector_of_a_token_is_read_in_its_region(base: Base, pair: Adapter) -> None:
    first, other = pair.concepts
    changed = {part: torch.cat([vectors[:1], -vectors[1:]]) for part, vectors in first.embeddings.items()}
    altered = replace(pair, concepts=(replace(first, embeddings=changed), other))
    for regions, prompt in (((Region(prompt="<V1>", box=LEFT),), "a lake"), ((), "<V1> near a lake")):
        one, two = (draw(base, adapter, prompt, regions=regions) for adapter in (pair, altered))
        assert np.abs(pixels(one) - pixels(two)).max() > 1


def test_a_concept_may_have_several_regions(base: Base, pair: Adapter) -> None:
    both = (Region(prompt="<V1> asleep", box=LEFT), Region(prompt="<V1> asleep", box=RIGHT))
    whole = draw(base, pair, regions=(Region(prompt="<V1> asleep"),))
    assert np.abs(pixels(draw(base, pair, regions=both[::-1])) - pixels(draw(base, pair, regions=both))).max() <= 1
    assert np.abs(pixels(whole) - pixels(draw(base, pair, regions=both[1:]))).max() > 3


def test_a_sample_goes_through_every_concept_and_one_through_what_shall_not_be_there(base: Base, pair: Adapter) -> None:
    left, right = Region(prompt="<V1>", box=LEFT), Region(prompt="<V2>", box=RIGHT)
    plain = Region(prompt="a car", box=(0.4, 0.4, 0.6, 0.6))
    passes: list[int] = []
    handle = base.pipeline.unet.conv_in.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    for regions, prompt, guidance, samples in (
        ((left, right), "a lake", 4.0, 3),
        ((left, right, plain), "a lake", 4.0, 3),
        ((left, replace(right, prompt="<V1>")), "a lake", 4.0, 2),
        ((left,), "<V2> near a lake", 4.0, 2),
        ((left, right), "a lake", 1.0, 2),
    ):
        passes.clear()
        draw(base, pair, prompt, regions=regions, guidance=guidance, confined=True)
        assert passes == [samples] * 3
    handle.remove()


def test_more_samples_for_a_picture_are_fewer_pictures_at_once(base: Base, pair: Adapter) -> None:
    regions = (Region(prompt="<V1>", box=LEFT), Region(prompt="<V2>", box=RIGHT))
    passes: list[int] = []
    handle = base.pipeline.unet.conv_in.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    drawing = Drawing(prompt="a lake", count=3, seed=5, steps=1, regions=regions, confined=True)
    pictures = generate(base, drawing, pair, batch=3)
    handle.remove()
    assert passes == [6, 3]
    alone = generate(base, replace(drawing, count=1, seed=7), pair)[0]
    assert np.abs(pixels(pictures[2]) - pixels(alone)).max() <= 1


def test_confined_over_the_whole_picture_is_the_adapter_itself(base: Base, pair: Adapter) -> None:
    region = (Region(prompt="<V1> asleep"),)
    free, confined = (draw(base, pair, "<V1> asleep", regions=region, confined=confined) for confined in (False, True))
    assert np.abs(pixels(free) - pixels(confined)).max() <= 1


@torch.no_grad()
def test_own_models_read_prompts_in_parts(base: Base, pair: Adapter) -> None:
    """Prompts of one, two and three parts go through one pass, each read as the plain adapter reads it."""
    region = (Region(prompt="<V1> BREAK asleep", negative_prompt="a BREAK b BREAK c"),)
    drawing = Drawing(prompt="<V1>", guidance=4.0, regions=region, confined=True)
    alone, unet = pair.only(["<V1>"]), base.pipeline.unet
    words = {concept.token: concept.words for concept in alone.concepts}
    noisy, time = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor(500)
    nothing = torch.zeros(2, 1, 1)
    with attached(base, alone), regional_attention(unet, layout_of(base, drawing)) as regional:
        both = ["a BREAK b BREAK c", "<V1> BREAK asleep"]
        regional.read([encode_prompts(base, both, words)["encoder_hidden_states"]])
        expected = unet(noisy, time, **encode_prompts(base, ["", "<V1>"], words)).sample
    with with_tokens(base, alone.embeddings), own_models(base, drawing, alone):
        found = unet(noisy, time, encoder_hidden_states=nothing).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_concepts_shown_beside_each_other_act_everywhere_and_others_in_their_regions(base: Base, pair: Adapter) -> None:
    regions = (Region(prompt="<V1>", box=LEFT), Region(prompt="<V2>", box=RIGHT))

    def trained(**settings: object) -> Adapter:
        return replace(
            pair, concepts=tuple(replace(concept, settings={**concept.settings, **settings}) for concept in pair.concepts)
        )

    shown, settled = (trained(among=["<V1>", "<V2>"], mixing=mixing) for mixing in (0.3, 0.0))
    for adapter, confined in ((pair, True), (trained(mixing=0.3), True), (settled, True), (shown, False)):
        left_open, said = (draw(base, adapter, regions=regions, confined=value) for value in (None, confined))
        assert left_open.drawing.confined is confined
        assert np.array_equal(pixels(left_open), pixels(said))
    assert draw(base, shown, regions=regions[:1]).drawing.confined  # <V1> alone has nobody to leave a part to


def test_everything_is_taken_off_after_an_error(base: Base, pair: Adapter) -> None:
    processors = dict(base.pipeline.unet.attn_processors)
    with pytest.raises(RuntimeError, match="stopped"):
        generate(
            base,
            Drawing(prompt="a lake", steps=1, regions=(Region(prompt="<V1>"),), confined=True),
            pair,
            on_picture=lambda picture: (_ for _ in ()).throw(RuntimeError("stopped")),
        )
    assert base.pipeline.unet.attn_processors == processors
    assert not any(module._forward_hooks for module in base.pipeline.unet.modules())
    assert "forward" not in vars(base.pipeline.unet)


def test_a_picture_says_where_its_regions_were(base: Base, tmp_path: Path) -> None:
    picture = draw(base, regions=(Region(prompt="a dog", box=LEFT, negative_prompt="rain"),), confined=True)
    save_picture(picture, tmp_path / "picture.png", "tiny")
    with Image.open(tmp_path / "picture.png") as file:
        assert isinstance(file, PngImagePlugin.PngImageFile)
        own = json.loads(file.text["spectral_diffusion"])
    assert own["regions"] == [{"prompt": "a dog", "box": [0, 0, 0.5, 1], "negative_prompt": "rain"}] and own["confined"]


def test_regions_are_suggested_in_the_order_of_the_prompt() -> None:
    words = {"<V1>": "dog", "<V2>": "cat", "<V3>": "toy", "<V11>": "vase"}
    regions = suggest_regions("a photo of <V2> and <v1> near a lake", words)
    assert [(region.prompt, region.box) for region in regions] == [
        ("a photo of <V2> and a dog near a lake", LEFT),
        ("a photo of a cat and <V1> near a lake", RIGHT),
    ]
    weighed = suggest_regions("a photo of (<V1>:1.3) and [<V11>] near a lake", words)
    assert [region.prompt for region in weighed] == [
        "a photo of (<V1>:1.3) and [a vase] near a lake",
        "a photo of (a dog:1.3) and [<V11>] near a lake",
    ]
    determined = suggest_regions("my <V1>, an (<V4>:0.8) and <V5>", {"<V1>": "dog", "<V4>": "old cat", "<V5>": "owl"})
    assert [region.prompt for region in determined] == [
        "my <V1>, an (old cat:0.8) and an owl",
        "my dog, an (<V4>:0.8) and an owl",
        "my dog, an (old cat:0.8) and <V5>",
    ]
    assert suggest_regions("<V1> asleep, <V1> awake", words) == (Region(prompt="<V1> asleep, <V1> awake"),)
    assert suggest_regions("a lake", words) == suggest_regions("<V1>", {}) == ()


def test_regions_are_read_from_text_and_file(tmp_path: Path) -> None:
    assert parse_region("0.05, 0.2,0.45,0.95 = <V1>") == Region(prompt="<V1>", box=(0.05, 0.2, 0.45, 0.95))
    Image.new("L", (4, 4), 255).save(tmp_path / "form.png")
    file = tmp_path / "regions.json"
    file.write_text(json.dumps([{"prompt": "<V1>", "box": LEFT, "mask": "form.png"}, {"prompt": "a cat"}]), encoding="utf-8")
    first, second = read_regions(file)
    assert first.mask is not None and first.box == LEFT and second == Region(prompt="a cat")
    file.write_text(json.dumps([region_record(region) for region in (first, second)]), encoding="utf-8")
    assert read_regions(file) == (first, second)
    file.write_text(file.read_text(encoding="utf-8"), encoding="utf-8-sig")  # as Windows' editors save it
    assert read_regions(file) == (first, second)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,0,1.2,1=a", "leaves the picture; its edges are fractions"),
        ("-0.1,0,1,1=a", "leaves the picture"),
        ("nan,0,1,1=a", "leaves the picture"),
        ("0.6,0,0.4,1=a", "is empty; its edges are left, top, right, bottom"),
        ("0.5,0,0.5,1=a", "is empty"),
        ("0.5,0,0.51,1=a", "is too small to draw in"),
        ("0,0,1,1", "has no prompt"),
        ("0,0,1,1= ", "has no prompt"),
        ("0,0,1=a", "is not of the form"),
        ("left=a", "is not of the form"),
    ],
)
def test_an_impossible_region_is_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_region(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"prompt": "a"}', "holds no list of regions"),
        ('[{"prompt": "a"}, {"box": [0, 0, 1, 1]}]', "Region 2 of .* is not complete"),
        ('[{"prompt": "a", "box": [0, 0, 1]}]', "Region 1 of .* is not complete"),
        (
            '[{"prompt": "a", "mask": "missing.png"}]',
            r"mask of region 1 in .* cannot be read. '.*missing\.png': The file cannot",
        ),
        ('[{"prompt": "a", "mask": "data:image/png;base64,!"}]', "Region 1 of .* is not complete"),
        ('[{"prompt": "a", "colour": 1}]', "has a field 'colour', which no region has"),
    ],
)
def test_an_impossible_file_of_regions_is_named(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "regions.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_regions(file)


@pytest.mark.parametrize("kind", ["turned", "transparent", "16 bits", "huge"])
def test_a_mask_is_read_like_a_photo(kind: str, tmp_path: Path) -> None:
    file, left = tmp_path / "form.png", Image.new("L", (64, 64), 0)
    left.paste(255, (0, 0, 32, 64))
    if kind == "turned":
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # turned a quarter clockwise to stand upright
        left.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    elif kind == "transparent":
        Image.merge("LA", (Image.new("L", (64, 64), 255), left)).save(file)
    elif kind == "16 bits":
        Image.fromarray(np.asarray(left).astype(np.uint16) * 257).save(file)
    else:
        left.resize((5000, 5000), Image.Resampling.NEAREST).save(file)
    regions = tmp_path / "regions.json"
    regions.write_text(json.dumps([{"prompt": "<V1>", "mask": "form.png"}]), encoding="utf-8")
    (region,) = read_regions(regions)
    expected = extent(Region(prompt="<V1>", mask=left), 16, 16)
    np.testing.assert_allclose(extent(region, 16, 16), expected, atol=0.02)
    assert region_from_record(region_record(region)).mask.tobytes() == region.mask.tobytes()


def test_a_mask_with_nothing_in_its_box_and_too_many_regions_are_refused(base: Base, pair: Adapter) -> None:
    black, dot = Image.new("L", (4, 4), 0), Image.new("L", (512, 512), 0)
    dot.putpixel((200, 200), 255)
    left = Image.new("L", (32, 32), 0)
    left.paste(255, (0, 0, 12, 32))
    for mask, box in ((black, LEFT), (dot, LEFT), (left, RIGHT)):
        with pytest.raises(InputError, match="a mask with next to nothing white in it"):
            Region(prompt="a", mask=mask, box=box)
    assert Region(prompt="a", mask=left, box=LEFT).mask is left
    with pytest.raises(InputError, match="17 regions do not fit into one picture; give at most 16"):
        Drawing(prompt="a", regions=(Region(prompt="a"),) * 17)
    with pytest.raises(InputError, match="A region names '<V9>', but the adapter has <V1>, <V2>"):
        draw(base, pair, regions=(Region(prompt="a <V9>"),))
    with pytest.raises(InputError, match="A region names '<V9>', but the adapter is missing"):
        draw(base, regions=(Region(prompt="a <V9>"),))


def test_the_command_line_draws_regions(tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--base", str(tiny_base_folder), "--prompt", "a lake", "--steps", "1", "--seed", "1", "--out"]
    plain, regional = tmp_path / "plain", tmp_path / "regional"
    assert main([*words, str(plain)]) == 0
    assert main([*words, str(regional), "--region", "0,0,0.5,1=a red car at night", "--confined"]) == 0
    first, second = (Image.open(folder / "0001-1.png").tobytes() for folder in (plain, regional))
    assert first != second
    assert main([*words, str(plain), "--region", "0,0,2,1=a"]) == 1
    assert "leaves the picture" in capsys.readouterr().err
