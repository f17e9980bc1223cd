"""Read a checkpoint file's tensors without ever running what it holds."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from spectral_diffusion.errors import BaseError


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The tensors of the file `path` by name, still on the disk until they are used, and its metadata."""

    path: Path
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a safetensors file, or torch's own kind (`.ckpt`, `.pt`) with weights in it only; the content tells which.

    Raises:
        BaseError: the file is damaged, no checkpoint, or holds more than weights.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise BaseError(f"'{path}' cannot be read ({error.strerror}); check its permissions.") from error
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _read_torch(path)
    raise BaseError(
        f"'{path}' is no checkpoint: what it holds is neither safetensors nor torch's format; it is damaged, a download that "
        "failed, or another kind of file under this name. Fetch it again."
    )


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return Checkpoint(path=path, tensors=tensors, metadata=file.metadata() or {})
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise BaseError(f"'{path}' is damaged or was not copied whole ({error}); fetch it again.") from error


def _read_torch(path: Path) -> Checkpoint:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile pickle can fail in any way; nothing of it was run
        raise BaseError(
            f"'{path}' is damaged, or holds more than weights, which is never run ({_first_line(error)}); get the checkpoint as "
            "a .safetensors file."
        ) from error
    content = content if isinstance(content, dict) else {}
    state = content["state_dict"] if isinstance(content.get("state_dict"), dict) else content
    tensors = {str(name): tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    return Checkpoint(path=path, tensors=tensors, metadata={})


def _first_line(error: Any) -> str:
    text = str(error).strip()
    return text.splitlines()[0].split(". ")[0] if text else type(error).__name__
