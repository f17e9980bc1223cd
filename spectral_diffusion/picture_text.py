"""Small pictures inside JSON: the address of a PNG as web pages write it."""

from __future__ import annotations

import base64
import io

from PIL import Image

LONGEST = 4096
"""Longest side of a picture that is read, in pixels."""
_PREFIX = "data:image/png;base64,"


def is_picture_text(text: str) -> bool:
    """Tell whether `text` holds a picture."""
    return text.startswith(_PREFIX)


def picture_text(picture: Image.Image) -> str:
    """Return `picture` as text."""
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return _PREFIX + base64.b64encode(content.getvalue()).decode()


def picture_from_text(text: str, longest: int = LONGEST) -> Image.Image:
    """Return the picture that `text` holds, loaded whole.

    Raises:
        ValueError, OSError, SyntaxError: it holds none, or one with a side of more than `longest` pixels.
    """
    content = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    with Image.open(io.BytesIO(content), formats=("PNG",)) as opened:
        if max(opened.size) > longest:
            raise ValueError(f"the picture is {opened.width} x {opened.height} pixels, more than {longest}")
        opened.load()
        return opened.copy()
