"""Picture files that carry how they were drawn, in the `parameters` text chunk that other tools read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from spectral_diffusion.errors import InputError
from spectral_diffusion.files import write_atomically
from spectral_diffusion.generation.drawing import Drawing, Picture
from spectral_diffusion.generation.regions import region_from_record, region_record

OWN_CHUNK = "spectral_diffusion"
_PAIR = re.compile(r'([\w ]+): ("(?:\\.|[^"\\])*"|[^,]*)(?:, |$)')


def infotext(picture: Picture, base_name: str) -> str:
    """Return the settings of `picture` as AUTOMATIC1111 writes them: prompt, negative prompt, one line of pairs."""
    drawing = picture.drawing
    lines = [drawing.prompt]
    if drawing.negative_prompt:
        lines.append(f"Negative prompt: {drawing.negative_prompt}")
    pairs = {
        "Steps": drawing.steps,
        "Sampler": drawing.scheduler.removesuffix(" Karras"),
        "Schedule type": _schedule_type(drawing.scheduler),
        "CFG scale": f"{drawing.guidance:g}",
        "Seed": picture.seed,
        "Size": f"{picture.image.width}x{picture.image.height}",
        "Model": base_name,
        "Version": "spectral-diffusion",
    }
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in pairs.items()))
    return "\n".join(lines)


def _schedule_type(sampler: str) -> str:
    """Return what AUTOMATIC1111 calls the spacing of a sampler's noise; by itself it takes another one for DPM++."""
    if sampler.endswith(" Karras"):
        return "Karras"
    return "Uniform" if sampler.startswith("DPM++") else "Automatic"


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value


def _own_settings(picture: Picture) -> dict[str, Any]:
    """Return what the infotext has no room for; condition pictures are not kept."""
    regions = [region_record(region) for region in picture.drawing.regions]
    own: dict[str, Any] = {"class_words": picture.class_words}
    if regions:
        own |= {"regions": regions, "confined": picture.drawing.confined}
    if (condition := picture.drawing.condition) is not None:
        own["condition"] = {"adapter": condition.adapter, "strength": condition.strength, "photo": condition.photo}
    return own


def save_picture(picture: Picture, path: Path, base_name: str) -> None:
    """Write `picture` as PNG to `path` with its settings inside.

    Raises:
        StorageError: the file could not be written.
    """
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("parameters", infotext(picture, base_name))
    chunks.add_itxt(OWN_CHUNK, json.dumps(_own_settings(picture), ensure_ascii=False))
    write_atomically(path, lambda temporary: picture.image.save(temporary, "PNG", pnginfo=chunks))


def read_drawing(path: Path) -> Drawing:
    """Return the settings that the PNG at `path` carries, for one picture of its seed.

    Raises:
        InputError: it is no PNG, carries no settings, or some that cannot be used; the message says which.
    """
    try:
        with Image.open(path, formats=("PNG",)) as opened:
            opened.load()
            chunks = {key: str(value) for key, value in getattr(opened, "text", {}).items()}
    except FileNotFoundError as error:
        raise InputError(f"There is no picture '{path}'.") from error
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise InputError(f"'{path.name}' is no PNG picture; give one that was drawn here or in AUTOMATIC1111.") from error
    *head, last = (line.strip() for line in chunks.get("parameters", "").strip().split("\n"))
    prompt, _, negative = "\n".join(["", *head]).partition("\nNegative prompt:")
    values = dict(_PAIR.findall(last))
    if not prompt or not {"Steps", "Sampler", "Seed"} <= values.keys():
        raise InputError(f"'{path.name}' does not say how it was drawn; give a PNG that was drawn here or in AUTOMATIC1111.")
    automatic = {"DPM++ 2M": "Karras"} if OWN_CHUNK not in chunks else {}  # what AUTOMATIC1111 takes by itself
    spacing = values.get("Schedule type")
    spacing = automatic.get(values["Sampler"]) if spacing == "Automatic" else spacing
    karras = " Karras" if spacing == "Karras" else ""
    width, _, height = values.get("Size", "").partition("x")
    try:
        values = {key: json.loads(value) if value.startswith('"') else value for key, value in values.items()}
        return Drawing(
            prompt=prompt.strip(),
            negative_prompt=negative.strip(),
            seed=int(values["Seed"]),
            steps=int(values["Steps"]),
            guidance=float(values["CFG scale"]) if "CFG scale" in values else None,
            scheduler=values["Sampler"] + karras,
            size=(int(width), int(height)) if height else None,
            **_regions(json.loads(chunks.get(OWN_CHUNK, "{}"))),
        )
    except (LookupError, OSError, SyntaxError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"The settings in '{path.name}' are damaged ({error}); draw the picture again.") from error


def _regions(own: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a drawing that `_own_settings` wrote; nothing for a picture without regions."""
    regions = tuple(region_from_record(region) for region in own.get("regions", ()))
    return {"regions": regions, "confined": bool(own.get("confined"))} if regions else {}
