"""Layer keys of this library and the names that LoRA files of other programs give the same layers, both ways.

A layer key is `unet.PATH`, `text_encoder.PATH` or `text_encoder_2.PATH`, the path as in diffusers and without `text_model.`.
"""

from __future__ import annotations

import re

from spectral_diffusion.bases.unet_names import UNET_RESNET, original_unet_name

ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
"""Endings of the linear layers adapted by default: every attention projection (the paper's choice)."""
FEED_FORWARD_LAYERS = ("ff.net.0.proj", "ff.net.2", "fc1", "fc2")
"""Endings of the linear layers between the attention layers, in the UNet and in the text encoders."""
CONVOLUTION_LAYERS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "proj_in", "proj_out")
"""Endings of the UNet's convolutions between and around the attention layers; later families project linearly (LoCon, LyCORIS,
Yeh et al. 2024, arXiv 2309.14859)."""

PEFT_START = "base_model.model."
"""What the names in files that PEFT writes itself begin with."""

_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
"""What a module's name begins with in a kohya, diffusers or PEFT file, and the part of the base that it means."""

_TRANSFORMER = r"(transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))|proj_in|proj_out)"
_RESNET = r"(conv[12]|conv_shortcut|time_emb_proj)"
_LAYER_KEY = re.compile(
    rf"unet\.((down|up)_blocks\.\d+|mid_block)\.(attentions\.\d+\.{_TRANSFORMER}|resnets\.\d+\.{_RESNET})"
    r"|unet\.(down_blocks\.\d+\.down|up_blocks\.\d+\.up)samplers\.0\.conv|unet\.conv_(in|out)"
    r"|unet\.(time|add)_embedding\.linear_[12]"
    r"|text_encoder(_2)?\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
)
"""The layers that LoRAs change, as this library calls them."""

_SDXL_CROSSED = (0, 1)
"""The up blocks of SDXL with attention."""
_KINDS = {"0": "resnets", "1": "attentions"}
"""What stands where at one place of the original lists."""
_EMBEDDINGS = [f"{kind}_embedding.linear_{number}" for kind in ("time", "add") for number in (1, 2)]
_ENDS = {original_unet_name(f"{name}.weight").removesuffix(".weight"): name for name in ("conv_in", "conv_out", *_EMBEDDINGS)}
"""What the original code calls the UNet's first and last convolutions and the layers that embed the time and, in SDXL, the
picture's size, and their names."""
_RESNET_NAMES = {original: name for name, original in UNET_RESNET.items()}

_WORDS = re.compile(
    r"(?:down|up|input|output|transformer)_blocks|mid(?:dle)?_block|to_(?:q|k|v|out)|(?:proj|conv)_(?:in|out)"
    r"|(?:in|out|emb)_layers|skip_connection|conv_shortcut|time_emb_proj|(?:time|add)_embedding|linear_\d|time_embed|label_emb"
    r"|text_model|self_attn|(?:q|k|v|out)_proj|[^_]+"
)
"""The steps of a path in which kohya's names have `_` for `.`; some hold a `_` of their own."""


def kohya_name(key: str, family: str) -> str:
    """Return the module name that kohya's readers map, for a layer key of a base of `family` (formats.md).

    SDXL's UNet goes by its original names, and its text encoders are numbered.
    """
    part, _, path = key.partition(".")
    if part == "unet":
        return f"lora_unet_{(_original_path(path) if family == 'sdxl' else path).replace('.', '_')}"
    prefix = {"text_encoder": "lora_te1" if family == "sdxl" else "lora_te", "text_encoder_2": "lora_te2"}[part]
    return f"{prefix}_text_model_{path.replace('.', '_')}"


def peft_name(key: str) -> str:
    """Return the module name that diffusers maps: the layer key, with `text_model.` in text encoders."""
    part, _, path = key.partition(".")
    return key if part == "unet" else f"{part}.text_model.{path}"


def layer_key_of(name: str) -> str | None:
    """Return the layer key for a module's name in a kohya, diffusers or PEFT file, or None when it means no layer we know."""
    if name.startswith(PEFT_START):  # PEFT's own files do not say which model they belong to
        path = name.removeprefix(PEFT_START)
        name = f"text_encoder.{path}" if ".layers." in path else f"unet.{path}"
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
    if prefix is None:
        return None
    path = name.removeprefix(prefix)
    if prefix.endswith("_"):
        path = ".".join(_WORDS.findall(path))
    path = path.removeprefix("text_model.").replace(".processor.", ".")
    path = re.sub(r"self_attn\.to_(q|k|v|out)$", r"self_attn.\1_proj", path)  # diffusers before 0.22
    path = re.sub(r"\.to_out$", ".to_out.0", path)
    key = f"{_PREFIXES[prefix]}.{_diffusers_path(path)}"
    return key if _LAYER_KEY.fullmatch(key) else None


def patch_side(key: str, family: str) -> int | None:
    """Return how many pixels a side a convolution called `key` reads at once, in a base of `family`; None for a linear layer."""
    if key.endswith((".conv1", ".conv2", "samplers.0.conv", ".conv_in", ".conv_out")):
        return 3
    if key.endswith(".conv_shortcut") or (family in ("sd1", "mini") and key.endswith((".proj_in", ".proj_out"))):
        return 1
    return None


def is_convolution(key: str, family: str) -> bool:
    """Tell whether the layer called `key` is a convolution in a base of `family`."""
    return patch_side(key, family) is not None


def _original_path(path: str) -> str:
    """Return the original name of a path in SDXL's UNet."""
    return original_unet_name(f"{path}.weight", _SDXL_CROSSED).removesuffix(".weight")


def _diffusers_path(path: str) -> str:
    """Undo `_original_path`; leave what already is a path of diffusers as it is. Each level has three numbers."""

    def place(found: re.Match[str]) -> str:
        side = "down" if found["list"] == "input" else "up"
        block, layer = divmod(int(found["number"]) - (side == "down"), 3)
        kind = _KINDS.get(found["kind"])
        return f"{side}_blocks.{block}.{kind}.{layer}" if kind else f"{side}_blocks.{block}.{side}samplers.0.conv"

    places = r"^(?P<list>input|output)_blocks\.(?P<number>\d+)\.(?P<kind>0\.op$|[12]\.conv$|[01](?=\.))"
    original = re.sub(places, place, path)
    original = _ENDS.get(original, original)
    original = re.sub(r"^middle_block\.1\.", "mid_block.attentions.0.", original)
    original = re.sub(r"^middle_block\.([02])\.", lambda found: f"mid_block.resnets.{int(found[1]) // 2}.", original)
    return re.sub(r"(?<=\.resnets\.)(\d+)\.(.+)$", lambda found: f"{found[1]}.{_RESNET_NAMES.get(found[2], found[2])}", original)
