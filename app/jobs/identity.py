"""Which process of this computer is meant, and does it still run?"""

from __future__ import annotations

import psutil

_SAME_START = 2.0  # seconds: clocks that are set shift what the system says a little


def identity(pid: int | None = None) -> dict[str, float]:
    """Return what tells the process `pid` (this one when missing) from a later one with the same number."""
    process = psutil.Process(pid)
    return {"pid": process.pid, "started": process.create_time()}


def runs(known: dict[str, float]) -> bool:
    """Tell whether the process with this `identity` runs, as the operating system sees it."""
    try:
        process = psutil.Process(int(known["pid"]))
        return abs(process.create_time() - known["started"]) < _SAME_START and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
