"""The jobs of a studio: a folder of facts for each, and the queue of those that wait.

    jobs/queue.db            the waiting jobs' names in order (huey's SQLite storage)
    jobs/worker.lock         held by the worker
    jobs/NAME/job.json       what is to be done
             claim.json      the process that took it
             files/          what it was given, if anything
             cancel          there when somebody asked it to stop
             outcome.json    how it ended
             progress.jsonl  what it reported
             log.txt         what the library said

A state is never stored. With an outcome a job is done, failed or cancelled; with a claim of a process that lives it is
running; in the queue it is queued; and in no other case can anything still happen to it: it is interrupted.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from huey.storage import SqliteStorage

from app.jobs.identity import identity, runs
from spectral_diffusion.errors import InputError
from spectral_diffusion.files import write_atomically, write_folder_atomically

_IN_ORDER = "select id, data from task where queue = ? order by priority desc, id"
_PATIENCE = 60  # seconds to wait for the queue when others use it


class State(StrEnum):
    """What can be said about a job."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"

    @property
    def ended(self) -> bool:
        """Whether nothing more happens unless somebody resumes it."""
        return self not in (State.QUEUED, State.RUNNING)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it was when asked for.

    Attributes:
        name: its folder's name; names sort by time.
        kind: the task that does it.
        title: what it is in words.
        arguments: what the task gets.
        state: see `State`.
        stopping: whether it runs and was asked to stop.
        reason: why it failed, in one sentence.
        result: what the task returned.
    """

    name: str
    kind: str
    title: str
    arguments: dict[str, Any]
    state: State
    stopping: bool = False
    reason: str | None = None
    result: dict[str, Any] = field(default_factory=dict)


class JobStore:
    """The jobs in `folder`; any number of processes may use it at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._ended: dict[str, tuple[int, Job]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._queue = SqliteStorage(
            name="jobs", filename=str(folder / "queue.db"), strict_fifo=True, timeout=_PATIENCE, fsync=True
        )

    def submit(self, kind: str, title: str, arguments: dict[str, Any], *, files: Path | None = None) -> str:
        """Queue a job, with a copy of the folder `files` as its own `files`, and return its name."""
        name = f"{time.time_ns():019d}-{secrets.token_hex(4)}"
        if files is not None:
            copy = partial(shutil.copytree, files, dirs_exist_ok=True)
            write_folder_atomically(self.folder / name / "files", copy)
        _write(self.folder / name / "job.json", {"kind": kind, "title": title, "arguments": arguments})
        self._queue.enqueue(name.encode())
        return name

    def jobs(self) -> list[Job]:
        """Return all jobs, the newest first."""
        waiting = set(self.waiting())
        names = sorted((entry.name for entry in os.scandir(self.folder) if self._is_job(entry.name)), reverse=True)
        return [self._job(name, waiting) for name in names]

    def job(self, name: str) -> Job:
        """Return the job called `name`.

        Raises:
            InputError: there is none.
        """
        if not name.replace("-", "").isalnum() or not (self.folder / name / "job.json").is_file():
            raise InputError(f"There is no job '{name}'; reload the page.")
        return self._job(name, set(self.waiting()))

    def waiting(self) -> list[str]:
        """Return the names of the jobs in the queue, the next one first."""
        return [bytes(data).decode() for data in self._queue.enqueued_items()]

    def progress(self, name: str) -> list[dict[str, Any]]:
        """Return what the job reported, in order; a line that is just being written is left out."""
        return list(_lines(self.folder / name / "progress.jsonl"))

    def log(self, name: str) -> str:
        """Return what the library said while the job ran."""
        path = self.folder / name / "log.txt"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def cancel(self, name: str) -> None:
        """Ask the job to stop; one that does not run is cancelled at once."""
        job = self.job(name)
        if job.state in (State.DONE, State.FAILED, State.CANCELLED):
            return
        (self.folder / name / "cancel").touch()
        if self._leave_queue(name) or self.job(name).state is State.INTERRUPTED:
            self.finish(name, State.CANCELLED)

    def resume(self, name: str) -> None:
        """Queue a job again that was cancelled, interrupted or failed; its task goes on from what it kept.

        Raises:
            InputError: it is queued, running or done.
        """
        if not self.job(name).state.ended or self.job(name).state is State.DONE:
            raise InputError(f"The job '{self.job(name).title}' is {self.job(name).state}; there is nothing to resume.")
        for fact in ("cancel", "claim.json", "outcome.json"):
            (self.folder / name / fact).unlink(missing_ok=True)
        self._queue.enqueue(name.encode())

    def move(self, name: str, places: int) -> None:
        """Move a waiting job `places` towards the front (negative: towards the end)."""
        with self._queue.db(commit=True) as cursor:
            cursor.execute(_IN_ORDER, (self._queue.name,))
            rows = cursor.fetchall()
            index = next((index for index, (_, data) in enumerate(rows) if bytes(data).decode() == name), None)
            if index is None:
                return
            rows.insert(max(0, index - places), rows.pop(index))
            for priority, (row, _) in enumerate(reversed(rows), start=1):
                cursor.execute("update task set priority = ? where id = ?", (priority, row))

    def empty(self) -> None:
        """Cancel every job that waits."""
        for name in self.waiting():
            self.cancel(name)

    def take(self) -> str | None:
        """Take the next job from the queue for this process, or nothing when none waits; the claim stands before it leaves."""
        with self._queue.db(commit=True) as cursor:
            cursor.execute(_IN_ORDER, (self._queue.name,))
            row = cursor.fetchone()
            if row is None:
                return None
            name = bytes(row[1]).decode()
            if not (self.folder / name / "outcome.json").exists():  # two pages may have resumed it at once
                _write(self.folder / name / "claim.json", identity())
            cursor.execute("delete from task where id = ?", (row[0],))
        return name

    def put_back(self, name: str) -> None:
        """Give up a job that this process took: it is the next one again."""
        self._queue.enqueue(name.encode())
        self.move(name, len(self.waiting()))
        (self.folder / name / "claim.json").unlink(missing_ok=True)

    def report(self, name: str, event: dict[str, Any]) -> None:
        """Add an event to the job's progress."""
        with open(self.folder / name / "progress.jsonl", "a", encoding="utf-8") as file:
            file.write(f"{json.dumps(event, ensure_ascii=False)}\n")

    def must_stop(self, name: str) -> bool:
        """Tell whether somebody asked the job to stop."""
        return (self.folder / name / "cancel").exists()

    def finish(self, name: str, state: State, *, reason: str | None = None, result: dict[str, Any] | None = None) -> None:
        """Write how the job ended."""
        _write(self.folder / name / "outcome.json", {"state": state, "reason": reason, "result": result or {}})

    def _is_job(self, name: str) -> bool:
        return name in self._ended or (self.folder / name / "job.json").is_file()

    def _leave_queue(self, name: str) -> bool:
        with self._queue.db(commit=True) as cursor:
            cursor.execute("delete from task where queue = ? and data = ?", (self._queue.name, name.encode()))
            return cursor.rowcount > 0

    def _job(self, name: str, waiting: set[str]) -> Job:
        written = _time(self.folder / name / "outcome.json")
        if written is None:
            return self._read_job(name, waiting)
        known = self._ended.get(name)
        if known is None or known[0] != written:
            known = self._ended[name] = (written, self._read_job(name, waiting))
        return known[1]

    def _read_job(self, name: str, waiting: set[str]) -> Job:
        folder = self.folder / name
        outcome = _read(folder / "outcome.json") or {}
        state = State(outcome["state"]) if outcome else self._state_without_outcome(name, waiting)
        return Job(
            name=name,
            **(_read(folder / "job.json") or {}),
            state=state,
            stopping=state is State.RUNNING and self.must_stop(name),
            reason=outcome.get("reason"),
            result=outcome.get("result", {}),
        )

    def _state_without_outcome(self, name: str, waiting: set[str]) -> State:
        claim = _read(self.folder / name / "claim.json")
        if claim is not None and runs(claim):
            return State.RUNNING
        if name in waiting:
            return State.QUEUED
        outcome = _read(self.folder / name / "outcome.json")  # it may have ended meanwhile
        return State(outcome["state"]) if outcome else State.INTERRUPTED


def _write(path: Path, value: Any) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8"))


def _time(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue
