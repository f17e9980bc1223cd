"""Fetch the drawings of the toy world.

They come from the npm package `@lobehub/fluent-emoji-3d` (Microsoft Fluent Emoji, MIT). Only the recipe needs them: what
the repository ships (weights, sample photos) was derived from them.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

from PIL import Image

from spectral_diffusion.toyworld.characters import CHARACTERS, EXTRA_CHARACTERS, Character

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"


def fetch_sprites(folder: Path) -> dict[str, Image.Image]:
    """Return one trimmed RGBA drawing per character, from `folder`, downloading the package into it when missing.

    Args:
        folder: where the package's archive is kept; created when missing.

    Returns:
        Character name to RGBA picture, at most 256 pixels a side, cropped to what is opaque.

    Raises:
        RuntimeError: npm is not installed or could not fetch the package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archives = sorted(folder.glob("lobehub-fluent-emoji-3d-*.tgz"))
    if not archives:
        archives = [_download(folder)]
    with tarfile.open(archives[-1]) as archive:
        return {character.name: _read(archive, character) for character in CHARACTERS + EXTRA_CHARACTERS}


def _download(folder: Path) -> Path:
    try:
        subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"The drawings of the toy world could not be fetched ({error}); install npm and a network, "
            f"or run 'npm pack {PACKAGE}' elsewhere and put the archive into '{folder}'."
        ) from error
    return next(folder.glob("lobehub-fluent-emoji-3d-*.tgz"))


def _read(archive: tarfile.TarFile, character: Character) -> Image.Image:
    member = archive.extractfile(f"package/assets/{character.codepoint}.webp")
    assert member is not None
    sprite = Image.open(io.BytesIO(member.read())).convert("RGBA")
    opaque = sprite.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    return sprite.crop(opaque)
