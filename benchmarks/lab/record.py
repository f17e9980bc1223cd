"""One JSON per run: what was asked, what came out, on what, and whether it finished."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from spectral_diffusion.files import write_atomically

Case = dict[str, Any]
"""Everything that decides a run's outcome, as plain data."""
Record = dict[str, Any]


class Postponed(Exception):
    """Another run is making what this one needs; it can be made later."""


_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "numpy")


def digest(value: Any) -> str:
    """Return a short name for plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def perform(folder: Path, case: Case, measure: Callable[[], dict[str, Any]]) -> Record:
    """Return the record of `case` in `folder`: the one that is there when it finished, else a new one.

    A run that fails leaves a record with the status `failed` and the reason, and is tried again the next time.

    Raises:
        Postponed: another run is making what this one needs.
    """
    path = folder / f"{file_name(case)}.json"
    before = read(path)
    if before is not None and before["status"] == "done":
        return before
    started = time.monotonic()
    record: Record = {"case": case, "status": "done", "machine": machine(), "versions": versions(), "source": source()}
    try:
        record["result"] = measure()
    except Postponed:
        raise
    except Exception as error:  # one method that fails must not end the others
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}", "where": traceback.format_exc(limit=-3)}
    record["seconds"] = round(time.monotonic() - started, 2)
    text = json.dumps(record, indent=1, ensure_ascii=False)
    write_atomically(path, lambda temporary: temporary.write_text(f"{text}\n", encoding="utf-8"))
    return record


def file_name(case: Case) -> str:
    """Return a readable, unique name for the record of `case`."""
    words = re.sub(r"[^a-z0-9]+", "-", str(case.get("name", "run")).lower()).strip("-")
    return f"{words}-{digest(case)}"


def read(path: Path) -> Record | None:
    """Return the record at `path`, None when there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def machine() -> str:
    """Return the machine in words, without its name."""
    if torch.cuda.is_available():
        return f"one {torch.cuda.get_device_name()} GPU"
    return f"{os.cpu_count()}-core {platform.machine().replace('x86_64', 'x86').replace('AMD64', 'x86')} CPU"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide results."""
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}


def source() -> dict[str, Any]:
    """Return the commit that is checked out and whether files differ from it; nothing outside a repository."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str | None:
        try:
            return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}
