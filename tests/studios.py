"""What the tests of the studio share."""

from __future__ import annotations

from pathlib import Path

from app.actions.concepts import create_concept
from app.actions.photos import add_photos
from app.actions.studio import Studio
from app.actions.tasks import TASKS
from app.jobs import State
from app.jobs.identity import identity
from app.jobs.worker import Worker

QUICK = {"steps": 2, "batch": 1, "rank": 2}


def work(studio: Studio) -> list[State]:
    """Do all jobs that wait, in this process, and return how all jobs ended, the oldest first."""
    worker = Worker(studio.jobs, TASKS, identity())
    while (name := studio.jobs.take()) is not None:
        worker.do(name)
    return [job.state for job in reversed(studio.jobs.jobs())]


def concept_of(studio: Studio, token: str, photos: Path) -> str:
    name = create_concept(studio, token, "dog")
    add_photos(studio, name, sorted(photos.glob("*.png")))
    return name
