"""Trained and fused adapters: lists, the band map, fusing, exporting."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from app.actions.studio import Studio, plain_name, put_away
from spectral_diffusion.adapters import fusion
from spectral_diffusion.adapters.adapter import METHODS, Adapter
from spectral_diffusion.adapters.adapter_file import load_adapter
from spectral_diffusion.adapters.band_map import BandMap, band_map
from spectral_diffusion.errors import AdapterError, InputError
from spectral_diffusion.export import PRECISIONS
from spectral_diffusion.files import files_in, numbered
from spectral_diffusion.training import can_settle

FORMATS = {
    "kohya": "a LoRA for all tools",
    "diffusers": "a LoRA with PEFT’s names",
    "embedding": "the tokens alone",
    "checkpoint": "the whole base",
}
"""What can be exported, with what it is in words."""
NO_BAND = "none, imported"
"""What is said of the band of an imported LoRA."""
_KINDS = ("adapters", "fused")


@dataclass(frozen=True, kw_only=True)
class AdapterCard:
    """An adapter on the page; `name` is `FOLDER/FILE`, as the other actions take it.

    `changed` is when the file was, in nanoseconds since 1970.
    """

    name: str
    tokens: tuple[str, ...]
    bands: tuple[str, ...]
    method: str
    path: Path
    changed: int

    @property
    def is_fused(self) -> bool:
        """Whether it was fused here from others."""
        return self.name.startswith("fused/")

    @property
    def label(self) -> str:
        """What a list shows."""
        if self.is_fused:
            return f"{self.path.stem} ({' + '.join(self.tokens)})"
        return f"{self.tokens[0]} (imported)" if self.bands == (NO_BAND,) else self.tokens[0]


def adapter_path(studio: Studio, name: str) -> Path:
    """Return the file of the adapter called `name`, `adapters/FILE` or `fused/FILE`.

    Raises:
        InputError: there is none.
    """
    folder, _, file = name.partition("/")
    if folder not in _KINDS:
        raise InputError(f"There is no adapter '{name}'; choose one of the list.")
    return studio.file(folder, file)


def adapter_cards(studio: Studio, kinds: Sequence[str] = _KINDS) -> list[AdapterCard]:
    """Return the adapters of the library; a damaged file is passed over."""
    paths = [path for kind in kinds for path in files_in(studio.folder(kind), ".safetensors")]
    cards = []
    for path in paths:
        with suppress(AdapterError, OSError):
            cards.append(_card(path, path.stat().st_mtime_ns))
    return cards


def is_of_a_concept(studio: Studio, card: AdapterCard) -> bool:
    """Tell whether an adapter is that of one of the studio's concepts, in whose folder its photos lie."""
    return not card.is_fused and (studio.folder("concepts") / card.path.stem).exists()


def remove_adapter(studio: Studio, name: str) -> None:
    """Move the fused or imported adapter called `name`, and its report, to the removed ones.

    Raises:
        AdapterError: its file is damaged.
        InputError: there is none, it is a concept's, or a job that uses it is not done.
        StorageError: another program holds it.
    """
    path = adapter_path(studio, name)
    card = _card(path, path.stat().st_mtime_ns)
    if is_of_a_concept(studio, card):
        raise InputError(f"{card.label} is a concept; remove it in the tab Concepts.")
    for job in studio.jobs.jobs():
        if not job.state.ended and name in (job.arguments.get("adapter"), *job.arguments.get("adapters", ())):
            raise InputError(f"“{job.title}” uses {card.label} and is {job.state}; stop it first.")
    put_away(studio, path)
    if card.is_fused:
        put_away(studio, report_path(studio, path))


def map_bands(studio: Studio, names: Sequence[str], strengths: Sequence[float] | None = None) -> BandMap:
    """Return the band map of the adapters called `names`."""
    factors = [1.0] * len(names) if strengths is None else strengths
    return _mapped(tuple(_file(studio, name) for name in names), tuple(factors))


def trained_apart(studio: Studio, names: Sequence[str]) -> bool:
    """Tell whether the adapters called `names` hold concepts that were not trained among all the others."""
    return fusion.trained_apart([concept for name in names for concept in _load(studio, name).concepts])


def needs_settling(studio: Studio, names: Sequence[str]) -> bool:
    """Tell whether the adapters called `names` were trained apart and can be settled."""
    return len(names) > 1 and trained_apart(studio, names) and can_settle([_load(studio, name) for name in names])


def imported_tokens(studio: Studio, names: Sequence[str]) -> list[str]:
    """Return the tokens of those concepts of the adapters called `names` that were imported: they have no band."""
    return [concept.token for name in names for concept in _load(studio, name).concepts if concept.band is None]


def fuse(
    studio: Studio,
    names: Sequence[str],
    strengths: Sequence[float],
    *,
    title: str = "",
    method: str | None = None,
    allow_overlap: bool = False,
    report: bool = False,
    settle: int = 0,
) -> str:
    """Queue the fusing of adapters under the name `title` and return the job's name.

    Args:
        method: how to join them; as suits them when missing.
        report: queue a report of what was kept as soon as they are fused.
        settle: first teach their sum, in so many steps, what each gave alone; see `training.settle`.

    Raises:
        InputError: fewer than two are chosen, one of them was imported and no method is named, a name is taken, or there is
            no such method.
    """
    if len(names) < 2:
        raise InputError("Choose at least two trained concepts to fuse.")
    if method is not None and method not in METHODS:
        raise InputError(f"There is no method '{method}'; choose one of {', '.join(METHODS)}.")
    imported = imported_tokens(studio, names)
    if imported and method is None:
        raise InputError(f"{imported[0]} was imported, and nothing was measured of it; choose “sum” under “How to join”.")
    tokens = [token for name in names for token in _load(studio, name).tokens]
    stem = plain_name(title.strip() or "-".join(plain_name(token) for token in tokens))
    free = free_fused_name(studio, stem)
    if title.strip() and free != stem:
        raise InputError(f"There is a fused adapter '{stem}' already, or one is being made; choose another name.")
    arguments = {
        "adapters": list(names),
        "strengths": list(strengths),
        "method": method,
        "allow_overlap": allow_overlap,
        "out": f"{free}.safetensors",
        "report": report,
        "settle": settle,
        "settings": asdict(studio.settings),
    }
    return studio.jobs.submit("fuse", f"Fuse {' and '.join(tokens)}", arguments)


def free_fused_name(studio: Studio, stem: str) -> str:
    """Return `stem`, or `stem-2` and so on where a fused adapter is called so, or will be when a job that waits is done."""
    outs = [job.arguments["out"] for job in studio.jobs.jobs() if job.kind == "fuse" and not job.state.ended]
    made = [path.name for path in files_in(studio.folder("fused"), ".safetensors")]
    taken = {Path(name).stem.lower() for name in [*outs, *made]}
    return next(one for one in numbered(stem) if one.lower() not in taken)


def report(studio: Studio, name: str, settings: dict[str, Any] | None = None) -> str:
    """Queue a report of what the fused adapter called `name` kept of its concepts and return the job's name.

    Args:
        settings: the studio's at another time, as plain data; those of now when missing.

    Raises:
        InputError: there is no such adapter, or its report is already under way.
    """
    adapter_path(studio, name)
    title = f"Report on {Path(name).stem}"
    if any(job.title == title and not job.state.ended for job in studio.jobs.jobs()):
        raise InputError(f"The report on '{Path(name).stem}' is already under way; it appears when it is done.")
    return studio.jobs.submit("report", title, {"adapter": name, "settings": settings or asdict(studio.settings)})


def report_path(studio: Studio, path: Path) -> Path:
    """Return where the report on the fused adapter at `path` lies."""
    return studio.folder("reports") / f"{path.stem}.html"


def report_file(studio: Studio, card: AdapterCard) -> Path | None:
    """Return the page of the report on a fused adapter, None where there is none of the adapter as it is now."""
    path = report_path(studio, card.path)
    return path if path.exists() and path.stat().st_mtime_ns > card.path.stat().st_mtime_ns else None


def export(
    studio: Studio,
    name: str,
    precision: str = "fp16",
    *,
    format: str = "kohya",
    rank: int | None = None,
    strengths: Mapping[str, float] = MappingProxyType({}),
) -> str:
    """Queue the export of the adapter called `name` as a zip file and return the job's name.

    Args:
        rank: what a LoRA is compressed to; None keeps it exact.
        strengths: token to factor on that concept's strength.

    Raises:
        InputError: there is no such adapter, precision or format, or the rank makes no sense.
        AdapterError: it has no concept of one of the tokens.
    """
    if precision not in PRECISIONS:
        raise InputError(f"There is no precision '{precision}'; choose one of {', '.join(PRECISIONS)}.")
    if format not in FORMATS:
        raise InputError(f"There is no format '{format}'; choose one of {', '.join(FORMATS)}.")
    if rank is not None and (rank < 1 or format not in ("kohya", "diffusers")):
        raise InputError("A rank is a number from 1 on, for LoRAs only; leave it empty for an exact file.")
    path = adapter_path(studio, name)
    _load(studio, name).strengthened(strengths)  # to refuse a wrong token now and not in the job
    arguments = {"adapter": name, "precision": precision, "format": format, "rank": rank, "strengths": dict(strengths)}
    arguments["settings"] = asdict(studio.settings)
    arguments["out"] = f"{path.stem}-{format}-{time.strftime('%Y%m%d-%H%M%S')}.zip"
    return studio.jobs.submit("export", f"Export {path.stem} as {format}", arguments)


def library_class_words(studio: Studio, name: str) -> dict[str, str]:
    """Return the tokens that a prompt for the adapter called `name` may hold, each with its class word."""
    return _load(studio, name).class_words


def _load(studio: Studio, name: str) -> Adapter:
    return _loaded(*_file(studio, name))


def _file(studio: Studio, name: str) -> tuple[Path, int]:
    """Return the file of the adapter called `name` and when it was written."""
    path = adapter_path(studio, name)
    return path, path.stat().st_mtime_ns


@lru_cache(maxsize=1024)
def _card(path: Path, changed: int) -> AdapterCard:
    adapter = load_adapter(path)
    bands = tuple(str(concept.band) if concept.band else NO_BAND for concept in adapter.concepts)
    name = f"{path.parent.name}/{path.name}"
    return AdapterCard(name=name, tokens=adapter.tokens, bands=bands, method=adapter.method, path=path, changed=changed)


@lru_cache(maxsize=8)
def _loaded(path: Path, changed: int) -> Adapter:
    return load_adapter(path)


@lru_cache(maxsize=16)
def _mapped(files: tuple[tuple[Path, int], ...], strengths: tuple[float, ...]) -> BandMap:
    return band_map([_loaded(*file).scaled(factor) for file, factor in zip(files, strengths, strict=True)])
