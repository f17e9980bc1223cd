"""Find and read the photos of a concept: upright RGB pictures of bounded size, and a reason for each file left out."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from spectral_diffusion.concepts.sharpness import BLURRED, blur_effect
from spectral_diffusion.errors import PhotoError

MAX_SIDE = 2048
"""Longest side of a photo in pixels; larger ones are scaled down."""
MIN_SIDE = 32
"""Least shorter side of a photo in pixels, measured after scaling down."""
MAX_PIXELS = 100_000_000
"""Pictures with more pixels than this are refused from their header, before anything is decoded."""
MAX_PHOTOS = 200
"""Most photos that are read from one folder."""
MASK_ENDING = "-mask.png"
"""How the name of a mask ends, after the stem of its photo."""
CAPTION_ENDING = ".txt"
"""How the name of a caption ends, after the stem of its photo."""

IGNORED_SUFFIXES = frozenset(
    ".txt .caption .toml .json .jsonl .yaml .yml .csv .md .html .htm .pdf .docx .zip .tar .gz .7z .ini .db .log .py "
    ".xmp .aae .mov .mp4 .m4v .avi .mkv .webm .wav .mp3 .npy .npz .pt .pth .bin .ckpt .safetensors".split()
)
"""Suffixes of files that lie beside photos and are passed over; all other files are examined by content."""
IGNORED_NAMES = frozenset({"licence", "license", "copying", "notice", "readme"})
RAW_SUFFIXES = frozenset(".dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .pef .srw".split())
FORMATS = ("JPEG", "PNG", "WEBP", "HEIF", "AVIF", "GIF", "TIFF", "BMP", "PPM", "JPEG2000")
"""Pillow's names of the formats that are decoded; others (EPS runs Ghostscript, for one) are not tried."""

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
_LIKE_A_MASK = re.compile(r"(.+)[-_]mask", re.IGNORECASE)
_STILL_FORMATS = frozenset({"MPO", "HEIF"})
# Measured: copies at a quarter of the size or of low quality differ by up to 12 bits and 2 levels; other pictures of
# the same concept, and characters drawn again on the same scene, by 26 bits or more and 10 levels or more.
_SAME_BITS, _SAME_COLOUR, _SAME_ASPECT = 20, 5.0, 0.04
# A small thing on a plain ground moves fewer bits and less colour. Measured on 65 photos: in copies at quality 30 to 90 the
# brightness of no cell differs by more than 17 levels, at a quarter of 256 pixels by up to 28 (by more than 22 in 1 of 100);
# where a thing a tenth as wide as the photo lies elsewhere, by more than 22 in 383 of 384 pairs.
_SAME_CELL = 22.0
_BRIGHTNESS = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A photo ready for use.

    Attributes:
        path: the file it came from.
        image: RGB, upright, longest side at most `MAX_SIDE` pixels.
        notes: what was done to it, such as 'turned upright'.
        advice: what would make a better photo, None when nothing was found; only looked for in a folder of photos.
    """

    path: Path
    image: Image.Image
    notes: tuple[str, ...] = ()
    advice: str | None = None


@dataclass(frozen=True, kw_only=True)
class PhotoProblem:
    """Why the file at `path` was left out.

    Attributes:
        path: the file, or the folder when there are too many.
        reason: one sentence with a remedy.
        same_as: the photo that shows the same picture, if that is why.
    """

    path: Path
    reason: str
    same_as: Path | None = None

    def __str__(self) -> str:
        return f"'{self.path}': {self.reason}"


@dataclass(frozen=True, kw_only=True)
class PhotoReport:
    """The photos of a folder in natural order of their names, and the files that were left out."""

    photos: tuple[Photo, ...]
    problems: tuple[PhotoProblem, ...]


def require_folder(folder: Path) -> None:
    """Check that `folder` is a folder.

    Raises:
        PhotoError: nothing is there, or a file.
    """
    if not os.path.isdir(folder):
        what = "is a file" if os.path.exists(folder) else "does not exist"
        raise PhotoError(f"'{folder}' {what}; give the folder that holds the photos of one concept.")


def list_pictures(folder: Path) -> list[Path]:
    """Return the files of `folder` that should be photos, in natural order (`2.jpg` before `10.jpg`), unopened.

    Raises:
        PhotoError: `folder` is not a folder or may not be read.
    """
    require_folder(folder)
    try:
        return sorted((path for path in folder.iterdir() if _should_be_photo(path)), key=_natural)
    except OSError as error:
        raise PhotoError(f"'{folder}' cannot be read ({error}); change its permissions or copy the photos.") from error


def read_photos(folder: Path) -> PhotoReport:
    """Read every photo in `folder`, without its subfolders; what cannot be used is named in the report.

    Raises:
        PhotoError: `folder` is not a folder or may not be read. A folder without good photos is not an error here.
    """
    photos: list[Photo] = []
    fingerprints: list[_Fingerprint] = []
    problems: list[PhotoProblem] = []
    pictures = list_pictures(folder)
    by_stem = {path.stem.casefold(): path for path in reversed(pictures)}
    for index, path in enumerate(pictures):
        if len(photos) == MAX_PHOTOS:
            many = f"{len(pictures) - index} more files were left out, as at most {MAX_PHOTOS} photos are used"
            problems.append(PhotoProblem(path=folder, reason=f"{many}; keep the best ones only."))
            break
        try:
            _refuse_a_mask(path, by_stem)
            photo = _decode(path, WHITE)
            fingerprint = _fingerprint(photo.image)
            _refuse_duplicate(fingerprint, photos, fingerprints)
            _refuse_a_taken_name(path, [photo.path for photo in photos])
        except _Refused as refused:
            problems.append(PhotoProblem(path=path, reason=str(refused), same_as=refused.same_as))
        else:
            photos.append(replace(photo, advice=_advice(photo.image)))
            fingerprints.append(fingerprint)
    return PhotoReport(photos=tuple(photos), problems=tuple(problems))


def read_photo(path: Path, *, background: tuple[int, int, int] = WHITE, least: int = MIN_SIDE) -> Photo:
    """Read one picture file.

    Args:
        background: the RGB colour (0 to 255) that shows through where the picture is transparent.
        least: how many pixels the shorter side must have, after scaling down.

    Raises:
        PhotoError: the file is not a usable picture.
    """
    try:
        return _decode(path, background, least)
    except _Refused as refused:
        raise PhotoError(f"'{path}': {refused}") from refused


def require_photos(report: PhotoReport, where: Path) -> tuple[Photo, ...]:
    """Return the photos of `report`.

    Raises:
        PhotoError: there is none; the message lists what was wrong with the files in `where`.
    """
    if not report.photos and not report.problems:
        raise PhotoError(f"'{where}' holds no photos; put some JPEG, PNG, WebP or HEIC files there.")
    if not report.photos:
        listed = "".join(f"\n  {problem}" for problem in report.problems)
        raise PhotoError(f"'{where}' holds no usable photo; replace or add some:{listed}")
    return report.photos


def same_picture(photo: Path) -> str:
    """Return why a file that shows the same as `photo` is left out."""
    return f"It is the same picture as '{photo.name}'; keep only one of the two."


def mask_path(photo: Path) -> Path:
    """Return where the mask of the photo at `photo` lies."""
    return _beside(photo, MASK_ENDING)


def caption_path(photo: Path) -> Path:
    """Return where the caption of the photo at `photo` lies."""
    return _beside(photo, CAPTION_ENDING)


def of_no_photo(folder: Path) -> list[Path]:
    """Return the masks and captions in `folder` that are called as no picture there."""
    stems = {picture.stem.casefold() for picture in list_pictures(folder)}
    named = ((path, path.name.casefold()) for path in sorted(folder.iterdir()))
    return [
        path
        for path, name in named
        for ending in (MASK_ENDING, CAPTION_ENDING)
        if name.endswith(ending) and name.removesuffix(ending) not in stems | IGNORED_NAMES
    ]


def _beside(photo: Path, ending: str) -> Path:
    """Return the file that is called as `photo` but for `ending`, in whatever case it is written there."""
    path = photo.with_name(photo.stem + ending)
    if path.exists() or not photo.parent.is_dir():
        return path
    written = (name for name in os.listdir(photo.parent) if name.casefold() == path.name.casefold())
    return path.with_name(next(written, path.name))


class _Refused(Exception):
    """Carries the reason of a `PhotoProblem`."""

    def __init__(self, reason: str, same_as: Path | None = None):
        super().__init__(reason)
        self.same_as = same_as


def _should_be_photo(path: Path) -> bool:
    name = path.name.lower()
    if name.startswith(".") or name.endswith(MASK_ENDING) or name in IGNORED_NAMES:
        return False
    # A broken link is examined, so that it is reported; pipes and devices could block for ever.
    return path.suffix.lower() not in IGNORED_SUFFIXES and (path.is_file() or (path.is_symlink() and not path.exists()))


def _natural(path: Path) -> tuple[list[tuple[str, int]], str]:
    pieces = re.findall(r"([^0-9]*)([0-9]*)", path.name.casefold())
    return [(text, int(digits or -1)) for text, digits in pieces], path.name


def _decode(path: Path, background: tuple[int, int, int], least: int = MIN_SIDE) -> Photo:
    _refuse_early(path)
    _register_heif()
    try:
        # Pillow's remarks on metadata and sizes do not concern the user; what matters becomes a reason below.
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as opened:
            return _prepare(path, opened, background, least)
    except _Refused:
        raise
    except Image.DecompressionBombError as error:
        raise _Refused(_too_large("The picture")) from error
    except UnidentifiedImageError as error:
        raise _Refused("The file is damaged or no picture of a known kind; save it as JPEG or PNG.") from error
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise _Refused(f"The picture is damaged or cut short ({error}); copy it again from where it came.") from error


def _refuse_early(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise _Refused(f"The file cannot be opened ({error.strerror}); check its permissions or remove it.") from error
    suffix = path.suffix.lower()
    if not head:
        raise _Refused("The file is empty (zero bytes); copy it again from where it came.")
    if suffix in (".svg", ".svgz") or (head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<" and b"<svg" in head):
        raise _Refused("The file is an SVG drawing, not a photo; export it as PNG.")
    if suffix in RAW_SUFFIXES:
        raise _Refused("The file is a camera's raw file, which is not read; export it as JPEG.")


@cache
def _register_heif() -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()


def _prepare(path: Path, opened: Image.Image, background: tuple[int, int, int], least: int) -> Photo:
    size = opened.size
    scaled = _scaled_size(size, least)
    notes = []
    if getattr(opened, "is_animated", False) and opened.format not in _STILL_FORMATS:
        notes.append("first frame of an animation")
    if opened.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
        notes.append("turned upright")
    opened.draft(None, scaled)  # the JPEG decoder then skips detail that would be thrown away
    image = _to_rgb(ImageOps.exif_transpose(opened), background, notes)
    if scaled != size:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        notes.append(f"scaled down from {size[0]} x {size[1]}")
    return Photo(path=path, image=image, notes=tuple(notes))


def _advice(image: Image.Image) -> str | None:
    return "It looks blurred; a sharp photo teaches more." if blur_effect(image) > BLURRED else None


def _scaled_size(size: tuple[int, int], least: int) -> tuple[int, int]:
    width, height = size
    if width * height > MAX_PIXELS:
        raise _Refused(_too_large(f"The picture of {width} x {height} pixels"))
    factor = min(1.0, MAX_SIDE / max(size))
    scaled = round(width * factor), round(height * factor)
    if min(size) < least:
        remedy = f"use one whose shorter side has at least {least} pixels"
        raise _Refused(f"The picture is too small ({width} x {height} pixels); {remedy}.")
    if min(scaled) < least:
        narrow = f"{width} x {height} pixels, of which {scaled[0]} x {scaled[1]} are left at the size that is used"
        raise _Refused(f"The picture is too narrow ({narrow}); cut it to the part that matters.")
    return scaled


def _too_large(what: str) -> str:
    return f"{what} is larger than {MAX_PIXELS // 1_000_000} megapixels; scale it down first."


def _to_rgb(image: Image.Image, background: tuple[int, int, int], notes: list[str]) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        notes.append("brightness reduced to 8 bits")
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema()[0] == 255:
        return rgba.convert("RGB")
    notes.append(f"transparent background filled with {'white' if background == WHITE else 'a colour'}")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    pixels = np.nan_to_num(np.asarray(image, dtype=np.float32))
    white = max(1.0 if image.mode == "F" else 65535.0, float(pixels.max()))
    return np.clip(pixels * (255.0 / white) + 0.5, 0, 255).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class _Fingerprint:
    """`bits`: 256 signs of brightness steps; `thumbnail`: `(32, 32, 3)` float32, 0 to 255; `aspect`: width / height."""

    bits: int
    thumbnail: np.ndarray
    aspect: float


def _fingerprint(image: Image.Image) -> _Fingerprint:
    steps = np.asarray(image.resize((17, 16), Image.Resampling.BOX).convert("L"), dtype=np.int16)
    # Steps of a few levels are compression noise on plain backgrounds.
    bits = np.packbits(np.diff(steps, axis=1) > 3)
    return _Fingerprint(
        bits=int.from_bytes(bits.tobytes()),
        thumbnail=np.asarray(image.resize((32, 32), Image.Resampling.BOX), dtype=np.float32),
        aspect=image.width / image.height,
    )


def _refuse_duplicate(new: _Fingerprint, photos: list[Photo], fingerprints: list[_Fingerprint]) -> None:
    for photo, known in zip(photos, fingerprints, strict=True):
        if _same_picture(new, known):
            raise _Refused(same_picture(photo.path), photo.path)


def _refuse_a_mask(path: Path, by_stem: Mapping[str, Path]) -> None:
    name = _LIKE_A_MASK.fullmatch(path.stem)
    if name and name[1].casefold() in by_stem:
        photo = by_stem[name[1].casefold()]
        raise _Refused(f"It looks like the mask of '{photo.name}'; save it as '{photo.stem}{MASK_ENDING}'.")


def _refuse_a_taken_name(path: Path, others: Sequence[Path]) -> None:
    other = next((other for other in others if other.stem.casefold() == path.stem.casefold()), None)
    if other is not None:
        raise _Refused(f"It is called as '{other.name}' is, so that captions and masks cannot be told apart; rename one of them.")


def _same_picture(one: _Fingerprint, other: _Fingerprint) -> bool:
    difference = one.thumbnail - other.thumbnail
    return (
        (one.bits ^ other.bits).bit_count() <= _SAME_BITS
        and abs(one.aspect / other.aspect - 1) <= _SAME_ASPECT
        and float(np.abs(difference).mean()) <= _SAME_COLOUR
        and float(np.abs(difference @ _BRIGHTNESS).max()) <= _SAME_CELL
    )
