"""What the worker does for each kind of job, with the library's functions."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from app.actions.adapters import adapter_path, report, report_path
from app.actions.concepts import check_free_token, concepts_of_tokens
from app.actions.imports import import_files
from app.actions.pictures import PREVIEW_ENDING, drawing_of_record, picture_card
from app.actions.studio import Studio, loading_of
from app.actions.training_tasks import look_task, settled, train_task
from app.actions.workbench import chosen_base, studio_of, write_json
from app.jobs import Stopped, TaskContext
from app.jobs.worker import Task
from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.adapter_file import load_adapter, save_adapter
from spectral_diffusion.adapters.attach import check_fits_base
from spectral_diffusion.adapters.fusion import fuse
from spectral_diffusion.bases.base import Base, read_base
from spectral_diffusion.concepts.photos import read_photos
from spectral_diffusion.errors import InputError, SpectralDiffusionError
from spectral_diffusion.export import (
    PRECISIONS,
    Export,
    export_checkpoint,
    export_diffusers,
    export_embeddings,
    export_kohya,
    places,
    remarks,
)
from spectral_diffusion.files import files_in, write_atomically
from spectral_diffusion.generation.album import Album
from spectral_diffusion.generation.drawing import Picture
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.reports.axis import BARE, Axis
from spectral_diffusion.reports.comparison import compare, write_comparison
from spectral_diffusion.reports.exactness import export_error
from spectral_diffusion.reports.fusion_report import report_fusion, save_report
from spectral_diffusion.scoring.score import ClipScorer, PictureScore, load_scorer, score_pictures
from spectral_diffusion.toyworld.judge import Judge, load_judge

logger = logging.getLogger(__name__)


def fuse_task(arguments: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Fuse adapters, settled first if asked for; that goes on from a checkpoint."""
    studio, name = studio_of(context), f"fused/{arguments['out']}"
    out = studio.folder("fused") / arguments["out"]
    if out.exists():  # it was made after this job was asked for
        raise InputError(f"There is a fused adapter '{out.stem}' already; fuse under another name.")
    adapters = [load_adapter(adapter_path(studio, name)) for name in arguments["adapters"]]
    join = partial(fuse, strengths=arguments["strengths"], allow_overlap=arguments["allow_overlap"])
    if arguments.get("settle"):
        join(adapters, method=arguments["method"] or "sum")  # what cannot be fused is refused before it is settled
        adapters = settled(adapters, chosen_base(arguments["settings"]), arguments["settle"], context)
    fused = join(adapters, method=arguments["method"])
    save_adapter(fused, out)
    if arguments.get("report"):
        with suppress(InputError):  # one that waits already finds the adapter as it is now
            report(studio, name, arguments["settings"])
    return {"adapter": name, "tokens": list(fused.tokens)}


def report_task(arguments: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Draw every concept of a fused adapter alone and fused, and leave a page with scores and verdicts."""
    studio, settings = studio_of(context), arguments["settings"]
    path = adapter_path(studio, arguments["adapter"])
    fused, base = load_adapter(path), chosen_base(settings)

    def count(done: int, total: int) -> None:
        context.report(done=done, total=total)
        if context.should_stop():
            raise Stopped

    folders = concepts_of_tokens(studio, fused.tokens)
    photos = {token: [photo.image for photo in read_photos(folder).photos] for token, folder in folders.items()}
    made = report_fusion(base, fused, _scorer(settings["clip"], str(base.device)), photos, on_picture=count)
    page = report_path(studio, path)
    save_report(made, page)
    return {"report": page.name, "verdicts": [concept.verdict for concept in made.concepts]}


def import_task(arguments: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Make an adapter of a LoRA that does not say which base it is for, taken to be for the chosen one."""
    studio, files = studio_of(context), context.folder / "files"
    token, class_word = check_free_token(studio, arguments["token"], arguments["class_word"])
    name = import_files(studio, files, token, class_word, chosen_base(arguments["settings"]))
    shutil.rmtree(files, ignore_errors=True)
    return {"adapter": name}


def generate_task(arguments: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Draw pictures one by one, then score those of this job; resumed, the remaining ones are drawn."""
    studio, settings = studio_of(context), arguments["settings"]
    name, drawing = arguments["adapter"], drawing_of_record(arguments["drawing"])
    adapter = load_adapter(adapter_path(studio, name)) if name else None
    base = chosen_base(settings)
    if adapter is not None:
        check_fits_base(base, adapter)
    album = Album(studio.folder("pictures"), Path(base.source).name)
    paths = [album.folder / event["picture"] for event in studio.jobs.progress(context.folder.name) if "picture" in event]

    def keep(picture: Picture) -> None:
        path = album.add(picture)
        record = {"prompt": picture.drawing.prompt, "seed": picture.seed, "adapter": name, "tokens": list(picture.tokens)}
        write_json(path.with_suffix(".json"), record | {"job": context.folder.name})
        context.report(picture=path.name, done=len(paths) + 1, total=drawing.count)
        paths.append(path)
        if context.should_stop():
            raise Stopped

    preview = album.folder / f"{context.folder.name}{PREVIEW_ENDING}"

    def show(seed: int, image: Image.Image) -> None:
        write_atomically(preview, lambda path: image.save(path, "WEBP"))
        context.report(forming=preview.name, seed=seed, done=len(paths), total=drawing.count)
        if context.should_stop():
            raise Stopped

    remaining = drawing.count - len(paths)
    if remaining > 0:
        rest = replace(drawing, seed=drawing.seed + len(paths), count=remaining)
        try:
            generate(base, rest, adapter, whole=arguments["whole"], batch=1, on_picture=keep, on_preview=show)
        finally:
            preview.unlink(missing_ok=True)
    tokens = adapter.tokens if adapter else ()
    _score(studio, base, settings, paths, tokens)
    return {"pictures": [path.name for path in paths]}


def compare_task(arguments: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Draw and score a grid; leave it as one picture and as a table."""
    studio, settings = studio_of(context), arguments["settings"]
    base = chosen_base(settings)
    adapters = {Path(name).stem: load_adapter(adapter_path(studio, name)) for name in arguments["adapters"]} | {BARE: None}
    x, y = (Axis(name=axis["name"], values=tuple(axis["values"])) for axis in (arguments["x"], arguments["y"]))
    total, paths = len(x.values) * len(y.values), []

    def report(path: Path) -> None:
        paths.append(path)
        context.report(done=len(paths), total=total)
        if context.should_stop():
            raise Stopped

    tokens = [token for adapter in adapters.values() if adapter for token in adapter.tokens]
    with tempfile.TemporaryDirectory(dir=context.folder) as folder:
        result = compare(
            base,
            drawing_of_record(arguments["drawing"]),
            adapters,
            x,
            y,
            Album(Path(folder), Path(base.source).name),
            _scorer(settings["clip"], str(base.device)),
            _judge(base),
            references=concepts_of_tokens(studio, tokens),
            on_picture=report,
        )
    out = studio.folder("comparisons") / arguments["out"]
    write_comparison(result, out.with_suffix(".png"))
    return {"sheet": f"{out.name}.png", "table": f"{out.name}.csv"}


def export_task(arguments: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Export an adapter and pack the files, notes and a picture into one zip."""
    studio = studio_of(context)
    adapter = load_adapter(adapter_path(studio, arguments["adapter"])).strengthened(arguments.get("strengths", {}))
    with tempfile.TemporaryDirectory(dir=context.folder) as folder:
        files = Path(folder)
        made = _export(adapter, arguments, files, _preview(studio, arguments["adapter"]))
        error = _export_error(arguments["settings"], adapter, made)
        notes = [*places(made), *remarks(adapter)]
        (files / "where-to-put-it.txt").write_text("\n".join(notes) + "\n", encoding="utf-8")
        names = sorted(path.name for path in files.iterdir())
        write_atomically(studio.folder("exports") / arguments["out"], lambda path: _zip(files, path))
    size = (studio.folder("exports") / arguments["out"]).stat().st_size
    return {
        "file": arguments["out"],
        "bytes": size,
        "names": names,
        "notes": notes,
        "words": made.words,
        "rank": made.rank,
        "rank_errors": made.errors,
        "error": error,
    }


def _export(adapter: Adapter, arguments: dict[str, Any], files: Path, preview: Path | None) -> Export:
    stem, rank, dtype = Path(arguments["adapter"]).stem, arguments["rank"], PRECISIONS[arguments["precision"]]
    match arguments["format"]:
        case "kohya":
            return export_kohya(adapter, files / f"{stem}-lora.safetensors", dtype=dtype, rank=rank, preview=preview)
        case "diffusers":
            return export_diffusers(adapter, files / f"{stem}-lora.safetensors", dtype=dtype, rank=rank)
        case "embedding":
            return export_embeddings(adapter, files, dtype=dtype)
        case _:
            source, _, prediction_type = loading_of(arguments["settings"])
            base = read_base(source, prediction_type=prediction_type)  # on a GPU the chosen one lies in half precision
            return export_checkpoint(
                adapter, base, files / (stem if base.family == "mini" else f"{stem}.safetensors"), dtype=dtype
            )


TASKS: dict[str, Task] = {
    "look": look_task,
    "train": train_task,
    "fuse": fuse_task,
    "report": report_task,
    "import": import_task,
    "generate": generate_task,
    "compare": compare_task,
    "export": export_task,
}
"""Kind of a job to the task that does it."""


@lru_cache(maxsize=1)
def _scorer(clip: str | None, device: str) -> ClipScorer:
    return load_scorer(clip, device=device)


def _judge(base: Base) -> Judge | None:
    """Return the judge for pictures of the embedded base; it knows the toy world only."""
    return _loaded_judge(str(base.device)) if base.embedded else None


@lru_cache(maxsize=1)
def _loaded_judge(device: str) -> Judge:
    return load_judge(device=device)


def _score(studio: Studio, base: Base, settings: dict[str, Any], paths: Sequence[Path], tokens: Sequence[str]) -> None:
    references = concepts_of_tokens(studio, tokens)
    scorer = _scorer(settings["clip"], str(base.device))
    present = [path for path in paths if path.is_file()]
    report = score_pictures(present, references, scorer, _judge(base))
    for path, score in zip(present, report.pictures, strict=True):
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        write_json(path.with_suffix(".json"), record | _score_record(score))


def _score_record(score: PictureScore) -> dict[str, Any]:
    seen = [sighting.character for sighting in (score.judged or ())[:3]]
    return {"clip_text": score.clip_text, "clip_image": score.clip_image, "judged": seen}


def _export_error(settings: dict[str, Any], adapter: Adapter, made: Export) -> float | None:
    """Return how far a LoRA is from the adapter when diffusers loads it, None where the chosen base does not fit."""
    if made.rank is None:
        return None
    with suppress(SpectralDiffusionError):
        base = chosen_base(settings)
        check_fits_base(base, adapter)
        return export_error(base, adapter, made.path)
    return None


def _preview(studio: Studio, name: str) -> Path | None:
    """Return the latest picture that the adapter called `name` drew."""
    for path in reversed(files_in(studio.folder("pictures"), ".json")):
        if json.loads(path.read_text(encoding="utf-8")).get("adapter") == name and picture_card(path.with_suffix(".png")):
            return path.with_suffix(".png")
    return None


def _zip(folder: Path, path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(file, file.relative_to(folder))
