"""What the modules and tensors of a UNet are called in the original code, for those who need no model for it."""

from __future__ import annotations

import re
from collections.abc import Collection

_UNET_NAME = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_LEVEL = 3
"""Places per level of the UNet's original lists: two resnets and a sampler, in every family."""
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""What stands in a resnet of the UNet, and what the original code calls it."""


def original_unet_name(name: str, crossed: Collection[int] = ()) -> str:
    """Return the original name of the UNet's tensor or module `name`.

    The original code counts the resnets of all levels in one list; a level's down- or upsampler stands beside its last.

    Args:
        crossed: numbers of the up blocks with attention, after which the original places their upsamplers.
    """
    end, _, suffix = name.rpartition(".")
    if end in _UNET_ENDS:
        return f"{_UNET_ENDS[end]}.{suffix}"
    kind, block, module, number, rest = _UNET_NAME.fullmatch(name).groups()
    first, number = _LEVEL * int(block or 0), int(number)
    if module == "attentions":
        place = {
            "down": f"input_blocks.{first + number + 1}.1",
            "mid": "middle_block.1",
            "up": f"output_blocks.{first + number}.1",
        }
        return f"{place[kind]}.{rest}"
    if module == "downsamplers":
        return f"input_blocks.{first + _LEVEL}.0.op.{rest.removeprefix('conv.')}"
    if module == "upsamplers":
        return f"output_blocks.{first + _LEVEL - 1}.{2 if int(block) in crossed else 1}.{rest}"
    place = {
        "down": f"input_blocks.{first + number + 1}.0",
        "mid": f"middle_block.{2 * number}",
        "up": f"output_blocks.{first + number}.0",
    }
    inner, dot, ending = rest.partition(".")
    return f"{place[kind]}.{UNET_RESNET[inner]}{dot}{ending}"
