"""Random bases with the structure and names of SD1.5, SD2.1 and SDXL, but narrow."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from spectral_diffusion.bases.checkpoint import to_original_layout
from spectral_diffusion.bases.checkpoint.clip_tokenizer import clip_tokenizer
from spectral_diffusion.bases.checkpoint.single_file import CONFIGURATIONS

FAMILIES = ("sd1", "sd2", "sdxl")
_FOUR_LEVELS = {"block_out_channels": [32, 32, 64, 64], "cross_attention_dim": 32, "sample_size": 8}
_UNETS = {
    "sd1": _FOUR_LEVELS | {"attention_head_dim": 4},
    "sd2": _FOUR_LEVELS | {"attention_head_dim": [2, 2, 4, 4]},
    "sdxl": {
        "block_out_channels": [32, 32, 64],
        "cross_attention_dim": 80,
        "attention_head_dim": [2, 2, 4],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 6 * 8,
        "sample_size": 8,
    },
}
_VAE = {"block_out_channels": [32, 32, 32, 32], "sample_size": 64}
_ENCODER = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2, "projection_dim": 32}
_SECOND = {"hidden_size": 48, "intermediate_size": 56, "num_attention_heads": 2, "projection_dim": 48}


@dataclass(frozen=True, kw_only=True)
class NarrowBase:
    """A random base of `family`: its `configuration`, and the same weights as a diffusers `folder` and as one `file`."""

    family: str
    configuration: Path
    folder: Path
    file: Path
    pipeline: DiffusionPipeline


def save_narrow_base(family: str, place: Path, seed: int = 0) -> NarrowBase:
    """Make and save a narrow base of `family` in `place`."""
    configuration, folder, file = place / "configuration", place / "folder", place / "base.safetensors"
    _narrow_configuration(family, configuration)
    pipeline = _random_pipeline(family, configuration, seed)
    pipeline.save_pretrained(folder)
    save_original(to_original_layout(pipeline), file)
    return NarrowBase(family=family, configuration=configuration, folder=folder, file=file, pipeline=pipeline)


def save_original(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    """Save `tensors` with two beside them that released files have and no pipeline reads."""
    save_file(tensors | {"alphas_cumprod": torch.ones(3), "model_ema.decay": torch.ones(())}, path, metadata)
    return path


def _narrow_configuration(family: str, folder: Path) -> None:
    """Copy the shipped configuration of `family`, with narrow channels and everything else as it is."""
    shutil.copytree(CONFIGURATIONS / family, folder)
    changes = {"unet": _UNETS[family], "vae": _VAE, "text_encoder": _ENCODER}
    if family == "sdxl":
        changes["text_encoder_2"] = _SECOND
    for part, values in changes.items():
        change_json(folder / part / "config.json", **values)


def change_json(file: Path, **values: object) -> None:
    """Put `values` into the JSON object in `file`."""
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def _random_pipeline(family: str, configuration: Path, seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    parts = {
        "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configuration / "unet")),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(configuration / "vae")),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(configuration / "text_encoder")),
        "tokenizer": clip_tokenizer(pad_token="!" if family == "sd2" else "<|endoftext|>"),
        "scheduler": DDIMScheduler.from_pretrained(configuration / "scheduler"),
    }
    if family != "sdxl":
        return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    second = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(configuration / "text_encoder_2"))
    return StableDiffusionXLPipeline(
        **parts, text_encoder_2=second, tokenizer_2=clip_tokenizer(pad_token="!"), add_watermarker=False
    )
