"""The worker: a process that does the jobs of a folder one after the other, as long as the studio lives."""

from __future__ import annotations

import argparse
import importlib
import logging
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from app.jobs.identity import identity, runs
from app.jobs.store import JobStore, State
from spectral_diffusion.errors import SpectralDiffusionError, sentence_on
from spectral_diffusion.stages import listening

_PAUSE = 0.1  # seconds between two looks into an empty queue
_BETWEEN = 0.1  # seconds between two reports on one stage, which may count thousands
_LOOK_EVERY = 0.2  # seconds between two looks for the owner
LOCK = "worker.lock"
"""The worker of a folder holds this lock in it; a second one ends at once, with the exit code `TAKEN`."""
TAKEN = 75  # what a worker that fails never ends with


def closing_file(folder: Path, owner: int) -> Path:
    """Return the file in the jobs' `folder` by which the process number `owner` says that its worker shall end."""
    return folder / f"closing-{owner}"


class Stopped(Exception):
    """Raised by a task that was asked to stop and has kept what it had."""


class TaskContext:
    """What a task knows of its job: `folder` for its own files, and how to report and to hear that it shall stop."""

    def __init__(self, store: JobStore, name: str, leaving: Callable[[], bool]):
        self.folder = store.folder / name
        self._store, self._name, self._leaving = store, name, leaving
        self._heard = 0.0

    def report(self, **event: Any) -> None:
        """Add an event to the job's progress."""
        self._store.report(self._name, event)

    def should_stop(self) -> bool:
        """Tell whether to stop: somebody cancelled the job, or the studio closes."""
        return self._leaving() or self._store.must_stop(self._name)

    def hear(self, what: str, unit: str, done: int, total: int) -> None:
        """Report how far a stage of the task's work is, see `stages.listening`: its start, its end, and now and then between.

        Raises:
            Stopped: the task shall stop.
        """
        if 0 < done < total and time.monotonic() - self._heard < _BETWEEN:
            return
        self._heard = time.monotonic()
        self.report(stage=what, unit=unit, done=done, total=total)
        if self.should_stop():
            raise Stopped


Task = Callable[[dict[str, Any], TaskContext], dict[str, Any]]
"""Does a job: arguments and context in, a result that JSON can hold out; raises `Stopped` when it stopped early."""


class Worker:
    """Does jobs until the process `owner` ends or leaves its `closing_file`, or `leave` is called."""

    def __init__(self, store: JobStore, tasks: Mapping[str, Task], owner: dict[str, float]):
        self.store, self.tasks, self.owner = store, tasks, owner
        self.left = False
        self._looked = 0.0

    def leave(self, *signal_and_frame: object) -> None:
        """Stop after the step that is being done; the job goes back to the front of the queue."""
        self.left = True

    def leaving(self) -> bool:
        """Tell whether to end; the owner is looked for now and then."""
        if not self.left and time.monotonic() - self._looked > _LOOK_EVERY:
            self._looked = time.monotonic()
            self.left = not runs(self.owner) or closing_file(self.store.folder, int(self.owner["pid"])).exists()
        return self.left

    def run(self) -> None:
        """Do the jobs that come."""
        while not self.leaving():
            name = self.store.take()
            if name is None:
                time.sleep(_PAUSE)
            elif not self.store.job(name).state.ended:
                self.do(name)

    def do(self, name: str) -> None:
        """Do the job called `name`, which was taken, and write how it ended."""
        context = TaskContext(self.store, name, self.leaving)
        job = self.store.job(name)
        with _log_into(context.folder / "log.txt"):
            try:
                if self.store.must_stop(name):
                    raise Stopped
                with listening(context.hear):
                    result = self.tasks[job.kind](job.arguments, context)
                self.store.finish(name, State.DONE, result=result)
            except Stopped:
                if self.store.must_stop(name):
                    self.store.finish(name, State.CANCELLED)
                else:
                    self.store.put_back(name)
            except SpectralDiffusionError as error:
                logging.getLogger(__name__).error("%s", error)
                self.store.finish(name, State.FAILED, reason=str(error))
            except Exception as error:  # whatever a task raises, the worker goes on with the next job
                logging.getLogger(__name__).error("%s", traceback.format_exc())
                self.store.finish(name, State.FAILED, reason=sentence_on(error, "; its log says where"))


@contextmanager
def _log_into(path: Path) -> Iterator[None]:
    """While entered, what the library and the jobs log stands in the file at `path` too."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    loggers = [logging.getLogger(name) for name in ("spectral_diffusion", "app")]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


def main(argv: list[str]) -> int:
    """Do the jobs of a folder; `TASKS` names the mapping from kinds to tasks, as in `app.actions.tasks:TASKS`."""
    parser = argparse.ArgumentParser(prog="python -m app.jobs", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tasks", metavar="TASKS")
    parser.add_argument("owner", type=int, metavar="PID", help="the process with which the worker ends")
    arguments = parser.parse_args(argv)
    store = JobStore(arguments.folder)
    try:
        with FileLock(arguments.folder / LOCK, timeout=0):
            module, _, name = arguments.tasks.partition(":")
            worker = Worker(store, getattr(importlib.import_module(module), name), identity(arguments.owner))
            signal.signal(signal.SIGTERM, worker.leave)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the studio, which then ends the worker
            worker.run()
    except Timeout:
        return TAKEN
    return 0
