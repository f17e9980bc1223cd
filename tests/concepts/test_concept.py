"""Concepts: the forms of folder that are accepted, captions, masks, tokens, and the errors that name what is wrong."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from spectral_diffusion.concepts.concept import DEFAULT_CAPTION, Concept, check_class_word, check_token, load_concept
from spectral_diffusion.errors import InputError, PhotoError


def save_photo(folder: Path, name: str = "1.png", seed: int = 0, size: tuple[int, int] = (64, 48)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size).save(folder / name)
    return folder / name


def load(folder: Path, token: str = "<V1>", class_word: str = "dog") -> Concept:
    return load_concept(folder, token=token, class_word=class_word)


def caption_of(folder: Path, text: str, token: str = "<V1>") -> str:
    save_photo(folder)
    (folder / "1.txt").write_text(text, encoding="utf-8")
    return load(folder, token).examples[0].caption


def test_a_folder_with_settings(tmp_path: Path) -> None:
    save_photo(tmp_path, "1.png")
    save_photo(tmp_path, "2.png", seed=1)
    settings = [
        "token = '<rex>'",
        "class_word = 'golden  retriever'",
        "name = 'Rex'",
        "source = 'me'",
        "licence = 'MIT'",
    ]
    (tmp_path / "concept.toml").write_text("\n".join(settings))
    concept = load_concept(tmp_path)
    assert (concept.token, concept.class_word, concept.source) == ("<rex>", "golden retriever", tmp_path)
    assert [example.photo.path.name for example in concept.examples] == ["1.png", "2.png"]
    assert all(example.mask is None and example.caption == DEFAULT_CAPTION for example in concept.examples)
    assert concept.problems == ()


def test_arguments_go_before_settings_and_names(tmp_path: Path) -> None:
    folder = tmp_path / "10_sks dog"
    save_photo(folder)
    (folder / "concept.toml").write_text("token = '<rex>'\nclass_word = 'puppy'", encoding="utf-8-sig")
    assert (load_concept(folder).token, load_concept(folder).class_word) == ("<rex>", "puppy")
    assert (load(folder, "<V2>", "wolf").token, load(folder, "<V2>", "wolf").class_word) == ("<V2>", "wolf")


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("name", "token", "class_word"),
    [("10_sks dog", "sks", "dog"), ("1_<V1> golden retriever", "<V1>", "golden retriever"), ("5_mäx 狗", "mäx", "狗")],
)
def test_kohya_folders(tmp_path: Path, name: str, token: str, class_word: str, inside: bool) -> None:
    save_photo(tmp_path / name)
    (tmp_path / "20_empty one").mkdir()
    concept = load_concept(tmp_path if inside else tmp_path / name)
    assert (concept.token, concept.class_word) == (token, class_word)


def test_several_kohya_folders_are_refused_by_name(tmp_path: Path) -> None:
    save_photo(tmp_path / "10_sks dog")
    save_photo(tmp_path / "10_abc cat")
    with pytest.raises(InputError, match=r"several concepts \('10_abc cat', '10_sks dog'\); give one of these folders"):
        load_concept(tmp_path)


@pytest.mark.parametrize("name", ["my dog", "Hündchen", "我的狗", "🐕"])
def test_folder_names_may_hold_anything(tmp_path: Path, name: str) -> None:
    save_photo(tmp_path / name, f"{name}.png")
    (tmp_path / name / f"{name}.txt").write_text("<V1> at home", encoding="utf-8")
    assert load(tmp_path / name).examples[0].caption == "<TOK> at home"


def test_a_flat_folder_needs_token_and_class_word(tmp_path: Path) -> None:
    save_photo(tmp_path)
    with pytest.raises(InputError, match="no token and no class word for its photos; give --token and --class-word"):
        load_concept(tmp_path)
    with pytest.raises(InputError, match=r"no class word .*; give --class-word, or write a concept\.toml"):
        load_concept(tmp_path, token="<V1>")
    with pytest.raises(InputError, match="no token for its photos; give --token"):
        load_concept(tmp_path, class_word="dog")


def test_the_folder_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match=r"1\.png' is a file; give the folder"):
        load(save_photo(tmp_path))
    with pytest.raises(PhotoError, match="nowhere' does not exist"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"token = '<V1>'\ncolour = 'red'\nsize = 3",
            r"concept\.toml' has unknown keys \(colour, size\); it may have token",
        ),
        (b"token = ", r"concept\.toml' is not valid TOML"),
        (b"token = 7", r"'token' in '.*concept\.toml' is not a text but 7; put it between quotation marks"),
        (b"token = '\xff'", r"concept\.toml' is not UTF-8 text"),
        (b"token = ''\nclass_word = 'dog'", "The token is empty"),
        (b"token = '<V1>'\nclass_word = ' '", "The class word is empty"),
    ],
)
def test_wrong_settings(tmp_path: Path, content: bytes, message: str) -> None:
    save_photo(tmp_path)
    (tmp_path / "concept.toml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_concept(tmp_path)


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("<TOK>, white background", "<TOK>, white background"),
        ("a photo of <V1> on grass", "a photo of <TOK> on grass"),
        ("<TOK> beside <V1>", "<TOK> beside <TOK>"),
        ("on grass", "<TOK>, on grass"),
        ("  two\r\nlines\n", "<TOK>, two lines"),
        ("\ufeff<TOK> after a byte order mark", "<TOK> after a byte order mark"),
        ("<V1>在湖边", "<TOK>在湖边"),
        (" \n", DEFAULT_CAPTION),
    ],
)
def test_captions_hold_the_placeholder(tmp_path: Path, text: str, caption: str) -> None:
    assert caption_of(tmp_path, text) == caption


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("a sks dog, sks", "a <TOK> dog, <TOK>"),
        ("he asks for tasksks", "<TOK>, he asks for tasksks"),
        ("一只sks狗", "一只<TOK>狗"),
    ],
)
def test_a_plain_token_is_replaced_as_a_whole_word(tmp_path: Path, text: str, caption: str) -> None:
    assert caption_of(tmp_path, text, token="sks") == caption


def test_an_undecodable_caption_is_named(tmp_path: Path) -> None:
    save_photo(tmp_path)
    (tmp_path / "1.txt").write_bytes("über".encode("latin-1"))
    with pytest.raises(InputError, match=r"1\.txt' is not UTF-8 text .*; save it again as UTF-8"):
        load(tmp_path)


def test_a_mask_takes_the_photo_s_upright_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(save_photo(tmp_path)).save(tmp_path / "1.png", exif=exif)
    mask = Image.new("L", (96, 128))
    mask.paste(255, (0, 64, 96, 128))
    mask.save(tmp_path / "1-mask.png")
    (example,) = load(tmp_path).examples
    assert example.mask is not None
    assert (example.mask.mode, example.mask.size) == ("L", example.photo.image.size) == ("L", (48, 64))
    assert (example.mask.getpixel((5, 5)), example.mask.getpixel((5, 60))) == (0, 255)


def test_what_is_transparent_in_a_mask_is_black(tmp_path: Path) -> None:
    save_photo(tmp_path)
    mask = Image.new("LA", (64, 48), (255, 0))
    mask.paste((255, 255), (32, 0, 64, 48))
    mask.save(tmp_path / "1-mask.png")
    (example,) = load(tmp_path).examples
    assert example.mask is not None
    assert (example.mask.getpixel((5, 5)), example.mask.getpixel((60, 5))) == (0, 255)


def test_a_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_photo(tmp_path)
    Image.new("L", (48, 64), 255).save(tmp_path / "1-mask.png")
    with pytest.raises(InputError, match=r"1-mask\.png' has another shape \(48 x 64 pixels\) than .* \(64 x 48\); make"):
        load(tmp_path)


def test_a_mask_must_be_a_picture(tmp_path: Path) -> None:
    save_photo(tmp_path)
    (tmp_path / "1-mask.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1-mask\.png': The file is damaged or no picture"):
        load(tmp_path)


def test_a_black_mask_is_dropped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_photo(tmp_path)
    Image.new("L", (64, 48)).save(tmp_path / "1-mask.png")
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path).examples[0].mask is None
    assert "1-mask.png' is all black, so the whole photo is used" in caplog.text


def test_bad_photos_are_warned_about_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_photo(tmp_path)
    (tmp_path / "2.jpg").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        concept = load(tmp_path)
    assert len(concept.examples) == 1
    assert [problem.path.name for problem in concept.problems] == ["2.jpg"]
    assert "2.jpg': The file is empty" in caplog.text


def test_no_good_photo_is_an_error_that_lists_the_bad_ones(tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match="holds no photos"):
        load(tmp_path)
    (tmp_path / "1.jpg").write_bytes(b"")
    (tmp_path / "2.jpg").write_bytes(b"text")
    with pytest.raises(PhotoError, match=r"(?s)no usable photo.*1\.jpg': The file is empty.*2\.jpg': The file is damaged"):
        load(tmp_path)


@pytest.mark.parametrize("token", ["<V1>", "sks", "mäx", "狗", "<my-dog_2>", "x" * 64])
def test_good_tokens(token: str) -> None:
    assert check_token(token) == token


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "The token is empty; write it as one word such as '<V1>'"),
        ("  ", "The token is empty"),
        ("my dog", "'my dog' holds spaces or invisible characters; write it as one word"),
        ("a\tb", "spaces or invisible"),
        ("a\x00b", "spaces or invisible"),
        ("a\u200bb", "spaces or invisible"),
        ("x" * 65, "has 65 characters; write it as one word of at most 64"),
        ("<TOK>", "holds '<TOK>', which stands for the token in captions; choose another word"),
    ],
)
def test_bad_tokens(tmp_path: Path, token: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_token(token)
    save_photo(tmp_path)
    with pytest.raises(InputError, match=message):
        load(tmp_path, token=token)


def test_class_words() -> None:
    assert check_class_word("  golden   retriever ") == "golden retriever"
    with pytest.raises(InputError, match="The class word is empty; say in a word or two"):
        check_class_word(" \n")


def test_a_concept_is_checked_when_made(tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match="The concept '<V1>' has no examples"):
        Concept(token="<V1>", class_word="dog", examples=(), source=tmp_path)


def test_captions_and_masks_are_found_in_any_case(tmp_path: Path) -> None:
    save_photo(tmp_path, "One.jpg")
    (tmp_path / "one.TXT").write_text("<V1> asleep", encoding="utf-8")
    Image.new("L", (64, 48), 255).save(tmp_path / "One-Mask.PNG")
    (example,) = load(tmp_path).examples
    assert example.caption == "<TOK> asleep" and example.mask is not None


def test_captions_and_masks_of_no_photo_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_photo(tmp_path, "1.jpg")
    Image.new("L", (64, 64), 255).save(tmp_path / "2-mask.png")
    for name in ("1.txt", "3.txt", "README.txt"):
        (tmp_path / name).write_text("<V1> asleep", encoding="utf-8")
    load(tmp_path)
    named = [record.getMessage() for record in caplog.records if "belongs to no photo" in record.getMessage()]
    assert len(named) == 2 and "2-mask.png" in named[0] and "3.txt" in named[1]
