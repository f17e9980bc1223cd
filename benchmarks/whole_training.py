"""From photos to pictures at real size, on a GPU: `python -m benchmarks.whole_training --json PATH`

A random SD1.5 and a random SDXL of full size are written as fp16 files. On each the sample concept `poodle` is trained as the
preset says but for steps and batch, and drawn; every case in a process of its own, to which the framework gives as much of the
GPU's memory as the case allows. Time and memory do not depend on the values.

- `load_seconds`: opening the file; `spectrum_seconds`: the bands of all adapted layers, which are kept for the next concept;
- `training_seconds`: the whole training, set-up included, and `step_seconds`: one of its steps, in the median;
- `plan`: what was chosen by the free memory, in the product's own words, and `peak_gigabytes`: what was taken at most;
- `picture_seconds`: a picture of four drawn at once in 25 steps, and `over_diffusers`: that over diffusers' own pipeline on the
  bare base, decoded alike, interleaved, medians.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.real_size import write_checkpoint
from benchmarks.speed import seconds_of
from spectral_diffusion.bases.base import Base, load_base
from spectral_diffusion.concepts.concept import SAMPLES_FOLDER, load_concept
from spectral_diffusion.errors import SpectralDiffusionError
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.generation.previews import decoded
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.training import TrainingProgress, TrainingSettings, preset, train, training_spectrum
from spectral_diffusion.training.memory import logger as memory_logger
from spectral_diffusion.training.run import READ_EVERY

PICTURES = 4
ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training: on a base of which `family`, in how many `gigabytes` (None: all there are), and its settings."""

    family: str
    gigabytes: float | None
    steps: int
    batch: int


CASES = {
    "SD1.5": Case(family="sd1", gigabytes=None, steps=800, batch=4),
    "SD1.5 in 6 GB": Case(family="sd1", gigabytes=6, steps=50, batch=4),
    "SDXL in 12 GB": Case(family="sdxl", gigabytes=12, steps=50, batch=1),
}


def measure(case: Case, checkpoint: Path) -> dict[str, Any]:
    """Return the figures of one case."""
    if case.gigabytes is not None:
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(case.gigabytes * 1e9 / total)
    bases: list[Base] = []
    load = seconds_of(lambda: bases.append(load_base(checkpoint)))
    (base,) = bases
    figures = measure_training(base, preset("balanced", base, changes={"steps": case.steps, "batch": case.batch}))
    return {"load_seconds": round(load, 1)} | figures | {"peak_gigabytes": round(torch.cuda.max_memory_reserved() / 1e9, 2)}


def measure_training(base: Base, settings: TrainingSettings) -> dict[str, Any]:
    """Return what training the poodle on `base` and drawing it takes."""
    concept, band, moments = load_concept(SAMPLES_FOLDER / "poodle"), Band(start=0, rank=settings.rank), [time.perf_counter()]

    def note(progress: TrainingProgress) -> None:
        moments.append(time.perf_counter())

    spectrum = seconds_of(lambda: training_spectrum(base, settings))
    with _heard(memory_logger) as said:
        adapters = []
        training = seconds_of(lambda: adapters.append(train(base, concept, band, settings, on_progress=note).adapter))
    between = [after - before for before, after in pairwise(moments[2:])]  # the first step warms up
    steps_between = READ_EVERY if base.device.type == "cuda" else 1
    drawing = Drawing(prompt=f"{concept.token} near a lake", count=PICTURES)
    ours, theirs = _interleaved(lambda: generate(base, drawing, adapters[0]), lambda: _plain(base, drawing))
    return {
        "spectrum_seconds": round(spectrum, 1),
        "training_seconds": round(training, 1),
        "step_seconds": round(median(between) / steps_between, 4),
        "plan": "; ".join(said),
        "picture_seconds": round(ours / PICTURES, 3),
        "over_diffusers": round(ours / theirs, 3),
    }


@contextmanager
def _heard(logger: logging.Logger) -> Iterator[list[str]]:
    """While entered, the list that is given gets what `logger` says."""
    said: list[str] = []
    handler, level = logging.Handler(), logger.level
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _interleaved(*works: Callable[[], Any]) -> list[float]:
    """Return the median seconds of each of `works`, done in turn; the first round warms up."""
    rounds = [[seconds_of(work) for work in works] for _ in range(ROUNDS + 1)]
    return [median(found) for found in zip(*rounds[1:], strict=True)]


def _plain(base: Base, drawing: Drawing) -> None:
    """Draw as diffusers does by itself, but for the decoding: it takes no autoencoder of another precision than the UNet."""
    latents = base.pipeline(
        "a dog near a lake",
        num_images_per_prompt=drawing.count,
        num_inference_steps=drawing.steps,
        guidance_scale=base.guidance,
        height=base.resolution,
        width=base.resolution,
        output_type="latent",
    ).images
    for one in latents.split(1):
        decoded(base, one)


def main() -> None:
    """Measure and write the JSON, anew after each case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_training", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases (default: all)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a training at real size needs a GPU; benchmarks.speed measures steps on a CPU too")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cases": {}}
    spawning = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=options.json.parent) as folder:
        for name in options.only:
            case = CASES[name]
            checkpoint = Path(folder) / f"{case.family}.safetensors"
            if not checkpoint.exists():
                spawning.Pool(1).apply(write_checkpoint, (case.family, checkpoint))
            try:
                with spawning.Pool(1) as pool:
                    result["cases"][name] = pool.apply(measure, (case, checkpoint))
            except (SpectralDiffusionError, torch.OutOfMemoryError) as error:  # the other cases can still be measured
                result["cases"][name] = {"failed": str(error)}
            options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
            print(name, json.dumps(result["cases"][name], indent=2), flush=True)


if __name__ == "__main__":
    main()
