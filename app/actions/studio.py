"""The studio's folder: where everything that it makes lies, and its settings.

concepts/NAME/          photos, captions, masks and `concept.toml`, as `spectral-diffusion train` reads them
thumbnails/NAME/        small upright copies of the photos for the page
adapters/NAME.safetensors, fused/NAME.safetensors
pictures/, comparisons/, exports/, reports/
removed/                what was removed on the page
jobs/, uploads/, settings.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from app.jobs import JobStore
from spectral_diffusion.concepts.concept import SETTINGS_FILE
from spectral_diffusion.errors import InputError
from spectral_diffusion.export.embedding import embedding_file_name
from spectral_diffusion.files import clear_leftovers, move, write_atomically
from spectral_diffusion.scoring.clip_scorer import DEFAULT_CLIP

FOLDERS = (
    "concepts",
    "thumbnails",
    "adapters",
    "fused",
    "pictures",
    "comparisons",
    "exports",
    "reports",
    "removed",
    "jobs",
    "uploads",
)
SERVED = ("thumbnails", "pictures", "comparisons", "exports", "reports")
"""Folders of which the page shows or gives away files."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the page remembers: base (None: the embedded one), device (None: a GPU if there is one), CLIP (None: the embedded).

    What the base predicts is what its files say where `prediction_type` is None.
    """

    base: str | None = None
    device: str | None = None
    clip: str | None = None
    prediction_type: str | None = None

    @property
    def loading(self) -> list[str | None]:
        """What decides how the base is loaded, see `loading_of`."""
        return loading_of(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Studio:
    """A studio in the folder `root`."""

    root: Path

    @cached_property
    def jobs(self) -> JobStore:
        """Its jobs."""
        return JobStore(self.root / "jobs")

    def folder(self, name: str) -> Path:
        """Return one of `FOLDERS`."""
        assert name in FOLDERS
        return self.root / name

    def file(self, folder: str, name: str) -> Path:
        """Return the file called `name` in one of `FOLDERS`.

        Raises:
            InputError: it is not there, or `name` is no plain name.
        """
        path = self.folder(folder) / name
        if Path(name).name != name or not path.is_file():
            raise InputError(f"There is no '{name}' among the {folder} any more; choose another.")
        return path

    @property
    def settings(self) -> Settings:
        """What was chosen, or the defaults.

        Raises:
            InputError: their file does not hold them.
        """
        path = self.root / "settings.json"
        try:
            return Settings(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else Settings()
        except (TypeError, ValueError) as error:
            raise InputError(f"'{path}' does not hold the studio's settings ({error}); correct it, or remove it.") from error

    def change_settings(self, **changes: str) -> Settings:
        """Keep other settings; an empty text stands for the default.

        Raises:
            InputError: the base or the CLIP is not there, there is no such device, or the embedded base is to predict something.
        """
        settings = replace(self.settings, **{name: _placed(text.strip()) or None for name, text in changes.items()})
        _check(settings)
        self._write("settings.json", asdict(settings))
        return settings

    def _write(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        write_atomically(self.root / name, lambda path: path.write_text(text, encoding="utf-8"))


def loading_of(settings: Mapping[str, Any]) -> list[str | None]:
    """Return base, device and prediction type of `settings`, which may be of a time when the last was not among them."""
    return [settings["base"], settings["device"], settings.get("prediction_type")]


def open_studio(root: Path) -> Studio:
    """Return the studio in `root`, with its folders made.

    Raises:
        InputError: its settings cannot be read.
        StorageError: they cannot be made or written to.
    """
    studio = Studio(root=root.resolve())
    studio._write("settings.json", asdict(studio.settings))
    for name in FOLDERS:
        studio.folder(name).mkdir(exist_ok=True)
        clear_leftovers(studio.folder(name))
    return studio


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


def put_away(studio: Studio, path: Path) -> None:
    """Move what lies at `path`, if anything, to the removed things.

    Raises:
        StorageError: another program holds it.
    """
    if path.exists():
        move(path, studio.folder("removed") / f"{time.time_ns()}-{path.name}")


def plain_name(text: str) -> str:
    """Return `text` as a file name that every system takes; only letters, digits, `-` and `_` remain."""
    return embedding_file_name(text)[:60]


def _placed(text: str) -> str:
    """Return the full path where `text` is one, as the worker runs elsewhere; other texts as they are."""
    path = Path(text).expanduser()
    return str(path.resolve()) if text and path.exists() else text


def _check(settings: Settings) -> None:
    base = settings.base
    if base is not None and not Path(base).exists() and (base.startswith((".", "/", "~", "\\")) or base.count("/") != 1):
        raise InputError(
            f"There is no base '{base}'; give a diffusers folder, a checkpoint file, or a hub id such as 'name/model'."
        )
    if base is not None and Path(base).is_dir() and not (Path(base) / "model_index.json").is_file():
        raise InputError(f"'{base}' is not a diffusers folder: it has no 'model_index.json'; give one that has.")
    if base is None and settings.prediction_type is not None:
        raise InputError("The embedded base says itself what it predicts; leave that to its files, or give another base.")
    if settings.clip is not None and ":" not in settings.clip and "/" not in settings.clip and not Path(settings.clip).exists():
        raise InputError(
            f"There is no CLIP '{settings.clip}'; give a folder, NAME:WEIGHTS, or nothing for '{DEFAULT_CLIP.name}'."
        )
    if settings.device is not None and settings.device not in devices():
        raise InputError(f"There is no device '{settings.device}' on this computer; choose one of {', '.join(devices())}.")


def devices() -> list[str]:
    """Return the names of this computer's devices that can be chosen."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
