"""What each method costs: a training step, peak memory, the file, the singular value decompositions, and joining.

Every parametrisation is measured in a process of its own, so that one's peak memory is not another's. Times on a CPU are given
as ratios to LoRA.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.lab.charts import bars, markdown
from benchmarks.lab.record import Case, Record
from benchmarks.lab.workshop import Workshop
from spectral_diffusion.adapter_file import save_adapter
from spectral_diffusion.bands import Band
from spectral_diffusion.base import adaptable_layers
from spectral_diffusion.fusion import fuse
from spectral_diffusion.spectrum import spectra
from spectral_diffusion.training import TrainingProgress, train


def cases(config: dict[str, Any]) -> Iterator[Case]:
    """Yield every parametrisation, the decompositions, and every fuser."""
    for method, settings in config["methods"].items():
        chosen = {"parametrisation": method, "steps": config["steps"]} | settings
        yield {"name": f"train {method}", "kind": "train", "method": method, "settings": chosen, "concept": config["concepts"][0]}
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
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_train, (case, Workshop(workshop.adapters)))


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _train(case: Case, workshop: Workshop) -> dict[str, Any]:
    import resource  # not on Windows

    settings, times = workshop.settings(case["settings"]), [time.perf_counter()]

    def note(progress: TrainingProgress) -> None:
        times.append(time.perf_counter())

    result = train(
        workshop.base, workshop.concept(case["concept"]), Band(start=0, rank=settings.rank), settings, on_progress=note
    )
    steps = [after - before for before, after in pairwise(times[1:])]
    on_gpu = workshop.base.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        (part,) = result.adapter.concepts
        save_adapter(replace(result.adapter, concepts=(replace(part, activations={}),)), path)
        size = path.stat().st_size
    return {
        "step_seconds": median(steps),
        "peak_bytes": peak,
        "file_bytes": size,
        "parameters": part.parameters(),
    }


def show(records: Sequence[Record]) -> tuple[dict[str, Figure], str]:
    """Return step times relative to LoRA and the tables."""
    trained = {r["case"]["method"]: r["result"] for r in records if r["case"]["kind"] == "train"}
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
    if "sum" in fused:
        rows = [[method, f"{seconds / fused['sum']:.1f}"] for method, seconds in fused.items()]
        table += "\n" + markdown(["method", "time to join, plain sum = 1"], rows)
    return figures, table
