"""Adapter files: one safetensors with everything an adapter is, its description as JSON in the metadata.

Tensors are named `NUMBER/embeddings/TEXT_ENCODER`, `NUMBER/layers/LAYER/TENSOR` (`U`, `s`, `V` of the band and the trained
ones) and `NUMBER/activations/GROUP`, where `NUMBER` counts the concepts. Matrices of the layers and the activations are stored in
float16, the rest in float32; reading returns float32, and the activations as they are.
"""

from __future__ import annotations

import json
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spectral_diffusion.adapters.adapter import Adapter, ConceptPart, LayerPart, input_group
from spectral_diffusion.errors import AdapterError, InputError
from spectral_diffusion.files import write_atomically
from spectral_diffusion.finite import is_finite
from spectral_diffusion.parametrisations import FORMS, SPECTRAL
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.spectra.spectrum import Spectrum

FORMAT = "spectral-diffusion-adapter"
FORMAT_VERSION = 1
_LAYER = re.compile(r"(unet|text_encoder|text_encoder_2)(\.[A-Za-z0-9_]+)+|text")
_LIBRARIES = ("torch", "diffusers", "transformers")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_FAMILIES = ("sd1", "sd2", "sdxl", "mini")
_TALL = ("U", "V", "A", "B", "up", "down", "matrix")


def save_adapter(adapter: Adapter, path: Path) -> None:
    """Write `adapter` to `path` in one step.

    Raises:
        StorageError: the file could not be written; what stood there before is untouched.
    """
    tensors: dict[str, torch.Tensor] = {}
    for number, concept in enumerate(adapter.concepts):
        for part, vectors in concept.embeddings.items():
            tensors[f"{number}/embeddings/{part}"] = vectors
        for group, factor in concept.activations.items():
            tensors[f"{number}/activations/{group}"] = _in_half(factor)
        for key, part in concept.layers.items():
            band = {"U": part.band.U, "s": part.band.s, "V": part.band.V} if part.band else {}
            for name, tensor in (band | part.tensors).items():
                tensors[f"{number}/layers/{key}/{name}"] = _in_half(tensor) if name in _TALL else tensor
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "adapter": json.dumps(_describe(adapter), ensure_ascii=False)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def _in_half(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` in float16, or as it is where a number is too large for that: an adapter is never lost."""
    half = tensor.half()
    return half if is_finite(half) else tensor


def _describe(adapter: Adapter) -> dict[str, Any]:
    return {
        "version": FORMAT_VERSION,
        "family": adapter.family,
        "fingerprint": adapter.fingerprint,
        "prediction_type": adapter.prediction_type,
        "method": adapter.method,
        "concepts": [
            {
                "token": concept.token,
                "class_word": concept.class_word,
                "band": [concept.band.start, concept.band.rank] if concept.band else None,
                "parametrisation": concept.parametrisation,
                "weight": weight,
                "settings": concept.settings,
            }
            for concept, weight in zip(adapter.concepts, adapter.weights, strict=True)
        ],
        "libraries": {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
    }


def load_adapter(path: Path) -> Adapter:
    """Read an adapter and check all of it: names, shapes, numbers.

    Raises:
        AdapterError: the file is missing, damaged, hostile or not an adapter; the message says which and what to do.
    """
    if not path.is_file():
        raise AdapterError(f"There is no adapter file '{path}'; train one with 'spectral-diffusion train'.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise AdapterError(
                    f"'{path}' is not an adapter of this program; give a file made by 'spectral-diffusion train' or 'fuse', "
                    "or make one of an ordinary LoRA by 'spectral-diffusion import'."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"'{path}' is damaged or not a safetensors file ({error}); train or copy it again.") from error
    try:
        return _assemble(json.loads(metadata["adapter"]), tensors)
    except AdapterError as error:
        raise AdapterError(f"'{path}' cannot be used: {error}") from error
    except (KeyError, TypeError, ValueError, RecursionError, InputError) as error:
        raise AdapterError(f"'{path}' cannot be used: its description is damaged ({error!r}); train it again.") from error


def _assemble(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Adapter:
    if description["version"] > FORMAT_VERSION:
        raise AdapterError(f"it was written by a newer version (format {description['version']}); update this program.")
    if description["family"] not in _FAMILIES:
        raise AdapterError(f"its family '{description['family']}' is none of {', '.join(_FAMILIES)}; update this program.")
    remaining = _checked_numbers(tensors)
    concepts = tuple(_assemble_concept(number, record, remaining) for number, record in enumerate(description["concepts"]))
    if not concepts:
        raise AdapterError("it holds no concept; train it again.")
    if remaining:
        raise AdapterError(f"it holds tensors that do not belong there: {', '.join(sorted(remaining)[:3])}.")
    return Adapter(
        family=description["family"],
        fingerprint=str(description["fingerprint"]),
        prediction_type=str(description.get("prediction_type", "")),  # earlier files do not say it
        concepts=concepts,
        weights=tuple(float(record["weight"]) for record in description["concepts"]),
        method=description["method"],
    )


def _checked_numbers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `tensors` as float32, activations in float16 as they are; all of them finite, none still mapped from the file."""
    checked = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AdapterError(f"tensor '{name}' holds {tensor.dtype} instead of floating-point numbers.")
        stays = tensor.dtype == torch.float16 and name.split("/")[1:2] == ["activations"]
        checked[name] = tensor.clone() if stays else tensor.to(torch.float32, copy=True)
        if not is_finite(checked[name]):
            raise AdapterError(f"tensor '{name}' holds NaN or infinite numbers; train it again.")
    return checked


def _assemble_concept(number: int, record: dict[str, Any], remaining: dict[str, torch.Tensor]) -> ConceptPart:
    if record["parametrisation"] not in FORMS:
        raise AdapterError(f"its parametrisation '{record['parametrisation']}' is unknown; update this program.")
    is_spectral = record["parametrisation"] in SPECTRAL
    has_band = is_spectral or record["band"] is not None
    band = Band(start=int(record["band"][0]), rank=int(record["band"][1])) if has_band else None
    embeddings: dict[str, torch.Tensor] = {}
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    activations: dict[str, torch.Tensor] = {}
    for name in [name for name in remaining if name.startswith(f"{number}/")]:
        kind, *path = name.split("/")[1:]
        if kind == "activations" and len(path) == 1 and _LAYER.fullmatch(path[0]):
            activations[path[0]] = remaining.pop(name)
        elif kind == "layers" and len(path) == 2 and _LAYER.fullmatch(path[0]):
            grouped.setdefault(path[0], {})[path[1]] = remaining.pop(name)
        elif kind == "embeddings" and len(path) == 1 and path[0] in _TEXT_ENCODERS:
            embeddings[path[0]] = remaining.pop(name)
        else:
            raise AdapterError(f"tensor '{name}' has a name that no adapter has.")
    layers = {
        key: _assemble_layer(key, part, record["parametrisation"], band if is_spectral else None) for key, part in grouped.items()
    }
    if band or embeddings:
        _check_embeddings(record["token"], embeddings)
    if not layers:
        raise AdapterError(f"the concept '{record['token']}' changes no layer.")
    for key, layer in layers.items():
        _check_measurement(key, layer, activations.get(input_group(key)))
    return ConceptPart(
        token=str(record["token"]),
        class_word=str(record["class_word"]),
        band=band,
        parametrisation=record["parametrisation"],
        embeddings={part: embeddings[part] for part in _TEXT_ENCODERS if part in embeddings},
        layers=layers,
        activations=activations,
        settings=_checked_settings(record["token"], dict(record["settings"])),
    )


def _checked_settings(token: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return `settings`, which are a record but for those that fusing, drawing and further training read."""
    among = settings.get("among", [])
    if not isinstance(among, list) or not all(isinstance(other, str) for other in among):
        raise AdapterError(f"its setting 'among' of '{token}' is {among!r}, expected a list of tokens; train it again.")
    for name in ("mixing", "steps_done"):
        if not isinstance(settings.get(name, 0), int | float):
            raise AdapterError(f"its setting '{name}' of '{token}' is {settings[name]!r}, expected a number; train it again.")
    return settings


def _check_embeddings(token: str, embeddings: dict[str, torch.Tensor]) -> None:
    if not embeddings:
        raise AdapterError(f"the concept '{token}' has no embedding.")
    for vectors in embeddings.values():
        if vectors.ndim not in (2, 3) or not vectors.numel():
            raise AdapterError(
                f"the embedding of '{token}' has shape {tuple(vectors.shape)}, expected (n, width) or (layers, n, width)."
            )
    if len({vectors.shape[:-1] for vectors in embeddings.values()}) > 1:
        raise AdapterError(f"the embeddings of '{token}' have differing numbers of vectors.")


def _check_measurement(key: str, layer: LayerPart, factor: torch.Tensor | None) -> None:
    if factor is not None and (factor.ndim != 2 or len(factor) != layer.shape[1]):
        raise AdapterError(f"the activations of layer '{key}' have shape {tuple(factor.shape)}, expected ({layer.shape[1]}, k).")


def _assemble_layer(key: str, tensors: dict[str, torch.Tensor], parametrisation: str, own: Band | None) -> LayerPart:
    form = FORMS[parametrisation]
    expected_names = {*(("U", "s", "V") if own else ()), *form.TENSORS}
    if set(tensors) != expected_names:
        raise AdapterError(f"layer '{key}' holds {sorted(tensors)}, expected {sorted(expected_names)}.")
    if own is None:
        return _assemble_dense(key, tensors) if parametrisation == "dense" else _assemble_lora(key, tensors)
    band = Spectrum(U=tensors["U"], s=tensors["s"], V=tensors["V"])
    shapes_fit = (band.U.ndim, band.s.ndim, band.V.ndim) == (2, 1, 2) and band.U.shape[1] == band.V.shape[1] == len(
        band.s
    ) == own.rank
    if not shapes_fit:
        raise AdapterError(f"the band of layer '{key}' does not have {own.rank} directions.")
    trained = {name: tensors[name] for name in form.TENSORS}
    for name, wanted in form.initial(band).items():
        if trained[name].shape != wanted.shape:
            raise AdapterError(
                f"tensor '{name}' of layer '{key}' has shape {tuple(trained[name].shape)}, expected {tuple(wanted.shape)}."
            )
    return LayerPart(band=band, tensors=trained)


def _assemble_lora(key: str, tensors: dict[str, torch.Tensor]) -> LayerPart:
    up, down = tensors["up"], tensors["down"]
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[1] or not up.numel() or not down.numel():
        raise AdapterError(
            f"layer '{key}' has factors of shape {tuple(up.shape)} and {tuple(down.shape)}, expected (out, r) and (in, r)."
        )
    return LayerPart(band=None, tensors=tensors)


def _assemble_dense(key: str, tensors: dict[str, torch.Tensor]) -> LayerPart:
    if tensors["matrix"].ndim != 2 or not tensors["matrix"].numel():
        raise AdapterError(f"the matrix of layer '{key}' has shape {tuple(tensors['matrix'].shape)}, expected (out, in).")
    return LayerPart(band=None, tensors=tensors)


def is_adapter_file(path: Path) -> bool:
    """Tell whether `path` says that it is an adapter of this program; other tools' safetensors files do not.

    Raises:
        AdapterError: it cannot be read as safetensors.
    """
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"'{path}' is damaged or not a safetensors file ({error}); remove it or copy it again.") from error
