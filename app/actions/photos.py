"""The photos of a concept: in with what was found about each, with captions, masks, thumbnails and previews of crops."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from app.actions.studio import Studio, concept_folder, plain_name, put_away
from spectral_diffusion.concepts.concept import DEFAULT_CAPTION, load_mask, read_caption
from spectral_diffusion.concepts.masks import suggest_mask, write_suggested_masks
from spectral_diffusion.concepts.photos import (
    BLACK,
    CAPTION_ENDING,
    MASK_ENDING,
    MAX_PHOTOS,
    Photo,
    caption_path,
    list_pictures,
    mask_path,
    read_photo,
    read_photos,
    same_picture,
)
from spectral_diffusion.errors import InputError, PhotoError, StorageError
from spectral_diffusion.files import numbered, write_atomically
from spectral_diffusion.training.examples import random_crop

MAX_UPLOAD = 64_000_000
"""Bytes that one photo, mask or caption may have."""
MASK_SIDE = 768
"""Longest side in pixels of what a mask is painted on."""
_THUMBNAIL, _MASK_THUMBNAIL = 384, 128


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of an uploaded file: whether it is `used`, and what was done to it or why it is not."""

    name: str
    used: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class PhotoCard:
    """A photo on the page.

    Attributes:
        mask: a small copy of its mask, None without one.
        problem: why its caption cannot be read.
    """

    name: str
    thumbnail: Path
    caption: str
    mask: Path | None
    problem: str | None


def add_photos(studio: Studio, name: str, files: Sequence[Path]) -> list[Finding]:
    """Add uploaded `files` to a concept and return what was found about each; what cannot be used is not kept.

    A mask and a caption go beside the photo that they are called as.

    Raises:
        InputError: there are too many files, or no such concept.
        StorageError: the disk is full; none of the files is kept.
    """
    folder = concept_folder(studio, name)
    check_count(files)
    large = [file for file in files if file.stat().st_size > MAX_UPLOAD]
    text = f"It is larger than {MAX_UPLOAD // 10**6} MB; scale it down first."
    findings, copies = [Finding(name=file.name, used=False, text=text) for file in large], {}
    files = [file for file in files if file not in large]
    beside = [file for file in files if _ending(file)]
    try:
        for file in (file for file in files if not _ending(file)):
            copy = _free_path(folder, file)
            write_atomically(copy, lambda path, file=file: shutil.copyfile(file, path))
            copies[copy.name] = file.name
    except StorageError:
        for copy in copies:
            (folder / copy).unlink()
        raise
    report = read_photos(folder)
    used = {photo.path.name: photo for photo in report.photos}
    reasons = {problem.path.name: problem.reason for problem in report.problems}
    for problem in report.problems:  # what was there stays, with its caption and its mask, whatever the newcomer's name
        if problem.same_as is not None and problem.same_as.name in copies and problem.path.name not in copies:
            reasons[problem.same_as.name] = same_picture(problem.path)
            used.pop(problem.same_as.name, None)
    for copy, original in copies.items():
        if copy in used:
            findings.append(Finding(name=original, used=True, text=_found(used[copy])))
            continue
        (folder / copy).unlink()
        many = reasons.get(folder.name, "It is no photo; use JPEG, PNG, WebP or HEIC.")
        findings.append(Finding(name=original, used=False, text=_own_names(reasons.get(copy, many), copies)))
    make_thumbnails(studio, name, list(used.values()))
    new = [(Path(original).stem, folder / copy) for copy, original in copies.items() if copy in used]
    return [*findings, *(_put_beside(folder, file, new) for file in beside)]


def _ending(file: Path) -> str | None:
    """Return the end of the name by which `file` is a mask or a caption, None for others."""
    name = file.name.casefold()
    return next((ending for ending in (MASK_ENDING, CAPTION_ENDING) if name.endswith(ending) and name != ending), None)


def _put_beside(folder: Path, file: Path, new: Sequence[tuple[str, Path]]) -> Finding:
    """Put an uploaded mask or caption beside its photo: one of the `new` ones, by their names of old, or else of `folder`."""
    ending = _ending(file)
    what, stem = "mask" if ending == MASK_ENDING else "caption", file.name[: -len(ending)]
    photos = [photo for name, photo in new if name.casefold() == stem.casefold()]
    photos = photos or [photo for photo in list_pictures(folder) if photo.stem.casefold() == plain_name(stem).casefold()]
    if len(photos) != 1:
        many = "two photos are" if photos else "no photo is"
        text = f"It is a {what} by its name, but {many} called '{stem}' here; give it the name of its photo."
        return Finding(name=file.name, used=False, text=text)
    path = photos[0].with_name(photos[0].stem + ending)
    if path.exists():
        return Finding(name=file.name, used=False, text=f"'{photos[0].name}' has a {what} already; change that one.")
    try:
        write_atomically(path, lambda temporary: shutil.copyfile(file, temporary))
        load_mask(read_photo(photos[0])) if ending == MASK_ENDING else read_caption(photos[0])
    except (InputError, StorageError) as error:
        path.unlink(missing_ok=True)
        return Finding(name=file.name, used=False, text=str(error).replace(str(path), file.name))
    return Finding(name=file.name, used=True, text=f"The {what} of '{photos[0].name}'.")


def check_count(files: Sequence[Path]) -> None:
    """Raise `InputError` when `files` are more than a concept takes at once."""
    if len(files) > MAX_PHOTOS:
        raise InputError(f"{len(files)} files are too many at once; the best twenty are plenty.")


def set_caption(studio: Studio, name: str, photo: str, caption: str) -> None:
    """Write the caption of a photo; an empty one is the default again."""
    path = caption_path(_photo(studio, name, photo))
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
    for part in (path, caption_path(path), mask_path(path)):
        put_away(studio, part)
    _thumbnail(studio, name, path).unlink(missing_ok=True)


def _mask_at(path: Path, size: tuple[int, int]) -> Image.Image | None:
    """Return the mask of the photo at `path` in `size`, if it has one."""
    mask = mask_path(path)
    return read_photo(mask, background=BLACK).image.convert("L").resize(size) if mask.is_file() else None


def _photo(studio: Studio, name: str, photo: str) -> Path:
    for path in list_pictures(concept_folder(studio, name)):
        if path.name == photo:
            return path
    raise InputError(f"'{name}' has no photo '{photo}'; choose one of its photos.")


def photo_card(studio: Studio, name: str, path: Path) -> PhotoCard:
    """Return what the page shows of the photo at `path` of the concept called `name`."""
    thumbnail, problem = _thumbnail(studio, name, path), None
    with suppress(PhotoError):
        if not _is_fresh(thumbnail, path):  # it was put there by hand
            make_thumbnails(studio, name, [read_photo(path)])
    try:
        caption = read_caption(path) or DEFAULT_CAPTION
    except InputError as error:
        caption, problem = "", str(error)
    return PhotoCard(
        name=path.name, thumbnail=thumbnail, caption=caption, mask=_mask_thumbnail(studio, name, path), problem=problem
    )


def _is_fresh(small: Path, path: Path) -> bool:
    """Tell whether `small` was made from the file at `path` as it is now, whose time it then has."""
    return small.is_file() and small.stat().st_mtime_ns == path.stat().st_mtime_ns


def _keep_small(picture: Image.Image, side: int, small: Path, path: Path) -> None:
    """Write a copy of `picture`, at most `side` pixels long, to `small`, with the time of the file at `path` that it shows."""
    copy = picture.copy()
    copy.thumbnail((side, side), Image.Resampling.LANCZOS)
    times = path.stat()
    write_atomically(small, lambda temporary: copy.save(temporary, "WEBP", quality=88))
    os.utime(small, ns=(times.st_atime_ns, times.st_mtime_ns))


def _thumbnail(studio: Studio, name: str, photo: Path) -> Path:
    return studio.folder("thumbnails") / name / f"{photo.stem}.webp"


def _mask_thumbnail(studio: Studio, name: str, photo: Path) -> Path | None:
    mask, small = mask_path(photo), _thumbnail(studio, name, mask_path(photo))
    if not mask.is_file():
        return None
    if not _is_fresh(small, mask):
        with suppress(PhotoError):
            _keep_small(read_photo(mask, background=BLACK).image, _MASK_THUMBNAIL, small, mask)
    return small


def make_thumbnails(studio: Studio, name: str, photos: Sequence[Photo]) -> None:
    """Make the small copies for the page of those `photos` of the concept called `name` that have none as they are now."""
    for photo in photos:
        path = _thumbnail(studio, name, photo.path)
        if not _is_fresh(path, photo.path):
            _keep_small(photo.image, _THUMBNAIL, path, photo.path)


def _free_path(folder: Path, file: Path) -> Path:
    """Return a path in `folder` whose stem no file there has, under a plain form of the name of `file`."""
    stem, suffix = plain_name(file.stem).strip("-") or "photo", file.suffix.lower()
    suffix = suffix if suffix[1:].isalnum() and len(suffix) <= 6 else ".image"
    taken = {path.stem for path in folder.iterdir()}
    return folder / f"{next(stem for stem in numbered(stem) if stem not in taken)}{suffix}"


def _found(photo: Photo) -> str:
    """Return what was done to a photo that is used, and what would make a better one."""
    notes = ", ".join(photo.notes) or ("" if photo.advice else "good as it is")
    return " ".join(filter(None, (f"{notes[:1].upper()}{notes[1:]}." if notes else "", photo.advice)))


def _own_names(reason: str, copies: dict[str, str]) -> str:
    """Return `reason` with the names that the files had when they were uploaded."""
    for copy, original in copies.items():
        reason = reason.replace(f"'{copy}'", f"'{original}'")
    return reason
