"""Jobs that survive: a queue on disk, a worker process, and states that are read off the facts, never off a flag."""

from app.jobs.process import WorkerProcess
from app.jobs.store import Job, JobStore, State
from app.jobs.worker import Stopped, TaskContext

__all__ = ["Job", "JobStore", "State", "Stopped", "TaskContext", "WorkerProcess"]
