"""The recipe of the embedded base, at a size of seconds: its stages run in order and go on where they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from spectral_diffusion.bases.base import EMBEDDED_BASE, load_base
from spectral_diffusion.generation.condition_picture import Condition
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.toyworld.characters import (
    BASE_CHARACTERS,
    CHARACTERS,
    EXTRA_CHARACTERS,
    HELD_OUT_CHARACTERS,
    SAMPLE_CONCEPTS,
)
from spectral_diffusion.toyworld.recipe.autoencoder import encode_all, train_autoencoder
from spectral_diffusion.toyworld.recipe.denoiser import assemble, build_text_encoder, build_unet, train_denoiser
from spectral_diffusion.toyworld.recipe.pictures import PictureSet, is_reserved, load_or_render
from spectral_diffusion.toyworld.recipe.sharpening import build_critic, draw_own, opposed, sharpen_decoder
from spectral_diffusion.toyworld.recipe.sketches import make_sketch_adapter, silhouettes, sketch
from spectral_diffusion.toyworld.recipe.tokenizer import build_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> PictureSet:
    """A few pictures of plain discs that stand for the characters."""
    sprites = {}
    for number, character in enumerate(CHARACTERS + EXTRA_CHARACTERS):
        sprite = Image.new("RGBA", (48, 48), (0, 0, 0, 0))
        ImageDraw.Draw(sprite).ellipse([2, 2, 46, 46], fill=(number, 255 - number, 120, 255))
        sprites[character.name] = sprite
    folder = tmp_path_factory.mktemp("pictures")
    return load_or_render(folder, "some", 24, sprites, seed=1, held_out=False, tints=False)


def test_the_bases_pictures_show_neither_held_out_characters_nor_reserved_combinations(pictures: PictureSet) -> None:
    allowed = {character.name for character in BASE_CHARACTERS + EXTRA_CHARACTERS}
    for scene in pictures.scenes:
        names = [thing.character for thing in scene.things]
        assert set(names) <= allowed and len(names) <= 3
        assert not is_reserved(names, scene.scene)


def test_enough_characters_are_held_out_and_none_is_drawn_as_one_of_the_bases() -> None:
    assert len(HELD_OUT_CHARACTERS) >= 24
    everybody = CHARACTERS + EXTRA_CHARACTERS
    assert len({character.codepoint for character in everybody}) == len({character.name for character in everybody})
    assert len(everybody) == len({character.name for character in everybody})
    assert set(SAMPLE_CONCEPTS) <= {character.name for character in HELD_OUT_CHARACTERS}


def test_no_extra_character_bears_a_class_word_that_the_judge_is_asked_for() -> None:
    assert not {character.class_word for character in EXTRA_CHARACTERS} & {character.class_word for character in CHARACTERS}


def test_all_stages_run_and_make_a_base_that_draws(pictures: PictureSet, tmp_path: Path) -> None:
    autoencoder = train_autoencoder(tmp_path, (pictures,), 2, 2, CPU)
    latents = encode_all(autoencoder, pictures, tmp_path / "latents.npy", CPU)
    assert latents.shape == (24, 8, 16, 16)
    tokenizer = build_tokenizer(EMBEDDED_BASE / "tokenizer")
    pipeline = assemble(autoencoder, build_text_encoder(tokenizer), tokenizer, build_unet())
    train_denoiser(tmp_path, pictures, latents, pipeline, 2, 2)
    encoder = {name: value.clone() for name, value in autoencoder.encoder.state_dict().items()}
    make_sketch_adapter(tmp_path, pictures, latents, pipeline, 2, 2, folder=tmp_path / "sketch-adapter")
    own = draw_own(pipeline, pictures, tmp_path / "own.npy", 3)
    assert own.shape == (3, 8, 16, 16) and own.std() > 0
    sharpen_decoder(tmp_path, autoencoder, (pictures,), own, 2, 2, CPU)
    assert all(torch.equal(encoder[name], value) for name, value in autoencoder.encoder.state_dict().items())
    pipeline.to("cpu", torch.float16).save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base", device="cpu")
    followed = Condition(image=Image.new("L", (64, 64), 255), adapter=str(tmp_path / "sketch-adapter"))
    drawn = [generate(base, Drawing(prompt="a dog", steps=1, condition=used))[0].image for used in (None, followed)]
    assert drawn[0].size == (64, 64) and drawn[0].tobytes() != drawn[1].tobytes()
    assert list((tmp_path / "sheets").glob("denoiser-*.png"))


def test_what_a_critic_learns_is_turned_against_the_pictures_it_looks_at() -> None:
    torch.manual_seed(0)
    critic, pictures = build_critic(), torch.randn(2, 3, 64, 64, requires_grad=True)
    plain = torch.autograd.grad(critic(pictures).mean(), pictures)[0]
    looked_at = opposed(pictures, torch.tensor(3.0))
    assert torch.equal(looked_at, pictures)
    turned = torch.autograd.grad(critic(looked_at).mean(), pictures)[0]
    torch.testing.assert_close(turned, -3.0 * plain / plain.norm())


def test_a_finished_stage_is_not_done_again(pictures: PictureSet, tmp_path: Path) -> None:
    first = train_autoencoder(tmp_path, (pictures,), 2, 2, CPU).state_dict()
    again = train_autoencoder(tmp_path, (pictures,), 2, 2, CPU).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_training_goes_on_from_the_shipped_base(pictures: PictureSet, tmp_path: Path) -> None:
    pipeline = load_base(device="cpu").pipeline
    before = pipeline.unet.conv_in.weight.detach().clone()
    latents = encode_all(pipeline.vae, pictures, tmp_path / "latents.npy", CPU)
    train_denoiser(tmp_path, pictures, latents, pipeline, 1, 2)
    change = (pipeline.unet.conv_in.weight - before).norm() / before.norm()
    assert 0 < change < 0.1


def test_sketches_show_what_stands_in_a_picture(pictures: PictureSet) -> None:
    things = pictures.things[0]
    assert set(np.unique(things)) == set(range(len(pictures.scenes[0].things) + 1))
    lines = silhouettes(things)
    assert 0 < lines.sum() < (things > 0).sum() / 2 and not lines[things == 0].any()
    drawn = [sketch(pictures.pixels[0], things, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert all(one.shape == (1, 64, 64) and 0 < one.max() <= 1 and one.min() == 0 for one in drawn)
    inside = torch.from_numpy(things > 0)[None]
    silhouette_only = [one for one in drawn if ((one > 0) & ~inside).sum() == 0]
    assert 0 < len(silhouette_only) < len(drawn)  # some are of the things, some of the whole picture
