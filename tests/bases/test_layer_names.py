"""Names of layers in other tools: tables written from each reader's rules (formats.md), at the full depth of the real models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel
from exported_loras import ENDINGS
from narrow_bases import FAMILIES
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from spectral_diffusion.bases.base import layer_key
from spectral_diffusion.bases.checkpoint.single_file import CONFIGURATIONS
from spectral_diffusion.bases.layer_names import (
    kohya_name,
    layer_key_of,
    peft_name,
)

ATTENTION = ("to_q", "to_k", "to_v", "to_out_0")
TEXT_LAYERS = ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2")
FEED_FORWARD = ("ff_net_0_proj", "ff_net_2")

ENCODER_DEPTHS = {"sd1": {"te": 12}, "sd2": {"te": 23}, "sdxl": {"te1": 12, "te2": 32}}

DIFFUSERS_PLACES = {f"down_blocks_{block}_attentions_{layer}": 1 for block in (0, 1, 2) for layer in (0, 1)}
DIFFUSERS_PLACES |= {"mid_block_attentions_0": 1}
DIFFUSERS_PLACES |= {f"up_blocks_{block}_attentions_{layer}": 1 for block in (1, 2, 3) for layer in (0, 1, 2)}
"""Transformers of SD1 and SD2 as diffusers and kohya's scripts call them, and how many blocks each has."""

ORIGINAL_PLACES = {f"input_blocks_{number}_1": 1 for number in (1, 2, 4, 5, 7, 8)}
ORIGINAL_PLACES |= {"middle_block_1": 1} | {f"output_blocks_{number}_1": 1 for number in range(3, 12)}
"""The same in the original code, which AUTOMATIC1111 runs."""

SDXL_PLACES = {"input_blocks_4_1": 2, "input_blocks_5_1": 2, "input_blocks_7_1": 10, "input_blocks_8_1": 10}
SDXL_PLACES |= {"middle_block_1": 10, "output_blocks_0_1": 10, "output_blocks_1_1": 10, "output_blocks_2_1": 10}
SDXL_PLACES |= {"output_blocks_3_1": 2, "output_blocks_4_1": 2, "output_blocks_5_1": 2}
"""Those of SDXL in the original code, which kohya's scripts, AUTOMATIC1111 and ComfyUI run."""


def transformer_layers(places: dict[str, int], prefix: str) -> Iterator[str]:
    for place, depth in places.items():
        yield from (f"{prefix}{place}_{name}" for name in ("proj_in", "proj_out"))
        for block in range(depth):
            for inner in (*(f"{attention}_{name}" for attention in ("attn1", "attn2") for name in ATTENTION), *FEED_FORWARD):
                yield f"{prefix}{place}_transformer_blocks_{block}_{inner}"


def diffusers_resnets() -> Iterator[str]:
    """Yield the resnets' and samplers' layers of SD1 and SD2 as diffusers and kohya's scripts call them."""
    widened = {"down_blocks_1_resnets_0", "down_blocks_2_resnets_0"}
    widened |= {f"up_blocks_{block}_resnets_{layer}" for block in range(4) for layer in range(3)}
    places = [f"down_blocks_{block}_resnets_{layer}" for block in range(4) for layer in range(2)]
    places += ["mid_block_resnets_0", "mid_block_resnets_1", *sorted(widened - set(places))]
    for place in places:
        yield from (f"lora_unet_{place}_{name}" for name in ("conv1", "conv2", "time_emb_proj"))
        if place in widened:
            yield f"lora_unet_{place}_conv_shortcut"
    yield from (f"lora_unet_down_blocks_{block}_downsamplers_0_conv" for block in range(3))
    yield from (f"lora_unet_up_blocks_{block}_upsamplers_0_conv" for block in range(3))


ORIGINAL_RESNETS = {
    "sd1": {
        "plain": ("input_blocks_1_0", "input_blocks_2_0", "input_blocks_5_0", "input_blocks_8_0", "input_blocks_10_0",
                  "input_blocks_11_0", "middle_block_0", "middle_block_2"),
        "widened": ("input_blocks_4_0", "input_blocks_7_0", *(f"output_blocks_{number}_0" for number in range(12))),
        "samplers": ("input_blocks_3_0_op", "input_blocks_6_0_op", "input_blocks_9_0_op", "output_blocks_2_1_conv",
                     "output_blocks_5_2_conv", "output_blocks_8_2_conv"),
    },
    "sdxl": {
        "plain": ("input_blocks_1_0", "input_blocks_2_0", "input_blocks_5_0", "input_blocks_8_0", "middle_block_0",
                  "middle_block_2"),
        "widened": ("input_blocks_4_0", "input_blocks_7_0", *(f"output_blocks_{number}_0" for number in range(9))),
        "samplers": ("input_blocks_3_0_op", "input_blocks_6_0_op", "output_blocks_2_2_conv", "output_blocks_5_2_conv"),
    },
}  # fmt: skip
"""Where resnets stand in the original code, with and without a convolution beside them, and the layers between levels."""


def original_resnets(family: str, prefix: str) -> Iterator[str]:
    places = ORIGINAL_RESNETS["sdxl" if family == "sdxl" else "sd1"]
    for place in (*places["plain"], *places["widened"]):
        yield from (f"{prefix}{place}_{name}" for name in ("in_layers_2", "out_layers_3", "emb_layers_1"))
    yield from (f"{prefix}{place}_skip_connection" for place in places["widened"])
    yield from (f"{prefix}{name}" for name in places["samplers"])


def text_layers(family: str, names: tuple[str, ...] = TEXT_LAYERS) -> Iterator[str]:
    for prefix, depth in ENCODER_DEPTHS[family].items():
        yield from (f"lora_{prefix}_text_model_encoder_layers_{layer}_{name}" for layer in range(depth) for name in names)


@cache
def keys_of(family: str) -> tuple[str, ...]:
    """Return the keys of all layers that LoRAs change in the real model of `family`, built without memory."""
    folder = CONFIGURATIONS / family
    with torch.device("meta"):
        models = {"unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))}
        models["text_encoder"] = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        if family == "sdxl":
            second = CLIPTextConfig.from_pretrained(folder / "text_encoder_2")
            models["text_encoder_2"] = CLIPTextModelWithProjection(second)
    return tuple(
        layer_key(part, path)
        for part, model in models.items()
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and any(f".{path}".endswith(f".{ending}") for ending in ENDINGS)
    )


def names_of(family: str) -> set[str]:
    names = [kohya_name(key, family) for key in keys_of(family)]
    assert len(names) == len(set(names))
    return set(names)


@pytest.mark.parametrize(
    ("family", "count"), [("sd1", 16 * 12 + 12 * 6 + 86), ("sd2", 16 * 12 + 23 * 6 + 86), ("sdxl", 722 + 44 * 6 + 66)]
)
def test_kohyas_scripts_know_every_name(family: str, count: int) -> None:
    """They call a module `lora_unet_` or `lora_te_` and its path, in the UNet that they run themselves."""
    places = SDXL_PLACES if family == "sdxl" else DIFFUSERS_PLACES
    resnets = original_resnets(family, "lora_unet_") if family == "sdxl" else diffusers_resnets()
    table = {*transformer_layers(places, "lora_unet_"), *resnets, *text_layers(family)}
    assert names_of(family) == table and len(table) == count


@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_knows_every_name(family: str) -> None:
    """It takes the paths of diffusers and the original ones in the UNet, and these prefixes in text encoders."""
    unet = {*transformer_layers(SDXL_PLACES if family == "sdxl" else ORIGINAL_PLACES, "lora_unet_")}
    unet |= {*original_resnets(family, "lora_unet_")}
    if family != "sdxl":
        unet |= {*transformer_layers(DIFFUSERS_PLACES, "lora_unet_"), *diffusers_resnets()}
    assert names_of(family) <= unet | {*text_layers(family)}


A1111_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def a1111_module(name: str, family: str) -> str:
    """Return the module that AUTOMATIC1111 finds for `name`, in the words of the original code."""
    if found := re.fullmatch(r"lora_unet_(down|up)_blocks_(\d+)_attentions_(\d+)_(.+)", name):
        direction, block, layer, rest = found[1], int(found[2]), int(found[3]), found[4]
        number = 1 + 3 * block + layer if direction == "down" else 3 * block + layer
        return f"diffusion_model_{'input' if direction == 'down' else 'output'}_blocks_{number}_1_{rest}"
    if found := re.fullmatch(r"lora_unet_(down|up)_blocks_(\d+)_resnets_(\d+)_(.+)", name):
        direction, number = found[1], 3 * int(found[2]) + int(found[3])
        place = f"input_blocks_{1 + number}_0" if direction == "down" else f"output_blocks_{number}_0"
        return f"diffusion_model_{place}_{A1111_RESNET[found[4]]}"
    if found := re.fullmatch(r"lora_unet_mid_block_resnets_(\d)_(.+)", name):
        return f"diffusion_model_middle_block_{2 * int(found[1])}_{A1111_RESNET[found[2]]}"
    if found := re.fullmatch(r"lora_unet_down_blocks_(\d)_downsamplers_0_conv", name):
        return f"diffusion_model_input_blocks_{3 + 3 * int(found[1])}_0_op"
    if found := re.fullmatch(r"lora_unet_up_blocks_(\d)_upsamplers_0_conv", name):
        return f"diffusion_model_output_blocks_{2 + 3 * int(found[1])}_{2 if int(found[1]) else 1}_conv"
    if found := re.fullmatch(r"lora_unet_mid_block_attentions_0_(.+)", name):
        return f"diffusion_model_middle_block_1_{found[1]}"
    if found := re.fullmatch(r"lora_te_text_model_encoder_layers_(\d+)_(.+)", name):
        if family != "sd2":
            return f"transformer_text_model_encoder_layers_{found[1]}_{found[2]}"
        return f"model_transformer_resblocks_{found[1]}_{openclip(found[2])}"
    if found := re.fullmatch(r"lora_te2_text_model_encoder_layers_(\d+)_(.+)", name):
        return f"1_model_transformer_resblocks_{found[1]}_{openclip(found[2])}"
    if family == "sdxl":
        name = name.replace("lora_te1_text_model", "0_transformer_text_model")
    return name.replace("lora_unet", "diffusion_model")


def openclip(name: str) -> str:
    return name.replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj").replace("self_attn", "attn")


@pytest.mark.parametrize("family", FAMILIES)
def test_automatic1111_knows_every_name(family: str) -> None:
    places = SDXL_PLACES if family == "sdxl" else ORIGINAL_PLACES
    table = {*transformer_layers(places, "diffusion_model_"), *original_resnets(family, "diffusion_model_")}
    open_names = [openclip(name) for name in TEXT_LAYERS]
    if family == "sd1":
        table |= {f"transformer_text_model_encoder_layers_{layer}_{name}" for layer in range(12) for name in TEXT_LAYERS}
    elif family == "sd2":
        table |= {f"model_transformer_resblocks_{layer}_{name}" for layer in range(23) for name in open_names}
    else:
        table |= {f"0_transformer_text_model_encoder_layers_{layer}_{name}" for layer in range(12) for name in TEXT_LAYERS}
        table |= {f"1_model_transformer_resblocks_{layer}_{name}" for layer in range(32) for name in open_names}
    assert {a1111_module(name, family) for name in names_of(family)} == table


@pytest.mark.parametrize("family", FAMILIES)
def test_invokeai_sees_the_base_by_these_names(family: str) -> None:
    assert any(name.endswith("attn2_to_k") for name in names_of(family))
    assert not any("text_projection" in name for name in names_of(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_names_are_paths_with_text_model_in_text_encoders(family: str) -> None:
    for key in keys_of(family):
        part, _, path = key.partition(".")
        assert peft_name(key) == (key if part == "unet" else f"{part}.text_model.{path}")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_naming_is_read_back(family: str) -> None:
    for key in keys_of(family):
        assert layer_key_of(kohya_name(key, family)) == key
        assert layer_key_of(peft_name(key)) == layer_key_of(key) == key
        if not key.startswith("text_encoder_2."):
            path = peft_name(key).partition(".")[2]
            assert layer_key_of(f"base_model.model.{path}") == key


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("lora_te1_text_model_encoder_layers_11_mlp_fc1", "text_encoder.encoder.layers.11.mlp.fc1"),
        ("lora_unet_down_blocks_1_attentions_0_proj_in", "unet.down_blocks.1.attentions.0.proj_in"),
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        ),
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.to_q",
            "text_encoder.encoder.layers.3.self_attn.q_proj",
        ),
        ("lora_unet_input_blocks_0_0", "unet.conv_in"),
        ("lora_unet_conv_in", "unet.conv_in"),
        ("lora_unet_out_2", "unet.conv_out"),
        ("lora_unet_out_0", None),
        ("unet.down_blocks.0.resnets.0.norm1", None),
        ("lora_unet_time_embedding_linear_1", "unet.time_embedding.linear_1"),
        ("lora_unet_time_embed_2", "unet.time_embedding.linear_2"),
        ("lora_unet_add_embedding_linear_1", "unet.add_embedding.linear_1"),
        ("lora_unet_label_emb_0_2", "unet.add_embedding.linear_2"),
        ("lora_te2_text_projection", None),
        ("transformer.single_blocks.0.linear1", None),
        ("unet.", None),
        ("", None),
    ],
)
def test_other_spellings_are_read_and_unknown_layers_are_not(name: str, key: str | None) -> None:
    assert layer_key_of(name) == key
