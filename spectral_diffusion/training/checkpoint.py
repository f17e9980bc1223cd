"""The state of a training on disk, so that a killed run goes on where it was."""

from __future__ import annotations

import io
import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from spectral_diffusion.files import write_atomically

logger = logging.getLogger(__name__)


def save_checkpoint(path: Path, run: str, state: dict[str, Any]) -> None:
    """Write `state` for the run described by `run` (a digest of everything that decides its outcome)."""
    content = io.BytesIO()  # torch's own writer refuses some file names, and a full disk is no OSError to it
    torch.save({"run": run, "state": state}, content)
    write_atomically(path, lambda temporary: temporary.write_bytes(content.getbuffer()))


def load_checkpoint(path: Path, run: str) -> dict[str, Any] | None:
    """Return the state kept at `path` when it belongs to `run`, else nothing (a damaged or foreign one is said and left)."""
    if not path.exists():
        return None
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
        if record["run"] == run:
            return record["state"]
        logger.warning(
            "The checkpoint '%s' has other photos, settings, neighbours or another base; the training starts anew.", path
        )
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, ValueError, pickle.UnpicklingError):
        logger.warning("The checkpoint '%s' is damaged; the training starts anew.", path)
    return None
