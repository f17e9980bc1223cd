"""The base: a Stable Diffusion checkpoint that adapters are trained on and put onto, never changed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import nn
from transformers import CLIPTokenizer

from spectral_diffusion.errors import BaseError

logger = logging.getLogger(__name__)

EMBEDDED_BASE = Path(__file__).resolve().parents[1] / "assets" / "mini-sd"
"""The small Stable Diffusion that ships with the project."""

ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
"""Endings of the linear layers adapted by default: every attention projection (the paper's choice)."""

_FAMILY_OF_TEXT_WIDTH = {768: "sd1", 1024: "sd2"}


@dataclass(frozen=True, kw_only=True)
class Base:
    """A loaded checkpoint.

    Attributes:
        pipeline: the diffusers pipeline; its weights are frozen and stay as they are.
        family: `sd1`, `sd2`, or `mini` for the embedded base; adapters fit within a family only.
        fingerprint: 16 hexadecimal digits of the content of all attention projections, whatever the path.
        source: what was asked for, for messages.
        embedded: whether this is the base that ships with the project.
    """

    pipeline: StableDiffusionPipeline
    family: str
    fingerprint: str
    source: str
    embedded: bool

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.pipeline.unet.device

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders by part name: `text_encoder`, and `text_encoder_2` in SDXL."""
        return _text_encoders(self.pipeline)

    @property
    def tokenizers(self) -> dict[str, CLIPTokenizer]:
        """Each text encoder's tokenizer, by the text encoder's part name."""
        return {part: getattr(self.pipeline, tokenizer_name(part)) for part in self.text_encoders}

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures that the base was made for."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor


def load_base(source: str | Path | None = None, *, device: str | None = None) -> Base:
    """Load a base.

    Args:
        source: a diffusers folder or a hub id; the embedded base when missing.
        device: a torch device name; a GPU when there is one, else the CPU.

    Raises:
        BaseError: there is no such base, it is damaged, or its kind is not supported.
    """
    place = str(source) if source is not None else str(EMBEDDED_BASE)
    pipeline = _load_pipeline(place, embedded=source is None)
    text_width = pipeline.text_encoder.config.hidden_size
    embedded = source is None or Path(place).resolve() == EMBEDDED_BASE
    pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipeline.set_progress_bar_config(disable=True)
    for model in (pipeline.unet, pipeline.vae, *_text_encoders(pipeline).values()):
        model.eval().requires_grad_(False)
    return Base(
        pipeline=pipeline,
        family=_FAMILY_OF_TEXT_WIDTH.get(text_width, "mini"),
        fingerprint=_fingerprint(pipeline),
        source=place,
        embedded=embedded,
    )


def _load_pipeline(place: str, *, embedded: bool) -> StableDiffusionPipeline:
    if embedded and not (EMBEDDED_BASE / "model_index.json").exists():
        raise BaseError(f"The embedded base is missing at '{EMBEDDED_BASE}'; restore it from the repository.")
    path = Path(place)
    if path.is_file():
        raise BaseError(
            f"'{place}' is a single file; give a diffusers folder (one with a 'model_index.json') or a hub id as --base."
        )
    if path.is_dir() and not (path / "model_index.json").exists():
        raise BaseError(f"'{place}' is not a diffusers folder: it has no 'model_index.json'; give one that has as --base.")
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            place,
            torch_dtype=torch.float32,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            low_cpu_mem_usage=True,
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = (
            "the folder is damaged or incomplete; fetch it again"
            if path.is_dir()
            else "download it on a machine with a network ('hf download ID --local-dir FOLDER') and give that folder as --base"
        )
        raise BaseError(f"The base '{place}' could not be loaded ({reason}); {remedy}.") from error
    if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
        raise BaseError(f"'{place}' is an inpainting or editing checkpoint; give a plain text-to-image base.")
    return pipeline


def _text_encoders(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    models = {part: getattr(pipeline, part, None) for part in ("text_encoder", "text_encoder_2")}
    return {part: model for part, model in models.items() if model is not None}


def tokenizer_name(part: str) -> str:
    """Return what a pipeline calls the tokenizer of the text encoder `part`."""
    return part.replace("text_encoder", "tokenizer")


def layer_key(part: str, module_path: str) -> str:
    """Return the stable name of a layer: `unet.PATH` or, without the `text_model.` of some versions, `text_encoder.PATH`."""
    return f"{part}.{module_path.removeprefix('text_model.')}"


def linear_layers(base: Base, endings: tuple[str, ...] | None = ATTENTION_LAYERS) -> dict[str, nn.Linear]:
    """Return the linear layers whose path ends in one of `endings` (all for None), by stable layer key, in model order."""
    return dict(_linear_layers(base.pipeline, endings))


def _linear_layers(pipeline: DiffusionPipeline, endings: tuple[str, ...] | None) -> Iterator[tuple[str, nn.Linear]]:
    for part, model in (*_text_encoders(pipeline).items(), ("unet", pipeline.unet)):
        for path, module in model.named_modules():
            chosen = endings is None or any(f".{path}".endswith(f".{ending}") for ending in endings)
            if chosen and isinstance(module, nn.Linear):
                yield layer_key(part, path), module


def _fingerprint(pipeline: DiffusionPipeline) -> str:
    digest = hashlib.sha256()
    for key, layer in _linear_layers(pipeline, ATTENTION_LAYERS):
        digest.update(f"{key} {tuple(layer.weight.shape)}\n".encode())
        digest.update(layer.weight.detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
