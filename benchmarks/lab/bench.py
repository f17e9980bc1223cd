"""The experiments and how their cases are run: on a CPU as many at once as there are cores, each on one thread, as the embedded
base's layers are too small for two. Runs that measure time have the machine for themselves.

Not in `__main__`, which processes that are started afresh cannot import.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import tomllib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.lab import alignment, bleeding, cost, efficiency, fusion, language, rates, single, theory
from benchmarks.lab.record import Case, Postponed, Record, file_name, perform, read
from benchmarks.lab.workshop import Workshop
from spectral_diffusion.files import write_atomically

EXPERIMENTS: dict[str, ModuleType] = {
    "theory": theory,
    "language": language,
    "cost": cost,
    "rates": rates,
    "single": single,
    "fusion": fusion,
    "numbers": fusion,
    "levers": fusion,
    "recovery": fusion,
    "many": fusion,
    "alignment": alignment,
    "bleeding": bleeding,
    "efficiency": efficiency,
}
"""Name to module; each has `cases(config)`, `measure(case, workshop)` and `show(records) -> (figures, table)`."""
TIMED = ("cost",)
"""Measure time, so nothing else runs beside them."""
BY_NAME = ("numbers", "recovery", "many", "bleeding", "rates")
"""Run in the quick size by name only: what takes long, and what finds the rates that the others are given."""
MOST_WORKERS = 4
"""Each takes about 2 GB of memory."""


def configuration(name: str, size: str) -> dict[str, Any]:
    """Return the configuration of an experiment in the size `quick` or `full`."""
    path = Path(__file__).parent / "experiments" / name / f"{size}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


def run(names: Sequence[str], size: str, out: Path, workers: int = 1) -> int:
    """Run every case of the experiments `names`, `workers` at once, then show what there is; return how many cases failed.

    A case that needs what another one is training is put off until all others have begun.
    """
    waiting = deque((name, case) for name in names for case in EXPERIMENTS[name].cases(configuration(name, size)))
    failed = 0
    with _pool(workers) as pool:
        running = {}
        while waiting or running:
            while waiting and len(running) < workers:
                name, case = waiting.popleft()
                running[pool.submit(_perform, name, case, out)] = name, case
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, case = running.pop(future)
                record = future.result()
                if record is None:
                    waiting.append((name, case))
                    continue
                failed += record["status"] != "done"
                print(
                    f"{name}: {case['name']}: {record['status']} in {record['seconds']} s {record.get('error', '')}", flush=True
                )
    for name in names:
        show(name, size, out)
    return failed


def _pool(workers: int) -> Executor:
    if workers == 1:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    torch.set_num_threads(1)
    be_quiet()


def be_quiet() -> None:
    """Let the product say errors only."""
    logging.getLogger("spectral_diffusion").setLevel(logging.ERROR)


_workshop = functools.cache(Workshop)


def _perform(name: str, case: Case, out: Path) -> Record | None:
    """Return the record of `case`, None when another one is training what it needs."""
    try:
        return perform(out / "results" / name, case, lambda: EXPERIMENTS[name].measure(case, _workshop(out / "adapters")))
    except Postponed:
        return None


def show(name: str, size: str, out: Path) -> None:
    """Draw the pictures and write the table of an experiment from the records of its cases that are there."""
    folder = out / "results" / name
    paths = [folder / f"{file_name(case)}.json" for case in EXPERIMENTS[name].cases(configuration(name, size))]
    records = [record for path in paths if (record := read(path)) and record["status"] == "done"]
    if not records:
        return
    figures, table = EXPERIMENTS[name].show(records)
    for label, figure in figures.items():
        write_atomically(folder / f"{label}.png", lambda path, figure=figure: figure.savefig(path, dpi=110))
    write_atomically(folder / "table.md", lambda path: path.write_text(table, encoding="utf-8"))
