"""Export as a LoRA with PEFT's key names, which diffusers reads: `unet.PATH.lora_A.weight (r, in)`, `.lora_B.weight (out, r)`.

No alpha stands in the file; diffusers then adds `lora_B @ lora_A` as it is.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.bases.layer_names import peft_name
from spectral_diffusion.export.embedding import embedding_files, embedding_writers, words_to_type
from spectral_diffusion.export.factors import lora_factors
from spectral_diffusion.export.result import Export, check_targets
from spectral_diffusion.files import write_together


def export_diffusers(
    adapter: Adapter,
    path: Path,
    *,
    dtype: torch.dtype = torch.float16,
    rank: int | None = None,
    overwrite: bool = False,
) -> Export:
    """Write `adapter` as a LoRA for diffusers to `path` and its token embeddings beside it; see `export_kohya`."""
    embeddings = embedding_files(adapter, path.parent, path)
    check_targets([path, *embeddings.values()], overwrite=overwrite)
    factors = lora_factors(adapter, rank)
    tensors = {}
    for key in factors.layers:
        name = peft_name(key)
        tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"] = factors.matrices(key, dtype)
    writers = embedding_writers(adapter, embeddings, dtype)
    write_together(writers | {path: lambda temporary: save_file(tensors, temporary, {"format": "pt"})})
    return Export(
        format="diffusers",
        family=adapter.family,
        path=path,
        embeddings=embeddings,
        words=words_to_type(adapter, embeddings),
        rank=factors.rank,
        errors=factors.errors,
    )
