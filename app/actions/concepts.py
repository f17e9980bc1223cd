"""The library of concepts: photos in, with what was found about each; captions, masks, tokens."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from app.actions.studio import Studio, plain_name
from app.jobs import Job
from spectral_diffusion.concept import (
    DEFAULT_CAPTION,
    SAMPLES_FOLDER,
    SETTINGS_FILE,
    check_class_word,
    check_new_word,
    check_token,
    read_words,
)
from spectral_diffusion.errors import InputError, PhotoError
from spectral_diffusion.files import write_atomically
from spectral_diffusion.masks import suggest_mask, write_suggested_masks
from spectral_diffusion.photos import BLACK, MASK_ENDING, MAX_PHOTOS, Photo, list_pictures, mask_path, read_photo, read_photos
from spectral_diffusion.training.examples import random_crop

SAMPLES = ("poodle", "black-cat", "raccoon")
"""Sample concepts that a new studio has."""
MAX_UPLOAD = 64_000_000
"""Bytes that one uploaded file may have."""
MASK_SIDE = 768
"""Longest side in pixels of what a mask is painted on."""
WORDS = "words.json"
"""The base's own words, which the worker writes down, in the studio's folder."""
_THUMBNAIL, _MASK_THUMBNAIL = 384, 128


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of an uploaded file: whether it is `used`, and what was done to it or why it is not."""

    name: str
    used: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class PhotoCard:
    """A photo on the page; `mask` is a small copy of its mask, None without one."""

    name: str
    thumbnail: Path
    caption: str
    mask: Path | None


@dataclass(frozen=True, kw_only=True)
class ConceptCard:
    """A concept on the page; `job` is its latest training, `adapter` its file once it was trained."""

    name: str
    token: str
    class_word: str
    photos: tuple[PhotoCard, ...]
    adapter: Path | None
    job: Job | None


def add_samples(studio: Studio) -> None:
    """Give a studio that has never had concepts the sample ones."""
    if any(studio.folder("concepts").iterdir()) or any(studio.folder("removed").iterdir()):
        return
    for name in SAMPLES:
        folder = studio.folder("concepts") / name
        shutil.copytree(SAMPLES_FOLDER / name, folder)
        (folder / SETTINGS_FILE).touch()
        _make_thumbnails(studio, name, read_photos(folder).photos)


def concept_names(studio: Studio) -> list[str]:
    """Return the concepts' names, the oldest first."""
    files = studio.folder("concepts").glob(f"*/{SETTINGS_FILE}")
    return [file.parent.name for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.parent.name))]


def concept_folder(studio: Studio, name: str) -> Path:
    """Return the folder of the concept called `name`.

    Raises:
        InputError: there is none.
    """
    if name not in concept_names(studio):
        raise InputError(f"There is no concept '{name}'; choose one of the library.")
    return studio.folder("concepts") / name


def concept_card(studio: Studio, name: str, jobs: Sequence[Job] | None = None) -> ConceptCard:
    """Return what the page shows of the concept called `name`."""
    folder = concept_folder(studio, name)
    token, class_word = read_words(folder)
    jobs = studio.jobs.jobs() if jobs is None else jobs
    adapter = studio.folder("adapters") / f"{name}.safetensors"
    return ConceptCard(
        name=name,
        token=token,
        class_word=class_word,
        photos=tuple(_photo_card(studio, name, path) for path in list_pictures(folder)),
        adapter=adapter if adapter.is_file() else None,
        job=next((job for job in jobs if name in trained_by(job)), None),
    )


def trained_by(job: Job) -> list[str]:
    """Return the names of the concepts that `job` trains: none for other jobs, nor for one of an older queue."""
    return job.arguments.get("concepts", []) if job.kind == "train" else []


def concept_cards(studio: Studio) -> list[ConceptCard]:
    """Return the cards of all concepts."""
    jobs = studio.jobs.jobs()
    return [concept_card(studio, name, jobs) for name in concept_names(studio)]


def suggest_token(studio: Studio, class_word: str) -> str:
    """Return a token for a `class_word` that no concept has: `<dog>`, `<dog-2>` ..."""
    stem = plain_name("-".join(class_word.split())).lower() if class_word.strip() else "concept"
    taken = {token.lower() for token in _tokens(studio).values()}
    tokens = (f"<{stem}>", *(f"<{stem}-{number}>" for number in range(2, len(taken) + 3)))
    return next(token for token in tokens if token not in taken)


def create_concept(studio: Studio, token: str, class_word: str) -> str:
    """Make an empty concept and return its name.

    Raises:
        InputError: the token or the class word cannot be used, or the base or another concept has the token.
    """
    token, class_word = check_token(token.strip()), check_class_word(class_word)
    check_new_word(token, _words_of_base(studio))
    for other in _tokens(studio).values():
        if other.lower() == token.lower():
            raise InputError(
                f"Another concept has the token '{other}'; choose another, such as '{suggest_token(studio, class_word)}'."
            )
    stem, folders = plain_name(token), studio.folder("concepts")
    names = (stem, *(f"{stem}-{number}" for number in range(2, 1000)))
    name = next(name for name in names if not (folders / name).exists() and not _adapter_files(studio, name))
    text = f"token = {json.dumps(token)}\nclass_word = {json.dumps(class_word)}\n"
    write_atomically(folders / name / SETTINGS_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    return name


def add_photos(studio: Studio, name: str, files: Sequence[Path]) -> list[Finding]:
    """Add uploaded `files` to a concept and return what was found about each; what cannot be used is not kept.

    Raises:
        InputError: there are too many files, or no such concept.
    """
    folder = concept_folder(studio, name)
    if len(files) > MAX_PHOTOS:
        raise InputError(f"{len(files)} files are too many at once; the best twenty are plenty.")
    findings, copies = [], {}
    for file in files:
        if file.stat().st_size > MAX_UPLOAD:
            text = f"It is larger than {MAX_UPLOAD // 10**6} MB; scale it down first."
            findings.append(Finding(name=file.name, used=False, text=text))
            continue
        copy = _free_path(folder, file)
        shutil.copyfile(file, copy)
        copies[copy.name] = file.name
    report = read_photos(folder)
    used = {photo.path.name: photo for photo in report.photos}
    reasons = {problem.path.name: problem.reason for problem in report.problems}
    for copy, original in copies.items():
        if copy in used:
            findings.append(Finding(name=original, used=True, text=_found(used[copy])))
            continue
        (folder / copy).unlink()
        many = reasons.get(folder.name, "It is no photo; use JPEG, PNG, WebP or HEIC.")
        findings.append(Finding(name=original, used=False, text=_own_names(reasons.get(copy, many), copies)))
    _make_thumbnails(studio, name, report.photos)
    return findings


def set_caption(studio: Studio, name: str, photo: str, caption: str) -> None:
    """Write the caption of a photo; an empty one is the default again."""
    path = _photo(studio, name, photo).with_suffix(".txt")
    text = " ".join(caption.split())
    if text and text != DEFAULT_CAPTION:
        write_atomically(path, lambda temporary: temporary.write_text(f"{text}\n", encoding="utf-8"))
    else:
        path.unlink(missing_ok=True)


def set_mask(studio: Studio, name: str, photo: str, painted: Image.Image | None) -> None:
    """Keep a mask of any size, in which the concept is white; nothing, or one without white, removes it."""
    path = _photo(studio, name, photo)
    if painted is None or painted.convert("L").getextrema()[1] == 0:
        mask_path(path).unlink(missing_ok=True)
        return
    mask = painted.convert("L").resize(read_photo(path).image.size, Image.Resampling.BILINEAR)
    write_atomically(mask_path(path), lambda temporary: mask.save(temporary, "PNG"))


def mask_of(studio: Studio, name: str, photo: str) -> tuple[Image.Image, Image.Image | None]:
    """Return the upright photo and its mask, both small enough to paint on."""
    path = _photo(studio, name, photo)
    picture = read_photo(path).image.copy()
    picture.thumbnail((MASK_SIDE, MASK_SIDE), Image.Resampling.LANCZOS)
    return picture, _mask_at(path, picture.size)


def suggested_mask_of(studio: Studio, name: str, photo: str) -> tuple[Image.Image, Image.Image]:
    """Return the upright photo and a mask of what stands out in it, both small enough to paint on; nothing is kept.

    Raises:
        InputError: nothing stands out.
    """
    picture, _ = mask_of(studio, name, photo)
    mask = suggest_mask(picture)
    if mask is None:
        raise InputError(f"Nothing stands out in '{photo}'; paint where the concept is, or use the whole photo.")
    return picture, mask


def suggest_masks(studio: Studio, name: str) -> str:
    """Make a mask for each photo of a concept that has none, and return in words how many there are now."""
    made = write_suggested_masks(concept_folder(studio, name))
    found = sum(mask.path is not None for mask in made)
    if not made:
        return "Every photo has a mask already."
    rest = f"; in {len(made) - found} nothing stands out" if found < len(made) else ""
    return f"{found} mask{'s were' if found != 1 else ' was'} made{rest}. Look at them, and correct them with “Mask”."


def crop_previews(studio: Studio, name: str, photo: str, side: int, count: int = 4) -> list[Image.Image]:
    """Return `count` crops of a photo as the training draws them, `side` pixels wide."""
    path = _photo(studio, name, photo)
    picture = read_photo(path).image
    mask = _mask_at(path, picture.size) or Image.new("L", picture.size, 255)
    rng = np.random.default_rng(0)
    return [random_crop(picture, mask, side, rng)[0] for _ in range(count)]


def remove_photo(studio: Studio, name: str, photo: str) -> None:
    """Move a photo with its caption and mask to the removed ones."""
    path = _photo(studio, name, photo)
    for part in (path, path.with_suffix(".txt"), mask_path(path)):
        _remove(studio, part)
    _thumbnail(studio, name, path).unlink(missing_ok=True)


def remove_concept(studio: Studio, name: str) -> None:
    """Move a concept and its adapter to the removed ones.

    Raises:
        InputError: it is being trained.
    """
    card = concept_card(studio, name)
    if card.job is not None and not card.job.state.ended:
        raise InputError(f"{card.token} is {card.job.state}; stop its training first.")
    _remove(studio, concept_folder(studio, name))
    for path in _adapter_files(studio, name):
        _remove(studio, path)
    shutil.rmtree(studio.folder("thumbnails") / name, ignore_errors=True)


def concepts_of_tokens(studio: Studio, tokens: Sequence[str]) -> dict[str, Path]:
    """Return the photo folders of those of `tokens` that are concepts here, by token."""
    folders = {token: studio.folder("concepts") / name for name, token in _tokens(studio).items()}
    return {token: folders[token] for token in tokens if token in folders and list_pictures(folders[token])}


def _mask_at(path: Path, size: tuple[int, int]) -> Image.Image | None:
    """Return the mask of the photo at `path` in `size`, if it has one."""
    mask = mask_path(path)
    return read_photo(mask, background=BLACK).image.convert("L").resize(size) if mask.is_file() else None


def _words_of_base(studio: Studio) -> frozenset[str]:
    """Return the words of the chosen base; none while it was not looked at, when a training tells."""
    path, settings = studio.root / WORDS, studio.settings
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return frozenset(known["words"] if known.get("chosen") == [settings.base, settings.device] else ())


def _tokens(studio: Studio) -> dict[str, str]:
    return {name: read_words(studio.folder("concepts") / name)[0] for name in concept_names(studio)}


def _photo(studio: Studio, name: str, photo: str) -> Path:
    for path in list_pictures(concept_folder(studio, name)):
        if path.name == photo:
            return path
    raise InputError(f"'{name}' has no photo '{photo}'; choose one of its photos.")


def _photo_card(studio: Studio, name: str, path: Path) -> PhotoCard:
    caption = path.with_suffix(".txt")
    thumbnail = _thumbnail(studio, name, path)
    if not thumbnail.is_file():  # it was put there by hand
        with suppress(PhotoError):
            _make_thumbnails(studio, name, [read_photo(path)])
    return PhotoCard(
        name=path.name,
        thumbnail=thumbnail,
        caption=caption.read_text(encoding="utf-8").strip() if caption.is_file() else DEFAULT_CAPTION,
        mask=_mask_thumbnail(studio, name, path),
    )


def _thumbnail(studio: Studio, name: str, photo: Path) -> Path:
    return studio.folder("thumbnails") / name / f"{photo.stem}.webp"


def _mask_thumbnail(studio: Studio, name: str, photo: Path) -> Path | None:
    mask, small = mask_path(photo), _thumbnail(studio, name, mask_path(photo))
    if not mask.is_file():
        return None
    if not small.is_file() or small.stat().st_mtime_ns < mask.stat().st_mtime_ns:
        with suppress(PhotoError):
            picture = read_photo(mask, background=BLACK).image
            picture.thumbnail((_MASK_THUMBNAIL, _MASK_THUMBNAIL))
            write_atomically(small, lambda temporary: picture.save(temporary, "WEBP"))
    return small


def _make_thumbnails(studio: Studio, name: str, photos: Sequence[Photo]) -> None:
    for photo in photos:
        path = _thumbnail(studio, name, photo.path)
        if not path.exists():
            small = photo.image.copy()
            small.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
            write_atomically(path, lambda temporary, small=small: small.save(temporary, "WEBP", quality=88))


def _free_path(folder: Path, file: Path) -> Path:
    """Return a path in `folder` whose stem no file there has, under a plain form of the name of `file`."""
    stem, suffix = plain_name(file.stem).removesuffix(MASK_ENDING.partition(".")[0]) or "photo", file.suffix.lower()
    suffix = suffix if suffix[1:].isalnum() and len(suffix) <= 6 else ".image"
    taken = {path.stem for path in folder.iterdir()}
    stems = (stem, *(f"{stem}-{number}" for number in range(2, 10_000)))
    return folder / f"{next(stem for stem in stems if stem not in taken)}{suffix}"


def _found(photo: Photo) -> str:
    """Return what was done to a photo that is used, and what would make a better one."""
    notes = ", ".join(photo.notes) or ("" if photo.advice else "good as it is")
    return " ".join(filter(None, (f"{notes[:1].upper()}{notes[1:]}." if notes else "", photo.advice)))


def _own_names(reason: str, copies: dict[str, str]) -> str:
    """Return `reason` with the names that the files had when they were uploaded."""
    for copy, original in copies.items():
        reason = reason.replace(f"'{copy}'", f"'{original}'")
    return reason


def _adapter_files(studio: Studio, name: str) -> list[Path]:
    folder = studio.folder("adapters")
    endings = (".safetensors", ".safetensors.checkpoint", ".band.json", "-samples")
    return [path for path in (folder / f"{name}{ending}" for ending in endings) if path.exists()]


def _remove(studio: Studio, path: Path) -> None:
    if path.exists():
        path.rename(studio.folder("removed") / f"{time.time_ns()}-{path.name}")
