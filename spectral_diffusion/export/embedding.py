"""Export of the tokens' embeddings, one file per token: `emb_params (n, width)`, for SDXL `clip_l` and `clip_g`.

AUTOMATIC1111 and ComfyUI know an embedding by its file's name, and `<cat>` is none on Windows: the file is `cat.safetensors`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.adapter_file import is_adapter_file
from spectral_diffusion.errors import AdapterError
from spectral_diffusion.export.factors import in_precision
from spectral_diffusion.export.result import Export, check_targets
from spectral_diffusion.files import Write, numbered, write_together

_DEVICE = re.compile(r"con|prn|aux|nul|(com|lpt)\d", re.IGNORECASE)
"""Names that Windows keeps for itself."""

_LONGEST_NAME = 120
"""Bytes of a file's name before its ending; file systems take 255 with it."""

_NAMES = {"text_encoder": "emb_params"}
_NAMES_OF_TWO = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def export_embeddings(adapter: Adapter, folder: Path, *, dtype: torch.dtype = torch.float16, overwrite: bool = False) -> Export:
    """Write the embedding of every token of `adapter` into `folder`.

    Raises:
        AdapterError: no token has an embedding of its own, or one would overwrite an adapter of the same name.
        InputError: a file exists and may not be overwritten.
        StorageError: a file could not be written; everything is as it was.
    """
    files = embedding_files(adapter, folder)
    if not files:
        raise AdapterError(f"{', '.join(adapter.tokens)} has no embedding of its own; there is nothing to export.")
    check_targets(list(files.values()), overwrite=overwrite)
    write_together(embedding_writers(adapter, files, dtype))
    return Export(format="embedding", family=adapter.family, path=folder, embeddings=files, words=words_to_type(adapter, files))


def embedding_file_name(token: str) -> str:
    """Return the token as a file name that every file system takes: `<my/cat>` gives `my_cat`, `<con>` `con_`."""
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in token).strip("_")
    plain = plain.encode()[:_LONGEST_NAME].decode(errors="ignore")
    if _DEVICE.fullmatch(plain):
        return f"{plain}_"
    return plain or f"token-{hashlib.sha256(token.encode()).hexdigest()[:8]}"


def embedding_files(adapter: Adapter, folder: Path, *others: Path) -> dict[str, Path]:
    """Return the file in `folder` of each token that has an embedding, none of them called as one of the files `others`.

    Raises:
        AdapterError: an adapter of this program stands there.
    """
    files: dict[str, Path] = {}
    for concept in adapter.concepts:
        if not concept.embeddings:
            continue
        taken = {other.stem.lower() for other in (*others, *files.values())}
        stem = next(name for name in numbered(embedding_file_name(concept.token)) if name.lower() not in taken)
        file = files[concept.token] = folder / f"{stem}.safetensors"
        if file.is_file() and is_adapter_file(file):
            raise AdapterError(
                f"The embedding of '{concept.token}' would overwrite the adapter '{file}'; export into another folder."
            )
    return files


def embedding_writers(adapter: Adapter, files: dict[str, Path], dtype: torch.dtype) -> dict[Path, Write]:
    """Return what writes each of `files`, which `embedding_files` gave."""
    writers: dict[Path, Write] = {}
    for concept in adapter.concepts:
        if concept.token in files:
            names = _NAMES_OF_TWO if "text_encoder_2" in concept.embeddings else _NAMES
            tensors = {
                names[part]: in_precision(value, dtype, concept.token) for part, value in concept.shared_embeddings.items()
            }
            writers[files[concept.token]] = lambda temporary, tensors=tensors: save_file(tensors, temporary)
    return writers


def words_to_type(adapter: Adapter, files: dict[str, Path]) -> dict[str, str]:
    """Return, by token, the name of its embedding's file, or the class word of a concept without an embedding."""
    return {
        concept.token: files[concept.token].stem if concept.token in files else concept.class_word for concept in adapter.concepts
    }
