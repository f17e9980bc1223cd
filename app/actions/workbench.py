"""What all of the worker's tasks share: the studio that a job belongs to, the base that is loaded once, records on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from app.actions.studio import Studio, loading_of
from app.jobs import TaskContext
from spectral_diffusion.bases.base import Base, load_base
from spectral_diffusion.files import write_atomically


def studio_of(context: TaskContext) -> Studio:
    """Return the studio in whose folder the job lies."""
    return Studio(root=context.folder.parents[1])


_loaded: dict[tuple[str | None, ...], Base] = {}


def chosen_base(settings: dict[str, Any]) -> Base:
    """Return the base that the studio's `settings` name, on their device; another is let go before, as memory may be for one."""
    source, device, prediction_type = chosen = tuple(loading_of(settings))
    if chosen not in _loaded:
        _loaded.clear()
        _loaded[chosen] = load_base(source, device=device, prediction_type=prediction_type)
    return _loaded[chosen]


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` in one step."""
    text = json.dumps(value, ensure_ascii=False)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
