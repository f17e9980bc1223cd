"""What each method costs: a training step, peak memory, the file, the singular value decompositions, and joining.

Every parametrisation trains in a process of its own, so that one's peak memory is not another's, and they make their steps in
turn, so that a machine whose speed drifts slows all alike. Times on a CPU are given as ratios.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.lab.charts import bars, markdown
from benchmarks.lab.record import Case, Record
from benchmarks.lab.workshop import Workshop
from spectral_diffusion.adapters.adapter_file import save_adapter
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import adaptable_layers
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.spectra.spectrum import spectra
from spectral_diffusion.training import TrainingProgress, train


def cases(config: dict[str, Any]) -> Iterator[Case]:
    """Yield the parametrisations, as one, the decompositions, and every fuser."""
    chosen = {
        method: config["training"] | {"parametrisation": method} | settings for method, settings in config["methods"].items()
    }
    yield {"name": "training", "kind": "train", "methods": chosen, "concept": config["concepts"][0]}
    yield {"name": "singular value decompositions", "kind": "svd"}
    for fuser in config["fusers"]:
        yield {
            "name": f"fuse {fuser}",
            "kind": "fuse",
            "method": fuser,
            "concepts": config["concepts"],
            "settings": config["fused"],
        }


def measure(case: Case, workshop: Workshop) -> dict[str, Any]:
    """Measure one."""
    if case["kind"] == "svd":
        layers = adaptable_layers(workshop.base, workshop.settings({}).layers)
        return {"seconds": _timed(lambda: list(spectra([layer.weight for layer in layers.values()])))}
    if case["kind"] == "fuse":
        adapters = [workshop.adapter(name, slot, case["settings"]) for slot, name in enumerate(case["concepts"])]
        return {"seconds": _timed(lambda: fuse(adapters, method=case["method"]).deltas())}
    return _train_in_turn(case, workshop)


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _train_in_turn(case: Case, workshop: Workshop) -> dict[str, Any]:
    """Return the figures of every method; the next step of each, round by round.

    Raises:
        RuntimeError: a method's process ended early.
    """
    spawning = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    runs: dict[str, Connection] = {}
    steps: dict[str, list[float]] = {}
    results: dict[str, dict[str, Any]] = {}
    try:
        for method, settings in case["methods"].items():
            runs[method], theirs = spawning.Pipe()
            arguments = (case["concept"], settings, workshop.adapters, theirs)
            processes.append(spawning.Process(target=_train, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            steps[method] = [runs[method].recv()]
        while len(results) < len(runs):
            for method, run in runs.items():
                run.send("your turn")
                answer = run.recv()
                if isinstance(answer, dict):
                    results[method] = answer | {"step_seconds": median(steps[method][1:])}  # the first one warms up
                else:
                    steps[method].append(answer)
    except EOFError as error:
        raise RuntimeError(f"the training of {method} ended early") from error
    finally:
        for process in processes:
            process.terminate()
    return results


def _train(concept: str, changes: dict[str, Any], adapters: Path, turns: Connection) -> None:
    """Train; whenever steps are reported send the seconds of one and wait for the next turn, at last send what was needed."""
    import resource  # not on Windows

    workshop, started, done = Workshop(adapters), time.perf_counter(), 0
    settings = workshop.settings(changes)

    def take_turns(progress: TrainingProgress) -> None:
        nonlocal started, done
        turns.send((time.perf_counter() - started) / (progress.step - done))
        turns.recv()
        started, done = time.perf_counter(), progress.step

    band = Band(start=0, rank=settings.rank)
    adapter = train(workshop.base, workshop.concept(concept), band, settings, on_progress=take_turns).adapter
    (part,) = adapter.concepts
    on_gpu = workshop.base.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save_adapter(replace(adapter, concepts=(replace(part, activations={}),)), path)
        turns.send({"peak_bytes": peak, "file_bytes": path.stat().st_size, "parameters": part.parameters()})


def show(records: Sequence[Record]) -> tuple[dict[str, Figure], str]:
    """Return step times relative to LoRA and the tables."""
    trained = next((r["result"] for r in records if r["case"]["kind"] == "train"), {})
    decomposing = next((r["result"]["seconds"] for r in records if r["case"]["kind"] == "svd"), None)
    fused = {r["case"]["method"]: r["result"]["seconds"] for r in records if r["case"]["kind"] == "fuse"}
    figures, table = {}, ""
    if "lora" in trained:
        ratios = {method: value["step_seconds"] / trained["lora"]["step_seconds"] for method, value in trained.items()}
        figures["step"] = bars("Time of a training step, LoRA = 1", list(ratios), {"ratio": list(ratios.values())})
        rows = [
            [
                method,
                f"{value['parameters']:,}",
                f"{ratios[method]:.2f}",
                f"{value['peak_bytes'] / trained['lora']['peak_bytes']:.2f}",
                f"{value['file_bytes'] / 1e6:.2f} MB",
            ]
            for method, value in trained.items()
        ]
        header = ["parametrisation", "trained numbers", "step, LoRA = 1", "peak memory, LoRA = 1", "file without measured inputs"]
        table += markdown(header, rows)
        if decomposing is not None:
            table += f"\nDecomposing all layers takes {decomposing / trained['lora']['step_seconds']:.1f} steps of LoRA.\n"
    if "sum" in fused:
        rows = [[method, f"{seconds / fused['sum']:.1f}"] for method, seconds in fused.items()]
        table += "\n" + markdown(["method", "time to join, plain sum = 1"], rows)
    return figures, table
