"""The family of a base: adapters fit within one only."""

from __future__ import annotations

from diffusers import DiffusionPipeline

_LEVELS = {"sd1": 4, "sd2": 4, "sdxl": 3}


def family_of(pipeline: DiffusionPipeline) -> str:
    """Return `sd1`, `sd2`, `sdxl`, or `mini` for another structure such as the embedded base's, whatever the widths."""
    config = pipeline.unet.config
    if config.addition_embed_type == "text_time":
        family = "sdxl"
    else:
        family = "sd2" if config.use_linear_projection else "sd1"
    return family if len(config.down_block_types) == _LEVELS[family] else "mini"
