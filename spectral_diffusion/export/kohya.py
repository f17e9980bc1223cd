"""Export as a kohya LoRA, the only naming that all readers accept, with one embedding file per token beside it.

`<module>.lora_down.weight (k, in)`, `<module>.lora_up.weight (out, k)`, `<module>.alpha`; the reader computes
`alpha / k * up @ down`. One alpha stands in the whole file: diffusers scales modules wrongly when it differs.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save, save_file

from spectral_diffusion.adapter import Adapter
from spectral_diffusion.adapter_file import is_adapter_file
from spectral_diffusion.errors import AdapterError
from spectral_diffusion.files import write_atomically

_BASE_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "mini": "sd_v1"}
_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1/lora",
    "sd2": "stable-diffusion-v2-512/lora",
    "mini": "stable-diffusion-v1/lora",
}


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written: the LoRA, its side file, an embedding file per token, and the words to type."""

    lora: Path
    description: Path
    embeddings: dict[str, Path]
    rank: int

    @property
    def trigger_words(self) -> dict[str, str]:
        """Token to the word that AUTOMATIC1111 and ComfyUI know it by, which is its file's name."""
        return {token: path.stem for token, path in self.embeddings.items()}


def kohya_name(key: str) -> str:
    """Return the module name that kohya's readers map, for a layer key of this library."""
    part, _, path = key.partition(".")
    path = path.replace(".", "_")
    return f"lora_unet_{path}" if part == "unet" else f"lora_te_text_model_{path}"


def export_kohya(adapter: Adapter, path: Path, *, dtype: torch.dtype = torch.float16) -> Export:
    """Write `adapter` as a LoRA to `path` and its token embeddings beside it, exactly but for `dtype`.

    All layers are padded to one rank, so that the file's one alpha (equal to the rank) scales each by 1.

    Raises:
        AdapterError: a number is too large for `dtype`, or an embedding would overwrite an adapter of the same name.
        StorageError: a file could not be written.
    """
    embeddings = _embedding_files(adapter, path)
    deltas = adapter.deltas()
    rank = max(delta.rank for delta in deltas.values())
    tensors: dict[str, torch.Tensor] = {}
    for key, delta in deltas.items():
        name = kohya_name(key)
        up, down = _balanced(_padded(delta.up, rank), _padded(delta.down, rank))
        tensors[f"{name}.lora_up.weight"] = up.to(dtype).contiguous()
        tensors[f"{name}.lora_down.weight"] = down.T.to(dtype).contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(rank), dtype=dtype)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"'{name}' holds numbers too large for {dtype}; lower the strengths.")
    for concept in adapter.concepts:
        embedding = {"emb_params": concept.embeddings["text_encoder"].to(dtype).contiguous()}
        file = embeddings[concept.token]
        write_atomically(file, lambda temporary, embedding=embedding: save_file(embedding, temporary))
    words = {token: file.stem for token, file in embeddings.items()}
    metadata = _metadata(adapter, path, rank, words, tensors)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    description = path.with_suffix(".json")
    record = {"activation text": " and ".join(words.values()), "preferred weight": 1.0, "sd version": "SD1"}
    record["sd version"] = {"sd2": "SD2"}.get(adapter.family, "SD1")
    text = json.dumps(record, indent=2, ensure_ascii=False)
    write_atomically(description, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return Export(lora=path, description=description, embeddings=embeddings, rank=rank)


def _padded(factor: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.nn.functional.pad(factor, (0, rank - factor.shape[1]))


def _balanced(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each pair of columns the same length on both sides, so that neither over- nor underflows in half precision."""
    up_length, down_length = up.norm(dim=0), down.norm(dim=0)
    scale = torch.where((up_length > 0) & (down_length > 0), (down_length / up_length).sqrt(), torch.ones_like(up_length))
    return up * scale, down / scale


def embedding_file_name(token: str) -> str:
    """Return the token as a file name that every file system takes: `<my cat>` gives `my_cat`."""
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in token).strip("_")
    return plain or f"token-{hashlib.sha256(token.encode()).hexdigest()[:8]}"


def _embedding_files(adapter: Adapter, lora: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for number, token in enumerate(adapter.tokens, start=1):
        stem = embedding_file_name(token)
        if stem.lower() in {lora.stem.lower(), *(other.stem.lower() for other in files.values())}:
            stem = f"{stem}-{number}"
        files[token] = lora.parent / f"{stem}.safetensors"
        if files[token].is_file() and is_adapter_file(files[token]):
            raise AdapterError(
                f"The embedding of '{token}' would overwrite the adapter '{files[token]}'; export into another folder."
            )
    return files


def _metadata(adapter: Adapter, path: Path, rank: int, words: dict[str, str], tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    payload = save(tensors)
    header = 8 + int.from_bytes(payload[:8], "little")
    return {
        "ss_base_model_version": _BASE_VERSIONS[adapter.family],
        "ss_v2": str(adapter.family == "sd2"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_output_name": path.stem,
        "ss_tag_frequency": json.dumps({"spectral-diffusion": dict.fromkeys(words.values(), 1)}, ensure_ascii=False),
        "sshs_model_hash": hashlib.sha256(payload[header:]).hexdigest(),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": _ARCHITECTURES[adapter.family],
        "modelspec.title": path.stem,
        "modelspec.trigger_phrase": ", ".join(words.values()),
        "modelspec.date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "modelspec.description": f"Spectral adapter of {', '.join(adapter.tokens)}, strengths {list(adapter.weights)}",
    }
