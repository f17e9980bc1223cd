"""Export as a kohya LoRA, the only naming that all readers accept, with one embedding file per token beside it.

`<module>.lora_down.weight (k, in)`, `<module>.lora_up.weight (out, k)`, `<module>.alpha`; the reader computes
`alpha / k * up @ down`. One alpha stands in the whole file: diffusers scales modules wrongly when it differs.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
from pathlib import Path

import torch
from safetensors.torch import save, save_file

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.bases.layer_names import kohya_name
from spectral_diffusion.concepts.photos import read_photo
from spectral_diffusion.errors import InputError, PhotoError
from spectral_diffusion.export.embedding import embedding_files, embedding_writers, words_to_type
from spectral_diffusion.export.factors import LoraFactors, in_precision, lora_factors
from spectral_diffusion.export.result import Export, check_targets
from spectral_diffusion.files import write_together

_BASE_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "mini": "sd_v1"}
_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1/lora",
    "sd2": "stable-diffusion-v2-512/lora",
    "sdxl": "stable-diffusion-xl-v1-base/lora",
    "mini": "stable-diffusion-v1/lora",
}
_RESOLUTIONS = {"sd1": "512x512", "sd2": "512x512", "sdxl": "1024x1024", "mini": "64x64"}
_SD2_OF_VELOCITY = {"modelspec.architecture": "stable-diffusion-v2-768-v/lora", "modelspec.resolution": "768x768"}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
"""What the metadata calls what a base predicts."""
_SD_VERSIONS = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL", "mini": "SD1"}


def export_kohya(
    adapter: Adapter,
    path: Path,
    *,
    dtype: torch.dtype = torch.float16,
    rank: int | None = None,
    preview: Path | None = None,
    overwrite: bool = False,
) -> Export:
    """Write `adapter` as a LoRA to `path`, a description and a preview picture beside it, and its token embeddings.

    All layers are padded to one rank, so that the file's one alpha (equal to the rank) scales each by 1.

    Args:
        dtype: of the numbers in the files; but for it, the export is exact.
        rank: compress to this rank by singular value decomposition; the errors stand in the result.
        preview: a picture that AUTOMATIC1111 is to show for the LoRA.
        overwrite: replace files that exist.

    Raises:
        AdapterError: a number is too large for `dtype`, or an embedding would overwrite an adapter of the same name.
        InputError: a file exists and may not be overwritten, `preview` is no picture or the one that would be written, or `rank`
            is out of range.
        StorageError: a file could not be written; everything is as it was.
    """
    embeddings = embedding_files(adapter, path.parent, path)
    side_files = {path.with_suffix(".json"): _description(adapter, words_to_type(adapter, embeddings))}
    if preview is not None:
        side_files[path.with_suffix(".png")] = _png(preview, path.with_suffix(".png"))
    check_targets([path, *side_files, *embeddings.values()], overwrite=overwrite)
    factors = lora_factors(adapter, rank)
    tensors: dict[str, torch.Tensor] = {}
    for key in factors.layers:
        name = kohya_name(key, adapter.family)
        tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"] = factors.matrices(key, dtype)
        tensors[f"{name}.alpha"] = in_precision(torch.tensor(float(factors.rank)), dtype, f"{name}.alpha")
    words = words_to_type(adapter, embeddings)
    metadata = _metadata(adapter, path, factors, words, tensors)
    writers = embedding_writers(adapter, embeddings, dtype)
    writers |= {side: lambda temporary, content=content: temporary.write_bytes(content) for side, content in side_files.items()}
    write_together(writers | {path: lambda temporary: save_file(tensors, temporary, metadata)})
    return Export(
        format="kohya",
        family=adapter.family,
        path=path,
        embeddings=embeddings,
        words=words,
        side_files=tuple(side_files),
        rank=factors.rank,
        errors=factors.errors,
    )


def _description(adapter: Adapter, words: dict[str, str]) -> bytes:
    record = {
        "activation text": " and ".join(words.values()),
        "preferred weight": 1.0,
        "sd version": _SD_VERSIONS[adapter.family],
    }
    return json.dumps(record, indent=2, ensure_ascii=False).encode()


def _png(picture: Path, target: Path) -> bytes:
    """Return `picture` as the PNG that is written to `target`."""
    if target.exists() and picture.exists() and target.samefile(picture):
        raise InputError(
            f"The preview '{picture}' lies where its copy is written, so how it was drawn would be lost; choose another --out."
        )
    try:
        image = read_photo(picture, least=1).image
    except PhotoError as error:
        raise InputError(f"The preview cannot be read. {error}") from error
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def _metadata(
    adapter: Adapter, path: Path, factors: LoraFactors, words: dict[str, str], tensors: dict[str, torch.Tensor]
) -> dict[str, str]:
    payload = save(tensors)
    header = 8 + int.from_bytes(payload[:8], "little")
    description = f"Spectral adapter of {', '.join(adapter.tokens)}, strengths {list(adapter.weights)}"
    predicted = {"modelspec.prediction_type": _PREDICTIONS[adapter.prediction_type]} if adapter.prediction_type else {}
    of_velocity = _SD2_OF_VELOCITY if (adapter.family, adapter.prediction_type) == ("sd2", "v_prediction") else {}
    record = {
        "ss_base_model_version": _BASE_VERSIONS[adapter.family],
        "ss_v2": str(adapter.family == "sd2"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(factors.rank),
        "ss_network_alpha": str(float(factors.rank)),
        "ss_output_name": path.stem,
        "ss_tag_frequency": json.dumps({"spectral-diffusion": dict.fromkeys(words.values(), 1)}, ensure_ascii=False),
        "sshs_model_hash": hashlib.sha256(payload[header:]).hexdigest(),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": _ARCHITECTURES[adapter.family],
        "modelspec.title": path.stem,
        "modelspec.resolution": _RESOLUTIONS[adapter.family],
        "modelspec.trigger_phrase": ", ".join(words.values()),
        "modelspec.date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "modelspec.description": description,
    }
    return record | predicted | of_velocity
