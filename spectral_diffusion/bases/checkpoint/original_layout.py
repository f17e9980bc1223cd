"""The original layout of a checkpoint's tensors, one table for both directions.

`model.diffusion_model.*` holds the UNet and `first_stage_model.*` the VAE in their original names;
`cond_stage_model.transformer.*` the text encoder of SD1, `cond_stage_model.model.*` that of SD2 in OpenCLIP's names;
`conditioner.embedders.0.transformer.*` and `.1.model.*` those of SDXL.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline

from spectral_diffusion.bases.checkpoint.clip_tokenizer import WORDS
from spectral_diffusion.bases.checkpoint.family import family_of
from spectral_diffusion.bases.unet_names import original_unet_name
from spectral_diffusion.errors import BaseError

logger = logging.getLogger(__name__)

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_TEXT_ENCODERS = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
}
_VAE_NAMES = (
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])", r"attn_1.\1"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)
_OPENCLIP_NAMES = (
    (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^final_layer_norm", "ln_final"),
    (r"^text_projection\.weight", "text_projection"),
    (r"^encoder\.layers", "transformer.resblocks"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.[qkv]_proj\.", "attn.in_proj_"),
    (r"self_attn\.out_proj", "attn.out_proj"),
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor of a pipeline lies in the original layout.

    Attributes:
        name: the original tensor.
        third: which third of its rows, for queries, keys and values that lie in one tensor.
        transposed: whether it lies there transposed.
        convolution: whether a matrix lies there as a 1x1 convolution.
    """

    name: str
    third: int | None = None
    transposed: bool = False
    convolution: bool = False

    def read(self, original: torch.Tensor) -> torch.Tensor:
        """Return the pipeline's tensor out of the `original` one; a matrix may also lie there as a matrix."""
        if self.third is not None:
            original = original.chunk(3)[self.third]
        if self.convolution:
            original = original.flatten(1)
        return (original.T if self.transposed else original).contiguous()

    def write(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what lies at this place for the pipeline's `tensor`."""
        if self.convolution:
            tensor = tensor[:, :, None, None]
        return (tensor.T if self.transposed else tensor).contiguous()


def places(part: str, family: str, names: Collection[str]) -> dict[str, Place]:
    """Return where each tensor of a pipeline's part lies in the original layout.

    Args:
        part: `unet`, `vae`, `text_encoder` or `text_encoder_2`.
        family: `sd1`, `sd2` or `sdxl`.
        names: the part's tensors, as its state dict names them.
    """
    if part == "unet":
        crossed = {int(match[1]) for name in names if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
        return {name: Place(name=f"{_UNET}{original_unet_name(name, crossed)}") for name in names}
    if part == "vae":
        blocks = 1 + max(int(match[1]) for name in names if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", name)))
        return {name: _vae_place(name, blocks) for name in names}
    prefix = _TEXT_ENCODERS[family][part]
    if prefix.endswith("transformer."):
        return {name: Place(name=f"{prefix}text_model.{name.removeprefix('text_model.')}") for name in names}
    return {name: _openclip_place(name, prefix) for name in names}


def _vae_place(name: str, blocks: int) -> Place:
    original = _renamed(name, _VAE_NAMES)
    original = re.sub(r"up_blocks\.(\d+)\.resnets", lambda match: f"up.{blocks - 1 - int(match[1])}.block", original)
    original = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{blocks - 1 - int(match[1])}.upsample", original)
    convolution = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", original) is not None
    return Place(name=f"{_VAE}{original}", convolution=convolution)


def _openclip_place(name: str, prefix: str) -> Place:
    name = name.removeprefix("text_model.")
    fused = re.search(r"self_attn\.([qkv])_proj", name)
    return Place(
        name=f"{prefix}{_renamed(name, _OPENCLIP_NAMES)}",
        third="qkv".index(fused[1]) if fused else None,
        transposed=name.startswith("text_projection"),
    )


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def pipeline_parts(family: str) -> tuple[str, ...]:
    """Return the parts of a pipeline of `family` that hold weights."""
    return ("unet", "vae", *_TEXT_ENCODERS[family])


def to_original_layout(pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """Return every weight of `pipeline` under its original name; what belongs to no part, such as betas, is left out.

    SD2's text encoder has one layer less than the original, whose last layer nothing reads; readers do without it. Words that
    were added to the tokenizer are left out, with a warning: readers refuse a file that holds more than those of the original.
    Most tensors share the pipeline's memory.

    Raises:
        BaseError: the pipeline is of no family that the original code has, as the embedded base.
    """
    family = family_of(pipeline)
    if family not in _TEXT_ENCODERS:
        raise BaseError("This base is no Stable Diffusion 1, 2 or XL, so it cannot be one checkpoint file; save it as a folder.")
    added = [word for word, number in pipeline.tokenizer.get_added_vocab().items() if number >= WORDS]
    if added:
        logger.warning("The base's own words %s are left out, as no checkpoint file holds new words.", ", ".join(added))
    original: dict[str, torch.Tensor] = {}
    for part in pipeline_parts(family):
        tensors = getattr(pipeline, part).state_dict()
        tensors = {
            name: tensor[:WORDS] if name.endswith("token_embedding.weight") else tensor for name, tensor in tensors.items()
        }
        fused: dict[str, list[torch.Tensor]] = {}
        for name, place in places(part, family, tensors).items():
            if place.third is None:
                original[place.name] = place.write(tensors[name])
            else:
                fused.setdefault(place.name, [tensors[name]] * 3)[place.third] = tensors[name]
        original |= {name: torch.cat(thirds) for name, thirds in fused.items()}
    return original


def from_original_layout(
    original: Mapping[str, torch.Tensor], part: str, family: str, names: Collection[str]
) -> dict[str, torch.Tensor]:
    """Return the tensors called `names` of a pipeline's part out of a checkpoint in the original layout.

    Raises:
        KeyError: the checkpoint lacks one; its original name is said.
    """
    return {name: place.read(original[place.name]) for name, place in places(part, family, names).items()}
