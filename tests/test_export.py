"""Export: what other tools read is what the library holds in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_parametrisations import random_adapter, shared_base

from spectral_diffusion.adapter import Adapter
from spectral_diffusion.base import Base, load_base
from spectral_diffusion.errors import AdapterError
from spectral_diffusion.exactness import export_error, fusion_error
from spectral_diffusion.export import export_kohya
from spectral_diffusion.export.kohya import embedding_file_name, kohya_name
from spectral_diffusion.fusion import fuse

HALF_PRECISION = 1e-3
"""Largest relative difference of a delta written in float16 (issue 2, exactness)."""


@pytest.fixture
def base(tiny_base_folder: Path) -> Base:
    return shared_base("tiny", tiny_base_folder)


@pytest.fixture
def pair(base: Base) -> Adapter:
    forms = ("additive", "additive")
    adapters = [
        random_adapter(base, form, token=f"<V{n}>", start=2 * n, seed=n, measured=True) for n, form in enumerate(forms, 1)
    ]
    return fuse(adapters, method="aligned")


def test_names_are_those_that_every_reader_maps() -> None:
    unet = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert kohya_name(unet) == "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    text = "text_encoder.encoder.layers.0.self_attn.q_proj"
    assert kohya_name(text) == "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def test_the_file_holds_one_alpha_and_nothing_but_lora_keys(pair: Adapter, tmp_path: Path) -> None:
    export = export_kohya(pair, tmp_path / "pair.safetensors")
    tensors = load_file(export.lora)
    modules = {kohya_name(key) for key in pair.layer_keys()}
    endings = ("lora_up.weight", "lora_down.weight", "alpha")
    assert set(tensors) == {f"{module}.{ending}" for module in modules for ending in endings}
    assert {float(tensors[f"{module}.alpha"]) for module in modules} == {float(export.rank)}
    assert all(len(tensors[f"{module}.lora_down.weight"]) == export.rank for module in modules)


def test_the_metadata_says_what_readers_ask_for(pair: Adapter, tmp_path: Path) -> None:
    export = export_kohya(pair, tmp_path / "pair.safetensors")
    with safe_open(export.lora, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_output_name"] == "pair"
    assert json.loads(export.description.read_text())["activation text"] == "V1 and V2"
    assert export.trigger_words == {"<V1>": "V1", "<V2>": "V2"}


def test_diffusers_loads_every_modules_delta(base: Base, pair: Adapter, tmp_path: Path) -> None:
    export = export_kohya(pair, tmp_path / "pair.safetensors")
    assert export_error(base, pair, export.lora) < HALF_PRECISION


def test_the_export_check_sees_a_wrong_file(base: Base, pair: Adapter, tmp_path: Path) -> None:
    export = export_kohya(pair.scaled(1.01), tmp_path / "pair.safetensors")
    assert export_error(base, pair, export.lora) == pytest.approx(0.01, rel=0.2)


def test_the_fusion_check_is_exact(base: Base, pair: Adapter) -> None:
    assert fusion_error(base, pair) < 1e-5


def test_diffusers_loads_the_token(pair: Adapter, tiny_base_folder: Path, tmp_path: Path) -> None:
    export = export_kohya(pair, tmp_path / "pair.safetensors")
    pipeline = load_base(tiny_base_folder, device="cpu").pipeline
    pipeline.load_textual_inversion(str(export.embeddings["<V1>"]), token="<V1>")
    row = pipeline.tokenizer("<V1>", add_special_tokens=False).input_ids[0]
    loaded = pipeline.text_encoder.get_input_embeddings().weight[row]
    torch.testing.assert_close(loaded, pair.concepts[0].embedding[0], rtol=HALF_PRECISION, atol=HALF_PRECISION)


@pytest.mark.parametrize(("token", "name"), [("<V1>", "V1"), ("<my/cat>", "my_cat"), ("<Mückchen>", "Mückchen"), ("<猫>", "猫")])
def test_a_token_becomes_a_file_name_that_every_file_system_takes(token: str, name: str) -> None:
    assert embedding_file_name(token) == name


def test_numbers_too_large_for_half_precision_are_refused(pair: Adapter, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="too large"):
        export_kohya(pair.scaled(1e12), tmp_path / "pair.safetensors")
    assert not (tmp_path / "pair.safetensors").exists()
