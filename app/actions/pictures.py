"""Draw, look at and compare pictures."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from app.actions.adapters import adapter_cards, adapter_path
from app.actions.concepts import concepts_of_tokens
from app.actions.studio import Studio
from app.jobs import State
from spectral_diffusion.errors import InputError
from spectral_diffusion.files import files_in
from spectral_diffusion.generation.condition_picture import Condition, condition_from_record, condition_record, read_condition
from spectral_diffusion.generation.drawing import Drawing, random_seed
from spectral_diffusion.generation.regions import region_from_record, region_record
from spectral_diffusion.prompts.tokens import listed, marked_words, tokens_in
from spectral_diffusion.reports.axis import MOST_PICTURES, Axis

SORTS = ("newest", "text score", "likeness")
PREVIEW_ENDING = "-forming.webp"
"""How the name of the file ends that shows the picture under way of a job."""
MOST_DRAWN = 64
"""Most pictures of one generation."""


@dataclass(frozen=True, kw_only=True)
class PictureCard:
    """A drawn picture with what is known of it; scores come when the `job` that drew it has drawn all of its pictures."""

    path: Path
    prompt: str
    seed: int
    clip_text: float | None
    clip_image: dict[str, float]
    judged: tuple[str, ...]
    job: str | None

    @property
    def likeness(self) -> float | None:
        """Mean image score over its concepts."""
        return sum(self.clip_image.values()) / len(self.clip_image) if self.clip_image else None


def drawing_from(values: dict[str, Any]) -> Drawing:
    """Return the drawing that the page's fields say; a seed below 0 is chosen at random.

    Raises:
        InputError: a value is out of range.
    """
    values = dict(values)
    if values.get("seed", -1) < 0:
        values["seed"] = random_seed()
    if values.get("count", 1) > MOST_DRAWN:
        raise InputError(f"{values['count']} pictures are too many at once; draw at most {MOST_DRAWN}.")
    if values.get("size") is not None:
        values["size"] = tuple(values["size"])
    return Drawing(**values)


def drawing_record(drawing: Drawing) -> dict[str, Any]:
    """Return `drawing` as a job's arguments hold it: what `drawing_of_record` reads."""
    return asdict(replace(drawing, regions=(), condition=None)) | {
        "regions": [region_record(region) for region in drawing.regions],
        "condition": drawing.condition and condition_record(drawing.condition),
    }


def drawing_of_record(record: dict[str, Any]) -> Drawing:
    """Return the drawing that `record` holds."""
    read = {
        "size": tuple(record["size"]) if record["size"] else None,
        "regions": tuple(region_from_record(region) for region in record["regions"]),
        "condition": record["condition"] and condition_from_record(**record["condition"]),
    }
    return Drawing(**record | read)


def condition_from(file: str | None, photo: bool, adapter: str, strength: float) -> Condition | None:
    """Return the condition that the page's fields say, None without a picture.

    Raises:
        InputError: an adapter is named without a picture, or the picture cannot be read.
    """
    adapter = adapter.strip()
    if file is not None:
        return read_condition(Path(file), adapter, strength, photo=photo)
    if adapter:
        raise InputError(f"The T2I-Adapter '{adapter}' has nothing to read; give a sketch or pose too, or empty its field.")
    return None


def parse_size(text: str) -> tuple[int, int] | None:
    """Return `(width, height)` from '512x768', None for an empty text.

    Raises:
        InputError: it is no size.
    """
    if not text.strip():
        return None
    match = re.fullmatch(r"\s*(\d{1,4})\s*[x×]\s*(\d{1,4})\s*", text)
    if match is None:
        raise InputError(f"'{text}' is not a size; write it like 512x768, or leave it empty for the base's own.")
    return int(match[1]), int(match[2])


def generate(studio: Studio, adapter: str | None, drawing: Drawing, *, whole: bool = False) -> str:
    """Queue a generation with the adapter called `adapter` (None: the bare base) and return the job's name.

    Raises:
        InputError: there is no such adapter, or the drawing names a concept that it does not have.
    """
    if adapter is not None:
        adapter_path(studio, adapter)
    _check_named(studio, adapter, drawing)
    arguments = {"adapter": adapter, "drawing": drawing_record(drawing), "whole": whole, "settings": asdict(studio.settings)}
    return studio.jobs.submit("generate", f"Draw {drawing.prompt[:60]}", arguments)


def _check_named(studio: Studio, name: str | None, drawing: Drawing) -> None:
    cards, chosen = adapter_cards(studio), "The bare base" if name is None else "The chosen adapter"
    having = {card.name: card.tokens for card in cards}.get(name, ())
    marked = [token for card in cards for token in card.tokens if token.startswith("<")]  # others may be parts of plain words
    named = tokens_in(drawing.words, marked)
    if missing := [token for token in named if token not in having]:
        whole = next((card.label for card in cards if {*named} <= {*card.tokens}), None)
        remedy = f"choose '{whole}'" if whole else f"fuse {listed(named)} first"
        raise InputError(f"{chosen} has no {listed(missing)}; {remedy}.")
    unknown = marked_words(drawing.words, having)
    if untrained := concepts_of_tokens(studio, unknown):
        raise InputError(f"{chosen} has no {listed([*untrained])}; train that first, in the tab Concepts.")
    if unknown:
        raise InputError(f"No concept here is called {listed(unknown)}; {chosen.lower()} has {listed(having or ['none'])}.")


def compare(studio: Studio, adapters: Sequence[str], drawing: Drawing, x: Axis, y: Axis) -> str:
    """Queue a comparison of pictures and return the job's name; adapters on an axis are named by their file's stem.

    Raises:
        InputError: too many pictures, or an adapter that is not there.
    """
    if len(x.values) * len(y.values) > MOST_PICTURES:
        raise InputError(f"{len(x.values)} x {len(y.values)} pictures are too many; at most {MOST_PICTURES} are drawn.")
    for name in adapters:
        adapter_path(studio, name)
    arguments = {
        "adapters": list(adapters),
        "drawing": drawing_record(drawing),
        "x": asdict(x),
        "y": asdict(y),
        "settings": asdict(studio.settings),
        "out": time.strftime("%Y%m%d-%H%M%S"),
    }
    return studio.jobs.submit("compare", f"Compare {x.name} by {y.name}", arguments)


def picture_cards(studio: Studio, sort: str = "newest", count: int = 24) -> list[PictureCard]:
    """Return the `count` latest pictures in the order of `sort`, one of `SORTS`; those without a score come last."""
    paths = files_in(studio.folder("pictures"), ".png")[::-1][:count]
    cards = [card for path in paths if (card := picture_card(path)) is not None]
    if sort == "newest":
        return cards
    keys = {"text score": lambda card: card.clip_text, "likeness": lambda card: card.likeness}
    return sorted(cards, key=lambda card: -1.0 if keys[sort](card) is None else keys[sort](card), reverse=True)


def forming(studio: Studio) -> tuple[bytes, int] | None:
    """Return what the picture under way looks like so far, as WebP, and its seed; None when none is being drawn.

    Its file is gone when the picture is there, so a page could not fetch it in time.
    """
    job = next((job for job in studio.jobs.jobs() if job.kind == "generate" and job.state is State.RUNNING), None)
    if job is None:
        return None
    seeds = [event["seed"] for event in studio.jobs.progress(job.name) if "forming" in event]
    try:
        content = (studio.folder("pictures") / f"{job.name}{PREVIEW_ENDING}").read_bytes()
    except FileNotFoundError:
        return None
    return (content, seeds[-1]) if seeds else None


def likeness_of(studio: Studio, tokens: Sequence[str], count: int = 100) -> dict[str, tuple[float, int]]:
    """Return for each of `tokens` its mean image score over the `count` latest pictures that name it, and how many these are."""
    scores: dict[str, list[float]] = {token: [] for token in tokens}
    for card in picture_cards(studio, count=count):
        for token in scores.keys() & card.clip_image.keys():
            if tokens_in(card.prompt, [token]):
                scores[token].append(card.clip_image[token])
    return {token: (sum(values) / len(values), len(values)) for token, values in scores.items() if values}


def picture_card(path: Path) -> PictureCard | None:
    """Return the card of a picture, None when its record is not there yet."""
    try:
        return _card(path, path.with_suffix(".json").stat().st_mtime_ns)
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=1024)
def _card(path: Path, changed: int) -> PictureCard:
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return PictureCard(
        path=path,
        prompt=record["prompt"],
        seed=record["seed"],
        clip_text=record.get("clip_text"),
        clip_image=record.get("clip_image", {}),
        judged=tuple(record.get("judged", ())),
        job=record.get("job"),
    )
