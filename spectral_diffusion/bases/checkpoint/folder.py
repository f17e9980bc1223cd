"""Load a diffusers folder as a pipeline, and find the folder of a hub id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open

from spectral_diffusion.bases.checkpoint.recognition import check_channels
from spectral_diffusion.errors import BaseError

_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")
_NOT_NEEDED = {"safety_checker": None, "feature_extractor": None}


def load_folder(folder: Path) -> DiffusionPipeline:
    """Load the pipeline in a diffusers folder, each model in the precision of its weights there.

    Raises:
        BaseError: it is no diffusers folder, lacks a part, is damaged, or of another kind; the message says which.
    """
    index = _read_json(folder / "model_index.json", folder)
    declared = {name: value for name, value in index.items() if isinstance(value, list) and value[:1] not in ([None], [])}
    parts = _checked_parts(folder, declared, str(index.get("_class_name")))
    unet, vae = (_read_json(folder / part / "config.json", folder) for part in ("unet", "vae"))
    check_channels(str(folder), unet.get("in_channels", 4), vae.get("latent_channels", 4))
    variant = _variant(folder)
    precisions = {part: _precision(folder / part, variant) for part in parts if part in _MODELS}
    options: dict[str, Any] = {"variant": variant, "dtype": precisions, "low_cpu_mem_usage": True}
    try:
        if "text_encoder_2" in parts:
            pipeline = StableDiffusionXLPipeline.from_pretrained(folder, **options, add_watermarker=False)
        else:
            pipeline = StableDiffusionPipeline.from_pretrained(folder, **options, **_NOT_NEEDED, requires_safety_checker=False)
    except Exception as error:  # three libraries read the parts, and each fails in its own ways
        raise BaseError(f"The base '{folder}' is damaged ({_first_line(error)}); fetch the folder again.") from error
    _check_noise(folder, pipeline.scheduler)
    return pipeline


def _check_noise(folder: Path, scheduler: SchedulerMixin) -> None:
    """Raise `BaseError` where the noise is not that of steps with a variance each (Ho et al. 2020), as all else here reckons."""
    if not hasattr(scheduler, "betas") or scheduler.config.get("timestep_type") == "continuous":
        raise BaseError(
            f"'{folder}' is a base for another noise schedule ({type(scheduler).__name__}); give one of the plain kind."
        )


def _checked_parts(folder: Path, declared: dict[str, list[str]], kind: str) -> tuple[str, ...]:
    """Return the parts that a base needs, all of which are there."""
    if "transformer" in declared:
        raise BaseError(f"'{folder}' is a base of another kind ({kind}); give one of Stable Diffusion 1, 2 or XL.")
    if "text_encoder_2" in declared and "text_encoder" not in declared:
        raise BaseError(f"'{folder}' is the SDXL refiner; give the SDXL base.")
    parts = (*_PARTS, "text_encoder_2", "tokenizer_2") if "text_encoder_2" in declared else _PARTS
    for part in parts:
        library = declared.get(part, ["diffusers"])[0]
        if library not in ("diffusers", "transformers"):
            raise BaseError(f"'{folder}' wants code of its own ('{library}') for its '{part}', which is never run; give another.")
        if part not in declared or not _is_there(folder / part, part):
            raise BaseError(f"The base '{folder}' lacks its part '{part}'; copy or download the whole folder again.")
    return parts


def _is_there(folder: Path, part: str) -> bool:
    names = {path.name for path in folder.glob("*") if path.is_file()}
    if part in _MODELS:
        return "config.json" in names and any(name.endswith((".safetensors", ".bin")) for name in names)
    if part == "scheduler":
        return "scheduler_config.json" in names
    return "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names


def _variant(folder: Path) -> str | None:
    """Return `fp16` when the UNet's weights are there in half precision only, as people keep them to save room."""
    names = [path.name for path in (folder / "unet").glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def _precision(folder: Path, variant: str | None) -> torch.dtype:
    """Return the precision of a model's weights, told by their first tensor; float32 for other files than safetensors."""
    for file in sorted(folder.glob("*.safetensors")):
        if not (f".{variant}" in file.name if variant else "." not in file.stem):
            continue  # of several precisions another one is loaded
        try:
            with safe_open(file, "pt") as weights:
                dtype = weights.get_tensor(next(iter(weights.keys()))).dtype
        except (SafetensorError, OSError, StopIteration):
            continue  # loading it says what is wrong
        return dtype if dtype.is_floating_point else torch.float32
    return torch.float32


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BaseError(
            f"'{folder}' is not a diffusers folder: it has no '{path.relative_to(folder)}'; give a folder that has, or one "
            "checkpoint file, as --base."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except (OSError, ValueError, RecursionError):
        pass
    raise BaseError(f"The base '{folder}' is damaged: '{path.relative_to(folder)}' is no JSON object; fetch the folder again.")


def hub_folder(name: str) -> Path:
    """Return the folder that the base called `name` on the hub has on this computer, downloading what is missing.

    Raises:
        BaseError: it is not here and cannot be downloaded now.
    """
    try:
        return Path(DiffusionPipeline.download(name, **_NOT_NEEDED))
    except Exception as error:  # the hub's library fails in many ways, without a network in others
        raise BaseError(
            f"The base '{name}' is no file or folder, not in the hub's cache, and cannot be downloaded now "
            f"({_first_line(error)}); on a machine with a network run 'hf download {name} --local-dir FOLDER', copy the folder "
            "here and give it as --base, or give one checkpoint file."
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
