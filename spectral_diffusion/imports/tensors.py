"""Read the tensors of foreign files, and say what a file is that is not what it should be."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from spectral_diffusion.adapters.adapter_file import FORMAT
from spectral_diffusion.bases.layer_names import PEFT_START
from spectral_diffusion.errors import InputError

_CHECKPOINT_STARTS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")
_VAE_STARTS = ("encoder.conv_in.", "decoder.conv_in.")
_UNET_STARTS = ("down_blocks.", "conv_in.")
_EMBEDDING_NAMES = {"emb_params", "clip_l", "clip_g"}
_OTHER_KINDS = {
    ".hada_w1_a": "a LoHa",
    ".lokr_w1": "a LoKr",
    ".dora_scale": "a DoRA",
    ".lora_magnitude_vector": "a DoRA",
    ".oft_blocks": "an OFT",
    ".oft_diag": "an OFT",
    ".a1.weight": "a GLoRA",
    ".on_input": "an (IA)3",
    ".lora_mid.weight": "a LoCon in Tucker form",
    ".diff": "a file of whole weight differences",
}
"""What stands in the names of files that are no plain LoRA."""


PEFT_CONFIGURATION = "adapter_config.json"
"""The file in which PEFT says by what a LoRA beside it is scaled."""


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the metadata in `path`: safetensors, or a pickle, of which nothing but tensors is ever loaded.

    Raises:
        InputError: there is no such file, or it is damaged, or holds code.
    """
    if not path.is_file():
        raise InputError(f"There is no file '{path}'; check its name.")
    if path.suffix.lower() != ".safetensors":
        return _read_pickle(path), {}
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is damaged or not a safetensors file ({error}); fetch or copy it again.") from error


def read_embedding(path: Path) -> dict[str, torch.Tensor]:
    """Return the vectors `(n, width)` in an embedding file, by text encoder.

    Read are safetensors (`emb_params`, `clip_l` and `clip_g`, or one tensor under the token's name) and the pickles `.pt` and
    `.bin` of AUTOMATIC1111 and diffusers.

    Raises:
        InputError: it is damaged, holds code, or is no embedding.
    """
    tensors, _ = read_tensors(path)
    if set(tensors) == {"clip_l", "clip_g"}:
        found = {"text_encoder": tensors["clip_l"], "text_encoder_2": tensors["clip_g"]}
    elif len(tensors) == 1:
        found = {"text_encoder": next(iter(tensors.values()))}
    else:
        raise InputError(f"'{path}' is not the embedding of one token: it holds {len(tensors)} tensors.")
    vectors = {part: tensor.detach().float() for part, tensor in found.items()}
    vectors = {part: tensor[None] if tensor.ndim == 1 else tensor for part, tensor in vectors.items()}
    for tensor in vectors.values():
        if tensor.ndim != 2 or not tensor.numel():
            raise InputError(f"'{path}' is not an embedding: its tensor has shape {tuple(tensor.shape)}, expected (n, width).")
        if not torch.isfinite(tensor).all():
            raise InputError(f"'{path}' holds NaN or infinite numbers; it cannot be used.")
    if len({len(tensor) for tensor in vectors.values()}) > 1:
        numbers = " and ".join(f"{len(tensor)} vectors in '{name}'" for name, tensor in tensors.items())
        raise InputError(f"The embedding '{path}' has {numbers}, which must be as many; copy it again.")
    return vectors


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle can fail in any way; nothing of it was run
        raise InputError(
            f"'{path}' is damaged or holds more than tensors, which is never loaded; get it as a safetensors file."
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("string_to_param"), Mapping):
        content = content["string_to_param"]
    tensors = content.items() if isinstance(content, Mapping) else ()
    return {str(name): tensor for name, tensor in tensors if isinstance(tensor, torch.Tensor)}


def refuse_what_is_no_lora(path: Path, names: set[str], metadata: Mapping[str, str]) -> None:
    """Raise `InputError` with what the file is when it is no plain LoRA."""
    if metadata.get("format") == FORMAT:
        raise InputError(f"'{path}' is an adapter of this program already; use it as it is.")
    if any(name.startswith(_CHECKPOINT_STARTS) for name in names):
        raise InputError(f"'{path}' is a whole checkpoint, not a LoRA; give it as --base.")
    if any(name.startswith(_VAE_STARTS) for name in names):
        raise InputError(f"'{path}' is a VAE, not a LoRA.")
    if any(name.startswith(_UNET_STARTS) and "lora" not in name for name in names):
        raise InputError(f"'{path}' is a whole UNet, not a LoRA; give the diffusers folder that it belongs to as --base.")
    if names and names <= _EMBEDDING_NAMES:
        raise InputError(f"'{path}' is an embedding, not a LoRA; give it as --embedding beside the LoRA.")
    kind = next((kind for mark, kind in _OTHER_KINDS.items() if any(mark in name for name in names)), None)
    if kind is not None:
        raise InputError(f"'{path}' is {kind}, which is not supported; give a plain LoRA.")


def peft_scales(path: Path, names: Collection[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what PEFT wrote about `path`: its configuration, from the metadata that diffusers writes or the file beside it.

    Args:
        names: the tensors' names, which tell whether PEFT wrote the file itself, whatever it is called now.

    Raises:
        InputError: that is damaged.
    """
    beside = path.with_name(PEFT_CONFIGURATION)
    try:
        if "lora_adapter_metadata" in metadata:
            configuration = json.loads(metadata["lora_adapter_metadata"])
        elif any(name.startswith(PEFT_START) for name in names) and beside.is_file():
            configuration = json.loads(beside.read_text(encoding="utf-8"))
        else:
            return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"The configuration of the LoRA '{path}' is damaged ({error}); copy it again.") from error
    if not isinstance(configuration, dict):
        raise InputError(f"The configuration of the LoRA '{path}' is damaged; copy it again.")
    return configuration
