"""Load a concept: its token, its class word, and its photos with captions and masks."""

from __future__ import annotations

import logging
import re
import tomllib
import unicodedata
from collections.abc import Container
from dataclasses import dataclass, fields
from pathlib import Path

from PIL import Image

from spectral_diffusion.concepts.photos import (
    BLACK,
    Photo,
    PhotoProblem,
    caption_path,
    list_pictures,
    mask_path,
    of_no_photo,
    read_photo,
    read_photos,
    require_folder,
    require_photos,
)
from spectral_diffusion.errors import InputError, PhotoError

PLACEHOLDER = "<TOK>"
"""Stands in captions where the token goes."""
DEFAULT_CAPTION = f"a photo of {PLACEHOLDER}"
"""Caption of a photo that has no caption file."""
MAX_TOKEN_LENGTH = 64
SETTINGS_FILE = "concept.toml"
SAMPLES_FOLDER = Path(__file__).resolve().parents[2] / "concepts"
"""The sample concepts that ship with the project, a folder each."""

_KOHYA_NAME = re.compile(r"\d+_(?P<token>\S+)\s+(?P<class_word>.*\S)\s*")
_MASK_ASPECT_TOLERANCE = 0.02
_INVISIBLE_CATEGORIES = frozenset({"Cc", "Cf", "Cs"})
# Scripts that are written without spaces do not glue a token to its neighbours.
_LETTER = r"[^\W\u2E80-\u9FFF\uAC00-\uD7AF]"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One photo to train on.

    Attributes:
        photo: the photo.
        caption: what it shows, with `PLACEHOLDER` at least once.
        mask: where the concept is (white) in the photo, mode L and of the photo's size; None for everywhere.
    """

    photo: Photo
    caption: str
    mask: Image.Image | None = None


@dataclass(frozen=True, kw_only=True)
class Concept:
    """What an adapter is trained on.

    Attributes:
        token: the word that will mean the concept in prompts, such as '<V1>'.
        class_word: what the concept is, in words that the base knows, such as 'dog'.
        examples: at least one.
        source: the folder that the concept was loaded from.
        problems: files that were left out, and why.
    """

    token: str
    class_word: str
    examples: tuple[Example, ...]
    source: Path
    problems: tuple[PhotoProblem, ...] = ()

    def __post_init__(self) -> None:
        check_token(self.token)
        check_class_word(self.class_word)
        if not self.examples:
            raise PhotoError(f"The concept '{self.token}' has no examples; give at least one photo.")


def load_concept(folder: Path, *, token: str | None = None, class_word: str | None = None) -> Concept:
    """Load the concept in `folder` and log a warning for each file that cannot be used.

    The folder holds photos, with optional captions `NAME.txt` and masks `NAME-mask.png` beside them. What
    `concept.toml` does not say may stand in the folder's name, written like kohya's `10_token class`, or in that of the
    only such subfolder.

    Args:
        folder: the concept's folder.
        token: goes before the token found there.
        class_word: goes before the class word found there.

    Raises:
        InputError: the token, the class word, `concept.toml`, a caption or a mask is missing or wrong.
        PhotoError: there is no folder, or no usable photo in it.
    """
    require_folder(folder)
    settings = _read_settings(folder / SETTINGS_FILE)
    photo_folder = _find_photo_folder(folder)
    named = _KOHYA_NAME.fullmatch(photo_folder.resolve().name)
    token = _first(token, settings.token, named and named["token"])
    class_word = _first(class_word, settings.class_word, named and named["class_word"])
    token, class_word = _require_words(folder, token, class_word)

    report = read_photos(photo_folder)
    photos = require_photos(report, photo_folder)
    for problem in report.problems:
        _logger.warning("%s", problem)
    for path in of_no_photo(photo_folder):
        _logger.warning("'%s' belongs to no photo: none is called so; give it the name of its photo.", path)
    for photo in photos:
        if photo.advice is not None:
            _logger.warning("'%s': %s", photo.path, photo.advice)
    examples = tuple(_load_example(photo, token) for photo in photos)
    return Concept(token=token, class_word=class_word, examples=examples, source=folder, problems=report.problems)


def read_words(folder: Path) -> tuple[str, str]:
    """Return the token and the class word that the `concept.toml` in `folder` says.

    Raises:
        InputError: it does not say them, or is wrong.
    """
    settings = _read_settings(folder / SETTINGS_FILE)
    return _require_words(folder, settings.token, settings.class_word)


def read_caption(photo: Path) -> str:
    """Return the caption that stands beside the file `photo`, with single spaces; empty where there is none.

    Raises:
        InputError: it cannot be read or is not UTF-8.
    """
    path = caption_path(photo)
    return " ".join(_read_text(path).split()) if path.is_file() else ""


def load_mask(photo: Photo) -> Image.Image | None:
    """Return the mask that stands beside the file of `photo`, as large as it; None where there is none, or only black.

    Raises:
        InputError: it cannot be read, or has another shape than the photo.
    """
    path = mask_path(photo.path)
    if not path.is_file():
        return None
    mask = read_photo(path, background=BLACK).image.convert("L")
    size = photo.image.size
    if abs((mask.width / mask.height) / (size[0] / size[1]) - 1) > _MASK_ASPECT_TOLERANCE:
        raise InputError(
            f"'{path}' has another shape ({mask.width} x {mask.height} pixels) than its upright photo "
            f"({size[0]} x {size[1]}); make the mask from the upright photo or remove it."
        )
    if mask.getextrema()[1] == 0:
        _logger.warning("'%s' is all black, so the whole photo is used; paint the concept white in it.", path)
        return None
    return mask.resize(size, Image.Resampling.BILINEAR)


def check_token(token: str) -> str:
    """Return `token` when it can be a concept's token; whether a base already has it is told by `check_new_word`.

    Raises:
        InputError: it is empty, too long, the placeholder, or holds spaces or invisible characters.
    """
    if not token.strip():
        raise InputError("The token is empty; write it as one word such as '<V1>'.")
    if len(token) > MAX_TOKEN_LENGTH:
        raise InputError(
            f"The token '{token[:20]}…' has {len(token)} characters; "
            f"write it as one word of at most {MAX_TOKEN_LENGTH} such as '<V1>'."
        )
    if any(character.isspace() or unicodedata.category(character) in _INVISIBLE_CATEGORIES for character in token):
        raise InputError(f"The token {token!r} holds spaces or invisible characters; write it as one word such as '<V1>'.")
    if PLACEHOLDER in token:
        raise InputError(
            f"The token '{token}' holds '{PLACEHOLDER}', which stands for the token in captions; "
            "choose another word such as '<V1>'."
        )
    return token


def check_new_word(token: str, vocabulary: Container[str]) -> None:
    """Raise `InputError` when `token` stands in the `vocabulary` of a base's tokenizer."""
    if any(form in vocabulary for form in (token, token.lower(), f"{token.lower()}</w>")):
        raise InputError(f"The token '{token}' is already a word of the base; choose another, such as '<{token}-1>'.")


def check_class_word(class_word: str) -> str:
    """Return `class_word` with single spaces.

    Raises:
        InputError: it is empty.
    """
    words = " ".join(class_word.split())
    if not words:
        raise InputError("The class word is empty; say in a word or two what the concept is, such as 'dog'.")
    return words


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What `concept.toml` may say."""

    token: str | None = None
    class_word: str | None = None
    name: str | None = None
    source: str | None = None
    licence: str | None = None


def _read_settings(path: Path) -> _Settings:
    if not path.exists():
        return _Settings()
    try:
        values = tomllib.loads(_read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"'{path}' is not valid TOML ({error}); write lines such as token = \"<V1>\".") from error
    known = [field.name for field in fields(_Settings)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise InputError(f"'{path}' has unknown keys ({', '.join(unknown)}); it may have {', '.join(known)}.")
    for key, value in values.items():
        if not isinstance(value, str):
            raise InputError(f"'{key}' in '{path}' is not a text but {value!r}; put it between quotation marks.")
    return _Settings(**values)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 text ({error.reason}); save it again as UTF-8.") from error
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror}); check its permissions or remove it.") from error


def _find_photo_folder(folder: Path) -> Path:
    if list_pictures(folder):
        return folder
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and _KOHYA_NAME.fullmatch(path.name)]
    inside = [path for path in inside if list_pictures(path)]
    if len(inside) > 1:
        names = ", ".join(f"'{path.name}'" for path in inside)
        raise InputError(f"'{folder}' holds the photos of several concepts ({names}); give one of these folders.")
    return inside[0] if inside else folder


def _first(*choices: str | None) -> str | None:
    return next((choice for choice in choices if choice is not None), None)


def _require_words(folder: Path, token: str | None, class_word: str | None) -> tuple[str, str]:
    if token is None or class_word is None:
        missing = [("token", "--token", token), ("class word", "--class-word", class_word)]
        what = " and no ".join(name for name, _, value in missing if value is None)
        options = " and ".join(option for _, option, value in missing if value is None)
        raise InputError(f"'{folder}' says no {what} for its photos; give {options}, or write a {SETTINGS_FILE} there.")
    return check_token(token), check_class_word(class_word)


def _load_example(photo: Photo, token: str) -> Example:
    return Example(photo=photo, caption=_load_caption(photo, token), mask=load_mask(photo))


def _load_caption(photo: Photo, token: str) -> str:
    text = read_caption(photo.path)
    if not text:
        return DEFAULT_CAPTION
    caption = _token_pattern(token).sub(lambda _: PLACEHOLDER, text)
    return caption if PLACEHOLDER in caption else f"{PLACEHOLDER}, {caption}"


def _token_pattern(token: str) -> re.Pattern[str]:
    before = f"(?<!{_LETTER})" if re.match(_LETTER, token[0]) else ""
    after = f"(?!{_LETTER})" if re.match(_LETTER, token[-1]) else ""
    return re.compile(before + re.escape(token) + after)
