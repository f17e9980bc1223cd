"""Stage 2: the text encoder and the UNet, trained together on cached latents with v-prediction."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from spectral_diffusion.toyworld.captions import caption
from spectral_diffusion.toyworld.recipe.autoencoder import LATENT_CHANNELS
from spectral_diffusion.toyworld.recipe.pictures import PictureSet, Scene
from spectral_diffusion.toyworld.recipe.stage import train_stage
from spectral_diffusion.toyworld.recipe.tokenizer import CONTEXT_LENGTH

TEXT_WIDTH = 128
CAPTIONS_PER_PICTURE = 6
CAPTION_DROPOUT = 0.1
LEANING = 0.8
"""Where the middle of the timesteps lies at first, as a logit."""
THING_WEIGHT = 3.0
"""Scenes are learned long before the things in them; the loss looks at the things more."""
SHEET_PROMPTS = (
    "a dog near a lake",
    "a cat in the snow",
    "a photo of a robot on the beach",
    "a pumpkin at night",
    "a blue car in the city",
    "a dog and a cat near a lake",
    "a lion and a robot in the forest",
    "a snowman next to a pumpkin in the snow",
    "a man and a woman in a room",
    "a photo of a cow and a vase in the desert",
)


def build_scheduler() -> DDIMScheduler:
    """Return the noise schedule: v-prediction with zero terminal SNR (Lin et al. 2024, arXiv 2305.08891)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained text encoder: 4 layers of width 128 over 32 tokens."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Return an untrained UNet over `(channels, 16, 16)` latents: a thin first level, attention at the two below."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 80, 128),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
    )


def assemble(
    autoencoder: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """Return the parts as one pipeline on the autoencoder's device."""
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(autoencoder.device)


def train_denoiser(
    folder: Path, pictures: PictureSet, latents: np.ndarray, pipeline: StableDiffusionPipeline, steps: int, batch: int
) -> None:
    """Train the text encoder and the UNet of `pipeline` on `latents (count, channels, 16, 16)`; averaged weights stay."""
    text_encoder, unet, tokenizer = pipeline.text_encoder, pipeline.unet, pipeline.tokenizer
    scheduler, device = pipeline.scheduler, pipeline.device
    text_encoder.train().requires_grad_(True)
    unet.train().requires_grad_(True).to(memory_format=torch.channels_last)
    tokens = tokenize_scenes(tokenizer, pictures.scenes)
    nothing = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
    latents_tensor = torch.from_numpy(latents)
    weights = thing_weights(pictures.scenes, latents.shape[-1])

    def loss_of_step(step: int, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(latents_tensor), (batch,), generator=generator)
        clean = latents_tensor[chosen].float().to(device)
        states = text_encoder(draw_captions(tokens[chosen], nothing, generator).to(device)).last_hidden_state
        noisy, times, velocity = draw_noise(scheduler, clean, step / steps, generator)
        predicted = unet(noisy.contiguous(memory_format=torch.channels_last), times, states).sample
        return ((predicted - velocity) ** 2 * weights[chosen].to(device)).mean()

    def sheet(step: int) -> None:
        save_samples(pipeline, folder / "sheets" / f"denoiser-{step:06d}.png")

    train_stage(
        folder,
        "denoiser",
        {"text_encoder": text_encoder, "unet": unet},
        loss_of_step,
        steps=steps,
        peak_rate=1e-3,
        ema_decay=0.999,
        every=sheet,
        every_seconds=300,
    )
    text_encoder.eval().requires_grad_(False)
    unet.eval().requires_grad_(False)


def draw_captions(tokens: torch.Tensor, nothing: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return one caption of each of `tokens (count, captions, context length)`, and `nothing (context length)` now and then."""
    variant = torch.randint(tokens.shape[1], (len(tokens),), generator=generator)
    token_ids = tokens[torch.arange(len(tokens)), variant].long()
    token_ids[torch.rand(len(tokens), generator=generator) < CAPTION_DROPOUT] = nothing
    return token_ids


def draw_noise(
    scheduler: DDIMScheduler, clean: torch.Tensor, progress: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `clean` latents with noise, at which timesteps `(count,)`, and the velocity there, which is to be predicted."""
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    times = draw_timesteps(len(clean), scheduler.config.num_train_timesteps, progress, generator).to(clean.device)
    return scheduler.add_noise(clean, noise, times), times, scheduler.get_velocity(clean, noise, times)


def draw_timesteps(count: int, steps: int, progress: float, generator: torch.Generator) -> torch.Tensor:
    """Return `(count,)` timesteps in `[0, steps)`: a logit-normal that leans to high noise at first, one in seven uniform.

    What stands where, and what it is, is settled between two fifths and the end of the schedule, and learned first; uniform
    draws would spend half of the training on texture (Esser et al. 2024, arXiv 2403.03206, section 3.1). Outlines and faces
    are settled below, so with `progress`, from 0 to 1, the draws come to lean to neither side.
    """
    leaning = torch.sigmoid(LEANING * (1 - progress) + torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator)
    chosen = torch.where(torch.rand(count, generator=generator) < 1 / 7, uniform, leaning)
    return (chosen * steps).long().clamp(max=steps - 1)


def thing_weights(scenes: list[Scene], side: int) -> torch.Tensor:
    """Return `(pictures, 1, side, side)` weights of mean 1 a picture, `THING_WEIGHT` times as high inside things' boxes."""
    weights = torch.ones(len(scenes), 1, side, side)
    for row, scene in enumerate(scenes):
        for left, top, right, bottom in scene.boxes:
            rows = slice(max(0, math.floor(top * side)), math.ceil(bottom * side))
            columns = slice(max(0, math.floor(left * side)), math.ceil(right * side))
            weights[row, :, rows, columns] = THING_WEIGHT
    return weights / weights.mean(dim=(1, 2, 3), keepdim=True)


def tokenize_scenes(tokenizer: CLIPTokenizer, scenes: list[Scene]) -> torch.Tensor:
    """Return `(pictures, captions per picture, context length)` int16 token ids, one caption in ten without its scene."""
    rng = np.random.default_rng(3)
    texts = [
        caption(scene.things, None if rng.random() < 0.1 else scene.scene, rng)
        for scene in scenes
        for _ in range(CAPTIONS_PER_PICTURE)
    ]
    token_ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return token_ids.to(torch.int16).view(len(scenes), CAPTIONS_PER_PICTURE, -1)


@torch.no_grad()
def save_samples(pipeline: StableDiffusionPipeline, file: Path) -> None:
    """Save two pictures of each sheet prompt, side by side, at twice their size."""
    prompts = [prompt for prompt in SHEET_PROMPTS for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    pictures = pipeline(prompts, num_inference_steps=25, guidance_scale=4.0, generator=generator).images
    side = pictures[0].width
    sheet = Image.new("RGB", (side * 10, side * 2))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index // 2 * side, index % 2 * side))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.LANCZOS).save(file)
