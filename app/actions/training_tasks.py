"""What the worker does to train: look at a base, and train concepts on it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from app.actions.concepts import WORDS
from app.actions.studio import Studio, concept_folder, loading_of
from app.actions.trainings import FACTS, is_chosen
from app.actions.workbench import chosen_base, studio_of, write_json
from app.jobs import Stopped, TaskContext
from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.adapter_file import load_adapter, save_adapter
from spectral_diffusion.adapters.band_plan import (
    TakenBand,
    band_again,
    band_clash,
    choose_band,
    fewest_directions,
    known_adapters,
    neighbours,
    taken_bands,
)
from spectral_diffusion.bases.base import Base
from spectral_diffusion.concepts.concept import load_concept
from spectral_diffusion.files import files_in
from spectral_diffusion.generation.album import save_samples
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.training import (
    PRESETS,
    TrainingProgress,
    TrainingSettings,
    measure_pace,
    preset,
    settle,
    train_together,
    training_spectrum,
)

logger = logging.getLogger(__name__)

_PACE_KNOWN = 20  # steps after which the pace of a training is noted for what is expected of the next ones


def look_task(arguments: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Load the base and write down what it is and what a training on it takes here, unless another one was chosen meanwhile."""
    studio = studio_of(context)
    if not is_chosen(studio, arguments["settings"]):
        return {}
    base = chosen_base(arguments["settings"])
    fastest = preset(PRESETS[0], base)
    training_spectrum(base, fastest)
    pace = measure_pace(base, fastest, context.should_stop)
    if pace is None:
        raise Stopped
    chosen = loading_of(arguments["settings"])
    words = sorted({word for tokenizer in base.tokenizers.values() for word in tokenizer.get_vocab()})
    facts = {
        "chosen": chosen,
        "family": base.family,
        "resolution": base.resolution,
        "directions": fewest_directions(base, fastest.layers),
        "rank": fastest.rank,
        "device": str(base.device),
        "predicts": base.pipeline.scheduler.config.prediction_type,
        "precision": str(base.pipeline.unet.dtype).removeprefix("torch."),
        "presets": {name: preset(name, base).steps for name in PRESETS},
        "seconds_per_step": pace,
        "memory": _memory(base),
    }
    if is_chosen(studio, arguments["settings"]):
        write_json(studio.root / WORDS, {"chosen": chosen, "words": words})
        write_json(studio.root / FACTS, facts)
    return facts


def train_task(arguments: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Train concepts in one go, each on a free band, among those trained already that they may meet, from a checkpoint on."""
    studio, names = studio_of(context), arguments["concepts"]
    base = chosen_base(arguments["settings"])
    concepts = [load_concept(concept_folder(studio, name)) for name in names]
    settings = preset(arguments["preset"], base, concepts=len(names), changes=arguments["changes"])
    outs = [studio.folder("adapters") / f"{name}.safetensors" for name in names]
    checkpoint = outs[0].with_name(f"{outs[0].name}.checkpoint")
    strangers = [studio.folder("adapters") / Path(name).name for name in arguments.get("apart_from", ())]
    known = known_adapters([studio.folder("adapters")], base, except_for=[*outs, *strangers])
    start = [load_adapter(out) for out in outs] if arguments["longer"] else []
    if start:
        parts = [adapter.concept(concept.token) for adapter, concept in zip(start, concepts, strict=True)]
        for clash in filter(None, (band_clash(part, taken_bands(known)) for part in parts)):
            logger.warning(clash)
        bands = [band_again(part, settings.rank) for part in parts]
    else:
        bands = [
            _reserved_band(base, settings, concept.token, out, known, strangers)
            for concept, out in zip(concepts, outs, strict=True)
        ]
    folders = [studio.folder("thumbnails") / name / "samples" for name in names]

    def report(progress: TrainingProgress) -> None:
        paths = save_samples(progress.samples, progress.step, folders)
        samples = {name: [path.name for path in own] for name, own in zip(names, paths, strict=True)}
        context.report(**_step(progress), samples=samples)
        if progress.step == _PACE_KNOWN:
            _note_pace(studio, arguments["settings"], 1 / progress.steps_per_second / len(names), _memory(base))

    results = train_together(
        base,
        list(zip(concepts, bands, strict=True)),
        settings,
        among=_kept_neighbours(context.folder, known, [concept.token for concept in concepts]),
        start=start,
        checkpoint=checkpoint,
        on_progress=report,
        should_stop=context.should_stop,
    )
    if not results[0].finished:
        raise Stopped
    for result, out in zip(results, outs, strict=True):
        save_adapter(result.adapter, out)
        _reservation(out).unlink(missing_ok=True)
    checkpoint.unlink(missing_ok=True)
    steps, seconds = results[0].steps_done, results[0].seconds
    _note_pace(studio, arguments["settings"], seconds / steps / len(names), _memory(base))
    own_bands = {name: str(band) for name, band in zip(names, bands, strict=True)}
    return {"bands": own_bands, "steps": steps, "seconds": round(seconds, 1)}


def settled(adapters: list[Adapter], base: Base, steps: int, context: TaskContext) -> list[Adapter]:
    """Return `adapters` settled on `base` in `steps`, going on from the job's checkpoint."""
    checkpoint = context.folder / "settling.checkpoint"
    results = settle(
        base,
        adapters,
        steps=steps,
        checkpoint=checkpoint,
        on_progress=lambda progress: context.report(**_step(progress)),
        should_stop=context.should_stop,
    )
    if not results[0].finished:
        raise Stopped
    checkpoint.unlink(missing_ok=True)
    return [result.adapter for result in results]


def _step(progress: TrainingProgress) -> dict[str, Any]:
    return {
        "step": progress.step,
        "steps": progress.steps,
        "concept_loss": progress.concept_loss,
        "inertness_loss": progress.inertness_loss,
        "speed": progress.steps_per_second,
        "remaining": progress.remaining_seconds,
    }


def _kept_neighbours(job: Path, known: dict[Path, Adapter], tokens: Sequence[str]) -> Adapter | None:
    """Return whom the job in the folder `job` began to train among: it goes on among the same, whatever came or went."""
    said, kept = job / "among.json", job / "among.safetensors"
    if not said.exists():
        among = neighbours(known, tokens)
        if among is not None:
            save_adapter(among, kept)
        write_json(said, list(among.tokens) if among else [])
    return load_adapter(kept) if json.loads(said.read_text(encoding="utf-8")) else None


def _reservation(out: Path) -> Path:
    return out.with_name(f"{out.stem}.band.json")


def _reserved_band(
    base: Base, settings: TrainingSettings, token: str, out: Path, known: dict[Path, Adapter], strangers: Sequence[Path]
) -> Band:
    """Return the band that an earlier start of this training took, or a free one, which is then taken.

    Bands count as taken of the adapters in `known`, and of those that are being trained but `strangers`.
    """
    mine = _reservation(out)
    if mine.exists():
        record = json.loads(mine.read_text(encoding="utf-8"))
        if record["rank"] == settings.rank and record["fingerprint"] == base.fingerprint:
            return Band(start=record["start"], rank=record["rank"])
    taken = taken_bands(known)
    passed_over = [mine, *map(_reservation, strangers)]
    for path in files_in(out.parent, ".band.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if path not in passed_over:
            taken.append(TakenBand(token=record["token"], band=Band(start=record["start"], rank=record["rank"]), path=path))
    directions = fewest_directions(base, settings.layers)
    band = choose_band(None, settings.rank, directions, taken, weakest_first=settings.weakest_first)
    record = {"token": token, "start": band.start, "rank": band.rank, "fingerprint": base.fingerprint}
    write_json(mine, record)
    return band


def _note_pace(studio: Studio, settings: dict[str, Any], seconds_per_step: float, memory: int) -> None:
    path = studio.root / FACTS
    facts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if facts.get("chosen") == loading_of(settings):
        write_json(path, facts | {"seconds_per_step": seconds_per_step, "memory": memory})


def _memory(base: Base) -> int:
    """Return the bytes that the work took: on the GPU where there is one, else of this process."""
    return torch.cuda.max_memory_allocated(base.device) if base.device.type == "cuda" else psutil.Process().memory_info().rss
