"""Random bases with the structure and names of SD1.5, SD2.1 and SDXL, but narrow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from spectral_diffusion.checkpoint import to_original_layout
from spectral_diffusion.checkpoint.clip_tokenizer import clip_tokenizer
from spectral_diffusion.checkpoint.single_file import CONFIGURATIONS

FAMILIES = ("sd1", "sd2", "sdxl")
_UNETS = {
    "sd1": {"block_out_channels": [32, 32, 64, 64], "cross_attention_dim": 32, "attention_head_dim": 4, "sample_size": 8},
    "sd2": {
        "block_out_channels": [32, 32, 64, 64],
        "cross_attention_dim": 32,
        "attention_head_dim": [2, 2, 4, 4],
        "sample_size": 8,
    },
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


def narrow_configuration(family: str, folder: Path) -> Path:
    """Copy the shipped configuration of `family` to `folder`, with narrow channels and everything else as it is."""
    shutil.copytree(CONFIGURATIONS / family, folder)
    _change(folder / "unet" / "config.json", _UNETS[family])
    _change(folder / "vae" / "config.json", _VAE)
    _change(folder / "text_encoder" / "config.json", _ENCODER)
    if family == "sdxl":
        _change(folder / "text_encoder_2" / "config.json", _SECOND)
    return folder


def _change(file: Path, values: dict[str, object]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def narrow_pipeline(family: str, configuration: Path, seed: int = 0) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """Return a random pipeline of `family` as `configuration` says."""
    torch.manual_seed(seed)

    def encoder(kind: type, part: str) -> CLIPTextModel | CLIPTextModelWithProjection:
        return kind(CLIPTextConfig.from_pretrained(configuration / part))

    parts = {
        "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configuration / "unet")),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(configuration / "vae")),
        "text_encoder": encoder(CLIPTextModel, "text_encoder"),
        "tokenizer": clip_tokenizer(pad_token="!" if family == "sd2" else "<|endoftext|>"),
        "scheduler": DDIMScheduler.from_pretrained(configuration / "scheduler"),
    }
    if family == "sdxl":
        second = encoder(CLIPTextModelWithProjection, "text_encoder_2")
        tokenizer = clip_tokenizer(pad_token="!")
        return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def save_checkpoint_file(
    pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline, path: Path, dtype: torch.dtype = torch.float32
) -> Path:
    """Save `pipeline` as one file in the original layout, with a few tensors beside that checkpoints have and nobody reads."""
    tensors = {name: tensor.to(dtype) for name, tensor in to_original_layout(pipeline).items()}
    save_file(tensors | {"alphas_cumprod": torch.ones(3), "model_ema.decay": torch.ones(())}, path)
    return path
