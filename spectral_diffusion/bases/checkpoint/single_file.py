"""Load one checkpoint file as a pipeline: the shipped configuration of its family, and its own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from spectral_diffusion.bases.checkpoint.checkpoint_file import Checkpoint, read_checkpoint
from spectral_diffusion.bases.checkpoint.clip_tokenizer import END, clip_tokenizer
from spectral_diffusion.bases.checkpoint.original_layout import from_original_layout, pipeline_parts
from spectral_diffusion.bases.checkpoint.recognition import family_of_checkpoint, prediction_type_of
from spectral_diffusion.errors import BaseError
from spectral_diffusion.finite import is_finite

CONFIGURATIONS = Path(__file__).resolve().parents[3] / "assets" / "configs"
"""A folder of pipeline configurations per family."""

_PAD = "!"
"""What OpenCLIP pads with: the word of number 0."""
_NAMES = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "SDXL"}
_PLAIN_SD1 = "cond_stage_model.transformer."
_PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)


def load_single_file(path: Path, *, prediction_type: str | None = None, configuration: Path | None = None) -> DiffusionPipeline:
    """Load a checkpoint file in the original layout, in its own precision; weights stay on the disk until they are used.

    Args:
        prediction_type: one of `PREDICTION_TYPES`; what the file says when missing.
        configuration: a folder of pipeline configurations; the shipped one of the file's family when missing.

    Raises:
        BaseError: the file is damaged, of another kind, or not built as its family is.
    """
    checkpoint = read_checkpoint(path)
    family = family_of_checkpoint(checkpoint)
    folder = configuration or CONFIGURATIONS / family
    prediction_type = prediction_type or prediction_type_of(checkpoint, family)
    models = {part: _loaded(_empty_model(part, folder), checkpoint, part, family) for part in pipeline_parts(family)}
    if family == "sd2" and prediction_type == "v_prediction" and configuration is None:
        models["unet"].register_to_config(sample_size=96)  # the released kind draws 768 pixels
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    noise = {"prediction_type": prediction_type}
    if "ztsnr" in checkpoint.tensors:
        noise |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    models["scheduler"] = DDIMScheduler.from_config(scheduler.config, **noise)
    models["tokenizer"] = clip_tokenizer(pad_token=_PAD if family == "sd2" else END)
    if family == "sdxl":
        return StableDiffusionXLPipeline(**models, tokenizer_2=clip_tokenizer(pad_token=_PAD), add_watermarker=False)
    return StableDiffusionPipeline(**models, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _empty_model(part: str, folder: Path) -> nn.Module:
    """Return the model of a part without its weights."""
    with init_empty_weights(include_buffers=False):
        if part == "unet":
            return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / part))
        if part == "vae":
            return AutoencoderKL.from_config(AutoencoderKL.load_config(folder / part))
        kind = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
        return kind(CLIPTextConfig.from_pretrained(folder / part))


def _loaded(model: nn.Module, checkpoint: Checkpoint, part: str, family: str) -> nn.Module:
    """Return `model` with its weights."""
    wanted = model.state_dict()
    try:
        tensors = from_original_layout(_with_usual_names(checkpoint.tensors), part, family, wanted)
    except KeyError as error:
        raise BaseError(
            f"'{checkpoint.path}' has no tensor {error}, which every {_NAMES[family]} has; it is incomplete, or a smaller model "
            "distilled from it, which is not supported."
        ) from error
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise BaseError(
                f"'{checkpoint.path}' is not built as {_NAMES[family]}: '{part}.{name}' is {tuple(tensor.shape)}, "
                f"expected {tuple(wanted[name].shape)}."
            )
        tensors[name] = tensor if tensor.dtype in _PRECISIONS else tensor.float()
        if not is_finite(tensors[name]):
            raise BaseError(f"'{checkpoint.path}' holds NaN or infinite numbers in '{part}.{name}'; fetch another copy.")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _with_usual_names(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return `tensors` with the `text_model.` that the text encoder's names lack in some SD1 files."""
    if f"{_PLAIN_SD1}embeddings.token_embedding.weight" not in tensors:
        return tensors
    return {name.replace(_PLAIN_SD1, f"{_PLAIN_SD1}text_model."): tensor for name, tensor in tensors.items()}
