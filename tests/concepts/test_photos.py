"""Photos: what is read, how it is made usable, and what is left out with which reason."""

from __future__ import annotations

import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import ExifTags, Image, ImageDraw, ImageFilter, features

from spectral_diffusion.concepts.photos import MAX_PHOTOS, MAX_SIDE, Photo, read_photo, read_photos, require_photos
from spectral_diffusion.errors import PhotoError


def picture(seed: int = 0, size: tuple[int, int] = (64, 48), mode: str = "RGB") -> Image.Image:
    """A smooth random picture: enlarged noise, different for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def only_photo(folder: Path) -> Photo:
    report = read_photos(folder)
    assert report.problems == ()
    (photo,) = report.photos
    assert photo.image.mode == "RGB"
    return photo


def only_reason(folder: Path) -> str:
    report = read_photos(folder)
    assert report.photos == ()
    (problem,) = report.problems
    return problem.reason


def close(one: Image.Image, other: Image.Image, tolerance: float) -> bool:
    return bool(np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).mean() <= tolerance)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 64)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "YCbCr"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = picture(mode=mode)
    image.save(tmp_path / "photo.tiff", compression="tiff_lzw")  # Pillow 12 does not read the plain YCbCr that it writes
    assert close(only_photo(tmp_path).image, image.convert("RGB"), tolerance=1.0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF"])
def test_every_format_is_read_whatever_its_name(tmp_path: Path, kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    if kind == "HEIF":
        pillow_heif.from_pillow(picture()).save(tmp_path / "IMG_0001.png", quality=90)
    else:
        picture().save(tmp_path / "IMG_0001.png", format=kind)
    assert close(only_photo(tmp_path).image, picture(), tolerance=20.0)  # a GIF's 256 colours are coarse


@pytest.mark.parametrize("name", ["IMG 1.JPG", "größe ß.png", "我的狗.webp", "🐕.png", "no suffix"])
def test_names_may_hold_anything(tmp_path: Path, name: str) -> None:
    picture().save(tmp_path / name, format="PNG")
    assert only_photo(tmp_path).path.name == name


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (40, 1))
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    photo = only_photo(tmp_path)
    assert "brightness reduced to 8 bits" in photo.notes
    assert close(photo.image.convert("L"), Image.fromarray((ramp // 257).astype(np.uint8)), tolerance=1.0)


def test_floating_point_grey_keeps_its_brightness(tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 40), 0.5, np.float32)).save(tmp_path / "grey.tiff")
    assert only_photo(tmp_path).image.getpixel((5, 5)) == (128, 128, 128)


def test_transparent_background_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (10, 10, 30, 30))
    image.save(tmp_path / "cutout.png")
    photo = only_photo(tmp_path)
    assert photo.notes == ("transparent background filled with white",)
    assert photo.image.getpixel((0, 0)) == (255, 255, 255)
    assert photo.image.getpixel((20, 20)) == (0, 0, 255)


def test_transparent_palette_becomes_white(tmp_path: Path) -> None:
    image = Image.new("P", (40, 40), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "palette.png", transparency=b"\x00\xff")
    assert only_photo(tmp_path).image.getpixel((0, 0)) == (255, 255, 255)


def test_opaque_alpha_needs_no_note(tmp_path: Path) -> None:
    picture(mode="RGBA").save(tmp_path / "opaque.png")
    assert only_photo(tmp_path).notes == ()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_give_their_first_frame(tmp_path: Path, kind: str) -> None:
    picture(1).save(tmp_path / "moving.gif", format=kind, save_all=True, append_images=[picture(2), picture(3)])
    photo = only_photo(tmp_path)
    assert photo.notes == ("first frame of an animation",)
    assert close(photo.image, picture(1), tolerance=20.0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_photos_are_turned_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    turns = [0, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM]
    turns += [Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE]
    turns += [Image.Transpose.ROTATE_270]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture().transpose(turns[orientation - 1]).save(tmp_path / "photo.jpg", format=kind, exif=exif)
    photo = only_photo(tmp_path)
    assert photo.notes == ("turned upright",)
    assert photo.image.size == (64, 48)
    assert close(photo.image, picture(), tolerance=8.0)


def test_large_photos_are_scaled_down_after_turning(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(size=(4600, 2300)).save(tmp_path / "large.jpg", exif=exif)
    photo = only_photo(tmp_path)
    assert photo.notes == ("turned upright", "scaled down from 4600 x 2300")
    assert photo.image.size == (MAX_SIDE // 2, MAX_SIDE)


def test_order_is_natural_and_other_files_are_passed_over(tmp_path: Path) -> None:
    for seed, name in enumerate(["10.png", "2.png", "1.png", "a.png"]):
        picture(seed).save(tmp_path / name)
    picture(9).save(tmp_path / "1-mask.png")
    picture(8).save(tmp_path / ".hidden.png")
    (tmp_path / "folder.png").mkdir()
    for name in ["1.txt", "concept.toml", "metadata.json", "LICENSE", "Thumbs.db", "IMG_1.MOV"]:
        (tmp_path / name).write_text("text")
    report = read_photos(tmp_path)
    assert [photo.path.name for photo in report.photos] == ["1.png", "2.png", "10.png", "a.png"]
    assert report.problems == ()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jpg", b"", r"empty \(zero bytes\); copy it again"),
        ("page.jpg", b"<!DOCTYPE html><html>not found</html>", "no picture of a known kind; save it as JPEG"),
        ("noise.png", b"\x89PNG\r\n\x1a\n" + b"junk" * 40, "damaged"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG drawing, not a photo; export it as PNG"),
        ("drawing.png", b"<?xml version='1.0'?><svg/>", "SVG drawing"),
        ("postscript.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "no picture"),
        ("raw.dng", b"II*\0", "camera's raw file, which is not read; export it as JPEG"),
        ("bomb.png", png_header(20_000, 20_000), "larger than 100 megapixels; scale it down"),
        ("small_bomb.png", png_header(10_001, 10_000), "10001 x 10000 pixels is larger than 100 megapixels"),
        ("short.png", png_header(64, 64), "damaged or cut short .*; copy it again"),
    ],
)
def test_hostile_and_broken_files_are_named_with_a_reason(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PhotoError, match=reason):
        read_photo(tmp_path / name)
    with pytest.raises(PhotoError, match=f"holds no usable photo; replace or add some:\n.*{name}"):
        require_photos(read_photos(tmp_path), tmp_path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "HEIF", "AVIF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_left_out(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "photo.jpg"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    if kind == "HEIF":
        pillow_heif.from_pillow(noise).save(path)
    else:
        noise.save(path, format=kind)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "damaged" in only_reason(tmp_path)


@pytest.mark.parametrize("size", [(1, 1), (31, 400)])
def test_too_small(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "small.png")
    assert f"too small ({size[0]} x {size[1]} pixels); use one" in only_reason(tmp_path)


def test_too_narrow(tmp_path: Path) -> None:
    Image.new("RGB", (8000, 100)).save(tmp_path / "narrow.png")
    assert "too narrow (8000 x 100 pixels, of which 2048 x 26 are left" in only_reason(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links need a right of their own on Windows")
def test_a_broken_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    assert "cannot be opened (No such file or directory)" in only_reason(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("size", [(640, 480), (160, 120), (1280, 960)])
def test_the_same_picture_again_is_a_duplicate(tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    picture(size=(640, 480)).save(tmp_path / "1.png")
    picture(size=(640, 480)).resize(size).save(tmp_path / "2.jpg", format=kind)
    report = read_photos(tmp_path)
    assert [photo.path.name for photo in report.photos] == ["1.png"]
    assert [problem.path.name for problem in report.problems] == ["2.jpg"]
    assert report.problems[0].reason == "It is the same picture as '1.png'; keep only one of the two."


def test_one_thing_on_several_backgrounds_or_places_is_no_duplicate(tmp_path: Path) -> None:
    backgrounds = [(120, 180, 240), (130, 190, 230), (240, 240, 240), (60, 100, 60)]
    for index, colour in enumerate(backgrounds):
        for place in (60, 90):
            image = Image.new("RGB", (256, 256), colour)
            image.paste(picture(7, size=(110, 130)), (place, 80))
            image.save(tmp_path / f"{index} {place}.png")
    report = read_photos(tmp_path)
    assert len(report.photos) == 8, report.problems


@pytest.mark.parametrize("ground", [(235, 235, 235), (20, 20, 20)])
def test_a_small_thing_in_several_places_is_no_duplicate(tmp_path: Path, ground: tuple[int, int, int]) -> None:
    grain = np.random.default_rng(0)
    for number in range(6):
        wall = np.clip(np.array(ground) + grain.normal(0, 4, (400, 400, 3)), 0, 255)
        image = Image.fromarray(wall.astype(np.uint8))
        image.paste(picture(7, size=(40, 40)), (60 + 45 * number, 300 - 30 * number))
        image.save(tmp_path / f"{number}.png")
        image.resize((200, 200)).save(tmp_path / f"{number} again.jpg", quality=40)
    report = read_photos(tmp_path)
    assert len(report.photos) == len(report.problems) == 6


def test_five_hundred_photos_are_read_fast_and_cut_to_the_limit(tmp_path: Path) -> None:
    for index in range(500):
        picture(index, size=(40, 40)).save(tmp_path / f"{index}.png")
    started = time.perf_counter()
    report = read_photos(tmp_path)
    assert time.perf_counter() - started < 10
    assert [photo.path.name for photo in report.photos] == [f"{index}.png" for index in range(MAX_PHOTOS)]
    (problem,) = report.problems
    assert problem.path == tmp_path
    assert problem.reason.startswith("300 more files were left out, as at most 200 photos are used")


def test_good_photos_go_on_without_the_bad_ones(tmp_path: Path) -> None:
    picture().save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    report = read_photos(tmp_path)
    assert [photo.path.name for photo in require_photos(report, tmp_path)] == ["good.png"]
    assert str(report.problems[0]) == f"'{tmp_path / 'bad.png'}': {report.problems[0].reason}"


def test_an_empty_folder_holds_no_photos(tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match="holds no photos; put some JPEG, PNG, WebP or HEIC files there"):
        require_photos(read_photos(tmp_path), tmp_path)


def test_the_folder_must_be_one(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    with pytest.raises(PhotoError, match=r"a\.png' is a file; give the folder"):
        read_photos(tmp_path / "a.png")
    with pytest.raises(PhotoError, match="missing' does not exist; give the folder"):
        read_photos(tmp_path / "missing")


def test_a_blurred_photo_is_used_and_named_with_the_remedy(tmp_path: Path) -> None:
    """Edges of a drawing of 512 pixels: sharp, and out of focus by four pixels."""
    sharp = Image.new("RGB", (512, 400), (90, 140, 200))
    drawing = ImageDraw.Draw(sharp)
    for number in range(12):
        drawing.ellipse([40 * number, 30 * number, 40 * number + 90, 30 * number + 60], fill=(20 * number, 200, 60))
    sharp.save(tmp_path / "sharp.png")
    sharp.transpose(Image.Transpose.FLIP_LEFT_RIGHT).filter(ImageFilter.GaussianBlur(5)).save(tmp_path / "soft.png")
    advice = {photo.path.name: photo.advice for photo in read_photos(tmp_path).photos}
    assert advice["sharp.png"] is None
    assert "blurred; a sharp photo teaches more" in (advice["soft.png"] or "")


def test_two_photos_of_one_name_are_told_apart(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.jpg")
    picture(2).save(tmp_path / "A.png")
    report = read_photos(tmp_path)
    assert len(report.photos) == 1
    assert "so that captions and masks cannot be told apart; rename one of them" in str(report.problems[0])


@pytest.mark.parametrize("name", ["a-mask.jpg", "a_mask.png", "A_Mask.webp"])
def test_a_mask_of_another_spelling_is_no_photo(name: str, tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.jpg")
    picture(2).save(tmp_path / name)
    report = read_photos(tmp_path)
    assert [photo.path.name for photo in report.photos] == ["a.jpg"]
    assert "It looks like the mask of 'a.jpg'; save it as 'a-mask.png'." in str(report.problems[0])
