"""The worker process as the studio sees it: started, watched, started again, ended."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import psutil

from app.jobs.worker import TAKEN, closing_file

_LOOK_EVERY = 0.5  # seconds
_LOOK_WHEN_TAKEN = 3.0  # seconds, while the worker of another studio has the folder
_GRACE = 30  # seconds that a worker gets for the step that it is doing
_ROOT = Path(__file__).resolve().parents[2]


class WorkerProcess:
    """Keeps one worker running for the jobs in `folder`; use it as a context.

    A worker that was killed is started again: the job that it had is interrupted, and the next ones are done. While another
    studio's worker does the jobs of the folder, it is tried now and then whether that one has gone.
    """

    def __init__(self, folder: Path, tasks: str):
        self.folder, self.tasks = folder, tasks
        self._owner = psutil.Process().pid
        self._closes = closing_file(folder, self._owner)
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="worker-watch", daemon=True)

    @property
    def pid(self) -> int | None:
        """The worker's process number while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def __enter__(self) -> WorkerProcess:
        self._closes.unlink(missing_ok=True)
        self._start()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._thread.join()
        if self._process is not None:
            self._closes.touch()  # a signal would end it at once on Windows; so it keeps a checkpoint first
            try:
                self._process.wait(_GRACE)
            except subprocess.TimeoutExpired:  # its job is interrupted then, and can be resumed
                self._process.kill()
                self._process.wait()
            self._closes.unlink()

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "worker.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app.jobs", str(self.folder.resolve()), self.tasks, str(self._owner)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=_ROOT,
            )

    def _watch(self) -> None:
        while not self._closing.wait(_LOOK_EVERY):
            ended = self._process.poll() if self._process is not None else None
            if ended == TAKEN and self._closing.wait(_LOOK_WHEN_TAKEN):
                return
            if ended is not None:
                self._start()
