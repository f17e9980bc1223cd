"""The studio's concepts: photos, captions, masks and tokens."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from studios import concept_of

from app.actions.concepts import add_samples, concept_card, concept_cards, create_concept, remove_concept, suggest_token
from app.actions.photos import (
    add_photos,
    crop_previews,
    mask_of,
    remove_photo,
    set_caption,
    set_mask,
    suggest_masks,
    suggested_mask_of,
)
from app.actions.studio import Studio, concept_names
from app.actions.trainings import train
from spectral_diffusion.concepts.concept import load_concept
from spectral_diffusion.concepts.photos import read_photo
from spectral_diffusion.errors import InputError, StorageError


def test_photos_are_kept_and_each_bad_one_is_named(studio: Studio, photo_folder: Path, tmp_path: Path) -> None:
    name = create_concept(studio, "<dog>", "dog")
    turned, copy, tiny = tmp_path / "Turned Photo.JPG", tmp_path / "copy.png", tmp_path / "tiny.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photo_folder / "0.png").save(turned, exif=exif)
    copy.write_bytes((photo_folder / "1.png").read_bytes())
    Image.new("RGB", (9, 9)).save(tiny)
    (tmp_path / "drawing.jpg").write_text("<svg onload='alert(1)'/>")
    (tmp_path / "film.mov").write_bytes(b"film")
    files = [turned, photo_folder / "1.png", copy, tiny, tmp_path / "drawing.jpg", tmp_path / "film.mov"]
    findings = {finding.name: finding for finding in add_photos(studio, name, files)}
    assert {found for found, finding in findings.items() if finding.used} == {"Turned Photo.JPG", "1.png"}
    assert "urned upright" in findings["Turned Photo.JPG"].text
    assert "same picture as '1.png'" in findings["copy.png"].text
    assert "too small" in findings["tiny.png"].text and "SVG" in findings["drawing.jpg"].text
    assert "It is no photo" in findings["film.mov"].text
    card = concept_card(studio, name)
    assert len(card.photos) == 2 and all(photo.thumbnail.is_file() for photo in card.photos)
    assert sorted(path.suffix for path in (studio.folder("concepts") / name).iterdir()) == [".jpg", ".png", ".toml"]


def test_a_copy_of_a_photo_never_takes_the_place_of_the_one_that_was_there(
    studio: Studio, photo_folder: Path, tmp_path: Path
) -> None:
    name = create_concept(studio, "<dog>", "dog")
    (tmp_path / "photo.png").write_bytes((photo_folder / "0.png").read_bytes())
    (tmp_path / "again.png").write_bytes((photo_folder / "0.png").read_bytes())
    add_photos(studio, name, [tmp_path / "photo.png"])
    set_caption(studio, name, "photo.png", "<TOK> in my garden")
    (finding,) = add_photos(studio, name, [tmp_path / "again.png"])
    assert not finding.used and "same picture as 'photo.png'" in finding.text
    (example,) = load_concept(studio.folder("concepts") / name).examples
    assert example.caption == "<TOK> in my garden"


def test_of_an_upload_that_fails_nothing_is_kept(studio: Studio, photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = concept_of(studio, "<dog>", photo_folder)
    before = sorted((studio.folder("concepts") / name).iterdir())
    copies = iter([shutil.copyfile])

    def copy(source: Path, target: Path) -> None:
        next(copies, full)(source, target)

    def full(*paths: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("app.actions.photos.shutil.copyfile", copy)
    with pytest.raises(StorageError, match="free some space"):
        add_photos(studio, name, sorted(photo_folder.glob("*.png"))[:2])
    assert sorted((studio.folder("concepts") / name).iterdir()) == before


def test_a_photo_that_was_changed_by_hand_has_a_new_thumbnail(studio: Studio, photo_folder: Path) -> None:
    name = concept_of(studio, "<dog>", photo_folder)
    (first, *_) = concept_card(studio, name).photos
    photo = studio.folder("concepts") / name / first.name
    Image.new("RGB", (64, 64), "red").save(photo)
    for time in (4_000_000_000, 1_000_000_000):  # of a clock that is ahead, and of an old file
        os.utime(photo, (time, time))
        concept_card(studio, name)
        assert Image.open(first.thumbnail).convert("RGB").getpixel((5, 5))[0] > 240
        made = first.thumbnail.stat().st_ino
        concept_card(studio, name)
        assert first.thumbnail.stat().st_ino == made  # and it is not made again


def test_a_file_that_is_wrong_is_said_where_it_is_shown(studio: Studio, photo_folder: Path) -> None:
    good, bad = concept_of(studio, "<dog>", photo_folder), concept_of(studio, "<cat>", photo_folder)
    (studio.folder("concepts") / good / "0.txt").write_bytes("in a café".encode("cp1252"))
    (studio.folder("concepts") / bad / "concept.toml").write_text('note = "mine"')
    cards = {card.name: card for card in concept_cards(studio)}
    assert "is not UTF-8 text" in cards[good].photos[0].problem and cards[good].photos[1].problem is None
    assert "has unknown keys (note)" in cards[bad].problem
    assert suggest_token(studio, "dog") == "<dog-2>"


def test_a_concept_made_again_is_not_the_one_that_was_removed(studio: Studio, photo_folder: Path) -> None:
    name = concept_of(studio, "<dog>", photo_folder)
    studio.jobs.cancel(train(studio, name))
    remove_concept(studio, name)
    again = concept_of(studio, "<dog>", photo_folder)
    assert again != name and concept_card(studio, again).job is None


@pytest.mark.parametrize("hostile", ["../../evil.png", "..", "a/b.png", "-mask.png", "x" * 300 + ".png", "con.<script>"])
def test_names_of_files_never_become_paths(studio: Studio, photo_folder: Path, tmp_path: Path, hostile: str) -> None:
    name = create_concept(studio, "<dog>", "dog")
    before = {path for path in tmp_path.rglob("*") if studio.root not in path.parents}

    class Upload(type(photo_folder)):
        """A file with a hostile name, as some client may send it."""

        name = property(lambda self: hostile)
        stem = property(lambda self: hostile.rpartition(".")[0])
        suffix = property(lambda self: "." + hostile.rpartition(".")[2])

    add_photos(studio, name, [Upload(photo_folder / "0.png")])
    (photo,) = concept_card(studio, name).photos
    assert Path(photo.name).name == photo.name and len(photo.name) < 80 and "<" not in photo.name
    assert {path for path in tmp_path.rglob("*") if studio.root not in path.parents} == before
    with pytest.raises(InputError, match="has no photo"):
        remove_photo(studio, name, "../concept.toml")


def test_captions_and_masks_reach_the_training(studio: Studio, photo_folder: Path) -> None:
    name = concept_of(studio, "<dog>", photo_folder)
    first, second = (photo.name for photo in concept_card(studio, name).photos[:2])
    set_caption(studio, name, first, "  <TOK> on\na sofa ")
    mask = Image.new("L", (48, 40))
    mask.paste(255, (0, 0, 24, 40))
    whole = [np.array(crop) for crop in crop_previews(studio, name, second, 32)]
    set_mask(studio, name, second, mask)
    around = [np.array(crop) for crop in crop_previews(studio, name, second, 32)]
    assert not all(np.array_equal(one, other) for one, other in zip(whole, around, strict=True))
    examples = load_concept(studio.folder("concepts") / name).examples
    assert examples[0].caption == "<TOK> on a sofa" and examples[0].mask is None
    assert examples[1].mask is not None and examples[1].mask.size == examples[1].photo.image.size
    picture, kept = mask_of(studio, name, second)
    assert kept is not None and kept.size == picture.size
    set_mask(studio, name, second, Image.new("L", (48, 40)))
    set_caption(studio, name, first, "")
    card = concept_card(studio, name)
    assert card.photos[1].mask is None and card.photos[0].caption == "a photo of <TOK>"
    assert {crop.size for crop in crop_previews(studio, name, first, 32)} == {(32, 32)}


def test_masks_and_captions_go_with_the_photos_that_they_are_called_as(
    studio: Studio, photo_folder: Path, tmp_path: Path
) -> None:
    name, files = create_concept(studio, "<dog>", "dog"), tmp_path / "from the phone"
    files.mkdir()
    for number in range(2):
        shutil.copy(photo_folder / f"{number}.png", files / f"IMG {number}.png")
    size = read_photo(files / "IMG 0.png").image.size
    Image.new("L", size, 255).save(files / "IMG 0-mask.png")
    Image.new("L", (size[0], 3 * size[1]), 255).save(files / "IMG 1-mask.png")
    Image.new("L", size, 255).save(files / "other-mask.png")
    shutil.copy(files / "IMG 1.png", files / "IMG 1_mask.jpg")
    (files / "img 1.txt").write_text("<TOK> on a sofa")
    (files / "IMG 0.txt").write_bytes("in a café".encode("cp1252"))
    findings = {finding.name: finding for finding in add_photos(studio, name, sorted(files.iterdir()))}
    assert {said for said, finding in findings.items() if finding.used} == {
        "IMG 0.png", "IMG 1.png", "IMG 0-mask.png", "img 1.txt"
    }  # fmt: skip
    assert findings["IMG 1-mask.png"].text.startswith("'IMG 1-mask.png' has another shape")
    assert "no photo is called 'other'" in findings["other-mask.png"].text and "UTF-8" in findings["IMG 0.txt"].text
    first, second = load_concept(studio.folder("concepts") / name).examples
    assert first.mask is not None and second.mask is None and second.caption == "<TOK> on a sofa"
    (again,) = add_photos(studio, name, [files / "IMG 0-mask.png"])
    assert not again.used and "has a mask already" in again.text


def test_masks_are_suggested_and_never_overwritten(studio: Studio, tmp_path: Path) -> None:
    name, photo = create_concept(studio, "<ball>", "ball"), Image.new("RGB", (160, 120), (40, 80, 170))
    ImageDraw.Draw(photo).ellipse([50, 30, 110, 100], fill=(200, 40, 30))
    photo.save(tmp_path / "1.png")
    photo.transpose(Image.Transpose.FLIP_TOP_BOTTOM).rotate(8, fillcolor=(40, 80, 170)).save(tmp_path / "2.png")
    add_photos(studio, name, [tmp_path / "1.png", tmp_path / "2.png"])
    own = Image.new("L", photo.size, 255)
    set_mask(studio, name, "1.png", own)
    picture, mask = suggested_mask_of(studio, name, "2.png")
    assert mask.size == picture.size and concept_card(studio, name).photos[1].mask is None
    assert suggest_masks(studio, name).startswith("1 mask was made")
    first, second = concept_card(studio, name).photos
    assert first.mask is not None and second.mask is not None and first.mask.is_file() and second.mask.is_file()
    assert load_concept(studio.folder("concepts") / name).examples[0].mask.getextrema() == (255, 255)
    assert "already" in suggest_masks(studio, name)
    add_photos(studio, name, [_plain(tmp_path / "3.png")])
    with pytest.raises(InputError, match="Nothing stands out"):
        suggested_mask_of(studio, name, "3.png")


def _plain(path: Path) -> Path:
    Image.new("RGB", (64, 64), (9, 90, 200)).save(path)
    return path


def test_tokens_are_suggested_and_checked(studio: Studio) -> None:
    assert suggest_token(studio, "big dog") == "<big-dog>"
    create_concept(studio, suggest_token(studio, "dog"), "dog")
    assert suggest_token(studio, "dog") == "<dog-2>"
    with pytest.raises(InputError, match=r"has the token '<dog>'; choose another, such as '<dog-2>'"):
        create_concept(studio, "<DOG>", "dog")
    with pytest.raises(InputError, match="one word"):
        create_concept(studio, "two words", "dog")
    with pytest.raises(InputError, match="class word is empty"):
        create_concept(studio, "<x>", " ")


@pytest.mark.parametrize(("token", "class_word"), [("<🐶>", "dog"), ("<שלום>", 'a "small" \\ 🐈'), ("<i>x</i>", "<b>cat</b>")])
def test_any_words_are_read_as_they_were_written(studio: Studio, token: str, class_word: str) -> None:
    card = concept_card(studio, create_concept(studio, token, class_word))
    assert (card.token, card.class_word) == (token, class_word)


def test_a_first_visit_finds_samples_and_a_second_keeps_what_was_removed(studio: Studio) -> None:
    add_samples(studio)
    assert [card.token for card in concept_cards(studio)] == ["<poodle>", "<black-cat>", "<raccoon>"]
    for name in concept_names(studio):
        remove_concept(studio, name)
    add_samples(studio)
    assert concept_cards(studio) == []
    assert len(list(studio.folder("removed").iterdir())) == 3
