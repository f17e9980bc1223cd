"""Jobs of the studio: order, crashes at every step, and that no job is lost or done twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from app.actions.studio import Studio
from app.jobs import JobStore, State, TaskContext, WorkerProcess
from app.jobs.worker import LOCK
from app.ui.activity import progress
from spectral_diffusion.errors import InputError

TASKS = "tests.studio_tasks:TASKS"


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs")


@pytest.fixture
def worker(store: JobStore) -> Iterator[WorkerProcess]:
    with WorkerProcess(store.folder, TASKS) as process:
        yield process


def wait_for(what: Callable[[], object], seconds: float = 30) -> None:
    """Wait until `what` is true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def count_job(store: JobStore, kept: Path, steps: int = 60) -> str:
    return store.submit("count", "counting", {"kept": str(kept), "steps": steps})


def state_of(store: JobStore, name: str) -> State:
    return store.job(name).state


def kill(worker: WorkerProcess) -> None:
    assert worker.pid is not None
    psutil.Process(worker.pid).kill()


def test_jobs_wait_in_order_until_a_worker_comes(store: JobStore, tmp_path: Path) -> None:
    names = [store.submit("write", f"line {line}", {"file": str(tmp_path / "f"), "line": line}) for line in range(3)]
    assert [job.state for job in store.jobs()] == [State.QUEUED] * 3
    assert store.waiting() == names
    store.move(names[2], 1)
    assert store.waiting() == [names[0], names[2], names[1]]
    store.move(names[0], -2)
    assert store.waiting() == [names[2], names[1], names[0]]
    newest = store.submit("write", "last", {"file": str(tmp_path / "f"), "line": 3})
    assert store.waiting() == [names[2], names[1], names[0], newest]
    with WorkerProcess(store.folder, TASKS):
        wait_for(lambda: state_of(store, newest) is State.DONE)
    assert (tmp_path / "f").read_text().split() == ["2", "1", "0", "3"]


def test_an_emptied_queue_is_cancelled_and_can_be_resumed(store: JobStore, tmp_path: Path) -> None:
    names = [store.submit("write", "line", {"file": str(tmp_path / "f"), "line": line}) for line in range(3)]
    store.empty()
    assert store.waiting() == [] and {job.state for job in store.jobs()} == {State.CANCELLED}
    store.resume(names[1])
    with WorkerProcess(store.folder, TASKS):
        wait_for(lambda: state_of(store, names[1]) is State.DONE)
    assert (tmp_path / "f").read_text().split() == ["1"]
    with pytest.raises(InputError, match="nothing to resume"):
        store.resume(names[1])


def test_a_failed_job_says_why_and_the_worker_goes_on(store: JobStore, worker: WorkerProcess, tmp_path: Path) -> None:
    refused, stumbled = store.submit("refuse", "a", {}), store.submit("stumble", "b", {})
    last = store.submit("write", "c", {"file": str(tmp_path / "f"), "line": 1})
    wait_for(lambda: state_of(store, last) is State.DONE)
    assert (state_of(store, refused), store.job(refused).reason) == (State.FAILED, "The photo is missing; add one.")
    assert "ZeroDivisionError" in (store.job(stumbled).reason or "") and "Traceback" in store.log(stumbled)
    assert "Traceback" not in store.log(refused)


def test_a_killed_worker_shows_as_interrupted_and_resuming_ends_the_same(
    store: JobStore, worker: WorkerProcess, tmp_path: Path
) -> None:
    name = count_job(store, tmp_path / "kept")
    wait_for(lambda: len(store.progress(name)) > 5)
    killed = time.monotonic()
    kill(worker)
    wait_for(lambda: state_of(store, name) is State.INTERRUPTED, seconds=5)
    assert time.monotonic() - killed < 5
    wait_for(lambda: worker.pid is not None)
    assert state_of(store, name) is State.INTERRUPTED
    store.resume(name)
    wait_for(lambda: state_of(store, name) is State.DONE)
    assert store.job(name).result == {"sum": sum(number**2 for number in range(60))}
    assert [event["step"] for event in store.progress(name)] == sorted({event["step"] for event in store.progress(name)})


def test_the_jobs_behind_a_killed_one_are_done(store: JobStore, worker: WorkerProcess, tmp_path: Path) -> None:
    first = count_job(store, tmp_path / "kept", steps=1000)
    behind = [store.submit("write", "line", {"file": str(tmp_path / "f"), "line": line}) for line in range(3)]
    wait_for(lambda: store.progress(first))
    kill(worker)
    wait_for(lambda: state_of(store, behind[-1]) is State.DONE)
    assert state_of(store, first) is State.INTERRUPTED
    assert (tmp_path / "f").read_text().split() == ["0", "1", "2"]


def test_cancelling_stops_within_a_step_and_keeps_what_was_done(store: JobStore, worker: WorkerProcess, tmp_path: Path) -> None:
    name = count_job(store, tmp_path / "kept")
    wait_for(lambda: store.progress(name))
    store.cancel(name)
    wait_for(lambda: state_of(store, name) is State.CANCELLED, seconds=5)
    done = len(json.loads((tmp_path / "kept").read_text()))
    assert 0 < done < 60
    store.resume(name)
    wait_for(lambda: state_of(store, name) is State.DONE)


def test_a_preparation_tells_how_far_it_is_and_can_be_cancelled(studio: Studio) -> None:
    store = studio.jobs
    name = store.submit("prepare", "long", {})
    with WorkerProcess(store.folder, TASKS):
        wait_for(lambda: len(store.progress(name)) > 3)
        done, total, words = progress(studio, store.job(name))
        assert 0 < done < total == 10**6 and words == f"scenes: batch {done} of {total}"
        store.cancel(name)
        wait_for(lambda: state_of(store, name) is State.CANCELLED, seconds=5)


def test_no_job_is_stuck_at_stopping_when_the_worker_dies(store: JobStore, worker: WorkerProcess, tmp_path: Path) -> None:
    name = store.submit("count", "slow", {"kept": str(tmp_path / "kept"), "steps": 3, "pause": 60})
    wait_for(lambda: store.progress(name))
    store.cancel(name)
    assert store.job(name).stopping
    kill(worker)
    wait_for(lambda: state_of(store, name) is State.INTERRUPTED, seconds=5)
    assert not store.job(name).stopping
    store.cancel(name)
    assert state_of(store, name) is State.CANCELLED


def test_a_closed_studio_goes_on_when_it_is_opened_again(store: JobStore, tmp_path: Path) -> None:
    with WorkerProcess(store.folder, TASKS):
        name = count_job(store, tmp_path / "kept")
        later = store.submit("write", "line", {"file": str(tmp_path / "f"), "line": 1})
        wait_for(lambda: len(store.progress(name)) > 3)
    assert store.waiting() == [name, later]
    with WorkerProcess(store.folder, TASKS):
        wait_for(lambda: state_of(store, later) is State.DONE)
    assert store.job(name).result == {"sum": sum(number**2 for number in range(60))}


def test_a_second_studio_waits_for_the_worker_of_the_first(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[WorkerProcess] = []
    start = WorkerProcess._start
    monkeypatch.setattr(WorkerProcess, "_start", lambda process: started.append(process) or start(process))
    monkeypatch.setattr("app.jobs.process._LOOK_WHEN_TAKEN", 0.5)
    with FileLock(store.folder / LOCK):
        second = WorkerProcess(store.folder, TASKS)
        second.__enter__()
        wait_for(lambda: len(started) == 2)
        monkeypatch.setattr("app.jobs.process._LOOK_WHEN_TAKEN", 60.0)
        wait_for(lambda: second.pid is None)
        time.sleep(2)
        assert len(started) == 2
        second.__exit__()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process cannot be forked on this system")
@pytest.mark.parametrize("crash", ["before it is queued", "before the claim counts", "before the outcome"])
def test_a_crash_between_two_writes_loses_nothing(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    process = multiprocessing.get_context("fork").Process(target=_crash, args=(store.folder, tmp_path / "f", crash))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (job,) = store.jobs()
    expected = State.QUEUED if crash == "before the claim counts" else State.INTERRUPTED
    assert job.state is expected
    if expected is State.INTERRUPTED:
        store.resume(job.name)
    with WorkerProcess(store.folder, TASKS):
        wait_for(lambda: state_of(store, job.name) is State.DONE)


def _crash(folder: Path, file: Path, moment: str) -> None:
    """Die by SIGKILL at one moment in the life of a job."""

    def die(*anything: object, **more: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    store = JobStore(folder)
    if moment == "before it is queued":
        store._queue.enqueue = die
    store.submit("write", "line", {"file": str(file), "line": 1})
    if moment == "before the claim counts":
        import app.jobs.store

        written = app.jobs.store._write
        app.jobs.store._write = lambda *arguments: die(written(*arguments))
    store.take()
    die()


def test_a_half_written_report_is_passed_over(store: JobStore) -> None:
    name = store.submit("count", "x", {})
    store.report(name, {"step": 1})
    with open(store.folder / name / "progress.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": ')
    assert store.progress(name) == [{"step": 1}]


@pytest.mark.parametrize("name", ["..", "../jobs", "", "1/../2", "nothing"])
def test_a_name_never_becomes_a_path(store: JobStore, name: str) -> None:
    with pytest.raises(InputError, match="There is no job"):
        store.job(name)


def _submit_many(folder: Path, file: Path, client: int) -> None:
    store = JobStore(folder)
    for number in range(25):
        store.submit("write", "line", {"file": str(file), "line": f"{client}-{number}"})


def test_200_jobs_of_8_clients_all_end_and_none_twice(store: JobStore, worker: WorkerProcess, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    clients = [context.Process(target=_submit_many, args=(store.folder, tmp_path / "f", client)) for client in range(8)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    wait_for(lambda: len(jobs := store.jobs()) == 200 and all(job.state is State.DONE for job in jobs), seconds=240)
    lines = (tmp_path / "f").read_text().split()
    assert len(lines) == 200 and set(lines) == {f"{client}-{number}" for client in range(8) for number in range(25)}


def test_a_stage_of_thousands_is_reported_at_its_start_and_its_end_and_seldom_between(store: JobStore) -> None:
    name = store.submit("count", "Counting", {})
    context = TaskContext(store, name, lambda: False)
    started = time.monotonic()
    for done in range(3001):
        context.hear("loading the base", "tensor", done, 3000)
    reports = [event["done"] for event in store.progress(name) if "stage" in event]
    assert reports[0] == 0 and reports[-1] == 3000
    assert len(reports) <= 2 + (time.monotonic() - started) / 0.1
    time.sleep(0.11)
    context.hear("loading the base", "tensor", 5, 3000)
    assert [event["done"] for event in store.progress(name)][-1] == 5
