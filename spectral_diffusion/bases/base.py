"""The base: a Stable Diffusion checkpoint that adapters are trained on and put onto, never changed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, SchedulerMixin
from torch import nn
from transformers import CLIPTokenizer

from spectral_diffusion.bases.checkpoint import PREDICTION_TYPES, family_of, hub_folder, load_folder, load_single_file
from spectral_diffusion.bases.layer_matrix import Layer, is_told_by_fingerprint
from spectral_diffusion.bases.layer_names import ATTENTION_LAYERS
from spectral_diffusion.errors import BaseError
from spectral_diffusion.stages import counted

EMBEDDED_BASE = Path(__file__).resolve().parents[2] / "assets" / "mini-sd"
"""The small Stable Diffusion that ships with the project."""

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_LATENT_PIXELS = 2**15
"""Latent pixels that go through the UNet at once where the trainer prepares: 8 pictures of SD1, 2 of SDXL."""
_MOST_PICTURES = 8
"""So many pictures at once at most, that one sees how far it is."""
_THREADS = torch.get_num_threads()


@dataclass(frozen=True, kw_only=True)
class Base:
    """A loaded checkpoint.

    Attributes:
        pipeline: the diffusers pipeline; its weights are frozen and stay as they are.
        family: `sd1`, `sd2`, `sdxl`, or `mini` for the embedded base; adapters fit within a family only.
        fingerprint: 16 hexadecimal digits of the content of all layers that adapters can change but larger convolutions, whatever
            path or precision.
        source: what was asked for, for messages.
        embedded: whether this is the base that ships with the project.
    """

    pipeline: DiffusionPipeline
    family: str
    fingerprint: str
    source: str
    embedded: bool

    @property
    def device(self) -> torch.device:
        """Where the weights are (the UNet's own property walks through all its modules every time)."""
        return next(self.pipeline.unet.parameters()).device

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders by part name: `text_encoder`, and `text_encoder_2` in SDXL."""
        return _text_encoders(self.pipeline)

    @property
    def tokenizers(self) -> dict[str, CLIPTokenizer]:
        """Each text encoder's tokenizer, by the text encoder's part name."""
        return {part: getattr(self.pipeline, tokenizer_name(part)) for part in self.text_encoders}

    @property
    def prediction_type(self) -> str:
        """What the base predicts: the noise, `epsilon`, or the velocity, `v_prediction`."""
        return self.pipeline.scheduler.config.prediction_type

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures that the base was made for."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def guidance(self) -> float:
        """How strictly the prompt is followed unless a drawing says otherwise; the embedded base smears what is pushed harder."""
        return 2.5 if self.family == "mini" else 5.0

    @property
    def pictures_at_once(self) -> int:
        """How many pictures of the base's resolution are made at once, so that memory suffices for large ones too."""
        return min(_MOST_PICTURES, max(1, _LATENT_PIXELS // self.pipeline.unet.config.sample_size**2))


def load_base(
    source: str | Path | None = None,
    *,
    device: str | None = None,
    prediction_type: str | None = None,
    configuration: Path | None = None,
    precision: torch.dtype | None = None,
) -> Base:
    """Load a base to compute with: as `read_base` does, then in memory of its own on `device`.

    Weights that stayed in the file would be lost with it, and where a number lies decides how it is summed: the last bit differs.

    On a CPU torch computes with one thread from then on where the base is of the embedded one's family, whose layers are too
    small to share: a second thread makes a training step a fifth shorter on idle cores at best, and waits in every layer where
    another program keeps one busy. With other bases it computes with as many threads as when this module was imported.

    Args:
        device: a torch device name; a GPU when there is one, else the CPU.
        precision: of UNet and text encoders; float16 on a GPU, float32 on a CPU when missing. The autoencoder is always float32:
            SDXL's overflows in half precision.
    """
    base = read_base(source, prediction_type=prediction_type, configuration=configuration)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = torch.device(device).type == "cpu"
    precision = precision or (torch.float32 if on_cpu else torch.float16)
    if on_cpu:
        torch.set_num_threads(1 if base.family == "mini" else _THREADS)
    tensors = [
        (tensor, torch.float32 if part == "vae" else precision)
        for part, model in _models(base.pipeline).items()
        for tensor in (*model.parameters(), *model.buffers())
    ]
    for tensor, floating in counted("loading the base", "tensor", tensors):
        dtype = floating if tensor.is_floating_point() else tensor.dtype
        tensor.data = tensor.data.to(device, dtype, copy=True)
    return base


def read_base(source: str | Path | None = None, *, prediction_type: str | None = None, configuration: Path | None = None) -> Base:
    """Return a base as its files hold it, for whoever reads its weights and lets nothing flow through it.

    The weights are in the files' own precision on the CPU, and those of a checkpoint file stay on the disk until they are used.

    Args:
        source: a diffusers folder, one checkpoint file or a hub id; the embedded base when missing.
        prediction_type: what the base was trained to predict, `epsilon` or `v_prediction`; what it says itself when missing.
        configuration: a folder of pipeline configurations for a checkpoint file; the shipped one of its family when missing.

    Raises:
        BaseError: there is no such base, it is damaged, or its kind is not supported.
    """
    place = str(source) if source is not None else str(EMBEDDED_BASE)
    embedded = source is None or Path(place).resolve() == EMBEDDED_BASE
    if embedded and not (EMBEDDED_BASE / "model_index.json").exists():
        raise BaseError(f"The embedded base is missing at '{EMBEDDED_BASE}'; restore it from the repository.")
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise BaseError(f"There is no prediction type '{prediction_type}'; choose one of {', '.join(PREDICTION_TYPES)}.")
    pipeline = _load_pipeline(place, prediction_type, configuration)
    pipeline.scheduler = _training_scheduler(pipeline.scheduler, prediction_type)
    pipeline.set_progress_bar_config(disable=True)
    for model in _models(pipeline).values():
        model.eval().requires_grad_(False)
    _pool_at_the_end(pipeline)
    return Base(
        pipeline=pipeline,
        family=family_of(pipeline),
        fingerprint=_fingerprint(pipeline),
        source=place,
        embedded=embedded,
    )


def _load_pipeline(place: str, prediction_type: str | None, configuration: Path | None) -> DiffusionPipeline:
    path = Path(place)
    if path.is_file():
        return load_single_file(path, prediction_type=prediction_type, configuration=configuration)
    if path.is_dir():
        return load_folder(path)
    if not _HUB_ID.fullmatch(place) or path.suffix in (".safetensors", ".ckpt"):
        raise BaseError(
            f"There is no file or folder '{place}'; give a diffusers folder, a checkpoint file or a hub id as --base."
        )
    return load_folder(hub_folder(place))


def _training_scheduler(scheduler: SchedulerMixin, prediction_type: str | None) -> SchedulerMixin:
    """Return a scheduler that adds noise as the base was trained with it; those of other kinds scale it in ways of their own.

    What else a configuration says is how somebody liked to draw, and would go on into the samplers that are chosen here.
    """
    changes = {} if prediction_type is None else {"prediction_type": prediction_type}
    if not isinstance(scheduler, DDIMScheduler):
        changes["clip_sample"] = False
    own = {*signature(DDIMScheduler).parameters, "_use_default_values"}
    return DDIMScheduler.from_config({key: value for key, value in scheduler.config.items() if key in own}, **changes)


def _pool_at_the_end(pipeline: DiffusionPipeline) -> None:
    """Let text encoders take their pooled output at the end of the text.

    Released configurations make them look for the highest number instead, which new tokens exceed.
    """
    for part, model in _text_encoders(pipeline).items():
        for module in model.modules():
            if hasattr(module, "eos_token_id"):
                module.eos_token_id = getattr(pipeline, tokenizer_name(part)).eos_token_id


def _text_encoders(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    models = {part: getattr(pipeline, part, None) for part in ("text_encoder", "text_encoder_2")}
    return {part: model for part, model in models.items() if model is not None}


def _models(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    return {**_text_encoders(pipeline), "unet": pipeline.unet, "vae": pipeline.vae}


def tokenizer_name(part: str) -> str:
    """Return what a pipeline calls the tokenizer of the text encoder `part`."""
    return part.replace("text_encoder", "tokenizer")


def layer_key(part: str, module_path: str) -> str:
    """Return the stable name of a layer: `unet.PATH` or, without the `text_model.` of some versions, `text_encoder.PATH`."""
    return f"{part}.{module_path.removeprefix('text_model.')}"


def adaptable_layers(base: Base, endings: tuple[str, ...] | None = ATTENTION_LAYERS) -> dict[str, Layer]:
    """Return the layers whose path ends in one of `endings`, by stable layer key, in model order.

    They are the linear layers and the convolutions of the text encoders and the UNet; for None all are returned.
    """
    return dict(_adaptable_layers(base.pipeline, endings))


def _adaptable_layers(pipeline: DiffusionPipeline, endings: tuple[str, ...] | None) -> Iterator[tuple[str, Layer]]:
    for part, model in (*_text_encoders(pipeline).items(), ("unet", pipeline.unet)):
        for path, module in model.named_modules():
            chosen = endings is None or any(f".{path}".endswith(f".{ending}") for ending in endings)
            if chosen and isinstance(module, nn.Linear | nn.Conv2d):
                yield layer_key(part, path), module


def _fingerprint(pipeline: DiffusionPipeline) -> str:
    digest = hashlib.sha256()
    for key, layer in counted("reading the base", "layer", list(_adaptable_layers(pipeline, None))):
        if is_told_by_fingerprint(layer):
            digest.update(f"{key} {tuple(layer.weight.shape)}\n".encode())
            digest.update(layer.weight.detach().half().contiguous().numpy().data)
    return digest.hexdigest()[:16]
