"""Export as a whole checkpoint with the adapter merged in: a diffusers folder, or one file in the original layout.

The tokens are not inside: no checkpoint holds new words. Their embeddings are written beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import nn

from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.attach import check_fits_base
from spectral_diffusion.bases.base import Base, adaptable_layers, tokenizer_name
from spectral_diffusion.bases.checkpoint import to_original_layout
from spectral_diffusion.errors import InputError
from spectral_diffusion.export.embedding import embedding_files, embedding_writers, words_to_type
from spectral_diffusion.export.factors import in_precision
from spectral_diffusion.export.result import Export, check_targets
from spectral_diffusion.files import write_folder_atomically, write_together


def export_checkpoint(
    adapter: Adapter, base: Base, path: Path, *, dtype: torch.dtype = torch.float16, overwrite: bool = False
) -> Export:
    """Write `base` with `adapter` merged in to `path`, and the token embeddings beside it.

    The base's own weights stay as they are; memory for one more copy of the checkpoint in `dtype` is needed.

    Args:
        path: a file that ends in `.safetensors`, in the original layout, or a folder, in diffusers' layout.
        dtype: of the weights in the files.
        overwrite: replace what exists; a folder only if it is a diffusers folder.

    Raises:
        AdapterError: the adapter does not fit the base, or a weight is too large for `dtype`.
        BaseError: the base is of no family that has an original layout.
        InputError: `path` exists and may not be overwritten, or is the base itself.
        StorageError: it could not be written; everything is as it was.
    """
    check_fits_base(base, adapter)
    embeddings = embedding_files(adapter, path.parent, path)
    is_file = path.suffix.lower() == ".safetensors"
    _check_not_the_base(base, [path, *embeddings.values()])
    check_targets([*([path] if is_file else []), *embeddings.values()], overwrite=overwrite)
    writers = embedding_writers(adapter, embeddings, dtype)
    if is_file:
        merged = merged_pipeline(base, adapter, dtype)
        tensors, metadata = to_original_layout(merged) | _marks(base), _metadata(base, path)
        write_together(writers | {path: lambda temporary: save_file(tensors, temporary, metadata)})
    else:
        _check_folder(path, overwrite=overwrite)
        write_folder_atomically(path, lambda temporary: _save_folder(base, adapter, dtype, temporary))
        write_together(writers)
    return Export(
        format="checkpoint",
        family=adapter.family,
        path=path,
        embeddings=embeddings,
        words=words_to_type(adapter, embeddings),
    )


def merged_pipeline(base: Base, adapter: Adapter | None, dtype: torch.dtype, *parts: str) -> DiffusionPipeline:
    """Return a copy of `base`'s pipeline in `dtype` on the CPU whose weights are `W + delta`; of `parts` only, if given.

    Weights that stay as they are, and are in `dtype` already, are shared with the base. One layer's delta is formed at a time.

    Raises:
        AdapterError: a weight is too large for `dtype`.
    """
    pipeline = copy.copy(base.pipeline)
    for part in parts or ("unet", "vae", *base.text_encoders):
        model = getattr(base.pipeline, part)
        tensors = {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        memo = {id(tensor): _converted(tensor, dtype, f"{part}.{name}") for name, tensor in tensors.items()}
        setattr(pipeline, part, copy.deepcopy(model, memo))
    originals, copies = adaptable_layers(base, None), adaptable_layers(replace(base, pipeline=pipeline), None)
    for key in adapter.layer_keys() if adapter else ():
        if copies[key] is not originals[key]:
            weight = originals[key].weight.detach().cpu().float()
            merged = weight + adapter.delta(key).dense().reshape(weight.shape)
            copies[key].weight = nn.Parameter(in_precision(merged, dtype, key), requires_grad=False)
    return pipeline


def _converted(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    converted = in_precision(tensor.cpu(), dtype, name)
    return nn.Parameter(converted, requires_grad=False) if isinstance(tensor, nn.Parameter) else converted


def _save_folder(base: Base, adapter: Adapter, dtype: torch.dtype, folder: Path) -> None:
    """Save part by part, so that only one is held twice."""
    for part, component in base.pipeline.components.items():
        if isinstance(component, nn.Module):
            component = getattr(merged_pipeline(base, adapter, dtype, part), part)
        if component is not None:
            component.save_pretrained(folder / part)
        if part in map(tokenizer_name, base.text_encoders):  # vocab.json and merges.txt, which transformers 4 reads
            component.backend_tokenizer.model.save(str(folder / part))
        if part in base.text_encoders:
            _write_with_old_names(component, folder / part / "model.safetensors")
    base.pipeline.save_config(folder)


def _write_with_old_names(text_encoder: nn.Module, file: Path) -> None:
    """Write a text encoder with `text_model.` before its tensors, which transformers 5 leaves out and other readers need."""
    right, state = ("text_model.", "text_projection."), text_encoder.state_dict()
    named = {name if name.startswith(right) else f"text_model.{name}": tensor for name, tensor in state.items()}
    save_file(named, file, {"format": "pt"})


def _metadata(base: Base, path: Path) -> dict[str, str]:
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": {
            "sd1": "stable-diffusion-v1",
            "sd2": "stable-diffusion-v2-768-v" if base.prediction_type == "v_prediction" else "stable-diffusion-v2-512",
            "sdxl": "stable-diffusion-xl-v1-base",
        }[base.family],
        "modelspec.title": path.stem,
        "modelspec.resolution": f"{base.resolution}x{base.resolution}",
        "modelspec.prediction_type": "v" if base.prediction_type == "v_prediction" else "epsilon",
    }


def _marks(base: Base) -> dict[str, torch.Tensor]:
    """Return the empty tensors by whose names AUTOMATIC1111 and ComfyUI tell what SDXL predicts, and from which noise."""
    marks = {
        "v_pred": base.family == "sdxl" and base.prediction_type == "v_prediction",
        "ztsnr": base.pipeline.scheduler.config.get("rescale_betas_zero_snr", False),
    }
    return {name: torch.zeros(0) for name, is_so in marks.items() if is_so}


def _check_not_the_base(base: Base, targets: Sequence[Path]) -> None:
    """Raise `InputError` when writing one of `targets` would replace files of `base`, which is merged into as they are."""
    source = Path(base.source).resolve()
    for target in targets if source.exists() else ():  # a hub id is no path
        place = target.resolve()
        within = any(folder.exists() and folder.samefile(source) for folder in (place, *place.parents))
        if within or (place.exists() and any(folder.samefile(place) for folder in source.parents)):
            raise InputError(
                f"'{target}' would overwrite the base '{base.source}', which is read by this export; choose another --out."
            )


def _check_folder(path: Path, *, overwrite: bool) -> None:
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / "model_index.json").exists()):
        raise InputError(f"'{path}' exists and is no diffusers folder, so it is never replaced; choose another --out.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise InputError(f"'{path}' exists already; give --force to overwrite it, or choose another --out.")
