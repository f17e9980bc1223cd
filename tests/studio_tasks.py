"""Small tasks for the tests of the studio's jobs, run by a real worker process."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from app.jobs import Stopped, TaskContext
from spectral_diffusion.errors import InputError
from spectral_diffusion.stages import counted


def count(arguments: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Count to `steps` and keep each step, as a training keeps its checkpoint; resumed, it goes on from there."""
    kept = Path(arguments["kept"])
    done = json.loads(kept.read_text()) if kept.exists() else []
    while len(done) < arguments["steps"]:
        if context.should_stop():
            raise Stopped
        done.append(len(done) ** 2)
        temporary = kept.with_suffix(".new")
        temporary.write_text(json.dumps(done))
        temporary.replace(kept)
        context.report(step=len(done))
        time.sleep(arguments.get("pause", 0.02))
    return {"sum": sum(done)}


def write(arguments: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Add a line to a file."""
    with open(arguments["file"], "a", encoding="utf-8") as file:
        file.write(f"{arguments['line']}\n")
    return {}


def refuse(arguments: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Fail with a sentence."""
    raise InputError("The photo is missing; add one.")


def stumble(arguments: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Fail with a mistake in the program."""
    return {"never": 1 / 0}


def prepare(arguments: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Do what never ends and is counted where it is done."""
    for _ in counted("scenes", "batch", range(10**6)):
        time.sleep(0.02)
    return {}


TASKS = {"count": count, "prepare": prepare, "write": write, "refuse": refuse, "stumble": stumble}
